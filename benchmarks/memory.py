"""Peak memory of an SFT step against mlx-lm's and of an RL update of a group of 16 against mlx-vlm's.

python benchmarks/memory.py [--vocabulary 151936] [--length 2048] [--repeats 5]
"""

import argparse

import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    results = {}
    for name, kind, peer in (("sft", "llama", "mlx-lm"), ("rl", "qwen2_5_vl", "mlx-vlm")):
        folder = str(common.checkpoint(kind, vocabulary=options.vocabulary))
        ours = dict(checkpoint=folder, length=options.length, what="ours_sft")
        theirs = ours | {"what": f"{peer.replace('-', '_')}_{name}"}
        if name == "rl":  # the image takes 64 tokens, the template a few
            prompt = {"text": common.words(options.length - 128, 0), "image": common.pictures(1)[0]}
            ours |= dict(prompts=[prompt], group=16, tokens=48)
            theirs |= prompt
        sides = [
            common.Side("mpi-mlx", "ours_rl.py" if name == "rl" else "memory.py", **ours),
            common.Side(peer, "memory.py", common.peer_python(peer), **theirs),
        ]
        rows = common.alternate(sides, options.repeats)
        peak = common.median(rows["mpi-mlx"], "update_peak" if name == "rl" else "peak") / 2**20
        other = common.median(rows[peer], "peak") / 2**20
        results[name] = {"mpi-mlx": peak, peer: other, "ratio": peak / other, "wanted": 0.35}
        if name == "rl":
            results[name]["mpi-mlx, with the rollout"] = common.median(rows["mpi-mlx"], "peak") / 2**20
        print(f"{name}: {peak:.0f} MiB, {peer} {other:.0f}: {peak / other:.2f} of it (wanted: at most 0.35)")
    common.save("memory", {"options": vars(options), "peak_mib": results})


if __name__ == "__main__":
    main()
