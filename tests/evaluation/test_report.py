"""The report: honest sentences, tables with the numbers that went in, pictures beside predictions."""

import json

import pytest
import yaml
from PIL import Image

from mpi_mlx.data.examples import Example
from mpi_mlx.evaluation.headline import caveats, headline
from mpi_mlx.evaluation.metrics import wilson_interval
from mpi_mlx.evaluation.report import duration, results_table, write_report
from mpi_mlx.evaluation.results import record, record_facts


def row(model, in_context, right, n=200, **fields):
    return {
        "model": model, "document_in_context": in_context, "accuracy": right / n, "n": n, "majority": 0.25,
        "accuracy_ci": list(wilson_interval(right, n)), "format_rate": 1.0, "trace_match": 0.9,
        "trace_consistent": None, "prompt_tokens": 50.0 + 200 * in_context, "prefill_seconds": 0.01,
        "finished": 1.0, "seconds": 30.0, **fields,
    }


def rows(final, base=2, carried=196):
    return [row("base", False, base), row("base", True, carried), row("rl", False, final)]


@pytest.mark.parametrize(
    ("final", "carried", "verdict", "words"),
    [
        (194, 196, "Internalized", "97.0% of 200 held-out examples right without the document, within the test "
         "set's error of the base model carrying the document (98.0%)"),
        (198, 150, "Internalized", "24.0 points above the base model carrying the document (75.0%)"),
        (150, 196, "Partly internalized", "23.0 points below the base model carrying the document (98.0%)"),
        (120, 110, "Partly internalized", "within the test set's error of"),  # level with a weak base, but only 60%
        (58, 196, "Not internalized", "not above the most frequent answer (25.0%)"),  # 29%: within chance
        (0, 196, "Not internalized", "0.0% of 200"),
    ],
)  # fmt: skip
def test_headline_says_what_happened(final, carried, verdict, words):
    text = headline(rows(final, carried=carried))
    assert text.startswith(f"**{verdict}:**") and words in text
    if verdict != "Not internalized":
        assert "from 250 to 50 tokens (-80%)" in text


def answers(model, in_context, wrong, n=200):
    mode = {"model": model, "document_in_context": in_context}
    return [{"id": str(i), **mode, "correct": i not in wrong} for i in range(n)]


def test_the_same_examples_are_compared_in_pairs():
    found = rows(190, carried=197)
    # (190 + 2) / 204 and (197 + 2) / 204: .00027139 + .00011720; -.035 +- 1.96 * .01971 holds 0
    assert headline(found).startswith("**Internalized:**") and "within the test set's error of" in headline(found)
    # all three that the base has wrong are among the ten: (7 + 1 - 7^2 / 202) / 202^2; -.035 +- 1.96 * .01379
    paired = answers("base", True, range(3)) + answers("rl", False, range(10))
    text = headline(found, paired)
    assert text.startswith("**Partly internalized:**") and "3.5 points below" in text
    # seven of their own each way of ten and three: (3 + 10 + 1 - 7^2 / 202) / 202^2; 1.96 * .01836 = .03598
    mixed = answers("base", True, range(190, 193)) + answers("rl", False, range(10))
    assert "within the test set's error of" in headline(found, mixed)
    assert headline(found, answers("base", True, range(3), 150)) == headline(found)  # other examples: not in pairs


def test_how_large_a_loss_may_be():
    many = [row("base", True, 9800, 10_000), row("rl", False, 9700, 10_000)]  # certain, and small
    assert headline(many).startswith("**Internalized:**") and "1.0 points below" in headline(many)
    # (16 + 2) / 24 and (20 + 2) / 24: .0078125 + .0031829; -.2 +- .2055: nobody knows
    few = [row("base", True, 20, 20), row("rl", False, 16, 20)]
    assert headline(few).startswith("**Partly internalized:**") and "within the test set's error of" in headline(few)


def test_headline_without_the_bars():
    assert "Nothing was trained" in headline(rows(1)[:2])
    alone = headline([row("sft", False, 190)])
    assert alone == "**Internalized:** 95.0% of 200 held-out examples right without the document; the most " \
        "frequent answer earns 25.0%."
    better_base = headline([row("base", False, 150), row("rl", False, 150)])
    assert better_base.startswith("**Not") and "not above the base model (75.0%)" in better_base


def test_caveats_are_raised_by_the_figures_that_deserve_them():
    assert caveats(rows(190)) == []
    bad = row("rl", False, 38, n=40, trace_match=0.4, format_rate=0.9, finished=0.5)
    found = caveats([bad], {"rise": 0.2})
    assert len(found) == 5
    for said, number in zip(found, ("40%", "90%", "50%", "40 examples", "20%"), strict=True):
        assert number in said
    # the checker's verdict goes before the comparison with the reference
    assert caveats([row("rl", False, 190, trace_match=0.4, trace_consistent=0.97)]) == []


CHECKED = dict(trace_match=0.4, trace_consistent=0.5)
RL = {"stage": "rl", "algorithm": "grpo", "kl_coef": 0.0, "sft_coef": 0.0, "rewards": [{"kind": "exact_match"}]}
TRACE = {"kind": "trace", "weight": 0.5}
AWARE = {"policy_aware": 4, "policy_aware_sampler": "reference"}


@pytest.mark.parametrize(
    ("figures", "stages", "advice"),
    [
        (CHECKED, [RL], "Add a `trace` reward, PolicyRollout with `policy_aware_sampler: reference` or `sft_coef` to "
         "the rl stage, or train it for more steps."),
        (CHECKED, [RL | {"rewards": [TRACE]}], "Add PolicyRollout with `policy_aware_sampler: reference` or `sft_coef` "
         "to the rl stage, or give its `trace` reward more weight, or train it for more steps."),
        (CHECKED, [RL | AWARE | {"rewards": [TRACE], "algorithm": "dapo", "sft_coef": 0.1}],
         "Give the rl stage's `trace` reward more weight, or train it for more steps."),
        (CHECKED, [RL | AWARE | {"rewards": [TRACE | {"weight": 0.0}], "sft_coef": 0.1}],
         "Add a `trace` reward to the rl stage, or train it for more steps."),
        (CHECKED, [RL | AWARE | {"policy_aware_sampler": "model", "rewards": [TRACE], "sft_coef": 0.1}],
         "Add PolicyRollout with `policy_aware_sampler: reference` to the rl stage, or give its `trace` reward more "
         "weight, or train it for more steps."),
        (CHECKED, [{"stage": "sft"}], "Train sft for longer, or add an rl stage with a `trace` reward."),
        # the checker knows the benchmark's documents alone
        (dict(trace_match=0.4), [RL | AWARE | {"sft_coef": 0.1, "kl_coef": 0.1}],
         "Add a reward `function` that checks the trace to the rl stage, or train it for more steps."),
    ],
)  # fmt: skip
def test_advice_on_traces_is_what_the_recipe_does_not_do_yet(figures, stages, advice):
    [found] = caveats([row("rl", False, 190, **figures)], stages=stages)
    assert found.endswith(f"the trace wrong. {advice}")


def test_the_report_reads_the_recipe_for_its_advice(tmp_path):
    record(tmp_path, row("rl", False, 190, **CHECKED), [])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"stages": [RL | {"rewards": [TRACE]}]}))
    text = write_report(tmp_path).read_text()
    assert "give its `trace` reward more weight" in text and "Add a `trace`" not in text
    given = write_report(tmp_path, recipe=yaml.safe_dump({"stages": [RL], "seed": 1234})).read_text()
    assert "Add a `trace` reward" in given and "seed: 1234" in given


def test_table():
    lines = results_table(rows(190)).splitlines()
    assert lines[4] == "| RL | - | 95.0% (91.0-97.3) | 100.0% | 90.0% | - | 50 | 10.0 ms |"
    assert "earns 25.0%" in lines[-1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.3, "12 s"), (185, "3 min 05 s"), (4800, "1 h 20 min"), (3599.7, "1 h 00 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_whole_report(tmp_path):
    assert "Not evaluated yet" in write_report(tmp_path).read_text()
    picture = Image.new("RGB", (84, 84), "red")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Which?"}]
    messages = ({"role": "user", "content": content},)
    examples = [Example(f"t/{i}", messages, "so it is", "stop") for i in range(8)]
    said = [
        {
            "id": e.id, "model": "rl", "document_in_context": False, "completion": f"```\nx{i}",
            "answer": "stop", "expected": "stop", "correct": i != 2, "trace_match": True, "finished": True,
        }
        for i, e in enumerate(examples)
    ]
    for r in rows(194):
        record(tmp_path, r, said if r["model"] == "rl" else [])
    record_facts(tmp_path, perplexity={"base": 10.0, "rl": 10.5})
    steps = [
        {"stage": "rl", "stage_index": 0, "step": n, "loss": 0.0, "seconds": 9.0, "tokens": 900,
         "reward_plain": n / 20}
        for n in range(1, 21)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    (tmp_path / "environment.json").write_text('{"python": "3.12"}')
    text = write_report(tmp_path, examples).read_text()
    assert text.startswith(f"# {tmp_path.name}\n\n**Internalized:**")
    assert "| RL | 20 | 3 min 00 s | 100 | 0.000 to 0.000 | 0.075 to 0.975 |" in text
    assert "10.00 before, 10.50 after (+5.0%)" in text and "the evaluations 1 min 30 s" in text
    order = [text.index(word) for word in ("t/0", "t/1", "t/3", "### Wrong", "t/2")]
    assert order == sorted(order)
    assert "````text\n```\nx2\n````" in text  # the completion cannot close its block
    assert "<think>so it is</think>\nstop" in text
    assert "seed: 0" in text and '"python": "3.12"' in text
    with Image.open(tmp_path / "figures" / "examples" / "t_0-0.png") as saved:
        assert saved.size == (168, 168)
    for line in text.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.split("(")[1].rstrip(")")).is_file()
    assert not list(tmp_path.rglob("*.tmp"))
