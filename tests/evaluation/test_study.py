"""The ablation's arithmetic, by hand, and its report."""

import json
from types import SimpleNamespace

import pytest

from mpi_mlx.errors import RecipeError
from mpi_mlx.evaluation.grid import (
    CURVES,
    TABLE,
    VARIANTS,
    choose_variants,
    fork_parent,
    part_of,
    plan,
)
from mpi_mlx.evaluation.study import CellResult, curves, differences, majority_curve, summarise
from mpi_mlx.evaluation.study_report import mean_text, write_study

BASE = SimpleNamespace(data=SimpleNamespace(depth=3, train=8))


def result(variant, document, accuracy, setting=(), carried=0.98, trace=0.9, seconds=60.0):
    return CellResult(variant, document, setting, accuracy, carried, trace, None, 0.25, 100, seconds)


def test_the_table_holds_every_start_with_every_form():
    assert len(TABLE) == 13 and set(TABLE) | set(CURVES) <= set(VARIANTS)
    assert VARIANTS["cpt_sft+policyrollout"].title == "VM-CPT + CoT-SFT + PolicyRollout"
    with pytest.raises(RecipeError, match="did you mean 'sft\\+grpo'"):
        choose_variants(["base", "sft+gpro"])


def test_cells_by_document_with_prefixes_first_and_shared_settings_once():
    chosen = choose_variants(["sft+grpo", "base", "sft"])
    cells = plan(BASE, chosen, [7, 8], {"data.depth": [3, 4]}, choose_variants(["sft"]))
    assert [(c.document, c.variant.name, dict(c.setting)) for c in cells] == [
        (7, "base", {}), (7, "sft", {}), (7, "sft+grpo", {}),
        (8, "base", {}), (8, "sft", {}), (8, "sft+grpo", {}),
        (7, "sft", {"data.depth": 4}), (8, "sft", {"data.depth": 4}),
    ]  # depth 3 is the recipe's own
    assert cells[-1].folder == "depth=4/document-8/sft" and cells[0].folder == "recipe/document-7/base"
    assert fork_parent(cells[2], cells) == cells[1]
    assert fork_parent(cells[1], cells) is None  # base trains nothing
    assert fork_parent(cells[-1], cells) is None  # another setting
    assert {c.document for c in part_of(cells, 2, 2)} == {8}


def test_forks_take_the_longest_chain_and_no_other_sft():
    cells = plan(BASE, choose_variants(TABLE), [1])
    parents = {c.variant.name: fork_parent(c, cells) for c in cells}
    names = {name: parent.variant.name for name, parent in parents.items() if parent}
    assert names == {name: name.split("+")[0] for name in TABLE if "+" in name}


def test_means_and_differences_by_hand():
    results = [result("sft", d, a) for d, a in ((1, 0.5), (2, 0.6), (3, 0.7))]
    results += [result("sft+grpo", d, a, trace=None) for d, a in ((1, 0.6), (2, 0.8), (3, 1.0))]
    results += [result("sft+policyrollout", 1, 0.9)]
    sft, grpo, rollout = summarise(results)
    assert sft.accuracy.value == pytest.approx(0.6)
    # t(2) = 4.3027; .1 / sqrt(3) * 4.3027 = .24842
    assert sft.accuracy.interval == pytest.approx((0.35158, 0.84842), abs=1e-5)
    assert sft.examples == 300 and sft.documents == (1, 2, 3) and grpo.trace_match is None
    found = {(d.variant, d.other): d for d in differences(results)}
    # .1, .2, .3: mean .2, the same spread
    gain = found["sft+grpo", "sft"]
    assert gain.mean.value == pytest.approx(0.2) and gain.mean.n == 3 and not gain.certain
    assert found["sft+policyrollout", "sft+grpo"].mean.value == pytest.approx(0.3)
    assert found["sft+policyrollout", "sft+grpo"].mean.interval is None
    steady = [result("sft", d, 0.5) for d in (1, 2)] + [result("sft+grpo", d, 0.5 + 0.01 * d) for d in (1, 2)]
    assert not differences(steady)[0].certain  # .01, .02: t(1) reaches beyond zero
    assert len(found) == 3


def test_curves_take_the_recipes_own_point_from_the_table():
    deeper = (("data.depth", 4),)
    results = [
        result("base", 1, 0.01), result("base", 1, 0.02, deeper, carried=0.9), result("sft", 1, 0.6),
        result("sft", 1, 0.4, deeper),
    ]
    summaries = summarise(results)
    settings = {3: (), 4: deeper, 5: (("data.depth", 5),)}
    lines, ceiling = curves(summaries, settings, CURVES)
    assert [(c.title, c.x, [m.value for m in c.means]) for c in lines] == [("CoT-SFT", (3, 4), [0.6, 0.4])]
    assert ceiling.x == (3, 4) and [m.value for m in ceiling.means] == [0.98, 0.9]
    assert majority_curve(summaries, settings).x == (3, 4)


def test_a_result_comes_from_the_last_models_rows():
    rows = [
        {"model": "sft", "document_in_context": False, "accuracy": 0.1, "trace_match": None, "n": 5},
        {"model": "rl", "document_in_context": True, "accuracy": 0.8, "trace_match": 0.5, "n": 5},
        {"model": "rl", "document_in_context": False, "accuracy": 0.9, "trace_match": 0.7, "n": 5},
    ]
    found = CellResult.from_run("sft+grpo", 3, (), rows, 12.0)
    assert (found.accuracy, found.accuracy_with_document, found.trace_match) == (0.9, 0.8, 0.7)


def test_report(tmp_path):
    deeper = (("data.depth", 4),)
    results = [result(v, d, a + d / 100, s) for s in ((), deeper) for d in (1, 2) for v, a in
               (("base", 0.0), ("sft", 0.5), ("sft+grpo", 0.6), ("sft+policyrollout", 0.95))]
    sweeps = {"data.depth": [4], "data.train": [20]}  # nothing of the latter is done yet
    text = write_study(tmp_path, results, base=BASE, sweeps=sweeps, missing=3).read_text()
    assert "16 runs over 2 documents (seeds 1, 2); 3 are still to be run" in text
    # mean .515, spread .00707: t(1) * .00707 / sqrt(2) = .0635
    with_it, traces = "98.0% (98.0-98.0)", "90.0% (90.0-90.0)"
    assert f"| CoT-SFT | 51.5% (45.1-57.9) | {with_it} | {traces} | - | 200 | 2 | 1 min 00 s |" in text
    assert "| CoT-SFT + PolicyRollout - CoT-SFT + GRPO | +35.0 (+35.0 to +35.0) | 2 | better |" in text
    headings = ("## The recipe's own setting", "## Depth of the decision tree: 4", "## Curves")
    assert [line for line in text.splitlines() if line.startswith("## ")] == list(headings)
    for name in ("variants.png", "depth.png"):
        assert f"(figures/{name})" in text and (tmp_path / "figures" / name).is_file()
    stored = json.loads((tmp_path / "ablation.json").read_text())
    assert len(stored["cells"]) == 16 and stored["missing"] == 3
    assert stored["summaries"][1]["variant"] == "sft"


def test_intervals_are_shown_within_the_possible():
    from mpi_mlx.evaluation.metrics import Mean

    assert mean_text(Mean(0.95, (0.85, 1.05), 3)) == "95.0% (85.0-100.0)"
    assert mean_text(Mean(0.5, None, 1)) == "50.0%" and mean_text(None) == "-"
