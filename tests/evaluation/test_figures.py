"""Figures: what is in them is checked by colour and by the numbers that go in."""

import json

import numpy as np
import pytest
from PIL import Image

from mpi_mlx.evaluation.figures import draw_accuracy, draw_loss, draw_run_figures, load_metrics, prompt_cost
from mpi_mlx.evaluation.style import AWARE, GREEN, PLAIN, VERMILION, smooth


def row(model, in_context, accuracy, **fields):
    return {
        "model": model, "document_in_context": in_context, "accuracy": accuracy, "n": 100, "majority": 0.2,
        "accuracy_ci": [max(0, accuracy - 0.05), min(1, accuracy + 0.05)],
        "prompt_tokens": 40 + 260 * in_context, "prefill_seconds": 0.004 + 0.02 * in_context, **fields,
    }


def step(stage, index, number, **fields):
    return {"stage": stage, "stage_index": index, "step": number, "loss": 1.0 / number, **fields}


def area(path, color):
    """Pixels of exactly this colour."""
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.asarray(Image.open(path).convert("RGB")) == rgb).all(-1).sum())


def test_smooth_by_hand():
    assert smooth([0, 3, 6, 0], 3).tolist() == [1.5, 3.0, 3.0, 3.0]
    assert smooth([5.0]).tolist() == [5.0]
    assert len(smooth([])) == 0


def test_bars_are_as_long_as_the_accuracies(tmp_path):
    rows = [row("base", False, 0.4), row("base", True, 0.8)]
    path = draw_accuracy(rows, tmp_path / "a.png")
    plain, aware = area(path, PLAIN), area(path, AWARE)
    # equally wide bars plus equal legend patches; the interval's line covers a little of each
    assert 1.85 < aware / plain < 2.1
    assert Image.open(path).size == (1600, 900)


def test_a_stage_without_the_other_mode_is_drawn(tmp_path):
    path = draw_accuracy([row("sft", False, 0.4)], tmp_path / "a.png")
    assert area(path, PLAIN) > 5000 and area(path, AWARE) == 0


def written(run, lines):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_loss_has_a_panel_a_stage_and_validation_dots(tmp_path):
    sft, rl = ([step(stage, at, n) for n in range(1, 20)] for at, stage in enumerate(("sft", "rl")))
    metrics = load_metrics(written(tmp_path, [*sft[:4], {**sft[4], "validation_loss": 0.5}, *sft[5:], *rl]))
    path = draw_loss(metrics, tmp_path / "l.png")
    assert all(area(path, color) > 50 for color in (PLAIN, VERMILION, GREEN))
    assert area(draw_loss(metrics[:4], tmp_path / "l.png"), VERMILION) == 0
    assert area(tmp_path / "l.png", GREEN) == 0
    wrong = load_metrics(written(tmp_path, [*rl[:-1], {**rl[-1], "validation_loss": 0.5}]))
    assert area(draw_loss(wrong, tmp_path / "l.png"), GREEN) > 50
    drawn = draw_run_figures(tmp_path)  # as the report asks for it
    assert list(drawn) == ["loss"] and area(drawn["loss"], GREEN) > 50


def test_prompt_cost_compares_the_first_with_and_the_last_without():
    rows = [row("base", False, 0.1), row("base", True, 0.9), row("rl", False, 0.9, prompt_tokens=39)]
    carried, bare = prompt_cost(rows)
    assert (carried["prompt_tokens"], bare["prompt_tokens"]) == (300, 39)
    assert prompt_cost(rows[:1]) is None and prompt_cost([]) is None


def test_a_run_gets_the_figures_it_has_data_for(tmp_path):
    assert draw_run_figures(tmp_path) == {}
    rewards = {"metrics": {"reward_plain": 0.5, "reward_policy_aware": 0.9}}
    lines = [json.dumps(step("rl", 0, n, **rewards)) for n in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"stage": "r')
    assert load_metrics(tmp_path)[7]["reward_plain"] == 0.5 and len(load_metrics(tmp_path)) == 8
    assert list(draw_run_figures(tmp_path)) == ["loss", "reward"]
    assert area(tmp_path / "figures" / "reward.png", AWARE) > 1000
    (tmp_path / "evaluation").mkdir()
    rows = [row("base", False, 0.1), row("base", True, 0.9)]
    (tmp_path / "evaluation" / "results.json").write_text(json.dumps({"rows": rows}))
    drawn = draw_run_figures(tmp_path)
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(f"{n}.png" for n in drawn)
    assert list(drawn) == ["loss", "reward", "accuracy", "prompt_cost"]


def test_same_data_same_bytes(tmp_path):
    rows = [row("base", False, 0.4), row("rl", True, 0.8)]
    one, two = (draw_accuracy(rows, tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert one == two


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_extremes(tmp_path, accuracy):
    assert draw_accuracy([row("base", False, accuracy)], tmp_path / "a.png").is_file()
