"""What `mpi-mlx chat` shows: answers as they are written, tool calls, comparisons."""

from __future__ import annotations

import json
import re

from rich.console import Console, Group
from rich.live import Live
from rich.markdown import Markdown
from rich.padding import Padding
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mpi_mlx.serving.calls import CallFormat

HERMES = CallFormat()
TRACE = "bright_black italic"


class LiveAnswer:
    """An answer growing in the terminal: finished blocks are printed for good, the last one is redrawn."""

    def __init__(self, console: Console, show_reasoning: bool, calls: CallFormat = HERMES):
        self.console, self.show_reasoning, self.calls = console, show_reasoning, calls
        self._printed = 0  # characters of the answer printed for good
        self._traced = False
        self._live = Live(
            Spinner("dots", Text(" reading", style="dim")),
            console=console,
            refresh_per_second=12,
            transient=True,
            vertical_overflow="ellipsis",
        )

    def __enter__(self) -> LiveAnswer:
        self._live.start()
        return self

    def __exit__(self, *exc) -> None:
        self._live.update("")
        self._live.stop()

    def update(self, reasoning: str | None, answer: str, thinking: bool) -> None:
        """The reply so far; ``thinking``: the trace is not closed yet."""
        if thinking:
            self._live.update(self._trace(reasoning) if self.show_reasoning else _busy("thinking"))
            return
        self._settle_trace(reasoning)
        text = self.calls.text(answer, over=False).strip()
        end = _last_break(text, self._printed)
        if end > self._printed:
            self.console.print(_body(text[self._printed : end]))
            self._printed = end
        self._live.update(_body(text[self._printed :]) if text[self._printed :].strip() else _busy(""))

    def finish(self, reasoning: str | None, answer: str) -> None:
        """Prints what is left for good."""
        self._settle_trace(reasoning)
        rest = self.calls.text(answer).strip()[self._printed :]
        self._live.update("")
        if rest.strip():
            self.console.print(_body(rest))

    def _settle_trace(self, reasoning: str | None) -> None:
        if not self._traced and reasoning and self.show_reasoning:
            self.console.print(self._trace(reasoning))
        self._traced = self._traced or bool(reasoning)

    def _trace(self, reasoning: str | None):
        return Padding(Text(reasoning or "", style=TRACE), (0, 0, 0, 2))


def _busy(what: str):
    return Spinner("dots", Text(f" {what}" if what else "", style="dim"))


def _body(text: str):
    return Padding(Markdown(text.strip("\n")), (0, 0, 0, 2))


def _last_break(text: str, start: int) -> int:
    """Where the last finished block of Markdown ends: a blank line outside of code, lists and tables."""
    end, fenced, position = start, False, start
    for line in text[start:].splitlines(keepends=True):
        position += len(line)
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        if not line.strip() and not fenced:
            following = text[position:]
            # a list or an indented line may go on after a blank line
            if following.strip() and not re.match(r"\s|[-*+] |\d+[.)] ", following):
                end = position
    return end


def tool_card(name: str | None, arguments: dict) -> Panel:
    """A tool call as a card."""
    if name is None:
        return Panel("a tool call that cannot be read", title="tool call", border_style="red", expand=False)
    table = Table.grid(padding=(0, 2))
    for key, value in arguments.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        table.add_row(Text(key, style="cyan"), Text(shown))
    return Panel(
        table if arguments else Text("no arguments", style="dim"),
        title=Text(f"tool call: {name}", style="bold"),
        title_align="left",
        border_style="yellow",
        expand=False,
    )


def result_card(name: str, content) -> Panel:
    """What a tool returned."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    lines = [
        Text(part["text"][:2000])
        if part["type"] == "text"
        else Text(f"image, {part['image'].width} x {part['image'].height}", style="dim")
        for part in parts
    ]
    title = Text(f"result: {name}")
    return Panel(Group(*lines), title=title, title_align="left", border_style="green", expand=False)


def comparison(one, other) -> Table:
    """Two replies to a question, without the document and with it in context, side by side."""
    without, within = (one, other) if other.in_context else (other, one)
    table = Table(expand=True, show_lines=True)
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("without the document", ratio=1)
    table.add_column("document in context", ratio=1)
    table.add_row("answer", *(Markdown(r.answer or "(none)") for r in (without, within)))
    for label, show in STATISTICS:
        table.add_row(label, *(show(r.stats) for r in (without, within)))
    return table


STATISTICS = (
    (
        "prompt",
        lambda s: f"{s.prompt_tokens:,} tokens" + (f", {s.cached_tokens:,} kept" if s.cached_tokens else ""),
    ),
    ("first token", lambda s: f"{1000 * s.first_token_seconds:,.0f} ms"),
    ("answer length", lambda s: f"{s.completion_tokens:,} tokens"),
    ("speed", lambda s: f"{s.tokens_per_second:,.0f} tokens/s" if s.tokens_per_second else "-"),
)


def stats_table(reply) -> Table:
    """What the last answer took."""
    table = Table.grid(padding=(0, 2))
    for label, show in STATISTICS:
        table.add_row(Text(label, style="dim"), show(reply.stats))
    table.add_row(Text("document", style="dim"), "in context" if reply.in_context else "not in context")
    table.add_row(Text("ended by", style="dim"), ENDED[reply.stats.ended])
    return table


ENDED = {"stop": "the model", "length": "the limit of tokens (--max-tokens)", "interrupted": "you"}
