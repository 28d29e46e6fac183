"""The server's application on a real socket of this process, for clients of any kind."""

import contextlib
import io
import threading
import time

import openai
import uvicorn

from mpi_mlx.serving.app import ServerOptions, build_app

try:
    import httpx2 as httpx  # what openai's client is built on
except ImportError:
    import httpx


class Served:
    """A running server. ``url`` ends with /v1."""

    def __init__(self, engine, port):
        self.engine, self.port = engine, port
        self.url = f"http://127.0.0.1:{port}/v1"

    def client(self, **options):
        given = dict(base_url=self.url, api_key="none", max_retries=0, timeout=120) | options
        return openai.OpenAI(**given)

    def metrics(self):
        lines = httpx.get(self.url.removesuffix("/v1") + "/metrics").text.splitlines()
        return {name.removeprefix("mpi_mlx_"): float(value) for name, value in map(str.split, lines)}

    def idle(self, seconds=30.0):
        """Waits until nothing is being answered; False where that does not come."""
        end = time.monotonic() + seconds
        while self.engine.active or self.engine.waiting:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True


@contextlib.contextmanager
def serving(engine, names=("tiny",), max_tokens=12, **options):
    defaults = {name: (max_tokens, 0.0, 1.0) for name in names}
    config = uvicorn.Config(
        build_app(engine, ServerOptions(defaults, **options)), port=0, http="h11", ws="none", lifespan="off",
        log_level="critical", h11_max_incomplete_event_size=64 << 10,
    )  # fmt: skip
    listening = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield Served(engine, listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(60)
        listening.close()


def data_uri(picture, kind="PNG"):
    import base64

    file = io.BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


class Says:
    """In the place of a model's sampling: the tokens of a text, one after the other, for a single request."""

    def __init__(self, model, text):
        self.ids = model.encode_completion(text).tolist()

    def __call__(self, hidden, *_):
        import mlx.core as mx

        return mx.array([self.ids.pop(0)] * hidden.shape[0])
