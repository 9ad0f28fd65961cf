"""
The tables and the curves of COMPARISON.md, from the log.jsonl files of the runs that results/compare.sh makes.

    python results/compare.py                          # reads results/comparison, prints the table
    python results/compare.py --svg results/comparison.svg     # and draws the curves (needs matplotlib)

A file is called SETTING-METHOD-seedK.jsonl. CoLLM-CC is compared with every other method by the exact two-sided
permutation test on the difference of the means over seeds; with five seeds there are 252 ways to split ten runs into
two groups, so that no p is below 2/252 = 0.008. The p-values of each of a setting's two scores are corrected for their
number by Holm's method.
"""
import argparse
import glob
import itertools
import json
import os
import statistics
import sys

METHODS = {"cc": "CoLLM-CC", "dc": "CoLLM-DC", "group": "MAGRPO", "none": "MAREINFORCE",
           "grpo": "GRPO, one agent", "cc1": "CoLLM-CC, lambda 1"}
SETTINGS = {"one": "1 turn", "official": "4 turns, dense, rebuilt (official)", "persistent": "4 turns, sparse, persistent"}


def permutation_p(ours, theirs):
    """Share of the ways to split all numbers into two groups of these sizes whose means differ at least as much.

    [1, 2] against [3, 4]: of 6 ways, [1, 2] and [3, 4] differ by 2, none by more: 2/6.
    """
    everything, n = ours + theirs, len(ours)
    total = sum(everything)

    def difference(chosen):
        return abs(sum(chosen) / n - (total - sum(chosen)) / (len(everything) - n))
    ways = [difference(chosen) for chosen in itertools.combinations(everything, n)]
    return sum(way >= difference(ours) - 1e-9 for way in ways) / len(ways)


def holm(ps):
    """Holm's correction: the smallest p times their number, the next times one less, and so on, never falling.

    {"a": 0.01, "b": 0.04, "c": 0.03} gives {"a": 0.03, "c": 0.06, "b": 0.06}.
    """
    corrected, highest = {}, 0.0
    for k, name in enumerate(sorted(ps, key=ps.get)):
        highest = corrected[name] = max(highest, min(1.0, ps[name] * (len(ps) - k)))
    return corrected


def read(folder):
    """{setting: {method: [(training lines, last and first evaluation line) of each seed]}}."""
    runs = {setting: {method: [] for method in METHODS} for setting in SETTINGS}
    for path in sorted(glob.glob(os.path.join(folder, "*.jsonl"))):
        setting, method, _ = os.path.basename(path).split("-")
        with open(path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        evaluations = [line for line in lines if "eval/score" in line]
        training = [line for line in lines if "train/score" in line]
        runs[setting][method].append((training, evaluations[-1], evaluations[0]))
    return runs


def spread(numbers, digits=1):
    return f"{statistics.mean(numbers):.{digits}f} ± {statistics.stdev(numbers):.{digits}f}"


def table(runs):
    for setting, methods in runs.items():
        methods = {method: seeds for method, seeds in methods.items() if len(seeds) > 1}
        if "cc" not in methods:
            continue
        final = {method: [last["eval/score"] for _, last, _ in seeds] for method, seeds in methods.items()}
        during = {method: [statistics.mean(line["train/score"] for line in lines) for lines, _, _ in seeds]
                  for method, seeds in methods.items()}
        p_final, p_during = (holm({method: permutation_p(numbers["cc"], numbers[method])
                                   for method in methods if method != "cc"}) for numbers in (final, during))
        actions = [last["joint_actions"] for seeds in methods.values() for _, last, _ in seeds]
        counts = " to ".join(f"{count:,}" for count in sorted({min(actions), max(actions)}))
        print(f"\n**{SETTINGS[setting]}**: {min(map(len, methods.values()))} seeds, {counts} joint actions a run\n")
        print("| | raw | trained | p | reward per turn | mean training score | p |\n|---|---|---|---|---|---|---|")
        for method, seeds in methods.items():
            reward = spread([last["eval/reward"] for _, last, _ in seeds], 2)
            p, q = (f"{ps[method]:.2f}" if method in ps else "" for ps in (p_final, p_during))
            print(f"| {METHODS[method]} | {seeds[0][2]['eval/score']:.1f} | {spread(final[method])} | {p} | {reward} | "
                  f"{spread(during[method])} | {q} |")
        print("\nexplained variance of V on fresh episodes, turn by turn, mean over the second half of the steps:")
        for method in ("cc", "dc", "cc1"):
            late = [line["value/explained_variance_by_turn"] for lines, _, _ in methods.get(method, [])
                    for line in lines[len(lines) // 2:]]
            turns = [statistics.mean(at_turn) for at_turn in zip(*late)]
            if turns:
                print(f"  {METHODS[method]}: {', '.join(f'{x:.2f}' for x in turns)}")


def draw(runs, path):
    try:
        import matplotlib
    except ImportError:
        sys.exit("--svg needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "comparison"  # the same file from the same numbers
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(runs), figsize=(13, 4), layout="constrained")
    for axis, (setting, methods) in zip(axes, runs.items()):
        for (method, seeds), color in zip(methods.items(), [
                "#c8102e", "#1f77b4", "#2ca02c", "#8c8c8c", "#9467bd", "#ff9d4d"]):
            if len(seeds) < 2:
                continue
            steps = list(zip(*[lines for lines, _, _ in seeds]))  # [step][seed]
            x = [statistics.mean(line["joint_actions"] for line in step) for step in steps]
            y = [[line["train/score"] for line in step] for step in steps]
            means, stds = list(map(statistics.mean, y)), list(map(statistics.stdev, y))
            axis.plot(x, means, color=color, label=METHODS[method])
            axis.fill_between(x, [m - s for m, s in zip(means, stds)], [m + s for m, s in zip(means, stds)],
                              color=color, alpha=0.12, linewidth=0)
        axis.set(title=SETTINGS[setting], xlabel="joint actions", ylabel="score of the step's episodes")
    axes[-1].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=os.path.join(os.path.dirname(__file__), "comparison"))
    parser.add_argument("--svg", help="also draw the curves there")
    args = parser.parse_args()
    runs = read(args.folder)
    if not any(seeds for methods in runs.values() for seeds in methods.values()):
        parser.error(f"{args.folder} holds no logs of the comparison.")
    table(runs)
    if args.svg:
        draw(runs, args.svg)
