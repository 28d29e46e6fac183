"""An RL step on image prompts against mlx-vlm's GRPO trainer, and what PolicyRollout adds to ours.

python benchmarks/rl_images.py [--repeats 5] [--only plain|document|policy_rollout] [--add] [--real]

`--real`: weights in the shapes of Qwen2.5-VL-3B in bfloat16 and larger pictures, for GPUs.
"""

import argparse

import common


def prompts(document: str | None = None, size: int = 224) -> list[dict]:
    images = common.pictures(4, size)
    return [
        {"text": common.words(120, i), "image": image, **({"system": document} if document else {})}
        for i, image in enumerate(images)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["plain", "document", "policy_rollout"])
    parser.add_argument("--add", action="store_true", help="to the repeats in results/")
    parser.add_argument("--real", action="store_true")
    options = parser.parse_args()
    same, size, suffix = dict(checkpoint=str(common.checkpoint("qwen2_5_vl")), dtype="float32"), 224, ""
    if options.real:
        same, size, suffix = dict(checkpoint=str(common.checkpoint_3b()), dtype="bfloat16"), 448, "_3b"
    document = common.words(1000, 99)
    for name, text, group, target in (("plain", None, 8, 6), ("document", document, 16, 12)):
        if options.only not in (None, name):
            continue
        work = dict(**same, prompts=prompts(text, size), group=group, tokens=48)
        sides = [
            common.Side("mpi-mlx", "ours_rl.py", **work),
            common.Side("mlx-vlm", "mlx_vlm_grpo.py", common.peer_python("mlx-vlm"), **work),
        ]
        file = f"rl_images_{name}{suffix}"
        cold = ("mlx-vlm",) if name == "document" else ()  # a step of minutes
        results = common.alternate(sides, options.repeats, earlier=file if options.add else None, cold=cold)
        ratio = common.median(results["mlx-vlm"]) / common.median(results["mpi-mlx"])
        show(results)
        print(f"{name}: mlx-vlm takes {ratio:.2f} x our time (wanted: at least {target})")
        common.save(file, {"ratio": ratio, "wanted": target, "results": results})
    if options.only in (None, "policy_rollout"):
        file = f"policy_rollout{suffix}"
        work = dict(**same, prompts=prompts(size=size), group=8, tokens=48)
        sides = [
            common.Side("plain", "ours_rl.py", **work),
            common.Side("policy rollout", "ours_rl.py", **work, document=document, policy_aware=8),
        ]
        results = common.alternate(sides, options.repeats, earlier=file if options.add else None)
        ratio = common.median(results["policy rollout"]) / common.median(results["plain"])
        show(results)
        print(f"PolicyRollout takes {ratio:.2f} x a plain step's time (wanted: at most 2.3)")
        common.save(file, {"ratio": ratio, "wanted": 2.3, "results": results})


def show(results: dict) -> None:
    for name, rows in results.items():
        rollout, total = common.median(rows, "rollout_seconds"), common.median(rows)
        cpu, peak = common.median(rows, "cpu_seconds"), common.median(rows, "peak") / 2**20
        tokens, length = common.median(rows, "tokens"), common.median(rows, "length")
        print(f"{name:15s} {total:7.3f} s a step, {rollout:.3f} of it rollout; {cpu:.3f} CPU; {peak:.0f} MiB; ", end="")
        print(f"{tokens:.0f} tokens a completion, {length:.0f} with its prompt")


if __name__ == "__main__":
    main()
