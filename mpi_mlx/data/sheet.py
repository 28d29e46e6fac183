"""A sheet of examples to look at: images, texts, and which tokens each stage trains (the loss mask)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mpi_mlx.data.examples import Example
from mpi_mlx.documents.images import open_image

STAGES = ("cpt", "sft", "rl")
EXPLAINED = {
    "cpt": "document in context; every text token is trained, image placeholders never",
    "sft": "no document; the assistant turn is trained",
    "rl": "no document; the sampled completion is trained (shown here: the labelled one)",
}
TRAINED = {"cpt": (191, 219, 254), "sft": (187, 232, 197), "rl": (254, 215, 170)}
HEADING = {"cpt": (29, 78, 216), "sft": (21, 128, 61), "rl": (194, 65, 12)}
INK, FAINT, LINE = (24, 24, 27), (140, 140, 148), (216, 216, 220)
PAPER, CARD, VISUAL = (246, 246, 247), (255, 255, 255), (228, 228, 231)
WIDTH, MARGIN, PAD = 1500, 28, 20
PICTURE = 220  # side of the box that an image is fitted to
SIZE, LEADING = 14, 19
HEAD_LINES, TAIL_LINES = 9, 5  # of a long sequence; what lies between is left out


@dataclass(frozen=True)
class Piece:
    """A run of tokens alike: their text, their number, whether they are trained or stand for an image."""

    text: str
    tokens: int
    trained: bool
    visual: bool = False


@dataclass(frozen=True)
class StageView:
    """One example as a stage sees it."""

    stage: str
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        return sum(p.tokens for p in self.pieces)

    @property
    def trained(self) -> int:
        return sum(p.tokens for p in self.pieces if p.trained)


@dataclass(frozen=True)
class Card:
    """One example with the views of up to three stages."""

    example: Example
    views: tuple[StageView, ...]


def pieces_of(
    ids: np.ndarray, weights: np.ndarray, visual: np.ndarray, decode: Callable[[list[int]], str]
) -> tuple[Piece, ...]:
    """Token ids (T,) with loss weights (T,) and image placeholders (bool (T,)), cut where either changes.

    ``decode`` turns ids into text with special tokens shown.
    """
    trained = np.asarray(weights) > 0
    kind = trained.astype(int) + 2 * np.asarray(visual)
    cuts = [0, *(np.flatnonzero(np.diff(kind)) + 1).tolist(), len(kind)]
    out = []
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        if start == stop:
            continue
        seen = bool(visual[start])
        text = f"[{stop - start} image tokens]" if seen else decode([int(i) for i in ids[start:stop]])
        out.append(Piece(text, stop - start, bool(trained[start]), seen))
    return tuple(out)


def card_of(example: Example, rows: dict[str, object], decode: Callable[[list[int]], str]) -> Card:
    """``rows``: by stage, what training makes of the example (training.batch.Row: encoded and weights)."""
    views = [
        StageView(stage, pieces_of(row.encoded.ids, row.weights, row.encoded.visual, decode))
        for stage, row in rows.items()
    ]
    return Card(example, tuple(views))


def draw_sheet(cards: Sequence[Card], title: str, facts: Sequence[str] = ()) -> Image.Image:
    """The sheet as an RGB picture: title, legend, then one card an example."""
    font, bold = _font("DejaVuSansMono.ttf", SIZE), _font("DejaVuSans-Bold.ttf", 22)
    plain, strong = _font("DejaVuSans.ttf", 15), _font("DejaVuSans-Bold.ttf", 15)
    blocks = [_Block(card, font) for card in cards]
    top = MARGIN + 40 + 24 * len(facts) + 30 * len(STAGES) + 12
    height = top + sum(b.height + PAD for b in blocks) + MARGIN
    sheet = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), title, INK, bold)
    y = MARGIN + 34
    for fact in facts:
        draw.text((MARGIN, y), fact, INK, plain)
        y += 24
    for stage in STAGES:
        draw.rounded_rectangle((MARGIN, y + 3, MARGIN + 54, y + 25), 5, TRAINED[stage])
        draw.text((MARGIN + 27, y + 14), stage, HEADING[stage], strong, anchor="mm")
        draw.text((MARGIN + 66, y + 14), EXPLAINED[stage], INK, plain, anchor="lm")
        y += 30
    y = top
    for block in blocks:
        block.draw(sheet, draw, y, font, plain, strong)
        y += block.height + PAD
    return sheet


class _Block:
    """Layout of one card: images at the left, one panel a stage at the right."""

    def __init__(self, card: Card, font: ImageFont.FreeTypeFont):
        self.card = card
        self.pictures = [_thumbnail(image) for image in card.example.images[:4]]
        self.left = MARGIN + PAD + (PICTURE + PAD if self.pictures else 0)
        wide = WIDTH - MARGIN - PAD - self.left
        half = (wide - PAD) // 2
        # The first view, with the document, over the full width; the two without it side by side below.
        self.panels: list[tuple[int, int, StageView, list]] = []
        y = PAD + 26
        for row in (card.views[:1], card.views[1:3]):
            lengths = [0]
            for n, view in enumerate(row):
                room = wide if len(row) == 1 else half
                lines = _shortened(_wrapped(view.pieces, int(room // font.getlength("m"))))
                self.panels.append((self.left + n * (half + PAD), y, view, lines))
                lengths.append(24 + LEADING * len(lines) + 16)
            y += max(lengths)
        images = sum(p.height + 10 for p in self.pictures)
        self.height = max(y + 4, PAD + 28 + images + 10)

    def draw(self, sheet, draw, top: int, font, plain, strong) -> None:
        box = (MARGIN, top, WIDTH - MARGIN, top + self.height)
        draw.rounded_rectangle(box, 10, CARD, LINE)
        example = self.card.example
        draw.text((MARGIN + PAD, top + 14), example.id, INK, strong)
        said = f"{_short(example.query, 90)}   \u2192   {_short(example.answer or '(no answer)', 60)}"
        draw.text((MARGIN + PAD + strong.getlength(example.id) + 18, top + 14), said, INK, plain)
        y = top + PAD + 28
        for picture in self.pictures:
            x = MARGIN + PAD
            sheet.paste(picture, (x, y))
            draw.rectangle((x, y, x + picture.width - 1, y + picture.height - 1), None, LINE)
            y += picture.height + 10
        for left, below, view, lines in self.panels:
            y = top + below
            label = f"{view.tokens} tokens, {view.trained} trained"
            draw.text((left, y), view.stage, HEADING[view.stage], strong)
            draw.text((left + 44, y), label, FAINT, plain)
            y += 24
            for line in lines:
                self._line(draw, left, y, line, view.stage, font)
                y += LEADING

    @staticmethod
    def _line(draw, left: int, y: int, line: list[tuple[str, Piece | None]], stage: str, font) -> None:
        x = float(left)
        for text, piece in line:
            wide = font.getlength(text)
            if piece is None:
                draw.text((x, y), text, FAINT, font)
            else:
                ground = VISUAL if piece.visual else TRAINED[stage] if piece.trained else None
                if ground:
                    draw.rectangle((x, y - 1, x + wide, y + LEADING - 3), ground)
                draw.text((x, y), text, INK if piece.trained else FAINT, font)
            x += wide


def _wrapped(pieces: Sequence[Piece], columns: int) -> list[list[tuple[str, Piece | None]]]:
    """Lines of (text, piece) runs of at most ``columns`` characters; line breaks show as arrows."""
    lines: list[list[tuple[str, Piece | None]]] = [[]]
    room = columns
    for piece in pieces:
        text = piece.text.replace("\t", " ").replace("\r", "")
        for n, row in enumerate(text.split("\n")):
            if n:
                lines[-1].append(("\u21b5", piece))
                lines.append([])
                room = columns
            while row:
                if room < 2:
                    lines.append([])
                    room = columns
                cut = row[: room - 1]
                space = cut.rfind(" ")
                if len(cut) < len(row) and space >= 0 and columns - room + space >= columns // 2:
                    cut = cut[: space + 1]
                lines[-1].append((cut, piece))
                row, room = row[len(cut) :], 0 if len(cut) < len(row) else room - len(cut)
    return [line for line in lines if line]


def _shortened(lines: list) -> list:
    """Head and tail of many lines; what lies between is counted."""
    if len(lines) <= HEAD_LINES + TAIL_LINES + 1:
        return lines
    left_out = len(lines) - HEAD_LINES - TAIL_LINES
    return [*lines[:HEAD_LINES], [(f"\u2026 {left_out} more lines \u2026", None)], *lines[-TAIL_LINES:]]


def _thumbnail(image) -> Image.Image:
    opened = open_image(image)
    scale = min(PICTURE / opened.width, PICTURE / opened.height)
    size = (max(1, round(opened.width * scale)), max(1, round(opened.height * scale)))
    return opened.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS)


def _short(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"


@lru_cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that matplotlib brings along: Latin, Greek, Cyrillic, arrows."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)
