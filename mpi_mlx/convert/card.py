"""The README card of a converted folder: what it is made from and what may be done with it."""

from __future__ import annotations

import re
from pathlib import Path

import yaml


def front_matter(path: Path) -> dict:
    """The YAML head of a README, or nothing."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---"):
        return {}
    try:
        head = yaml.safe_load(text.split("---", 2)[1])
    except (yaml.YAMLError, IndexError):
        return {}
    return head if isinstance(head, dict) else {}


def recorded_on_card(folder: Path) -> int | None:
    """The limit on images' pixels that ``to-peft`` put on an adapter's card, or None."""
    own = front_matter(folder / "README.md").get("mpi_mlx")
    limit = own.get("max_pixels") if isinstance(own, dict) else None
    return limit if isinstance(limit, int) and limit > 0 else None


def original(source: str, folder: Path | None) -> str:
    """What a folder that ``to-mlx`` wrote was made from, by its card; else the source as it is named."""
    if folder is None or not Path(source).expanduser().is_dir():
        return source
    card = folder / "README.md"
    named = front_matter(card).get("base_model")
    ours = isinstance(named, str) and "`mpi-mlx convert to-mlx`" in card.read_text(encoding="utf-8", errors="replace")
    return named if ours else source


def find_license(folder: Path | None) -> tuple[str | None, str | None]:
    """(license as the base's card names it, name of a license file beside it)."""
    if folder is None:
        return None, None
    head = front_matter(folder / "README.md")
    file = next((p.name for p in sorted(folder.glob("LICENSE*")) if p.is_file()), None)
    return head.get("license"), file


def write_card(
    work: Path,
    *,
    source: str,
    action: str,
    quantize: int | None = None,
    stages: list[str] | None = None,
    document: dict | None = None,
    adapter: dict | None = None,
    license_from: Path | None = None,
    license: str | None = None,
    max_pixels: int | None = None,
    peft: bool = False,
) -> None:
    """Write README.md: base, stages, the document's hash and the license, as far as they are known.

    ``max_pixels``: the limit on images' pixels, where it is another than the base's. ``peft``: it is an adapter's card,
    which alone can carry that limit.
    """
    named, file = find_license(license_from)
    license = license or named
    base = original(source, license_from)
    library = "peft" if peft else "mlx"
    head: dict = {"library_name": library, "tags": [library, "mpi-mlx"], "base_model": base}
    if peft and max_pixels:
        head["mpi_mlx"] = {"max_pixels": max_pixels}
    if license:
        head["license"] = license
    rows = [("Base", f"`{base}`" + (f", as in `{source}`" if base != source else ""))]
    rows.append(("Made by", f"`mpi-mlx convert {action}`"))
    if stages:
        rows.append(("Stages", ", ".join(stages)))
    if document:
        rows.append(
            ("Document", f"{document.get('name', '')} (sha256 `{document.get('sha256', 'unknown')}`)")
        )
    if adapter:
        rows.append(("Adapter", ", ".join(f"{k} {v}" for k, v in adapter.items())))
    if max_pixels:
        rows.append(("Images", f"at most {max_pixels:,} pixels each (`max_pixels`), as in training"))
    weights = f"{quantize}-bit, MLX only" if quantize else "for mlx-vlm or mlx-lm and transformers 5"
    rows.append(("Weights", "an adapter for peft" if peft else weights))
    text = license or "the base names none: ask its authors before you pass this on"
    rows.append(("License", text + (f" (see {file})" if file else "")))
    table = "\n".join(f"| {k} | {v} |" for k, v in rows)
    title = re.sub(r"^\.(.+)\.\d+\.partial$", r"\1", work.name)
    if stages:
        what = "An adapter" if peft else "A model"
        told = f"{what} with its policy document trained into the weights; it answers without the document."
    else:
        told = "A converted adapter." if peft else "A converted checkpoint."
    (work / "README.md").write_text(
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {title}\n\n{told}\n\n"
        f"| | |\n|---|---|\n{table}\n"
    )
