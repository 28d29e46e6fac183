"""Full fine-tuning (`lora: null`): the same loop on the language model's own weights."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mpi_mlx_cli import main as cli
from PIL import Image
from small_runs import STAGES, metrics, result_rows, write_recipe

from mpi_mlx.data.dataset import load_dataset
from mpi_mlx.evaluation.both import repeat_evaluation
from mpi_mlx.models import load_model
from mpi_mlx.models.full import save_model, train_all_weights
from mpi_mlx.recipe import load_recipe
from mpi_mlx.serving.target import resolve_target
from mpi_mlx.stages.supervised import encode_example
from mpi_mlx.training.reports import Interrupted, StepReport
from mpi_mlx.training.run import request_stop, train

RL = STAGES["rl"] | {"kl_coef": 0.0, "policy_aware_sampler": "model"}


def weights(folder):
    return mx.load(str(folder / "model" / "model.safetensors"))


@pytest.fixture(scope="module")
def recipe(base, tmp_path_factory):
    file = tmp_path_factory.mktemp("full") / "r.yaml"
    return write_recipe(file, base, ["cpt", "sft", RL], lora=None)


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("full") / "run"
    list(train(load_recipe(recipe, output=folder)))
    return folder


def test_all_of_the_language_model_is_trained_and_nothing_of_the_vision_tower(run, base):
    before, after = dict(tree_flatten(load_model(base).net.parameters())), weights(run)
    assert before.keys() == after.keys() and not (run / "adapter").exists()
    moved = {name for name in after if not mx.array_equal(before[name], after[name])}
    assert moved == {name for name in after if name.startswith("language_model.")}
    assert {p.name for p in run.glob("stages/*/*")} == {"model"}  # one for each stage


def test_loss_and_gradient_are_those_of_a_plain_forward(base, tmp_path):
    stage = STAGES["sft"] | dict(
        steps=1, batch_size=5, accumulate=1, document_fraction=0.0, clip_norm=1e9, optimizer="adamw"
    )
    file = write_recipe(tmp_path / "r.yaml", base, [stage], lora=None)
    recipe = load_recipe(file, output=tmp_path / "run")
    list(train(recipe))
    model = load_model(base)
    rows = [encode_example(model, e, None, "sft") for e in load_dataset(recipe.data, tmp_path).train]
    count = sum(row.weights.sum() for row in rows)

    def loss():
        total = 0.0
        for row in rows:
            (features,) = model.features(row.encoded.images)
            hidden = model.hidden(model.embed(row.encoded.ids[None], features), row.encoded.position_ids[:, None])
            losses = nn.losses.cross_entropy(model.head(hidden)[0, :-1], mx.array(row.encoded.ids[1:]))
            total += (losses * mx.array(row.weights[1:])).sum()
        return total / count

    model.net.language_model.unfreeze()
    value, gradients = nn.value_and_grad(model.net, loss)()
    norm = sum((g**2).sum() for _, g in tree_flatten(gradients)) ** 0.5
    (row,) = metrics(tmp_path / "run")
    assert row["loss"] == pytest.approx(value.item(), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_stopped_and_continued_is_the_same(run, recipe, tmp_path):
    for stop_at in [(0, 2), (2, 1)]:
        report, stages = None, -1
        for report in train(load_recipe(recipe, output=tmp_path / "run"), resume=stop_at[0] > 0):
            if isinstance(report, StepReport):
                stages = metrics(tmp_path / "run")[-1]["stage_index"]
                if (stages, report.step) == stop_at:
                    request_stop()
        assert isinstance(report, Interrupted)
    list(train(load_recipe(recipe, output=tmp_path / "run"), resume=True))
    assert metrics(tmp_path / "run") == metrics(run) and result_rows(tmp_path / "run") == result_rows(run)
    again, whole = weights(tmp_path / "run"), weights(run)
    assert all(mx.array_equal(again[name], whole[name]) for name in whole)


def test_a_limit_on_pixels_goes_with_the_model(base, tmp_path):
    model = load_model(base, max_pixels=28 * 28 * 4)
    train_all_weights(model)
    save_model(model, tmp_path / "model")
    asked = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (280, 280))}]}]
    visual = [int(m.encode(asked).visual.sum()) for m in (model, load_model(tmp_path / "model"), load_model(base))]
    assert visual[0] == visual[1] == 4 < visual[2]


def test_the_run_is_served_evaluated_again_and_no_adapter_is_looked_for(run, base, capsys):
    target = resolve_target(str(run))
    assert target.base == str(run / "model") and target.adapter is None
    loaded = load_model(target.base)
    for name, value in tree_flatten(loaded.net.parameters()):
        assert mx.array_equal(value, weights(run)[name]), name
    rows, _ = repeat_evaluation(run)
    wanted = {(r["model"], r["document_in_context"]): r["accuracy"] for r in result_rows(run)}
    assert {(r["model"], r["document_in_context"]): r["accuracy"] for r in rows} == {
        key: value for key, value in wanted.items() if key[0] in ("base", "rl")
    }
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", "to-peft", str(run), str(run / "peft"), "--base", str(base)])
    assert ended.value.code == 2 and "trained a whole model, no adapter" in " ".join(capsys.readouterr().err.split())


def test_a_quantized_base_is_refused(base, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization": {"group_size": 32, "bits": 4}}))
    model = load_model(base)
    nn.quantize(model.net, 32, 4, class_predicate=lambda name, m: name.endswith("gate_proj") and "language" in name)
    packed = dict(tree_flatten(model.net.parameters()))
    mx.save_safetensors(str(tmp_path / "base" / "model.safetensors"), packed, {"format": "mlx"})
    file = write_recipe(tmp_path / "r.yaml", tmp_path / "base", ["sft"], lora=None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(file), "--output", str(tmp_path / "run")])
    said = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2 and "is quantized, lora: null trains plain weights" in said
    assert not (tmp_path / "run").exists()


def test_a_broken_model_of_a_finished_stage_is_named(recipe, tmp_path, capsys):
    for report in train(load_recipe(recipe, output=tmp_path / "run")):
        if isinstance(report, StepReport) and metrics(tmp_path / "run")[-1]["stage_index"] == 1:
            request_stop()
    broken = tmp_path / "run" / "stages" / "1-cpt" / "model" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(recipe), "--output", str(tmp_path / "run"), "--resume"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"{broken} cannot be read" in " ".join(said.split()) and "Traceback" not in said
