"""Every family behind the one interface, against its own module's whole forward."""

import types

import mlx.core as mx
import mlx.nn as nn
import mlx_vlm
import numpy as np
import pytest
from family_checkpoints import write_llava, write_qwen2_vl, write_qwen3_vl, write_smolvlm, write_text
from mlx.utils import tree_flatten, tree_map
from PIL import Image

from mpi_mlx.errors import ModelError
from mpi_mlx.models import load_model
from mpi_mlx.models.adapters import save_adapter
from mpi_mlx.models.full import train_all_weights
from mpi_mlx.models.gradient_checkpointing import enable_gradient_checkpointing
from mpi_mlx.models.kv import recording_caches
from mpi_mlx.models.lora import attach_lora
from mpi_mlx.training import score as score_module
from mpi_mlx.training.rows import forward_rows
from mpi_mlx.training.score import score, score_plain, split
from mpi_mlx.training.tree import forward_tree

VISION = {
    "qwen2_vl": write_qwen2_vl,
    "qwen3_vl": write_qwen3_vl,
    "smolvlm": write_smolvlm,
    "llava": write_llava,
    "idefics3": lambda folder: write_smolvlm(folder, "idefics3"),
    "llava-full": lambda folder: write_llava(folder, "full"),
}
TEXT = ["llama", "qwen2", "qwen3", "gemma3_text"]


def spec(**changes):
    return types.SimpleNamespace(
        **{"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear", "kind": "lora", "projector": False}
        | changes
    )


def picture(width=112, height=84, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def user(text, *images):
    return {
        "role": "user",
        "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}],
    }


def positions(model, encoded):
    return encoded.position_ids[:, None] if model.uses_mrope else encoded.position_ids


def logits(model, encoded, cache=None):
    features = mx.concatenate(model.features(encoded.images)) if encoded.images else None
    return model.head(
        model.hidden(model.embed(encoded.ids[None], features), positions(model, encoded), cache)
    )


def own_logits(net, encoded):
    """The module's own whole forward, as mlx-vlm or mlx-lm calls it."""
    ids = mx.array(encoded.ids)[None]
    if not hasattr(net, "language_model"):
        return net(ids)
    kwargs = {}
    if encoded.images:
        pixels = np.concatenate([image.pixel_values for image in encoded.images])
        grids = [image.grid for image in encoded.images]
        if grids[0] is not None:
            kwargs = {"pixel_values": mx.array(pixels), "image_grid_thw": mx.array(grids)}
        elif encoded.images[0].extra is not None:
            kwargs = {"pixel_values": mx.array(pixels)[None]}
        else:
            kwargs = {"pixel_values": mx.array(np.stack([image.pixel_values for image in encoded.images]))}
    return net(ids, kwargs.pop("pixel_values", None), mask=None, **kwargs).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def get(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            made[name] = VISION[name](root) if name in VISION else write_text(root, name)
        return made[name]

    return get


@pytest.mark.parametrize("name", [*VISION, *TEXT])
def test_logits_equal_the_modules_own(folders, name):
    model = load_model(folders(name))
    images = (
        [picture(), picture(112, 84, 1)] if name.startswith("qwen") and model.is_multimodal else [picture()]
    )
    for messages in ([user("what is it " * 4)], [user("what is it", *images)] if model.is_multimodal else []):
        if not messages:
            continue
        encoded = model.encode(messages, generation_prompt=True)
        if hasattr(model.net, "language_model"):
            model.net.language_model._position_ids = model.net.language_model._rope_deltas = None
        own = own_logits(model.net, encoded)
        scale = mx.abs(own).max().item()
        assert mx.abs(logits(model, encoded) - own).max().item() < 1e-4 * scale
        caches = recording_caches(model.num_layers)
        assert mx.abs(logits(model, encoded, caches) - own).max().item() < 1e-4 * scale


@pytest.mark.parametrize("name", [*VISION, *TEXT])
def test_prompt_and_completion_make_the_whole(folders, name):
    model = load_model(folders(name))
    images = [picture()] if model.is_multimodal else []
    prompt = [user("a", *images), {"role": "assistant", "content": "one"}, user("b")]
    whole = model.encode([*prompt, {"role": "assistant", "content": "<think>t</think>\ntwo"}])
    joined = model.encode(prompt, generation_prompt=True).concat(
        model.encode_completion("<think>t</think>\ntwo")
    )
    assert np.array_equal(whole.ids, joined.ids) and np.array_equal(whole.position_ids, joined.position_ids)
    end = model.tokenizer.decode([model.end_of_turn_id])
    assert model.tokenizer.decode(whole.ids[whole.assistant]) == f"one{end}<think>t</think>\ntwo{end}"
    assert model.decode(model.encode_completion("<think>t</think>\ntwo")) == "<think>t</think>\ntwo"
    assert model.end_of_turn_id in model.eos_ids
    if model.is_multimodal:
        assert set(whole.ids[whole.visual]) <= model.visual_ids


@pytest.mark.parametrize("name", list(VISION))
def test_features_carry_the_image(folders, name):
    model = load_model(folders(name))
    one, two = (model.encode([user("x", picture(seed=seed))]) for seed in (0, 1))
    assert not mx.allclose(logits(model, one)[:, -1], logits(model, two)[:, -1], rtol=1e-4, atol=1e-4)
    batch = model.vision([*one.images, *two.images])
    for states, encoded in zip(batch, (one, two), strict=True):
        assert states.shape[0] == encoded.images[0].num_tokens
        assert mx.allclose(states, model.features(encoded.images)[0], atol=1e-4)


@pytest.mark.parametrize(
    "name, projector", [("qwen2_vl", True), ("qwen3_vl", False), ("smolvlm", True), ("llava", True)]
)
def test_plain_mlx_vlm_reads_the_adapter(folders, name, projector, tmp_path):
    model = load_model(folders(name))
    attach_lora(model, spec(projector=projector))
    mx.random.seed(0)
    model.net.update(
        tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.net.trainable_parameters())
    )
    encoded = model.encode([user("what", picture())], generation_prompt=True)
    ours = logits(model, encoded)
    save_adapter(model, tmp_path)
    net, _ = mlx_vlm.load(str(folders(name)), adapter_path=str(tmp_path))
    own = own_logits(net, encoded)
    assert mx.abs(ours - own).max().item() < 1e-4 * mx.abs(own).max().item()


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("targets", ["all-linear", ["model.layers.1.self_attn.q_proj"]])
def test_plain_mlx_lm_reads_the_adapter(folders, name, targets, tmp_path):
    from mlx_lm.utils import load_adapters
    from mlx_lm.utils import load_model as load_net

    model = load_model(folders(name))
    attach_lora(model, spec(targets=targets, kind="dora"))
    mx.random.seed(0)
    model.net.update(
        tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.net.trainable_parameters())
    )
    encoded = model.encode([user("what")], generation_prompt=True)
    ours = logits(model, encoded)
    save_adapter(model, tmp_path)
    net = load_adapters(load_net(folders(name))[0], str(tmp_path))
    own = net(mx.array(encoded.ids)[None])
    assert mx.abs(ours - own).max().item() < 1e-4 * mx.abs(own).max().item()
    again = load_model(folders(name), adapter=tmp_path)
    assert mx.allclose(logits(again, encoded), ours, atol=1e-5)


@pytest.mark.parametrize("name", [*VISION, *TEXT])
def test_full_fine_tuning_trains_the_language_model_alone(folders, name):
    model = load_model(folders(name))
    train_all_weights(model)
    names = {name for name, _ in tree_flatten(model.net.parameters())}
    trained = {name for name, _ in tree_flatten(model.net.trainable_parameters())}
    seeing = {n for n in names if "vision" in n or "connector" in n or "projector" in n}
    assert trained == names - seeing and bool(seeing) == (name in VISION)


def test_deepstack_gets_gradient(folders):
    model = load_model(folders("qwen3_vl"))
    model.net.vision_tower.deepstack_merger_list[0].unfreeze()
    encoded = model.encode([user("x", picture())])

    def loss():
        features = model.vision(encoded.images)[0]
        return model.hidden(model.embed(encoded.ids[None], features), positions(model, encoded)).sum()

    grads = dict(tree_flatten(nn.value_and_grad(model.net, loss)()[1]))
    assert grads and max(mx.abs(value).max().item() for value in grads.values()) > 0


def test_text_only_models_refuse_images(folders):
    model = load_model(folders("llama"))
    with pytest.raises(ModelError, match="text-only"):
        model.encode([user("x", picture())])
    with pytest.raises(ModelError, match="no projector"):
        attach_lora(model, spec(projector=True))


@pytest.mark.parametrize("family, words", [("gemma3", "both directions"), ("internvl_chat", "not supported")])
def test_families_that_cannot_be_done_right_are_refused(folders, tmp_path, family, words):
    import json
    import shutil

    folder = shutil.copytree(folders("llava"), tmp_path / family)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": family}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words):
        load_model(folder)


def test_untested_text_families_are_checked_on_loading(tmp_path):
    assert load_model(write_text(tmp_path / "smollm3", "smollm3")).num_layers == 3
    with pytest.raises(ModelError, match="'olmo2' of mlx-lm cannot be split"):
        load_model(write_text(tmp_path / "olmo2", "olmo2"))
    with pytest.raises(ModelError, match="'gemma2' of mlx-lm cannot be split"):
        load_model(
            write_text(
                tmp_path / "gemma2",
                "gemma2",
                final_logit_softcapping=30.0,
                attn_logit_softcapping=50.0,
                query_pre_attn_scalar=16,
            )
        )
    with pytest.raises(ModelError, match="'lfm2' of mlx-lm cannot be split"):  # convolution states
        load_model(
            write_text(
                tmp_path / "lfm2",
                "lfm2",
                norm_eps=1e-5,
                conv_bias=False,
                conv_L_cache=3,
                block_dim=64,
                block_ff_dim=96,
                block_multiple_of=32,
                block_ffn_dim_multiplier=1.0,
                block_auto_adjust_ff_dim=False,
                full_attn_idxs=[1],
            )
        )


def test_quantized_base_on_cpu_is_dequantized_to_the_same_numbers(folders, tmp_path):
    import json
    import shutil

    folder = shutil.copytree(folders("llama"), tmp_path / "quantized")
    model = load_model(folder)
    net = model.net
    nn.quantize(
        net,
        64,
        4,
        class_predicate=lambda name, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 64 == 0,
    )
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(net.parameters())))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization": {"group_size": 64, "bits": 4}}))
    encoded = model.encode([user("what")])
    loaded = load_model(folder)
    assert not any(isinstance(module, nn.QuantizedLinear) for module in loaded.net.modules())
    assert loaded.quantization["model.layers.0.self_attn.q_proj"]["bits"] == 4
    assert mx.allclose(logits(loaded, encoded), net(mx.array(encoded.ids)[None]), atol=1e-3)
    again = load_model(folders("llama"), quantize=4)
    assert mx.allclose(logits(again, encoded), logits(loaded, encoded), atol=1e-4)
    with pytest.raises(ModelError, match="4 bits already"):
        load_model(folder, quantize=8)


@pytest.mark.parametrize("name", [*VISION, *TEXT])
@pytest.mark.parametrize("forward", [forward_rows, forward_tree])
def test_gradients_are_the_same_with_checkpointing(folders, name, forward):
    """Of completions that continue their prompt's keys and values: the second forward begins where the first did."""
    model = load_model(folders(name))
    attach_lora(model, spec())
    mx.random.seed(0)
    model.net.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.net.trainable_parameters()))
    images = [picture()] if model.is_multimodal else []
    prompt = model.encode([user("what is it " * 4, *images)], generation_prompt=True)
    completions = [np.arange(5, 5 + n, dtype=np.int32) for n in (6, 9)]
    completions[1][0] = 17  # nothing in common

    def gradients():
        def loss():
            return (forward(model, [(prompt, completions)]).hidden ** 2).sum()

        return dict(tree_flatten(nn.value_and_grad(model.net, loss)()[1]))

    plain = gradients()
    enable_gradient_checkpointing(model)
    for key, value in gradients().items():
        assert mx.abs(value - plain[key]).max().item() <= 1e-4 * mx.abs(plain[key]).max().item() + 1e-7, key


@pytest.mark.parametrize("name", [*VISION, *TEXT])
@pytest.mark.parametrize("spared", [-1, 1])
def test_scores_of_rows_and_trees_are_the_plain_forward_s(folders, name, spared, monkeypatch):
    """Positions count from the prompt's last, and a sliding window from the token."""
    model = load_model(folders(name))
    monkeypatch.setattr(score_module, "trees_spare", lambda groups, layers: [spared] * len(groups))
    images = [picture()] if model.is_multimodal else []
    prompts = [model.encode([user(text, *images)], generation_prompt=True) for text in ("what is it " * 9, "who")]
    completions = [np.array(c, np.int32) for c in ([5, 6, 7, 8, 9], [5, 6, 10], [5, 6], [11, 6, 7, 8], [5, 6, 7, 12])]
    found = split(*score(model, [(prompts[0], completions), (prompts[1], completions[:2])]))
    rows = [(prompts[0], c) for c in completions] + [(prompts[1], c) for c in completions[:2]]
    for ours, (prompt, completion) in zip(found, rows, strict=True):
        np.testing.assert_allclose(ours, np.array(score_plain(model, prompt, completion)), rtol=1e-4, atol=1e-4)
