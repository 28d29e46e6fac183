"""A thousand malformed requests over a socket: none may be answered with a 5xx, or with a wrong 2xx."""

import http.client
import json
import socket
import threading

import pytest

pytest.importorskip("openai")
from http_server import serving  # noqa: E402
from malformed import MOST, request  # noqa: E402

from mpi_mlx.serving.engine import Engine  # noqa: E402
from mpi_mlx.serving.limits import Limits  # noqa: E402

REQUESTS = 1000


@pytest.fixture(scope="module")
def server(tiny_folder):
    from mpi_mlx.models import load_model

    engine = Engine(lambda: load_model(tiny_folder), {"tiny": None}, max_rows=16, max_queue=200).start()
    limits = Limits(tokens=MOST, body_bytes=400_000, image_pixels=1 << 18, request_pixels=1 << 19, body_seconds=5)
    with serving(engine, max_tokens=4, limits=limits) as served:
        yield served
    engine.close()


def exchange(port, raw, complete):
    """(status, body), or None where the server hung up without a word."""
    with socket.create_connection(("127.0.0.1", port), timeout=120) as stream:
        try:
            stream.sendall(raw)
            if not complete:  # it may be waiting for more
                stream.settimeout(1)
                try:
                    stream.recv(1, socket.MSG_PEEK)
                except TimeoutError:
                    stream.shutdown(socket.SHUT_WR)
                stream.settimeout(120)
        except OSError:
            pass  # refused while it was being sent: the answer may be there all the same
        answer = http.client.HTTPResponse(stream)
        try:
            answer.begin()
            return answer.status, answer.read()
        except (http.client.HTTPException, OSError, ValueError):
            return None


def is_right(body):
    """Whether a 2xx is what OpenAI's API says: a completion, or a whole stream of one."""
    text = body.decode()
    if text.startswith("data: "):
        events = [event.removeprefix("data: ") for event in text.strip().split("\n\n")]
        if events.pop() != "[DONE]":
            return False
        chunks = [json.loads(event) for event in events]
        reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
        return all("error" not in chunk for chunk in chunks) and reasons[-1] in ("stop", "length", "tool_calls")
    made = json.loads(text)
    if made.get("object") == "list":
        return made["data"][0]["id"] == "tiny"
    (choice,) = made["choices"]
    words = choice["message"].get("content") if "message" in choice else choice["text"]
    called = "message" in choice and choice["message"].get("tool_calls")
    reason = choice["finish_reason"] in ("stop", "length", "tool_calls")
    few = 0 <= made["usage"]["completion_tokens"] <= MOST and made["usage"]["prompt_tokens"] > 0
    return few and reason and (isinstance(words, str) or bool(called))


def test_a_thousand_malformed_requests(server):
    found, lock, numbers = [], threading.Lock(), iter(range(REQUESTS))

    def work():
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            raw, complete, kind = request(number)
            answer = exchange(server.port, raw, complete)
            wrong = None
            if answer is None:
                wrong = "no answer" if complete else None  # not HTTP, or cut off: hanging up is an answer
            elif answer[0] >= 500 or answer[0] < 200 or 300 <= answer[0] < 400:
                wrong = answer
            elif answer[0] < 300:
                wrong = None if is_right(answer[1]) else answer
            elif answer[0] >= 400 and complete:
                said = json.loads(answer[1])["error"]["message"]
                wrong = None if said and len(said) < 2000 else answer
            found.append((number, kind, answer and answer[0], wrong))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == REQUESTS
    bad = [(number, kind, wrong) for number, kind, _, wrong in found if wrong is not None]
    assert not bad, bad[:10]
    statuses = [status for _, _, status, _ in found]
    assert sum(status is not None and status >= 400 for status in statuses) > REQUESTS / 2
    assert statuses.count(200) > REQUESTS / 20  # some changes leave a good request
    assert {kind for _, kind, _, _ in found} == {"changed", "torn", "with_pictures", "sized", "odd_message"}

    assert server.idle()
    made = server.client().chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "How many red cubes are there?"}]
    )
    assert made.usage.completion_tokens == 4
    metrics = server.metrics()
    assert metrics["failed"] == 0 and metrics["held_bytes"] == 0 and metrics["active_requests"] == 0
