from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mpi_mlx.models import kv, load_model
from mpi_mlx.rollouts import decode
from mpi_mlx.rollouts.decode import Batch
from mpi_mlx.rollouts.sampler import SamplingStats, sample_mixed


@pytest.fixture(scope="module")
def model():
    return load_model("embedded:tiny")


@pytest.fixture(autouse=True)
def as_on_cpu(monkeypatch):
    """On GPUs few slots are not shared."""
    monkeypatch.setattr(decode, "on_cpu", lambda: True)


def asked(model, query, document=None):
    pixels = np.random.default_rng(len(query)).integers(0, 255, (56, 56, 3), np.uint8)
    content = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": query}]
    system = [{"role": "system", "content": document}] if document else []
    return model.encode([*system, {"role": "user", "content": content}], generation_prompt=True)


def requests(model):
    """Plain prompts of unequal counts, and two that share a document."""
    document = "If the sphere is red then answer yes. Otherwise say the colour of the largest cube. " * 3
    queries = ["which reply?", "what is it, and what is next to it?", "which reply is it?"]
    plain = [asked(model, q) for q in queries]
    aware = [asked(model, q, document) for q in queries[:2]]
    return [*zip(plain, (8, 3, 1), strict=True), *zip(aware, (6, 2), strict=True)]


def drawn(model, temperature, top_p=1.0):
    stats = SamplingStats()
    options = dict(temperature=temperature, top_p=top_p, key=mx.random.key(7), stats=stats)
    groups = sample_mixed(model, requests(model), max_tokens=40, **options)
    return [c for group in groups for c in group], stats.row_steps


@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (1.5, 0.9)])
def test_together_gives_what_alone_gives(model, monkeypatch, temperature, top_p):
    together, few = drawn(model, temperature, top_p)
    monkeypatch.setattr(decode, "SHARE_BELOW", 0.0)
    alone, many = drawn(model, temperature, top_p)
    assert few < 0.95 * many, "the case shares nothing"
    assert len({len(c.ids) for c in alone}) > 1, "the case ends in one step"
    for a, b in zip(together, alone, strict=True):
        assert a.ids.tolist() == b.ids.tolist() and a.finished == b.finished
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_equal_completions_are_forwarded_once(model):
    """Five prompts, greedy: 5 slots in each of the 11 steps that follow the first token."""
    stats = SamplingStats()
    groups = sample_mixed(model, requests(model), max_tokens=12, temperature=0.0, stop_ids=(), stats=stats)
    assert [len(g) for g in groups] == [8, 3, 1, 6, 2]
    assert all(len(c.ids) == 12 for g in groups for c in g)
    assert stats.row_steps == 5 * 11


@pytest.mark.parametrize(("few", "slots"), [(35, 5), (36, 36)])
def test_a_gpu_shares_slots_only_where_there_are_many(model, monkeypatch, few, slots):
    """Five prompts' equal completions need 5 slots, or 36 (3 x 8 and 2 x 6) by themselves."""
    monkeypatch.setattr(decode, "on_cpu", lambda: False)
    monkeypatch.setattr(decode, "SHARE_ABOVE_GPU", few)
    stats = SamplingStats()
    sample_mixed(model, requests(model), max_tokens=12, temperature=0.0, stop_ids=(), stats=stats)
    assert stats.row_steps == slots * 11


def batch_of(counts):
    """One block of prompts that are asked for `counts` completions, and a cache that tells slots apart."""
    prompts = len(counts)
    stored = [mx.arange(prompts, dtype=mx.float32).reshape(prompts, 1, 1, 1)]
    prefix = kv.Prefix(stored, stored, np.ones(prompts, np.int32), np.zeros(prompts, np.int32))
    first = np.cumsum([0, *counts])
    rows = [np.arange(a, b) for a, b in zip(first[:-1], first[1:], strict=True)]
    batch = Batch(SimpleNamespace(), [kv.Block(prompts, (prefix,))], rows, None, np.arange(prompts) + 100)
    for cache in batch.caches:
        cache.update_and_fetch(stored[0], stored[0])
    return batch


def stored(batch):
    return batch.caches[0].keys[:, 0, 0, 0].astype(mx.int32).tolist()


def test_slots_divide_where_tokens_differ():
    """Two prompts of four: the second's draw 5 7 5 5, so that each gets two slots, one of the first's empty."""
    batch = batch_of([4, 4])
    assert batch._divide(np.array([9, 9, 9, 9, 5, 7, 5, 5]))
    assert batch.slots[0].tolist() == [[0, -1], [1, 2]]
    assert batch.at.tolist() == [0, 0, 0, 0, 2, 3, 2, 2]
    assert batch.positions.tolist() == [100, 100, 101, 101] and stored(batch) == [0, 0, 1, 1]
    # nothing differs: nothing moves
    caches = batch.caches
    assert batch._divide(np.array([1, 1, 1, 1, 2, 1, 2, 2])) and batch.caches is caches
    # rows 0 to 3 have ended, and 5 with them: a slot is enough
    batch.rows, batch.at = batch.rows[[4, 6, 7]], batch.at[[4, 6, 7]]
    assert batch._divide(np.array([3, 3, 3]))
    assert batch.slots[0].tolist() == [[0]] and batch.at.tolist() == [0, 0, 0]
    assert batch.positions.tolist() == [101] and stored(batch) == [1]
    assert batch.blocks[0].prefixes[0].keys[0].flatten().tolist() == [1]


def test_slots_of_their_own_once_sharing_spares_little():
    batch = batch_of([2, 3])
    assert batch._divide(np.array([1, 1, 4, 3, 4]))  # 2 x 2 slots instead of 2 x 3
    assert batch.at.tolist() == [0, 0, 3, 2, 3]
    assert not batch._divide(np.array([1, 2, 4, 3, 5]))
    # rows within a prompt in the order of the slots they come from
    assert batch.slots[0].tolist() == [[0, 1, -1], [3, 2, 4]]
    assert batch.at.tolist() == [0, 1, 4, 3, 5]
    assert batch.positions.tolist() == [100] * 3 + [101] * 3 and stored(batch) == [0, 0, 0, 1, 1, 1]


def test_a_prompt_that_needs_many_slots_is_decoded_apart():
    """Six slots for the first, one for each of the others, instead of three times six; then one for each again."""
    batch = batch_of([12, 2, 2])
    assert batch._divide(np.array([*range(6), *range(6), 8, 8, 9, 9]))
    assert [s.tolist() for s in batch.slots] == [[[0, 1, 2, 3, 4, 5]], [[6], [7]]]
    assert batch.at.tolist() == [*range(6), *range(6), 6, 6, 7, 7]
    assert batch.positions.tolist() == [100] * 6 + [101, 102] and stored(batch) == [0] * 6 + [1, 2]
    assert [b.prefixes[0].keys[0].flatten().tolist() for b in batch.blocks] == [[0], [1, 2]]
    batch.rows, batch.at = batch.rows[[3, 12, 13, 14]], batch.at[[3, 12, 13, 14]]
    assert batch._divide(np.array([5, 6, 6, 7]))
    assert [s.tolist() for s in batch.slots] == [[[0], [1], [2]]] and batch.at.tolist() == [0, 1, 1, 2]
    assert stored(batch) == [0, 1, 2] and batch.blocks[0].prefixes is batch.prefilled[0].prefixes
    # the first has ended: its keys are let go
    batch.rows, batch.at = batch.rows[1:], batch.at[1:]
    assert batch._divide(np.array([6, 6, 7]))
    assert stored(batch) == [1, 2] and batch.prefilled[0].prefixes[0].keys[0].flatten().tolist() == [1, 2]
    assert [(n, p.tolist()) for n, p in batch.members] == [(0, [0, 1])]
