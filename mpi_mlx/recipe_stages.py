"""The stages of a recipe and the rewards of its ``rl`` stages."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mpi_mlx.recipe_fields import Bool, Float, FunctionPath, Int, Spec, Str, refuse

REHEARSAL_TOKENS = 104  # the longest text of stages.rehearsal
Task = Literal["document", "walk", "recall", "lookup", "repeat", "check", "describe", "ask"]
Depth = Annotated[
    Int,
    Field(ge=1, le=6),
    BeforeValidator(lambda key: int(key) if isinstance(key, str) and key.isdigit() else key),  # JSON's keys
]


# ---- rewards


class _Reward(Spec):
    weight: Float = Field(1.0, allow_inf_nan=False, description="Its weight in the sum; may be negative.")


class ExactMatchReward(_Reward):
    """1 when the answer equals the example's, case and blanks aside."""

    kind: Literal["exact_match"] = Field(description="The answer equals the example's.")


class FormatReward(_Reward):
    """1 when the completion is one trace in think tags and an answer (or has no tags: reasoning false)."""

    kind: Literal["format"] = Field(description="One trace in think tags, then an answer.")


class RegexReward(_Reward):
    """1 when a pattern is found."""

    kind: Literal["regex"] = Field(description="A pattern is found.")
    pattern: Str = Field(description="Python regular expression, searched; a dot matches newlines.")
    of: Literal["answer", "completion"] = Field("answer", description="Where to look.")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise PydanticCustomError(
                "pattern", "a Python regular expression ({why})", {"why": str(error)}
            ) from None
        return pattern


class ToolCallReward(_Reward):
    """The answer's tool calls against the example's: names and arguments."""

    kind: Literal["tool_call"] = Field(description="The right tool with the right arguments.")
    partial_credit: Bool = Field(True, description="Right name and some arguments earn a share.")


class JsonReward(_Reward):
    """The answer is JSON; with keys, the share of them that it has."""

    kind: Literal["json"] = Field(description="The answer is JSON.")
    keys: tuple[Str, ...] = Field((), description="Keys that the object should have.")


class TraceReward(_Reward):
    """How true the trace is to a built-in benchmark's document."""

    kind: Literal["trace"] = Field(description="The trace walks the document's tree rightly (benchmarks).")


class FunctionReward(_Reward):
    """One's own: ``function(completions, examples) -> numbers``."""

    kind: Literal["function"] = Field(description="A function of your own.")
    function: FunctionPath = Field(description="file.py:function, the file relative to the recipe's folder.")


Reward = Annotated[
    ExactMatchReward
    | FormatReward
    | RegexReward
    | ToolCallReward
    | JsonReward
    | TraceReward
    | FunctionReward,
    Field(discriminator="kind"),
]


# ---- stages


class _Stage(Spec):
    learning_rate: Float = Field(2.0e-4, gt=0, allow_inf_nan=False, description="Peak learning rate.")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: on matrices, AdamW elsewhere.")
    weight_decay: Float = Field(0.0, ge=0, allow_inf_nan=False, description="Decoupled weight decay.")
    warmup: Float = Field(0.1, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="The rate after warm-up.")
    min_lr_ratio: Float = Field(0.1, ge=0, le=1, description="The last rate's share of the peak.")
    clip_norm: Float = Field(
        1.0, ge=0, allow_inf_nan=False, description="Limit of the gradients' global L2 norm; 0: none."
    )
    gradient_checkpointing: Bool = Field(False, description="Less memory, a third more time.")
    save_every: Int = Field(50, ge=1, description="Steps between checkpoints.")
    validate_every: Int = Field(0, ge=0, description="Steps between looks at the validation set; 0: never.")
    patience: Int = Field(0, ge=0, description="Validations without progress before stopping at the best; 0: off.")

    def _contradictions(self) -> list[tuple[str, str]]:
        if self.patience and not self.validate_every:
            return [("patience", "needs validations; set validate_every")]
        return []

    @model_validator(mode="after")
    def _resolve(self):
        refuse(self._contradictions())
        return self


def _rehearsal_length(stage) -> list[tuple[str, str]]:
    if not stage.rehearsal or stage.max_tokens is None or stage.max_tokens >= REHEARSAL_TOKENS:
        return []
    return [("max_tokens", f"texts to rehearse take up to {REHEARSAL_TOKENS}; raise it, or rehearsal: 0")]


class _LabelledStage(_Stage):
    steps: Int | None = Field(None, ge=1, description="Optimizer steps; or give epochs.")
    epochs: Float | None = Field(None, gt=0, allow_inf_nan=False, description="Passes over the train split.")
    batch_size: Int = Field(16, ge=1, description="Rows of a forward.")
    accumulate: Int = Field(1, ge=1, description="Forwards of a step.")
    reasoning: Bool = Field(True, description="Whether the trace before the answer is trained.")
    max_tokens: Int | None = Field(None, ge=1, description="Longest sequence allowed; null: any.")
    rehearsal: Float = Field(0.0, ge=0, lt=1, description="Share of rows that are the base's own texts.")

    def _contradictions(self) -> list[tuple[str, str]]:
        problems = super()._contradictions()
        if self.steps is None and self.epochs is None:
            problems.append(("steps", "missing; give steps or epochs"))
        if self.steps is not None and self.epochs is not None:
            problems.append(("epochs", "given beside steps; keep one of the two"))
        return problems + _rehearsal_length(self)


class CptStage(_LabelledStage):
    """Visually masked continual pretraining: document, query, trace and answer, all text tokens trained."""

    stage: Literal["cpt"] = Field(description="Continual pretraining on the document.")
    document_questions: Float = Field(
        0.0, ge=0, le=1, description="Share of rows that ask for a section, without the document in context."
    )


class SftStage(_LabelledStage):
    """Supervised fine-tuning without the document."""

    stage: Literal["sft"] = Field(description="Supervised fine-tuning.")
    document_fraction: Float = Field(0.0, ge=0, le=1, description="Share of rows with the document.")


class RlStage(_Stage):
    """Reinforcement learning from checked answers: GRPO, DAPO or Dr.GRPO, with or without PolicyRollout."""

    epochs: ClassVar[None] = None

    stage: Literal["rl"] = Field(description="Reinforcement learning.")
    algorithm: Literal["grpo", "dapo", "dr_grpo"] = Field("grpo", description="Sets the defaults below.")
    steps: Int = Field(ge=1, description="Rollout batches.")
    learning_rate: Float = Field(2.0e-5, gt=0, allow_inf_nan=False, description="Peak learning rate.")
    prompts: Int = Field(8, ge=1, description="Prompts a step.")
    group_size: Int = Field(8, ge=1, description="Completions of a prompt, sampled without the document.")
    policy_aware: Int = Field(0, ge=0, description="So many more, sampled with the document.")
    policy_aware_sampler: Literal["model", "reference"] = Field(
        "model", description="Who samples them; reference: adapters switched off."
    )
    importance_weight: Bool = Field(False, description="Weigh their tokens by the ratio to their sampler, 2 at most.")
    clip_low: Float | None = Field(
        None, gt=0, lt=1, description="The ratio is clipped below 1 - clip_low. Default: clip_high, else 0.2."
    )
    clip_high: Float | None = Field(
        None, gt=0, allow_inf_nan=False, description="And above 1 + clip_high. Default: clip_low; dapo 0.28."
    )
    dual_clip: Float | None = Field(None, gt=1, allow_inf_nan=False, description="Its bound where advantages are < 0.")
    kl_coef: Float = Field(0.0, ge=0, allow_inf_nan=False, description="Weight of the KL to the reference.")
    temperature: Float = Field(1.0, gt=0, allow_inf_nan=False, description="Of sampling.")
    top_p: Float = Field(1.0, gt=0, le=1, description="Sample among tokens of this probability in all.")
    max_completion_tokens: Int = Field(256, ge=1, description="Longest completion.")
    updates_per_rollout: Int = Field(1, ge=1, description="Passes over each step's rollouts.")
    minibatches: Int = Field(1, ge=1, description="Optimizer updates of a pass, each on its share of the prompts.")
    aggregation: Literal["sequence", "token", "constant"] | None = Field(
        None, description="What the loss is divided by. Default: grpo sequence, dapo token, dr_grpo constant."
    )
    scale_advantages: Bool | None = Field(
        None, description="Divide by the group's standard deviation. Default true; dr_grpo false."
    )
    negative_weight: Float = Field(1.0, ge=0, allow_inf_nan=False, description="Of advantages below 0.")
    drop_constant: Bool | None = Field(
        None, description="Drop groups whose rewards are all alike. Default false; dapo true."
    )
    refill: Bool | None = Field(None, description="Sample others in their place. Default: dapo, if dropped.")
    max_refill: Int = Field(4, ge=1, description="Most rounds of refilling a step.")
    overlong_buffer: Int = Field(0, ge=0, description="Last tokens, where length is punished; 0: none.")
    sft_coef: Float = Field(0.0, ge=0, allow_inf_nan=False, description="Weight of an SFT loss.")
    sft_batch_size: Int = Field(8, ge=1, description="Labelled rows a step for it.")
    micro_tokens: Int = Field(8192, ge=1, description="Tokens of a forward, at most (or one group).")
    document_fraction: Float = Field(0.0, ge=0, le=1, description="As in sft, for sft_coef.")
    rehearsal: Float = Field(0.0, ge=0, le=1, description="As in sft, for sft_coef; 1: no labelled rows.")
    max_tokens: Int | None = Field(None, ge=1, description="As in sft, for sft_coef.")
    reasoning: Bool = Field(True, description="Whether completions are to hold a trace.")
    rewards: tuple[Reward, ...] = Field(
        (ExactMatchReward(kind="exact_match", weight=1.0), FormatReward(kind="format", weight=0.1)),
        min_length=1,
        description="What a completion earns: a weighted sum.",
    )

    @model_validator(mode="after")
    def _resolve(self):
        dapo = self.algorithm == "dapo"
        by_algorithm = {"grpo": "sequence", "dapo": "token", "dr_grpo": "constant"}
        self._fill(clip_low=min(0.2, self.clip_high or 0.2) if dapo else self.clip_high or 0.2)
        self._fill(
            clip_high=max(0.28, self.clip_low) if dapo else self.clip_low,
            aggregation=by_algorithm[self.algorithm],
            scale_advantages=self.algorithm != "dr_grpo",
            drop_constant=dapo,
        )
        self._fill(refill=dapo and self.drop_constant)
        refuse(self._contradictions())
        return self

    def _contradictions(self) -> list[tuple[str, str]]:
        problems = super()._contradictions()
        if self.clip_low > self.clip_high:
            said = f"found {self.clip_low:g}, allowed: clip_high ({self.clip_high:g}) or less"
            problems.append(("clip_low", said))
        elif self.clip_low != self.clip_high and self.algorithm != "dapo":
            said = f"{self.algorithm} clips both sides alike; set it to clip_low, or algorithm: dapo"
            problems.append(("clip_high", said))
        if self.dual_clip and self.dual_clip <= 1 + self.clip_high:
            problems.append(("dual_clip", f"must be above 1 + clip_high ({1 + self.clip_high:g}); raise it"))
        if self.importance_weight and not self.policy_aware:
            problems.append(("importance_weight", "weighs policy-aware completions; set policy_aware"))
        if self.algorithm == "dapo" and self.kl_coef > 0:
            problems.append(("kl_coef", "dapo has no KL term; set it to 0, or algorithm: grpo"))
        if self.minibatches > self.prompts:
            problems.append(("minibatches", f"each takes a prompt or more; at most prompts ({self.prompts})"))
        if self.group_size + self.policy_aware < 2:
            problems.append(("group_size", "a group needs two completions; raise group_size or policy_aware"))
        if self.rehearsal and not self.sft_coef:
            problems.append(("rehearsal", "is a share of sft_coef's rows; set sft_coef"))
        problems += _rehearsal_length(self)
        if not any(reward.weight for reward in self.rewards):
            problems.append(("rewards", "every weight is 0; give one of them weight"))
        if self.refill and not self.drop_constant:
            problems.append(("refill", "nothing to refill; set drop_constant: true as well"))
        if self.overlong_buffer >= self.max_completion_tokens:
            longest = self.max_completion_tokens
            problems.append(("overlong_buffer", f"must be below max_completion_tokens ({longest})"))
        return problems


class PretrainStage(_Stage):
    """Training from random weights on generated scenes and documents: how the embedded model is made."""

    epochs: ClassVar[None] = None

    stage: Literal["pretrain"] = Field(description="Training from random weights on generated rows.")
    steps: Int = Field(ge=1, description="Optimizer steps.")
    batch_size: Int = Field(16, ge=1, description="Rows a step, of all processes together.")
    learning_rate: Float = Field(0.012, gt=0, allow_inf_nan=False, description="Peak learning rate.")
    optimizer: Literal["adamw", "muon"] = Field("muon", description="muon: on matrices, AdamW elsewhere.")
    tasks: dict[Task, Annotated[Float, Field(ge=0, allow_inf_nan=False)]] = Field(
        min_length=1, description="Share of each kind of row."
    )
    depths: dict[Depth, Annotated[Float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default_factory=lambda: {1: 1.0}, min_length=1, description="Share of each depth of document."
    )
    scenes_per_document: Int = Field(4, ge=1, description="Rows that share a document.")
    train_vision: Bool = Field(True, description="Whether the vision tower learns.")
    perception_loss: Float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Weight of naming each cell's object from visual tokens."
    )
    documents_per_micro: Int = Field(6, ge=1, description="Documents of a forward.")
    rows_per_micro: Int = Field(32, ge=1, description="Rows without a document of a forward.")

    def _contradictions(self) -> list[tuple[str, str]]:
        shares = {"tasks": self.tasks, "depths": self.depths}
        empty = [name for name, value in shares.items() if not sum(value.values())]
        problems = super()._contradictions() + [(name, "one share must be above 0") for name in empty]
        if self.validate_every:
            problems.append(("validate_every", "pretrain has no validation; leave it out"))
        return problems


Stage = Annotated[CptStage | SftStage | RlStage | PretrainStage, Field(discriminator="stage")]
