"""The stage that makes the embedded model, at a small size: its tokenizer and processor, other weights."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

import mpi_mlx.assets
from mpi_mlx.data.pretraining import draw_step
from mpi_mlx.data.render_flat import render_flat_array
from mpi_mlx.data.scenes import ATTRIBUTES
from mpi_mlx.models import load_model
from mpi_mlx.recipe import PretrainStage, load_recipe
from mpi_mlx.stages.pretrain import patches, pretrain_stage, zero_residual_outputs
from mpi_mlx.training.run import train

TINY = Path(mpi_mlx.assets.__file__).parent / "tiny"
SPEC = PretrainStage(
    stage="pretrain", steps=1, batch_size=12, tasks=dict(document=0.5, check=0.25, describe=0.25),
    depths={1: 1.0},
    scenes_per_document=3, documents_per_micro=2, rows_per_micro=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    for file in TINY.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
    config = json.loads((TINY / "config.json").read_text())
    config.update(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=1)  # fmt: skip
    config["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    config["vision_config"].update(depth=2, hidden_size=32, intermediate_size=48, num_heads=2,
                                   out_hidden_size=32,
                                   fullatt_block_indexes=[1])  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture()
def model(folder):
    return load_model(folder, init="random")


def scenes(count=3):
    return [t.scene for t in draw_step(0, 0, rows=count, shares={"describe": 1.0}, depths={1: 1.0}).tasks]


def test_patches_equal_the_image_processors(model):
    pictures = np.stack([render_flat_array(s, 84) for s in scenes()])
    expected = np.stack([model.image(Image.fromarray(p)).pixel_values for p in pictures])
    np.testing.assert_allclose(patches(pictures), expected, atol=1e-6)


def test_layers_begin_as_the_identity(model):
    zero_residual_outputs(model.net)
    embeds = mx.random.normal((1, 5, model.hidden_size))
    positions = mx.broadcast_to(mx.arange(5), (3, 1, 5))
    norm = model.net.language_model.model.norm
    np.testing.assert_allclose(np.array(model.hidden(embeds, positions)), np.array(norm(embeds)), atol=1e-6)


def test_loss_is_the_mean_over_trained_tokens_and_cells(model):
    wrapped, source, objective = pretrain_stage(model, SPEC, seed=4)
    batch = source.batch(0)
    assert len(batch.micros) == 1 + 2  # two documents of three rows; six rows without, four at most at once
    micro = batch.micros[0][0]
    assert micro.prefix is not None and micro.owner.tolist() == [0, 0, 0, 1, 1, 1]
    total = sum(objective(m)[0].item() for m in batch.micros)
    drawn = draw_step(4, 0, rows=12, shares=dict(SPEC.tasks), depths={1: 1.0}, scenes_per_document=3)
    expected, count = 0.0, 0
    for n, task in enumerate(drawn.tasks):
        row = source._row(drawn, n)
        e = row.encoded
        pixels = patches(render_flat_array(task.scene, 84)[None])
        features = model.parts.project(model.parts.tower(pixels, (1, 6, 6))).reshape(-1, model.hidden_size)
        logits = model.head(
            model.hidden(model.embed(e.ids[None], features), mx.array(e.position_ids[:, None]))
        )[0]
        logits = np.array(logits, np.float64)
        trained = np.flatnonzero(row.weights)
        shifted = logits[trained - 1] - np.log(np.exp(logits[trained - 1]).sum(-1, keepdims=True))
        expected -= shifted[np.arange(len(trained)), e.ids[trained]].sum()
        count += len(trained)
        said = model.tokenizer.decode(e.ids[trained])
        if task.kind == "check":  # the verdicts, perhaps the description; nothing of the questions
            assert "?" not in said and "done" not in said
        else:
            assert said == task.answer + "<|im_end|>"
    assert batch.count == count
    assert total == pytest.approx(expected, rel=1e-5)


def test_perception_is_added_a_micro_batch_at_a_time(model):
    spec = SPEC.model_copy(update={"perception_loss": 0.5})
    wrapped, source, objective = pretrain_stage(model, spec, seed=4)
    plain = pretrain_stage(model, SPEC, seed=4)[2]
    item = source.batch(0).micros[0]
    with_, metrics = objective(item)
    without, _ = plain(item)
    features = model.parts.project(model.parts.tower(item[1], (1, 6, 6)))
    logits = np.array(wrapped.perception(features), np.float64)
    labels, mean, at = item[2], 0.0, 0
    for k, size in enumerate((2, *(len(v) for v in ATTRIBUTES.values()))):
        part = logits[..., at : at + size]
        at += size
        logprobs = part - np.log(np.exp(part).sum(-1, keepdims=True))
        picked = np.take_along_axis(logprobs, np.maximum(labels[..., k], 0)[..., None].astype(int), -1)[
            ..., 0
        ]
        mean -= (picked * ((labels[..., 0] == 1) | (k == 0))).mean()
    assert with_.item() - without.item() == pytest.approx(0.5 * mean * item[0].count, rel=1e-3)
    assert metrics["cells_right"][1].item() == labels.shape[0] * 9


def test_what_is_trained(model):
    def names(**changes):
        wrapped = pretrain_stage(model, SPEC.model_copy(update=changes), 0)[0]
        return [name for name, _ in tree_flatten(wrapped.trainable_parameters())]

    assert {n.split(".")[0] for n in names()} == {"net", "perception"}
    assert any("vision_tower" in n for n in names()) and any("language_model" in n for n in names())
    frozen = names(train_vision=False)
    assert not any("vision_tower" in n for n in frozen) and any("language_model" in n for n in frozen)


def test_the_shipped_schedule_gives_the_same_bytes_twice(folder, tmp_path):
    written = []
    for name in ("one", "two"):
        small = [f"stages.{i}.{key}={value}" for i in (0, 1) for key, value in (("steps", 2), ("batch_size", 10))]
        recipe = load_recipe(
            "tiny_base", [f"model.base={folder}", "processes=1", *small], output=str(tmp_path / name)
        )
        list(train(recipe))
        written.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert written[0] == written[1] and len(written[0]) > 10_000
