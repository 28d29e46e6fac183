"""The table of families: how tensors are renamed, and the errors measured on tiny random checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np

from mpi_mlx.convert import torch_side
from mpi_mlx.convert.families import FAMILIES, Family, family_of
from mpi_mlx.convert.weights import to_hf, to_mlx
from mpi_mlx.errors import ConversionError
from mpi_mlx.models import probe

START, END = "<!-- measured: mpi-mlx convert table -->", "<!-- end of measured -->"
TIED_ONLY = {"gemma3", "paligemma", "paligemma2"}
PROBES = ("text", "image", "two images", "text after image")


@dataclass
class Row:
    """Worst relative logits errors of one family; ``exact``: bfloat16 tensors back bit for bit, of all."""

    name: str
    family: Family
    heads: str
    to_mlx: dict[str, float] = field(default_factory=dict)
    to_hf: float = 0.0
    peft: float = 0.0
    exact: tuple[int, int] = (0, 0)


def _worst(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    return max(probe.relative_error(a, b) for a, b in zip(ours, theirs, strict=True))


def _adapter_error(source: Path, mlx: Path, config: dict, probes, work: Path) -> float:
    """A random LoRA on every linear, from peft to MLX."""
    import peft
    import torch

    from mpi_mlx.convert.peft import from_peft

    model, _ = torch_side.load_torch(source)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.1)
    model.save_pretrained(work / "peft")
    from_peft(work / "peft", work / "adapter", base=mlx, check=False)
    ours = probe.mlx_logits(probe.load_net(mlx, adapter=work / "adapter"), config, probes)
    return _worst(ours, torch_side.torch_logits(model.eval(), config, probes))


def _exact(kind: str, tied: bool, work: Path) -> tuple[int, int]:
    """HF -> MLX -> saved by MLX -> HF in bfloat16: tensors with the same bits, of all."""
    import torch

    from mpi_mlx.convert import specimens

    model = specimens.build(kind, tied).to(torch.bfloat16)
    model.save_pretrained(work / "bf16")
    to_mlx(work / "bf16", work / "bf16-mlx", check=False)
    specimens.as_mlx_saves(work / "bf16-mlx", work / "bf16-saved")
    to_hf(work / "bf16-saved", work / "bf16-back", base=work / "bf16", check=False)
    again, _ = torch_side.load_torch(work / "bf16-back", dtype="bfloat16")
    before, after = model.state_dict(), again.state_dict()
    same = sum(torch.equal(before[k].view(torch.uint8), after[k].view(torch.uint8)) for k in before)
    return same, len(before)


def measure(kinds: list[str] | None = None) -> Iterator[Row]:
    """Measure each family against transformers and peft on this machine.

    Raises ConversionError where torch, transformers' torch side or peft are not installed.
    """
    if not torch_side.torch_is_here():
        raise ConversionError(
            "the table is measured against torch and peft: `pip install torch peft` and try again"
        )
    import torch

    from mpi_mlx.convert.specimens import FAMILIES as KINDS

    torch.set_num_threads(1)
    for kind in kinds or KINDS:
        row = Row(kind, family_of({"model_type": kind.split("-")[0].replace("paligemma2", "paligemma")}), "tied")
        with torch_side.silence():
            _measure(row, True)
            if kind not in TIED_ONLY:
                row.heads = "tied, untied"
                _measure(row, False)
        yield row


def _measure(row: Row, tied: bool) -> None:
    """Measure one checkpoint of a family, and keep what is worse in ``row``."""
    from mpi_mlx.convert import specimens

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        specimens.build(row.name, tied).save_pretrained(work / "hf")
        config = probe.read_config(work / "hf")
        probes = probe.probe_inputs(config)
        to_mlx(work / "hf", work / "mlx", check=False)
        model, _ = torch_side.load_torch(work / "hf")
        theirs = torch_side.torch_logits(model, config, probes)
        ours = probe.mlx_logits(probe.load_net(work / "mlx"), config, probes)
        for p, a, b in zip(probes, ours, theirs, strict=True):
            row.to_mlx[p.name] = max(row.to_mlx.get(p.name, 0.0), probe.relative_error(a, b))
        _, net = specimens.as_mlx_saves(work / "mlx", work / "trained", noise=0.05)
        to_hf(work / "trained", work / "back", check=False)
        back, _ = torch_side.load_torch(work / "back")
        error = _worst(torch_side.torch_logits(back, config, probes), probe.mlx_logits(net, config, probes))
        row.to_hf = max(row.to_hf, error)
        row.peft = max(row.peft, _adapter_error(work / "hf", work / "mlx", config, probes, work))
        same, count = _exact(row.name, tied, work)
        row.exact = (row.exact[0] + same, row.exact[1] + count)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


def markdown(rows: list[Row]) -> str:
    """The measured table and the layout table, as Markdown."""
    packages = ("transformers", "mlx-vlm", "mlx-lm", "mlx", "torch", "peft")
    found = ", ".join(f"{p} {version(p)}" for p in packages)
    lines = [
        f"Measured with {found}, on random float32 models of about 0.1M parameters, on the CPU.",
        "",
        "| checkpoint | head | text | image | two images | text after image | to-hf | PEFT | bf16 round trip |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        cells = [_number(r.to_mlx.get(p)) for p in PROBES] + [_number(r.to_hf), _number(r.peft)]
        lines.append(f"| {r.name} | {r.heads} | {' | '.join(cells)} | {r.exact[0]} of {r.exact[1]} tensors |")
    return "\n".join([*lines, "", *layout_lines()])


def layout_lines() -> list[str]:
    """The renames and transposes of every family, and what to know about it; needs no torch."""
    lines = [
        "| family | on disk | in transformers (PEFT's keys) | in MLX | transposed | note |",
        "|---|---|---|---|---|---|",
    ]
    for f in FAMILIES.values():
        columns = ["<br>".join(f"`{row[i]}`" for row in f.prefixes) for i in range(3)]
        conv = [f.conv.removesuffix(".weight")] if f.conv else []
        conv += ["conv1d"] if f.name == "qwen3_5" else []
        turned = "<br>".join(f"`{c}`" for c in conv)
        note = f.note + ("; tied: the head is written again" if f.tied_head else "")
        lines.append(
            f"| {f.name} | {' | '.join(columns)} | {turned or '-'} | {note.removeprefix('; ') or '-'} |"
        )
    return lines


def write_into(path: Path, text: str) -> None:
    """Replace what stands between the markers of a Markdown file.

    Raises ConversionError if it has no markers.
    """
    page = path.read_text() if path.is_file() else ""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ConversionError(f"{path} has no lines {START!r} and {END!r} to write between")
    path.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}")
