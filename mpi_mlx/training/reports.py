"""What a run says while it goes: plain values for whoever shows or records them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class RunStarted:
    """``stages``: (index, name, steps) each."""

    recipe_name: str
    output: str
    parameters_total: int
    parameters_trainable: int
    stages: tuple[tuple[int, str, int], ...]
    device: str


@dataclass(frozen=True)
class StageStarted:
    """``start_step`` is over 0 when a run goes on from a checkpoint."""

    index: int
    stage: str
    total_steps: int
    start_step: int = 0


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. ``loss`` is per trained token (rl: of the surrogate); ``step`` counts from 1."""

    stage: str
    step: int
    total_steps: int
    loss: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    seconds: float
    memory_bytes: int
    grad_norm: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ValidationReport:
    stage: str
    step: int
    loss: float


@dataclass(frozen=True)
class EvaluationProgress:
    """``done`` of ``total`` examples are answered: 0 first, then after each batch."""

    label: str
    document_in_context: bool
    done: int
    total: int


@dataclass(frozen=True)
class EvaluationRow:
    """A row of ``evaluation/results.json``."""

    row: dict


@dataclass(frozen=True)
class StageFinished:
    index: int
    stage: str
    seconds: float


@dataclass(frozen=True)
class RunFinished:
    output: str
    seconds: float
    rows: tuple[dict, ...]
    report_path: str | None


@dataclass(frozen=True)
class Interrupted:
    """The run stopped on request, after a whole step or a batch of answers; ``resume_command`` goes on from there.

    A step is kept; of an evaluation that was stopped nothing is, and it is done again.
    """

    output: str
    resume_command: str


@dataclass(frozen=True)
class Message:
    text: str
