"""Many streaming clients at once against a real `mpi-mlx serve`: failures, memory, tokens a second.

python benchmarks/serve_load.py [--clients 64] [--seconds 120] [--model embedded:tiny]

First one client for a while, then all of them; then SIGTERM while they wait for their answers: those must come
whole, and the process must exit 0. Every request has words and (every other one) a picture of its own.
"""

import argparse
import asyncio
import itertools
import random
import statistics
import time

import common
import numpy as np
from PIL import Image
from served import Asked, Server, ask, data_uri


def bodies(model: str, tokens: int, seed: int):
    """Requests without end."""
    draw = random.Random(seed)
    noise = np.random.default_rng(seed)
    pictures = [data_uri(Image.fromarray(noise.integers(0, 255, (84, 84, 3), dtype=np.uint8))) for _ in range(32)]
    for number in itertools.count():
        content = [{"type": "text", "text": common.words(draw.randrange(8, 60), draw.randrange(2**31))}]
        if number % 2:
            content.insert(0, {"type": "image_url", "image_url": {"url": draw.choice(pictures)}})
        yield {
            "model": model, "messages": [{"role": "user", "content": content}], "max_tokens": tokens,
            "temperature": 1.0, "seed": draw.randrange(2**31),
        }  # fmt: skip


async def client(server: Server, stream, until: float, done: list[Asked]) -> None:
    while time.monotonic() < until:
        done.append(await ask(server.port, next(stream)))


async def load(server: Server, clients: int, seconds: float, stream) -> tuple[list[Asked], list, float]:
    """(answers, [(second, resident MB)], seconds until the last answer)."""
    done, memory, begin = [], [], time.monotonic()
    tasks = [asyncio.create_task(client(server, stream, begin + seconds, done)) for _ in range(clients)]
    while any(not task.done() for task in tasks):
        await asyncio.wait(tasks, timeout=1.0)
        memory.append((time.monotonic() - begin, await asyncio.to_thread(server.memory)))
    return done, memory, time.monotonic() - begin


async def drain(server: Server, clients: int, stream) -> tuple[list[Asked], int]:
    """SIGTERM in the middle of answers: (the answers, the exit code)."""
    before = server.counter("requests")
    tasks = [asyncio.create_task(ask(server.port, next(stream))) for _ in range(clients)]
    while await asyncio.to_thread(server.counter, "requests") < before + clients:
        await asyncio.sleep(0.02)
    server.terminate()
    answers = await asyncio.gather(*tasks)
    return answers, await asyncio.to_thread(server.wait)


def speed(answers: list[Asked], seconds: float) -> float:
    return sum(answer.tokens for answer in answers) / seconds


def around(memory: list, second: float) -> float:
    """The median of the five seconds up to ``second``."""
    near = [size for at, size in memory if second - 5 <= at <= second + 1]
    return statistics.median(near or [size for _, size in memory[-5:]])


async def measure(options) -> dict:
    server = Server(options.model, "--max-batch", str(options.max_batch))
    stream = bodies(server.names[0], options.tokens, 0)
    await load(server, 4, min(3.0, options.seconds), stream)  # warm
    alone, _, alone_seconds = await load(server, 1, options.single_seconds, stream)
    many, memory, seconds = await load(server, options.clients, options.seconds, stream)
    drained, code = await drain(server, options.clients, stream)
    failed = [answer.error for answer in (*alone, *many) if answer.error]
    lost = [answer.error for answer in drained if answer.error]
    mark = min(60.0, options.seconds / 2)
    first, last = around(memory, mark), around(memory, options.seconds)
    one, all_ = speed(alone, alone_seconds), speed(many, seconds)
    print(f"{options.clients} clients for {seconds:.0f} s: {len(many):,} requests, {len(failed)} failed {failed[:3]}")
    print(f"memory {first:,.0f} MB after {mark:.0f} s, {last:,.0f} MB at the end ({last - first:+,.1f})")
    print(f"tokens a second: one client {one:,.0f}, all {all_:,.0f}: {all_ / one:.1f} times (wanted: 3)")
    waits = sorted(answer.first for answer in many if not answer.error) or [0.0]
    half, most = 1e3 * statistics.median(waits), 1e3 * waits[int(0.99 * len(waits))]
    print(f"first token: median {half:.0f} ms, 99% within {most:.0f} ms")
    print(f"SIGTERM: {len(drained) - len(lost)} of {len(drained)} answers came whole {lost[:3]}, exit code {code}")
    return {
        "model": options.model, "clients": options.clients, "seconds": seconds, "requests": len(many),
        "failed": len(failed), "errors": failed[:20], "memory_mb": {"mark_seconds": mark, "then": first, "end": last},
        "memory_mb_each_second": [round(size, 1) for _, size in memory],
        "tokens_per_second": {"one": one, "all": all_, "ratio": all_ / one},
        "first_token_ms": {"median": half, "p99": most},
        "sigterm": {"asked": len(drained), "whole": len(drained) - len(lost), "errors": lost[:20], "exit_code": code},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:tiny")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--single-seconds", type=float, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    result = asyncio.run(measure(options))
    if not options.no_save:
        common.save("serve_load", result)


if __name__ == "__main__":
    main()
