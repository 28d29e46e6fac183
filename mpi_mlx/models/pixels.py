"""The limit on an image's pixels: in a loaded processor, and in the files that a processor is made from.

mlx-vlm and transformers 5 read Qwen's limit from the same two places: ``max_pixels``, which goes first, and
``size.longest_edge`` (an area, in spite of its name).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from mpi_mlx.errors import ModelError

LIMITED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")  # the other families' image sizes are fixed
UNSTATED = 28 * 28 * 1280  # what mlx-vlm and transformers take where the files say nothing


def pixel_limit(model) -> int | None:
    """The most pixels that a loaded model cuts an image into; None where its image processor knows no limit."""
    limit = getattr(getattr(model.processor, "image_processor", None), "max_pixels", None)
    return limit if isinstance(limit, int) else None


def stated_limit(folder: Path) -> int | None:
    """The limit that a model folder's processor will have; None where its family knows none.

    Raises:
        ModelError: a file is no JSON object.
    """
    if _read(folder / "config.json").get("model_type") not in LIMITED:
        return None
    stated: dict = {}
    for _, _, settings in _settings(folder):
        stated |= settings
    limit = stated.get("max_pixels") or (stated.get("size") or {}).get("longest_edge")
    return limit or UNSTATED


def write_limit(folder: Path, limit: int) -> bool:
    """Writes the limit into a model folder's processor files, as mlx-vlm and transformers read it.

    Returns False, and changes nothing, where the family knows none or the folder has no such file.

    Raises:
        ModelError: a file is no JSON object.
    """
    if stated_limit(folder) is None:
        return False
    found = list(_settings(folder))
    for path, content, settings in found:
        settings["max_pixels"] = limit
        if isinstance(settings.get("size"), dict) and "longest_edge" in settings["size"]:
            settings["size"]["longest_edge"] = limit
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return bool(found)


def _settings(folder: Path) -> Iterator[tuple[Path, dict, dict]]:
    """(file, its content, the image processor's part of it), of the file first that gives way to the other."""
    path = folder / "preprocessor_config.json"
    content = _read(path)
    if content:
        yield path, content, content
    path = folder / "processor_config.json"  # as transformers 5 saves it
    content = _read(path)
    if isinstance(content.get("image_processor"), dict):
        yield path, content, content["image_processor"]


def _read(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is broken ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no object; copy it again")
    return content
