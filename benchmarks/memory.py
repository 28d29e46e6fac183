"""Peak memory of an SFT step against mlx-lm's and of an RL update of a group of 16 against mlx-vlm's.

python benchmarks/memory.py [--vocabulary 151936] [--length 2048]
"""

import argparse

import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--length", type=int, default=2048)
    options = parser.parse_args()
    results = {}
    for name, kind, peer in (("sft", "llama", "mlx-lm"), ("rl", "qwen2_5_vl", "mlx-vlm")):
        folder = str(common.checkpoint(kind, vocabulary=options.vocabulary))
        work = dict(checkpoint=folder, length=options.length)
        if name == "rl":  # the image takes 64 tokens, the template a few
            work |= dict(text=common.words(options.length - 128, 0), image=common.pictures(1)[0])
        theirs = f"{peer.replace('-', '_')}_{name}"
        sides = [
            common.Side("mpi-mlx", "memory.py", what=f"ours_{name}", **work),
            common.Side(peer, "memory.py", common.peer_python(peer), what=theirs, **work),
        ]
        rows = common.alternate(sides, repeats=1, warmup=0)
        ours, other = (common.median(rows[n], "peak") / 2**20 for n in ("mpi-mlx", peer))
        results[name] = {"mpi-mlx": ours, peer: other, "ratio": ours / other, "wanted": 0.35}
        print(f"{name}: {ours:.0f} MiB, {peer} {other:.0f}: {ours / other:.2f} of it (wanted: at most 0.35)")
    common.save("memory", {"options": vars(options), "peak_mib": results})


if __name__ == "__main__":
    main()
