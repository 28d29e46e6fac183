"""The rulebook (rulebook.md) as code: what labels the cases and what checks a reasoning trace."""

from __future__ import annotations

import re
from dataclasses import dataclass

GOODS = {
    "fragile": (
        "wine glasses", "a wall mirror", "a desk lamp", "a camera", "a violin", "a glass vase",
        "porcelain plates", "a television",
    ),
    "perishable": (
        "a birthday cake", "smoked fish", "cut roses", "tomato plants", "heart medicine", "fresh cheese",
        "strawberries", "a potted orchid",
    ),
    "ordinary": (
        "a winter coat", "running shoes", "cookery books", "a drill", "wooden toys", "bed linen",
        "a leather bag", "a tool box",
    ),
}  # fmt: skip
KIND_OF = {item: kind for kind, items in GOODS.items() for item in items}
HIGH_VALUE, EARLY_DAYS = 200, 10
LAST_DAY = {"standard": 30, "express": 20}


@dataclass(frozen=True)
class Case:
    """The seven facts of a message."""

    writer: str  # sender or receiver
    service: str  # standard or express
    trouble: str  # damaged, lost or delayed
    item: str
    days: int
    value: int
    receipt: bool

    @property
    def goods(self) -> str:
        return KIND_OF[self.item]

    @property
    def timing(self) -> str:
        if self.days > LAST_DAY[self.service]:
            return "closed"
        return "early" if self.days < EARLY_DAYS else "in time"

    @property
    def worth(self) -> str:
        return "high" if self.value > HIGH_VALUE else "low"


def walk(case: Case) -> tuple[str, str]:
    """The rulebook's way through a case: the reasoning trace, and the reply.

    A trace names the facts in the order in which the rulebook asks for them and stops where it does, so that each step
    follows from the few words before it.

    >>> walk(Case("sender", "standard", "delayed", "a drill", 34, 340, True))
    ('sender, delayed. standard, 34 days closed: A2.', 'close the claim')
    """
    steps, reply = [f"{case.writer}, {case.trouble}"], ""
    if case.writer == "receiver" and case.trouble == "lost":
        steps[-1] += ": A1"
        reply = "refer to sender"
    else:
        steps.append(f"{case.service}, {case.days} days {case.timing}")
        if case.timing == "closed":
            steps[-1] += ": A2"
            reply = "close the claim"
        else:
            section = {"damaged": _damaged, "lost": _lost, "delayed": _delayed}[case.trouble]
            rule, reply = section(case)
            asked = case.timing if case.trouble == "lost" else f"{case.item}, {case.goods}"
            steps.append(f"{case.trouble}, {asked}: {rule}")
    return "".join(f"{step}. " for step in steps).strip(), reply


def _damaged(case: Case) -> tuple[str, str]:
    receipt = _receipt(case)
    if case.goods == "fragile":
        if not case.receipt:
            return f"B1 {receipt}", "ask for photos"
        reply = "send an inspector" if case.worth == "high" else "pay the value"
        return f"B1 {receipt}, {_value(case)}", reply
    if case.goods == "perishable":
        return f"B2 {case.service}", "pay half the value" if case.service == "express" else "decline"
    return f"B3 {receipt}", "offer a repair" if case.receipt else "ask for photos"


def _lost(case: Case) -> tuple[str, str]:
    if case.timing == "early":
        return f"C1 {case.service}", "start a search" if case.service == "express" else "ask to wait"
    if case.worth == "low":
        return f"C2 {_value(case)}", "send a voucher"
    return f"C2 {_value(case)}, {_receipt(case)}", "pay the value" if case.receipt else "pass to the manager"


def _delayed(case: Case) -> tuple[str, str]:
    if case.goods == "perishable":
        return f"D1 {_receipt(case)}", "pay half the value" if case.receipt else "send a voucher"
    if case.service == "express":
        return "D2 express", "refund the postage"
    return f"D2 standard, {_value(case)}", "pass to the manager" if case.worth == "high" else "write an apology"


def _receipt(case: Case) -> str:
    return "receipt" if case.receipt else "no receipt"


def _value(case: Case) -> str:
    return f"{case.value} euros {case.worth}"


REPLIES = (
    "refer to sender", "close the claim", "send an inspector", "pay the value", "ask for photos",
    "pay half the value", "decline", "offer a repair", "start a search", "ask to wait", "send a voucher",
    "pass to the manager", "refund the postage", "write an apology",
)  # fmt: skip

_STATED = {
    "writer": r"\b(sender|receiver)\b",
    "service": r"\b(standard|express)\b",
    "trouble": r"\b(damaged|lost|delayed)\b",
    "item": rf"\b({'|'.join(KIND_OF)})\b",
    "days": r"\b(\d{1,3}) days\b",
    "value": r"\b(\d{1,4}) euros\b",
    "receipt": r"\b(no receipt|receipt)\b",
}


def stated(trace: str) -> dict[str, str]:
    """The facts that a text names, each as it is named first; the goods by their item.

    >>> stated("sender, damaged. express, 4 days early. damaged, a violin, fragile: B1 no receipt.")["item"]
    'a violin'
    """
    found = {name: re.search(pattern, trace) for name, pattern in _STATED.items()}
    return {name: match[1] for name, match in found.items() if match}


def walk_of(facts: dict[str, str]) -> tuple[str, str]:
    """The walk from facts that a trace states; what it leaves out is taken to be what a walk never needs to name."""
    return walk(
        Case(
            writer=facts.get("writer", "sender"),
            service=facts.get("service", "standard"),
            trouble=facts.get("trouble", "damaged"),
            item=facts.get("item", "a drill"),
            days=int(facts.get("days", EARLY_DAYS)),
            value=int(facts.get("value", HIGH_VALUE)),
            receipt=facts.get("receipt", "receipt") == "receipt",
        )
    )


def in_message(message: str) -> dict[str, str]:
    """What can be looked up in a message word by word: service, days, value and item. Who writes, what the trouble is
    and whether there is a receipt takes reading."""
    facts = stated(message)
    return {name: facts[name] for name in ("service", "days", "value", "item") if name in facts}
