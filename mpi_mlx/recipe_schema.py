"""The schema of a recipe: model, adapters, data, evaluation, and the whole with its cross-checks."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Discriminator, Field, PrivateAttr, Tag, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mpi_mlx.recipe_fields import Bool, FilePath, Float, Int, Spec, Str, refuse
from mpi_mlx.recipe_stages import Stage


class ModelSpec(Spec):
    """The base model. A bare text is short for ``{base: text}``."""

    base: Str = Field("embedded:tiny", min_length=1, description="A hub id, a folder, or embedded:tiny.")
    quantize: Literal[4, 8] | None = Field(None, description="Bits of the base; null: as stored.")
    max_pixels: Int | None = Field(None, ge=1, description="Of an image; null: the model's own.")
    init: Literal["weights", "random"] = Field("weights", description="random: only config.json is used.")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="Of the weights; null: float32 on CPU, else bfloat16."
    )

    @field_validator("base")
    @classmethod
    def _folder(cls, base: str, info: ValidationInfo) -> str:
        """Absolute, where it is a folder beside the recipe."""
        folder = (info.context or {}).get("folder")
        path = None if folder is None else Path(folder, os.path.expanduser(base)).absolute()
        return str(path) if path is not None and path.is_dir() else base

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"base": value} if isinstance(value, str) else value


class LoraSpec(Spec):
    """The adapters. ``lora: null`` trains the language model's own weights (full fine-tuning)."""

    rank: Int = Field(16, ge=1, description="Rank of the update.")
    alpha: Float = Field(32.0, gt=0, allow_inf_nan=False, description="Over rank (rslora: its root): scale.")
    dropout: Float = Field(0.0, ge=0, lt=1, description="On the adapters' input in training; not in rl.")
    targets: Str | tuple[Str, ...] = Field(
        "all-linear", description="all-linear, or suffixes such as [q_proj, v_proj], or qualified names."
    )
    kind: Literal["lora", "rslora", "dora"] = Field("lora", description="The kind of adapter.")
    projector: Bool = Field(False, description="Also adapt the layers that carry vision into language.")

    @field_validator("targets", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        names = value if isinstance(value, (list, tuple)) else ()
        if value != "all-linear" and not (names and all(isinstance(n, str) and n for n in names)):
            raise PydanticCustomError("targets", "all-linear, or a list of layers such as [q_proj, v_proj]")
        return value


class BenchmarkData(Spec):
    """A built-in benchmark, generated from its seed."""

    benchmark: Literal["clevr_policy"] = Field(description="Its name.")
    modality: Literal["text", "multimodal"] = Field("text", description="multimodal: illustrated document.")
    depth: Int = Field(3, ge=1, le=6, description="Decisions from the document's root to a reply.")
    style: Literal["flat", "clevr"] = Field("flat", description="flat: for tiny models; clevr: shaded.")
    train: Int = Field(8, ge=0, description="Examples labelled with reasoning.")
    rl: Int | None = Field(None, ge=1, description="Examples with answers only; null: the train split.")
    validation: Int = Field(100, ge=0, description="Held-out examples to watch.")
    test: Int = Field(500, ge=0, description="Held-out examples to report.")
    seed: Int = Field(7, ge=0, description="Of scenes and document: same seed, same bytes.")
    document_seed: Int | None = Field(None, ge=0, description="Of the document alone; null: seed.")
    image_size: Int | None = Field(None, ge=28, description="Side in pixels; null: 84 flat, 448 clevr.")
    conditions: tuple[Literal["exists", "count", "relation"], ...] = Field(
        ("exists",), min_length=1, description="What the document asks about a scene."
    )
    wording: Literal["compact", "natural", "mixed"] = Field("natural", description="Of the document.")
    max_objects: Int = Field(5, ge=1, le=9, description="Objects of a scene, at most.")
    clevr_limit: Int | None = Field(None, ge=1, description="Pictures read of each of its splits; null: all.")
    clevr_root: FilePath | None = Field(None, description="A CLEVR v1.0 folder whose pictures to use.")


class OwnData(Spec):
    """One's own files; paths are relative to the recipe and become absolute when it is loaded."""

    document: FilePath | None = Field(None, description="The policy document: a Markdown file or a folder.")
    train: FilePath | None = Field(None, description="JSONL with answers and perhaps reasoning.")
    rl: FilePath | None = Field(None, description="JSONL with answers to check; null: train.")
    validation: FilePath | None = Field(None, description="JSONL of held-out examples to watch.")
    test: FilePath | None = Field(None, description="JSONL of held-out examples to report.")


def data_kind(value: Any) -> str:
    """Which of the two a ``data`` mapping means: the key ``benchmark`` decides, a misspelt one too."""
    if isinstance(value, BenchmarkData):
        return "benchmark"
    keys = [key for key in value if isinstance(key, str)] if isinstance(value, dict) else []
    return "benchmark" if get_close_matches("benchmark", keys, 1, 0.75) else "own"


Data = Annotated[
    Annotated[BenchmarkData, Tag("benchmark")] | Annotated[OwnData, Tag("own")], Discriminator(data_kind)
]


class EvaluationSpec(Spec):
    """What is measured on the test split, and when."""

    batch_size: Int = Field(64, ge=1, description="Prompts decoded together.")
    after: tuple[Str, ...] | None = Field(None, description="base and names of stages. Default: all of them.")
    max_completion_tokens: Int = Field(160, ge=1, description="Longest answer.")
    samples: Int | None = Field(None, ge=1, description="Test examples used; null: all.")
    with_document: Bool = Field(True, description="Measure with the document in context, too.")
    forgetting: Bool = Field(True, description="Measure what general text has become harder.")


class LoggingSpec(Spec):
    """Where metrics go beside metrics.jsonl."""

    tensorboard: Bool = Field(False, description="Write TensorBoard events into the run.")
    wandb: Str | None = Field(None, description="Name of a Weights & Biases project; null: none.")


class Recipe(Spec):
    """One experiment. ``load_recipe`` makes it; everything left out is filled in."""

    model: ModelSpec = Field(description="The base model.")
    lora: LoraSpec | None = Field(default_factory=LoraSpec, description="Adapters; null: train all weights.")
    data: Data | None = Field(None, description="A benchmark or one's own files; null only to pretrain.")
    stages: tuple[Stage, ...] = Field(min_length=1, description="What is done, in this order.")
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec, description="What is measured, when.")
    logging: LoggingSpec = Field(default_factory=LoggingSpec, description="Where metrics go.")
    output: Str = Field("runs/recipe", min_length=1, description="The run's folder. Default: runs/NAME.")
    seed: Int = Field(0, ge=0, description="Of everything drawn while training.")
    processes: Int = Field(1, ge=1, description="Data-parallel processes on this machine; 1: none.")

    @field_validator("output")
    @classmethod
    def _at_home(cls, output: str) -> str:
        return os.path.expanduser(output)

    # Where it came from: known to load_recipe, no part of the recipe.
    _folder: Path = PrivateAttr(default_factory=Path)
    _source: str = PrivateAttr("recipe.yaml")
    _name: str = PrivateAttr("recipe")
    _command: str = PrivateAttr("mpi-mlx train recipe.yaml")

    @property
    def folder(self) -> Path:
        """The folder of the recipe's file, absolute."""
        return self._folder

    @property
    def source(self) -> str:
        """The file or shipped name, as it was given."""
        return self._source

    @property
    def name(self) -> str:
        """The file's name without its suffix; the folder's for a ``recipe.yaml``."""
        return self._name

    @property
    def command(self) -> str:
        """What trains it, to be typed from the same folder."""
        return self._command

    @property
    def labels(self) -> tuple[str, ...]:
        """One name a stage, numbers where a kind is repeated: cpt, rl1, rl2."""
        kinds = [stage.stage for stage in self.stages]
        numbers = [kinds[: i + 1].count(kind) for i, kind in enumerate(kinds)]
        return tuple(k if kinds.count(k) == 1 else f"{k}{n}" for k, n in zip(kinds, numbers, strict=True))

    @property
    def reasoning(self) -> bool:
        """Whether the agent is to reason before it answers: what the last stage that says so wants."""
        said = [stage.reasoning for stage in self.stages if hasattr(stage, "reasoning")]
        return said[-1] if said else True

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out; ``load_recipe`` reads it back the same."""
        raw = self.model_dump()
        for stage in raw["stages"]:
            for name in ("steps", "epochs"):
                if stage.get(name, 0) is None:
                    del stage[name]
            stage_first = {"stage": stage.pop("stage")}
            stage_first.update(stage)
            stage.clear()
            stage.update(stage_first)
        return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=100)

    @model_validator(mode="after")
    def _resolve(self):
        only_pretrains = all(stage.stage == "pretrain" for stage in self.stages)
        if only_pretrains and "lora" not in self.model_fields_set:
            object.__setattr__(self, "lora", None)
        tested = bool(self.data is not None and self.data.test)
        self.evaluation._fill(after=("base", *self.labels) if tested else ())
        refuse(_contradictions(self, tested))
        return self


def _contradictions(recipe: Recipe, tested: bool) -> list[tuple[str, str]]:
    known = ("base", *recipe.labels)
    problems: list[tuple[str, str]] = []
    for i, name in enumerate(recipe.evaluation.after):
        if name not in known:
            problems.append((f"evaluation.after.{i}", f'found "{name}", allowed: {", ".join(known)}'))
    if recipe.evaluation.after and not tested:
        problems.append(("evaluation.after", "nothing to evaluate on; set data.test, or after: []"))
    data = recipe.data
    if isinstance(data, BenchmarkData) and data.clevr_root and "relation" in data.conditions:
        problems.append(("data.conditions", "relation cannot be asked of CLEVR's own pictures; leave it out"))
    trained = [s.stage for s in recipe.stages if s.stage != "pretrain"]
    if recipe.data is None and trained:
        problems.append(("data", f"missing; stage {trained[0]} needs a benchmark or your own files"))
    if 0 < len(trained) < len(recipe.stages):
        at = [s.stage for s in recipe.stages].index("pretrain")
        said = "pretrain makes a base: give it a recipe of its own, and the model/ of its run to this one as the base"
        problems.append((f"stages.{at}", said))
    if not trained and recipe.lora is not None:
        problems.append(("lora", "pretrain stages train all weights; set it to null"))
    if (len(trained) < len(recipe.stages) or recipe.lora is None) and recipe.model.quantize:
        problems.append(("model.quantize", "quantized weights cannot be trained without lora; set it to null"))
    for i, stage in enumerate(recipe.stages):
        problems += [(f"stages.{i}.{path}", said) for path, said in _stage_needs(stage, recipe)]
    return problems


def _stage_needs(stage, recipe: Recipe) -> list[tuple[str, str]]:
    """What a stage needs of the rest of the recipe."""
    if stage.stage == "pretrain":
        odd = stage.batch_size % recipe.processes
        return [("batch_size", f"must be a multiple of processes ({recipe.processes})")] if odd else []
    needs: list[tuple[str, str]] = []
    if recipe.data is not None:
        data = recipe.data
        document = isinstance(data, BenchmarkData) or data.document is not None
        if stage.stage in ("cpt", "sft") and not data.train:
            needs.append(("stage", f"{stage.stage} needs labelled examples; set data.train"))
        if stage.stage == "cpt" and not document:
            needs.append(("stage", "cpt needs a document; set data.document"))
        if stage.stage == "rl" and not (data.rl or data.train):
            needs.append(("stage", "rl needs prompts; set data.rl or data.train"))
        if stage.stage == "rl" and stage.sft_coef and stage.rehearsal < 1 and not data.train:
            needs.append(("sft_coef", "needs labelled examples; set data.train"))
        if stage.stage == "rl" and stage.policy_aware and not document:
            needs.append(("policy_aware", "needs a document; set data.document, or policy_aware: 0"))
        if getattr(stage, "document_fraction", 0) and not document:
            needs.append(("document_fraction", "needs a document; set data.document, or 0"))
        if stage.validate_every and not data.validation:
            needs.append(("validate_every", "needs held-out examples; set data.validation, or 0"))
    whole = recipe.lora is None or any(other.stage == "pretrain" for other in recipe.stages)
    if stage.rehearsal and whole:
        needs.append(("rehearsal", "no base to write the texts without lora; set it to 0, or give lora a rank"))
    if stage.stage == "rl" and whole:
        if stage.kl_coef:
            needs.append(("kl_coef", "no reference without lora; set it to 0, or give lora a rank"))
        if stage.policy_aware and stage.policy_aware_sampler == "reference":
            said = "no reference without lora; set it to model, or give lora a rank"
            needs.append(("policy_aware_sampler", said))
    return needs
