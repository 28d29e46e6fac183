"""Draws docs/chat.png and docs/serve.png: what the two commands show, with a trained run's real answers.

python docs/screenshots.py runs/quickstart [--example 0]

The question and its picture are an example of the run's own test split. Nothing is composed by hand: the chat's
loop writes to a recorded console, and the server is a process that a script asks through the openai client.
"""

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "benchmarks"))
from served import Server  # noqa: E402  also finds a checkout that is not installed

COLUMNS, SIZE, LINE, EDGE, BAR, PICTURE = 96, 22, 29, 28, 44, 300
BACKGROUND, INK, FRAME = (24, 26, 31), (214, 218, 224), (38, 41, 48)
GREY = (127, 132, 142)
COLORS = [(24, 26, 31), (224, 108, 117), (152, 195, 121), (229, 192, 123), (97, 175, 239), (198, 120, 221),
          (86, 182, 194), INK]  # fmt: skip
ASK = """\
import base64
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:{port}/v1", api_key="none")
picture = base64.b64encode(open("scene.png", "rb").read()).decode()
content = [
    {{"type": "image_url", "image_url": {{"url": f"data:image/png;base64,{{picture}}"}}}},
    {{"type": "text", "text": {question}}},
]
answer = client.chat.completions.create(
    model="{model}", messages=[{{"role": "user", "content": content}}]
)
message = answer.choices[0].message
print(message.reasoning_content)
print("=>", message.content, f"({{answer.usage.prompt_tokens}} prompt tokens)")
"""


def recorder() -> Console:
    return Console(record=True, file=io.StringIO(), width=COLUMNS, color_system="truecolor", highlight=False)


def color(style) -> tuple[int, int, int]:
    found = INK
    if style is not None and style.color is not None and not style.color.is_default:
        number = style.color.number
        plain = number is not None and number < 16
        found = (GREY if number == 8 else COLORS[number % 8]) if plain else tuple(style.color.get_truecolor())
    if style is not None and style.dim:
        found = tuple((2 * a + b) // 3 for a, b in zip(found, BACKGROUND, strict=True))
    return found


def draw(console: Console, path: Path, title: str, picture: Image.Image) -> None:
    """The console's screen as a window, with the picture that the question is about beside it."""
    text = Text.from_ansi(console.export_text(styles=True).rstrip("\n"))
    plain = Console(width=COLUMNS, color_system="truecolor", force_terminal=True, file=io.StringIO())
    lines = plain.render_lines(text, plain.options, pad=False)
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = {
        (bold, italic): ImageFont.truetype(str(folder / f"DejaVuSansMono{name}.ttf"), SIZE)
        for (bold, italic), name in {
            (False, False): "", (True, False): "-Bold", (False, True): "-Oblique", (True, True): "-BoldOblique",
        }.items()
    }  # fmt: skip
    step = fonts[False, False].getlength("M")
    width, height = int(step * COLUMNS) + PICTURE + 3 * EDGE, BAR + 2 * EDGE + max(LINE * len(lines), PICTURE + LINE)
    image = Image.new("RGB", (width, height), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, 0, width, BAR), fill=FRAME)
    for index, dot in enumerate(("#ff5f57", "#febc2e", "#28c840")):
        canvas.ellipse((20 + 28 * index, 14, 36 + 28 * index, 30), fill=dot)
    canvas.text((width / 2, BAR / 2), title, font=fonts[False, False], fill=GREY, anchor="mm")
    for row, line in enumerate(lines):
        column = 0
        for segment in line:
            style = segment.style
            font = fonts[bool(style and style.bold), bool(style and style.italic)]
            for letter in segment.text:
                place = (EDGE + column * step, BAR + EDGE + row * LINE)
                canvas.text(place, letter, font=font, fill=color(style))
                column += 1
    corner = (width - PICTURE - EDGE, BAR + EDGE)
    image.paste(picture.convert("RGB").resize((PICTURE, PICTURE), Image.Resampling.NEAREST), corner)
    middle = (corner[0] + PICTURE / 2, corner[1] + PICTURE + LINE / 2 + 4)
    canvas.text(middle, "scene.png", font=fonts[False, False], fill=GREY, anchor="mm")
    image.save(path, optimize=True)
    print(path)


def example(target, number: int) -> tuple[Image.Image, str]:
    """Picture and question of a test example of the run's own data."""
    from mpi_mlx.data.dataset import load_dataset
    from mpi_mlx.models.images import load_image

    found = load_dataset(target.data, target.data_folder).test[number]
    parts = found.messages[-1]["content"]
    picture = next(part["image"] for part in parts if part["type"] == "image")
    return load_image(picture), " ".join(part["text"] for part in parts if part["type"] == "text")


def chat(target, title: str, picture: Image.Image, question: str, folder: Path) -> None:
    from mpi_mlx_cli.chat_loop import ChatLoop

    from mpi_mlx.serving.session import ChatSession

    console, lines, model = recorder(), ["/image scene.png", question, "/document both"], target.load()
    list(ChatSession(model, max_tokens=4).ask("hello"))  # the first answer of a process takes longer
    session = ChatSession(model, document=target.document(), max_tokens=target.max_tokens)

    def read() -> str:
        if not lines:
            raise EOFError
        console.print(Text.assemble(("› ", "bold green"), lines[0]))
        return lines.pop(0)

    console.print(Text.assemble(("$ ", "bold green"), f"mpi-mlx chat {title}"))
    with contextlib.chdir(folder):  # where scene.png is
        ChatLoop(session, target, console=console, read=read).run()
    draw(console, HERE / "chat.png", "mpi-mlx chat", picture)


def serve(run: str, title: str, picture: Image.Image, question: str, folder: Path) -> None:
    console = recorder()
    server = Server(run)
    name = server.names[0]
    script = ASK.format(port=server.port, question=json.dumps(question), model=name)
    asked = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    server.terminate()
    code = server.wait()
    if asked.returncode or code:
        raise SystemExit(f"{asked.stderr}\nthe server's exit code: {code}")

    def shown(text: str) -> str:  # the port that is the command's own default
        return text.replace(f":{server.port}/", ":8080/")

    prompt = ("$ ", "bold green")
    console.print(Text.assemble(prompt, f"mpi-mlx serve {title} &"))
    console.print(shown(server.greeting))
    console.print(Text.assemble(prompt, "cat ask.py"))
    console.print(Syntax(shown(script).rstrip(), "python", theme="ansi_dark", background_color="default"))
    console.print(Text.assemble(prompt, "python ask.py"))
    console.print(asked.stdout.rstrip())
    draw(console, HERE / "serve.png", "mpi-mlx serve", picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="output folder of mpi-mlx train")
    parser.add_argument("--example", type=int, default=0, help="of the test split")
    options = parser.parse_args()
    from mpi_mlx.serving.target import resolve_target

    target = resolve_target(options.run)
    picture, question = example(target, options.example)
    title = f"runs/{Path(options.run).resolve().name}"
    with tempfile.TemporaryDirectory() as folder:
        picture.save(Path(folder) / "scene.png")
        chat(target, title, picture, question, Path(folder))
        serve(options.run, title, picture, question, Path(folder))


if __name__ == "__main__":
    main()
