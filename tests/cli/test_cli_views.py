import io
import threading

import fake_run
from mpi_mlx_cli.live import BLOCKS, LiveView, render, sparkline
from mpi_mlx_cli.plain import PlainView
from mpi_mlx_cli.results import result_table
from mpi_mlx_cli.state import RunState, Stage
from rich.console import Console
from rich.text import Text

from mpi_mlx.training import reports as r


class Clock:
    def __init__(self, step):
        self.time, self.step = 0.0, step

    def __call__(self):
        return self.time


def text_of(renderable, width=100):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(renderable)
    return console.file.getvalue()


def state_at(stop):
    clock = Clock(0.5)
    state = RunState(now=clock)
    for report in fake_run.reports():
        clock.time += clock.step
        state.add(report)
        if stop(report):
            return state
    raise AssertionError("the stream ended")


def plain_lines(seconds_each, every=5.0):
    clock = Clock(seconds_each)
    console = Console(width=60, file=io.StringIO())
    with PlainView(console, RunState(now=clock), every) as view:
        for report in fake_run.reports():
            clock.time += clock.step
            view.show(report)
    return console.file.getvalue().splitlines()


def test_sparkline_is_scaled_and_averaged():
    assert sparkline([0.0, 1.0, 2.0, 3.0]) == "▁▃▆█"
    assert sparkline([0.0, 0.0, 4.0, 4.0], width=2) == "▁█"
    assert sparkline([0.5, 0.5], span=(0.0, 1.0)) == BLOCKS[4] * 2
    assert sparkline([2.0, 2.0]) == BLOCKS[3] * 2
    assert sparkline([float("nan"), float("inf")]) == sparkline([]) == ""
    assert len(sparkline(list(range(1000)), width=44)) == 44


def test_plain_lines_at_a_sensible_rate():
    lines = plain_lines(seconds_each=1.0)
    steps = [line.split()[1] for line in lines if line.startswith("cpt ") and "/20" in line]
    # A second a report: the first step, then every fifth second, and the last.
    assert steps == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    assert sum(": accuracy " in line for line in lines) == 8
    assert "[2/3] sft: 40 steps" in lines
    assert "base without the document: accuracy 18.6%, format 100.0%, trace 90.0%, prompt 48 tokens" in lines
    rl = next(line for line in lines if line.startswith("rl 60/60"))
    assert "reward 0.8" in rl and "(policy-aware 0.993)" in rl and rl.endswith("0:00 left")
    assert lines[-1] == "done in 5:42" and "mpi-mlx chat runs/quickstart" in lines[-2]
    assert not any("\x1b" in line for line in lines)


def test_plain_lines_say_how_long_an_evaluation_takes():
    """64 answers in 4 s, so every second report is due; 128 after 8 s leave 372, which take 23."""
    lines = [line for line in plain_lines(seconds_each=4.0) if line.startswith("evaluation of base without")]
    said = ("0/500", "128/500  0:23 left", "256/500  0:15 left", "384/500  0:07 left")
    assert lines == [f"evaluation of base without the document: {part}" for part in said]


def test_slow_steps_each_get_a_line():
    lines = plain_lines(seconds_each=6.0)
    assert sum(line.startswith("cpt ") and "/20" in line for line in lines) == 20


def test_live_view_shows_rewards_by_source_and_time_left():
    state = state_at(lambda x: isinstance(x, r.StepReport) and x.stage == "rl" and x.step == 30)
    text = text_of(render(state))
    plain = fake_run.rl_metrics(30, 60)["reward_plain"]
    line = next(x for x in text.splitlines() if "reward, plain" in x)
    assert f" {plain:.4f} " in line and "  ▁▁▁" in line and "▅ " in line
    assert "reward, policy-aware" in text and "exact match" in text and "groups with signal" in text
    assert "30/60" in text and "0:21 left" in text  # 30 steps of 0.7 s
    assert "✓ cpt" in text and "● rl" in text
    assert "1.2 GB" in text and "312K trained (3.8%)" in text
    assert "+ sft" in text and "51.2%" in text


def test_live_view_leaves_the_table_out_of_low_terminals_while_training():
    state = state_at(lambda x: isinstance(x, r.StepReport) and x.stage == "rl" and x.step == 30)
    low = text_of(render(state, height=24), width=80)
    assert "51.2%" not in low and low.count("\n") <= 23
    assert all(len(line) <= 80 for line in low.splitlines())


def test_live_view_of_an_evaluation():
    state = state_at(lambda x: isinstance(x, r.EvaluationProgress) and x.label == "cpt" and x.done == 256)
    text = text_of(render(state))
    assert "evaluating cpt without the document" in text and "256/500" in text
    # A report each half second and 64 answers in each: 256 took 2 s, 244 are left.
    assert "0:02 left" in text


def test_time_left_of_an_evaluation_by_hand():
    state = RunState(now=Clock(0.0))

    def left():
        return None if state.evaluating is None else state.evaluating.left(state.now())

    state.now.time = 100.0
    state.add(r.EvaluationProgress("base", False, 0, 10))
    assert left() is None
    state.now.time = 104.0
    state.add(r.EvaluationProgress("base", False, 4, 10))
    assert left() == 6.0  # a second an answer
    state.now.time = 105.0
    assert left() == 5.0 and state.stopping_after == "batch of answers"
    state.now.time = 120.0
    assert left() == 0.0  # later than thought, but not less than nothing
    state.add(r.EvaluationProgress("base", True, 0, 10))
    assert left() is None  # the pace of the other mode says nothing
    state.add(r.EvaluationRow(fake_run.row("base", True, 0.5)))
    assert left() is None and state.stopping_after == "step"


def test_live_view_of_a_resumed_stage_counts_what_was_done():
    state = RunState()
    state.add(r.RunStarted("a", "runs/a", 10, 1, ((0, "cpt", 20),), "CPU"))
    state.add(r.StageStarted(0, "cpt", 20, start_step=15))
    assert "15/20" in text_of(render(state))
    state.add(fake_run.step("cpt", 16, 20, 0.5, seconds=3.0))
    assert "0:12 left" in text_of(render(state))


def test_stages_of_the_same_name_are_kept_apart():
    state = RunState()
    state.add(r.RunStarted("a", "runs/a", 10, 1, ((0, "sft", 2), (1, "sft", 3)), "CPU"))
    for index, total in ((0, 2), (1, 3)):
        state.add(r.StageStarted(index, "sft", total))
        state.add(fake_run.step("sft", 1, total, 1.0))
        state.add(r.StageFinished(index, "sft", 1.0))
    assert [stage.history["loss"] for stage in state.stages] == [[1.0], [1.0]]


def test_live_view_runs_in_a_terminal_and_ends_with_the_result():
    console = Console(width=100, height=40, file=io.StringIO(), force_terminal=True, force_interactive=True)
    with LiveView(console) as view:
        for report in fake_run.reports():
            view.show(report)
        view.live.refresh()
    text = console.file.getvalue()
    assert "the document has 412 tokens" in text
    assert "mpi-mlx chat runs/quickstart" in text and "runs/quickstart/report.md" in text
    assert "92.8%" in text
    longest = max(len(line) for line in Text.from_ansi(text).plain.splitlines())
    assert longest <= 97  # room for the terminal's ^C
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is shown again


def test_stopping_and_interrupted_are_said():
    console = Console(width=100, file=io.StringIO(), force_terminal=True)
    with LiveView(console) as view:
        for report in list(fake_run.reports())[:30]:
            view.show(report)
        view.stopping()
        assert "stopping after this step" in text_of(render(view.state))
        view.show(r.EvaluationProgress("cpt", False, 0, 500))
        assert "stopping after this batch of answers" in text_of(render(view.state))
        view.show(r.Interrupted("runs/a", "mpi-mlx train a --resume"))
    assert "mpi-mlx train a --resume" in console.file.getvalue()


def test_result_table_without_a_document_or_a_trace():
    rows = [fake_run.row("base", False, 0.5) | {"trace_match": None}]
    line = next(x for x in text_of(result_table(rows), width=80).splitlines() if x.startswith("base"))
    assert line.split() == ["base", "50.0%", "100.0%", "-", "-", "48", "·", "-", "14.3", "·", "-"]


def test_result_table_fits_eighty_columns():
    rows = fake_run.row("base", False, 1.0), fake_run.row("base", True, 1.0, tokens=51234.0, prefill=12.3456)
    text = text_of(result_table(list(rows)), width=80)
    assert "…" not in text and "48 · 51,234" in text and "14.3 · 12345.6" in text


def test_lines_printed_while_it_refreshes_do_not_draw_the_view_twice():
    console = Console(width=80, height=40, file=io.StringIO(), force_terminal=True, force_interactive=True)
    with LiveView(console) as view:
        held = view.live._lock
        with held:  # as the refreshing thread does while it draws
            thread = threading.Thread(target=view.show, args=(r.Message("a line"),))
            thread.start()
            thread.join(0.2)
            assert thread.is_alive() and "a line" not in console.file.getvalue()
        thread.join(5)
    assert console.file.getvalue().count("a line") == 1 and "print" not in vars(console)


def test_time_left_of_a_stage_leaves_its_first_step_out_once_there_is_another():
    stage = Stage(0, "sft", 10)
    left = []
    for number, seconds in enumerate((30.0, 2.0, 4.0), 1):
        stage.add(fake_run.step("sft", number, 10, 0.5, seconds=seconds))
        left.append(stage.left)
    assert left == [9 * 30.0, 8 * 2.0, 7 * 3.0]
