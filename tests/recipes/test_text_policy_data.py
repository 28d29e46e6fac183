"""The claims desk of recipes/text_policy: rulebook, code, cases and reward say the same."""

import importlib
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "text_policy"
SPLITS = ("train", "rl", "validation", "test")


@pytest.fixture(scope="module")
def desk():
    return _module("desk")


@pytest.fixture(scope="module")
def make_data(desk):
    return _module("make_data")


def _module(name: str):
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


def rows(split: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


def test_shipped_files_are_what_the_script_writes(make_data, tmp_path):
    make_data.write(tmp_path, 0, make_data.COUNTS)
    for split in SPLITS:
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (FOLDER / f"{split}.jsonl").read_bytes()


def test_the_rulebook_names_every_reply_and_no_other(desk):
    text = (FOLDER / "rulebook.md").read_text()
    assert set(re.findall(r'"([^"]+)"', text)) == set(desk.REPLIES)
    assert len(text.split()) > 600  # as many tokens at the very least


# Read off rulebook.md by hand: facts; what the walk adds to "A1 no. A2 no.", or all of it; reply.
WALKS = (
    (("receiver", "express", "lost", "a violin", 41, 900, True),
     "A1 yes.", "refer to sender"),
    (("sender", "express", "lost", "a violin", 22, 900, True),
     "A1 no. A2 yes.", "close the claim"),
    (("sender", "standard", "lost", "a violin", 22, 900, True),
     "C1 no. C2 high, receipt.", "pay the value"),
    (("sender", "standard", "lost", "jeans", 10, 201, False),
     "C1 no. C2 high, no receipt.", "pass to the manager"),
    (("sender", "standard", "lost", "jeans", 30, 200, True),
     "C1 no. C2 low.", "send a voucher"),
    (("sender", "standard", "lost", "tulips", 9, 900, True),
     "C1 standard.", "ask to wait"),
    (("sender", "express", "lost", "tulips", 9, 900, True),
     "C1 express.", "start a search"),
    (("receiver", "express", "damaged", "a camera", 20, 220, True),
     "B1 receipt, high.", "send an inspector"),
    (("receiver", "express", "damaged", "a camera", 21, 220, True),
     "A1 no. A2 yes.", "close the claim"),
    (("receiver", "express", "damaged", "a camera", 5, 90, True),
     "B1 receipt, low.", "pay the value"),
    (("sender", "standard", "damaged", "a camera", 5, 900, False),
     "B1 no receipt.", "ask for photos"),
    (("sender", "express", "damaged", "insulin", 5, 900, False),
     "B1 no. B2 express.", "pay half the value"),
    (("sender", "standard", "damaged", "insulin", 5, 900, True),
     "B1 no. B2 standard.", "decline"),
    (("sender", "standard", "damaged", "a drill", 5, 900, True),
     "B1 no. B2 no. B3 receipt.", "offer a repair"),
    (("sender", "standard", "damaged", "a drill", 5, 900, False),
     "B1 no. B2 no. B3 no receipt.", "ask for photos"),
    (("receiver", "standard", "delayed", "smoked fish", 31, 90, True),
     "A1 no. A2 yes.", "close the claim"),
    (("receiver", "standard", "delayed", "smoked fish", 30, 90, True),
     "D1 receipt.", "pay half the value"),
    (("receiver", "express", "delayed", "smoked fish", 9, 90, False),
     "D1 no receipt.", "send a voucher"),
    (("sender", "express", "delayed", "a violin", 9, 900, False),
     "D1 no. D2 express.", "refund the postage"),
    (("sender", "standard", "delayed", "a violin", 9, 900, False),
     "D1 no. D2 standard, high.", "pass to the manager"),
    (("sender", "standard", "delayed", "a violin", 9, 90, True),
     "D1 no. D2 standard, low.", "write an apology"),
)  # fmt: skip


@pytest.mark.parametrize(("facts", "steps", "reply"), WALKS)
def test_the_walk(desk, facts, steps, reply):
    steps = steps if steps[0] == "A" else f"A1 no. A2 no. {steps}"
    assert desk.walk(desk.Case(*facts)) == (steps, reply)


def test_every_case_is_labelled_by_the_rules_and_stated_in_its_message(desk):
    for split in ("train", "validation", "test"):
        for row in rows(split):
            case, steps = desk.read_trace(row["reasoning"])
            assert (steps, row["answer"]) == desk.walk(case)
            said = row["messages"][0]["content"]
            assert case.item in said
            assert re.search(rf"\b{case.days} days", said) and re.search(rf"\b{case.value} euros", said)
            assert "xpress" in said if case.service == "express" else "tandard" in said
    assert all("reasoning" not in row for row in rows("rl"))


def test_no_case_is_in_two_splits_and_replies_are_balanced(make_data, desk):
    import random

    used: set = set()
    for name in ("test", "validation", "train", "rl"):
        before = len(used)
        cases = make_data.make_cases(random.Random(f"0-{name}"), make_data.COUNTS[name], used)
        assert len(used) == before + len(cases)  # none of them known
        assert [desk.walk(c)[1] for c in cases] == [row["answer"] for row in rows(name)]
        counts = Counter(row["answer"] for row in rows(name))
        assert set(counts) == set(desk.REPLIES) and max(counts.values()) - min(counts.values()) <= 1


def test_true_trace(desk):
    rewards = _module("rewards")
    case = desk.Case("sender", "express", "damaged", "a violin", 4, 340, True)
    true = desk.trace(case)
    assert true == (
        "sender, express, damaged. violin: fragile. 4 days: early. 340 euros: high. receipt. "
        "A1 no. A2 no. B1 receipt, high."
    )
    given = {
        f"<think>{true}</think>\nsend an inspector": 1.0,
        f"<think>{true}</think>\npay the value": 0.5,
        f"<think>{true.replace('high.', 'low.')}</think>\nsend an inspector": 0.0,  # 340 euros are not low
        f"<think>{true.replace('fragile', 'perishable')}</think>\nsend an inspector": 0.0,
        f"<think>{true.replace('B1 receipt, high.', 'B2 express.')}</think>\npay half the value": 0.5,
        f"<think>{true.replace('340', '540')}</think>\nsend an inspector": 1.0,  # misread, but true to itself
        "send an inspector": 0.0,
    }
    assert rewards.true_trace(list(given), [{}] * len(given)) == list(given.values())
