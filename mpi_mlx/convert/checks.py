"""Proof of a conversion: every key has its place, and the logits on probe inputs agree."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mpi_mlx.convert import families as fam
from mpi_mlx.convert.layout import FLOATS, Layout, head_and_embedding
from mpi_mlx.convert.report import ConversionReport
from mpi_mlx.convert.shards import DTYPE_NAMES
from mpi_mlx.errors import ConversionError

# largest relative errors of the logits that a good conversion shows: where values are only copied (both libraries in
# float32: up to 5e-4 by what they compute otherwise), and where a merge or another type rounds them to 8 bits
COPIED, ROUNDED = 1e-2, 0.2


def expected_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Parameters that MLX builds from the folder's config.json, by tree name."""
    from mpi_mlx.models.probe import parameter_shapes

    try:
        return parameter_shapes(folder)
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError) as e:
        why = " ".join(str(e).split())[:200]
        raise ConversionError(f"mlx cannot build a model from the config: {why}") from None


def check_coverage(layout: Layout, folder: Path) -> str:
    """Compare the layout's tensors with the model that the config in ``folder`` describes.

    Raises ConversionError naming the first missing, unexpected or wrongly shaped tensor. Returns a sentence.
    """
    family = layout.family
    want = expected_shapes(folder)
    have = {}
    for name, entry in layout.entries.items():
        shape = tuple(entry.shape)
        if fam.is_convolution(family, name):
            shape = fam.transposed(shape, fam.TO_TREE[len(shape)])
        have[fam.tree_name(family, name)] = shape
    head, embedding = head_and_embedding(family)
    if layout.tied and fam.tree_name(family, head) in want:
        have[fam.tree_name(family, head)] = have[fam.tree_name(family, embedding)]
    problems = [f"{n} is missing" for n in sorted(set(want) - set(have))]
    problems += [f"{n} has no place in the model" for n in sorted(set(have) - set(want))]
    problems += [
        f"{n} has shape {have[n]}, the config asks for {want[n]}"
        for n in sorted(set(have) & set(want))
        if have[n] != want[n]
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConversionError(f"the weights do not fit the config: {problems[0]}{more}")
    return f"all {len(want)} parameters of the MLX model, none missing, none left over"


def memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def fits(nbytes: int) -> bool:
    """Whether a check of a model of so many bytes in float32 leaves memory to spare."""
    return not memory_bytes() or nbytes <= 0.6 * memory_bytes()


class Side(NamedTuple):
    """What gives logits: ``library`` ("mlx" or "torch") on ``folder``, with ``adapter`` on it.

    ``made``: the conversion made this folder, so it must load without a key missing or left over.
    """

    label: str
    library: str
    folder: Path
    adapter: Path | None = None
    made: bool = False


def _mlx_logits(side: Side, config: dict, probes):
    import mlx.core as mx

    from mpi_mlx.models import probe

    net = probe.load_net(side.folder, adapter=side.adapter)
    probe.to_float32(net)
    out = probe.mlx_logits(net, config, probes)
    del net
    gc.collect()
    mx.clear_cache()
    return out


def _torch_logits(side: Side, config: dict, probes, report: ConversionReport):
    """Logits, or None (and a note) for a source that transformers cannot load as it lies."""
    from mpi_mlx.convert import torch_side

    model, info = torch_side.load_torch(side.folder)
    wrong = {
        k: sorted(map(str, info[k]))[:3]
        for k in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info.get(k)
    }
    if wrong and side.made:
        raise ConversionError(f"{side.label}: transformers reports {wrong}; nothing was written")
    if "missing_keys" in wrong or "mismatched_keys" in wrong:
        report.notes.append(f"{side.label} cannot run: it reports {wrong}")
        return None
    if side.adapter is not None:
        from peft import PeftModel

        with torch_side.silence():
            model = PeftModel.from_pretrained(model, side.adapter).eval()
    return torch_side.torch_logits(model, config, probes)


def bound_of(layout: Layout, dtype: str | None = None, *, rounds: bool = False) -> float:
    """The error of the logits above which a conversion of ``layout`` has failed.

    ``dtype`` as asked for; ``rounds``: the values go through a narrower type on the way. MLX rounds norms that it
    holds plus one by itself when it loads them, in any type but float32.
    """
    code = DTYPE_NAMES[dtype] if dtype else None
    narrowed = code not in (None, "F32") and any(e.dtype in FLOATS - {code} for e in layout.entries.values())
    plus_one = any(fam.is_shifted_norm(layout.family, n) and e.dtype != "F32" for n, e in layout.entries.items())
    return ROUNDED if rounds or narrowed or plus_one else COPIED


def check_logits(
    report: ConversionReport, config: dict, sides: list[Side], nbytes: int, bound: float = COPIED
) -> None:
    """Run the probes on each side and report the error of every side against the first that ran.

    Torch sides are skipped where torch is not installed. ``nbytes``: size of the model in float32, to leave
    out what memory cannot hold. Raises ConversionError for logits that are not finite or further off than ``bound``,
    and for a result that transformers does not load whole.
    """
    from mpi_mlx.convert import torch_side
    from mpi_mlx.models import probe

    if not fits(nbytes):
        report.notes.append(f"no check on probe inputs: {nbytes / 1e9:.0f} GB in float32 do not fit in memory")
        return
    probes = probe.probe_inputs(config)
    ran = []
    for side in sides:
        if side.library == "mlx":
            ran.append((side.label, _mlx_logits(side, config, probes)))
        elif torch_side.torch_is_here():
            logits = _torch_logits(side, config, probes, report)
            ran += [] if logits is None else [(side.label, logits)]
    for label, logits in ran:
        if not all(np.isfinite(part).all() for part in logits):
            raise ConversionError(f"{label}: the logits on probe inputs are not finite; nothing was written")
    if len(ran) < 2:
        why = "" if torch_side.torch_is_here() else " (torch is not installed)"
        report.notes.append(f"no check on probe inputs: source and result cannot both run here{why}")
        return
    first, reference = ran[0]
    for label, logits in ran[1:]:
        for p, ours, theirs in zip(probes, logits, reference, strict=True):
            report.errors[f"{p.name}: {label} against {first}"] = probe.relative_error(ours, theirs)
    name, worst = max(report.errors.items(), key=lambda item: item[1])
    if worst > bound:
        raise ConversionError(
            f"the logits are off by {worst:.1e} on {name}, where {bound:g} is the most that a good conversion shows; "
            "nothing was written (--no-check writes it anyway)"
        )
