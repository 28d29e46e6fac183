"""Adapters merged into the base for as long as a model samples."""

from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mpi_mlx.models import load_model
from mpi_mlx.models.lora import attach_lora
from mpi_mlx.models.merged import LEAST_TOKENS, merged_adapters
from mpi_mlx.rollouts import sampler
from mpi_mlx.rollouts.sampler import sample
from mpi_mlx.training.score import score, split


@pytest.fixture()
def adapted(qwen):
    return with_lora(qwen)


def with_lora(model, **changes):
    """Random adapters, both matrices."""
    usual = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear", "kind": "lora", "projector": False}
    attach_lora(model, SimpleNamespace(**usual | changes))
    mx.random.seed(1)
    model.net.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.net.trainable_parameters()))
    model.net.eval()
    return model


def hidden(model):
    ids = np.arange(8, 40)[None].repeat(2, 0)
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), (3, 2, 32))
    return model.hidden(model.embed(ids), positions)


def prompts(model):
    return [model.encode([{"role": "user", "content": q}], generation_prompt=True) for q in ("what?", "is it red?")]


def test_merged_is_the_same_function_and_leaves_no_trace(adapted):
    names = [name for name, _ in tree_flatten(adapted.net.trainable_parameters())]
    before = hidden(adapted)
    with merged_adapters(adapted, LEAST_TOKENS) as done:
        assert done
        merged = hidden(adapted)
        assert [name for name, _ in tree_flatten(adapted.net.trainable_parameters())] == names
        with adapted.adapters_disabled():
            base = hidden(adapted)
    with adapted.adapters_disabled():
        assert mx.array_equal(base, hidden(adapted))
    assert not mx.array_equal(merged, before)  # it was another path
    assert mx.allclose(merged, before, rtol=1e-4, atol=1e-4) and not mx.allclose(merged, base, atol=1e-2)
    assert mx.array_equal(hidden(adapted), before)


def test_sampling_merges_and_its_logprobs_are_the_scorers(adapted, monkeypatch):
    seen = []

    class Spy:
        def __init__(self, model, tokens):
            self.inner = merged_adapters(model, tokens)

        def __enter__(self):
            seen.append(self.inner.__enter__())

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

    def drawn():
        options = dict(num_samples=8, max_tokens=24, key=mx.random.key(0))
        return sample(adapted, prompts(adapted), **options, stop_ids=())

    monkeypatch.setattr(sampler, "merged_adapters", Spy)
    groups = drawn()
    assert seen == [True]
    scored = split(*score(adapted, list(zip(prompts(adapted), [[c.ids for c in g] for g in groups], strict=True))))
    drift = max(np.abs(c.logprobs - s).max() for c, s in zip([c for g in groups for c in g], scored, strict=True))
    assert drift < 1e-4
    monkeypatch.setattr(sampler, "merged_adapters", lambda model, tokens: merged_adapters(model, 0))
    for one, other in zip(groups, drawn(), strict=True):
        assert [c.ids.tolist() for c in one] == [c.ids.tolist() for c in other]


@pytest.mark.parametrize("case", ["few tokens", "16 bits", "dora", "dropout", "quantized", "switched off"])
def test_where_it_would_not_pay_or_not_be_the_same(case, qwen_folder):
    model = load_model(qwen_folder, dtype="bfloat16" if case == "16 bits" else None)
    with_lora(model, kind="dora" if case == "dora" else "lora", dropout=0.5 if case == "dropout" else 0.0)
    if case == "quantized":
        for module in model.net.modules():
            if "lora_a" in module:
                module.linear = nn.QuantizedLinear.from_linear(module.linear, group_size=32)
    if case == "dropout":
        model.net.train()
    if case == "switched off":
        with model.adapters_disabled(), merged_adapters(model, 10**6) as done:
            assert not done
        return
    with merged_adapters(model, LEAST_TOKENS - 1 if case == "few tokens" else 10**6) as done:
        assert not done


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("base", ["float32", "bfloat16", "affine", "mxfp4"])
def test_what_is_not_merged_is_held_and_the_same_function(kind, base, qwen_folder):
    model = load_model(qwen_folder, dtype="bfloat16" if base == "bfloat16" else None)
    with_lora(model, kind=kind)
    if base in ("affine", "mxfp4"):
        for module in model.net.modules():
            if "lora_a" in module:
                module.linear = nn.QuantizedLinear.from_linear(module.linear, group_size=32, bits=4, mode=base)
    before = hidden(model)
    names = [name for name, _ in tree_flatten(model.net.parameters())]
    with merged_adapters(model, LEAST_TOKENS - 1) as done:
        layers = [m for m in model.net.modules() if "lora_a" in m]
        assert not done and layers and all(m.held for m in layers)
        held = hidden(model)
        assert [name for name, _ in tree_flatten(model.net.parameters())] == names
        with model.adapters_disabled():
            off = hidden(model)
    assert held.dtype == before.dtype
    close = 0.03 if base == "bfloat16" else 1e-5
    assert mx.abs(held - before).max() < close * mx.abs(before).max()
    assert mx.abs(off - before).max() > 0.1 * mx.abs(before).max()
    assert mx.array_equal(hidden(model), before) and not any(m.held for m in layers)


def test_what_is_held_drops_nothing_and_gives_no_gradient(qwen_folder):
    model = with_lora(load_model(qwen_folder), dropout=0.5)
    model.net.train()
    with merged_adapters(model, 1):
        assert not any(m.held for m in model.net.modules() if "lora_a" in m)  # their masks are drawn
    model.net.eval()
    with merged_adapters(model, 1):
        gradients = nn.value_and_grad(model.net, lambda: hidden(model).sum())()[1]
    assert all(mx.abs(g).max() == 0 for _, g in tree_flatten(gradients))


def test_an_error_within_unmerges(adapted):
    with pytest.raises(KeyError), merged_adapters(adapted, LEAST_TOKENS):
        raise KeyError
    with merged_adapters(adapted, LEAST_TOKENS) as done:
        assert done
