"""The endpoints, asked by the real openai client over a socket."""

import json
import threading
import time

import pytest

openai = pytest.importorskip("openai")
from http_server import Says, data_uri, httpx, serving  # noqa: E402
from PIL import Image  # noqa: E402

from mpi_mlx.serving.engine import Engine  # noqa: E402
from mpi_mlx.serving.limits import Limits  # noqa: E402
from mpi_mlx.serving.remote import RemoteImages, Unfetched  # noqa: E402
from mpi_mlx.serving.session import ChatSession  # noqa: E402


def random_adapter(tiny_folder, folder, seed):
    import mlx.core as mx
    from mlx.utils import tree_map

    from mpi_mlx.models import load_model
    from mpi_mlx.models.adapters import save_adapter
    from mpi_mlx.models.lora import attach_lora
    from mpi_mlx.recipe import LoraSpec

    model = load_model(tiny_folder)
    attach_lora(model, LoraSpec(rank=2, alpha=8, targets=["q_proj", "down_proj"]))
    mx.random.seed(seed)
    model.net.update(tree_map(lambda p: p + mx.random.normal(p.shape), model.net.trainable_parameters()))
    save_adapter(model, folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_folder, tmp_path_factory):
    made = tmp_path_factory.mktemp("adapters")
    return {"tiny": None} | {
        name: random_adapter(tiny_folder, made / name, seed) for seed, name in enumerate(("refunds", "bookings"))
    }


@pytest.fixture(scope="module")
def server(tiny_folder, adapters):
    from mpi_mlx.models import load_model

    engine = Engine(lambda: load_model(tiny_folder), adapters, max_rows=4, max_queue=64).start()
    with serving(engine, tuple(adapters)) as served:
        yield served
    engine.close()


def ask(content, model="tiny", **options):
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 8} | options


def show(*urls, text="colour?"):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return ask([*parts, {"type": "text", "text": text}])


TOOL = {"type": "function", "function": {
    "name": "weather", "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}  # fmt: skip
CALL = (
    "<think>a city</think>\nLet me see.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Ålesund"}}\n</tool_call>'
)


@pytest.fixture
def says(server, monkeypatch):
    def say(text):
        monkeypatch.setattr(server.engine, "_draw", Says(server.engine.model, text))

    return say


def test_tool_calls_and_their_results(server, says):
    client, question = server.client(), {"role": "user", "content": "Weather in Ålesund?"}
    asked = dict(model="tiny", messages=[question], tools=[TOOL], max_tokens=200)
    says(CALL)
    choice = client.chat.completions.create(**asked).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see."
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Ålesund"}
    assert choice.message.reasoning_content == "a city"

    says(CALL)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Let me see."
    (streamed,) = [one for delta in deltas for one in delta.tool_calls or ()]
    assert streamed.function.arguments == call.function.arguments and streamed.index == 0 and streamed.id
    assert chunks[-1].choices[0].finish_reason == "tool_calls"

    says("20 degrees.")
    result = {"role": "tool", "tool_call_id": call.id, "content": "20 degrees, rain"}
    second = client.chat.completions.create(
        **asked | {"messages": [question, choice.message.model_dump(exclude_none=True), result]}
    )
    assert second.choices[0].message.content == "20 degrees." and second.choices[0].finish_reason == "stop"


def test_no_tools_no_calls_and_calls_that_are_none(server, says):
    client = server.client()
    for options in ({}, {"tools": [TOOL], "tool_choice": "none"}):
        says(CALL)
        choice = client.chat.completions.create(**ask("x", max_tokens=200), **options).choices[0]
        assert choice.message.tool_calls is None and "<tool_call>" in choice.message.content
    broken = 'See. <tool_call>{"name": </tool_call>'
    says(broken)
    choice = client.chat.completions.create(**ask("x", max_tokens=200), tools=[TOOL]).choices[0]
    assert choice.message.content == broken and choice.finish_reason == "stop"
    says(broken)
    stream = client.chat.completions.create(**ask("x", max_tokens=200), tools=[TOOL], stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == broken
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        with pytest.raises(openai.BadRequestError, match="tool_choice"):
            client.chat.completions.create(**ask("x"), tools=[TOOL], tool_choice=choice)


def test_stop_texts_end_an_answer_unseen(server, says):
    client = server.client()
    for stream in (False, True):
        says("one two STOP three")
        made = client.chat.completions.create(**ask("x", max_tokens=60), stop=["nothing", "STOP"], stream=stream)
        if stream:
            chunks = list(made)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = made.choices[0].message.content, made.choices[0].finish_reason
        assert (text, reason) == ("one two", "stop")
        assert server.idle()


def test_adapters_by_name(server, tiny_folder, adapters):
    from concurrent.futures import ThreadPoolExecutor

    from mpi_mlx.models import load_model

    question, expected = "How many red cubes are there?", {}
    for name, folder in adapters.items():
        session = ChatSession(load_model(tiny_folder, adapter=folder), max_tokens=8)
        list(session.ask(question))
        expected[name] = session.reply.answer
    assert len(set(expected.values())) == 3
    client = server.client()
    assert [model.id for model in client.models.list()] == list(adapters)
    assert client.models.retrieve("refunds").id == "refunds"
    base = server.engine.model
    names = [*adapters] * 6
    with ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(lambda name: client.chat.completions.create(**ask(question, name)), names))
    assert [answer.choices[0].message.content for answer in answers] == [expected[name] for name in names]
    assert [answer.model for answer in answers] == names and server.engine.model is base
    for name in ("gpt-4", str(adapters["refunds"]), "../adapters/refunds", "refunds/", "", "x" * 513):
        with pytest.raises((openai.NotFoundError, openai.BadRequestError)) as caught:
            client.chat.completions.create(**ask(question, name))
        assert caught.value.status_code == (404 if len(name) < 513 else 400)
    with pytest.raises(openai.NotFoundError, match="there are: tiny, refunds, bookings"):
        client.models.retrieve("gpt-4")


def test_who_leaves_is_not_answered(server, monkeypatch):
    import mlx.core as mx

    def slowly(hidden, *_):
        time.sleep(0.01)
        return mx.array([letter] * hidden.shape[0])

    letter = int(server.engine.model.encode_completion("a")[0])
    client = server.client()
    before = server.metrics()["cancelled"]
    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "_draw", slowly)
        stream = client.chat.completions.create(**ask("yes", max_tokens=1900), stream=True)
        next(iter(stream))
        stream.close()
        assert server.idle(10)  # of the 19 seconds that the answer would take
        with pytest.raises(openai.APITimeoutError):
            server.client(timeout=2).chat.completions.create(**ask("yes", max_tokens=1900))
        assert server.idle(10)
    assert server.metrics()["cancelled"] == before + 2
    assert client.chat.completions.create(**ask("yes")).choices


def test_wrong_model_long_input_and_full_queue(server, monkeypatch):
    client = server.client()
    for content in ("yes no " * 2500, "no " * 400_000):
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match="at most 2,047") as caught:
                client.chat.completions.create(**ask(content), stream=stream)
            assert caught.value.status_code == 400
    with pytest.raises(openai.BadRequestError, match="at most 2,047"):
        client.completions.create(model="tiny", prompt="yes no " * 2500)
    with pytest.raises(openai.BadRequestError, match="max_tokens: at most 8,192"):
        client.chat.completions.create(**ask("x", max_tokens=8193))
    full = client.chat.completions.create(**ask("yes " * 2000, max_tokens=8192), temperature=0)  # to the brim
    assert 2000 < full.usage.prompt_tokens and full.usage.total_tokens <= 2048
    monkeypatch.setattr(server.engine, "max_queue", 0)
    monkeypatch.setattr(server.engine, "max_rows", 0)
    with pytest.raises(openai.RateLimitError, match="waiting"):
        client.chat.completions.create(**ask("x"))


def test_images_as_data_uris(server, tiny_folder):
    from mpi_mlx.models import load_model

    client = server.client()
    picture = Image.radial_gradient("L").resize((84, 56)).convert("RGB")
    session = ChatSession(load_model(tiny_folder), max_tokens=8)
    session.attach(picture)
    list(session.ask("colour?"))
    plain = client.chat.completions.create(**show()).usage.prompt_tokens
    for kind in ("PNG", "BMP"):
        seen = client.chat.completions.create(**show(data_uri(picture, kind)))
        assert seen.choices[0].message.content == session.reply.answer
        assert seen.usage.prompt_tokens == session.reply.stats.prompt_tokens == plain + 8
    for kind in ("JPEG", "WEBP", "GIF"):
        assert client.chat.completions.create(**show(data_uri(picture, kind))).usage.prompt_tokens == plain + 8
    two = client.chat.completions.create(**show(data_uri(picture), data_uri(picture)))
    assert two.usage.prompt_tokens == plain + 16
    thin = Image.new("RGB", (1, 3000))
    for url in (data_uri(Image.new("1", (5000, 5000))), data_uri(thin), data_uri(picture)[:-40], "x.png",
                "file:///etc/passwd", "http://127.0.0.1/x.png", "http://169.254.169.254/latest/meta-data"):  # fmt: skip
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(**show(url))
    parts = show(data_uri(picture))["messages"][0]["content"]
    with pytest.raises(openai.BadRequestError, match="the chat template of the model shows 0 of 1") as caught:
        messages = [{"role": "assistant", "content": parts}, {"role": "user", "content": "x"}]
        client.chat.completions.create(model="tiny", messages=messages)
    assert str(tiny_folder.parent) not in str(caught.value)
    with pytest.raises(openai.BadRequestError, match="at most 16 images"):
        client.chat.completions.create(**show(*[data_uri(picture)] * 17))
    assert server.metrics()["held_bytes"] == 0


def test_images_from_the_allowed_folder_and_hosts(server, tmp_path):
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    Image.new("RGB", (84, 56), "red").save(allowed / "x.png")
    Image.new("RGB", (84, 56), "red").save(tmp_path / "secret.png")
    (allowed / "link.png").symlink_to(tmp_path / "secret.png")

    class Remote(RemoteImages):
        def fetch(self, url, until=None):
            if url != "https://images.example/x.png":
                raise Unfetched("images from there are not allowed here")
            return (allowed / "x.png").read_bytes()

    limits = Limits(image_folder=allowed, remote_images=Remote(frozenset()))
    with serving(server.engine, limits=limits) as other:
        client = other.client()
        expected = client.chat.completions.create(**show(data_uri(Image.new("RGB", (84, 56), "red"))))
        for url in ((allowed / "x.png").as_uri(), "https://images.example/x.png"):
            found = client.chat.completions.create(**show(url))
            assert found.usage.prompt_tokens == expected.usage.prompt_tokens
            assert found.choices[0].message.content == expected.choices[0].message.content
        for url in ((allowed / "link.png").as_uri(), (tmp_path / "secret.png").as_uri(), "https://evil.example/x",
                    f"file://{allowed}/../secret.png", str(allowed / "x.png")):  # fmt: skip
            with pytest.raises(openai.BadRequestError, match="messages.0.content.0"):
                client.chat.completions.create(**show(url))


def test_keys_are_compared_whole(server):
    with serving(server.engine, api_key="sécret", loopback_only=False) as other:
        for key in ("scret", "secret", "x"):
            with pytest.raises(openai.AuthenticationError, match="API key"):
                other.client(api_key=key).chat.completions.create(**ask("x"))
        root = other.url.removesuffix("/v1")
        assert httpx.get(root + "/health").json() == {"status": "ok"}
        for path in ("/metrics", "/v1/models", "/v1/models/tiny"):
            assert httpx.get(root + path).status_code == 401
            for wrong in ("Basic sécret", "Bearer sécre", "Bearer sécrets", "Bearer SÉCRET", "Bearer", "sécret"):
                assert httpx.get(root + path, headers={"Authorization": wrong.encode()}).status_code == 401
        assert httpx.get(root + "/metrics", headers={"Authorization": "Bearer sécret".encode()}).status_code == 200
    with serving(server.engine, api_key="secret") as other:
        assert other.client(api_key="secret").models.list().data


def test_pages_of_other_sites_get_nothing(server):
    root = server.url.removesuffix("/v1")
    for host, status in (("localhost", 200), ("127.0.0.1:1", 200), ("[::1]", 200), ("[::1]:99", 200),
                         ("evil.example", 403), ("evil.example:80", 403), ("127.0.0.1.evil.example", 403),
                         ("localhost.evil.example:80", 403), ("[::2]", 403)):  # fmt: skip
        assert httpx.get(root + "/v1/models", headers={"Host": host}).status_code == status, host
    origin = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    for answer in (
        httpx.get(root + "/v1/models", headers=origin),
        httpx.options(root + "/v1/chat/completions", headers=origin),
        httpx.post(root + "/v1/chat/completions", headers=origin, json=ask("x")),
    ):
        assert not any(name.startswith("access-control") for name in answer.headers)
    for form in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        headers = {"Content-Type": form}  # what a page may send without asking first
        assert httpx.post(root + "/v1/chat/completions", headers=headers, content=b"{}").status_code == 415
    missing = httpx.get(root + "/v1/files/../../etc/passwd")
    assert missing.status_code == 404 and missing.json()["error"]["message"]
    assert httpx.get(root + "/v1/chat/completions").status_code == 405


def test_bodies_are_bounded_in_size_time_and_together(server):
    limits = Limits(body_bytes=100_000, body_seconds=0.3, held_bytes=150_000)
    with serving(server.engine, limits=limits) as other:
        post = {"url": other.url + "/chat/completions", "headers": {"Content-Type": "application/json"}}
        assert httpx.post(**post, content=b" " * 100_001).status_code == 413

        def slow(pieces, pause):
            for _ in range(pieces):
                yield b" " * 10_000
                time.sleep(pause)

        assert httpx.post(**post, content=slow(5, 0.2)).status_code == 408
        together = []

        def send():
            together.append(httpx.post(**post, content=slow(9, 0.02)).status_code)

        threads = [threading.Thread(target=send) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 429 in together and set(together) <= {400, 429}  # 400: blanks are no JSON
        assert other.metrics()["held_bytes"] == 0
        assert other.client().chat.completions.create(**ask("yes")).choices


def test_what_was_asked_and_what_it_took(server):
    client = server.client()
    asked = ask("Say the colour of the largest sphere", temperature=1.0, seed=11, top_p=0.9)
    one, two = (client.chat.completions.create(**asked) for _ in range(2))
    assert one.choices[0].message.content == two.choices[0].message.content and one.id != two.id
    assert two.usage.prompt_tokens_details.cached_tokens == one.usage.prompt_tokens - 1
    assert one.usage.total_tokens == one.usage.prompt_tokens + one.usage.completion_tokens
    text = client.completions.create(model="tiny", prompt="yes no", max_tokens=5, stream=True)
    assert [chunk.object for chunk in text][0] == "text_completion"
