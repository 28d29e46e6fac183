"""`mpi-mlx chat` around a random model, and its screen around a scripted one."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mpi_mlx_cli.chat import Rulebook
from mpi_mlx_cli.chat_input import dropped_path, dropped_picture, leading_picture
from mpi_mlx_cli.chat_loop import ChatLoop
from mpi_mlx_cli.chat_view import HERMES, _last_break
from PIL import Image
from rich.console import Console

from mpi_mlx.errors import ServingError
from mpi_mlx.serving.session import Reply, ReplyStats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "models"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from checkpoints import write_qwen2_5_vl

    return write_qwen2_5_vl(
        tmp_path_factory.mktemp("tiny") / "tiny", hidden_size=32, num_hidden_layers=2, intermediate_size=48,
        rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]},
    )  # fmt: skip


def chat(folder, *arguments, text, **options):
    command = [sys.executable, "-m", "mpi_mlx_cli.main", "chat", str(folder), *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=240, **options)


def test_a_pipe_gets_plain_text(folder, tmp_path):
    picture = tmp_path / "a red one.png"
    Image.new("RGB", (56, 56), "red").save(picture)
    done = chat(folder, "--image", picture, "--max-tokens", 6, text="How many?\n")
    assert done.returncode == 0 and "\x1b" not in done.stdout
    assert "cut at 6 tokens" in done.stderr and done.stdout.endswith("\n")
    from mpi_mlx.models import load_model
    from mpi_mlx.serving.session import ChatSession

    session = ChatSession(load_model(folder), max_tokens=6)
    session.attach(str(picture))
    list(session.ask("How many?"))
    assert done.stdout.strip() == session.reply.answer
    empty = chat(folder, text="")
    assert empty.returncode == 2 and "no question" in empty.stderr
    command = [sys.executable, "-m", "mpi_mlx_cli.main", "chat", str(folder)]
    for stdin in (picture.read_bytes(), b"caf\xe9"):
        binary = subprocess.run(command, input=stdin, capture_output=True, timeout=240)
        assert binary.returncode == 2 and b"no text in UTF-8" in binary.stderr


class Scripted:
    """Answers what it was told to, piece by piece."""

    calls, tools = HERMES, None

    def __init__(self, *answers, document=None):
        self.answers, self.document = list(answers), document
        self.in_context, self.messages, self.reply, self.images, self.results = False, [], None, [], []
        self.stopped = False

    def _write(self, text, in_context):
        self.reply = Reply("", in_context, ReplyStats(20, 5, len(text), 0.1, 0.2))
        self.stopped = False
        for letter in text:
            self.reply.text += letter
            yield letter
            if self.stopped:
                self.reply.stats.ended = "interrupted"
                return

    def ask(self, text):
        yield from self._write(self.answers.pop(0), self.in_context)
        self.messages += [
            {"role": "user", "content": text},
            {"role": "assistant", "content": self.reply.text},
        ]

    def give_results(self, results):
        self.results += results
        yield from self.ask("results")

    def again(self, in_context):
        yield from self._write("the other answer", in_context)

    def use_document(self, in_context):
        if in_context and self.document is None:
            raise ServingError("there is no document")
        self.in_context = in_context

    def attach(self, path):
        self.images.append(path)

    def stop(self):
        self.stopped = True

    def reset(self):
        self.messages = []


class Named:
    name = "agent"


def screen(session, *lines, toolbox=None, confirm=None, **options):
    """The text that a chat of these lines leaves on the terminal."""
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    left = list(lines)

    def read():
        if not left:
            raise EOFError
        line = left.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    ChatLoop(session, Named, toolbox, console=console, read=read, confirm=confirm, **options).run()
    return console.file.getvalue()


def test_answers_are_markdown_and_reasoning_hides():
    answers = ["<think>red cube</think>\n**stop**\n\n- one\n- two\n\nend"] * 2
    shown = screen(Scripted(*answers), "go?", "/reasoning hide", "go?")
    assert "stop" in shown and "**" not in shown and "•" in shown and shown.count("red cube") == 1
    assert shown.count("end") == 2


def test_the_document_is_compared_side_by_side():
    class Document:
        name = "refunds"

    session = Scripted("plain answer", "third", document=Document)
    shown = screen(session, "go?", "/document on", "again?", "/stats")
    assert "without the document" in shown and "the other answer" in shown and "100 ms" in shown
    assert session.in_context and "20 tokens, 5 kept" in shown and "in context" in shown
    assert "there is no document" in screen(Scripted(), "/document on")
    both = Scripted("one", "two", document=Document)
    assert screen(both, "/document both", "x", "y").count("the other answer") == 2 and not both.in_context
    stopped = Scripted("one", "", document=Document)  # before the second answer's first token
    assert screen(stopped, "/document both", "x", "y").count("the other answer") == 1


def test_a_document_is_read_when_it_is_wanted():
    class Document:
        name = "refunds"

    read = []

    def load():
        read.append(1)
        return Document

    session = Scripted("plain answer", "third")
    shown = screen(session, "go?", rulebook=Rulebook("refunds", load))
    assert "refunds not in context" in shown and not read and session.document is None
    shown = screen(session, "/document on", "go?", "/document both", rulebook=Rulebook("refunds", load))
    assert read == [1] and session.document is Document and session.in_context and "the other answer" in shown


def test_an_agent_is_asked_where_its_document_is_no_more(folder, tmp_path):
    from mpi_mlx_cli import chat as command

    from mpi_mlx.models import load_model
    from mpi_mlx.models.adapters import save_adapter
    from mpi_mlx.models.lora import attach_lora
    from mpi_mlx.recipe import LoraSpec, load_recipe
    from mpi_mlx.serving.target import resolve_target

    document = tmp_path / "rules.md"
    document.write_text("# Refunds")
    model = load_model(folder)
    attach_lora(model, LoraSpec(rank=2))
    run = tmp_path / "run"
    save_adapter(model, run / "adapter")
    (tmp_path / "r.yaml").write_text(
        f"model: {folder}\ndata: {{document: rules.md, train: rows.jsonl}}\nstages: [{{stage: sft, steps: 1}}]"
    )
    (run / "recipe.yaml").write_text(load_recipe(tmp_path / "r.yaml").to_yaml())
    target = resolve_target(run)
    assert command.rulebook_of(target).missing is None and command.rulebook_of(target).load().text == "# Refunds"
    document.unlink()
    done = chat(run, "--max-tokens", 2, text="hello")
    assert done.returncode == 0 and done.stderr.startswith("the answer was cut at 2 tokens")
    refused = chat(run, "--in-context", text="hello")
    assert refused.returncode == 2 and "rules.md: no such document" in refused.stderr
    shown = screen(Scripted("fine"), "go?", "/document on", "/exit", rulebook=command.rulebook_of(target))
    assert "rules missing" in shown and f"{document} is not there" in shown.replace("\n", "")
    assert "fine" in shown and "no such document" in shown


CALL = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


class Box:
    ran: list = []

    def __contains__(self, name):
        return name == "weather"

    def call(self, name, arguments):
        self.ran.append((name, arguments))
        return "20 degrees"


def test_tools_run_only_after_a_yes():
    shown = screen(Scripted(CALL), "weather?")
    assert "tool call: weather" in shown and "Oslo" in shown and "<tool_call>" not in shown
    box, asked = Box(), []
    box.ran = []

    def no(question):
        asked.append(question)
        return False

    session = Scripted(CALL, "sorry")
    screen(session, "weather?", toolbox=box, confirm=no)
    assert asked == ["run weather?"] and not box.ran and "did not allow" in session.results[0][1]
    session = Scripted(CALL, "It is mild.")
    shown = screen(session, "weather?", toolbox=box, confirm=lambda question: True)
    assert box.ran == [("weather", {"city": "Oslo"})] and session.results == [("weather", "20 degrees")]
    assert "It is mild." in shown and "result: weather" in shown


def test_commands_and_wrong_ones(tmp_path):
    picture = tmp_path / "it's a red one.png"
    Image.new("RGB", (5, 5)).save(picture)
    session = Scripted("a")
    shown = screen(
        session, "", f"/image {picture}", str(picture), KeyboardInterrupt(), "/nonsense", "/help", "/stats",
        "/reset", "/exit", "never read",
    )  # fmt: skip
    assert session.images == [str(picture)] * 2
    assert "there is no /nonsense" in shown and "Ctrl-D" in shown and "/reasoning" in shown
    assert session.answers == ["a"]


def test_ctrl_c_stops_the_answer_and_not_the_chat():
    class Pressed(Scripted):
        def _write(self, text, in_context):
            for i, piece in enumerate(super()._write(text, in_context)):
                if i == 3 and text.startswith("first"):
                    os.kill(os.getpid(), signal.SIGINT)
                yield piece

    before = signal.getsignal(signal.SIGINT)
    shown = screen(Pressed("first answer is long", "second"), "x", "y")
    assert "stopped" in shown and "long" not in shown and "second" in shown
    assert signal.getsignal(signal.SIGINT) is before


def test_dropped_paths(tmp_path):
    picture = tmp_path / "my red one.png"
    Image.new("RGB", (5, 5)).save(picture)
    spaced = str(picture).replace(" ", "\\ ")
    for typed in (str(picture), f"'{picture}'", f'"{picture}" ', spaced, picture.as_uri()):
        assert dropped_path(typed) == picture and dropped_picture(typed) == picture, typed
    assert dropped_picture("/image") is None and dropped_picture(str(tmp_path)) is None
    assert dropped_picture("what is in the picture.png?" * 50) is None


def test_a_dropped_path_that_is_written_on(tmp_path):
    picture, plain = tmp_path / "my red one.png", tmp_path / "x.png"
    for path in (picture, plain):
        Image.new("RGB", (5, 5)).save(path)
    for typed in (f"'{picture}'", f'"{picture}"', str(picture).replace(" ", "\\ "), picture.as_uri()):
        assert leading_picture(f"{typed} what  is it?") == (picture, "what  is it?"), typed
    for line in ("/image x", f"{plain}", f"{tmp_path} what?", "'quoted' words", "/tmp/nothing.png what?"):
        assert leading_picture(line) is None, line
    session = Scripted("a cube")
    shown = screen(session, f"{plain} '{picture}' what?", f"/image {tmp_path / 'none.png'}", f"/image {tmp_path}")
    assert session.images == [str(plain), str(picture), str(tmp_path)] and "a cube" in shown
    assert session.messages[0]["content"] == "what?" and "no such picture" in shown


def test_blocks_of_markdown_are_cut_where_they_end():
    text = "one\n\ntwo"
    assert text[: _last_break(text, 0)] == "one\n\n"
    for whole in ("- a\n\n- b", "```\na\n\nb", "1. a\n\n2. b", "- a\n\n  more", "a\n\n"):
        assert _last_break(whole, 0) == 0, whole
