"""Proof of a conversion: every key has its place, and the logits on probe inputs agree."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np

from mpi_mlx.convert import families as fam
from mpi_mlx.convert.layout import Layout, head_and_embedding
from mpi_mlx.convert.report import ConversionReport
from mpi_mlx.errors import ConversionError


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


def _mlx_side(folder: Path, config: dict, probes, adapter: Path | None):
    import mlx.core as mx

    from mpi_mlx.models import probe

    net = probe.load_net(folder, adapter=adapter)
    probe.to_float32(net)
    out = probe.mlx_logits(net, config, probes)
    del net
    gc.collect()
    mx.clear_cache()
    return out


def _torch_side(folder: Path, config: dict, probes, adapter: Path | None):
    from mpi_mlx.convert import torch_side

    model, info = torch_side.load_torch(folder)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    wrong = {
        k: sorted(map(str, v))[:3]
        for k, v in info.items()
        if v and k in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    return torch_side.torch_logits(model, config, probes), wrong


def check_logits(
    report: ConversionReport,
    config: dict,
    sides: list[tuple[str, str, Path, Path | None]],
    nbytes: int,
) -> None:
    """Run the probes on each side and report the error of every side against the first that ran.

    ``sides``: (label, "mlx" or "torch", model folder, adapter folder or None); torch sides are skipped where
    torch is not installed. ``nbytes``: size of the model in float32, to leave out what memory cannot hold.
    """
    from mpi_mlx.convert import torch_side
    from mpi_mlx.models import probe

    if memory_bytes() and nbytes > 0.6 * memory_bytes():
        report.notes.append(
            f"no check on probe inputs: {nbytes / 1e9:.0f} GB in float32 do not fit in memory"
        )
        return
    probes = probe.probe_inputs(config)
    ran = []
    for label, kind, folder, adapter in sides:
        if kind == "torch" and not torch_side.torch_is_here():
            continue
        if kind == "torch":
            logits, wrong = _torch_side(folder, config, probes, adapter)
            if wrong:
                report.notes.append(f"transformers reports {wrong} for {label}")
        else:
            logits = _mlx_side(folder, config, probes, adapter)
        ran.append((label, logits))
    for label, logits in ran:
        if not all(np.isfinite(part).all() for part in logits):
            raise ConversionError(f"{label}: the logits on probe inputs are not finite; nothing was written")
    if len(ran) < 2:
        report.notes.append(
            "no check on probe inputs: source and result cannot both run here (torch is not installed)"
        )
        return
    first, reference = ran[0]
    for label, logits in ran[1:]:
        for p, ours, theirs in zip(probes, logits, reference, strict=True):
            report.errors[f"{p.name}: {label} against {first}"] = probe.relative_error(ours, theirs)
