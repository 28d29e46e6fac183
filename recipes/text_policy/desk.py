"""The rulebook (rulebook.md) as code: what labels the cases and what checks a reasoning trace."""

from __future__ import annotations

import re
from dataclasses import dataclass

GOODS = {
    "fragile": (
        "wine glasses", "a china tea set", "a wall mirror", "a desk lamp", "a computer screen", "a camera",
        "a violin", "a glass vase", "porcelain plates", "a guitar", "a crystal bowl", "a television",
    ),
    "perishable": (
        "a birthday cake", "smoked fish", "cut roses", "tomato plants", "heart medicine", "fresh cheese",
        "tulips", "strawberries", "a potted orchid", "insulin", "sausages", "chocolate pralines",
    ),
    "ordinary": (
        "a winter coat", "running shoes", "cookery books", "a drill", "wooden toys", "bed linen",
        "a leather bag", "jeans", "a tool box", "a board game", "a wool blanket", "school books",
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
    """The rules visited, in the trace's words, and the reply.

    >>> walk(Case("sender", "express", "damaged", "a violin", 4, 340, True))
    ('A1 no. A2 no. B1 receipt, high.', 'send an inspector')
    """
    steps, reply = _rules(case)
    return " ".join(f"{step}." for step in steps), reply


def _rules(case: Case) -> tuple[list[str], str]:
    if case.writer == "receiver" and case.trouble == "lost":
        return ["A1 yes"], "refer to sender"
    if case.timing == "closed":
        return ["A1 no", "A2 yes"], "close the claim"
    steps, reply = {"damaged": _damaged, "lost": _lost, "delayed": _delayed}[case.trouble](case)
    return ["A1 no", "A2 no", *steps], reply


def _damaged(case: Case) -> tuple[list[str], str]:
    receipt = _receipt(case)
    if case.goods == "fragile":
        if not case.receipt:
            return [f"B1 {receipt}"], "ask for photos"
        reply = "send an inspector" if case.worth == "high" else "pay the value"
        return [f"B1 {receipt}, {case.worth}"], reply
    if case.goods == "perishable":
        reply = "pay half the value" if case.service == "express" else "decline"
        return ["B1 no", f"B2 {case.service}"], reply
    return ["B1 no", "B2 no", f"B3 {receipt}"], "offer a repair" if case.receipt else "ask for photos"


def _lost(case: Case) -> tuple[list[str], str]:
    if case.timing == "early":
        return [f"C1 {case.service}"], "start a search" if case.service == "express" else "ask to wait"
    if case.worth == "low":
        return ["C1 no", "C2 low"], "send a voucher"
    reply = "pay the value" if case.receipt else "pass to the manager"
    return ["C1 no", f"C2 high, {_receipt(case)}"], reply


def _delayed(case: Case) -> tuple[list[str], str]:
    if case.goods == "perishable":
        return [f"D1 {_receipt(case)}"], "pay half the value" if case.receipt else "send a voucher"
    if case.service == "express":
        return ["D1 no", "D2 express"], "refund the postage"
    reply = "pass to the manager" if case.worth == "high" else "write an apology"
    return ["D1 no", f"D2 standard, {case.worth}"], reply


def _receipt(case: Case) -> str:
    return "receipt" if case.receipt else "no receipt"


REPLIES = (
    "refer to sender", "close the claim", "send an inspector", "pay the value", "ask for photos",
    "pay half the value", "decline", "offer a repair", "start a search", "ask to wait", "send a voucher",
    "pass to the manager", "refund the postage", "write an apology",
)  # fmt: skip


def facts(case: Case) -> str:
    """The facts as a trace states them, each with what the rulebook makes of it."""
    item = re.sub(r"^an? ", "", case.item)
    return (
        f"{case.writer}, {case.service}, {case.trouble}. {item}: {case.goods}. "
        f"{case.days} days: {case.timing}. {case.value} euros: {case.worth}. {_receipt(case)}."
    )


def trace(case: Case) -> str:
    """The reasoning: the facts, then the walk."""
    return f"{facts(case)} {walk(case)[0]}"


_FACTS = re.compile(
    r"(sender|receiver), (standard|express), (damaged|lost|delayed)\. "
    r"([a-z ]+): (fragile|perishable|ordinary)\. (\d{1,3}) days: (early|in time|closed)\. "
    r"(\d{1,4}) euros: (high|low)\. (receipt|no receipt)\. "
)
_ITEMS = {re.sub(r"^an? ", "", item): item for item in KIND_OF}


def read_trace(text: str) -> tuple[Case, str] | None:
    """The case that a trace claims and the walk that it takes; None when its facts are not stated as above,
    or when it judges one against the rulebook (a violin that is perishable, 12 days that are early)."""
    match = _FACTS.match(text)
    if match is None or match[4] not in _ITEMS:
        return None
    receipt = match[10] == "receipt"
    case = Case(match[1], match[2], match[3], _ITEMS[match[4]], int(match[6]), int(match[8]), receipt)
    return (case, text[match.end() :]) if facts(case) + " " == match[0] else None
