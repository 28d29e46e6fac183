"""Many streaming clients at once against a real `mpi-mlx serve`: failures, memory, tokens a second.

python benchmarks/serve_load.py [--clients 64] [--seconds 120] [--model embedded:tiny] [--prefix-cache 200]

First one client for a while, then all of them; then SIGTERM while they wait for their answers: those must come
whole, and the process must exit 0. Every request has words and (every other one) a picture of its own, and one in
sixteen is long. The prefix cache is small enough to be full within the first minute: after that nothing may grow.
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

WINDOW, TOLERANCE = 20, 0.05


def bodies(model: str, tokens: int, seed: int):
    """Requests without end, no two alike: mostly short, one in sixteen long, every other one with a picture."""
    draw = random.Random(seed)
    noise = np.random.default_rng(seed)
    for number in itertools.count():
        length = draw.randrange(400, 1000) if number % 16 == 5 else draw.randrange(8, 60)
        content = [{"type": "text", "text": common.words(length, draw.randrange(2**31))}]
        if number % 2:
            size = (28 * draw.randrange(2, 6), 28 * draw.randrange(2, 6))
            picture = Image.fromarray(noise.integers(0, 255, (*size, 3), dtype=np.uint8))
            content.insert(0, {"type": "image_url", "image_url": {"url": data_uri(picture)}})
        yield {
            "model": model, "messages": [{"role": "user", "content": content}],
            "max_tokens": draw.randrange(tokens // 2, 2 * tokens), "temperature": 1.0, "seed": draw.randrange(2**31),
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


def window(memory: list, end: float) -> list[float]:
    """The sizes of the WINDOW seconds up to ``end``."""
    return [size for at, size in memory if end - WINDOW < at <= end] or [memory[-1][1]]


def growth(memory: list, mark: float, end: float) -> dict:
    """Resident memory before ``mark`` and at the end, and the verdict.

    The batch's own arrays come and go, by ``spread`` MB (standard deviation) within a window. What is kept for
    good would stay, so the windows' medians are compared, and TOLERANCE is about what they miss by chance.
    """
    first, last = window(memory, mark), window(memory, end)
    then, now = statistics.median(first), statistics.median(last)
    return {
        "mark_seconds": mark, "then": then, "end": now, "most": max(size for _, size in memory),
        "spread": statistics.pstdev([*(x - then for x in first), *(x - now for x in last)]),
        "grew": now > (1 + TOLERANCE) * then,
    }  # fmt: skip


def figure(memory: list, mark: float, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(figsize=(6, 2.6))
    axes.plot(*zip(*memory, strict=True), linewidth=1.2)
    axes.axvline(mark, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="seconds under load", ylabel="resident MB", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    drawn.tight_layout()
    drawn.savefig(path, dpi=130)


async def measure(options) -> dict:
    limits = ["--max-batch", str(options.max_batch), "--prefix-cache", str(options.prefix_cache)]
    server = Server(options.model, *limits)
    stream = bodies(server.names[0], options.tokens, 0)
    await load(server, 4, min(3.0, options.seconds), stream)  # warm
    alone, _, alone_seconds = await load(server, 1, options.single_seconds, stream)
    many, memory, seconds = await load(server, options.clients, options.seconds, stream)
    drained, code = await drain(server, options.clients, stream)
    failed = [answer.error for answer in (*alone, *many) if answer.error]
    lost = [answer.error for answer in drained if answer.error]
    mark = min(60.0, options.seconds / 2)
    size = growth(memory, mark, options.seconds)
    one, all_ = speed(alone, alone_seconds), speed(many, seconds)
    print(f"{options.clients} clients for {seconds:.0f} s: {len(many):,} requests, {len(failed)} failed {failed[:3]}")
    verdict = "it GREW" if size["grew"] else "it did not grow"
    print(f"memory {size['then']:,.0f} MB after {mark:.0f} s, {size['end']:,.0f} MB at the end", end=" ")
    print(f"(medians of {WINDOW} s, each +-{size['spread']:.0f}; tolerance {TOLERANCE:.0%}): {verdict}")
    print(f"tokens a second: one client {one:,.0f}, all {all_:,.0f}: {all_ / one:.1f} times (wanted: 3)")
    waits = sorted(answer.first for answer in many if not answer.error) or [0.0]
    half, most = 1e3 * statistics.median(waits), 1e3 * waits[int(0.99 * len(waits))]
    print(f"first token: median {half:.0f} ms, 99% within {most:.0f} ms")
    print(f"SIGTERM: {len(drained) - len(lost)} of {len(drained)} answers came whole {lost[:3]}, exit code {code}")
    return {
        "model": options.model, "clients": options.clients, "seconds": seconds, "requests": len(many),
        "failed": len(failed), "errors": failed[:20], "prefix_cache_mb": options.prefix_cache, "memory_mb": size,
        "memory_mb_each_second": [(round(at, 1), round(mb, 1)) for at, mb in memory],
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
    parser.add_argument("--max-batch", type=int, default=64)
    parser.add_argument("--prefix-cache", type=int, default=200, help="MB")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    result = asyncio.run(measure(options))
    if not options.no_save:
        common.save("serve_load", result)
        path = common.HERE / "results" / "serve_load_memory.png"
        figure(result["memory_mb_each_second"], result["memory_mb"]["mark_seconds"], path)


if __name__ == "__main__":
    main()
