"""A run's limit on images' pixels goes with what is made of it: a picture is as many visual tokens everywhere."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))

from checkpoints import write_qwen2_5_vl  # noqa: E402
from family_checkpoints import write_qwen2_vl, write_qwen3_vl, write_smolvlm, write_text  # noqa: E402

from mpi_mlx.convert.fuse import fuse  # noqa: E402
from mpi_mlx.convert.peft import from_peft, to_peft  # noqa: E402
from mpi_mlx.errors import ModelError  # noqa: E402
from mpi_mlx.models import load_model  # noqa: E402
from mpi_mlx.models.adapters import save_adapter  # noqa: E402
from mpi_mlx.models.lora import attach_lora  # noqa: E402
from mpi_mlx.models.pixels import UNSTATED, stated_limit, write_limit  # noqa: E402
from mpi_mlx.recipe import LoraSpec, load_recipe  # noqa: E402
from mpi_mlx.serving.target import resolve_target  # noqa: E402

LIMIT = 50176  # 224 x 224
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (448, 672, 3), dtype=np.uint8))
MAKE = {"qwen2_5_vl": write_qwen2_5_vl, "qwen2_vl": write_qwen2_vl, "qwen3_vl": write_qwen3_vl}
WIDE = {"shortest_edge": 3136, "longest_edge": 12845056}


def make_run(folder, base, max_pixels=LIMIT):
    """What `mpi-mlx train` leaves behind, of an untrained adapter."""
    model = load_model(base, max_pixels=max_pixels)
    attach_lora(model, LoraSpec(rank=2, alpha=4, targets=["q_proj", "v_proj"]))
    save_adapter(model, folder / "adapter")
    (folder / "recipe.yaml").write_text(
        f"model: {{base: {base}, max_pixels: {max_pixels or 'null'}}}\n"
        "data: {benchmark: clevr_policy, depth: 1, train: 2, validation: 0, test: 0}\n"
        "stages: [{stage: sft, steps: 1}]\n"
    )
    (folder / "recipe.yaml").write_text(load_recipe(folder / "recipe.yaml").to_yaml())
    (folder / "environment.json").write_text("{}")
    return model


def rewrite(folder, form):
    """The base's image settings as checkpoints have them: old, new, with both, and as transformers 5 saves them."""
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    if form in ("size", "nested"):
        del settings["min_pixels"], settings["max_pixels"]
    if form != "max_pixels":
        settings["size"] = WIDE
    path.write_text(json.dumps(settings))
    if form == "nested":
        path.unlink()
        nested = {"image_processor": settings, "processor_class": settings["processor_class"]}
        (folder / "processor_config.json").write_text(json.dumps(nested))


def tokens(model):
    return model.image(PICTURE).num_tokens


def theirs(processor):
    grid = np.array(processor([PICTURE], return_tensors="np")["image_grid_thw"])[0]
    return int(grid.prod()) // processor.merge_size**2


def test_the_fused_folder_sees_what_the_run_saw(tmp_path):
    write_qwen2_5_vl(tmp_path / "base")
    seen = tokens(make_run(tmp_path / "run", tmp_path / "base"))
    assert seen < tokens(load_model(tmp_path / "base")) == 384  # 448 / 28 * 672 / 28
    report = fuse(tmp_path / "run", tmp_path / "fused", check=False)
    assert "an image is cut down to 50,176 pixels (max_pixels), as in training" in report.notes
    assert "| Images | at most 50,176 pixels each (`max_pixels`)" in (tmp_path / "fused" / "README.md").read_text()
    assert tokens(load_model(tmp_path / "fused")) == tokens(resolve_target(tmp_path / "fused").load()) == seen
    base, fused = (json.loads((tmp_path / f / "preprocessor_config.json").read_text()) for f in ("base", "fused"))
    assert fused == base | {"max_pixels": LIMIT}


@pytest.mark.parametrize("form", ["max_pixels", "size", "both", "nested"])
@pytest.mark.parametrize("family", MAKE)
def test_mlx_vlm_and_transformers_read_the_limit(tmp_path, family, form):
    base, fused = tmp_path / "base", tmp_path / "fused"
    MAKE[family](base)
    rewrite(base, form)
    assert stated_limit(base) == WIDE["longest_edge"]
    seen = tokens(make_run(tmp_path / "run", base))
    fuse(tmp_path / "run", fused, check=False)
    assert stated_limit(fused) == LIMIT
    in_mlx = AutoProcessor.from_pretrained(str(fused), local_files_only=True)  # mlx-vlm has taken it over
    assert type(in_mlx).__module__.startswith("mlx_vlm.")
    in_transformers = AutoImageProcessor.from_pretrained(str(fused), local_files_only=True)
    assert type(in_transformers).__module__.startswith("transformers.")
    assert theirs(in_mlx.image_processor) == theirs(in_transformers) == tokens(load_model(fused)) == seen
    assert theirs(AutoImageProcessor.from_pretrained(str(base), local_files_only=True)) > seen


def test_a_copied_adapter_brings_its_limit(tmp_path):
    write_qwen2_5_vl(tmp_path / "base")
    seen = tokens(make_run(tmp_path / "run", tmp_path / "base"))
    copied = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "run" / "adapter", copied)
    target = resolve_target(copied)
    assert target.options == {"max_pixels": LIMIT} and tokens(target.load()) == seen
    assert tokens(load_model(tmp_path / "base", adapter=copied)) == seen
    # what is asked for counts: 448 x 672 becomes 45 x 68 of 56 x 56 pixels, 1 x 2 tokens of 28 x 28
    assert tokens(load_model(tmp_path / "base", adapter=copied, max_pixels=56 * 56)) == 2
    fuse(copied, tmp_path / "fused", check=False)
    assert tokens(load_model(tmp_path / "fused")) == seen


def test_a_run_whose_adapter_does_not_say_so_has_its_recipe(tmp_path):
    write_qwen2_5_vl(tmp_path / "base")
    seen = tokens(make_run(tmp_path / "run", tmp_path / "base"))
    path = tmp_path / "run" / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["mpi_mlx"]["max_pixels"]
    path.write_text(json.dumps(config))
    fuse(tmp_path / "run", tmp_path / "fused", check=False)
    assert tokens(load_model(tmp_path / "fused")) == seen


def test_peft_is_told_and_the_way_back_knows(tmp_path):
    write_qwen2_5_vl(tmp_path / "base")
    seen = tokens(make_run(tmp_path / "run", tmp_path / "base"))
    report = to_peft(tmp_path / "run", tmp_path / "peft", base=tmp_path / "base", check=False)
    assert any("load the base's processor with max_pixels=50176" in note for note in report.notes)
    card = (tmp_path / "peft" / "README.md").read_text()
    assert "library_name: peft" in card and "at most 50,176 pixels" in card and "| Stages | sft |" in card
    as_told = AutoImageProcessor.from_pretrained(str(tmp_path / "base"), local_files_only=True, max_pixels=50176)
    assert theirs(as_told) == seen
    from_peft(tmp_path / "peft", tmp_path / "back", base=tmp_path / "base", check=False)
    assert tokens(resolve_target(tmp_path / "back").load()) == seen


def test_the_bases_own_limit_is_not_worth_a_word(tmp_path):
    write_qwen2_5_vl(tmp_path / "base")
    make_run(tmp_path / "run", tmp_path / "base", max_pixels=None)
    report = fuse(tmp_path / "run", tmp_path / "fused", check=False)
    told = to_peft(tmp_path / "run", tmp_path / "peft", base=tmp_path / "base", check=False)
    assert not any("pixels" in note for note in report.notes + told.notes)
    cards = [(tmp_path / folder / "README.md").read_text() for folder in ("fused", "peft")]
    assert not any("pixels" in card for card in cards)
    files = [(tmp_path / folder / "preprocessor_config.json").read_bytes() for folder in ("base", "fused")]
    assert files[0] == files[1]


def test_families_without_the_setting(tmp_path):
    """Nothing is written; the report says it where there are images."""
    write_smolvlm(tmp_path / "smolvlm")
    model = load_model(tmp_path / "smolvlm")
    attach_lora(model, LoraSpec(rank=2, alpha=4, targets=["q_proj"]))
    save_adapter(model, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    config = json.loads(path.read_text())
    assert "max_pixels" not in config["mpi_mlx"]
    config["mpi_mlx"]["max_pixels"] = LIMIT
    path.write_text(json.dumps(config))
    report = fuse(tmp_path / "a", tmp_path / "fused", check=False)
    assert any("the processor of smolvlm has no such setting" in note for note in report.notes)
    names = ("preprocessor_config.json", "processor_config.json")
    assert all((tmp_path / "smolvlm" / n).read_bytes() == (tmp_path / "fused" / n).read_bytes() for n in names)

    write_text(tmp_path / "llama", "llama")
    make_run(tmp_path / "run", tmp_path / "llama")
    report = fuse(tmp_path / "run", tmp_path / "text", check=False)
    assert not any("pixels" in note for note in report.notes)
    assert resolve_target(tmp_path / "run" / "adapter").load().has_adapters


def test_files_that_say_nothing_or_nonsense(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    assert stated_limit(tmp_path) == UNSTATED and not write_limit(tmp_path, LIMIT)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    for content, words in (("{", "is broken"), ("[]", "holds no object")):
        (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(ModelError, match=f"preprocessor_config.json {words}"):
            write_limit(tmp_path, LIMIT)
