"""How large a model is and what training it will take."""

from dataclasses import dataclass

from mlx.utils import tree_flatten

from mpi_mlx import runtime
from mpi_mlx.models.attention import KEEP_BYTES, LARGE_BYTES
from mpi_mlx.models.base import Model

_OPTIMIZER_COPIES = {"adamw": 2, "adam": 2, "muon": 1, "sgd": 0}


def count_parameters(model: Model) -> tuple[int, int]:
    """(all, trainable) parameters; packed weights count as the numbers they stand for, once where tied."""
    total = 0
    for _, module in model.net.named_modules():
        bits = getattr(module, "bits", None)
        for name, value in module.items():
            if hasattr(value, "size") and not name.startswith("_") and hasattr(value, "dtype"):
                if bits and name in ("scales", "biases"):
                    continue
                total += value.size * 32 // bits if bits and name == "weight" else value.size
    trainable = sum(value.size for _, value in tree_flatten(model.net.trainable_parameters()))
    return total, trainable


def _unfused(scores: int) -> int:
    """Bytes that MLX's own attention keeps on GPUs for `scores` bytes of float32 scores: four arrays of 16 bits."""
    return 2 * scores if scores <= LARGE_BYTES else 0


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, by what they are for."""

    weights: int
    adapter: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.optimizer + self.activations + self.logits


def memory_estimate(
    model: Model,
    *,
    rows: int,
    tokens: int,
    shared: int = 0,
    groups: int = 1,
    optimizer: str = "adamw",
    gradient_checkpointing: bool = False,
    head_chunk: int = 512,
) -> MemoryEstimate:
    """What one micro step will take, in bytes.

    On CPU: 4.5 GB for pretraining SmolLM2-135M on a document of 844 tokens and 8 rows of 160 (4.3 measured), 0.10
    for the embedded model's (0.13 measured, with its pictures, which are not counted here).

    Args:
        rows, tokens: of the micro step's batch, every row as long as the longest.
        shared: leading tokens that the rows of a group have in common; they are forwarded once a group.
        groups: how many such beginnings there are.
        head_chunk: positions whose logits exist at a time.
    """
    weights = sum(value.nbytes for _, value in tree_flatten(model.net.parameters()))
    trainable = [value for _, value in tree_flatten(model.net.trainable_parameters())]
    adapter = sum(value.nbytes for value in trainable)
    size, hidden, layers = model.dtype.size, model.hidden_size, model.num_layers
    text = model.config.get("text_config") or model.config
    inner = text.get("intermediate_size", 4 * hidden)
    heads = text.get("num_attention_heads", 1)
    own = tokens - shared
    places = groups * shared + rows * own
    per_token = (10 * hidden + 5 * inner) * size  # what one layer keeps for its backward pass
    scores, beginnings = 4 * rows * heads * own * tokens, 4 * groups * heads * shared * shared
    # attention in parts: larger ones are taken again in the backward pass
    in_parts = scores if scores <= KEEP_BYTES else 0
    if runtime.on_cpu():
        scores = in_parts
    else:
        scores = (in_parts if shared else _unfused(scores)) + _unfused(beginnings)
    layer = places * per_token + scores
    # the layer that is computed again holds its second forward and its gradients at once
    again = layers * places * hidden * size + 2 * layer
    kept = again if gradient_checkpointing else layers * layer
    logits = 3 * min(head_chunk, places) * model.vocab_size * 4
    states = sum(
        4 * value.size * (_OPTIMIZER_COPIES.get(optimizer, 2) + (value.dtype.size < 4)) for value in trainable
    )
    return MemoryEstimate(weights - adapter, 2 * adapter, states, kept, logits)
