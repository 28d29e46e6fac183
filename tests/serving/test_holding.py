"""What requests hold, whom they keep waiting, and what is kept of them."""

import gc
import threading
import weakref

import pytest

pytest.importorskip("openai")
from http_server import Says, data_uri, serving  # noqa: E402
from PIL import Image  # noqa: E402

from mpi_mlx.serving import app, pictures  # noqa: E402
from mpi_mlx.serving.jobs import Busy  # noqa: E402
from mpi_mlx.serving.limits import Limits  # noqa: E402
from mpi_mlx.serving.pictures import Pictures  # noqa: E402
from mpi_mlx.serving.protocol import conversation  # noqa: E402
from mpi_mlx.serving.remote import RemoteImages, Unfetched  # noqa: E402
from mpi_mlx.serving.traffic import Claim, Held  # noqa: E402


def ask(url=None, **options):
    image = [{"type": "image_url", "image_url": {"url": url}}] * (url is not None)
    content = [*image, {"type": "text", "text": "colour?"}]
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 6} | options


class Messages(list):
    """A list whose end can be noticed."""


@pytest.mark.parametrize("stream", [False, True])
def test_pictures_are_gone_once_they_are_encoded(server, monkeypatch, stream):
    import mlx.core as mx

    kept, requests, drawn, go_on = [], [], [], threading.Event()

    def noted(asked, *rest):
        messages = Messages(conversation(asked, *rest))
        kept.append(weakref.ref(messages))
        requests.append(asked)
        return messages

    def waits(hidden, *_):
        drawn.append(1)
        if len(drawn) > 1:
            go_on.wait(60)
        return mx.array([5] * hidden.shape[0])

    monkeypatch.setattr(app, "conversation", noted)
    monkeypatch.setattr(server.engine, "_draw", waits)
    url = data_uri(Image.new("RGB", (56, 56), "red"))
    answers = []

    def talk():
        made = server.client().chat.completions.create(**ask(url, stream=stream))
        answers.append(list(made) if stream else made)

    thread = threading.Thread(target=talk)
    thread.start()
    while len(drawn) < 2:  # in the first step after the prompt
        thread.join(0.01)
    gc.collect()
    made, came, held = kept[0](), requests[0].messages, server.metrics()["held_bytes"]
    go_on.set()
    thread.join(60)
    assert made is None and came == [] and held == 0 and answers


def test_pixels_are_counted_before_they_are_decoded(monkeypatch):
    order, decode = [], pictures.as_seen
    monkeypatch.setattr(pictures, "as_seen", lambda opened: order.append("decoded") or decode(opened))
    url = data_uri(Image.new("RGB", (20, 10)))
    loading = Pictures(Limits(), hold=order.append)
    loading.load(url, "here"), loading.load(url, "there")
    assert order == [200, "decoded", 400, "decoded"]
    claim = Claim(Held(limit=599))
    with pytest.raises(Busy, match="too much"):  # not "not a picture"
        Pictures(Limits(), hold=lambda pixels: claim.hold(3 * pixels)).load(url, "here")


def test_a_claim_that_was_released_holds_nothing_more():
    held = Held(limit=100)
    with Claim(held) as claim:
        claim.hold(60)
        claim.hold(90)
        assert held.bytes == 90
    claim.hold(50)  # by a worker that was not done
    assert held.bytes == 0


def test_texts_do_not_wait_for_slow_image_hosts(server):
    fetching, go_on = threading.Semaphore(0), threading.Event()

    class Slow(RemoteImages):
        def fetch(self, url, until=None):
            fetching.release()
            go_on.wait(60)
            raise Unfetched("the host was too slow")

    def show():
        with pytest.raises(Exception, match="too slow"):
            other.client().chat.completions.create(**ask("https://slow.example/x.png"))

    with serving(server.engine, limits=Limits(remote_images=Slow(frozenset()))) as other:
        threads = [threading.Thread(target=show) for _ in range(12)]
        for thread in threads:
            thread.start()
        for _ in range(8):
            assert fetching.acquire(timeout=60)
        data = data_uri(Image.new("RGB", (56, 56), "red"))
        try:
            for asked in (ask(), ask(data)):
                assert other.client(timeout=20).chat.completions.create(**asked).choices
        finally:
            go_on.set()
            for thread in threads:
                thread.join()


def test_an_answer_ended_by_a_stop_text_is_not_cancelled_and_is_kept(server, monkeypatch):
    engine, text = server.engine, "one two STOP three four five six"
    before = server.metrics()["cancelled"]
    ids = engine.model.encode_completion(text).tolist()
    for stream in (False, True):
        monkeypatch.setattr(engine, "_draw", Says(engine.model, text))
        made = server.client().chat.completions.create(**ask(stop="STOP", max_tokens=60, stream=stream))
        assert (list(made) if stream else made) and server.idle()
        codes = engine.prefixes._entries[-1][1].tolist()
        written = codes[codes.index(ids[0], len(codes) - len(ids)) :]
        assert ids[: len(written)] == written and "STOP" in engine.model.decode(ids[: len(written) + 1])
    assert server.metrics()["cancelled"] == before
