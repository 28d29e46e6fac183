"""`mpi-mlx serve` on loopback, asked by the real openai client."""

import base64
import io
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

openai = pytest.importorskip("openai")
from PIL import Image  # noqa: E402

try:
    import httpx2 as httpx  # what openai's client is built on
except ImportError:
    import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "models"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from checkpoints import write_qwen2_5_vl

    return write_qwen2_5_vl(
        tmp_path_factory.mktemp("tiny") / "tiny", hidden_size=32, num_hidden_layers=2, intermediate_size=48,
        rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}, max_position_embeddings=2048,
    )  # fmt: skip


def start(folder, *arguments):
    command = [
        sys.executable,
        "-u",
        "-m",
        "mpi_mlx_cli.main",
        "serve",
        str(folder),
        "--port",
        "0",
        *arguments,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    found = re.search(r"http://[^ ]+/v1", line)
    assert found, line + process.stderr.read()
    return process, found[0]


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    process, url = start(folder)
    yield url
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0, process.stderr.read()


@pytest.fixture
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


ASK = dict(
    model="tiny", messages=[{"role": "user", "content": "How many red cubes are there?"}], max_tokens=8
)


def data_uri(picture=None):
    file = io.BytesIO()
    (picture or Image.new("RGB", (56, 56), "red")).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_chat_streamed_or_not_as_the_session_answers(client, folder):
    from mpi_mlx.models import load_model
    from mpi_mlx.serving.session import ChatSession

    session = ChatSession(load_model(folder), max_tokens=8)
    list(session.ask("How many red cubes are there?"))
    assert [model.id for model in client.models.list()] == ["tiny"]
    whole = client.chat.completions.create(**ASK)
    assert whole.choices[0].message.content == session.reply.answer
    assert whole.usage.completion_tokens == 8 and whole.choices[0].finish_reason == "length"
    chunks = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text.strip() == session.reply.answer and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1
    assert client.completions.create(model="tiny", prompt="yes no", max_tokens=4).usage.completion_tokens == 4


def test_images_and_tools_are_taken(client):
    content = [{"type": "image_url", "image_url": {"url": data_uri()}}, {"type": "text", "text": "colour?"}]
    plain = client.chat.completions.create(**ASK | {"messages": [{"role": "user", "content": "colour?"}]})
    seen = client.chat.completions.create(**ASK | {"messages": [{"role": "user", "content": content}]})
    assert seen.usage.prompt_tokens == plain.usage.prompt_tokens + 6  # 2 x 2 tokens and their two borders
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    told = client.chat.completions.create(**ASK, tools=[tool])
    assert told.usage.prompt_tokens > plain.usage.prompt_tokens + 50


def test_refusals_have_their_status(client, url, tmp_path):
    with pytest.raises(openai.NotFoundError, match="there are: tiny"):
        client.chat.completions.create(**ASK | {"model": "gpt-4"})
    with pytest.raises(openai.BadRequestError, match="at most 2,047"):
        client.chat.completions.create(**ASK | {"messages": [{"role": "user", "content": "yes no " * 2500}]})
    picture = tmp_path / "x.png"
    Image.new("RGB", (9, 9)).save(picture)
    for source in (picture.as_uri(), str(picture), "http://127.0.0.1:1/x.png", "data:image/png;base64,AAAA",
                   "data:image/png;base64,%%%", data_uri(Image.new("1", (5000, 5000)))):  # fmt: skip
        content = [{"type": "image_url", "image_url": {"url": source}}]
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**ASK | {"messages": [{"role": "user", "content": content}]})
    json_type = {"Content-Type": "application/json"}
    for body in (b"", b"{", b"[1]", b'{"model": NaN}', b"[" * 100_000,
                 b'{"model":"tiny","messages":["\\ud800"]}',
                 b'{"model":"tiny","messages":[{"role":"root","content":"x"}]}',
                 b'{"model":"tiny","messages":[{"role":"user","content":{"a":1}}]}',
                 b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"n":3}',
                 b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"max_tokens":99999}',
                 ):  # fmt: skip
        answer = httpx.post(url + "/chat/completions", content=body, headers=json_type, timeout=60)
        assert answer.status_code == 400 and answer.json()["error"]["message"], body[:80]
    assert httpx.post(url + "/chat/completions", content=b"{}").status_code == 415
    assert httpx.get(url + "/models", headers={"Host": "evil.example"}).status_code == 403
    large = httpx.post(url + "/chat/completions", content=b" " * (33 << 20), headers=json_type, timeout=60)
    assert large.status_code == 413
    assert (
        "access-control-allow-origin"
        not in httpx.get(url + "/models", headers={"Origin": "http://x"}).headers
    )
    assert client.chat.completions.create(**ASK).choices


def test_many_at_once_and_those_who_leave(client, url):
    from concurrent.futures import ThreadPoolExecutor

    def ask(number):
        if number % 5 == 4:  # leaves in the middle
            stream = client.chat.completions.create(**ASK | {"max_tokens": 1000}, stream=True)
            next(iter(stream))
            stream.close()
            return None
        return client.chat.completions.create(**ASK).choices[0].message.content

    with ThreadPoolExecutor(16) as pool:
        answers = [answer for answer in pool.map(ask, range(30)) if answer is not None]
    assert len(set(answers)) == 1 and len(answers) == 24
    metrics = httpx.get(url.removesuffix("/v1") + "/metrics").text
    assert "mpi_mlx_failed 0" in metrics


def test_sigterm_finishes_what_was_asked(folder):
    process, url = start(folder)
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
    streams = [iter(client.chat.completions.create(**ASK | {"max_tokens": 400}, stream=True)) for _ in range(3)]
    begun = [next(stream) for stream in streams]
    process.send_signal(signal.SIGTERM)
    ends = [list(stream)[-1] for stream in streams]
    assert len(begun) == 3 and [end.choices[0].finish_reason for end in ends] == ["length"] * 3
    assert process.wait(120) == 0 and process.stderr.read().count("Traceback") == 0
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_a_port_that_is_taken_and_hosts_that_are_none(folder, tmp_path):
    import json
    import socket

    from mpi_mlx_cli.serve import serve_command

    from mpi_mlx.errors import ServingError

    (tmp_path / "adapters.safetensors").touch()
    own = {"mpi_mlx": {"base": str(folder), "max_pixels": 784}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(own))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for options, said in (({"port": taken.getsockname()[1]}, "choose another --port"),
                              ({"allow_image_host": ["http://x/"]}, "give a host such as"),
                              ({"allow_image_host": ["127.0.0.1"]}, "public addresses only"),
                              ({"allow_image_dir": folder / "none"}, "no such folder"),
                              ({"adapter": ["x"]}, "NAME=RUN"),
                              ({"adapter": [f"x={folder}"]}, "not an adapter of"),
                              ({"adapter": [f"x={folder}/none"]}, "no such folder"),
                              ({"adapter": [f"x={tmp_path}"]}, "max_pixels 784, and .* with "),
                              ({"host": "no.such.host.invalid", "api_key": "x"}, "an address of this machine"),
                              ({"host": "0.0.0.0"}, "--api-key"), ({"host": "::"}, "--api-key"),
                              ({"host": "0.0.0.0", "api_key": ""}, "--api-key")):  # fmt: skip
            with pytest.raises(ServingError, match=said):
                serve_command(str(folder), **options)


def test_beyond_loopback_a_key_is_wanted(folder):
    command = [sys.executable, "-m", "mpi_mlx_cli.main", "serve", str(folder), "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "--api-key" in done.stderr
    process, url = start(folder, "--api-key", "secret")
    try:
        assert httpx.get(url + "/models").status_code == 401
        assert httpx.get(url + "/models", headers={"Authorization": "Bearer secre"}).status_code == 401
        right = openai.OpenAI(base_url=url, api_key="secret")
        assert right.models.list().data and httpx.get(url.removesuffix("/v1") + "/health").status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


def test_a_second_server_on_a_port_is_told_before_it_loads(monkeypatch):
    """Both may have bound it before one of them listens."""
    import socket

    from mpi_mlx_cli.serve import _bind

    from mpi_mlx.errors import ServingError

    bind, others = socket.socket.bind, []

    def bound_twice(listening, address):
        bind(listening, address)
        if not others:
            others.append(socket.socket())
            others[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bind(others[0], listening.getsockname())
            others[0].listen()

    monkeypatch.setattr(socket.socket, "bind", bound_twice)
    with pytest.raises(ServingError, match="choose another --port"):
        _bind("127.0.0.1", 0)
    others[0].close()
    with _bind("127.0.0.1", 0) as first, pytest.raises(ServingError, match="choose another --port"):
        _bind("127.0.0.1", first.getsockname()[1])


def test_adapters_of_another_base_are_refused(folder, tmp_path, capsys):
    from mpi_mlx_cli.serve import _check_adapter

    from mpi_mlx.errors import ServingError
    from mpi_mlx.serving.target import Target

    def run(**options):
        return Target("run", str(folder), tmp_path, {"quantize": None, "max_pixels": None} | options)

    drawn, again = (run(init="random", seed=seed) for seed in (1, 2))
    for other, served, said in (
        (drawn, again, "on random weights of seed 1, and run on random weights of seed 2"),
        (drawn, run(), "on random weights of seed 1, and run on the weights of "),
        (run(), drawn, "on the weights of .*, and run on random weights of seed 1"),
    ):
        with pytest.raises(ServingError, match=said):
            _check_adapter("x=run", other, served)
    _check_adapter("x=run", drawn, run(init="random", seed=1))
    _check_adapter("x=run", Target("adapter", str(folder), tmp_path), run(quantize=4))  # it does not say
    assert not capsys.readouterr().err
    _check_adapter("x=run", run(), run(quantize=4))
    assert "trained with quantize None, and is served with 4" in capsys.readouterr().err
