"""Questions about the document itself: each section asked for by its heading."""

from __future__ import annotations

from mpi_mlx.documents.load import PolicyDocument, _flatten
from mpi_mlx.documents.markdown import headings


def passages(document: PolicyDocument) -> list[tuple[str, str]]:
    """(question, section) of every section, from its heading to the next one, blank lines joined.

    A heading with text under it is asked for in full; one that is a whole rule by itself, by its first word.
    Sections that show an image are left out: no answer can hold one.

    >>> passages(PolicyDocument.from_text("# Refunds\\nWithin 30 days."))
    [('Recall Refunds.', 'Refunds Within 30 days.')]
    """
    flat, _ = _flatten(document.parts)
    lines = flat.split("\n")
    found = list(headings(flat))
    ends = [*(line for line, _, _ in found[1:]), len(lines)]
    out = []
    for (line, _, heading), following in zip(found, ends, strict=False):
        body = " ".join(" ".join(lines[line + 1 : following]).split())
        if "\x00" in body or "\x00" in heading:
            continue
        asked = heading.strip() if body else heading.split()[0]
        out.append((f"Recall {asked}.", f"{heading.strip()} {body}".strip()))
    return out
