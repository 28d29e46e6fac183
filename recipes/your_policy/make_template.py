"""Draws this template's pictures and writes its examples. Delete it once you have your own.

    python make_template.py

Needs Pillow. The same Pillow gives the same bytes.
"""

from __future__ import annotations

import json
import random
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 224  # pixels: 8 x 8 cells of 28, so 64 visual tokens for Qwen2.5-VL
FINER = 4  # drawn this much larger, then scaled down
COUNTS = {"train": 12, "rl": 12, "validation": 4, "test": 6}
CARDBOARD = ((196, 148, 96), (181, 131, 82), (209, 166, 116), (168, 124, 84))
WALLS = ((226, 232, 238), (236, 230, 220), (222, 234, 226))
QUERIES = (
    "What do we do with this parcel? {insurance}",
    "This came back today. {insurance} How do we settle it?",
    "{insurance} Please decide on this return.",
    "A return is on the counter. {insurance} Your decision?",
)
INSURED = ("The customer had insured it.", "It is an insured return.")
UNINSURED = ("The customer had not insured it.", "No insurance was taken.")


@dataclass(frozen=True)
class Parcel:
    dented: bool
    open: bool
    labelled: bool
    insured: bool


def decide(parcel: Parcel) -> tuple[str, str]:
    """(the walk through policy/policy.md, the answer)."""
    label = "label" if parcel.labelled else "no label"
    if parcel.open:
        return f"Section 2: {label}.", "inspect" if parcel.labelled else "refuse"
    if parcel.dented:
        insured = "insured" if parcel.insured else "not insured"
        return f"Section 3: {insured}.", "refund" if parcel.insured else "inspect"
    return f"Section 4: {label}.", "accept" if parcel.labelled else "ask for the order number"


def reasoning(parcel: Parcel) -> str:
    seen = [
        "box dented" if parcel.dented else "box intact",
        "tape open" if parcel.open else "tape sealed",
        "label present" if parcel.labelled else "label missing",
        "insured" if parcel.insured else "not insured",
    ]
    return f"{', '.join(seen)}. {decide(parcel)[0]}"


# ---- the pictures


def draw(parcel: Parcel, rng: random.Random) -> Image.Image:
    """A cardboard box on a floor, seen from the front and a little from above."""
    side = SIDE * FINER
    image = Image.new("RGB", (side, side), rng.choice(WALLS))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, int(side * 0.62), side, side), fill=(158, 160, 164))
    scale = rng.uniform(0.92, 1.04)
    left, floor = 0.19 + rng.uniform(-0.05, 0.05), 0.86 + rng.uniform(-0.03, 0.03)
    front_colour = rng.choice(CARDBOARD)

    def at(x: float, y: float) -> tuple[int, int]:
        """Box units (x right, y up from the front's lower left corner) to pixels."""
        return round((left + x * scale) * side), round((floor - y * scale) * side)

    def face(points, fill) -> None:
        pen.polygon([at(*p) for p in points], fill=fill)
        pen.line([at(*p) for p in [*points, points[0]]], fill=_shade(front_colour, 0.55), width=side // 180)

    w, h, dx, dy = 0.50, 0.40, 0.14, 0.12  # width, height, and how far the back lies to the right and up
    shadow = [at(0.02, -0.02), at(w + 0.03, -0.02), at(w + dx + 0.05, dy), at(w, dy)]
    pen.polygon(shadow, fill=(128, 130, 134))
    corner = [(0.17, h), (0.12, h - 0.06), (0.05, h - 0.07), (0, h - 0.13)] if parcel.dented else [(0, h)]
    face([(0, 0), (w, 0), (w, h), *corner], front_colour)
    face([(w, 0), (w + dx, dy), (w + dx, h + dy), (w, h)], _shade(front_colour, 0.78))
    edge = [(0.06, h + 0.05), (0.17, h)] if parcel.dented else [(0, h)]  # where the lid's corner is or was
    if parcel.dented:
        face([*corner, edge[0]], _shade(front_colour, 0.6))
    _top(parcel.open, face, front_colour, edge, (w, h, dx, dy))
    if not parcel.open:
        tape = (236, 222, 178)
        middle, half = w / 2, 0.035
        pen.polygon([at(middle - half, h), at(middle + half, h), at(middle + half + dx, h + dy),
                     at(middle - half + dx, h + dy)], fill=tape)  # fmt: skip
        pen.polygon([at(middle - half, h), at(middle + half, h), at(middle + half, h - 0.09),
                     at(middle - half, h - 0.09)], fill=_shade(tape, 0.93))  # fmt: skip
    if parcel.labelled:
        _label(pen, at, side, rng)
    if parcel.dented:
        _creases(pen, at, side, front_colour)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _top(is_open: bool, face, colour, edge: list, size: tuple[float, float, float, float]) -> None:
    """The closed lid, or a dark inside with its flaps standing up."""
    w, h, dx, dy = size
    if not is_open:
        face([*edge, (w, h), (w + dx, h + dy), (dx, h + dy)], _shade(colour, 1.14))
        return
    (x, y), back, right = edge[0], h + dy, w + dx
    behind = [(dx, back), (right, back), (right + 0.03, back + 0.15), (dx + 0.03, back + 0.15)]
    face(behind, _shade(colour, 0.9))
    face([*edge, (w, h), (right, back), (dx, back)], (58, 42, 30))
    face([(x, y), (dx, back), (dx - 0.13, back + 0.11), (x - 0.13, y + 0.11)], _shade(colour, 1.14))
    face([(w, h), (right, back), (right + 0.09, back + 0.13), (w + 0.11, h + 0.12)], _shade(colour, 1.05))


def _label(pen, at, side: int, rng: random.Random) -> None:
    """A white sticker with an address and a bar code."""
    x, y = rng.uniform(0.23, 0.26), rng.uniform(0.05, 0.09)
    pen.rectangle((*at(x, y + 0.17), *at(x + 0.22, y)), fill=(252, 252, 250), outline=(120, 120, 120))
    for line in range(3):
        top = y + 0.145 - 0.022 * line
        pen.line([at(x + 0.02, top), at(x + 0.14 - 0.02 * line, top)], fill=(60, 60, 60), width=side // 130)
    bar = x + 0.02
    while bar < x + 0.195:
        width = rng.choice((0.004, 0.008))
        pen.rectangle((*at(bar, y + 0.065), *at(bar + width, y + 0.018)), fill=(20, 20, 20))
        bar += width + rng.choice((0.005, 0.009))


def _creases(pen, at, side: int, colour) -> None:
    """Folds in the cardboard around the corner that was pushed in."""
    folds = (
        [(0, 0.27), (0.04, 0.20), (0.03, 0.13), (0.06, 0.08)], [(0.05, 0.33), (0.09, 0.24), (0.08, 0.19)],
        [(0.12, 0.34), (0.16, 0.27), (0.20, 0.26)], [(0.06, 0.45), (0.13, 0.34)],
        [(0.06, 0.45), (0.05, 0.33)],
    )  # fmt: skip
    for fold in folds:
        pen.line([at(*p) for p in fold], fill=_shade(colour, 0.42), width=side // 130, joint="curve")


def _shade(colour: tuple[int, int, int], factor: float) -> tuple[int, ...]:
    return tuple(min(255, round(c * factor)) for c in colour)


# ---- the files


def save(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(96, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(file, optimize=True)


def parcels(rng: random.Random) -> dict[str, list[Parcel]]:
    """Every split gets the answers in turn; a drawing differs even where the parcel is of the same kind."""
    by_answer: dict[str, list[Parcel]] = {}
    for values in product((False, True), repeat=4):
        by_answer.setdefault(decide(Parcel(*values))[1], []).append(Parcel(*values))
    for kinds in by_answer.values():
        rng.shuffle(kinds)
    answers = rng.sample(sorted(by_answer), len(by_answer))
    out, turn = {}, 0
    for name, count in COUNTS.items():
        out[name] = []
        for _ in range(count):
            kinds = by_answer[answers[turn % len(answers)]]
            out[name].append(kinds[turn // len(answers) % len(kinds)])
            turn += 1
    return out


def main() -> None:
    folder = Path(__file__).parent
    rng = random.Random(4)
    save(draw(Parcel(True, False, False, False), random.Random(1)), folder / "policy/images/dented.png")
    save(draw(Parcel(False, True, False, False), random.Random(2)), folder / "policy/images/open.png")
    for name, chosen in parcels(rng).items():
        lines = []
        for number, parcel in enumerate(chosen, 1):
            file = f"images/{name}-{number:02d}.png"
            save(draw(parcel, rng), folder / file)
            insurance = rng.choice(INSURED if astuple(parcel)[3] else UNINSURED)
            text = rng.choice(QUERIES).format(insurance=insurance)
            content = [{"type": "image", "image": file}, {"type": "text", "text": text}]
            row = {"id": f"{name}-{number:02d}", "messages": [{"role": "user", "content": content}]}
            if name != "rl":  # an answer that can be checked is enough there
                row["reasoning"] = reasoning(parcel)
            lines.append(json.dumps(row | {"answer": decide(parcel)[1]}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
