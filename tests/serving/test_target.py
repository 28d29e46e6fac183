import json

import pytest

from mpi_mlx.errors import ServingError
from mpi_mlx.models.context import context_length
from mpi_mlx.serving.target import resolve_target

RECIPE = """
model: {base: BASE}
lora: {rank: 2, alpha: 4, targets: [q_proj, v_proj]}
data: {benchmark: clevr_policy, depth: 2, train: 4, validation: 0, test: 0}
stages:
  - {stage: sft, steps: 1, batch_size: 1, learning_rate: 1.0e-3}
  - {stage: rl, steps: 1, prompts: 1, group_size: 2, rewards: [{kind: exact_match, weight: 1.0}]}
evaluation: {max_completion_tokens: 33}
"""


@pytest.fixture
def run(tmp_path, tiny_folder):
    from mpi_mlx.models import load_model
    from mpi_mlx.models.adapters import save_adapter
    from mpi_mlx.models.lora import attach_lora
    from mpi_mlx.recipe import LoraSpec

    folder = tmp_path / "agent"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE.replace("BASE", str(tiny_folder)))
    model = load_model(tiny_folder)
    attach_lora(model, LoraSpec(rank=2, alpha=4, targets=["q_proj", "v_proj"]))
    save_adapter(model, folder / "stages" / "1-sft" / "adapter")
    return folder


def test_a_run_brings_adapter_document_and_limits(run, tiny_folder):
    target = resolve_target(run)
    assert target.adapter == run / "stages" / "1-sft" / "adapter"  # the run is not finished
    assert (target.name, target.max_tokens, target.temperature) == ("agent", 33, 0.0)
    assert target.document().name == "clevr-policy-depth2"
    model = target.load()
    assert model.has_adapters and context_length(model) == 2048
    (run / "stages" / "1-sft" / "adapter").rename(run / "adapter")
    assert resolve_target(str(run)).adapter == run / "adapter"
    inside = resolve_target(run / "adapter")
    assert inside.adapter == run / "adapter" and inside.data is not None


def test_stages_are_chosen_by_name(run):
    assert resolve_target(run, stage="1-sft").adapter.parent.name == "1-sft"
    with pytest.raises(ServingError, match="no stage 'rl'; its stages are 1-sft"):
        resolve_target(run, stage="rl")


def test_an_adapter_alone_names_its_base(run, tmp_path, tiny_folder):
    alone = tmp_path / "alone"
    (run / "stages" / "1-sft" / "adapter").rename(alone)
    target = resolve_target(alone)
    assert target.base == str(tiny_folder) and target.adapter == alone and target.document() is None


def test_models_keep_their_own_sampling(tiny_folder, tmp_path):
    target = resolve_target(tiny_folder)
    assert (target.base, target.adapter, target.temperature) == (str(tiny_folder), None, 0.0)
    (tmp_path / "config.json").write_text("{}")
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8}
    (tmp_path / "generation_config.json").write_text(json.dumps(sampling))
    sampled = resolve_target(tmp_path)
    assert (sampled.temperature, sampled.top_p) == (0.7, 0.8)


def test_what_cannot_be_served_is_said(tmp_path, run):
    with pytest.raises(ServingError, match="neither a run"):
        resolve_target(tmp_path)
    (run / "stages" / "1-sft" / "adapter").rename(tmp_path / "gone")
    with pytest.raises(ServingError, match="finish the run"):
        resolve_target(run)
