"""The ablation run for real, on random weights: shared stages give what separate training gives."""

import json

import pytest

from mpi_mlx.errors import CheckpointError, RecipeError
from mpi_mlx.evaluation.ablation import (
    CellFinished,
    CellStarted,
    StudyWritten,
    fork_run,
    run_ablation,
    study,
)
from mpi_mlx.evaluation.grid import Cell, cell_recipe, choose_variants, plan
from mpi_mlx.recipe import Recipe, parse_recipe
from mpi_mlx.training.reports import Interrupted, StepReport
from mpi_mlx.training.run import request_stop, train

DATA = {"benchmark": "clevr_policy", "depth": 1, "train": 2, "rl": 4, "test": 3}
# random weights write random letters: no answer is right, but some are longer than others
REWARD = "def length(completions, examples):\n    return [len(c) for c in completions]\n"
SMALL = {"batch_size": 2, "learning_rate": 1e-3}


def small_recipe(rewards=({"kind": "format"},), **changes):
    return Recipe.model_validate(
        {
            "model": {"base": "embedded:tiny", "init": "random"},
            "lora": {"rank": 2, "alpha": 4},
            "data": DATA,
            "stages": [
                {"stage": "cpt", "steps": 1, **SMALL},
                {"stage": "sft", "steps": 2, "document_fraction": 0.5, **SMALL},
                {
                    "stage": "rl", "steps": 1, "prompts": 1, "group_size": 2, "policy_aware": 2,
                    "max_completion_tokens": 4, "clip_high": 0.2, "learning_rate": 1e-3,
                    "rewards": list(rewards),
                },
            ],
            "evaluation": {"max_completion_tokens": 4, "forgetting": False},
            **changes,
        }
    )


def cell(name, document=5, setting=()):
    return Cell(choose_variants([name])[0], document, setting)


def test_recipes_of_the_cells():
    base = small_recipe()
    rl = cell_recipe(base, cell("cpt_sft+grpo"), "out").stages
    assert [s.stage for s in rl] == ["cpt", "sft", "rl"]
    assert (rl[2].group_size, rl[2].policy_aware) == (4, 0)  # as many completions as the union
    dapo = cell_recipe(base, cell("direct_sft+dapo_policyrollout"), "out").stages
    assert not dapo[0].reasoning and not dapo[1].reasoning
    assert (dapo[1].group_size, dapo[1].policy_aware, dapo[1].aggregation) == (2, 2, "token")
    assert (dapo[1].clip_low, dapo[1].clip_high) == (0.2, 0.28)
    reference = cell_recipe(base, cell("sft+policyrollout_reference"), "out").stages[1]
    assert reference.policy_aware_sampler == "reference" and reference.clip_high == 0.2
    assert cell_recipe(base, cell("sft_matched"), "out").stages[0].steps == 3
    bare = cell_recipe(base, cell("cpt_sft_bare+grpo"), "out").stages
    assert [s.stage for s in bare] == ["cpt", "sft", "rl"] and bare[1].document_fraction == 0
    deep = cell_recipe(base, cell("sft", setting=(("data.depth", 4), ("data.train", 20))), "out")
    assert (deep.data.depth, deep.data.train, deep.data.seed, deep.seed) == (4, 20, 5, 5)
    assert deep.evaluation.max_completion_tokens == 4 + 3 * 12  # depth 4 instead of 1
    assert deep.stages[0].steps == 2 and list(deep.evaluation.after) == ["sft"] and deep.output == "out"


def test_pretraining_beside_as_many_steps_and_rows_with_the_document():
    cpt = {"stage": "cpt", "steps": 30, "batch_size": 4, "document_questions": 0.5}
    sft = {"stage": "sft", "steps": 10, "batch_size": 4, "document_fraction": 0.2}
    base = small_recipe(stages=[cpt, sft])

    def stages(name):
        return cell_recipe(base, cell(name), "out").stages

    (rows,) = stages("sft_matched_rows")  # 30 x 0.5 + 10 x 0.2 of 40 steps
    assert (rows.steps, rows.document_fraction) == (40, 0.425)
    (plain,) = stages("sft_matched_plain")  # 30 + 2
    assert (plain.steps, plain.document_fraction) == (40, 0.8)
    (long,) = stages("sft_matched_long")  # 90 x 0.5 + 2 of 100
    assert (long.steps, long.document_fraction) == (100, 0.47)
    assert stages("cpt_plain_sft")[0].document_questions == 0
    assert (stages("cpt_long_sft")[0].steps, stages("cpt_long_sft")[0].document_questions) == (90, 0.5)
    assert stages("sft_matched")[0].document_fraction == 0.2  # the steps alone
    with pytest.raises(RecipeError, match="one batch_size"):
        cell_recipe(small_recipe(stages=[cpt, {**sft, "batch_size": 8}]), cell("sft_matched_rows"), "out")


def test_matched_rows_are_counted_with_accumulation_and_without_rehearsal():
    cpt = {"stage": "cpt", "steps": 150, "batch_size": 8, "accumulate": 2, "document_questions": 0.5}
    sft = {"stage": "sft", "steps": 60, "batch_size": 8, "document_fraction": 0.25}

    def matched(cpt=cpt, sft=sft):
        (found,) = cell_recipe(small_recipe(stages=[cpt, sft]), cell("sft_matched_rows"), "out").stages
        return found.steps, found.accumulate, found.document_fraction

    # 150 x 16 + 60 x 8 = 2,880 rows; 1,200 and 120 of them with the document
    assert matched() == (360, 1, 0.4583)
    assert matched(sft={**sft, "accumulate": 2}) == (210, 2, 0.4286)  # 3,360 rows; 1,200 + 240
    # cpt: 2,400 x .8 labelled, half with the document; sft: 480 x .75 x .25 = 90; of 2,880 x .75
    rehearsed = matched({**cpt, "rehearsal": 0.2}, {**sft, "rehearsal": 0.25})
    assert rehearsed == (360, 1, 0.4861)  # 1,050 of 2,160
    with pytest.raises(RecipeError, match="lower the sft stage's rehearsal"):  # 1,200 + 48 rows, of 2,880 x .4
        matched(sft={**sft, "rehearsal": 0.6})


def test_grpo_from_a_recipe_without_policyrollout_and_the_other_way_round():
    rl = {"stage": "rl", "steps": 1, "group_size": 8, "learning_rate": 1e-3}
    base = small_recipe(stages=[{"stage": "sft", "steps": 1, **SMALL}, rl])
    assert cell_recipe(base, cell("sft+grpo"), "out").stages[1].group_size == 8
    both = cell_recipe(base, cell("sft+policyrollout"), "out").stages[1]
    assert (both.group_size, both.policy_aware) == (4, 4)
    with pytest.raises(RecipeError, match="needs stage cpt; the recipe has sft, rl"):
        cell_recipe(base, cell("cpt_sft"), "out")
    with pytest.raises(RecipeError, match=r"depth=9/document-5/sft .* run: data.depth: found 9, allowed: 6 or less$"):
        cell_recipe(base, cell("sft", setting=(("data.depth", 9),)), "out")


TRUE = {"kind": "trace", "weight": 0.3}
RL = {"stage": "rl", "steps": 1, "group_size": 4, "policy_aware": 4, "learning_rate": 1e-3}


def rl_stage(name, rl, **changes):
    stages = [{"stage": "sft", "steps": 1, **SMALL}, {**RL, **rl}]
    return cell_recipe(small_recipe(stages=stages, **changes), cell(name), "out").stages[1]


def test_cells_without_reasoning_neither_draw_nor_pay_traces():
    rl = {"policy_aware_sampler": "reference", "rewards": [{"kind": "exact_match"}, TRUE]}
    for form in ("grpo", "policyrollout", "dapo_policyrollout"):
        direct = rl_stage(f"direct_sft+{form}", rl)
        assert not direct.reasoning and direct.policy_aware_sampler == "model"
        assert [r.kind for r in direct.rewards] == ["exact_match"]
        with_trace = rl_stage(f"sft+{form}", rl)
        assert with_trace.policy_aware_sampler == "reference"
        assert [r.kind for r in with_trace.rewards] == ["exact_match", "trace"]
    own = rl_stage("sft+policyrollout", {**rl, "reasoning": False})  # the recipe's own wish
    assert own.policy_aware_sampler == "model" and len(own.rewards) == 1
    assert [r.kind for r in rl_stage("direct_sft+grpo", {}).rewards] == ["exact_match", "format"]
    with pytest.raises(RecipeError, match="stages.1.rewards"):
        rl_stage("direct_sft+grpo", {"rewards": [TRUE]})


def test_what_resolution_wrote_does_not_reach_another_algorithm():
    """A recipe and the same recipe with every default written out give the same cells."""
    written = small_recipe(stages=[{"stage": "sft", "steps": 1, **SMALL}, RL])
    resolved = parse_recipe(written.to_yaml())
    for form in ("grpo", "policyrollout", "dapo_policyrollout"):
        one, two = (cell_recipe(r, cell(f"sft+{form}"), "out").to_yaml() for r in (written, resolved))
        assert one == two
    dapo = cell_recipe(resolved, cell("sft+dapo_policyrollout"), "out").stages[1]
    assert (dapo.drop_constant, dapo.refill, dapo.clip_high, dapo.aggregation) == (True, True, 0.28, "token")
    back = rl_stage("sft+policyrollout", {"algorithm": "dapo", "drop_constant": True, "refill": True})
    assert (back.drop_constant, back.refill) == (False, False)


def test_an_importance_weight_is_for_cells_with_policy_aware_completions():
    assert not rl_stage("sft+grpo", {"importance_weight": True}).importance_weight
    assert rl_stage("sft+policyrollout", {"importance_weight": True}).importance_weight


def test_a_cell_takes_as_many_rows_and_prompts_as_the_recipes_processes_together():
    stages = [
        {"stage": "cpt", "steps": 1, **SMALL},
        {"stage": "sft", "steps": 1, **SMALL, "accumulate": 2},
        {**RL, "prompts": 3, "sft_coef": 0.1},
    ]
    base = small_recipe(stages=stages, processes=4)
    cpt, sft, rl = (cell_recipe(base, cell("cpt_sft+grpo"), "out")).stages
    assert [(s.batch_size, s.accumulate) for s in (cpt, sft)] == [(2, 4), (2, 8)]  # a step's rows: 8 and 16
    assert (rl.prompts, rl.sft_batch_size, rl.group_size) == (12, 32, 8)
    assert cell_recipe(base, cell("cpt_sft+grpo"), "out").processes == 1
    assert cell_recipe(small_recipe(stages=stages), cell("cpt_sft"), "out").stages[1].accumulate == 2


def adapter(folder):
    return (folder / "adapter" / "adapters.safetensors").read_bytes()


def lines(folder):
    """The metrics without what a clock measured."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if "second" not in k and k != "memory_bytes"} for r in rows]


def test_a_study_forks_resumes_and_reports(tmp_path):
    (tmp_path / "mine.py").write_text(REWARD)
    rewards = [{"kind": "function", "function": f"{tmp_path}/mine.py:length"}]
    base, sweeps = small_recipe(rewards=rewards), {"data.depth": [1, 2]}
    chosen = choose_variants(["base", "sft", "sft+policyrollout"])
    cells = plan(base, chosen, [5], sweeps, choose_variants(["sft"]))
    reports = list(run_ablation(base, cells, tmp_path / "study", sweeps=sweeps))
    started = [r for r in reports if isinstance(r, CellStarted)]
    assert [(r.cell.variant.name, r.parent, r.shared) for r in started] == [
        ("base", None, 0), ("sft", None, 0), ("sft+policyrollout", "sft", 1), ("sft", None, 0),
    ]
    assert reports[-1] == StudyWritten(tmp_path / "study" / "ablation.md", 0)
    forked = tmp_path / "study" / cells[2].folder
    # the same cell on its own
    alone = cell_recipe(base, cells[2], str(tmp_path / "alone"))
    for _ in train(alone):
        pass
    assert adapter(forked) == adapter(tmp_path / "alone")
    assert adapter(forked) != adapter(tmp_path / "study" / cells[1].folder)
    assert lines(forked) == lines(tmp_path / "alone") and [r["step"] for r in lines(forked)] == [1, 2, 1]

    again = list(run_ablation(base, cells, tmp_path / "study", sweeps=sweeps))
    assert [type(r) for r in again] == [CellFinished] * 4 + [StudyWritten] and all(r.known for r in again[:4])
    (tmp_path / "study" / cells[3].folder / "cell.json").unlink()
    assert study(base, cells, tmp_path / "study", sweeps=sweeps).missing == 1
    text = (tmp_path / "study" / "ablation.md").read_text()
    assert "3 runs over one document (seed 5); 1 are still to be run" in text
    assert "| CoT-SFT + PolicyRollout - CoT-SFT |" in text
    changed = small_recipe(rewards=rewards, data={**DATA, "test": 2})
    with pytest.raises(CheckpointError, match="another recipe"):
        list(run_ablation(changed, cells, tmp_path / "study", sweeps=sweeps))


def test_a_stopped_study_goes_on_where_it_was(tmp_path):
    base = small_recipe()
    cells = plan(base, choose_variants(["sft"]), [5])
    reports = []
    for report in run_ablation(base, cells, tmp_path, sweeps={}):
        reports.append(report)
        if isinstance(report, StepReport):
            request_stop()
    assert isinstance(reports[-1], Interrupted) and not (tmp_path / cells[0].folder / "cell.json").exists()
    again = list(run_ablation(base, cells, tmp_path, sweeps={}))
    assert [r.step for r in again if isinstance(r, StepReport)] == [2]
    assert isinstance(again[-1], StudyWritten) and again[-1].missing == 0


def test_an_interrupted_fork_leaves_no_folder(tmp_path, monkeypatch):
    source = tmp_path / "a"
    (source / "stages").mkdir(parents=True)
    (source / "progress.json").write_text('{"stages": {}}')
    with pytest.raises(FileNotFoundError):  # metrics.jsonl is missing
        fork_run(source, tmp_path / "b", small_recipe())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_nothing_to_report(tmp_path):
    base = small_recipe()
    with pytest.raises(CheckpointError, match="no finished cell"):
        study(base, plan(base, choose_variants(["sft"]), [1]), tmp_path, sweeps={})
