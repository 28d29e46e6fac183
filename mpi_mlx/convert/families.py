"""The layout tables: how each family names its tensors on disk, in transformers and in MLX.

Three name spaces. *Disk*: what a converted folder holds; mlx-vlm (mlx-lm for text-only families) and
transformers 5 both load it. *Memory*: transformers 5's modules, and so PEFT's keys. *Tree*: mlx-vlm's
modules, and so MLX adapters and folders that mlx-vlm itself saved. Disk to tree is a rename and, for the
patch embedding (and qwen3_5's conv1d), a transpose; qwen3_5's norms also differ by one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from mpi_mlx.errors import ConversionError

_VL = (
    ("visual.", "model.visual.", "vision_tower."),
    ("model.", "model.language_model.", "language_model.model."),
)
_HEAD = ("lm_head.", "lm_head.", "language_model.lm_head.")
_QWEN3 = (
    ("model.visual.", "model.visual.", "vision_tower."),
    ("model.language_model.", "model.language_model.", "language_model.model."),
    _HEAD,
)
_IDEFICS = (
    ("model.text_model.", "model.text_model.", "language_model."),
    ("model.vision_model.", "model.vision_model.", "vision_model."),
    ("model.connector.", "model.connector.", "connector."),
    _HEAD,
)
_LLAVA = (
    ("language_model.model.", "model.language_model.", "language_model.model."),
    ("language_model.lm_head.", "lm_head.", "language_model.lm_head."),
    ("multi_modal_projector.", "model.multi_modal_projector.", "multi_modal_projector."),
)
_TOWER = (("vision_tower.vision_model.", "model.vision_tower.", "vision_tower.vision_model."),)
_TEXT = (("model.", "model.", "model."), ("lm_head.", "lm_head.", "lm_head."))
_NEVER = r"rotary_emb\.inv_freq$|\.position_ids$|^mtp\."


@dataclass(frozen=True)
class Family:
    """One row of the table. ``prefixes``: (disk, memory, tree); ``conv`` ends the patch embedding's name."""

    name: str
    prefixes: tuple[tuple[str, str, str], ...]
    conv: str | None = None
    # older or other spellings met on disk, renamed to disk names
    aliases: tuple[tuple[str, str], ...] = ()
    dropped: str = _NEVER
    text_only: bool = False
    # MLX builds a separate head for a tied model, so the embedding is written under this name too
    tied_head: str | None = None
    note: str = ""


_SIGLIP = "patch_embedding.weight"
FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        Family("qwen2_vl", (*_VL, _HEAD), "patch_embed.proj.weight"),
        Family("qwen2_5_vl", (*_VL, _HEAD), "patch_embed.proj.weight"),
        Family("qwen3_vl", _QWEN3, "patch_embed.proj.weight"),
        Family(
            "qwen3_5",
            _QWEN3,
            "patch_embed.proj.weight",
            note="norms are stored minus one, mlx-vlm adds it when it loads; its chunked delta rule loses "
            "3e-5 where a head forgets fast (exp(A_log) near 16)",
        ),
        Family("smolvlm", _IDEFICS, _SIGLIP, tied_head="lm_head.weight"),
        Family("idefics3", _IDEFICS, _SIGLIP, tied_head="lm_head.weight"),
        Family("llava", (*_LLAVA, *_TOWER), _SIGLIP),
        Family(
            "llava_onevision",
            (*_LLAVA, *_TOWER, ("image_newline", "model.image_newline", "image_newline")),
            _SIGLIP,
        ),
        Family(
            "internvl",
            (*_LLAVA, ("vision_tower.", "model.vision_tower.", "vision_tower.")),
            "patch_embeddings.projection.weight",
            note="mlx-vlm's vision tower uses the tanh GELU where transformers has the exact one",
        ),
        Family(
            "gemma3",
            (*_LLAVA, *_TOWER),
            _SIGLIP,
            dropped=_NEVER + r"|^vision_tower\.vision_model\.head\.",
            note="tied only; mlx-vlm rounds sqrt(hidden) to bfloat16 (1e-4 where it is no bfloat16 number) "
            "and attends causally inside an image",
        ),
        Family("paligemma", (*_LLAVA, *_TOWER), _SIGLIP, note="tied only; one image a prompt"),
        Family("llama", _TEXT, text_only=True),
        Family("qwen2", _TEXT, text_only=True),
        Family("qwen3", _TEXT, text_only=True),
        Family("gemma3_text", _TEXT, text_only=True, note="mlx rounds sqrt(hidden) to bfloat16, as gemma3"),
    )
}


def family_of(config: dict) -> Family:
    """The table row of a config; raises ConversionError naming the supported families."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ConversionError(
            f"no layout table for model_type {kind!r}; supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[kind]


def _swap(name: str, rules: list[tuple[str, str]]) -> str | None:
    """Apply the rule with the longest matching prefix."""
    best = max((r for r in rules if name.startswith(r[0])), key=lambda r: len(r[0]), default=None)
    return None if best is None else best[1] + name[len(best[0]) :]


def disk_name(family: Family, name: str) -> str | None:
    """Disk name of a tensor or module spelled in any of the three spaces, or in a known older way."""
    rules = [(space, row[0]) for row in family.prefixes for space in row]
    rules += list(family.aliases)
    if family.text_only:
        rules += [("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")]
    if any(row == _TOWER[0] for row in family.prefixes):
        # transformers 5 saves the tower without its vision_model level; 4.52-4.57 keep it in memory too
        rules += [("vision_tower.", "vision_tower.vision_model."), (
            "model.vision_tower.vision_model.", "vision_tower.vision_model.")]  # fmt: skip
    if family.name == "internvl":
        rules += [("language_model.model.model.", "language_model.model.")]
        rules += [("language_model.model.lm_head.", "language_model.lm_head.")]
    return _swap(name, rules)


def tree_name(family: Family, disk: str) -> str:
    """MLX module path of a disk name."""
    return _swap(disk, [(row[0], row[2]) for row in family.prefixes]) or disk


def memory_name(family: Family, disk: str) -> str:
    """transformers module path (PEFT's key, less its own prefix) of a disk name."""
    return _swap(disk, [(row[0], row[1]) for row in family.prefixes]) or disk


def is_dropped(family: Family, disk: str) -> bool:
    return re.search(family.dropped, disk) is not None


# --- transposes --------------------------------------------------------------------------------------------

TO_DISK = {5: (0, 4, 1, 2, 3), 4: (0, 3, 1, 2), 3: (0, 2, 1)}
TO_TREE = {5: (0, 2, 3, 4, 1), 4: (0, 2, 3, 1), 3: (0, 2, 1)}


def is_convolution(family: Family, disk: str) -> bool:
    """Whether MLX stores the tensor with its axes in another order."""
    if family.name == "qwen3_5" and disk.endswith("conv1d.weight"):
        return True
    return family.conv is not None and disk.endswith(family.conv)


def transposed(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[a] for a in axes)


def in_tree_order(
    config: dict, shapes: dict[str, tuple[int, ...]], family: Family, format: str | None
) -> bool:
    """Whether a checkpoint's convolutions lie in MLX's axis order, judged by the patch embedding's shape.

    ``shapes`` maps disk names to stored shapes. The channel axis is second on disk and last in MLX; where
    both fit (a patch as wide as there are channels) the files' own format entry decides.
    """
    if family.conv is None:
        return format == "mlx"
    vision = config.get("vision_config") or {}
    channels = vision.get("in_channels") or vision.get("num_channels") or vision.get("in_chans") or 3
    for name, shape in shapes.items():
        if name.endswith(family.conv):
            disk, tree = shape[1] == channels, shape[-1] == channels
            if disk and tree:
                return format == "mlx"
            if not disk and not tree:
                raise ConversionError(
                    f"{name} has shape {shape}: no axis has the {channels} channels of the config"
                )
            return tree
    return format == "mlx"


# --- qwen3_5's norms ---------------------------------------------------------------------------------------

_SHIFTED = re.compile(
    r"(\.input_layernorm|\.post_attention_layernorm|model\.language_model\.norm|\.q_norm|\.k_norm)\.weight$"
)


def is_shifted_norm(family: Family, disk: str) -> bool:
    """Text norms that qwen3_5 stores minus one on disk."""
    return family.name == "qwen3_5" and ".language_model." in disk and _SHIFTED.search(disk) is not None


def unshift(tree: np.ndarray, source: np.ndarray | None, add_one) -> np.ndarray:
    """Disk form of a float32 norm held plus one in MLX; entries that ``source`` rounds to are taken from it.

    ``add_one`` maps the source to the tree's rounding; without a source, minus one is all there is.
    """
    plain = tree - 1.0
    if source is None:
        return plain
    return np.where(add_one(source) == tree, source, plain)
