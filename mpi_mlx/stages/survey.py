"""Looking at all rows of a stage before the first is trained on: an odd one must not end a run after an hour."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

from mpi_mlx.data.examples import Example, collected
from mpi_mlx.documents import PolicyDocument, place_document
from mpi_mlx.errors import DataError
from mpi_mlx.models.context import check_context
from mpi_mlx.training import world


@dataclass(frozen=True)
class Survey:
    """The rows that a stage will take: how many there are, and the tokens of the longest.

    ``document``: how many of those the document adds, where rows carry it. ``where`` names the longest;
    ``carried`` are its tokens with the document, where prompts of their own length are drawn from that way, too.
    """

    rows: int
    longest: int
    document: int = 0
    where: str = field(default="", compare=False)
    carried: int = field(default=0, compare=False)


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
        return Survey(rows, tokens, max(added for *_, added in found), where)


def survey_prompts(model, examples: Sequence[Example], document: PolicyDocument | None, rewards) -> Survey:
    """Encodes the prompts of an ``rl`` stage, and asks its rewards whether they can judge each of them.

    ``document``: what policy-aware completions carry, or None; it is tried with the first and the longest prompt.

    Raises:
        DataError: all prompts that the model cannot read, or that lack what a reward compares with.
    """
    findings = Findings("rl")
    mine = world.share(list(examples))

    def encoded(example: Example, carried: PolicyDocument | None = None) -> int:
        return len(model.encode(place_document(example.messages, carried), tools=example.tools, generation_prompt=True))

    def look(example: Example, carries: bool) -> int:
        rewards.check(example)
        plain = encoded(example)
        if carries:
            findings.document = max(findings.document, encoded(example, document) - plain)
        return plain

    for number, example in enumerate(mine):
        findings.measure(number, example, lambda e=example, n=number: look(e, document is not None and n == 0))
    longest = max(findings.lengths, key=findings.lengths.get, default=0)
    if document is not None and longest:  # the first has been looked at
        findings.measure(longest, mine[longest], lambda: look(mine[longest], True))
    found = findings.conclude()
    return replace(found, document=0, carried=found.longest + found.document)


def check_survey(model, spec, survey: Survey, *, completion: int = 0) -> None:
    """Whether the model takes the longest row of a stage, or its longest prompt and ``completion`` tokens more.

    Raises:
        DataError: it is longer than the model's config allows.
    """
    tokens = max(survey.longest, survey.carried)
    document = survey.document or tokens - survey.longest
    advice = ["shorten the document" if document else "shorten the example"]
    if document and spec.stage == "cpt":
        advice.append("leave the stage out")
    elif document:
        advice.append(f"set {'policy_aware' if completion else 'document_fraction'}: 0")
    elif model.is_multimodal:
        advice.append("lower model.max_pixels")
    if completion:
        advice.append("lower max_completion_tokens")
    check_context(
        model, tokens + completion, f"stage {spec.stage}: {survey.where}", document=document,
        completion=completion, advice=", ".join(advice),
    )
