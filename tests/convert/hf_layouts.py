"""The same checkpoint as transformers 4 would have left it, and as mlx-vlm saves it."""

from __future__ import annotations

import json
from pathlib import Path

from mpi_mlx.convert import families as fam
from mpi_mlx.convert.shards import copied, open_checkpoint, write_checkpoint


def _old_rope(text: dict) -> None:
    params = text.pop("rope_parameters", None)
    if not params:
        return
    if "full_attention" in params:
        text["rope_theta"] = params["full_attention"]["rope_theta"]
        text["rope_local_base_freq"] = params["sliding_attention"]["rope_theta"]
        return
    params = dict(params)
    text["rope_theta"] = params.pop("rope_theta")
    if "mrope_section" in params:
        text["rope_scaling"] = {"type": "mrope", "mrope_section": params["mrope_section"]}
    elif params["rope_type"] != "default":
        text["rope_scaling"] = params


def as_version_4(source: Path, destination: Path, *, in_memory_names: bool = False) -> Path:
    """Rewrite a folder of transformers 5 as version 4 had it.

    Config: rope_theta and rope_scaling, torch_dtype, and Qwen2-VL's text values at the top. Weights: the
    vision tower with its vision_model level, or (4.52 and later, as trainers save state dicts) module names.
    """
    destination.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    family = fam.family_of(config)
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.57.1" if in_memory_names else "4.49.0"
    text = config.get("text_config", config)
    if family.name not in ("qwen3_5",):
        _old_rope(text)
    config.get("vision_config", {}).pop("rope_parameters", None)
    if family.name in ("qwen2_vl", "qwen2_5_vl") and not in_memory_names:
        config.pop("text_config")
        text.pop("model_type")
        text.pop("layer_types", None)
        config = {**text, **config}
        config["vision_config"]["model_type"] = family.name
    (destination / "config.json").write_text(json.dumps(config))
    outputs = []
    for name, tensor in open_checkpoint(source).tensors.items():
        disk = fam.disk_name(family, name)
        outputs.append(copied(tensor, fam.memory_name(family, disk) if in_memory_names else disk))
    write_checkpoint(destination, outputs)
    return destination
