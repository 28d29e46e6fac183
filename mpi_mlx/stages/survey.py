"""Looking at all rows of a stage before the first is trained on: an odd one must not end a run after an hour."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from mpi_mlx.data.examples import Example, collected
from mpi_mlx.documents import PolicyDocument, place_document
from mpi_mlx.errors import DataError
from mpi_mlx.training import world


@dataclass(frozen=True)
class Survey:
    """The rows that a stage will take: how many there are, and the tokens of the longest.

    ``document``: how many of those the document adds, where rows carry it.
    """

    rows: int
    longest: int
    document: int = 0


class Findings:
    """What one process found in its share of the rows."""

    def __init__(self, stage: str):
        self.stage = stage
        self.problems: list[str] = []
        self.lengths: dict[Hashable, tuple[int, str]] = {}  # row: tokens, where
        self.document = 0  # tokens that it adds to a row

    def measure(self, row: Hashable, example: Example, look: Callable[[], int]) -> None:
        """Keeps the tokens that ``look`` counts in a row, or why it cannot."""
        try:
            self.lengths[row] = look(), example.where
        except DataError as error:
            said = str(error)
            told = example.source in said if example.source else repr(example.id) in said
            self.problems.append(said if told else f"{example.where}: {said}")

    def conclude(self, limit: int | None = None) -> Survey:
        """Joins what the processes found: each of them returns, or raises, the same.

        Raises:
            DataError: all rows that cannot be read, or how many are over ``limit`` tokens, and the longest.
        """
        over = sum(limit is not None and tokens > limit for tokens, _ in self.lengths.values())
        longest = max(self.lengths.values(), default=(0, ""))
        found = world.gather_objects([[self.problems, len(self.lengths), over, list(longest), self.document]])
        problems = [said for theirs, *_ in found for said in theirs]
        if problems:
            raise DataError(collected(problems, f"stage {self.stage}"))
        rows, over = sum(n for _, n, *_ in found), sum(n for *_, n, _, _ in found)
        tokens, where = max(longest for *_, longest, _ in found)
        if over:
            raise DataError(
                f"stage {self.stage}: {over} of {rows} rows are over max_tokens={limit}, the longest ({tokens:,} "
                f"tokens) is {where}; raise max_tokens, lower model.max_pixels, or shorten the examples"
            )
        return Survey(rows, tokens, max(added for *_, added in found))


def survey_prompts(model, examples: Sequence[Example], document: PolicyDocument | None, rewards) -> Survey:
    """Encodes the prompts of an ``rl`` stage, and asks its rewards whether they can judge each of them.

    ``document``: what policy-aware completions carry, or None; it is tried with the first prompt alone.

    Raises:
        DataError: all prompts that the model cannot read, or that lack what a reward compares with.
    """
    findings = Findings("rl")
    mine = world.share(list(examples))

    def look(example: Example, carries: bool) -> int:
        rewards.check(example)
        if carries:
            model.encode(place_document(example.messages, document), tools=example.tools, generation_prompt=True)
        return len(model.encode(example.messages, tools=example.tools, generation_prompt=True))

    for number, example in enumerate(mine):
        findings.measure(number, example, lambda e=example, n=number: look(e, document is not None and n == 0))
    return findings.conclude()
