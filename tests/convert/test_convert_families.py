import numpy as np
import pytest

from mpi_mlx.convert import families as fam
from mpi_mlx.errors import ConversionError

# (family, disk, memory, tree), worked by hand from the three libraries' module trees
NAMES = [
    ("qwen2_5_vl", "model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj",
     "language_model.model.layers.0.mlp.up_proj"),
    ("qwen2_vl", "visual.blocks.1.attn.qkv", "model.visual.blocks.1.attn.qkv",
     "vision_tower.blocks.1.attn.qkv"),
    ("qwen2_5_vl", "lm_head.weight", "lm_head.weight", "language_model.lm_head.weight"),
    ("qwen3_vl", "model.language_model.norm.weight", "model.language_model.norm.weight",
     "language_model.model.norm.weight"),
    ("smolvlm", "model.text_model.layers.1.self_attn.q_proj", "model.text_model.layers.1.self_attn.q_proj",
     "language_model.layers.1.self_attn.q_proj"),
    ("idefics3", "model.connector.modality_projection.proj", "model.connector.modality_projection.proj",
     "connector.modality_projection.proj"),
    ("llava", "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
     "model.vision_tower.encoder.layers.0.mlp.fc1",
     "vision_tower.vision_model.encoder.layers.0.mlp.fc1"),
    ("llava_onevision", "image_newline", "model.image_newline", "image_newline"),
    ("internvl", "vision_tower.encoder.layer.0.mlp.fc1", "model.vision_tower.encoder.layer.0.mlp.fc1",
     "vision_tower.encoder.layer.0.mlp.fc1"),
    ("gemma3", "language_model.lm_head.weight", "lm_head.weight", "language_model.lm_head.weight"),
    ("paligemma", "multi_modal_projector.linear.bias", "model.multi_modal_projector.linear.bias",
     "multi_modal_projector.linear.bias"),
    ("llama", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
]  # fmt: skip


@pytest.mark.parametrize("family, disk, memory, tree", NAMES)
def test_names_go_round(family, disk, memory, tree):
    row = fam.FAMILIES[family]
    assert fam.memory_name(row, disk) == memory
    assert fam.tree_name(row, disk) == tree
    for name in (disk, memory, tree):
        assert fam.disk_name(row, name) == disk


def test_older_spellings():
    llava, intern, llama = fam.FAMILIES["llava"], fam.FAMILIES["internvl"], fam.FAMILIES["llama"]
    tower = "vision_tower.vision_model.post_layernorm.bias"
    for name in ("vision_tower.post_layernorm.bias", "model.vision_tower.vision_model.post_layernorm.bias"):
        assert fam.disk_name(llava, name) == tower
    assert (
        fam.disk_name(intern, "language_model.model.model.norm.weight") == "language_model.model.norm.weight"
    )
    assert fam.disk_name(llama, "language_model.model.norm.weight") == "model.norm.weight"
    assert fam.disk_name(llama, "transformer.h.0") is None


def test_an_unknown_family_lists_the_known_ones():
    with pytest.raises(ConversionError, match="no layout table for model_type 'florence2'.*qwen2_5_vl"):
        fam.family_of({"model_type": "florence2"})


def test_axis_order_is_read_off_the_channels():
    row = fam.FAMILIES["qwen2_5_vl"]
    config = {"vision_config": {"in_channels": 3, "patch_size": 14}}
    name = "visual.patch_embed.proj.weight"
    assert not fam.in_tree_order(config, {name: (8, 3, 2, 14, 14)}, row, "mlx")
    assert fam.in_tree_order(config, {name: (8, 2, 14, 14, 3)}, row, "pt")
    # a patch as wide as there are channels: the files' own word decides
    assert fam.in_tree_order(config, {name: (8, 3, 2, 3, 3)}, row, "mlx")
    assert not fam.in_tree_order(config, {name: (8, 3, 2, 3, 3)}, row, "pt")
    with pytest.raises(ConversionError, match="no axis has the 3 channels"):
        fam.in_tree_order(config, {name: (8, 4, 2, 14, 14)}, row, None)


@pytest.mark.parametrize("shape", [(5, 3, 2, 4, 4), (5, 3, 4, 4), (6, 1, 4)])
def test_transposes_undo_each_other(shape):
    data = np.arange(np.prod(shape)).reshape(shape)
    tree = data.transpose(fam.TO_TREE[len(shape)])
    assert tree.shape == fam.transposed(shape, fam.TO_TREE[len(shape)])
    assert np.array_equal(tree.transpose(fam.TO_DISK[len(shape)]), data)


def test_qwen3_5_norms():
    row = fam.FAMILIES["qwen3_5"]
    shifted = ("layers.0.input_layernorm", "layers.3.self_attn.q_norm", "norm")
    assert all(fam.is_shifted_norm(row, f"model.language_model.{n}.weight") for n in shifted)
    assert not fam.is_shifted_norm(row, "model.language_model.layers.0.linear_attn.norm.weight")
    assert not fam.is_shifted_norm(row, "model.visual.blocks.0.norm1.weight")
    assert not fam.is_shifted_norm(fam.FAMILIES["qwen3_vl"], "model.language_model.norm.weight")


def test_unshift_takes_what_the_source_rounds_to():
    source = np.array([0.1, -0.3], np.float32)
    tree = np.round((source + 1) * 4) / 4  # a rounding as coarse as quarters: 1.0 and 0.75
    tree[1] += 0.25  # trained
    back = fam.unshift(tree, source, lambda x: np.round((x + 1) * 4) / 4)
    assert back.tolist() == [np.float32(0.1), 0.0]
    assert fam.unshift(tree, None, None).tolist() == [0.0, 0.0]
