"""Full fine-tuning: the language model's own weights instead of adapters, and the folder they are saved as."""

import shutil
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mpi_mlx.atomic import replace_dir, temporary_dir
from mpi_mlx.errors import CheckpointError, ModelError
from mpi_mlx.models.base import Model
from mpi_mlx.models.pixels import pixel_limit, write_limit

WEIGHTS = "model.safetensors"


def train_all_weights(model: Model) -> None:
    """Unfreezes the language model, its embeddings and head included; the vision tower stays frozen.

    Raises:
        ModelError: the base is quantized; its weights are not the numbers that would be trained.
    """
    if model.has_adapters:
        raise ModelError("the model has adapters; load the base again to train its own weights")
    if model.config.get("quantization") or model.config.get("quantization_config"):
        raise ModelError(f"{model.base} is quantized, lora: null trains plain weights; give lora a rank")
    model.net.freeze()
    (model.net.language_model if "language_model" in model.net else model.net).unfreeze()


def save_model(model: Model, target: Path) -> None:
    """The whole model as a folder that ``load_model`` reads: the base's files and its weights, in one rename.

    A limit on an image's pixels that was set when the model was loaded stands in the folder's processor files.
    """
    with temporary_dir(target) as temporary:
        for path in model.path.iterdir():
            # neither an index of shards, nor a card that speaks of the base
            if path.is_file() and ".safetensors" not in path.name and path.name != "README.md":
                shutil.copy(path, temporary / path.name)
        weights = dict(tree_flatten(model.net.parameters()))
        mx.save_safetensors(str(temporary / WEIGHTS), weights, {"format": "mlx"})
        limit = pixel_limit(model)
        if limit is not None:
            write_limit(temporary, limit)
        replace_dir(temporary, target)


def restore_model(model: Model, folder: Path) -> None:
    """Puts the weights that ``save_model`` wrote back on the model they came from.

    Raises:
        CheckpointError: the file is missing or broken, or of another model.
    """
    try:
        model.net.load_weights(str(folder / WEIGHTS))
    except (OSError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read ({said}); train into another --output") from None
