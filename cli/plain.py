"""Progress as plain lines, for logs and pipes: about one every five seconds, and every line that matters."""

from __future__ import annotations

from mpi_mlx_cli.results import show_end, show_interrupted
from mpi_mlx_cli.state import RunState, clock, many, size
from rich.console import Console

from mpi_mlx.training import reports as r

EVERY = 5.0  # seconds between lines of steps


class PlainView:
    """Prints what is worth a line; a context manager like the live view."""

    def __init__(self, console: Console, state: RunState | None = None, every: float = EVERY):
        self.console, self.every = console, every
        self.state = state or RunState()
        self.said = float("-inf")

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_) -> None:
        pass

    def line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def stopping(self) -> None:
        self.line(f"stopping after this {self.state.stopping_after}; press Ctrl-C again to quit at once")

    def show(self, report: object) -> None:
        self.state.add(report)
        match report:
            case r.RunStarted():
                self.line(started_line(report))
            case r.StageStarted():
                resumed = f", from step {report.start_step}" if report.start_step else ""
                of = len(self.state.stages)
                self.line(f"[{report.index + 1}/{of}] {report.stage}: {report.total_steps} steps{resumed}")
                self.said = float("-inf")
            case r.StepReport():
                if self._due() or report.step == report.total_steps:
                    self.line(step_line(report, self.state.current.left))
            case r.ValidationReport():
                self.line(f"{report.stage} step {report.step}: validation loss {report.loss:.4f}")
            case r.EvaluationProgress():
                if report.done < report.total and self._due():
                    left = self.state.evaluating.left(self.state.now())
                    said = "" if left is None else f"  {clock(left)} left"
                    self.line(f"evaluation of {mode(report)}: {report.done}/{report.total}{said}")
            case r.EvaluationRow():
                self.line(row_line(report.row))
            case r.StageFinished():
                self.line(f"{report.stage} done in {clock(report.seconds)}")
            case r.RunFinished():
                show_end(self.console, report)
            case r.Interrupted():
                show_interrupted(self.console, report)
            case r.Message():
                self.line(report.text)

    def _due(self) -> bool:
        now = self.state.now()
        if now - self.said < self.every:
            return False
        self.said = now
        return True


def started_line(report: r.RunStarted) -> str:
    return (
        f"{report.recipe_name} -> {report.output} | {report.device} | {many(report.parameters_total)} "
        f"parameters, {many(report.parameters_trainable)} trained"
    )


def step_line(report: r.StepReport, left: float | None) -> str:
    """``rl 3/60 loss ... reward ...``."""
    said = [f"{report.stage} {report.step}/{report.total_steps}", f"loss {report.loss:.4f}"]
    metrics = report.metrics
    if "reward_plain" in metrics or "reward" in metrics:
        said.append(f"reward {metrics.get('reward_plain', metrics.get('reward')):.3f}")
        if "reward_policy_aware" in metrics:
            said[-1] += f" (policy-aware {metrics['reward_policy_aware']:.3f})"
    said += [
        f"lr {report.learning_rate:.2e}", f"{report.tokens_per_second:,.0f} tokens/s",
        size(report.memory_bytes), f"{clock(left)} left",
    ]
    return "  ".join(said)


def mode(report: r.EvaluationProgress) -> str:
    return f"{report.label} {'with' if report.document_in_context else 'without'} the document"


def row_line(row: dict) -> str:
    where = "with" if row["document_in_context"] else "without"
    parts = [f"{row['model']} {where} the document: accuracy {row['accuracy']:.1%}"]
    for key, name in (("format_rate", "format"), ("trace_match", "trace")):
        if row.get(key) is not None:
            parts.append(f"{name} {row[key]:.1%}")
    parts.append(f"prompt {row['prompt_tokens']:,.0f} tokens")
    return ", ".join(parts)
