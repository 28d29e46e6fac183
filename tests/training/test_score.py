import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from PIL import Image

import mpi_mlx.assets
from mpi_mlx.models import load_model
from mpi_mlx.rollouts.sampler import sample
from mpi_mlx.training import score as score_module
from mpi_mlx.training.rows import padded
from mpi_mlx.training.score import forwards, score, score_plain, split

TINY = Path(mpi_mlx.assets.__file__).parent / "tiny"
DOCUMENT = "If the sphere is red then answer yes. Otherwise say the colour of the largest cube. " * 4


def shaken(model):
    mx.random.seed(5)

    def noisy(p):
        return p + mx.random.normal(p.shape) / p.shape[-1] ** 0.5

    model.net.update(tree_map(noisy, model.net.parameters()))
    model.net.freeze()
    model.parts.text.unfreeze()
    return model


@pytest.fixture(scope="module")
def vision():
    return shaken(load_model("embedded:tiny", init="random"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    for file in [*TINY.glob("*token*"), TINY / "chat_template.jinja"]:
        shutil.copy(file, folder)
    config = json.loads((TINY / "config.json").read_text())
    del config["vision_config"], config["rope_scaling"]
    config.update(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=64, num_hidden_layers=2)
    config.update(num_attention_heads=4, num_key_value_heads=2, intermediate_size=96)
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    return shaken(load_model(folder, init="random"))


def encode(model, query, document=None, value=None):
    messages = [{"role": "system", "content": document}] if document else []
    content = query
    if value is not None:
        image = Image.fromarray(np.full((56, 84, 3), value, np.uint8))
        content = [{"type": "image", "image": image}, {"type": "text", "text": query}]
    return model.encode([*messages, {"role": "user", "content": content}], generation_prompt=True)


def completions(rng, *lengths):
    return [rng.integers(8, 1000, n).astype(np.int32) for n in lengths]


def cases(model, name):
    """Groups of unequal prompts, completions and sizes; a leftover row."""
    rng = np.random.default_rng(0)
    pictures = (30, 30, 200) if model.is_multimodal else (None,) * 3
    document = DOCUMENT if "document" in name else None
    queries = ("what is it?", "and is the cube red, or the sphere?", "colour")
    prompts = [encode(model, q, document, v) for q, v in zip(queries, pictures, strict=True)]
    if name == "mixed":
        prompts += [encode(model, q, DOCUMENT) for q in queries[:2]]
    sizes = [(5, 12, 1), (7, 3, 9), (2, 2, 4), (3, 3, 3), (6, 1, 1)]
    if name == "ragged":
        sizes = [(5, 12, 1), (7,), (2, 9)]
    groups = [(p, completions(rng, *s)) for p, s in zip(prompts, sizes, strict=False)]
    if name == "repeated":  # equal completions, of one prompt and of another
        (p, (a, b, c)), (q, (d, e, f)), (r, (g, h, i)) = groups
        groups = [(p, [a, b, a, a, c]), (q, [d, a, e, f]), (r, [g, g, h, i, h])]
    if name in ("stems", "stems and document"):  # all of one prompt's begin alike; another's are but one
        (begin,) = completions(rng, 20)
        starts, ends = (begin[:13], begin, begin[:18]), ((5, 2, 1), (3,), (2, 4, 1, 3, 2, 5, 1, 4))
        groups = [
            (p, [np.concatenate([start, end]) for end in completions(rng, *lengths)])
            for (p, _), start, lengths in zip(groups, starts, ends, strict=True)
        ]
        groups[1][1].append(groups[1][1][0])
    if name == "branches":  # and begin alike in parts; one of them is what another begins with
        (p, (a, b, c)), (q, (d, e, f)), (r, _) = groups
        more = completions(rng, 3, 4, 5)
        found = [np.concatenate([b, x]) for x in more] + [np.concatenate([b[:7], more[0], x]) for x in more]
        groups = [(p, [*found, a, b, b[:7], found[1]]), (q, [e, np.concatenate([e, f]), f]), (r, [d])]
    return groups


NAMES = ["even", "ragged", "document", "mixed", "repeated", "stems", "stems and document", "branches"]


def force(monkeypatch, way):
    spared = 1 if way == "tree" else -1
    monkeypatch.setattr(score_module, "trees_spare", lambda groups, layers: [spared] * len(groups))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["tree", "rows"])
@pytest.mark.parametrize("which", ["vision", "text"])
def test_equals_plain_forward(which, way, name, request, monkeypatch):
    model = request.getfixturevalue(which)
    force(monkeypatch, way)
    groups = cases(model, name)
    width = padded(max(len(c) for _, cs in groups for c in cs))
    weight = mx.random.uniform(shape=(sum(len(c) for _, c in groups), width))

    def shared(_):
        logprobs, mask = score(model, groups, temperature=0.9, chunk=7)
        assert logprobs.shape == mask.shape == weight.shape
        return (logprobs * weight * mask).sum(), logprobs, mask

    def plain(_):
        rows = [score_plain(model, p, c, temperature=0.9) for p, cs in groups for c in cs]
        return sum((row * weight[i, : len(row)]).sum() for i, row in enumerate(rows)), rows

    (a, logprobs, mask), gradients = nn.value_and_grad(model.net, shared)(0)
    (b, rows), expected = nn.value_and_grad(model.net, plain)(0)
    assert abs(float(a - b)) < 1e-5 * abs(float(b))
    for ours, row in zip(split(logprobs, mask), rows, strict=True):
        np.testing.assert_allclose(ours, np.array(row), rtol=1e-5, atol=1e-5)
    expected = dict(tree_flatten(expected))
    for key, value in tree_flatten(gradients):
        error = float(mx.linalg.norm(value - expected[key])) / float(mx.linalg.norm(expected[key]))
        assert error < 1e-4 or float(mx.linalg.norm(expected[key])) < 1e-6, (key, error)


@pytest.mark.parametrize("which", ["vision", "text"])
def test_sampler_and_scorer_agree(which, request):
    """The drift that every RL step reports."""
    model = request.getfixturevalue(which)
    prompts = [encode(model, q) for q in ("what is it?", "and is the cube red?")]
    prompts.append(encode(model, "which?", DOCUMENT, 30 if model.is_multimodal else None))
    for temperature in (1.0, 0.7):
        options = dict(num_samples=4, max_tokens=20, key=mx.random.key(0))
        drawn = sample(model, prompts, temperature=temperature, **options)
        groups = [(p, [c.ids for c in cs]) for p, cs in zip(prompts, drawn, strict=True)]
        logprobs, mask = score(model, groups, temperature=temperature)
        sampled = [c.logprobs for cs in drawn for c in cs]
        drift = max(np.abs(a - b).max() for a, b in zip(split(logprobs, mask), sampled, strict=True))
        assert drift < 1e-4


def test_equal_completions_are_forwarded_once(text, monkeypatch):
    force(monkeypatch, "rows")
    forwarded = []
    hidden = text.hidden
    monkeypatch.setattr(text, "hidden", lambda x, *rest: forwarded.append(x.shape[0]) or hidden(x, *rest))
    score(text, cases(text, "repeated"))
    assert forwarded == [3, 3 + 4 + 3]  # prompts, then of 5, 4 and 5 completions those that differ


@pytest.mark.parametrize("name", ["stems", "stems and document", "mixed", "branches"])
def test_what_begins_alike_is_forwarded_once(vision, monkeypatch, name):
    """Every beginning of a prompt and completion that something follows; an image counts for its placeholders."""
    groups = cases(vision, name)
    force(monkeypatch, "tree")
    forwarded = []
    hidden = vision.hidden
    monkeypatch.setattr(vision, "hidden", lambda x, *rest: forwarded.append(x.shape[:2]) or hidden(x, *rest))
    score(vision, groups)
    beginnings = set()
    for prompt, found in groups:
        ids = prompt.ids.astype(object)
        ids[prompt.visual] = [image.key for image in prompt.images for _ in range(image.num_tokens)]
        for completion in found:
            whole = (*ids, *completion.tolist())
            beginnings.update(whole[:n] for n in range(1, len(whole)))
    assert forwarded == [(len(beginnings), 1)]


def test_completions_that_share_much_make_a_tree(text):
    prompt, rng = encode(text, "what is it?"), np.random.default_rng(1)
    apart = completions(rng, 16, 16, 16)
    alike = [np.concatenate([apart[0][:12], c]) for c in completions(rng, 4, 4, 4)]
    own = len(prompt) - 1
    # 3 rows of 16, and of the prompt's last layer, one of two, keys and values; as a tree, 15 tokens a completion
    expected = [own / 2 + 48 - 1.2 * (len(prompt) + tokens) for tokens in (3 * 15, 12 + 3 * 3)]
    (first,), (second,) = (score_module.trees_spare([(prompt, found)], 2) for found in (apart, alike))
    assert [first, second] == pytest.approx(expected)
    groups = [(prompt, apart), (prompt, alike), (prompt, apart)]
    assert [s > 0 for s in score_module.trees_spare(groups, 10**6)] == [False, True, False]
    assert forwards(groups, 10**6, 10**6) == [([1], True), ([0, 2], False)]
    # a document that prompts share is forwarded once in either way, and costs a tree a little more
    longer = [(encode(text, query, DOCUMENT * 3), alike) for query in ("what is it?", "is it red?")]
    first, second = (prompt.ids for prompt, _ in longer)
    shared = int(np.argmax(first[: len(second)] != second[: len(first)]))
    assert shared > 64  # else they are forwarded by themselves
    rest = len(first) - shared
    expected = (rest - 1) / 2 + 48 - 1.2 * (rest + 21) - 0.06 * shared
    assert score_module.trees_spare(longer, 2)[0] == pytest.approx(expected)
    deep = [(prompt, [np.arange(8, 8 + score_module.TREE_DEPTH)] * 2)]
    assert score_module.trees_spare(deep, 2) == [-float("inf")]


def test_padding_changes_nothing(text):
    """A row alone and beside longer ones: the same numbers."""
    prompt, rng = encode(text, "what is it?"), np.random.default_rng(1)
    short, long = completions(rng, 3, 30)
    alone, mask = score(text, [(prompt, [short])])
    beside, _ = score(text, [(prompt, [long, short])])
    assert mask.shape == (1, 8)
    np.testing.assert_allclose(alone[0, :3], beside[1, :3], atol=1e-5)
    assert not np.array(alone)[np.array(mask) == 0].any()


@pytest.mark.parametrize("name", ["ragged", "stems"])
def test_groups_apart_give_what_they_give_together(text, name, monkeypatch):
    groups = cases(text, name)
    parts = forwards(groups, most_tokens=24, layers=2)
    assert len(parts) > 1 and sorted(i for part, _ in parts for i in part) == [0, 1, 2]
    whole, apart = split(*score(text, groups)), {}
    # a part alone may share less than in its step: it is forwarded as it was planned, whose tokens are bounded
    monkeypatch.setattr(score_module, "trees_spare", None)
    for part, tree in parts:
        other = "forward_rows" if tree else "forward_tree"
        with monkeypatch.context() as patched:
            patched.setattr(score_module, other, None)
            found = iter(split(*score(text, [groups[i] for i in part], tree=tree)))
        apart |= {i: [next(found) for _ in groups[i][1]] for i in part}
    for ours, row in zip(whole, [row for i in range(3) for row in apart[i]], strict=True):
        np.testing.assert_allclose(ours, row, atol=1e-5)
