"""The conversation of `mpi-mlx chat` in a terminal: lines in, commands done, answers shown."""

from __future__ import annotations

from collections.abc import Iterable

from mpi_mlx_cli.chat import COMMANDS, attach, interrupts_stop, unechoed
from mpi_mlx_cli.chat_input import dropped_path, dropped_picture, leading_picture, prompt_session
from mpi_mlx_cli.chat_view import LiveAnswer, comparison, result_card, stats_table, tool_card
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpi_mlx.data.completion import THINK_CLOSE
from mpi_mlx.errors import MPIError

MOST_CALLS = 8  # rounds of tool calls for one question


class ChatLoop:
    """Reads lines until the end of input.

    Args:
        session: a :class:`mpi_mlx.serving.session.ChatSession`.
        target: what was loaded, for the greeting.
        toolbox: functions that may be run after a yes, or None.
        show_reasoning: whether traces are shown.
        rulebook: a :class:`mpi_mlx_cli.chat.Rulebook` to read when `/document` asks for it, or None.
        console, read, confirm: where to show, how to read a line, how to ask yes or no; for tests.
    """

    def __init__(
        self, session, target, toolbox=None, *, show_reasoning=True, rulebook=None, console=None, read=None,
        confirm=None,
    ):
        self.session, self.target, self.toolbox, self.rulebook = session, target, toolbox, rulebook
        self.show_reasoning = show_reasoning
        self.both = False
        self.console = console or Console(highlight=False)
        self._read = read or prompt_session(COMMANDS).prompt
        self._confirm = confirm or self._ask_yes

    def run(self) -> None:
        """The whole chat."""
        self._greet()
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                self._note("Ctrl-D or /exit leaves")
                continue
            except EOFError:
                return
            try:
                if not self.handle(line):
                    return
            except MPIError as error:
                self.console.print(Text(f"  {error}", style="red"), soft_wrap=True)
            except KeyboardInterrupt:
                self._note("stopped")

    def handle(self, line: str) -> bool:
        """One line; False when it ends the chat. Raises MPIError."""
        if not line.strip():
            return True
        picture = dropped_picture(line)
        if picture is not None:
            self._image(str(picture))
            return True
        leading = leading_picture(line)
        if leading is not None:
            self._image(str(leading[0]))
            return self.handle(leading[1])
        word, _, rest = line.strip().partition(" ")
        if word in ("/exit", "/quit"):
            return False
        if word.startswith("/"):
            command = getattr(self, "_" + word[1:], None) if word in COMMANDS else None
            if command is None:
                self._note(f"there is no {word}; /help lists what there is")
            else:
                command(rest.strip())
            return True
        self._question(line)
        return True

    # ---- answers

    def _question(self, line: str) -> None:
        self._show(self.session.ask(line))
        for _ in range(MOST_CALLS):
            results = self._run_calls()
            if not results:
                break
            self._show(self.session.give_results(results))
        if self.both and self.session.reply.stats.completion_tokens:  # else it was stopped: as if not asked
            self._compare()

    def _show(self, pieces: Iterable[str]) -> None:
        """Shows an answer as it is written."""
        self.console.print()
        with interrupts_stop(self.session), unechoed(), LiveAnswer(
            self.console, self.show_reasoning, self.session.calls
        ) as live:
            for _ in pieces:
                reasoning, answer = self.session.reply.parts
                closed = THINK_CLOSE in self.session.reply.text
                live.update(reasoning, answer, thinking=reasoning is not None and not closed)
            live.finish(*self.session.reply.parts)
        reply = self.session.reply
        if reply.stats.ended == "length":
            self._note(f"cut at {reply.stats.completion_tokens} tokens; --max-tokens allows more")
        elif reply.stats.ended == "interrupted":
            self._note("stopped")
        self.console.print()

    def _run_calls(self) -> list[tuple[str, object]]:
        """Shows the reply's tool calls and runs those that are allowed; their results in order."""
        reply = self.session.reply
        if reply.stats.ended == "interrupted":
            return []
        calls = self.session.calls.parse(reply.answer, self.session.tools)
        results = []
        for call in calls:
            self.console.print(tool_card(call["name"], call["arguments"]))
            if self.toolbox is None:
                continue
            if call["name"] not in self.toolbox:
                told = self.toolbox.call(call["name"], {})
                self.console.print(result_card(call["name"] or "?", told))
                results.append((call["name"] or "?", told))
                continue
            if not self._confirm(f"run {call['name']}?"):
                results.append((call["name"], "error: the user did not allow this call"))
                continue
            result = self.toolbox.call(call["name"], call["arguments"])
            self.console.print(result_card(call["name"], result))
            results.append((call["name"], result))
        return results

    def _ask_yes(self, question: str) -> bool:
        try:
            return input(f"  {question} [y/N] ").strip().lower() in ("y", "yes")
        except EOFError:
            return False

    def _compare(self) -> None:
        """The last question the other way, both answers side by side."""
        first = self.session.reply
        how = "without the document" if first.in_context else "with the document in context"
        self._note(f"the same question {how}")
        with interrupts_stop(self.session), unechoed(), self.console.status("answering"):
            for _ in self.session.again(not first.in_context):
                pass
        self.console.print(comparison(first, self.session.reply))
        self.session.reply = first

    # ---- commands

    def _image(self, rest: str) -> None:
        if not rest:
            self._note("/image PATH, or drop the file on the terminal")
            return
        path = dropped_path(rest)
        attach(self.session, path)
        self._note(f"{path.name} goes with the next question")

    def _document(self, rest: str) -> None:
        if rest not in ("on", "off", "both"):
            state = "both, side by side" if self.both else "on" if self.session.in_context else "off"
            self._note(f"the document is {state}; /document on, off or both")
            return
        if rest != "off" and self.session.document is None and self.rulebook is not None:
            self.session.document = self.rulebook.load()
        before = self.session.in_context
        if rest == "both":
            self.session.use_document(True)  # raises without a document
            self.session.use_document(before)
        else:
            self.session.use_document(rest == "on")
        self.both = rest == "both"
        answered = bool(self.session.messages) and self.session.messages[-1]["role"] == "assistant"
        if answered and (self.both or self.session.in_context != before):
            self._compare()
        else:
            self._note(f"document {'on and off, side by side' if self.both else rest}")

    def _reasoning(self, rest: str) -> None:
        if rest not in ("show", "hide", ""):
            self._note("/reasoning show or hide")
            return
        self.show_reasoning = rest == "show" if rest else not self.show_reasoning
        self._note(f"reasoning is {'shown' if self.show_reasoning else 'hidden'}")

    def _stats(self, rest: str) -> None:
        if self.session.reply is None:
            self._note("nothing has been answered yet")
        else:
            self.console.print(stats_table(self.session.reply))

    def _save(self, rest: str) -> None:
        if not rest:
            self._note("/save PATH.md or PATH.json")
            return
        path = dropped_path(rest)
        try:
            self.session.save(path)
        except OSError as error:
            self._note(f"{path}: {error.strerror or error}")
            return
        self._note(f"saved to {path}")

    def _reset(self, rest: str) -> None:
        self.session.reset()
        self._note("a new conversation")

    def _help(self, rest: str) -> None:
        table = Table.grid(padding=(0, 2))
        for name, text in COMMANDS.items():
            table.add_row(Text(name, style="cyan"), Text(text))
        table.add_row(Text("Alt+Enter", style="cyan"), Text("a new line (or end the line with \\)"))
        table.add_row(Text("Ctrl-C", style="cyan"), Text("stop the answer"))
        self.console.print(table)

    def _greet(self) -> None:
        document = self.session.document
        known = "no document"
        if document is not None:
            where = "in context" if self.session.in_context else "not in context"
            known = f"{document.name} {where}"
        elif self.rulebook is not None:
            known = f"{self.rulebook.name} {'missing' if self.rulebook.missing else 'not in context'}"
        title = Text.assemble((self.target.name, "bold"), (f"  {known}  /help for commands", "dim"))
        self.console.print(title, soft_wrap=True)
        if document is None and self.rulebook is not None and self.rulebook.missing:
            self._note(f"{self.rulebook.missing} is not there; only /document wants it: start with --document PATH")

    def _note(self, text: str) -> None:
        self.console.print(Text(f"  {text}", style="dim"), soft_wrap=True)
