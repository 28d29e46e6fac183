"""A real `mpi-mlx serve` process, and a client that costs little beside it."""

import asyncio
import base64
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
if importlib.util.find_spec("mpi_mlx") is None:  # a checkout that is not installed
    sys.path.insert(0, str(ROOT))


class Server:
    """`mpi-mlx serve MODEL ...` on a free port of 127.0.0.1, until closed."""

    def __init__(self, model: str, *arguments: str):
        self._links = None
        env = dict(os.environ)
        if importlib.util.find_spec("mpi_mlx_cli") is None:
            self._links = tempfile.TemporaryDirectory()
            for name, folder in {"mpi_mlx": "mpi_mlx", "mpi_mlx_cli": "cli", "mpi_mlx_recipes": "recipes"}.items():
                (Path(self._links.name) / name).symlink_to(ROOT / folder)
            env["PYTHONPATH"] = os.pathsep.join(filter(None, [self._links.name, env.get("PYTHONPATH")]))
        command = [sys.executable, "-u", "-m", "mpi_mlx_cli.main", "serve", model, "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        line = self.process.stdout.readline()
        found = re.search(r"serving (.*) on http://127\.0\.0\.1:(\d+)", line)
        if not found:
            raise SystemExit(f"the server did not start: {line}")
        self.greeting, self.names, self.port = line.strip(), found[1].split(", "), int(found[2])

    def memory(self) -> float:
        """Resident MB."""
        shown = subprocess.run(["ps", "-o", "rss=", "-p", str(self.process.pid)], capture_output=True, text=True)
        return int(shown.stdout) / 1024

    def counter(self, name: str) -> float:
        """A number of /metrics."""
        with urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=60) as answer:
            return float(re.search(rf"^mpi_mlx_{name} (\S+)$", answer.read().decode(), re.MULTILINE)[1])

    def terminate(self) -> None:
        """Asks it to finish and go."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Its exit code."""
        code = self.process.wait(120)
        if self._links is not None:
            self._links.cleanup()
        return code


@dataclass
class Asked:
    """What became of a request. Seconds from sending it to the first chunk with text, and to the end."""

    error: str | None = None
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0


async def ask(port: int, body: dict, timeout: float = 300.0) -> Asked:
    """Sends a chat completion to be streamed, over a connection of its own, and reads it to its end."""
    asked = Asked()
    try:
        async with asyncio.timeout(timeout):
            await _exchange(port, body, asked)
    except Exception as error:
        asked.error = f"{type(error).__name__}: {error}"
    return asked


async def _exchange(port: int, body: dict, asked: Asked) -> None:
    raw = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    try:
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw
        )
        status = await reader.readline()
        done = reason = False
        while line := await reader.readline():
            if not line.startswith(b"data: "):
                asked.error = line.decode()[:300] if b'"error"' in line else asked.error
                continue
            if line == b"data: [DONE]\n":
                done, asked.seconds = True, time.perf_counter() - begin
                continue
            chunk = json.loads(line[6:])
            for choice in chunk.get("choices", ()):
                delta = choice["delta"]
                piece = delta.get("content") or delta.get("reasoning_content") or ""
                asked.text += piece
                reason = reason or bool(choice["finish_reason"])
                if not asked.first and (piece or reason):
                    asked.first = time.perf_counter() - begin
            if usage := chunk.get("usage"):
                asked.prompt_tokens, asked.tokens = usage["prompt_tokens"], usage["completion_tokens"]
                asked.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
            if "error" in chunk:
                asked.error = chunk["error"]["message"]
        if asked.error is None and not (b" 200 " in status and done and reason and asked.tokens):
            asked.error = f"incomplete: {status.decode().strip()}, done {done}, {asked.tokens} tokens"
    finally:
        writer.close()


def data_uri(picture) -> str:
    """A PIL image, or the path of one, as a request carries it."""
    if isinstance(picture, (str, Path)):
        return "data:image/png;base64," + base64.b64encode(Path(picture).read_bytes()).decode()
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
