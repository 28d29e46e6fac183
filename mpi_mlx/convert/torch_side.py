"""The other side of a comparison: transformers (and peft) on torch, where a user has them."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mpi_mlx.convert.configs import quiet_transformers
from mpi_mlx.models.probe import MROPE, Probe, image_id, read_config


def torch_is_here() -> bool:
    return importlib.util.find_spec("torch") is not None and importlib.util.find_spec("peft") is not None


def torch_inputs(config: dict, probe: Probe) -> dict:
    """Keyword arguments of the transformers model, as torch tensors."""
    import torch

    keys = {"input_ids": torch.from_numpy(probe.ids)}
    keys["attention_mask"] = torch.ones_like(keys["input_ids"])
    keys.update({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in probe.images.items()})
    kind = config["model_type"]
    if kind in MROPE:
        keys["mm_token_type_ids"] = (keys["input_ids"] == image_id(config)).int()
    if kind in ("gemma3", "paligemma"):
        keys["token_type_ids"] = torch.zeros_like(keys["input_ids"])
    return keys


def torch_logits(model, config: dict, probes: Iterable[Probe]) -> list[np.ndarray]:
    """Logits float32 (T, V) of each probe from a transformers (or peft) model on its device."""
    import torch

    with torch.no_grad(), silence():
        return [model(**torch_inputs(config, p)).logits[0].float().numpy() for p in probes]


def load_torch(folder: str | Path, *, dtype: str = "float32"):
    """The transformers model of a folder, and its loading report (missing, unexpected, mismatched keys)."""
    import transformers

    config = read_config(folder)
    cls = getattr(transformers, config["architectures"][0])
    with silence():
        model, info = cls.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, attn_implementation="eager"
        )
    return model.eval(), info


@contextmanager
def silence():
    """transformers' progress bars, and its warnings about the keys that are there for MLX."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            logging.enable_progress_bar()
