"""Time to first token: the document in context beside the internalized agent, which does not carry it.

python benchmarks/ttft.py [--documents 1000 4000 16000] [--repeats 5]

The embedded model, its positions stretched to the longest document, served by `mpi-mlx serve` with the
internalized agent as a LoRA adapter of rank 16 on it: an untrained one, which takes as long as any other. Both get
the same questions, each with a picture of its own; only one gets the document. Cold: nothing is known of the
prompt, as in the first request after a start, or after others have pushed the document out. Warm: the server's
prefix cache holds the document from an earlier request, and only picture and question are new.
"""

import argparse
import asyncio
import json
import shutil
import statistics
from pathlib import Path

import common
from served import Asked, Server, ask, data_uri


def base(positions: int) -> Path:
    """The embedded model with room for as many tokens."""
    import mpi_mlx.assets

    made = common.CACHE / "checkpoints" / f"embedded-{positions}"
    if not (made / "config.json").exists():
        tiny = Path(mpi_mlx.assets.__file__).parent / "tiny"
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(tiny, made, ignore=shutil.ignore_patterns("config.json"))
        config = json.loads((tiny / "config.json").read_text()) | {"max_position_embeddings": positions}
        (made / "config.json").write_text(json.dumps(config))
    return made


def adapter(folder: Path) -> Path:
    """A fresh adapter on the model in ``folder``."""
    made = folder / "agent-adapter"
    if (made / "adapters.safetensors").exists():
        return made
    from mpi_mlx.models import load_model
    from mpi_mlx.models.adapters import save_adapter
    from mpi_mlx.models.lora import attach_lora
    from mpi_mlx.recipe import LoraSpec

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
    folder = base(max(options.documents) + 1024)
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


def figure(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(figsize=(6, 3))
    lines = (("cold", "in_context", "C3", "-"), ("warm", "in_context", "C1", "-"),
             ("cold", "internalized", "C0", "-"), ("warm", "internalized", "C0", "--"))  # fmt: skip
    for state, kind, color, style in lines:
        times = [1e3 * row[state][kind] for row in rows]
        label = f"{kind.replace('_', ' ')}, {state}"
        axes.plot([row["document"] for row in rows], times, style, marker="o", color=color, label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the document", ylabel="ms to the first token")
    axes.set_xticks([row["document"] for row in rows], [f"{row['document']:,}" for row in rows])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    drawn.tight_layout()
    drawn.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[1000, 4000, 16000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    rows = measure(options)
    show(rows)
    if not options.no_save:
        common.save("ttft", {"model": "embedded:tiny", "repeats": options.repeats, "rows": rows})
        figure(rows, common.HERE / "results" / "ttft.png")


if __name__ == "__main__":
    main()
