"""Supervised fine-tuning: images against mlx-vlm, text of unequal lengths against mlx-lm and mlx-train-perf.

python benchmarks/sft.py [--repeats 5] [--only images|text] [--add] [--real]

`--real`: images alone, on weights in the shapes of Qwen2.5-VL-3B in bfloat16 and larger pictures, for GPUs.
"""

import argparse

import common


def compare(name: str, sides: list, options, wanted: dict[str, float]) -> None:
    """Seconds a trained token of each side as a share of the first's, which is ours."""
    results = common.alternate(sides, options.repeats, earlier=f"sft_{name}" if options.add else None)
    per_token = {
        side: common.median([{"seconds": 1e6 * r["seconds"] / max(r["tokens"], 1)} for r in rows])
        for side, rows in results.items()
    }
    for side, value in per_token.items():
        ratio = per_token["mpi-mlx"] / value
        target = f" (wanted: at most {wanted[side]})" if side in wanted else ""
        peak = common.median(results[side], "peak") / 2**20
        print(f"{side:15s} {value:9.1f} us a token, ours {ratio:.2f} of it{target}; peak {peak:.0f} MiB")
    common.save(f"sft_{name}", {"microseconds_a_token": per_token, "wanted": wanted, "results": results})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["images", "text"])
    parser.add_argument("--add", action="store_true", help="to the repeats in results/")
    parser.add_argument("--real", action="store_true")
    options = parser.parse_args()
    if options.real or options.only in (None, "images"):
        rows = [
            {"query": common.words(30, i), "answer": common.words(60, 1000 + i), "image": image}
            for i, image in enumerate(common.pictures(64, 448 if options.real else 224))
        ]
        work = dict(rows=rows, epochs=4, batch=8)
        if options.real:
            work |= dict(checkpoint=str(common.checkpoint_3b()), dtype="bfloat16")
        else:
            work |= dict(checkpoint=str(common.checkpoint("qwen2_5_vl")))
        sides = [
            common.Side("mpi-mlx", "ours_sft.py", **work),
            common.Side("mlx-vlm", "mlx_vlm_sft.py", common.peer_python("mlx-vlm"), **work),
        ]
        compare("images_3b" if options.real else "images", sides, options, {"mlx-vlm": 0.5})
    if not options.real and options.only in (None, "text"):
        rows = [
            {"query": common.words(10, i), "answer": common.words(50 + (i * 37 % 64) * 350 // 63, 1000 + i)}
            for i in range(64)
        ]
        work = dict(checkpoint=str(common.checkpoint("llama", head=64)), rows=rows, epochs=1, batch=8)
        sides = [
            common.Side("mpi-mlx", "ours_sft.py", **work),
            common.Side("mlx-lm", "mlx_lm_sft.py", common.peer_python("mlx-lm"), **work),
        ]
        python = common.peer_python("mlx-train-perf")
        sides.append(common.Side("mlx-train-perf", "mlx_lm_sft.py", python, packed=True, **work))
        compare("text", sides, options, {"mlx-lm": 0.7, "mlx-train-perf": 1.0})


if __name__ == "__main__":
    main()
