"""The ablation's arithmetic, by hand, and its report."""

import json
from dataclasses import replace
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
from mpi_mlx.evaluation.study_report import difference_table, mean_text, write_study
from mpi_mlx.recipe_schema import OwnData

BASE = SimpleNamespace(data=SimpleNamespace(depth=3, train=8))


def result(variant, document, accuracy, setting=(), carried=0.98, trace=0.9, seconds=60.0, **more):
    return CellResult(variant, document, setting, accuracy, carried, trace, None, 0.25, 100, seconds, **more)


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
        {"model": "rl", "document_in_context": False, "accuracy": 0.9, "trace_match": 0.7, "n": 5, "format_rate": 0.6},
    ]
    said = [
        {"id": "a", "model": "sft", "document_in_context": False, "correct": False},
        {"id": "a", "model": "rl", "document_in_context": True, "correct": False},
        {"id": "a", "model": "rl", "document_in_context": False, "correct": True},
    ]
    found = CellResult.from_run("sft+grpo", 3, (), rows, 12.0, said)
    assert found.right == {"a": True} and found.format_rate == 0.6
    assert CellResult.from_run("sft+grpo", 3, (), rows, 12.0).right is None
    assert (found.accuracy, found.accuracy_with_document, found.trace_match) == (0.9, 0.8, 0.7)


def test_report(tmp_path):
    deeper = (("data.depth", 4),)
    results = [result(v, d, a + d / 100, s) for s in ((), deeper) for d in (1, 2) for v, a in
               (("base", 0.0), ("sft", 0.5), ("sft+grpo", 0.6), ("sft+policyrollout", 0.95))]
    sweeps = {"data.depth": [4], "data.train": [20]}  # nothing of the latter is done yet
    text = write_study(tmp_path, results, base=BASE, sweeps=sweeps, missing=3).read_text()
    assert "16 runs over 2 documents (seeds 1, 2); 3 are still to be run" in text
    # mean .515: the spread gives t(1) * .00707 / sqrt(2) = .0635, two hundred examples 1.96 * sqrt(.0024016 / 2) =
    # .0679; for .98, .0261 ((98 + 2) / 104: .00035560); for .90, .0434 ((90 + 2) / 104: .00098145)
    with_it, traces = "98.0% (95.4-100.0)", "90.0% (85.7-94.3)"
    assert f"| CoT-SFT | 51.5% (44.7-58.3) | {with_it} | - | {traces} | - | 200 | 2 | 1 min 00 s |" in text
    # .35 twice: 1.96 * sqrt((.00281900 + .00271588) / 4), the variances of .96 and .61, .97 and .62 of 100
    assert "| CoT-SFT + PolicyRollout - CoT-SFT + GRPO | +35.0 (+27.7 to +42.3) | 2 | too few to tell |" in text
    assert "6 comparisons are made, each at 95% and without correction for their number" in text
    headings = ("## The recipe's own setting", "## Depth of the decision tree: 4", "## Curves")
    assert [line for line in text.splitlines() if line.startswith("## ")] == list(headings)
    for name in ("variants.png", "depth.png"):
        assert f"(figures/{name})" in text and (tmp_path / "figures" / name).is_file()
    stored = json.loads((tmp_path / "ablation.json").read_text())
    assert len(stored["cells"]) == 16 and stored["missing"] == 3
    assert stored["summaries"][1]["variant"] == "sft"


def verdicts(results):
    """The lines of the table of differences."""
    return difference_table(differences(results)).splitlines()[2:]


def test_agreement_by_chance_is_no_certainty():
    near = [result("sft", 1, 0.97), result("sft", 2, 0.99), result("sft+grpo", 1, 0.98), result("sft+grpo", 2, 1.0)]
    # (n + 2) / 104 of .97, .98, .99, 1: .00044005, .00035560, .00026930, .00018135; 1.96 * sqrt(.0012463 / 4)
    assert verdicts(near) == ["| CoT-SFT + GRPO - CoT-SFT | +1.0 (-2.5 to +4.5) | 2 | too few to tell |"]
    perfect = summarise([result("sft", d, 1.0) for d in (1, 2)])[0]
    assert mean_text(perfect.accuracy) == "100.0% (98.1-100.0)"  # 1.96 * sqrt(.00018135 / 2) = .01866


def test_single_answers_make_differences_surer():
    """Ten of 98 that one has wrong and the other right, on three documents."""
    known = {str(n): True for n in range(98)}
    worse = {key: int(key) >= 10 for key in known}
    pairs = [("sft", 88 / 98, worse), ("sft+grpo", 1.0, known)]
    results = [replace(result(v, d, a), n=98, right=r) for d in (1, 2, 3) for v, a, r in pairs]
    # (10 + 1 - 10^2 / 100) / 100^2 = .001 each: 1.96 * sqrt(.001 / 3) = .03578 about .10204
    assert verdicts(results) == ["| CoT-SFT + GRPO - CoT-SFT | +10.2 (+6.6 to +13.8) | 3 | better |"]
    apart = [replace(r, right=None) for r in results]  # 90 and 100 of 102: .0010178 and .00018846
    assert verdicts(apart) == ["| CoT-SFT + GRPO - CoT-SFT | +10.2 (+6.3 to +14.1) | 3 | better |"]
    assert "right" not in results[0].figures() and results[0].figures()["n"] == 98


def test_the_wanted_form_is_seen(tmp_path):
    results = [result("direct_sft+grpo", d, 0.1, format_rate=0.02) for d in (1, 2, 3)]
    text = write_study(tmp_path, results, base=BASE, sweeps={}).read_text()
    # (10 + 2) / 104 and (2 + 2) / 104: .00098145 and .00035560; 1.96 * sqrt(.00098145 / 3) = .03545, .02134
    assert "| direct SFT + GRPO | 10.0% (6.5-13.5) | 98.0% (95.9-100.0) | 2.0% (0.0-4.1) | 90.0%" in text
    assert "comparison" not in text


def test_with_ones_own_files_the_numbers_are_seeds(tmp_path):
    base = SimpleNamespace(data=OwnData(train="train.jsonl"))
    results = [result(v, d, a) for d in (1, 2, 3) for v, a in (("sft", 0.5), ("sft+grpo", 1.0))]
    text = write_study(tmp_path, results, base=base, sweeps={}).read_text()
    assert "6 runs over 3 seeds (1, 2, 3)." in text and "Means over seeds" in text and "paired by seed" in text
    assert "Document and examples are the same for every seed" in text
    assert "documents" not in text and "| n | seeds | training |" in text
    # the same hundred examples each time: 1.96 * sqrt(.25 / 104) = .0961
    assert "| CoT-SFT | 50.0% (40.4-59.6) |" in text and "| 100 | 3 | 1 min 00 s |" in text
    one = write_study(tmp_path, results[:1], base=base, sweeps={}).read_text()
    assert "1 run over one seed (1)." in one


def test_intervals_are_shown_within_the_possible():
    from mpi_mlx.evaluation.metrics import Mean

    assert mean_text(Mean(0.95, (0.85, 1.05), 3)) == "95.0% (85.0-100.0)"
    assert mean_text(Mean(0.5, None, 1)) == "50.0%" and mean_text(None) == "-"
