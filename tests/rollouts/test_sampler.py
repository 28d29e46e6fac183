import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from PIL import Image

import mpi_mlx.assets
from mpi_mlx.models import load_model
from mpi_mlx.models.pieces import cluster_prompts
from mpi_mlx.rollouts import decode
from mpi_mlx.rollouts.draw import Draw, invert_cumulated
from mpi_mlx.rollouts.sampler import SamplingStats, generate_greedy, sample, sample_mixed

TINY = Path(mpi_mlx.assets.__file__).parent / "tiny"


def shaken(model, scale=1.0):
    """Random weights far from zero, so that rows do not fall into repeating one token."""
    mx.random.seed(5)

    def noisy(p):
        return p + scale * mx.random.normal(p.shape) / p.shape[-1] ** 0.5

    model.net.update(tree_map(noisy, model.net.parameters()))
    return model


@pytest.fixture(scope="module")
def vision():
    return shaken(load_model("embedded:tiny", init="random"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    for file in TINY.glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(TINY / "chat_template.jinja", folder)
    config = json.loads((TINY / "config.json").read_text())
    del config["vision_config"], config["rope_scaling"]
    config.update(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=64)
    config.update(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=96)
    (folder / "config.json").write_text(json.dumps(config))
    return shaken(load_model(folder, init="random"))


@pytest.fixture(params=["vision", "text"])
def model(request):
    return request.getfixturevalue(request.param)


DOCUMENT = "If the sphere is red then answer yes. Otherwise say the colour of the largest cube. " * 3


def prompts(model, *queries, document=None, pictures=()):
    system = [{"role": "system", "content": document}] if document else []
    encoded = []
    for i, query in enumerate(queries):
        content = [{"type": "text", "text": query}]
        if pictures:
            content = [{"type": "image", "image": pictures[i % len(pictures)]}, *content]
        messages = [*system, {"role": "user", "content": content if pictures else query}]
        encoded.append(model.encode(messages, generation_prompt=True))
    return encoded


def queries(n):
    return ["what is it?" + " and the next cube" * i for i in range(n)]


def picture(value, size=56):
    return Image.fromarray(np.full((size, size, 3), value, np.uint8))


def whole_logits(model, encoded):
    features = mx.concatenate(model.features(encoded.images)) if encoded.images else None
    positions = encoded.position_ids[:, None] if model.uses_mrope else encoded.position_ids
    return model.head(model.hidden(model.embed(encoded.ids[None], features), positions))[0]


def greedy_one_by_one(model, encoded, max_tokens, stop_ids):
    """Full forward for each token: the plainest decoder there is."""
    start, drawn = len(encoded.ids), []
    for _ in range(max_tokens):
        logits = np.array(whole_logits(model, encoded)[-1])
        logits[sorted(model.visual_ids)] = -np.inf
        drawn.append(int(logits.argmax()))
        encoded = encoded.concat([drawn[-1]])
        if drawn[-1] in stop_ids:
            break
    assert encoded.ids[start:].tolist() == drawn
    return drawn


def plain_logprobs(model, encoded, completion, temperature=1.0):
    logits = whole_logits(model, encoded.concat(completion.ids))[len(encoded) - 1 : -1] / temperature
    return np.array(nn.log_softmax(logits, axis=-1))[np.arange(len(completion.ids)), completion.ids]


def stops_for(model, batch):
    """Tokens at which greedy rows end at different steps."""
    free = [c.ids for c in generate_greedy(model, batch, max_tokens=24, stop_ids=())]
    return {int(ids[1 + 3 * i]) for i, ids in enumerate(free)}


def test_greedy_equals_one_by_one_with_unequal_prompts_and_compaction(model):
    batch = prompts(model, *queries(7))
    stops = stops_for(model, batch)
    stats = SamplingStats()
    got = generate_greedy(model, batch, max_tokens=24, stop_ids=stops, stats=stats)
    lengths = [len(c.ids) for c in got]
    assert len(set(lengths)) > 2 and stats.row_steps < 7 * max(lengths), "the case does not compact"
    for encoded, completion in zip(batch, got, strict=True):
        assert completion.ids.tolist() == greedy_one_by_one(model, encoded, 24, stops)
        assert completion.finished == (completion.ids[-1] in stops)


def test_greedy_in_batches_with_a_document_and_images(vision):
    batch = prompts(vision, *queries(5), document=DOCUMENT, pictures=[picture(30), picture(200, 84)])
    stats = SamplingStats()
    got = generate_greedy(vision, batch, max_tokens=8, batch_size=2, stop_ids=(), stats=stats)
    shared = cluster_prompts(batch)[0].shared
    assert shared > 60
    assert stats.prefill_tokens == shared + sum(len(p) - shared for p in batch)
    for encoded, completion in zip(batch, got, strict=True):
        assert completion.ids.tolist() == greedy_one_by_one(vision, encoded, 8, ())
        assert not completion.finished


def test_groups_share_their_prompt_and_logprobs_are_the_models(model):
    batch = prompts(model, *queries(3))
    groups = sample(model, batch, num_samples=4, max_tokens=20, temperature=0.8, key=mx.random.key(1))
    assert [len(g) for g in groups] == [4, 4, 4]
    assert len({c.ids.tobytes() for g in groups for c in g}) == 12
    for encoded, group in zip(batch, groups, strict=True):
        for completion in group:
            expected = plain_logprobs(model, encoded, completion, 0.8)
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_mixed_requests_equal_separate_ones(vision):
    """Plain and document-carrying prompts in one batch; also a request for other counts."""
    pictures = [picture(30), picture(200)]
    plain = prompts(vision, *queries(3), pictures=pictures)
    aware = prompts(vision, *queries(3), pictures=pictures, document=DOCUMENT)
    requests = [(p, 2) for p in plain] + [(aware[0], 3), (aware[1], 1), (aware[2], 2)]
    stops = stops_for(vision, plain)
    stats = SamplingStats()
    got = sample_mixed(vision, requests, max_tokens=12, temperature=0, stop_ids=stops, stats=stats)
    assert [len(g) for g in got] == [2, 2, 2, 3, 1, 2]
    shared = cluster_prompts(plain + aware)[0].shared
    assert stats.prefill_tokens == sum(map(len, plain + aware)) - 2 * shared
    for (encoded, _), group in zip(requests, got, strict=True):
        expected = greedy_one_by_one(vision, encoded, 12, stops)
        for completion in group:
            assert completion.ids.tolist() == expected
            logprobs = plain_logprobs(vision, encoded, completion)
            np.testing.assert_allclose(completion.logprobs, logprobs, atol=1e-4)


def test_one_key_one_result_whatever_is_compacted(model, monkeypatch):
    batch = prompts(model, *queries(4))
    options = dict(num_samples=4, max_tokens=30, temperature=1.0, stop_ids=range(50, 160))
    stats, steady = SamplingStats(), SamplingStats()
    a = sample(model, batch, key=mx.random.key(3), stats=stats, **options)
    monkeypatch.setattr(decode, "COMPACT_BELOW", 0.0)
    b = sample(model, batch, key=mx.random.key(3), stats=steady, **options)
    assert stats.row_steps < 0.9 * steady.row_steps
    waves = sample(model, batch, key=mx.random.key(3), max_rows=5, **options)
    other = sample(model, batch, key=mx.random.key(4), **options)
    ids = [[c.ids.tolist() for g in result for c in g] for result in (a, b, waves, other)]
    assert ids[0] == ids[1] == ids[2] != ids[3]


def test_draws_follow_the_distribution(text):
    encoded = prompts(text, "what is it?")
    (group,) = sample(text, encoded, num_samples=4000, max_tokens=1, temperature=0.5, key=mx.random.key(0))
    counts = np.bincount([c.ids[0] for c in group], minlength=text.vocab_size) / 4000
    probabilities = np.array(mx.softmax(whole_logits(text, encoded[0])[-1] / 0.5))
    assert np.abs(counts - probabilities).max() < 4 * np.sqrt(probabilities.max() / 4000)


def test_top_p_keeps_to_the_likeliest(text):
    encoded = prompts(text, "what is it?")
    (group,) = sample(text, encoded, num_samples=500, max_tokens=1, top_p=0.2, key=mx.random.key(0))
    probabilities = np.array(mx.softmax(whole_logits(text, encoded[0])[-1]))
    order = np.argsort(-probabilities)
    nucleus = order[: int((np.cumsum(probabilities[order]) < 0.2).sum()) + 1]
    drawn = {int(c.ids[0]) for c in group}
    assert drawn <= set(nucleus.tolist()) and len(drawn) > 1
    np.testing.assert_allclose(group[0].logprobs, np.log(probabilities[group[0].ids]), atol=1e-5)


def test_visual_tokens_are_never_drawn(vision):
    """Even where they are all but certain."""
    draw = Draw(vision, 1.0, 1.0, True)
    logits = np.zeros((64, vision.vocab_size), np.float32)
    logits[:, sorted(vision.visual_ids)] = 30.0
    draw.model = type("Head", (), {"head": staticmethod(lambda x: x)})
    tokens, _ = draw(mx.array(logits), np.linspace(0, 1 - 2**-24, 64, dtype=np.float32))
    assert not set(np.array(tokens).tolist()) & vision.visual_ids
    draw.temperature = 0
    assert not set(np.array(draw(mx.array(logits), None)[0]).tolist()) & vision.visual_ids


def test_inverting_by_hand():
    probabilities = mx.array([[0.25, 0.25, 0.5]] * 5)
    uniforms = mx.array([0.0, 0.24, 0.26, 0.6, 0.9999999])[:, None]
    assert invert_cumulated(probabilities, uniforms).squeeze().tolist() == [0, 0, 1, 2, 2]


@pytest.mark.parametrize("width", [3, 64, 200, 8192])
def test_inverting_is_searching_the_cumulated_weights(width):
    rng = np.random.default_rng(width)
    weights = (rng.random((50, width)) ** 4 * (rng.random((50, width)) < 0.3)).astype(np.float32)
    weights[:, width // 2] = 0.5
    uniforms = np.concatenate([[0.0, 1 - 2**-24], rng.random(48)]).astype(np.float32)
    drawn = np.array(invert_cumulated(mx.array(weights), mx.array(uniforms)[:, None]))[:, 0]
    cumulated = np.cumsum(weights.astype(np.float64), axis=1)
    target = uniforms * cumulated[:, -1]
    slack = 1e-5 * cumulated[:, -1]
    rows = np.arange(50)
    assert (weights[rows, drawn] > 0).all()
    assert (cumulated[rows, drawn] > target - slack).all()
    assert (cumulated[rows, drawn] - weights[rows, drawn] < target + slack).all()


def test_clusters(vision):
    red, blue = picture(30), picture(200)
    plain = prompts(vision, *queries(2))
    aware = prompts(vision, *queries(3), document=DOCUMENT)
    clusters = cluster_prompts([plain[0], aware[0], aware[1], plain[1], aware[2]])
    assert [c.indices for c in clusters] == [[1, 2, 4], [0, 3]] and clusters[1].shared == 0
    # another image ends what is shared before it; the same image does not
    images = prompts(vision, "a", "b", document=DOCUMENT, pictures=[red, blue])
    first_visual = int(np.flatnonzero(images[0].visual)[0])
    assert cluster_prompts(images)[0].shared == first_visual
    same = prompts(vision, "a", "b", document=DOCUMENT, pictures=[red])
    assert cluster_prompts(same)[0].shared > np.flatnonzero(same[0].visual)[-1]


def test_sampling_needs_a_key(text):
    with pytest.raises(ValueError, match="key"):
        sample(text, prompts(text, "a"), max_tokens=2)
