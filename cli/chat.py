"""`mpi-mlx chat`: talk to a trained agent, or to any model, in the terminal or through a pipe."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

COMMANDS = {
    "/image": "PATH: show a picture with the next question (or drop the file on the terminal)",
    "/document": "on | off | both: the rulebook in context; asks the last question again, side by side",
    "/reasoning": "show | hide: the trace before the answer",
    "/stats": "what the last answer took",
    "/save": "PATH: the conversation as .md or .json",
    "/reset": "begin anew",
    "/help": "this list",
    "/exit": "leave (Ctrl-D)",
}


def chat_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="Output folder of mpi-mlx train, a model or adapter folder, a hub id, or embedded:tiny.",
        ),
    ],
    image: Annotated[
        list[Path] | None, typer.Option("--image", metavar="PATH", help="Shown with the first question.")
    ] = None,
    document: Annotated[
        Path | None, typer.Option("--document", metavar="PATH", help="The rulebook; default: the run's own.")
    ] = None,
    in_context: Annotated[
        bool, typer.Option("--in-context", help="Begin with the rulebook in context.")
    ] = False,
    stage: Annotated[
        str | None, typer.Option("--stage", help="Of a run: the model after this stage, such as sft.")
    ] = None,
    tools: Annotated[
        Path | None,
        typer.Option("--tools", metavar="FILE.py", help="Typed functions it may call, once you say yes."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="Text of a system message.")] = None,
    reasoning: Annotated[
        bool | None, typer.Option(help="Show the trace. Default: in a terminal, not in a pipe.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Longest answer. Default: the run's.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, help="0 always takes the likeliest token.")
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0, help="Of sampling.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling.")] = 0,
) -> None:
    """Talk to a model. Piped input is one question; the answer is printed as plain text."""
    from mpi_mlx.serving.target import resolve_target

    target = resolve_target(model, stage=stage)
    toolbox = None
    if tools is not None:
        from mpi_mlx.serving.tools import load_tools

        toolbox = load_tools(tools)
    with _loading(target.name):
        session = _session(
            target, document, in_context, toolbox, system,
            max_tokens=target.max_tokens if max_tokens is None else max_tokens,
            temperature=target.temperature if temperature is None else temperature,
            top_p=target.top_p if top_p is None else top_p, seed=seed,
        )  # fmt: skip
    for path in image or ():
        attach(session, path)
    if not sys.stdin.isatty():
        _answer_pipe(session, bool(reasoning))
        return
    from mpi_mlx_cli.chat_loop import ChatLoop

    rulebook = rulebook_of(target)
    ChatLoop(session, target, toolbox, show_reasoning=reasoning is not False, rulebook=rulebook).run()


def _session(target, document: Path | None, in_context: bool, toolbox, system, **sampling):
    from mpi_mlx.serving.session import ChatSession

    if document is not None:
        from mpi_mlx.documents import load_document

        found = load_document(document)
    else:  # an agent that has learned it is asked without: it is read when it is wanted
        found = target.document() if in_context else None
    logging.getLogger("transformers").setLevel(logging.ERROR)  # what is too long, the session says better
    model = target.load()
    descriptions = None if toolbox is None else toolbox.descriptions
    return ChatSession(
        model, document=found, in_context=in_context, system=system, tools=descriptions, **sampling
    )


@dataclass(frozen=True)
class Rulebook:
    """A run's document that has not been read yet. ``missing``: where it was, when it is there no more."""

    name: str
    load: Callable
    missing: Path | None = None


def rulebook_of(target) -> Rulebook | None:
    """What the run's recipe names, looked for and not read; None where it names none."""
    data = target.data
    if data is None:
        return None
    if getattr(data, "benchmark", None):
        return Rulebook("the document", target.document)
    if data.document is None:
        return None
    path = Path(target.data_folder, data.document)
    return Rulebook(path.stem, target.document, None if path.exists() else path)


def attach(session, path: Path) -> None:
    """Shows a picture with the next question. Raises ServingError, in words for a person who gave its path."""
    from mpi_mlx.errors import DataError, ServingError

    if not os.path.exists(path):
        raise ServingError(f"{path}: no such picture; check the path")
    try:
        session.attach(str(path))
    except DataError:
        raise ServingError(f"{path} is no picture that can be read, such as PNG or JPEG; give another") from None


@contextlib.contextmanager
def _loading(name: str):
    """A line on stderr while the model loads, where somebody sees it."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(f"loading {name}"):
        yield


@contextlib.contextmanager
def unechoed():
    """Within, what is typed waits for the next prompt unseen: echoed, it would tear the answer's display."""
    try:
        import termios
    except ImportError:
        yield
        return
    try:
        place = sys.stdin.fileno()
        before = termios.tcgetattr(place)
    except (OSError, ValueError, termios.error):  # no terminal
        yield
        return
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(place, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(place, termios.TCSANOW, before)


@contextlib.contextmanager
def interrupts_stop(session):
    """Within, Ctrl-C ends the answer; a second one what is running around it."""

    def stop(*_) -> None:
        session.stop()
        signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _answer_pipe(session, show_reasoning: bool) -> None:
    """All of stdin as one question; the answer goes to stdout as it comes."""
    from mpi_mlx.errors import ServingError

    try:
        question = sys.stdin.buffer.read().decode("utf-8").strip()
    except UnicodeDecodeError:
        raise ServingError("what came through the pipe is no text in UTF-8; pictures come with --image") from None
    if not question:
        raise ServingError('no question came through the pipe; try: echo "..." | mpi-mlx chat RUN')
    printed = ""
    for _ in session.ask(question):
        reasoning, answer = session.reply.parts
        text = session.reply.text if show_reasoning else answer
        if text.startswith(printed) and len(text) > len(printed):
            sys.stdout.write(text[len(printed) :])
            sys.stdout.flush()
            printed = text
    final = session.reply.text.strip() if show_reasoning else session.reply.answer
    if not final.startswith(printed.rstrip()):
        sys.stdout.write("\n" + final)
    sys.stdout.write("\n")
    sys.stdout.flush()
    if session.reply.stats.ended == "length":
        print(
            f"the answer was cut at {session.reply.stats.completion_tokens} tokens; "
            "give it more with --max-tokens",
            file=sys.stderr,
        )
