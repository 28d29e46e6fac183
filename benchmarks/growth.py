"""Our RL step's time against the prompts' length and the groups' size, and the prompts' share of the update.

python benchmarks/growth.py [--repeats 5] [--lengths 128 512 2048] [--groups 2 8 32] [--add] [--processor] [--real]
python benchmarks/growth.py --run runs/quickstart [--repeats 5] [--lengths 128 512] [--groups 2 8 32] [--add]

The share: seconds that the prompts' own forward and backward take alone (gradients arriving at every layer's keys and
values, as the completions send them), of the update's.

Random weights draw completions that share nothing. `--run` takes a run's agent as it was before its rl stage, and the
run's own prompts, as they are and lengthened: what completions share is not computed twice. `--real`: weights in the
shapes of Qwen2.5-VL-3B in bfloat16, for GPUs.
"""

import argparse
import json
from pathlib import Path

import common

PROMPTS, TOKENS = 4, 48
PARTS = ("", "rollout_", "update_", "prompt_")
TEMPLATE = 12  # tokens of a prompt that are not its words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--add", action="store_true", help="keep the other lengths in results/")
    parser.add_argument("--processor", action="store_true", help="processor seconds, for machines that are shared")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--run", help="folder of a finished run, its agent instead of random weights")
    options = parser.parse_args()
    if options.run:
        return trained(options)
    name = "growth_3b" if options.real else "growth"
    file = common.HERE / "results" / f"{name}.json"
    rows = json.loads(file.read_text())["table"] if options.add else []
    table = {(r["length"], r["group"]): r for r in rows}
    for length in options.lengths:
        for group, row in zip(options.groups, measure(length, options), strict=True):
            table[length, group] = {"length": length, "group": group, **row}
            show(table[length, group])
    common.save(name, {"table": [table[key] for key in sorted(table)]})
    for length in sorted({length for length, _ in table}):
        groups = sorted(group for at, group in table if at == length)
        pairs = zip(groups[:-1], groups[1:], strict=True)
        steps = [table[length, b]["seconds"] / table[length, a]["seconds"] for a, b in pairs]
        print(f"{length:5d} tokens: the next group size costs x {', '.join(f'{s:.2f}' for s in steps)}")
    figure(table, name)


def measure(length: int, options) -> list[dict]:
    """Medians of a step for each group size, the sizes measured in turn."""
    if options.real:
        same = dict(checkpoint=str(common.checkpoint_3b()), dtype="bfloat16")
    else:
        same = dict(checkpoint=str(common.checkpoint("llama")))
    prompts = [{"text": common.words(length - TEMPLATE, i)} for i in range(PROMPTS)]
    work = dict(**same, prompts=prompts, tokens=TOKENS, phases=True)
    sides = [common.Side(str(group), "ours_rl.py", group=group, **work) for group in options.groups]
    results = common.alternate(sides, options.repeats)
    kind, rows = "cpu_seconds" if options.processor else "seconds", []
    for side in sides:
        row = {f"{part}seconds": common.median(results[side.name], part + kind) for part in PARTS}
        rows.append(row | {"processor": options.processor})
    return rows


def trained(options) -> None:
    """The same of a run's agent; nothing moves it (a learning rate of next to nothing)."""
    if not (Path(options.run) / "stages").is_dir():
        raise SystemExit(f"{options.run} is not a run's folder: train recipes/quickstart.yaml first")
    file = common.HERE / "results" / "growth_trained.json"
    rows = json.loads(file.read_text())["table"] if options.add else []
    table = {(r["length"], r["group"]): r for r in rows}
    for length in options.lengths if options.add else [0, *options.lengths]:
        rows = of_agent(length, options)
        table |= {(length, row["group"]): row for row in rows}
        for row in rows:
            print(
                f"prompts of {row['prompt']:5.0f}, groups of {row['group']:3d}: {row['seconds']:.3f} s, "
                f"{row['rollout_seconds']:.3f} of it rollout; {row['tokens']:.0f} tokens a completion"
            )
        steps = [b["seconds"] / a["seconds"] for a, b in zip(rows[:-1], rows[1:], strict=True)]
        print(f"the next group size costs x {', '.join(f'{s:.2f}' for s in steps)}", flush=True)
    common.save("growth_trained", {"run": Path(options.run).name, "table": [table[key] for key in sorted(table)]})


def of_agent(length: int, options) -> list[dict]:
    """Medians for each group size, measured in turn; length 0: prompts as they are."""
    same = dict(
        prompts=PROMPTS, policy_aware=0, learning_rate="1.0e-12", updates_per_rollout=1, minibatches=1,
        drop_constant="false", sft_coef=0, kl_coef=0, steps=10**6,
    )  # fmt: skip
    work = dict(run=options.run, length=length, examples=PROMPTS * (options.repeats + 1))
    sides = [
        common.Side(str(group), "ours_rl_run.py", stage={**same, "group_size": group}, **work)
        for group in options.groups
    ]
    results = common.alternate(sides, options.repeats)
    names = ("seconds", "rollout_seconds", "update_seconds", "prompt", "tokens")
    return [
        {"length": length, "group": group, **{name: common.median(results[str(group)], name) for name in names}}
        for group in options.groups
    ]


def show(row: dict) -> None:
    share = row["prompt_seconds"] / row["update_seconds"]
    print(
        f"prompts of {row['length']:5d}, groups of {row['group']:3d}: {row['seconds']:.3f} s, "
        f"{row['rollout_seconds']:.3f} of it rollout; the prompts are {share:.2f} of the update"
    )


def figure(table: dict, name: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths, groups = (sorted({key[i] for key in table}) for i in (0, 1))
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.4))

    def curves(axis, along, families, value, legend):
        for family in families:
            points = [(x, value(*((x, family) if along is lengths else (family, x)))) for x in along]
            axis.plot(*zip(*points, strict=True), "o-", label=family)
        axis.set(xscale="log", xlabel="prompt tokens" if along is lengths else "group size")
        axis.set_xticks(along, labels=along)
        axis.minorticks_off()
        axis.legend(title=legend, fontsize=7)
        axis.grid(alpha=0.3)

    def seconds(length, group):
        return table[length, group]["seconds"]

    def share(length, group):
        row = table[length, group]
        return row["prompt_seconds"] / row["update_seconds"]

    curves(axes[0], lengths, groups, seconds, "group")
    curves(axes[1], groups, lengths, seconds, "tokens")
    curves(axes[2], groups, lengths, share, "tokens")
    for axis in axes[:2]:
        axis.set(yscale="log", ylabel="seconds an RL step")
    axes[2].set(ylim=(0, 1), ylabel="prompts' share of the update")
    fig.suptitle(f"{PROMPTS} prompts, completions of {TOKENS} tokens", fontsize=10)
    fig.tight_layout()
    fig.savefig(common.HERE / "results" / f"{name}.png", dpi=150)


if __name__ == "__main__":
    main()
