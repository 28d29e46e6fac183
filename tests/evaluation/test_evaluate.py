"""Grading by hand, and the whole evaluation on random weights."""

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mpi_mlx.data.clevr_policy import make_example
from mpi_mlx.data.examples import Example
from mpi_mlx.data.policy_tree import random_tree
from mpi_mlx.data.scenes import random_scenes
from mpi_mlx.documents import PolicyDocument, place_document
from mpi_mlx.errors import DataError
from mpi_mlx.evaluation import evaluate as module
from mpi_mlx.evaluation.evaluate import check_evaluation, evaluate, evaluation
from mpi_mlx.evaluation.forgetting import forgetting, general_text, perplexity
from mpi_mlx.models import load_model
from mpi_mlx.rollouts import sampler
from mpi_mlx.rollouts.sampler import Completion
from mpi_mlx.training import world

SPEC = SimpleNamespace(batch_size=2, max_completion_tokens=5, samples=None)


@pytest.fixture(scope="module")
def model():
    return load_model("embedded:tiny", init="random")


def example(identity, answer, reasoning=None, **fields):
    messages = ({"role": "user", "content": "Which one?"},)
    return Example(identity, messages, reasoning, answer, **fields)


def answered(model, monkeypatch, texts):
    """Lets the model say ``texts``."""
    said = [Completion(model.encode_completion(t), np.zeros(1, np.float32), True) for t in texts]

    def spoken(model, prompts, *, batch_size, **options):
        assert len(prompts) == len(said)
        for start in range(0, len(said), batch_size):
            yield min(start + batch_size, len(said))
        return said

    monkeypatch.setattr(module, "greedy_batches", spoken)
    return [len(c.ids) for c in said]


def test_row_by_hand(model, monkeypatch):
    texts = ["<think>r e d</think>\nStop", "<think>red</think>\nstop", "<think>blue</think>", "go"]
    lengths = answered(model, monkeypatch, texts)
    rows = [
        example("a", "stop", "r e  d"), example("b", "stop", "blue"), example("c", "stop", "blue"),
        example("d", "go"),
    ]
    row, predictions = evaluate(model, rows, label="sft", spec=SPEC)
    assert row["model"] == "sft" and row["document_in_context"] is False and row["n"] == 4
    assert row["accuracy"] == 0.75  # a, b, d
    assert row["accuracy_ci"] == pytest.approx([0.3006, 0.9544], abs=1e-3)
    assert row["format_rate"] == 0.5  # a, b
    assert row["trace_match"] == pytest.approx(2 / 3)  # a and c, of the three that have a trace
    assert row["trace_consistent"] is None
    assert row["majority"] == 0.75
    assert row["completion_tokens"] == pytest.approx(np.mean(lengths))
    assert row["prefill_seconds"] > 0
    assert predictions[2] == {
        "id": "c", "model": "sft", "document_in_context": False, "completion": "<think>blue</think>",
        "answer": "", "expected": "stop", "correct": False, "trace_match": True, "finished": True,
    }


def test_without_reasoning_tags_are_wrong_and_traces_not_asked_for(model, monkeypatch):
    answered(model, monkeypatch, ["stop", "<think>x</think>\nstop"])
    rows = [example("a", "stop", "red"), example("b", "stop", "red")]
    row, _ = evaluate(model, rows, label="sft", spec=SPEC, reasoning=False)
    assert row["format_rate"] == 0.5 and row["trace_match"] is None and row["accuracy"] == 1.0


def test_consistent_traces_of_the_benchmark(model, monkeypatch):
    rng = np.random.default_rng(0)
    tree, scenes = random_tree(rng, 2), random_scenes(rng, 2)
    rows = [
        make_example(tree, scenes.scene(i), None, f"t{i}", "?", reasoning=True, tree_dict=tree.to_dict())
        for i in range(2)
    ]
    rows = [example(r.id, r.answer, r.reasoning, meta=r.meta) for r in rows]
    other = next(r for r in tree.replies if r != rows[1].answer)
    texts = [f"<think>{rows[i].reasoning}</think>\n{a}" for i, a in enumerate([rows[0].answer, other])]
    answered(model, monkeypatch, texts)
    row, _ = evaluate(model, rows, label="rl", spec=SPEC)
    assert row["trace_consistent"] == 0.5 and row["trace_match"] == 1.0 and row["accuracy"] == 0.5


def test_meta_of_one_s_own_is_left_alone(model, monkeypatch):
    answered(model, monkeypatch, ["<think>red</think>\nstop"])
    row, _ = evaluate(model, [example("a", "stop", "red", meta={"tree": "oak"})], label="sft", spec=SPEC)
    assert row["accuracy"] == 1.0 and row["trace_consistent"] is None


def test_tool_calls_are_scored_beside_exact_match(model, monkeypatch):
    call = '{"name": "f", "arguments": {"a": 1}}'
    answered(model, monkeypatch, ['{"arguments": {"a": 1}, "name": "f"}'])
    row, _ = evaluate(model, [example("a", call)], label="sft", spec=SPEC, reasoning=False)
    assert row["accuracy"] == 0.0 and row["tool_call_score"] == 1.0


def test_a_whole_evaluation(model):
    document = PolicyDocument.from_text("Say stop to red ones. " * 4, "rules")
    rows = [example(str(i), "stop", "red") for i in range(5)]
    seen = []
    plain, said = evaluate(model, rows, label="base", spec=SPEC, progress=lambda *at: seen.append(at))
    carried, _ = evaluate(model, rows, document, label="base", spec=SPEC)
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]
    assert carried["document_in_context"] and carried["prompt_tokens"] > plain["prompt_tokens"] + 20
    assert len({p["completion"] for p in said}) == 1  # equal prompts, equal greedy answers
    few, _ = evaluate(model, rows, label="base", spec=SimpleNamespace(**{**vars(SPEC), "samples": 3}))
    assert few["n"] == 3


def test_a_document_is_prefilled_once_for_all_batches(model, monkeypatch):
    document = PolicyDocument.from_text("Say stop to red ones. " * 4, "rules")
    shared, prefilled = [], sampler.prefill_shared
    monkeypatch.setattr(
        sampler, "prefill_shared", lambda model, prompt, n: shared.append(n) or prefilled(model, prompt, n)
    )
    rows = [example(str(i), "stop", "red") for i in range(5)]
    steps = evaluation(model, rows, document, label="base", spec=SPEC)
    assert [next(steps) for _ in range(3)] == [(0, 5), (2, 5), (4, 5)]
    steps.close()  # may be left between batches
    assert len(shared) == 1 and shared[0] > 50


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("count", [1, 4, 5, 8])
def test_processes_say_how_far_they_are_equally_often(model, monkeypatch, count, rank):
    """Two processes, batches of 2: of 5 examples one answers 3, in two batches, the other 2, in one."""
    monkeypatch.setattr(world, "world", lambda: SimpleNamespace(size=lambda: 2, rank=lambda: rank))
    monkeypatch.setattr(world, "gather_objects", lambda mine: [[n, [1], True] for n in range(count)])
    asked = []

    def spoken(model, prompts, *, batch_size, **options):
        for start in range(0, len(prompts), batch_size):
            asked.append(len(prompts[start : start + batch_size]))
            yield start
        return [Completion(np.array([1], np.int32), np.zeros(1, np.float32), True) for _ in prompts]

    monkeypatch.setattr(module, "greedy_batches", spoken)
    rows = [example(str(i), "stop") for i in range(count)]
    said = list(evaluation(model, rows, label="base", spec=SPEC))
    assert said == [(0, count), *{1: [(1, 1)], 4: [(4, 4)], 5: [(4, 5), (5, 5)], 8: [(4, 8), (8, 8)]}[count]]
    # ... and without the stand-in: no prompts, no batches
    assert sampler.finish(sampler.greedy_batches(model, [], max_tokens=2)) == []
    assert asked == {1: [[1], []], 4: [[2], [2]], 5: [[2, 1], [2]], 8: [[2, 2], [2, 2]]}[count][rank]


def test_what_is_too_long_for_the_model(model, monkeypatch):
    """The longest prompt and an answer fill the context; a token less is refused before anything is generated."""
    document = PolicyDocument.from_text("Say stop. " * 40, "rules")
    rows = [example("a", "stop"), example("b", "go", source="test.jsonl:2")]
    rows[1] = replace(rows[1], messages=({"role": "user", "content": "Which one of all these? " * 9},))
    placed = place_document(rows[1].messages, document)
    prompt = len(model.encode(placed, generation_prompt=True))
    added = prompt - len(model.encode(rows[1].messages, generation_prompt=True))
    answered(model, monkeypatch, ["stop", "go"])

    def check(limit, given=document, **changes):
        monkeypatch.setattr(model, "config", {**model.config, "max_position_embeddings": limit})
        spec = SimpleNamespace(**vars(SPEC) | changes)
        check_evaluation(model, rows, given, spec)
        return evaluate(model, rows, given, label="base", spec=spec)

    assert check(prompt + 5)[0]["n"] == 2
    assert check(prompt - added + 5, None)[0]["n"] == 2
    said = (
        rf"evaluation with the document in context: test.jsonl:2 \(example 'b'\): {prompt + 5:,} tokens \({added:,} of "
        rf"them the document's, 5 for a completion\), and embedded:tiny takes {prompt + 4:,} .*; shorten the document, "
        "set evaluation.with_document: false, lower evaluation.max_completion_tokens, or choose a base"
    )
    with pytest.raises(DataError, match=said):
        check(prompt + 4)
    with pytest.raises(DataError, match=said):
        evaluate(model, rows, document, label="base", spec=SPEC)
    with pytest.raises(DataError, match="evaluation without the document.*shorten the example"):
        check(prompt - added + 4, None)
    monkeypatch.setattr(model, "config", {**model.config, "max_position_embeddings": prompt + 4})
    # what is not asked is not looked at
    check_evaluation(model, rows, document, SimpleNamespace(**vars(SPEC), with_document=False))
    check_evaluation(model, rows, document, SimpleNamespace(**vars(SPEC) | {"samples": 1}))
    check_evaluation(model, [], document, SPEC)


def test_nothing_to_evaluate(model):
    with pytest.raises(DataError, match="test split is empty"):
        evaluate(model, [], label="base", spec=SPEC)
    with pytest.raises(DataError, match="'x' has no answer"):
        evaluate(model, [example("x", None)], label="base", spec=SPEC)


def test_perplexity_of_uniform_logits_is_the_vocabulary(model, monkeypatch):
    monkeypatch.setattr(model, "head_weight", lambda: mx.zeros((model.vocab_size, model.hidden_size)))
    assert perplexity(model, "Rivers do not run straight.") == pytest.approx(model.vocab_size, rel=1e-5)


def test_perplexity_counts_each_window_without_its_first_token(model):
    text = general_text()[:80]
    ids = np.array(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    whole = np.log(perplexity(model, text)) * (len(ids) - 1)
    # logits of the whole sequence, by hand
    positions = np.broadcast_to(np.arange(len(ids) - 1), (3, 1, len(ids) - 1))
    logits = model.head(model.hidden(model.embed(ids[None, :-1]), mx.array(positions)))[0]
    chosen = np.array(logits - mx.logsumexp(logits, -1, keepdims=True))[np.arange(len(ids) - 1), ids[1:]]
    assert whole == pytest.approx(-chosen.sum(), rel=1e-4)
    halves = (len(ids) + 1) // 2
    assert perplexity(model, text, window=halves) != pytest.approx(np.exp(whole / (len(ids) - 1)))
    with pytest.raises(ValueError):
        perplexity(model, "")


def test_forgetting_is_a_share():
    found = forgetting({"base": 20.0, "sft": 30.0, "rl": 22.0})
    assert found["perplexity_after"] == 22.0 and found["rise"] == pytest.approx(0.1)
    assert forgetting({"base": 1e6, "rl": 2e6}) is None
    assert forgetting({"base": 20.0}) is None and forgetting({"rl": 20.0}) is None
