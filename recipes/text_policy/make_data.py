"""Writes the cases of the claims desk: train.jsonl, rl.jsonl, validation.jsonl and test.jsonl.

    python make_data.py

Standard library only; the same seed gives the same bytes. No two cases of any split share their seven facts,
and every reply is the answer about equally often, so that guessing earns 1 in 14.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from desk import GOODS, REPLIES, Case, trace, walk

COUNTS = {"train": 140, "rl": 420, "validation": 56, "test": 200}

OPENINGS = {
    "sender": (
        "I posted {item} to {person}.", "I sent {person} a parcel with {item}.",
        "A parcel of mine, {item} for {person}, is why I write.",
        "I am the one who posted {item} to {person}.", "As a gift for {person} I mailed {item}.",
        "It is my parcel: {item}, and {person} was to get it.",
    ),
    "receiver": (
        "{Person} sent me {item}.", "{Person} posted a parcel to me with {item} in it.",
        "I was to get {item} from {person}.", "I am the one {item} was addressed to; {person} posted it.",
        "My parcel from {person} holds {item}.", "{Person} mailed {item} to my address.",
    ),
}  # fmt: skip
PEOPLE = (
    "my brother", "my aunt", "my daughter", "an old friend", "my neighbour", "my cousin", "a colleague",
    "my grandmother", "my nephew", "a customer", "my sister", "my uncle",
)  # fmt: skip
SERVICES = {
    "standard": (
        "It went by standard service.", "Standard post was chosen.", "The label says standard.",
        "Only the standard rate was paid.", "It travelled as a standard parcel.",
    ),
    "express": (
        "It went by express.", "Express was paid for.", "The label says express.",
        "The express rate was paid.", "It travelled as an express parcel.",
    ),
}  # fmt: skip
TROUBLES = {
    "damaged": (
        "It came with the box crushed and the contents broken.", "What I hear of it is sad: it came smashed.",
        "On arrival it was soaked and torn.", "It was delivered, but badly damaged.",
        "When the box was opened, everything in it was ruined by rough handling.",
    ),
    "lost": (
        "It has never turned up.", "Nobody can say where it is now.", "It has vanished on the way.",
        "To this day it has not come, and tracking shows nothing.", "It seems to be lost.",
    ),
    "delayed": (
        "It came whole, but long after the promised day.", "It arrived far too late, though unharmed.",
        "Delivery was days behind the date you promised.", "It is here at last, in one piece, but very late.",
        "It missed the promised day before it finally came.",
    ),
}  # fmt: skip
DAYS = (
    "It was posted {days} days ago.", "{days} days have passed since posting.",
    "The day of posting is {days} days back.", "From posting until today it is {days} days.",
    "The postmark is {days} days old.",
)  # fmt: skip
VALUES = (
    "The declared value is {value} euros.", "It was declared at {value} euros.",
    "On the form stand {value} euros.", "{value} euros were declared.",
    "We declared it as worth {value} euros.",
)  # fmt: skip
RECEIPTS = {
    True: (
        "I have the receipt.", "The shop's receipt lies here.", "I kept the receipt.",
        "The receipt can be sent to you.", "A receipt exists and I hold it.",
    ),
    False: (
        "I have no receipt.", "The receipt was thrown away.", "I cannot find the receipt any more.",
        "There is no receipt left.", "The shop's receipt is gone.",
    ),
}  # fmt: skip
GREETINGS = ("Hello,", "Good morning.", "Dear claims desk,", "Hi there!", "To whom it may concern:")
ASIDES = (
    "I have been a customer for years.", "This is really annoying.", "The driver was friendly.",
    "I do not want any trouble.", "It was meant for a party.", "I have called twice already.",
    "Your website was of no help.", "I only want a fair answer.",
    "It is the first time this happens to me.",
)  # fmt: skip
ENDINGS = (
    "What will you do?", "Please help.", "What now?", "How do you settle this?", "I await your answer.",
)  # fmt: skip
# Clear of the rulebook's limits (10, 20 and 30 days; 200 euros), and on both sides of each.
DAY_RANGES = ((2, 8), (12, 18), (22, 28), (33, 45))
LOW, HIGH = range(20, 190, 10), range(220, 920, 20)


def message(case: Case, rng: random.Random) -> str:
    """All seven facts in varied words and order, and words that change nothing."""
    person = rng.choice(PEOPLE)
    opening = rng.choice(OPENINGS[case.writer])
    sentences = [
        rng.choice(SERVICES[case.service]),
        rng.choice(TROUBLES[case.trouble]),
        rng.choice(DAYS).format(days=case.days),
        rng.choice(VALUES).format(value=case.value),
        rng.choice(RECEIPTS[case.receipt]),
    ]
    sentences.append(rng.choice(ASIDES))
    rng.shuffle(sentences)
    named = opening.format(item=case.item, person=person, Person=person[0].upper() + person[1:])
    greeting = [rng.choice(GREETINGS)] if rng.random() < 0.5 else []
    return " ".join([*greeting, named, *sentences, rng.choice(ENDINGS)])


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


def make_cases(rng: random.Random, count: int, used: set[Case]) -> list[Case]:
    """``count`` new cases; each reply in turn, and within a reply each way through the rules in turn."""
    found: dict[str, dict[str, list[Case]]] = {reply: {} for reply in REPLIES}
    for _ in range(60 * count + 20_000):
        case = random_case(rng)
        if case not in used:
            way, reply = walk(case)
            found[reply].setdefault(way, []).append(case)
    cases: list[Case] = []
    while len(cases) < count:
        for reply in rng.sample(REPLIES, len(REPLIES))[: count - len(cases)]:
            ways = found[reply]
            fewest = min(ways, key=lambda way: (sum(walk(c)[0] == way for c in cases), way))
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
        "reasoning": trace(case),
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
