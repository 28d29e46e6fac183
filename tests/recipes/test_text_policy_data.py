"""The claims desk of recipes/text_policy: rulebook, code, cases and reward say the same."""

import importlib
import json
import random
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


# Read off rulebook.md by hand: facts, the rule that decides with what it asks for, without numbers, reply.
WALKS = (
    (("receiver", "express", "lost", "a violin", 41, 900, True), "A1.", "refer to sender"),
    (("sender", "express", "lost", "a violin", 22, 900, True), "A2.", "close the claim"),
    (("sender", "standard", "lost", "a violin", 22, 900, True), "C2 high, receipt.", "pay the value"),
    (("sender", "standard", "lost", "a drill", 10, 201, False), "C2 high, no receipt.", "pass to the manager"),
    (("sender", "standard", "lost", "a drill", 30, 200, True), "C2 low.", "send a voucher"),
    (("sender", "standard", "lost", "cut roses", 9, 900, True), "C1 standard.", "ask to wait"),
    (("sender", "express", "lost", "cut roses", 9, 900, True), "C1 express.", "start a search"),
    (("receiver", "express", "damaged", "a camera", 20, 220, True), "B1 receipt, high.", "send an inspector"),
    (("receiver", "express", "damaged", "a camera", 21, 220, True), "A2.", "close the claim"),
    (("receiver", "express", "damaged", "a camera", 5, 90, True), "B1 receipt, low.", "pay the value"),
    (("sender", "standard", "damaged", "a camera", 5, 900, False), "B1 no receipt.", "ask for photos"),
    (("sender", "express", "damaged", "heart medicine", 5, 900, False), "B2 express.", "pay half the value"),
    (("sender", "standard", "damaged", "heart medicine", 5, 900, True), "B2 standard.", "decline"),
    (("sender", "standard", "damaged", "a tool box", 5, 900, True), "B3 receipt.", "offer a repair"),
    (("sender", "standard", "damaged", "a tool box", 5, 900, False), "B3 no receipt.", "ask for photos"),
    (("receiver", "standard", "delayed", "smoked fish", 31, 90, True), "A2.", "close the claim"),
    (("receiver", "standard", "delayed", "smoked fish", 30, 90, True), "D1 receipt.", "pay half the value"),
    (("receiver", "express", "delayed", "smoked fish", 9, 90, False), "D1 no receipt.", "send a voucher"),
    (("sender", "express", "delayed", "a violin", 9, 900, False), "D2 express.", "refund the postage"),
    (("sender", "standard", "delayed", "a violin", 9, 900, False), "D2 standard, high.", "pass to the manager"),
    (("sender", "standard", "delayed", "a violin", 9, 90, True), "D2 standard, low.", "write an apology"),
)


@pytest.mark.parametrize(("facts", "rule", "reply"), WALKS)
def test_the_walk(desk, make_data, facts, rule, reply):
    case = desk.Case(*facts)
    assert (make_data.way_of(case), desk.walk(case)[1]) == (rule, reply)


# A trace names what the rulebook asks for, in its order, and stops where it stops.
TRACES = (
    (("receiver", "express", "lost", "a violin", 41, 900, True), "receiver, lost: A1."),
    (("receiver", "express", "damaged", "a violin", 21, 900, True), "receiver, damaged. express, 21 days closed: A2."),
    (
        ("sender", "standard", "lost", "cut roses", 30, 201, False),
        "sender, lost. standard, 30 days in time. lost, in time: C2 201 euros high, no receipt.",
    ),
    (
        ("sender", "express", "delayed", "cut roses", 9, 200, True),
        "sender, delayed. express, 9 days early. delayed, cut roses, perishable: D1 receipt.",
    ),
    (
        ("sender", "standard", "delayed", "a drill", 10, 200, True),
        "sender, delayed. standard, 10 days in time. delayed, a drill, ordinary: D2 standard, 200 euros low.",
    ),
)


@pytest.mark.parametrize(("facts", "trace"), TRACES)
def test_the_trace(desk, facts, trace):
    assert desk.walk(desk.Case(*facts))[0] == trace


def cases_of(make_data, desk):
    """Each split's cases, drawn again, and its rows."""
    used: set = set()
    for name in ("test", "validation", "train", "rl"):
        cases = make_data.make_cases(random.Random(f"0-{name}"), make_data.COUNTS[name], used)
        yield from ((name, *pair) for pair in zip(cases, rows(name), strict=True))


def test_every_case_is_labelled_by_the_rules_and_stated_in_its_message(make_data, desk):
    for name, case, row in cases_of(make_data, desk):
        assert row["answer"] == desk.walk(case)[1]
        assert row.get("reasoning") == (None if name == "rl" else desk.walk(case)[0])
        said = row["messages"][0]["content"]
        assert case.item in said and case.service in said
        assert f"{case.days} days ago" in said and f"{case.value} euros" in said
        assert any(words in said for words in make_data.TROUBLES[case.trouble])
        assert ("have the receipt" in said or "kept the receipt" in said) == case.receipt
        by_me = re.search("I (posted|sent|mailed) ", said) is not None
        assert by_me == (case.writer == "sender")


def test_no_case_is_in_two_splits_and_replies_are_balanced(make_data, desk):
    found = list(cases_of(make_data, desk))
    assert len({case for _, case, _ in found}) == len(found) == sum(make_data.COUNTS.values())
    for name in SPLITS:
        counts = Counter(row["answer"] for split, _, row in found if split == name)
        assert set(counts) == set(desk.REPLIES) and max(counts.values()) - min(counts.values()) <= 1


def test_what_a_trace_states_leads_back_to_it(make_data, desk):
    for _, case, row in cases_of(make_data, desk):
        facts = desk.stated(desk.walk(case)[0])
        assert desk.walk_of(facts) == desk.walk(case)
        found = desk.in_message(row["messages"][0]["content"])
        assert found == {
            "service": case.service, "days": str(case.days), "value": str(case.value), "item": case.item,
        }  # fmt: skip


@pytest.mark.parametrize("parts", (False, True))
def test_true_trace(desk, parts):
    rewards = _module("rewards")
    true, _ = desk.walk(desk.Case("sender", "express", "damaged", "a violin", 4, 340, True))
    assert true == "sender, damaged. express, 4 days early. damaged, a violin, fragile: B1 receipt, 340 euros high."
    given = {
        f"<think>{true}</think>\nsend an inspector": 1.0,
        f"<think>{true}</think>\npay the value": 0.0,
        f"<think>{true.replace('euros high', 'euros low')}</think>\nsend an inspector": 0.0,  # 340 euros are not low
        f"<think>{true.replace('340', '540')}</think>\nsend an inspector": 0.0,  # not the message's number
        f"<think>{true.replace('4 days', '5 days')}</think>\nsend an inspector": 0.0,
        f"<think>{true.replace('express', 'standard')}</think>\nsend an inspector": 0.0,
        f"<think>{true.replace('fragile', 'ordinary')}</think>\nsend an inspector": 0.0,  # a violin is fragile
        f"<think>{true.replace('a violin', 'a camera')}</think>\nsend an inspector": 0.0,
        f"<think>{true.replace('B1', 'B2')}</think>\nsend an inspector": 0.0,
        f"<think>{true.replace('receipt, 340 euros high', 'no receipt')}</think>\nask for photos": 0.0,  # misread
        f"<think>{true.replace('sender', 'receiver')}</think>\nsend an inspector": 1.0,  # nothing here tells it
        f"<think>{true} standard.</think>\nsend an inspector": 0.0,
        f"{true}\nsend an inspector": 0.0,
        "<think></think>\nsend an inspector": 0.0,
        "send an inspector": 0.0,
    }
    message = "I posted a violin to my aunt. It arrived broken. That was 4 days ago, by express. It is worth 340 euros."
    content = [{"type": "text", "text": message}] if parts else message
    turns = [{"role": "system", "content": "3 days"}, {"role": "user", "content": content}]
    example = {"messages": turns, "answer": "send an inspector"}
    assert rewards.true_trace(list(given), [example] * len(given)) == list(given.values())
