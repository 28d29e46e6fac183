"""LoRA: scales, targets, the switch, and adapters that plain mlx-vlm reads."""

import json
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import mlx_vlm
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from PIL import Image

from mpi_mlx.errors import ModelError
from mpi_mlx.models import load_model
from mpi_mlx.models.adapters import adapter_tensors, load_adapter, save_adapter
from mpi_mlx.models.lora import attach_lora, lora_scale, resolve_targets, trainable_parameters
from mpi_mlx.models.lora_layers import DoRALinear, LoRALinear


def spec(**changes):
    return SimpleNamespace(
        **{"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear", "kind": "lora", "projector": False}
        | changes
    )


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (84, 84, 3), dtype=np.uint8))


def conversation(seed=0):
    return [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(seed)}, {"type": "text", "text": "how?"}],
        }
    ]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_in_16_bits_the_update_is_16_bits_and_its_gradient_float32(kind):
    """No float32 copy of the input; within a rounding or two of what float32 gives."""
    linear = nn.Linear(64, 96)
    linear.update(tree_map(lambda p: p.astype(mx.bfloat16), linear.parameters()))
    layer = {"lora": LoRALinear, "dora": DoRALinear}[kind]
    layer = layer(linear, 4, 2.0, 0.0, mx.random.key(0), SimpleNamespace(enabled=True))
    layer.linear.freeze()
    layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(1))
    x = mx.random.normal((8, 64), key=mx.random.key(2)).astype(mx.bfloat16)

    def loss(x):
        y = layer(x)
        assert y.dtype == x.dtype
        return (y.astype(mx.float32) ** 2).sum()

    def gradients(x):
        return dict(tree_flatten(nn.value_and_grad(layer, loss)(x)[1]))

    rounded = gradients(x)
    linear.update(tree_map(lambda p: p.astype(mx.float32), linear.parameters()))
    exact = gradients(x.astype(mx.float32))
    for name in ("lora_a", "lora_b"):
        assert rounded[name].dtype == mx.float32
        off = mx.linalg.norm(rounded[name] - exact[name]) / mx.linalg.norm(exact[name])
        assert 0 < off.item() < 0.02


def logits(model, encoded):
    features = mx.concatenate(model.features(encoded.images))
    return model.head(model.hidden(model.embed(encoded.ids[None], features), encoded.position_ids[:, None]))


def train_a_bit(model, seed=1):
    """Random adapters, B included."""
    mx.random.seed(seed)
    model.net.update(
        tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.net.trainable_parameters())
    )


def test_scale_is_alpha_over_rank():
    assert lora_scale(16, 32) == 2.0
    assert lora_scale(16, 32, "rslora") == 8.0


def test_fresh_adapters_change_nothing_and_the_key_fixes_them(qwen_folder):
    one, two, other = (load_model(qwen_folder) for _ in range(3))
    encoded = one.encode(conversation())
    before = logits(one, encoded)
    state = mx.array(mx.random.state[0])
    for model, seed in ((one, 5), (two, 5), (other, 6)):
        attach_lora(model, spec(), mx.random.key(seed))
    assert mx.array_equal(state, mx.random.state[0])
    assert mx.allclose(before, logits(one, encoded), atol=1e-6)
    a, b, c = (adapter_tensors(model) for model in (one, two, other))
    assert all(mx.array_equal(a[name], b[name]) for name in a)
    assert not any(mx.array_equal(a[name], c[name]) for name in a if name.endswith("lora_a"))


def test_only_adapters_are_trainable(qwen):
    names = attach_lora(qwen, spec())
    assert len(names) == 3 * 7
    assert set(trainable_parameters(qwen)) == {
        f"{name}.{part}" for name in names for part in ("lora_a", "lora_b")
    }


@pytest.mark.parametrize(
    "targets, count",
    [
        (["q_proj"], 3),
        (["q_proj", "self_attn.v_proj"], 6),
        (["language_model.model.layers.1.mlp.up_proj"], 1),
    ],
)
def test_targets(qwen, targets, count):
    assert len(resolve_targets(qwen, targets)) == count


def test_unmatched_target_lists_what_exists(qwen):
    with pytest.raises(ModelError, match="'q_porj'.*did you mean 'q_proj'.*down_proj"):
        attach_lora(qwen, spec(targets=["q_porj"]))
    with pytest.raises(ModelError, match="vision tower, which stays frozen"):
        attach_lora(qwen, spec(targets=["vision_tower.blocks.0.attn.qkv"]))


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_plain_mlx_vlm_reads_the_adapter(qwen, qwen_folder, tmp_path, kind):
    attach_lora(qwen, spec(kind=kind, projector=True))
    train_a_bit(qwen)
    encoded = qwen.encode(conversation())
    ours = logits(qwen, encoded)
    save_adapter(qwen, tmp_path)
    net, _ = mlx_vlm.load(str(qwen_folder), adapter_path=str(tmp_path))
    image = encoded.images[0]
    own = net(
        mx.array(encoded.ids)[None],
        pixel_values=mx.array(image.pixel_values),
        image_grid_thw=mx.array([image.grid]),
    ).logits
    assert mx.abs(ours - own).max().item() < 1e-5 * mx.abs(own).max().item()
    again = load_model(qwen_folder, adapter=tmp_path)
    assert mx.allclose(ours, logits(again, encoded), atol=1e-6)
    assert again.lora_spec.alpha == 8 and again.lora_spec.kind == kind and again.projector_trained


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_gradients_equal_mlx_vlms_layers(kind):
    from mlx_vlm.trainer.peft import DoRALinear, LoRALinear

    from mpi_mlx.models import lora_layers

    linear = nn.Linear(32, 48)
    linear.freeze()
    mine = getattr(lora_layers, "DoRALinear" if kind == "dora" else "LoRALinear")(
        linear, 4, 2.0, 0.0, mx.random.key(0), SimpleNamespace(enabled=True)
    )
    own = (DoRALinear if kind == "dora" else LoRALinear).from_base(linear, r=4, dropout=0.0, scale=2.0)
    mine.lora_b = mx.random.normal((4, 48), key=mx.random.key(1))
    own.lora_a, own.lora_b = mine.lora_a, mine.lora_b
    x = mx.random.normal((5, 32), key=mx.random.key(2))
    weight = mx.random.normal((48,), key=mx.random.key(3))
    results = [
        nn.value_and_grad(layer, lambda layer=layer: (layer(x) * weight).sum())() for layer in (mine, own)
    ]
    assert mx.allclose(results[0][0], results[1][0], rtol=1e-4)
    a, b = (dict(tree_flatten(result[1])) for result in results)
    assert a.keys() == b.keys()
    for name in a:
        assert mx.abs(a[name] - b[name]).max().item() < 1e-3, name


def test_switched_off_is_the_base(qwen):
    encoded = qwen.encode(conversation())
    base = logits(qwen, encoded)
    attach_lora(qwen, spec(kind="dora"))
    train_a_bit(qwen)
    assert not mx.allclose(base, logits(qwen, encoded), atol=1e-2)
    with qwen.adapters_disabled():
        assert mx.array_equal(base, logits(qwen, encoded))
        with qwen.adapters_disabled():
            pass
        assert mx.array_equal(base, logits(qwen, encoded))
    assert not mx.allclose(base, logits(qwen, encoded), atol=1e-2)


def test_projector_adapter_gets_gradient(qwen):
    attach_lora(qwen, spec(targets=["q_proj"], projector=True))
    encoded = qwen.encode(conversation())
    features = mx.concatenate(qwen.features(encoded.images))

    def loss():
        return qwen.hidden(qwen.embed(encoded.ids[None], features), encoded.position_ids[:, None]).sum()

    grads = dict(tree_flatten(nn.value_and_grad(qwen.net, loss)()[1]))
    assert mx.abs(grads["vision_tower.merger.mlp.2.lora_b"]).max().item() > 0


def test_a_bad_adapter_names_every_tensor_and_leaves_the_base(qwen, qwen_folder, tmp_path):
    attach_lora(qwen, spec(targets=["q_proj"]))
    save_adapter(qwen, tmp_path)
    weights = dict(mx.load(str(tmp_path / "adapters.safetensors")))
    layer = "language_model.model.layers.{}.self_attn.q_proj.lora_a"
    del weights[layer.format(0)]
    weights[layer.format(1)] = mx.zeros((64, 3))
    weights["stray"] = mx.zeros((1,))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    model = load_model(qwen_folder)
    with pytest.raises(ModelError) as error:
        load_adapter(model, tmp_path)
    for words in (
        layer.format(0) + " is missing (wanted [64, 4])",
        "stray [1] is unexpected",
        layer.format(1) + " is [64, 3], wanted [64, 4]",
    ):
        assert words in str(error.value)
    assert "\n" not in str(error.value) and not model.has_adapters and not adapter_tensors(model)


def test_foreign_and_broken_adapter_folders(qwen, tmp_path):
    with pytest.raises(ModelError, match="adapter_config.json is missing"):
        load_adapter(qwen, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    (tmp_path / "adapters.safetensors").write_bytes(b"12")
    with pytest.raises(ModelError, match="truncated"):
        load_adapter(qwen, tmp_path)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"a": mx.zeros(1)})
    with pytest.raises(ModelError, match="lora_parameters"):
        load_adapter(qwen, tmp_path)


def test_quantized_base_is_recorded(qwen_folder, tmp_path):
    model = load_model(qwen_folder, quantize=4)
    attach_lora(model, spec())
    train_a_bit(model)
    save_adapter(model, tmp_path)
    encoded = model.encode(conversation())
    ours = logits(model, encoded)
    net, _ = mlx_vlm.load(str(qwen_folder), adapter_path=str(tmp_path))
    image = encoded.images[0]
    own = net(
        mx.array(encoded.ids)[None],
        pixel_values=mx.array(image.pixel_values),
        image_grid_thw=mx.array([image.grid]),
    ).logits
    assert isinstance(net.language_model.model.layers[0].mlp.up_proj.linear, nn.QuantizedLinear)
    assert mx.abs(ours - own).max().item() < 1e-4 * mx.abs(own).max().item()
    with pytest.raises(ModelError, match="4, 8"):
        load_model(qwen_folder, quantize=3)
