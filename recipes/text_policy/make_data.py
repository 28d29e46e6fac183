"""Writes the cases of the claims desk: train.jsonl, rl.jsonl, validation.jsonl and test.jsonl.

    python make_data.py

Standard library only; the same seed gives the same bytes. No two cases of any split share their seven facts,
and every reply is the answer about equally often, so that guessing earns 1 in 14.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from desk import GOODS, REPLIES, Case, walk

COUNTS = {"train": 28, "rl": 560, "validation": 56, "test": 200}

OPENINGS = {
    "sender": ("I posted {item} to {person}.", "I sent {person} a parcel with {item}.", "I mailed {item} to {person}."),
    "receiver": ("{Person} sent me {item}.", "I was to get {item} from {person}.", "{Person} mailed me {item}."),
}
PEOPLE = ("my brother", "my aunt", "an old friend", "my neighbour", "a colleague", "my grandmother")
POSTINGS = (
    "It went by {service} {days} days ago.", "The label says {service}, posted {days} days ago.",
    "That was {days} days ago, by {service}.",
)  # fmt: skip
TROUBLES = {
    "damaged": ("It came badly damaged.", "It arrived broken.", "What came was smashed."),
    "lost": ("It has never turned up.", "It seems to be lost.", "Nobody knows where it is."),
    "delayed": ("It came far too late.", "It arrived whole, but late.", "It came days after the promised day."),
}
WORTHS = {
    True: ("It is worth {value} euros, and I have the receipt.", "I declared {value} euros and kept the receipt."),
    False: ("It is worth {value} euros, but I have no receipt.", "I declared {value} euros and lost the receipt."),
}
ENDINGS = ("What now?", "Please help.", "")
# Clear of the rulebook's limits (10, 20 and 30 days; 200 euros), and on both sides of each.
DAY_RANGES = ((2, 8), (12, 18), (22, 28), (33, 45))
LOW, HIGH = range(20, 190, 10), range(220, 920, 20)


def message(case: Case, rng: random.Random) -> str:
    """All seven facts in varied words and order."""
    person = rng.choice(PEOPLE)
    sentences = [
        rng.choice(POSTINGS).format(service=case.service, days=case.days),
        rng.choice(TROUBLES[case.trouble]),
        rng.choice(WORTHS[case.receipt]).format(value=case.value),
    ]
    rng.shuffle(sentences)
    opening = rng.choice(OPENINGS[case.writer])
    named = opening.format(item=case.item, person=person, Person=person[0].upper() + person[1:])
    return " ".join([named, *sentences, rng.choice(ENDINGS)]).strip()


def random_case(rng: random.Random) -> Case:
    return Case(
        writer=rng.choice(("sender", "receiver")),
        service=rng.choice(("standard", "express")),
        trouble=rng.choice(("damaged", "lost", "delayed")),
        item=rng.choice(GOODS[rng.choice(sorted(GOODS))]),
        days=rng.randint(*rng.choice(DAY_RANGES)),
        value=rng.choice(rng.choice((LOW, HIGH))),
        receipt=rng.random() < 0.5,
    )


def way_of(case: Case) -> str:
    """Rule and conditions that decide a case, without its numbers: "B1 receipt, high."."""
    return re.sub(r"\d+ euros ", "", walk(case)[0].rpartition(": ")[2])


def make_cases(rng: random.Random, count: int, used: set[Case]) -> list[Case]:
    """``count`` new cases; each reply in turn, and within a reply each way through the rules in turn."""
    found: dict[str, dict[str, list[Case]]] = {reply: {} for reply in REPLIES}
    for _ in range(60 * count + 20_000):
        case = random_case(rng)
        if case not in used:
            found[walk(case)[1]].setdefault(way_of(case), []).append(case)
    cases: list[Case] = []
    while len(cases) < count:
        for reply in rng.sample(REPLIES, len(REPLIES))[: count - len(cases)]:
            ways = found[reply]
            fewest = min(ways, key=lambda way: (sum(way_of(c) == way for c in cases), way))
            case = ways[fewest].pop()
            while case in used:
                case = ways[fewest].pop()
            used.add(case)
            cases.append(case)
    rng.shuffle(cases)
    return cases


def row(name: str, number: int, case: Case, rng: random.Random) -> dict:
    out = {
        "id": f"{name}-{number:03d}",
        "messages": [{"role": "user", "content": message(case, rng)}],
        "reasoning": walk(case)[0],
        "answer": walk(case)[1],
    }
    if name == "rl":  # answers to check, traces unknown
        del out["reasoning"]
    return out


def write(folder: Path, seed: int, counts: dict[str, int]) -> None:
    used: set[Case] = set()
    for name in ("test", "validation", "train", "rl"):  # growing rl leaves the others as they were
        rng = random.Random(f"{seed}-{name}")
        cases = make_cases(rng, counts[name], used)
        lines = [json.dumps(row(name, i, case, rng)) + "\n" for i, case in enumerate(cases)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    given = parser.parse_args()
    write(given.out, given.seed, {name: getattr(given, name) for name in COUNTS})


if __name__ == "__main__":
    main()
