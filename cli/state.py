"""What is known of a run from the reports so far; the live view and the plain lines both read it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from mpi_mlx.training import reports as r


@dataclass
class Stage:
    """A stage's progress and the history of what it measured, a value a step."""

    index: int
    name: str
    total: int
    step: int = 0
    seconds: float | None = None  # when it is finished
    last: r.StepReport | None = None
    history: dict[str, list[float]] = field(default_factory=dict)
    validation: list[tuple[int, float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)  # seconds of the last steps; the first only while alone

    def add(self, report: r.StepReport) -> None:
        self.step, self.total, self.last = report.step, report.total_steps, report
        self.recent = [*self.recent[-19:], report.seconds]
        for name, value in {"loss": report.loss, **report.metrics}.items():
            self.history.setdefault(name, []).append(value)
        if len(self.history["loss"]) == 2:  # the first step also writes texts to rehearse, encodes images, warms up
            del self.recent[0]

    @property
    def left(self) -> float | None:
        """Seconds that the remaining steps will take at the recent pace."""
        if not self.recent or self.seconds is not None:
            return None
        return (self.total - self.step) * sum(self.recent) / len(self.recent)

    @property
    def done(self) -> bool:
        return self.seconds is not None


@dataclass
class Evaluation:
    """How far one evaluation is; times by the clock of the run's state."""

    began: float
    latest: r.EvaluationProgress
    first: int = 0  # answered when it began
    at: float = 0.0  # when the latest was said

    def of_same(self, report: r.EvaluationProgress) -> bool:
        mine = self.latest
        return (mine.label, mine.document_in_context) == (report.label, report.document_in_context)

    def left(self, now: float) -> float | None:
        """Seconds that the remaining answers will take at the pace so far; None before the first batch."""
        answered = self.latest.done - self.first
        if answered <= 0:
            return None
        pace = (self.at - self.began) / answered
        return max(0.0, (self.latest.total - self.latest.done) * pace - (now - self.at))


@dataclass
class RunState:
    """Reduces a stream of reports; ``now`` is the clock (replaced in tests)."""

    now: object = time.monotonic
    started: r.RunStarted | None = None
    began: float = 0.0
    stages: list[Stage] = field(default_factory=list)
    current: Stage | None = None
    evaluating: Evaluation | None = None
    rows: list[dict] = field(default_factory=list)
    finished: r.RunFinished | None = None
    interrupted: r.Interrupted | None = None
    stopping: bool = False

    def __post_init__(self) -> None:
        self.began = self.now()

    @property
    def elapsed(self) -> float:
        return self.now() - self.began

    def add(self, report: object) -> None:
        match report:
            case r.RunStarted():
                self.started = report
                self.stages = [Stage(index, name, total) for index, name, total in report.stages]
            case r.StageStarted():
                stage = self._stage(report.index, report.stage, report.total_steps)
                stage.total, stage.step = report.total_steps, report.start_step
                self.current, self.evaluating = stage, None
            case r.StepReport():
                if self.current is None or self.current.name != report.stage:
                    self.current = self._named(report.stage, report.total_steps)
                self.current.add(report)
                self.evaluating = None
            case r.ValidationReport():
                if self.current is not None:
                    self.current.validation.append((report.step, report.loss))
            case r.StageFinished():
                stage = self._stage(report.index, report.stage, 0)
                stage.seconds = report.seconds
            case r.EvaluationProgress():
                if self.evaluating is None or not self.evaluating.of_same(report):
                    self.evaluating = Evaluation(self.now(), report, first=report.done)
                self.evaluating.latest, self.evaluating.at = report, self.now()
            case r.EvaluationRow():
                self.evaluating = None
                self.rows.append(report.row)
            case r.RunFinished():
                self.finished, self.evaluating = report, None
                self.rows = list(report.rows) or self.rows
            case r.Interrupted():
                self.interrupted = report

    @property
    def stopping_after(self) -> str:
        """What is finished first when a stop has been asked for."""
        return "batch of answers" if self.evaluating is not None else "step"

    def _stage(self, index: int, name: str, total: int) -> Stage:
        for stage in self.stages:
            if stage.index == index:
                return stage
        self.stages.append(Stage(index, name, total))
        return self.stages[-1]

    def _named(self, name: str, total: int) -> Stage:
        open_ones = [s for s in self.stages if s.name == name and not s.done]
        return open_ones[0] if open_ones else self._stage(len(self.stages), name, total)


def clock(seconds: float | None) -> str:
    """``0:07``, ``12:30``, ``1:02:03``; ``-`` for None.

    >>> clock(7.4), clock(750), clock(3723), clock(None)
    ('0:07', '12:30', '1:02:03', '-')
    """
    if seconds is None:
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"


def size(count: float) -> str:
    """A byte count in MB or GB.

    >>> size(52_000_000), size(3_210_000_000)
    ('52 MB', '3.2 GB')
    """
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def many(count: float) -> str:
    """A count of parameters.

    >>> many(950), many(131_072), many(8_123_000), many(3.75e9)
    ('950', '131K', '8.1M', '3.8B')
    """
    for limit, suffix, digits in ((1e9, "B", 1), (1e6, "M", 1), (1e3, "K", 0)):
        if count >= limit:
            return f"{count / limit:.{digits}f}{suffix}"
    return f"{count:.0f}"
