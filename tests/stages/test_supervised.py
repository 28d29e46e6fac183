from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mpi_mlx.documents import PolicyDocument
from mpi_mlx.errors import DataError
from mpi_mlx.recipe import CptStage, SftStage
from mpi_mlx.rollouts.rewards import well_formed
from mpi_mlx.stages.supervised import SupervisedObjective, SupervisedSource, encode_example, validation_loss
from mpi_mlx.stages.survey import Findings, Survey
from mpi_mlx.training import world
from mpi_mlx.training.fit import fit
from mpi_mlx.training.optimizer import Optimizer

RULES = PolicyDocument.from_text("If there is a red cube reply yes. Otherwise reply no. " * 3, "rules")


def cross_entropies(model, row):
    """-log p of each trained token, in numpy from all logits of the row by itself."""
    e = row.encoded
    features = mx.concatenate(model.features(e.images)) if e.images else None
    logits = model.head(model.hidden(model.embed(e.ids[None], features), mx.array(e.position_ids[:, None])))
    logits = np.array(logits[0], np.float64)
    logprobs = logits - logits.max(-1, keepdims=True)
    logprobs -= np.log(np.exp(logprobs).sum(-1, keepdims=True))
    trained = np.flatnonzero(row.weights)
    return -logprobs[trained - 1, e.ids[trained]]


def step_loss(model, batch):
    objective = SupervisedObjective(model)
    return sum(objective(micro)[0].item() for micro in batch.micros) / batch.count


def test_what_is_trained(model, dataset):
    example = dataset.train[0]
    said = f"<think>{example.reasoning}</think>\n{example.answer}"

    def trained(row):
        return model.tokenizer.decode(row.encoded.ids[row.weights > 0])

    sft = encode_example(model, example, None, "sft")
    assert trained(sft) == said + "<|im_end|>" and sft.identity == example.id
    direct = encode_example(model, example, None, "sft", reasoning=False)
    assert trained(direct) == example.answer + "<|im_end|>"
    cpt = encode_example(model, example, RULES, "cpt")
    text = trained(cpt)
    assert RULES.text.strip() in text and said in text and example.messages[0]["content"][1]["text"] in text
    e = cpt.encoded
    assert e.visual.sum() == 9 and not cpt.weights[e.visual].any()
    assert cpt.weights.sum() == len(cpt) - 9 - 1  # but the first token, which nothing predicts
    with pytest.raises(DataError, match="has no answer; stage sft needs labelled examples"):
        encode_example(model, replace(example, answer=None), None, "sft")


def test_a_template_that_opens_the_trace(model, dataset):
    """As thinking models' do: the tag is not written twice, and rewards see the whole turn."""
    example, chat = dataset.train[0], model._chat
    chat.template = chat.template.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    row = encode_example(model, example, None, "sft")
    trained = model.tokenizer.decode(row.encoded.ids[row.weights > 0])
    assert trained == f"{example.reasoning}</think>\n{example.answer}<|im_end|>"
    assert model.tokenizer.decode(row.encoded.ids).count("<think>") == 1
    direct = encode_example(model, example, None, "sft", reasoning=False)
    assert model.tokenizer.decode(direct.encoded.ids[direct.weights > 0]) == f"</think>\n{example.answer}<|im_end|>"
    prompt = model.encode(example.messages, generation_prompt=True)
    turns = [model.turn_text(prompt, r.encoded.ids[len(prompt) :]) for r in (row, direct)]
    assert turns == [f"<think>{example.reasoning}</think>\n{example.answer}", example.answer]
    assert well_formed(turns[0]) and well_formed(turns[1], reasoning=False)


@pytest.mark.parametrize("stage", ["cpt", "sft"])
def test_the_loss_is_plain_cross_entropy(model, dataset, stage):
    spec = CptStage(stage="cpt", steps=1, batch_size=3) if stage == "cpt" else SftStage(
        stage="sft", steps=1, batch_size=3, document_fraction=0.5)  # fmt: skip
    source = SupervisedSource(model, dataset.train, RULES, spec, seed=1)
    batch = source.batch(0)
    picked = [source._pick(i) for i in range(3)]
    if stage == "sft":
        assert {carries for _, carries in picked} == {False, True}  # both kinds in one step
    rows = [encode_example(model, dataset.train[i], RULES if c else None, stage) for i, c in picked]
    expected = np.concatenate([cross_entropies(model, row) for row in rows])
    assert batch.count == len(expected) and batch.tokens == sum(map(len, rows))
    assert step_loss(model, batch) == pytest.approx(expected.mean(), rel=1e-5)
    assert set(batch.identities) == {dataset.train[i].id for i, _ in picked}


def test_accumulation_equals_one_big_batch(adapted, dataset):
    """Rows of unequal lengths, with and without the document, four at once or one by one."""

    def trained(**sizes):
        model = adapted()
        spec = SftStage(stage="sft", steps=2, learning_rate=0.01, warmup=0.0, document_fraction=0.5, **sizes)
        source = SupervisedSource(model, dataset.train, RULES, spec, seed=1)
        optimizer = Optimizer("adamw")
        optimizer.init(model.net.trainable_parameters())
        run = fit(model.net, source, SupervisedObjective(model), spec, total=2, seed=0, optimizer=optimizer)
        return list(run), len(source.batch(0).micros)

    (whole, few), (split, many) = trained(batch_size=4), trained(batch_size=1, accumulate=4)
    assert few == 2 and many == 4
    for a, b in zip(whole, split, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5) and a.grad_norm == pytest.approx(
            b.grad_norm, rel=1e-4
        )
    assert whole[0].loss != whole[1].loss


def test_gradients_are_those_of_the_plain_mean(model, dataset):
    spec = SftStage(stage="sft", steps=1, batch_size=3)
    source = SupervisedSource(model, dataset.train, None, spec, seed=1)
    batch, objective = source.batch(0), SupervisedObjective(model)
    rows = [encode_example(model, dataset.train[source._pick(i)[0]], None, "sft") for i in range(3)]

    def plain(_):
        total = 0.0
        for row in rows:
            e = row.encoded
            embeds = model.embed(e.ids[None], mx.concatenate(model.features(e.images)))
            logits = model.head(model.hidden(embeds, mx.array(e.position_ids[:, None])))[0, :-1]
            losses = nn.losses.cross_entropy(logits, mx.array(e.ids[1:]))
            total = total + (losses * mx.array(row.weights[1:])).sum()
        return total / sum(row.weights.sum() for row in rows)

    def ours(_):
        return sum(objective(m)[0] for m in batch.micros) / batch.count

    expected = dict(tree_flatten(nn.value_and_grad(model.net, plain)(0)[1]))
    for name, value in tree_flatten(nn.value_and_grad(model.net, ours)(0)[1]):
        norm = mx.linalg.norm(expected[name]).item()
        assert norm > 0 and mx.linalg.norm(value - expected[name]).item() < 1e-4 * norm, name


def picks(stage, fraction, document=RULES, count=40, seed=4):
    examples = [SimpleNamespace(id=str(i)) for i in range(8)]
    spec = SimpleNamespace(stage=stage, document_fraction=fraction, batch_size=4, accumulate=1)
    source = SupervisedSource(SimpleNamespace(), examples, document, spec, seed)
    return [source._pick(i) for i in range(count)]


def test_every_epoch_takes_each_example_once_in_an_order_of_its_own():
    indices = [i for i, _ in picks("sft", 0.0)]
    epochs = [indices[n : n + 8] for n in range(0, 40, 8)]
    assert all(sorted(e) == list(range(8)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 5
    assert indices != [i for i, _ in picks("sft", 0.0, seed=5)]


def test_document_fraction():
    def carried(*arguments, **options):
        return Counter(c for _, c in picks(*arguments, **options))[True]

    assert carried("sft", 0.0) == 0 and carried("sft", 1.0) == 40
    assert 100 < carried("sft", 0.25, count=800) < 300  # expected: 200
    assert carried("cpt", 0.0) == 40  # always
    assert carried("sft", 1.0, document=None) == carried("cpt", 1.0, document=None) == 0


def test_validation_loss_is_a_mean_over_tokens(model, dataset):
    spec = SftStage(stage="sft", steps=1, batch_size=2)
    rows = [encode_example(model, e, None, "sft") for e in dataset.validation]
    expected = np.concatenate([cross_entropies(model, row) for row in rows]).mean()
    assert validation_loss(model, dataset.validation, dataset.document, spec) == pytest.approx(
        expected, rel=1e-5
    )
    with_document = CptStage(stage="cpt", steps=1, batch_size=2)
    rows = [encode_example(model, e, RULES, "cpt") for e in dataset.validation]
    expected = np.concatenate([cross_entropies(model, row) for row in rows]).mean()
    assert validation_loss(model, dataset.validation, RULES, with_document) == pytest.approx(
        expected, rel=1e-5
    )
    assert model.net.training  # as it was


def test_refusals(model, dataset):
    spec = SftStage(stage="sft", steps=1, batch_size=2, max_tokens=20)
    with pytest.raises(DataError, match="train split is empty"):
        SupervisedSource(model, (), None, spec, 0)
    with pytest.raises(DataError, match="over max_tokens=20"):
        SupervisedSource(model, dataset.train, None, spec, 0).batch(0)


@pytest.mark.parametrize("steps", [2, 20])
@pytest.mark.parametrize("stage", ["cpt", "sft", "half"])
def test_the_survey_knows_the_rows_that_will_be_drawn(model, dataset, stage, steps):
    spec = {
        "cpt": CptStage(stage="cpt", steps=steps, batch_size=2),
        "sft": SftStage(stage="sft", steps=steps, batch_size=2),
        "half": SftStage(stage="sft", steps=steps, batch_size=2, document_fraction=0.5),
    }[stage]
    drawing = SupervisedSource(model, dataset.train, RULES, spec, seed=1)
    drawn = {drawing._pick(position) for position in range(2 * steps)}
    lengths = {
        (i, carries): len(encode_example(model, dataset.train[i], RULES if carries else None, spec.stage))
        for i, carries in drawn
    }
    assert len(drawn) == (4 if steps == 2 else 10 if stage == "half" else 5)
    found = SupervisedSource(model, dataset.train, RULES, spec, seed=1).survey(steps)
    adds = {
        n - len(encode_example(model, dataset.train[i], None, spec.stage))
        for (i, carries), n in lengths.items()
        if carries
    }
    assert len(adds) == (stage != "sft")  # the document is as long in every row
    assert found == Survey(len(drawn), max(lengths.values()), *adds)
    # The limit is exact: the longest row passes, and a token less does not.
    limited = spec.model_copy(update={"max_tokens": found.longest})
    assert SupervisedSource(model, dataset.train, RULES, limited, seed=1).survey(steps) == found
    short = spec.model_copy(update={"max_tokens": found.longest - 1})
    over = sum(n == found.longest for n in lengths.values())
    words = f"{over} of {len(drawn)} rows are over .*={found.longest - 1}, the longest .{found.longest:,} tokens"
    with pytest.raises(DataError, match=words):
        SupervisedSource(model, dataset.train, RULES, short, seed=1).survey(steps)


def test_the_survey_spares_the_document(model, dataset, monkeypatch):
    """A document of 50,000 tokens, tokenized for each of a thousand rows, would take minutes."""
    carried, encode = [], model.encode
    monkeypatch.setattr(
        model, "encode", lambda messages, **o: carried.append(messages[0]["role"] == "system") or encode(messages, **o)
    )
    source = SupervisedSource(model, dataset.train, RULES, CptStage(stage="cpt", steps=9, batch_size=2), seed=1)
    assert source.survey(9).rows == 5
    assert 1 <= sum(carried) <= 2  # to know its length, and in the longest row


def test_the_survey_names_the_line_of_the_longest_row(model, dataset):
    rows = [replace(e, source=f"train.jsonl:{n}") for n, e in enumerate(dataset.train, 1)]
    rows[3] = replace(rows[3], reasoning="so it is. " * 60)
    source = SupervisedSource(model, rows, None, SftStage(stage="sft", steps=3, batch_size=2, max_tokens=300), seed=1)
    with pytest.raises(DataError, match=f"1 of 5 rows .* is train.jsonl:4 .example '{rows[3].id}'.; raise max_tokens"):
        source.survey(3)
    rows[1], rows[3] = replace(rows[1], answer=None), replace(rows[3], answer=None)
    with pytest.raises(DataError) as error:
        SupervisedSource(model, rows, None, SftStage(stage="sft", steps=3, batch_size=2), seed=1).survey(3)
    said = str(error.value).splitlines()
    assert said[0] == "stage sft: 2 errors" and sorted(line.split()[0] for line in said[1:]) == [
        "train.jsonl:2", "train.jsonl:4",
    ]  # fmt: skip


def test_processes_conclude_the_same_from_what_each_has_found(dataset, monkeypatch):
    """Two processes: the other one has 3 rows, one of them over the limit, and the longest of all;
    it alone saw rows with the document."""
    other = [[[], 3, 0, [400, "train.jsonl:9 (example 'z')"], 30]]
    monkeypatch.setattr(world, "gather_objects", lambda mine: mine + other)
    findings = Findings("sft")
    for row, tokens in enumerate((100, 250)):
        findings.measure(row, dataset.train[row], lambda tokens=tokens: tokens)
    assert findings.conclude() == Survey(5, 400, 30)
    other[0][2] = 1
    words = r"stage sft: 2 of 5 rows are over max_tokens=200, the longest .400 tokens. is train.jsonl:9 .example 'z'.;"
    with pytest.raises(DataError, match=words):
        findings.conclude(200)
    other[0][0].append("train.jsonl:7: odd")
    with pytest.raises(DataError, match="^train.jsonl:7: odd$"):
        findings.conclude()


def test_questions_about_the_document(model, dataset):
    rules = PolicyDocument.from_text("# Red\nIs there a red cube? Reply yes.\n\n# Else\nReply no.", "rules")
    spec = CptStage(stage="cpt", steps=30, batch_size=8, document_questions=0.25)
    source = SupervisedSource(model, dataset.train, rules, spec, 5)
    picked = [source._pick(n) for n in range(400)]
    asked = [p for p in picked if p[0] >= len(dataset.train)]
    assert 70 <= len(asked) <= 130 and not any(carries for _, carries in asked)  # 100 expected, 4 deviations of 8.7
    assert {p[0] - len(dataset.train) for p in asked} == {0, 1}
    row = source._row(len(dataset.train), False)
    said = model.tokenizer.decode(row.encoded.ids[row.weights > 0])
    assert "Recall Red." in said and said.count("Red Is there a red cube? Reply yes.<|im_end|>") == 1
    with pytest.raises(DataError, match="document_questions needs a document with headings"):
        SupervisedSource(model, dataset.train, RULES, spec, 5)
