"""YAML with line numbers, and changes to it from the command line."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mpi_mlx.errors import RecipeError

Keys = tuple[str | int, ...]
FILES = ("document", "train", "rl", "validation", "test", "clevr_root")  # of a `data` block


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number, as YAML 1.2 does and 1.1 does not."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


class Document:
    """A YAML mapping as plain Python, and where each of its values came from.

    ``places``: path -> what stands before an error there, such as ``recipes/x.yaml:12``.
    """

    def __init__(self, text: str, name: str):
        self.name = name
        self.places: dict[Keys, str] = {(): f"{name}:1"}
        self.errors: list[str] = []
        self.raw: Any = self._read(text, (), lambda line: f"{name}:{line}")
        if self.raw is None:
            self.raw = {}
        if not isinstance(self.raw, dict):
            found = _kind(self.raw)
            raise RecipeError(f"{name}:1: a recipe is a mapping (model: ..., stages: ...), found {found}")

    def place(self, path: Keys) -> str:
        """Of the value at ``path``, or of the nearest mapping around it that is there."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]

    def set(self, change: str) -> None:
        """Applies ``stages.1.steps=50``; the value is YAML. Adds to ``errors`` what cannot be done."""
        place = f"--set {change}"
        dotted, equals, text = change.partition("=")
        path = self._numbered(tuple(int(p) if p.isdigit() else p for p in dotted.strip().split(".")))
        if not equals or "" in path:
            self.errors.append(f"{place}: write path=value, such as stages.1.steps=50")
            return
        parent = self.raw
        for i, part in enumerate(path[:-1]):
            parent = self._inside(parent, path[: i + 1], part, place)
            if parent is None:
                return
        if not self._reachable(parent, path, place):
            return
        self.places = {known: at for known, at in self.places.items() if known[: len(path)] != path}
        self.places[path] = place
        last = path[-1]
        if isinstance(parent, dict) and path[0] == "stages" and last in ("steps", "epochs"):
            parent.pop("epochs" if last == "steps" else "steps", None)  # one replaces the other
        parent[last] = _from_here(path, self._read(text, path, lambda _: place))

    def _numbered(self, path: Keys) -> Keys:
        """``stages.rl`` and ``rewards.format`` by their number, where there is one such."""
        found, out = self.raw, []
        for part in path:
            if isinstance(found, list) and isinstance(part, str):
                kinds = [item.get("stage", item.get("kind")) for item in found if isinstance(item, dict)]
                if len(kinds) == len(found) and kinds.count(part) == 1:
                    part = kinds.index(part)
            out.append(part)
            try:
                found = found[part]
            except (KeyError, IndexError, TypeError):
                found = None
        return tuple(out)

    def _inside(self, parent: Any, path: Keys, part: str | int, place: str) -> Any:
        """The mapping or list at ``path`` on the way to a value; made where there is none."""
        if not self._reachable(parent, path, place):
            return None
        found = parent.get(part) if isinstance(parent, dict) else parent[part]
        if path == ("model",) and isinstance(found, str):  # shorthand for {base: ...}
            found = parent[part] = {"base": found}
        if found is None:
            found = parent[part] = {}
            self.places[path] = place
        return found

    def _reachable(self, parent: Any, path: Keys, place: str) -> bool:
        above, part = ".".join(map(str, path[:-1])), path[-1]
        if isinstance(parent, dict):
            return True
        if not isinstance(parent, list):
            self.errors.append(f"{place}: {above} is {_kind(parent)}; it has no {part!r}")
        elif not isinstance(part, int) or part >= len(parent):
            allowed = f"0 to {len(parent) - 1}" if parent else "none, the list is empty"
            which = f"item {part}" if isinstance(part, int) else f"single {part!r}"
            self.errors.append(f"{place}: {above} has no {which}; allowed: {allowed}")
        else:
            return True
        return False

    # ---- reading

    def _read(self, text: str, path: Keys, at) -> Any:
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            return None if node is None else self._build(loader, node, path, at)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self._broken(at(mark.line + 1 if mark else 1), error.problem or error.context or "not YAML")
        except yaml.YAMLError as error:
            self._broken(at(1), str(error).splitlines()[0])
        except RecursionError:
            self._broken(at(1), "an alias that contains itself")
        except ValueError as error:  # a date such as 2024-13-45
            self._broken(at(1), str(error))

    def _broken(self, place: str, why: str) -> None:
        raise RecipeError(f"{place}: not valid YAML: {' '.join(why.split())}")

    def _build(self, loader: _Loader, node: yaml.Node, path: Keys, at) -> Any:
        self.places.setdefault(path, at(node.start_mark.line + 1))
        if isinstance(node, yaml.SequenceNode):
            return [self._build(loader, item, (*path, i), at) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node, deep=True)
        self._refuse_duplicates(loader, node, path, at)
        loader.flatten_mapping(node)
        built = {}
        for key_node, value_node in node.value:
            key = self._key(loader, key_node)
            self.places[(*path, key)] = at(key_node.start_mark.line + 1)
            built[key] = self._build(loader, value_node, (*path, key), at)
        return built

    def _refuse_duplicates(self, loader: _Loader, node: yaml.MappingNode, path: Keys, at) -> None:
        first: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: own keys override what it brings
                continue
            key, line = self._key(loader, key_node), key_node.start_mark.line + 1
            if key in first:
                dotted = ".".join(map(str, (*path, key)))
                self.errors.append(f"{at(line)}: {dotted}: given twice, first on line {first[key]}; keep one")
            first.setdefault(key, line)

    def _key(self, loader: _Loader, node: yaml.Node) -> str | int:
        if not isinstance(node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=node.start_mark)
        key = loader.construct_object(node)
        return key if isinstance(key, (str, int)) and not isinstance(key, bool) else node.value


def read_document(text: str, name: str, changes: Sequence[str] = ()) -> Document:
    """The document with its ``changes`` applied. Raises RecipeError where the text is not YAML."""
    document = Document(text, name)
    for change in changes:
        document.set(change)
    return document


def _from_here(path: Keys, value: Any) -> Any:
    """Files named on the command line are relative to where it is typed, not to the recipe."""
    if isinstance(value, dict):
        return {key: _from_here((*path, key), inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_from_here((*path, i), inner) for i, inner in enumerate(value)]
    file = path[:1] == ("data",) and path[-1] in FILES
    if path in (("model",), ("model", "base")) and isinstance(value, str):
        place = Path(os.path.expanduser(value))
        return str(place.absolute()) if place.is_dir() else value
    if isinstance(value, str) and (file or path[-1] == "function"):
        return str(Path(os.path.expanduser(value)).absolute())
    return value


def _kind(value: Any) -> str:
    kinds = {type(None): "null", bool: "true or false", str: "text", list: "a list", dict: "a mapping"}
    return kinds.get(type(value), "a number")
