"""`mpi-mlx serve`: an OpenAI-compatible server for a trained agent, or for any model."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer


def serve_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="Output folder of mpi-mlx train, a model or adapter folder, a hub id, or embedded:tiny.",
        ),
    ],
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="TCP port.")] = 8080,
    host: Annotated[
        str, typer.Option("--host", help="Address; beyond this machine only with a key.")
    ] = "127.0.0.1",
    name: Annotated[str | None, typer.Option("--name", help="What requests call the model.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=RUN", help="One more adapter of the same base; repeatable."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", envvar="MPI_MLX_API_KEY", show_envvar=True, help="Wanted of every request."
        ),
    ] = None,
    allow_image_dir: Annotated[
        Path | None,
        typer.Option("--allow-image-dir", metavar="DIR", help="Also take file:// images from this folder."),
    ] = None,
    allow_image_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-image-host",
            metavar="HOST",
            help="Also fetch images from this host, where only public addresses are behind it; repeatable.",
        ),
    ] = None,
    stage: Annotated[
        str | None, typer.Option("--stage", help="Of a run: the model after this stage.")
    ] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Requests decoded together.")] = 64,
    batch_memory: Annotated[
        int | None,
        typer.Option(
            "--batch-memory", min=1, metavar="MB",
            help="Of requests decoded together, their keys and values; half of what is free where it is not given.",
        ),
    ] = None,
    max_queue: Annotated[int, typer.Option("--max-queue", min=0, help="Requests that may wait.")] = 128,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest answer asked for.")] = 8192,
    max_prompt: Annotated[int | None, typer.Option("--max-prompt", min=1, help="Longest prompt.")] = None,
    prefix_cache: Annotated[
        int, typer.Option("--prefix-cache", min=0, metavar="MB", help="Kept of earlier prompts.")
    ] = 1024,
) -> None:
    """Serve a model by OpenAI's API, on this machine only unless told otherwise."""
    from mpi_mlx.errors import ServingError
    from mpi_mlx.serving.target import resolve_target

    local = _is_loopback(host)
    if not local and not api_key:
        raise ServingError(f"--host {host} is reachable from other machines; give an --api-key, too")
    if allow_image_dir is not None and not allow_image_dir.is_dir():
        raise ServingError(f"{allow_image_dir}: no such folder; --allow-image-dir takes one")
    remote = None
    if allow_image_host:
        from mpi_mlx.serving.remote import RemoteImages, parse_host

        remote = RemoteImages(frozenset(parse_host(given) for given in allow_image_host))
    target = resolve_target(model, stage=stage)
    targets = {name or target.name: target}
    for given in adapter or ():
        label, equals, run = given.partition("=")
        if not (label and equals and run) or label in targets:
            raise ServingError(f"--adapter {given}: NAME=RUN, each name once")
        if not Path(run).expanduser().exists():
            raise ServingError(f"--adapter {given}: no such folder; NAME=RUN takes a run or an adapter")
        targets[label] = resolve_target(run)
        _check_adapter(given, targets[label], target)
    from mpi_mlx.serving.app import ServerOptions, build_app
    from mpi_mlx.serving.engine import Engine
    from mpi_mlx.serving.limits import Limits

    listening = _bind(host, port)
    engine = Engine(
        replace(target, adapter=None).load, {label: one.adapter for label, one in targets.items()},
        max_rows=max_batch, max_queue=max_queue, max_prompt=max_prompt, prefix_bytes=prefix_cache << 20,
        row_bytes=None if batch_memory is None else batch_memory << 20,
    ).load()  # fmt: skip
    defaults = {
        label: (min(one.max_tokens, max_tokens), one.temperature, one.top_p) for label, one in targets.items()
    }
    limits = Limits(tokens=max_tokens, image_folder=allow_image_dir, remote_images=remote)
    options = ServerOptions(defaults, api_key or None, loopback_only=local and not api_key, limits=limits)
    _run(build_app(engine, options), engine, listening, ", ".join(targets))


def _check_adapter(given: str, other, target) -> None:
    """Refuses an adapter that was not trained on the model being served."""
    from mpi_mlx.errors import ServingError
    from mpi_mlx.models.folders import resolve_base
    from mpi_mlx.models.pixels import stated_limit

    if other.base != target.base or other.adapter is None:
        raise ServingError(f"--adapter {given}: not an adapter of {target.base}, which is being served")
    own = stated_limit(resolve_base(target.base))
    wants, has = (one.options.get("max_pixels") or own for one in (other, target))
    if wants != has:
        raise ServingError(
            f"--adapter {given}: trained with max_pixels {wants}, and {target.name} with {has}; "
            "a server has one limit: serve it by itself"
        )
    wants, has = (_weights(one) for one in (other, target))
    if wants != has:
        raise ServingError(
            f"--adapter {given}: trained on {wants}, and {target.name} on {has}; serve it by itself"
        )
    wants, has = (one.options.get("quantize", "unknown") for one in (other, target))
    if wants != has and wants != "unknown":
        said = f"--adapter {given}: trained with quantize {wants}, and is served with {has}"
        typer.echo(f"warning: {said}; its answers may differ from those of its evaluation", err=True)


def _weights(target) -> str:
    """Which weights a base has: a folder may hold none, and a run then draws its own."""
    if target.options.get("init") == "random":
        return f"random weights of seed {target.options.get('seed')}"
    return f"the weights of {target.base}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bind(host: str, port: int) -> socket.socket:
    """A socket that listens: another server on the port is noticed before a model is loaded for nothing.

    Two may bind a port with SO_REUSEADDR, but only one may listen. Who connects meanwhile waits for the model.
    """
    from mpi_mlx.errors import ServingError

    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except socket.gaierror as error:
        raise ServingError(f"--host {host}: {error.strerror}; give an address of this machine") from None
    except OSError as error:
        raise ServingError(f"port {port} on {host}: {error.strerror}; choose another --port") from None
    return listening


def _run(app, engine, listening: socket.socket, names: str) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what was asked; a second one ends it at once.

    The model works in this thread, the requests come in another: see `wait_for_end` in
    mpi_mlx/serving/jobs.py for what else may happen as the process ends.
    """
    import uvicorn

    from mpi_mlx.errors import ServingError

    # to standard error: what a client is told of an internal error says little
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", log_level="warning", access_log=False, server_header=False,
        proxy_headers=False, timeout_graceful_shutdown=60, timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 << 10,
    )  # fmt: skip
    server = uvicorn.Server(config)

    def stop(number, _) -> None:
        server.should_exit = True
        signal.signal(number, signal.SIG_DFL)

    def serve() -> None:
        try:
            server.run(sockets=[listening])
        finally:
            engine.close()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    host, port = listening.getsockname()[:2]
    place = f"[{host}]" if ":" in host else host
    typer.echo(f"serving {names} on http://{place}:{port}/v1  (Ctrl-C stops)")
    requests = threading.Thread(target=serve, name="mpi-mlx-requests")
    requests.start()
    engine.work()
    requests.join()
    if not server.started:
        raise ServingError(f"the server on {place}:{port} did not start; see what it said above")
