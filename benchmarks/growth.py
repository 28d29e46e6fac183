"""Our RL step's time against the prompt's length and the group's size: a table and a figure.

python benchmarks/growth.py [--repeats 5] [--lengths 128 512 2048] [--groups 2 8 32]
"""

import argparse

import common


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    options = parser.parse_args()
    folder = str(common.checkpoint("llama"))
    table = {}
    for length in options.lengths:
        for group in options.groups:
            prompts = [{"text": common.words(length - 16, i)} for i in range(4)]
            work = dict(checkpoint=folder, prompts=prompts, group=group, tokens=48)
            side = common.Side("mpi-mlx", "ours_rl.py", **work)
            rows = common.alternate([side], options.repeats)["mpi-mlx"]
            total, rollout = common.median(rows), common.median(rows, "rollout_seconds")
            table[length, group] = {"length": length, "group": group, "seconds": total, "rollout": rollout}
            print(f"prompts of {length:5d}, groups of {group:3d}: {total:.3f} s ({rollout:.3f} rollout)")
    for length in options.lengths:
        pairs = zip(options.groups[:-1], options.groups[1:], strict=True)
        steps = [table[length, b]["seconds"] / table[length, a]["seconds"] for a, b in pairs]
        print(f"{length:5d} tokens: the next group size costs x {', '.join(f'{s:.2f}' for s in steps)}")
    common.save("growth", {"table": list(table.values())})
    figure(table, options)


def figure(table: dict, options) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for group in options.groups:
        seconds = [table[length, group]["seconds"] for length in options.lengths]
        axes[0].plot(options.lengths, seconds, "o-", label=group)
    for length in options.lengths:
        seconds = [table[length, group]["seconds"] for group in options.groups]
        axes[1].plot(options.groups, seconds, "o-", label=length)
    for axis, name, legend in ((axes[0], "prompt tokens", "group"), (axes[1], "group size", "tokens")):
        axis.set(xlabel=name, xscale="log", yscale="log")
        axis.legend(title=legend, fontsize=7)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds an RL step (4 prompts, 48 tokens)")
    fig.tight_layout()
    fig.savefig(common.HERE / "results" / "growth.png", dpi=150)


if __name__ == "__main__":
    main()
