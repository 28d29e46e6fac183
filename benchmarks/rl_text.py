"""An RL step on text prompts against mlx-lm-lora, textpolicy and inductive-mlxrl, on the same llama-like model.

mlx-lm-lora decodes as many rows at once as there are prompts: give it at least as many prompts as a group has rows.

python benchmarks/rl_text.py [--repeats 5] [--prompts 8] [--group 8] [--words 120] [--tokens 48] [--add]
"""

import argparse

import common

SIDES = {
    "mlx-lm-lora": "mlx_lm_lora_grpo.py", "textpolicy": "textpolicy_grpo.py", "inductive-mlxrl": "mlxrl_grpo.py",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    for name, value in (("prompts", 8), ("group", 8), ("words", 120), ("tokens", 48)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--add", action="store_true", help="to the repeats in results/")
    options = parser.parse_args()
    prompts = [{"text": common.words(options.words, i)} for i in range(options.prompts)]
    folder = str(common.checkpoint("llama"))
    work = dict(checkpoint=folder, prompts=prompts, group=options.group, tokens=options.tokens)
    sides = [common.Side("mpi-mlx", "ours_rl.py", **work)]
    sides += [common.Side(n, script, common.peer_python(n), **work) for n, script in SIDES.items()]
    results = common.alternate(sides, options.repeats, earlier="rl_text" if options.add else None)
    ours = common.median(results["mpi-mlx"])
    for name, rows in results.items():
        seconds, cpu = common.median(rows), common.median(rows, "cpu_seconds")
        peak = common.median(rows, "peak") / 2**20
        times = f"{seconds:7.3f} s a step ({seconds / ours:.2f} x ours)"
        print(f"{name:16s} {times}; {cpu:.3f} CPU; peak {peak:.0f} MiB")
    ratio = min(common.median(rows) for name, rows in results.items() if name != "mpi-mlx") / ours
    print(f"the best of them takes {ratio:.2f} x our time (wanted: at least 2)")
    common.save("rl_text", {"ratio": ratio, "wanted": 2, "results": results})


if __name__ == "__main__":
    main()
