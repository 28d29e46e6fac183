"""Bodies to requests: what is refused, and with what effort."""

import json
import threading

import pytest

from mpi_mlx.serving import app
from mpi_mlx.serving.limits import Refused
from mpi_mlx.serving.protocol import ChatRequest, parse

MESSAGES = [{"role": "user", "content": "x"}]


def chat(**fields):
    return parse(json.dumps({"model": "a", "messages": MESSAGES} | fields).encode(), ChatRequest)


@pytest.mark.parametrize(("name", "items"), [("messages", [1]), ("tools", ["f"]), ("stop", [1])])
def test_the_first_wrong_item_of_a_list_is_the_only_error(name, items, monkeypatch):
    def unexpected(raw):
        raise AssertionError("pydantic makes an error of every item")

    right = {"messages": {}, "tools": {}, "stop": "x"}[name]
    monkeypatch.setattr(ChatRequest, "model_validate", unexpected)
    with pytest.raises(Refused, match=rf"{name}\.2: .* is wanted") as caught:
        chat(**{name: [right, right] + 10_000 * items})
    assert caught.value.param == f"{name}.2"
    with pytest.raises(Refused, match=f"{name}: at most 16,384 items"):
        chat(**{name: [right] * 16_385})
    monkeypatch.undo()
    assert chat(stop=["x"], tools=[{}]).stops == ["x"]


def test_bodies_are_read_beside_the_loop(server, monkeypatch):
    """A body of megabytes takes a while to read, and other clients are answered meanwhile."""
    threads = []

    def noted(body, kind):
        threads.append(threading.current_thread().name)
        return parse(body, kind)

    monkeypatch.setattr(app, "parse", noted)
    client = server.client()
    client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1)
    client.completions.create(model="tiny", prompt="x", max_tokens=1)
    assert len(threads) == 2 and all(name.startswith("mpi-mlx-requests") for name in threads)
