"""An answer and what it took; its reasoning told from what follows, also while it is written."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mpi_mlx.data.completion import THINK_CLOSE, THINK_OPEN, split_completion
from mpi_mlx.serving.calls import overlap


@dataclass
class ReplyStats:
    """What an answer took. ``cached_tokens`` of the ``prompt_tokens`` were still known from earlier turns."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    ended: str = "stop"  # or "length", "interrupted"

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, the first token left out."""
        spent = self.seconds - self.first_token_seconds
        return (self.completion_tokens - 1) / spent if self.completion_tokens > 1 and spent > 0 else 0.0


@dataclass
class Reply:
    """An answer: its text as generated, and how it came about."""

    text: str
    in_context: bool
    stats: ReplyStats
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    opened: bool = False  # the prompt ended by opening the trace
    over: bool = False  # nothing more is written to it

    @property
    def parts(self) -> tuple[str | None, str]:
        """(reasoning or None, answer); what may become a tag is left out while more is written."""
        text = self.text
        if not self.over and THINK_OPEN.startswith(text.strip()):
            return ("" if self.opened else None), ""
        if self.opened and THINK_OPEN not in text:
            text = THINK_OPEN + text
        if not self.over and THINK_OPEN in text:
            text = text[: len(text) - overlap(text, THINK_CLOSE)]
        return split_completion(text)

    @property
    def reasoning(self) -> str | None:
        """The trace, None where there is none."""
        return self.parts[0]

    @property
    def answer(self) -> str:
        """What follows the trace."""
        return self.parts[1]
