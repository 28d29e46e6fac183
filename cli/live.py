"""The live view of a run in a terminal: stages, curves, speed, evaluation, results as they come."""

from __future__ import annotations

from mpi_mlx_cli.plain import mode
from mpi_mlx_cli.results import result_table, show_end, show_interrupted
from mpi_mlx_cli.state import RunState, Stage, clock, many, size
from rich import box
from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mpi_mlx.training import reports as r

BLOCKS = "▁▂▃▄▅▆▇█"
ABOUT = {
    "cpt": "read the document", "sft": "answer without it", "rl": "practise, with rewards",
    "pretrain": "learn to see and to read",
}
# metric, its label, style; a line with a curve each, where the stage has it
REWARDS = (
    ("reward", "reward", "green"),
    ("reward_plain", "reward, plain", "green"),
    ("reward_policy_aware", "reward, policy-aware", "cyan"),
)
NUMBERS = (
    ("completion_length", "completion tokens"), ("entropy", "entropy"), ("clip_fraction", "clipped"), ("kl", "kl"),
    ("drift", "drift"),
)
TALL = 32  # lines of a terminal that has room for curves and results at once
CURVE_WIDTH = 44
WIDEST = 120
MINOR = "bright_black"


def sparkline(values: list[float], span: tuple[float, float] | None = None, width: int = CURVE_WIDTH) -> str:
    """The values as blocks, averaged into at most ``width`` of them; ``span``: lowest and highest block.

    >>> sparkline([0.0, 1.0, 2.0, 3.0])
    '▁▃▆█'
    """
    values = [v for v in values if v == v and abs(v) != float("inf")]
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = span or (min(means), max(means))
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-30):
        return BLOCKS[3] * count
    return "".join(BLOCKS[max(0, min(7, int((m - low) / (high - low) * 8)))] for m in means)


class LiveView:
    """Shows a :class:`RunState` in place; a context manager."""

    def __init__(self, console: Console, state: RunState | None = None):
        self.console = console
        self.state = state or RunState()
        self.live = Live(
            console=console, get_renderable=self.render, refresh_per_second=2, vertical_overflow="crop"
        )

    def __enter__(self) -> LiveView:
        # rich's refreshing thread and a line printed meanwhile (also by way of sys.stderr) can interleave,
        # which draws the view twice: one after the other.
        def one_at_a_time(*arguments, **options) -> None:
            with self.live._lock:
                Console.print(self.console, *arguments, **options)

        self.console.print = one_at_a_time
        self.live.__enter__()
        return self

    def __exit__(self, *problem) -> None:
        self.live.__exit__(*problem)
        del self.console.print
        if self.state.finished is not None:
            show_end(self.console, self.state.finished)
        elif self.state.interrupted is not None:
            show_interrupted(self.console, self.state.interrupted)

    def stopping(self) -> None:
        self.state.stopping = True

    def show(self, report: object) -> None:
        self.state.add(report)
        if isinstance(report, r.Message):
            self.console.print(report.text, markup=False, highlight=False, soft_wrap=True)

    def render(self) -> RenderableType:
        # Room for the ^C that a terminal echoes: were it to wrap, the next frame would start a line too low.
        return Constrain(render(self.state, self.console.height), min(self.console.width - 3, WIDEST))


def render(state: RunState, height: int = 100) -> RenderableType:
    """The whole view for a state, in a terminal of ``height`` lines."""
    if state.started is None:
        return Text("loading the model and the data ...", "dim")
    parts: list[RenderableType] = [_facts(state), "", _stages(state)]
    ended = state.finished is not None or state.interrupted is not None
    if not ended:
        curves = state.current is not None and state.current.last is not None and not state.current.done
        if curves:
            parts += ["", _curves(state.current), "", _numbers(state.current)]
        if (evaluating := state.evaluating) is not None:  # another thread may set it to None meanwhile
            parts += ["", _evaluating(evaluating.latest, evaluating.left(state.now()))]
        if state.rows and (height >= TALL or not curves):
            parts += ["", result_table(state.rows)]
    if state.stopping and not ended:
        said = f"stopping after this {state.stopping_after}; press Ctrl-C again to quit at once"
        parts += ["", Text(said, "bold yellow")]
    return Panel(
        Group(*parts),
        title=Text.assemble(("mpi-mlx ", "bold"), (state.started.recipe_name, "bold cyan")),
        title_align="left",
        subtitle=Text(state.started.output, "dim"),
        subtitle_align="right",
        border_style="bright_black",
        box=box.ROUNDED,
        padding=(0, 2),
    )


def _facts(state: RunState) -> RenderableType:
    started = state.started
    share = started.parameters_trainable / max(started.parameters_total, 1)
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_row(
        Text(
            f"{started.device} · {many(started.parameters_total)} parameters, "
            f"{many(started.parameters_trainable)} trained ({share:.1%})",
            "dim",
        ),
        Text(clock(state.finished.seconds if state.finished else state.elapsed), "dim"),
    )
    return grid


def _stages(state: RunState) -> RenderableType:
    grid = Table.grid(padding=(0, 2), expand=True)
    for justify in ("left", "left", "right"):
        grid.add_column(justify=justify, no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True, min_width=10)
    for stage in state.stages:
        active = stage is state.current and not stage.done
        mark = ("✓", "green") if stage.done else ("●", "bold cyan") if active else ("○", "bright_black")
        style = "" if stage.done else "bold" if active else "bright_black"
        time = clock(stage.seconds) if stage.done else ""
        if active and stage.left is not None:
            time = f"{clock(stage.left)} left"
        grid.add_row(
            Text.assemble(mark, " ", (stage.name, style)),
            Text(ABOUT.get(stage.name, ""), "dim" if active or stage.done else "bright_black"),
            Text(f"{stage.step}/{stage.total}", style),
            ProgressBar(
                total=max(stage.total, 1), completed=stage.total if stage.done else stage.step,
                complete_style="cyan", finished_style="green", style="bright_black",
            ),
            Text(time, "dim" if stage.done else ""),
        )
    return grid


def _curves(stage: Stage) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, min_width=20)
    grid.add_column(justify="right", no_wrap=True, min_width=7)
    grid.add_column(no_wrap=True)
    history = {name: list(values) for name, values in list(stage.history.items())}

    def add(name: str, label: str, style: str, span=None) -> None:
        if values := history.get(name):
            value = Text(_number(values[-1]), style if style == MINOR else f"bold {style}")
            grid.add_row(Text(label, "dim"), value, Text(sparkline(values, span), style))

    add("loss", "loss", "yellow")
    shown = [r for r in REWARDS if r[0] in history and not (r[0] == "reward" and "reward_plain" in history)]
    rewards = [v for name, *_ in shown for v in history[name]]
    for name, label, style in shown:  # on one scale, to be compared
        add(name, label, style, (min(rewards), max(rewards)))
    for name in history:
        if name.startswith("reward/"):
            add(name, "  " + name[7:].replace("_", " "), MINOR, (0.0, max(1.0, *history[name])))
    add("groups_with_signal", "groups with signal", "magenta", (0.0, 1.0))
    if stage.validation:
        history["validation"] = [loss for _, loss in stage.validation]
        add("validation", "validation loss", "blue")
    return grid


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.3f}"


def _numbers(stage: Stage) -> RenderableType:
    last = stage.last
    said = [
        ("learning rate", f"{last.learning_rate:.1e}"), ("tokens/s", f"{last.tokens_per_second:,.0f}"),
        ("s/step", f"{last.seconds:.1f}"), ("memory", size(last.memory_bytes)),
    ]
    measured = [("gradient", f"{last.grad_norm:.2f}")]
    measured += [(label, f"{last.metrics[name]:.3g}") for name, label in NUMBERS if name in last.metrics]
    return Group(_facts_line(said), _facts_line(measured))


def _facts_line(said: list[tuple[str, str]]) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    for index, (label, value) in enumerate(said):
        line.append(("   " if index else "") + label + " ", "dim").append(value)
    return line


def _evaluating(report: r.EvaluationProgress, left: float | None) -> RenderableType:
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True, min_width=10)
    grid.add_row(
        Text.assemble(("evaluating ", "dim"), (mode(report), "bold")),
        ProgressBar(total=max(report.total, 1), completed=report.done, complete_style="magenta",
                    finished_style="magenta", style="bright_black"),
        f"{report.done}/{report.total}",
        "" if left is None else f"{clock(left)} left",
    )
    return grid

