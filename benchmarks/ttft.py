"""Time to first token: the document in context beside the internalized agent, which does not carry it.

python benchmarks/ttft.py [--documents 1000 4000 16000] [--repeats 5] [--hidden 256 --layers 6]

One random model of the Qwen2.5-VL architecture (8M parameters unless told otherwise), served by `mpi-mlx serve`
with the internalized agent as a LoRA adapter of rank 16 on it. Both get the same questions, each with a picture of
its own; only one gets the document. Cold: nothing is known of the prompt. Warm: the server's prefix cache holds the
document from an earlier request, and only picture and question are new.
"""

import argparse
import asyncio
import shutil
import statistics
from pathlib import Path

import common
from served import Asked, Server, ask, data_uri


def adapter(folder: Path) -> Path:
    """A random adapter on the model in ``folder``."""
    made = folder / "agent-adapter"
    if (made / "adapters.safetensors").exists():
        return made
    from mpi_mlx.models import load_model
    from mpi_mlx.models.adapters import save_adapter
    from mpi_mlx.models.lora import attach_lora
    from mpi_mlx.recipe import LoraSpec

    shutil.rmtree(made, ignore_errors=True)
    model = load_model(folder)
    attach_lora(model, LoraSpec(rank=16, alpha=32))
    save_adapter(model, made)
    return made


def document(folder: Path, tokens: int) -> str:
    """Words that are ``tokens`` tokens, or very nearly."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = common.words(2 * tokens, 7).split()
    per_word = len(tokenizer.encode(" ".join(words)).ids) / len(words)
    return " ".join(words[: round(tokens / per_word)])


def body(model: str, number: int, text: str | None) -> dict:
    picture = common.pictures(number + 1)[number]
    content = [
        {"type": "image_url", "image_url": {"url": data_uri(picture)}},
        {"type": "text", "text": common.words(30, 1000 + number)},
    ]
    messages = [{"role": "user", "content": content}]
    if text is not None:
        messages.insert(0, {"role": "system", "content": text})
    return {"model": model, "messages": messages, "max_tokens": 1, "temperature": 0}


def times(server: Server, name: str, text: str | None, repeats: int, numbers) -> list[Asked]:
    """One request that is not counted, then ``repeats``, one after the other."""
    answers = [asyncio.run(ask(server.port, body(name, next(numbers), text))) for _ in range(repeats + 1)]
    errors = [answer.error for answer in answers if answer.error]
    if errors:
        raise SystemExit(f"{name}: {errors[0]}")
    return answers[1:]


def measure(options) -> list[dict]:
    folder = common.checkpoint("qwen2_5_vl", hidden=options.hidden, layers=options.layers)
    agent = adapter(folder)
    texts = {size: document(folder, size) for size in options.documents}
    rows = {size: {"document": size} for size in options.documents}
    for state, cache in (("cold", "0"), ("warm", "1024")):
        numbers = iter(range(10_000))  # the same questions and pictures for both states
        server = Server(str(folder), "--name", "base", "--adapter", f"agent={agent}", "--prefix-cache", cache)
        for size, row in rows.items():
            without = times(server, "agent", None, options.repeats, numbers)
            within = times(server, "base", texts[size], options.repeats, numbers)
            row["prompt_tokens"] = {"in_context": within[0].prompt_tokens, "internalized": without[0].prompt_tokens}
            row[state] = {
                "in_context": statistics.median(answer.first for answer in within),
                "internalized": statistics.median(answer.first for answer in without),
                "cached_tokens": within[-1].cached_tokens,
                "samples": {
                    "in_context": [answer.first for answer in within],
                    "internalized": [answer.first for answer in without],
                },
            }
        server.terminate()
        server.wait()
    return list(rows.values())


def show(rows: list[dict]) -> None:
    print("| document | prompt with it / without | cold: in context | internalized | | warm: in context |", end="")
    print(" internalized | |\n|---|---|---|---|---|---|---|---|")
    for row in rows:
        prompt = row["prompt_tokens"]
        cells = [f"{row['document']:,}", f"{prompt['in_context']:,} / {prompt['internalized']:,} tokens"]
        for state in ("cold", "warm"):
            one, other = row[state]["in_context"], row[state]["internalized"]
            cells += [f"{1e3 * one:,.0f} ms", f"{1e3 * other:,.0f} ms", f"{one / other:.1f}x"]
        print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[1000, 4000, 16000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    rows = measure(options)
    show(rows)
    if not options.no_save:
        common.save("ttft", {"hidden": options.hidden, "layers": options.layers, "rows": rows})


if __name__ == "__main__":
    main()
