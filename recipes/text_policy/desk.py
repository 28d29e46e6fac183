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
    """The rule that decides, with what it asks for, in the trace's words; and the reply.

    >>> walk(Case("sender", "express", "damaged", "a violin", 4, 340, True))
    ('B1 receipt, high.', 'send an inspector')
    """
    rule, reply = _rule(case)
    return f"{rule}.", reply


def _rule(case: Case) -> tuple[str, str]:
    if case.writer == "receiver" and case.trouble == "lost":
        return "A1", "refer to sender"
    if case.timing == "closed":
        return "A2", "close the claim"
    return {"damaged": _damaged, "lost": _lost, "delayed": _delayed}[case.trouble](case)


def _damaged(case: Case) -> tuple[str, str]:
    receipt = _receipt(case)
    if case.goods == "fragile":
        if not case.receipt:
            return f"B1 {receipt}", "ask for photos"
        reply = "send an inspector" if case.worth == "high" else "pay the value"
        return f"B1 {receipt}, {case.worth}", reply
    if case.goods == "perishable":
        return f"B2 {case.service}", "pay half the value" if case.service == "express" else "decline"
    return f"B3 {receipt}", "offer a repair" if case.receipt else "ask for photos"


def _lost(case: Case) -> tuple[str, str]:
    if case.timing == "early":
        return f"C1 {case.service}", "start a search" if case.service == "express" else "ask to wait"
    if case.worth == "low":
        return "C2 low", "send a voucher"
    return f"C2 high, {_receipt(case)}", "pay the value" if case.receipt else "pass to the manager"


def _delayed(case: Case) -> tuple[str, str]:
    if case.goods == "perishable":
        return f"D1 {_receipt(case)}", "pay half the value" if case.receipt else "send a voucher"
    if case.service == "express":
        return "D2 express", "refund the postage"
    return f"D2 standard, {case.worth}", "pass to the manager" if case.worth == "high" else "write an apology"


def _receipt(case: Case) -> str:
    return "receipt" if case.receipt else "no receipt"


REPLIES = (
    "refer to sender", "close the claim", "send an inspector", "pay the value", "ask for photos",
    "pay half the value", "decline", "offer a repair", "start a search", "ask to wait", "send a voucher",
    "pass to the manager", "refund the postage", "write an apology",
)  # fmt: skip


def facts(case: Case) -> str:
    """What the rulebook asks about, numbers with what it makes of them: how a trace begins."""
    return (
        f"{case.writer}, {case.service}, {case.trouble}, {case.goods}, {case.days} days {case.timing}, "
        f"{case.value} euros {case.worth}, {_receipt(case)}."
    )


def trace(case: Case) -> str:
    """The reasoning: the facts, then the rule that decides."""
    return f"{facts(case)} {walk(case)[0]}"


_FACTS = re.compile(
    r"(sender|receiver), (standard|express), (damaged|lost|delayed), (fragile|perishable|ordinary), "
    r"(\d{1,3}) days (?:early|in time|closed), (\d{1,4}) euros (?:high|low), (receipt|no receipt)\. "
)


def read_trace(text: str) -> tuple[Case, str] | None:
    """A case with the facts that a trace states, and the rule that it takes; None for other text, or when it judges
    a number against the rulebook (12 days that are early)."""
    match = _FACTS.match(text)
    if match is None:
        return None
    writer, service, trouble, goods, days, value, receipt = match.groups()
    case = Case(writer, service, trouble, GOODS[goods][0], int(days), int(value), receipt == "receipt")
    return (case, text[match.end() :]) if facts(case) + " " == match[0] else None
