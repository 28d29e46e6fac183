"""What an adapter's own base has changed against another one: PEFT's modules_to_save."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mpi_mlx.convert.adapters import Adapter
from mpi_mlx.convert.layout import Entry, Layout, head_and_embedding, same_but_for_rounding
from mpi_mlx.convert.weights import is_quantized, read_layout
from mpi_mlx.errors import ConversionError

_LEAVES = ("weight", "bias")


def add_changed_modules(adapter: Adapter, layout: Layout, base: Path, trained_on: Path | None) -> list[str]:
    """Add to ``adapter.saved`` the modules that ``trained_on`` has otherwise than ``base`` (``layout``), whole.

    A base that only had its type narrowed or widened has not changed. Returns notes. Raises ConversionError where
    PEFT cannot hold what changed: it keeps a module either adapted or saved.
    """
    entries, notes, where = layout.entries, [], str(trained_on or base)
    if trained_on is not None and trained_on.resolve() != base.resolve() and not is_quantized(trained_on):
        # norms that MLX holds plus one are compared as they round there
        other = read_layout(trained_on, None if layout.in_tree else base)[1]
        if layout.in_tree and not other.in_tree:
            layout = read_layout(base, trained_on)[1]
        entries = other.entries
        adapter.saved = {**_changed(layout, other, trained_on), **adapter.saved}
        if any(n in layout.entries and e.dtype != layout.entries[n].dtype for n, e in entries.items()):
            notes.append(f"{trained_on} holds the base's weights in another type, and differs from it by that rounding")
    _complete(adapter, entries, where)
    return notes


def _changed(layout: Layout, other: Layout, trained_on: Path) -> dict[str, Entry]:
    head, embedding = head_and_embedding(layout.family)
    theirs, changed = dict(other.entries), {}
    if other.tied and not layout.tied:
        theirs[head] = replace(theirs[embedding], name=head)
    for name, entry in theirs.items():
        mine = layout.entries.get(embedding if name == head and layout.tied else name)
        if mine is None or mine.shape != entry.shape:
            raise ConversionError(f"the adapter was trained on {trained_on}, whose {name} the base has not")
        if not same_but_for_rounding(mine, entry):
            changed[name] = entry
    if embedding in changed and other.tied and layout.tied:
        # peft's copy of a tied embedding is no longer the head's weight
        changed[head] = replace(changed[embedding], name=head)
    # matrices tell whether it is another model; saved norms and biases are many and small
    matrices = [name for name, entry in theirs.items() if len(entry.shape) > 1]
    differ = [name for name in matrices if name in changed]
    if len(differ) > len(matrices) // 4:
        raise ConversionError(
            f"the adapter was trained on {trained_on}, and {len(differ)} of its {len(matrices)} matrices differ from "
            "the base: give the base it was trained on"
        )
    return changed


def _complete(adapter: Adapter, entries: dict[str, Entry], where: str) -> None:
    """PEFT saves whole modules: with a changed weight goes its bias, and the other way round."""
    for name in list(adapter.saved):
        module, _, leaf = name.rpartition(".")
        if module in adapter.modules:
            raise ConversionError(
                f"{name} of {where} differs from the base and is adapted too, which PEFT cannot hold: give the base "
                "it was trained on as --base, or fold the adapter in with `mpi-mlx convert fuse`"
            )
        if leaf not in _LEAVES or not module:
            raise ConversionError(
                f"{name} of {where} differs from the base and is no module of its own, which PEFT cannot save: give "
                "the base it was trained on as --base, or fold the adapter in with `mpi-mlx convert fuse`"
            )
        for sibling in (f"{module}.{leaf}" for leaf in _LEAVES):
            if sibling in entries:
                adapter.saved.setdefault(sibling, entries[sibling])
