"""Reading a real CLEVR v1.0 folder: ``scenes/CLEVR_{split}_scenes.json`` and ``images/{split}/*.png``.

CLEVR is published at https://cs.stanford.edu/people/jcjohns/clevr/ (Johnson et al., 2017). Its test split has
no scenes, so rulebooks over CLEVR use ``train`` and ``val``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpi_mlx.data.examples import collected
from mpi_mlx.data.scenes import ATTRIBUTES, Scene, SceneArrays, SceneObject, in_reading_order
from mpi_mlx.documents.images import check_image
from mpi_mlx.errors import DataError

REACH = 4.3  # objects stand within 3 of the middle along CLEVR's axes, so within 4.25 along the camera's
PICTURE = (480, 320)


@dataclass(frozen=True)
class ClevrPicture:
    """One picture of the folder with its scene."""

    scene: Scene
    image: Path
    split: str


def read_clevr_folder(
    folder: str | Path, split: str = "train", *, limit: int | None = None
) -> list[ClevrPicture]:
    """The pictures of one split, in the file's order; of equal scenes (see Scene.key) the first.

    ``x`` and ``y`` are the objects' places on the ground along the camera's right and front, which is how
    CLEVR itself defines its relations. Raises one DataError for all that is missing or odd.
    """
    folder = Path(folder).expanduser()
    path = folder / "scenes" / f"CLEVR_{split}_scenes.json"
    if not path.is_file():
        raise DataError(
            f"{folder}: no scenes/{path.name} in it; give the folder CLEVR_v1.0 as it is unpacked"
        )
    try:
        scenes = json.loads(path.read_text(encoding="utf-8"))["scenes"]
        if not isinstance(scenes, list):
            raise TypeError
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error}); unpack the archive again") from None
    except (KeyError, TypeError):
        raise DataError(f"{path}: no list 'scenes' in it; this is not a CLEVR v1.0 scenes file") from None
    errors: list[str] = []
    pictures, known = [], set()
    for index, raw in enumerate(scenes):
        if limit is not None and len(pictures) >= limit:
            break
        picture = _picture(raw, f"{path}: scenes[{index}]", folder / "images" / split, split, errors)
        if picture is not None and picture.scene.key not in known:
            known.add(picture.scene.key)
            pictures.append(picture)
    if errors:
        raise DataError(collected(errors, str(path)))
    if not pictures:
        raise DataError(f"{path}: the file lists no scenes")
    return pictures


def arrays_of(pictures: Sequence[ClevrPicture]) -> SceneArrays:
    """All scenes as arrays, in the pictures' order."""
    return SceneArrays.of([picture.scene for picture in pictures])


def _picture(raw: Any, where: str, images: Path, split: str, errors: list[str]) -> ClevrPicture | None:
    if not isinstance(raw, dict) or not isinstance(raw.get("objects"), list):
        errors.append(f"{where}: expected an object with a list 'objects'")
        return None
    name = raw.get("image_filename")
    if not isinstance(name, str):
        errors.append(f"{where}.image_filename: expected a file name, found {name!r}")
        return None
    image = images / name
    problem = None if image.is_file() else check_image(image)
    if problem:
        errors.append(f"{where}.image_filename: {problem}; unpack images/{split} as well")
        return None
    before = len(errors)
    objects = [_object(o, raw, f"{where}.objects[{i}]", errors) for i, o in enumerate(raw["objects"])]
    if len(errors) > before:
        return None
    return ClevrPicture(Scene(in_reading_order(objects)), image.resolve(), split)


def _object(raw: Any, scene: dict, where: str, errors: list[str]) -> SceneObject | None:
    raw = raw if isinstance(raw, dict) else {}
    values = {}
    for name, allowed in ATTRIBUTES.items():
        values[name] = raw.get(name)
        if values[name] not in allowed:
            errors.append(f"{where}.{name}: expected one of {', '.join(allowed)}, found {values[name]!r}")
            return None
    try:
        x, y = _place(raw, scene.get("directions"))
    except (KeyError, TypeError, ValueError, IndexError):
        errors.append(f"{where}: needs 3d_coords (and the scene's directions) or pixel_coords")
        return None
    return SceneObject(**values, x=round(x, 4), y=round(y, 4))


def _place(raw: dict, directions: dict | None) -> tuple[float, float]:
    """0..1 to the right and to the front: along the camera's directions, else by the pixel."""
    if directions is not None and "3d_coords" in raw:
        at = np.array(raw["3d_coords"][:2], float)
        place = [float(at @ np.array(directions[side][:2], float)) for side in ("right", "front")]
        x, y = (0.5 + p / (2 * REACH) for p in place)
    else:
        x, y = (float(p) / side for p, side in zip(raw["pixel_coords"][:2], PICTURE, strict=True))
    if not (np.isfinite(x) and np.isfinite(y)):
        raise ValueError("not a place")
    return min(max(x, 0.0), 0.9999), min(max(y, 0.0), 0.9999)
