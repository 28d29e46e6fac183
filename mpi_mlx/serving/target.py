"""What `chat` and `serve` are pointed at: a run, an adapter, a model folder or a hub id."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

from mpi_mlx.errors import MPIError, ServingError

MAX_TOKENS = 1024  # of an answer, where nothing else says


@dataclass(frozen=True)
class Target:
    """A model to talk to, and how.

    Attributes:
        name: what the server calls it.
        base: as :func:`mpi_mlx.models.load_model` takes it.
        adapter: a folder with ``adapters.safetensors``, or None.
        options: further arguments of ``load_model``.
        max_tokens, temperature, top_p: sampling defaults. A run answers as it was evaluated: greedily.
        data, data_folder: the recipe's ``data`` block, where the document comes from.
        trained: whether it comes from a run, so that it is meant to be asked without its document.
    """

    name: str
    base: str
    adapter: Path | None = None
    options: dict = field(default_factory=dict)
    max_tokens: int = MAX_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    data: Any = None
    data_folder: Path | None = None
    trained: bool = False

    def load(self):
        """The :class:`~mpi_mlx.models.base.Model`, adapter on."""
        from mpi_mlx.models import load_model

        return load_model(self.base, adapter=self.adapter, **self.options)

    def document(self):
        """The recipe's :class:`~mpi_mlx.documents.PolicyDocument`, or None where there is none."""
        if self.data is None:
            return None
        from mpi_mlx.data.dataset import load_dataset
        from mpi_mlx.documents import load_document

        if getattr(self.data, "benchmark", None):  # the document without the scenes
            few = {"train": 0, "validation": 0, "test": 0, "rl": None}
            return load_dataset(self.data.model_copy(update=few), self.data_folder).document
        path = self.data.document
        return None if path is None else load_document(Path(self.data_folder, path))


def resolve_target(text: str | os.PathLike, *, stage: str | None = None) -> Target:
    """What ``text`` names: the output folder of ``mpi-mlx train``, an adapter folder, a model folder, a hub
    id or ``embedded:tiny``.

    Args:
        stage: of a run, the model after this stage (``sft``, ``2-sft``); by default the last that is there.

    Raises:
        ServingError: the folder is none of these, or the run has nothing to load yet.
        RecipeError: the run's recipe does not load.
    """
    text = os.fspath(text)
    folder = Path(text).expanduser()
    if (folder / "recipe.yaml").is_file():
        return _run(folder, stage)
    if stage is not None:
        raise ServingError(f"{text} is no run, so it has no stage {stage!r}; give the output folder of a run")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        return _adapter(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ServingError(
            f"{text} holds neither a run (recipe.yaml) nor a model (config.json) nor an adapter; give one"
        )
    name = folder.resolve().name if folder.is_dir() else text
    return _with_generation_defaults(Target(name=name, base=text))


def _run(folder: Path, stage: str | None) -> Target:
    from mpi_mlx.recipe import load_recipe

    recipe = load_recipe(folder / "recipe.yaml")
    spec = recipe.model
    found = _trained(folder, stage)
    options: dict = {"quantize": spec.quantize, "max_pixels": spec.max_pixels, "dtype": spec.dtype}
    target = Target(
        name=folder.resolve().name if stage is None else f"{folder.resolve().name}:{stage}",
        base=str(found) if found.name == "model" else spec.base,
        max_tokens=recipe.evaluation.max_completion_tokens,
        data=recipe.data,
        data_folder=recipe.folder,
        trained=True,
    )
    if found.name == "model":
        return replace(target, options={"max_pixels": spec.max_pixels})
    if spec.init == "random":
        options |= {"init": "random", "seed": recipe.seed}
    return replace(target, adapter=found, options=options)


def _trained(folder: Path, stage: str | None) -> Path:
    """The folder ``adapter`` or ``model`` of the whole run or of a stage."""
    stages = [path for path in folder.glob("stages/*") if re.match(r"\d+-", path.name)]
    stages.sort(key=lambda path: int(path.name.partition("-")[0]))
    if stage is not None:
        chosen = [path for path in stages if stage in (path.name, path.name.partition("-")[2])]
        if not chosen:
            names = ", ".join(path.name for path in stages) or "none yet"
            raise ServingError(f"{folder} has no stage {stage!r}; its stages are {names}")
        places = chosen[::-1]
    else:
        places = [folder, *stages[::-1]]
    for place in places:
        for kind, proof in (("adapter", "adapters.safetensors"), ("model", "config.json")):
            if (place / kind / proof).is_file():
                return place / kind
    raise ServingError(
        f"{places[0]}: no adapter or model in it yet; finish the run with mpi-mlx train {quote(str(folder))} --resume"
    )


def _adapter(folder: Path) -> Target:
    """An adapter folder inside a run is the run's; else its config names the base."""
    from mpi_mlx.models.adapters import recorded_limit

    resolved = folder.resolve()
    for run, stage in ((resolved.parent, None), (resolved.parents[2], resolved.parent.name)):
        if (run / "recipe.yaml").is_file():
            return replace(_run(run, stage), adapter=folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ServingError(f"{folder / 'adapter_config.json'} is broken ({error}); copy it again") from None
    base = config.get("mpi_mlx", {}).get("base") or config.get("base_model_name_or_path")
    if not base:
        raise ServingError(f"{folder} does not name its base; serve the base with --adapter NAME={folder}")
    target = _with_generation_defaults(Target(name=resolved.name, base=base))
    limit = recorded_limit(folder)
    options = {} if limit is None else {"max_pixels": limit}
    return replace(target, adapter=folder, trained=True, options=options)


def _with_generation_defaults(target: Target) -> Target:
    """Sampling as generation_config.json asks for it: a temperature only with ``do_sample``."""
    from mpi_mlx.models.folders import resolve_base

    try:
        file = resolve_base(target.base) / "generation_config.json"
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (MPIError, OSError, ValueError):
        return target  # load_model will say what is wrong
    if not isinstance(config, dict) or not config.get("do_sample"):
        return target
    return replace(
        target,
        temperature=float(config.get("temperature") or 1.0),
        top_p=float(config.get("top_p") or 1.0),
    )
