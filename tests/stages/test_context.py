"""Documents longer than the model's context are refused before a stage begins, and what just fits is not."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpi_mlx.documents import PolicyDocument, place_document
from mpi_mlx.errors import DataError
from mpi_mlx.models.context import context_length
from mpi_mlx.recipe import CptStage, RlStage, SftStage
from mpi_mlx.stages.build import prepare_stages
from mpi_mlx.stages.supervised import encode_example

RULES = PolicyDocument.from_text("If there is a red cube reply yes. Otherwise reply no. " * 9, "rules")


@pytest.fixture()
def rows(dataset):
    """The data with the rulebook; the fourth row is the longest."""
    named = {
        name: tuple(replace(e, source=f"{name}.jsonl:{n}") for n, e in enumerate(getattr(dataset, name), 1))
        for name in ("train", "rl")
    }
    for examples in named.values():
        assert examples[3].messages[0]["role"] == "user"
    asked = tuple(
        replace(e, messages=({"role": "user", "content": "Which is it? " * 20},)) if n == 3 else e
        for n, e in enumerate(named["rl"])
    )
    told = tuple(replace(e, reasoning="so it is. " * 40) if n == 3 else e for n, e in enumerate(named["train"]))
    return replace(dataset, document=RULES, train=told, rl=asked)


def prepared(model, stage, data, limit):
    model.config = {**model.config, "max_position_embeddings": limit}
    return prepare_stages(model, SimpleNamespace(stages=[stage], seed=3, folder=Path()), data)


@pytest.mark.parametrize(
    "stage, advice",
    [
        (CptStage(stage="cpt", steps=9, batch_size=2), "leave the stage out"),
        (SftStage(stage="sft", steps=40, batch_size=2, document_fraction=0.5), "set document_fraction: 0"),
    ],
)
def test_rows_with_the_document(model, rows, stage, advice):
    longest = len(encode_example(model, rows.train[3], RULES, stage.stage))
    added = longest - len(encode_example(model, rows.train[3], None, stage.stage))
    (found,) = prepared(model, stage, rows, longest)
    assert (found.labelled.longest, found.labelled.document) == (longest, added)
    with pytest.raises(DataError) as error:
        prepared(model, stage, rows, longest - 1)
    assert str(error.value) == (
        f"stage {stage.stage}: train.jsonl:4 (example {rows.train[3].id!r}): {longest:,} tokens ({added:,} of them the "
        f"document's), and {model.base} takes {longest - 1:,} (max_position_embeddings); shorten the document, "
        f"{advice}, or choose a base with a longer context"
    )


def test_rows_without_it(model, rows):
    stage = SftStage(stage="sft", steps=9, batch_size=2)
    longest = len(encode_example(model, rows.train[3], None, "sft"))
    prepared(model, stage, rows, longest)
    with pytest.raises(DataError, match=f"train.jsonl:4 .*: {longest:,} tokens, and .*; shorten the example, lower"):
        prepared(model, stage, rows, longest - 1)


@pytest.mark.parametrize("policy_aware", [0, 2])
def test_prompts_and_their_completions(model, rows, policy_aware):
    stage = RlStage(stage="rl", steps=9, prompts=2, group_size=3, max_completion_tokens=11, policy_aware=policy_aware)
    document = RULES if policy_aware else None
    prompt = len(model.encode(place_document(rows.rl[3].messages, document), generation_prompt=True))
    prepared(model, stage, rows, prompt + 11)
    with pytest.raises(DataError, match="11 for a completion.*lower max_completion_tokens") as error:
        prepared(model, stage, rows, prompt + 10)
    said = str(error.value)
    assert said.startswith(f"stage rl: rl.jsonl:4 (example {rows.rl[3].id!r}): {prompt + 11:,} tokens (")
    assert ("the document's" in said) == ("set policy_aware: 0" in said) == bool(policy_aware)


def test_labelled_rows_of_rl(model, rows):
    """Longer than any prompt, and the stage's completions are not added to them."""
    stage = RlStage(
        stage="rl", steps=9, prompts=2, group_size=2, max_completion_tokens=2, sft_coef=0.1, sft_batch_size=2,
        document_fraction=1.0,
    )  # fmt: skip
    longest = len(encode_example(model, rows.train[3], RULES, "sft"))
    prepared(model, stage, rows, longest)
    with pytest.raises(DataError, match=r"stage rl: train.jsonl:4 .*set document_fraction: 0"):
        prepared(model, stage, rows, longest - 1)


def test_the_limit_is_what_the_config_states(model, rows):
    stage = CptStage(stage="cpt", steps=9, batch_size=2)
    window = {"sliding_window": 16, "use_sliding_window": True, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    config = {k: v for k, v in model.config.items() if k != "max_position_embeddings"}
    for stated, limit in (
        ({"max_position_embeddings": 4096, **window}, 4096),
        ({"max_position_embeddings": 8, "text_config": {"max_position_embeddings": 2048}}, 2048),
        ({}, None),
    ):
        model.config = config | stated
        assert context_length(model) == limit
        prepare_stages(model, SimpleNamespace(stages=[stage], seed=3, folder=Path()), rows)
