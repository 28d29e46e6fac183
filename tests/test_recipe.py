# ruff: noqa: E501  (messages stand in one piece)
"""Recipes: what loads, what it becomes, and every mistake with its exact line."""

import copy
from pathlib import Path
from typing import get_args

import pytest
import yaml

from mpi_mlx.data.pretraining import TASKS
from mpi_mlx.errors import RecipeError
from mpi_mlx.recipe import BenchmarkData, OwnData, Recipe, load_recipe, parse_recipe, shipped_recipes
from mpi_mlx.recipe_errors import REWARDS, STAGES
from mpi_mlx.recipe_fields import Spec
from mpi_mlx.recipe_stages import Task
from mpi_mlx.rollouts.rewards import KINDS

FOLDER = Path(__file__).parent.parent / "recipes"
TEXT = """\
model: {base: embedded:tiny, quantize: null, max_pixels: null}
lora: {rank: 16, alpha: 32, dropout: 0.0, targets: all-linear, kind: lora}
data: {benchmark: clevr_policy, modality: text, depth: 3, style: flat, train: 8, rl: 2000, seed: 7}
stages:
  - {stage: cpt, steps: 60, batch_size: 16, learning_rate: 1e-3, optimizer: adamw}
  - {stage: sft, epochs: 3, batch_size: 16, learning_rate: 5.0e-4, reasoning: true, document_fraction: 0.0}
  - stage: rl
    algorithm: grpo
    steps: 60
    policy_aware: 8
    kl_coef: 0.0
    max_completion_tokens: 64
    rewards: [{kind: exact_match, weight: 1.0}, {kind: format, weight: 0.1}]
evaluation: {batch_size: 64, after: [base, cpt, sft, rl]}
seed: 0
"""
OWN = "model: m\ndata: {document: d.md, train: t.jsonl}\nstages:\n  - {stage: sft, steps: 1}\n"


@pytest.fixture
def put(tmp_path, monkeypatch):
    """Writes r.yaml into the current folder; ``put(old, new)`` is TEXT with one piece replaced."""
    monkeypatch.chdir(tmp_path)

    def write(*changes, text=TEXT):
        for old, new in zip(changes[::2], changes[1::2], strict=True):
            assert old in text
            text = text.replace(old, new, 1)
        Path("r.yaml").write_text(text)
        return "r.yaml"

    return write


def refused(path, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).splitlines()


# ---- what loads


def test_a_recipe_as_people_write_it(put):
    recipe = load_recipe(put())
    cpt, sft, rl = recipe.stages
    assert (cpt.steps, cpt.epochs, cpt.learning_rate) == (60, None, 1e-3)  # 1e-3 is text in YAML 1.1
    assert (sft.steps, sft.epochs, type(sft.epochs)) == (None, 3.0, float)
    assert [(r.kind, r.weight) for r in rl.rewards] == [("exact_match", 1.0), ("format", 0.1)]
    assert isinstance(recipe.data, BenchmarkData) and recipe.data.rl == 2000 and recipe.data.test == 500
    assert recipe.labels == ("cpt", "sft", "rl")
    assert (recipe.name, recipe.source, recipe.folder) == ("r", "r.yaml", Path.cwd())
    assert recipe.output == "runs/r" and recipe.command == "mpi-mlx train r.yaml"
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.yaml")), ids=lambda f: str(f.relative_to(FOLDER)))
def test_every_recipe_of_the_folder_loads_and_round_trips(file):
    recipe = load_recipe(file)
    again = parse_recipe(recipe.to_yaml())
    assert again.model_dump() == recipe.model_dump() and again.to_yaml() == recipe.to_yaml()
    if isinstance(recipe.data, OwnData):
        for path in recipe.data.model_dump(exclude_none=True).values():
            assert Path(path).exists()


def test_shipped_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = shipped_recipes()
    assert {"quickstart", "tiny_base"} <= set(names)
    assert len(names) == len(list(FOLDER.rglob("*.yaml")))
    assert load_recipe("tiny_base").source == "tiny_base"
    assert refused("tiny_bse") == ['tiny_bse: no such recipe; did you mean "tiny_base"?']
    assert refused("zzz")[0].startswith("zzz: no such recipe; shipped recipes: ")
    (tmp_path / "empty").mkdir()
    assert refused("empty") == ["empty: no recipe.yaml in this folder"]


def test_a_round_trip_keeps_small_numbers_and_integer_keys(put):
    stage = "{stage: pretrain, steps: 3, learning_rate: 1e-12, tasks: {ask: 1}, depths: {1: 0.5, 2: 1}}"
    recipe = load_recipe(put(text=f"model: m\nstages: [{stage}]\n"))
    assert recipe.lora is None and recipe.data is None and recipe.evaluation.after == ()
    assert recipe.stages[0].depths == {1: 0.5, 2: 1.0}
    assert parse_recipe(recipe.to_yaml()).model_dump() == recipe.model_dump()
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == Recipe.model_validate(recipe.model_dump())


def test_defaults_left_out_stay_out_of_what_was_set(put):
    raw = load_recipe(put()).model_dump(exclude_unset=True)
    assert "clip_high" not in raw["stages"][2] and "drop_constant" not in raw["stages"][2]
    assert raw["evaluation"] == {"batch_size": 64, "after": ("base", "cpt", "sft", "rl")}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", (0.2, 0.2, "sequence", True, False, False)),
        ("algorithm: dapo", (0.2, 0.28, "token", True, True, True)),
        ("algorithm: dapo, drop_constant: false", (0.2, 0.28, "token", True, False, False)),
        ("algorithm: dr_grpo", (0.2, 0.2, "constant", False, False, False)),
        ("clip_low: 0.1", (0.1, 0.1, "sequence", True, False, False)),
        ("aggregation: token", (0.2, 0.2, "token", True, False, False)),
    ],
)
def test_an_algorithm_sets_what_is_not_given(put, said, expected):
    stage = f"{{stage: rl, steps: 1, {said}}}"
    rl = load_recipe(put(text=f"model: m\ndata: {{benchmark: clevr_policy}}\nstages: [{stage}]")).stages[0]
    found = (rl.clip_low, rl.clip_high, rl.aggregation, rl.scale_advantages, rl.drop_constant, rl.refill)
    assert found == expected


def test_labels_number_repeated_stages_and_evaluation_takes_them(put):
    text = "model: m\ndata: {benchmark: clevr_policy}\nstages: [{stage: sft, steps: 1}, {stage: sft, steps: 2}]"
    assert load_recipe(put(text=text)).evaluation.after == ("base", "sft1", "sft2")
    assert load_recipe(put(text=OWN)).evaluation.after == ()  # nothing to test on


def test_own_paths_are_the_recipe_s_and_those_of_overrides_are_from_here(put, tmp_path):
    (tmp_path / "p" / "base").mkdir(parents=True)
    Path("p/recipe.yaml").write_text(
        "model: base\n"
        "data: {document: policy, train: t.jsonl, test: /abs/t.jsonl, rl: r.jsonl}\n"
        "stages: [{stage: rl, steps: 1, rewards: [{kind: function, function: 'my.py:good'}]}]\n"
    )
    recipe = load_recipe("p", ["data.train=here.jsonl"])
    folder = tmp_path / "p"
    assert recipe.data.document == str(folder / "policy") and recipe.data.test == "/abs/t.jsonl"
    assert recipe.data.train == str(tmp_path / "here.jsonl")
    assert recipe.stages[0].rewards[0].function == f"{folder / 'my.py'}:good"
    assert recipe.model.base == str(folder / "base")
    assert (recipe.name, recipe.output, recipe.folder) == ("p", "runs/p", folder)


def test_what_the_schema_repeats_from_other_rooms_is_right():
    assert set(get_args(Task)) == set(TASKS)
    assert tuple(REWARDS) == KINDS


def test_every_field_is_described():
    specs, seen = [Spec], []
    while specs:
        specs += specs.pop().__subclasses__()
        seen += specs[-1:]
    assert len(seen) > 10
    for spec in [*seen, *STAGES.values(), *REWARDS.values()]:
        assert all(field.description for field in spec.model_fields.values()), spec


# ---- overrides


def test_overrides(put):
    changes = [
        "stages.1.steps=50", "stages.rl.rewards.format.weight=1e-2", "lora.targets=[q_proj]", "data.test=3",
        "evaluation.samples=5", "model.base=some/hub-id",
    ]  # fmt: skip
    recipe = load_recipe(put(), changes, output="there/run 1")
    assert (recipe.stages[1].steps, recipe.stages[1].epochs) == (50, None)
    assert recipe.stages[2].rewards[1].weight == 0.01 and recipe.lora.targets == ("q_proj",)
    assert recipe.model.base == "some/hub-id" and recipe.output == "there/run 1"
    assert recipe.command.endswith("--set model.base=some/hub-id --output 'there/run 1'")


def test_overrides_make_the_blocks_they_need(put):
    recipe = load_recipe(put(text=OWN), ["model.quantize=4", "lora.rank=2", "logging.wandb=name"])
    assert (recipe.model.base, recipe.model.quantize, recipe.lora.rank) == ("m", 4, 2)
    assert recipe.logging.wandb == "name"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("stages.1.stepz=3", 'stages.1.stepz: unknown key; did you mean "steps"?'),
        ("stages.sft.warmup=2", "stages.1.warmup: found 2, allowed: less than 1"),
        ("stages.9.steps=1", "stages has no item 9; allowed: 0 to 2"),
        ("stages.dpo.steps=1", "stages has no single 'dpo'; allowed: 0 to 2"),
        ("stage.0.steps=5", 'stage: unknown key; did you mean "stages"?'),
        ("modl.base=x", 'modl: unknown key; did you mean "model"?'),
        ("model.base.x=1", "model.base is text; it has no 'x'"),
        ("junk", "write path=value, such as stages.1.steps=50"),
        ("=1", "write path=value, such as stages.1.steps=50"),
        ("seed=x", 'seed: found "x", allowed: a whole number'),
    ],
)
def test_bad_overrides(put, change, line):
    assert refused(put(), change) == [f"--set {change}: {line}"]


def test_an_override_that_is_no_yaml(put):
    assert refused(put(), "seed=[1")[0].startswith("--set seed=[1: not valid YAML: ")


# ---- one mistake, one line


def places(value, path=()):
    """Every path of a recipe's mappings and lists."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


@pytest.mark.parametrize("wrong", [None, True, -1, 2.5, "x", [], {}, [1], [[]], {"a": 1}, {1: 2}, {"stage": {}}])
def test_whatever_stands_anywhere_is_a_recipe_or_told(wrong):
    """Any value in the place of any other, and under a key that nothing knows: no bare exception."""
    whole = yaml.safe_load(TEXT)
    for *outer, last in places(whole):
        for key in (last, "stage") if isinstance(last, str) else (last,):
            spoilt = copy.deepcopy(whole)
            owner = spoilt
            for part in outer:
                owner = owner[part]
            owner[key] = wrong
            try:
                parse_recipe(yaml.safe_dump(spoilt))
            except RecipeError as error:
                assert str(error)


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("learning_rate: 5.0e-4", "learning_rte: 1", '6: stages.1.learning_rte: unknown key; did you mean "learning_rate"?'),
        ("seed: 0", "sed: 0", '15: sed: unknown key; did you mean "seed"?'),
        ("seed: 0", "seed: 0\nseed: 1", "16: seed: given twice, first on line 15; keep one"),
        ("steps: 60, b", "steps: 60, steps: 6, b", "5: stages.0.steps: given twice, first on line 5; keep one"),
        ("depth: 3", "depth: 9", "3: data.depth: found 9, allowed: 6 or less"),
        ("depth: 3", "depth: three", '3: data.depth: found "three", allowed: a whole number'),
        ("depth: 3", "depth: 2.5", "3: data.depth: found 2.5, allowed: a whole number"),
        ("depth: 3", "depth: true", "3: data.depth: found true, allowed: a whole number"),
        ("rl: 2000", "rl: many", '3: data.rl: found "many", allowed: a whole number or null'),
        ("benchmark: clevr_policy", "benchmark: clevr", '3: data.benchmark: found "clevr", allowed: clevr_policy'),
        ("benchmark:", "benchmrk:", '3: data.benchmrk: unknown key; did you mean "benchmark"?'),
        ("steps: 60, b", "steps: '60', b", '5: stages.0.steps: found "60", allowed: a whole number or null'),
        ("1e-3", "true", "5: stages.0.learning_rate: found true, allowed: a number"),
        ("1e-3", ".nan", "5: stages.0.learning_rate: found NaN, allowed: a finite number"),
        ("1e-3", "0", "5: stages.0.learning_rate: found 0, allowed: more than 0"),
        ("reasoning: true", "reasoning: 1", "6: stages.1.reasoning: found 1, allowed: true or false"),
        ("adamw", "adam", '5: stages.0.optimizer: found "adam", allowed: adamw, muon; did you mean "adamw"?'),
        ("stage: cpt", "stage: ctp", '5: stages.0.stage: found "ctp", allowed: cpt, sft, rl, pretrain; did you mean "cpt"?'),
        ("stage: cpt", "warmup: 0", "5: stages.0.stage: missing; allowed: cpt, sft, rl, pretrain"),
        ("    steps: 60", "    epochs: 2\n    steps: 60", "9: stages.2.epochs: unknown key here: rl counts steps; set steps"),
        ("kind: lora", "kind: qlora", '2: lora.kind: found "qlora", allowed: lora, rslora, dora; did you mean "lora"?'),
        ("all-linear", "[]", "2: lora.targets: found [], allowed: all-linear, or a list of layers such as [q_proj, v_proj]"),
        ("quantize: null", "quantize: 5", "1: model.quantize: found 5, allowed: 4, 8 or null"),
        ("seed: 0", "output: 7", "15: output: found 7, allowed: text"),
        ("lora: {", "lora: 16 #", "2: lora: found 16, allowed: a mapping (key: value) or null"),
        ("kind: exact_match", "kind: exact", '13: stages.2.rewards.0.kind: found "exact", allowed: exact_match, format, regex, tool_call, json, trace, function; did you mean "exact_match"?'),
        ("kind: format", "kind: regex", "13: stages.2.rewards.1.pattern: missing; Python regular expression, searched; a dot matches newlines."),
        ("kind: format", "kind: function, function: score", '13: stages.2.rewards.1.function: found "score", allowed: a file and its function, such as rewards.py:my_reward'),
        ("[{kind: exact_match, weight: 1.0}, {kind: format, weight: 0.1}]", "[]", "13: stages.2.rewards: found [], allowed: a list or mapping that is not empty"),
        ("[{kind: exact_match, weight: 1.0}, {kind: format, weight: 0.1}]", "exact", '13: stages.2.rewards: found "exact", allowed: a list'),
    ],
)  # fmt: skip
def test_one_wrong_key_or_value(put, old, new, line):
    assert refused(put(old, new)) == [f"r.yaml:{line}"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (("epochs: 3", "epochs: 3, steps: 4"), "6: stages.1.epochs: given beside steps; keep one of the two"),
        (("epochs: 3, ", ""), "6: stages.1.steps: missing; give steps or epochs"),
        (("epochs: 3", "epochs: 3, patience: 2"), "6: stages.1.patience: needs validations; set validate_every"),
        (("grpo", "dapo", "kl_coef: 0.0", "kl_coef: 0.1"), "11: stages.2.kl_coef: dapo has no KL term; set it to 0, or algorithm: grpo"),
        (("policy_aware: 8", "group_size: 1"), "10: stages.2.group_size: a group needs two completions; raise group_size or policy_aware"),
        (("epochs: 3", "epochs: 3, group_size: 4"), "6: stages.1.group_size: unknown key here: only rl has it"),
        (("kl_coef: 0.0", "clip_low: 0.1\n    clip_high: 0.28"), "12: stages.2.clip_high: grpo clips both sides alike; set it to clip_low, or algorithm: dapo"),
        (("policy_aware: 8", "minibatches: 9"), "10: stages.2.minibatches: each takes a prompt or more; at most prompts (8)"),
        (("kl_coef: 0.0", "dual_clip: 1.2"), "11: stages.2.dual_clip: must be above 1 + clip_high (1.2); raise it"),
        (("kl_coef: 0.0", "clip_low: 0.4\n    clip_high: 0.28"), "11: stages.2.clip_low: found 0.4, allowed: clip_high (0.28) or less"),
        (("policy_aware: 8", "importance_weight: true"), "10: stages.2.importance_weight: weighs policy-aware completions; set policy_aware"),
        (("seed: 7", "conditions: [relation], clevr_root: c"), "3: data.conditions: relation cannot be asked of CLEVR's own pictures; leave it out"),
        (("kl_coef: 0.0", "rehearsal: 0.5"), "11: stages.2.rehearsal: is a share of sft_coef's rows; set sft_coef"),
        (("epochs: 3", "epochs: 3, rehearsal: 0.1, max_tokens: 100"), "6: stages.1.max_tokens: texts to rehearse take up to 104; raise it, or rehearsal: 0"),
        (("lora: {", "lora: null #", "epochs: 3", "epochs: 3, rehearsal: 0.1"), "6: stages.1.rehearsal: no base to write the texts without lora; set it to 0, or give lora a rank"),
        (("kl_coef: 0.0", "overlong_buffer: 64"), "11: stages.2.overlong_buffer: must be below max_completion_tokens (64)"),
        (("kl_coef: 0.0", "refill: true"), "11: stages.2.refill: nothing to refill; set drop_constant: true as well"),
        (("weight: 1.0", "weight: 0", "weight: 0.1", "weight: 0"), "13: stages.2.rewards: every weight is 0; give one of them weight"),
        (("[base, cpt, sft, rl]", "[base, dpo]"), '14: evaluation.after.1: found "dpo", allowed: base, cpt, sft, rl'),
        (("seed: 7", "test: 0"), "14: evaluation.after: nothing to evaluate on; set data.test, or after: []"),
        (("epochs: 3", "epochs: 3, validate_every: 5", "seed: 7", "validation: 0"), "6: stages.1.validate_every: needs held-out examples; set data.validation, or 0"),
        (("lora: {", "lora: null #", "kl_coef: 0.0", "kl_coef: 0.1"), "11: stages.2.kl_coef: no reference without lora; set it to 0, or give lora a rank"),
        (("lora: {", "lora: null #", "policy_aware: 8", "policy_aware: 8\n    policy_aware_sampler: reference"), "11: stages.2.policy_aware_sampler: no reference without lora; set it to model, or give lora a rank"),
    ],
)  # fmt: skip
def test_one_contradiction(put, changes, line):
    assert refused(put(*changes)) == [f"r.yaml:{line}"]


def test_stages_are_held_against_the_data(put):
    stages = (
        "stages:\n  - {stage: cpt, steps: 1}\n  - {stage: sft, steps: 1, document_fraction: 0.5}\n"
        "  - {stage: rl, steps: 1, policy_aware: 4}\n"
    )
    assert refused(put(text="model: m\ndata: {rl: r.jsonl}\n" + stages)) == [
        "r.yaml:4: stages.0.stage: cpt needs a document; set data.document",
        "r.yaml:4: stages.0.stage: cpt needs labelled examples; set data.train",
        "r.yaml:5: stages.1.document_fraction: needs a document; set data.document, or 0",
        "r.yaml:5: stages.1.stage: sft needs labelled examples; set data.train",
        "r.yaml:6: stages.2.policy_aware: needs a document; set data.document, or policy_aware: 0",
    ]
    assert refused(put(text="model: m\nstages: [{stage: rl, steps: 1}]")) == [
        "r.yaml:1: data: missing; stage rl needs a benchmark or your own files"
    ]


def test_all_errors_of_a_file_at_once_in_its_order(put):
    changes = (
        "rank: 16", "rank: 0", "depth: 3", "stlye: x", "learning_rate: 1e-3", "learning_rte: 1",
        "epochs: 3", "epochs: 3, steps: 4", "kl_coef: 0.0", "kl_coef: -1", "kind: exact_match", "kind: exact",
        "seed: 0", "seed: zero",
    )  # fmt: skip
    lines = refused(put(*changes), "stages.sft.warmp=0")
    assert [line.split(": ")[1] for line in lines[:-1]] == [
        "lora.rank", "data.stlye", "stages.0.learning_rte", "stages.1.epochs", "stages.2.kl_coef",
        "stages.2.rewards.0.kind", "seed",
    ]  # fmt: skip
    assert lines[-1] == '--set stages.sft.warmp=0: stages.1.warmp: unknown key; did you mean "warmup"?'


def test_what_is_left_out_for_being_wrong_is_not_missed_elsewhere(put):
    assert len(refused(put("epochs: 3", "epochs: -3"))) == 1
    assert len(refused(put("train: 8", "train: many", "rl: 2000, ", ""))) == 1
    assert len(refused(put("data: {", "data: 3 #"))) == 1
    own = "{document: 3, train: [t.jsonl], rl: r.jsonl}"
    stages = "[{stage: cpt, steps: 1}, {stage: rl, steps: 1, policy_aware: 4}]"
    assert len(refused(put(text=f"model: m\ndata: {own}\nstages: {stages}"))) == 2


# ---- files that are no recipes


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"- 1\n", "r.yaml:1: a recipe is a mapping (model: ..., stages: ...), found a list"),
        (b"a: [1\nb: 2\n", "r.yaml:2: not valid YAML: expected ',' or ']', but got ':'"),
        (b"seed: 1\n\tlora: 2\n", "r.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        (b"\xff\xfe\x00", "r.yaml: not UTF-8 text (byte 0); save it as UTF-8"),
        (b"a: &a [*a]\n", "r.yaml:1: not valid YAML: an alias that contains itself"),
        (b"? [1]\n: 2\n", "r.yaml:1: not valid YAML: a key must be plain text"),
        (b"a: 2024-13-45\n", "r.yaml:1: not valid YAML: month must be in 1..12"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, monkeypatch, content, line):
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_bytes(content)
    assert refused("r.yaml") == [line]


def test_an_empty_file_and_objects_are_refused(put):
    assert [line.split(";")[0] for line in refused(put(text="# nothing\n"))] == [
        "r.yaml:1: model: missing", "r.yaml:1: stages: missing",
    ]  # fmt: skip
    assert "could not determine a constructor" in refused(put(text="a: !!python/name:os.system x\n"))[0]


def test_merged_blocks_keep_their_lines(put):
    text = (
        "model: m\ndata: {benchmark: clevr_policy}\nstages:\n"
        "  - &first {stage: sft, steps: 3, warmup: 0.5}\n  - {<<: *first, steps: 0}\n"
    )
    assert refused(put(text=text)) == ["r.yaml:5: stages.1.steps: found 0, allowed: 1 or more or null"]
    assert load_recipe(put(text=text.replace("steps: 0", "steps: 9"))).stages[1].warmup == 0.5


def test_a_recipe_made_in_python_says_what_contradicts():
    with pytest.raises(ValueError, match="steps: missing; give steps or epochs"):
        Recipe.model_validate({"model": {}, "data": {"benchmark": "clevr_policy"}, "stages": [{"stage": "sft"}]})


def test_pretraining_stands_alone():
    text = "model: {base: embedded:tiny}\ndata: {benchmark: clevr_policy, depth: 1}\nlora: null\nstages:\n"
    both = "  - {stage: sft, steps: 1}\n  - {stage: pretrain, steps: 1, tasks: {walk: 1.0}}\n"
    with pytest.raises(RecipeError, match="stages.1: pretrain makes a base: give it a recipe of its own"):
        parse_recipe(text + both)


@pytest.mark.parametrize("stages, wanted", [
    ("[{stage: cpt, steps: 1, reasoning: false}, {stage: rl, steps: 1, reasoning: false}]", False),
    ("[{stage: sft, steps: 1, reasoning: false}]", False),
    ("[{stage: sft, steps: 1}]", True),
])  # fmt: skip
def test_whether_the_agent_reasons_is_said_by_the_last_stage(stages, wanted):
    data = "data: {benchmark: clevr_policy, modality: text, depth: 3, seed: 7}"
    assert parse_recipe(f"model: {{base: embedded:tiny}}\nstages: {stages}\n{data}\n").reasoning is wanted
