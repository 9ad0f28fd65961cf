"""
When does a critic pay? Strbuild over 1, 2, 4 and 8 turns, dense and sparse rewards, rebuilt and persistent worlds.

    python results/curve.py                                  # prints COMPARISON.md's tables from results/curve.jsonl
    python results/curve.py --svg results/comparison.svg     # and draws its figure (needs matplotlib)
    python results/curve.py --run                            # makes missing runs first, two at a time; hours

A step has 64 / T episodes of T turns: 64 joint actions, or fewer where episodes end early, so that a world's runs have
equally many steps and not quite as many joint actions. MAGRPO, MAREINFORCE and GRPO play each string four times, so
they see a quarter of the others' strings. Over one turn dense and sparse are the same; a persistent world has two turns
or more. --run may be stopped and continued: a run that has ended is a line of curve.jsonl, others start anew.
"""
import argparse
import itertools
import json
import math
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from table1 import spread, train

HERE = Path(__file__).resolve().parent
LOGS = HERE / "curve.jsonl"
METHODS = {"cc": ("CoLLM-CC", "train_cc.py --critic_lr 1e-3"),
           "cc8": ("CoLLM-CC, lambda 0.8", "train_cc.py --critic_lr 1e-3 --lam 0.8"),
           "dc": ("CoLLM-DC", "train_dc.py --critic_lr 1e-3"),
           "dc8": ("CoLLM-DC, lambda 0.8", "train_dc.py --critic_lr 1e-3 --lam 0.8"),
           "mc": ("MAGRPO", "train_mc.py"),
           "none": ("MAREINFORCE", "train_mc.py --baseline none"),
           "grpo": ("GRPO, one agent", "train_mc.py --num_agents 1")}
WORLDS = {"rebuilt": "--steps 6", "persistent": "--world persistent --steps 16"}
# actors' rates: the best of two (rebuilt, dense) or three (persistent, sparse) trial runs of each method over four
# turns, with one seed, for all turns and rewards (NOTES.md)
RATES = {"rebuilt": dict.fromkeys(METHODS, 2e-3) | {"none": 1e-3},
         "persistent": {"cc": 2e-3, "cc8": 1e-3, "dc": 1e-3, "dc8": 2e-3, "mc": 1e-3, "none": 5e-4, "grpo": 1e-3}}
FIXED = {"rebuilt": 75, "persistent": 50}  # the training score up to which joint actions are counted
SETTINGS = [("rebuilt", "dense", 1)] + [(world, reward, turns) for world in WORLDS for reward in ("dense", "sparse")
                                        for turns in (2, 4, 8)]
# in these MAREINFORCE and GRPO run, too: one turn, the official rules, and a persistent world with sparse rewards
FULL = [("rebuilt", "dense", 1), ("rebuilt", "dense", 4), ("persistent", "sparse", 4)]
POOLS = {"short and dense": [("rebuilt", "dense", turns) for turns in (1, 2)],
         "long and dense": [(world, "dense", turns) for world in WORLDS for turns in (4, 8)],
         "long and sparse": [(world, "sparse", turns) for world in WORLDS for turns in (4, 8)]}
POOLS |= {f"{world}, long and {reward}": [(world, reward, turns) for turns in (4, 8)]  # added when the worlds differed
          for world in WORLDS for reward in ("dense", "sparse")}
PAIRS = [("cc", "mc"), ("cc8", "mc"), ("cc", "dc"), ("cc8", "dc8"), ("cc8", "cc"), ("dc8", "dc")]


# --- runs -------------------------------------------------------------------------------------------------------------

def jobs(seeds, methods):
    """All runs as (world, reward, turns, method, seed), seeds outermost. Over one turn lambda changes nothing."""
    for seed, (world, reward, turns), method in itertools.product(range(seeds), SETTINGS, methods):
        more = method in ("none", "grpo") and (world, reward, turns) not in FULL
        if not (more or turns == 1 and method in ("cc8", "dc8")):
            yield world, reward, turns, method, seed


def make(job):
    """Train one run, unless LOGS holds it, and add what the tables need of its log there as one line."""
    world, reward, turns, method, seed = job
    if LOGS.exists() and any(json.loads(line)["run"] == list(job) for line in LOGS.read_text().splitlines()):
        return
    arguments = (f"{METHODS[method][1]} --task strbuild {WORLDS[world]} --reward {reward} --num_turns {turns} "
                 f"--batch_size {64 // turns} --lr {RATES[world][method]} --seed {seed} --eval_items 64 "
                 f"--threads 1 --device cpu --out_dir out/curve/{'-'.join(map(str, job))} --overwrite").split()
    folder, lines = train(arguments)
    with LOGS.open("a") as file:
        file.write(json.dumps(compact(job, lines)) + "\n")
    print(f"{folder.name}: {lines[0]['eval/score']:.1f} -> {lines[-1]['eval/score']:.1f}", flush=True)


def compact(job, lines):
    """What the tables need of a run's log.

    explained: of V, turn by turn, mean over the second half of the steps; built: the official reward of held-out
    episodes' last builds, 2 at most.
    """
    training, last = [line for line in lines if "train/score" in line], lines[-1]
    late = [line["value/explained_variance_by_turn"] for line in training[len(training) // 2:] if "loss/value" in line]
    return {"run": job, "joint_actions": [line["joint_actions"] for line in training],
            "score": [round(line["train/score"], 2) for line in training],
            "explained": [round(statistics.mean(by_turn[t] for by_turn in late if len(by_turn) > t), 3)
                          for t in range(max(map(len, late), default=0))],
            "raw": lines[0]["eval/score"], "trained": last["eval/score"],
            "built": 2 * last["eval/coverage"] - 1.5 * last["eval/extra_ratio"] - last["eval/adjacent_same_ratio"]
                     - 0.25 * last["eval/missing_palettes"]}


# --- numbers ----------------------------------------------------------------------------------------------------------

def joint_actions_to(score, record):
    """Joint actions of a run until the mean of three steps in a row is at least score; infinite if it never is.

    Scores [40, 50, 60, 70] after [64, 128, 192, 256] joint actions: 192 to 50, 256 to 60.
    """
    for k in range(2, len(record["score"])):
        if statistics.mean(record["score"][k - 2:k + 1]) >= score:
            return record["joint_actions"][k]
    return math.inf


def permutation_p(blocks):
    """Two-sided p of the mean over blocks of mean(ours) - mean(theirs), if runs are exchanged within their block only.

    One block ([1, 2], [3, 4]): of 6 ways to split it, [1, 2] and [3, 4] differ by 2, none by more: 2/6. All ways are
    counted; four blocks of 3 + 3 runs have 20 ** 4.
    """
    ways = []
    for ours, theirs in blocks:
        everything, n = ours + theirs, len(ours)
        ways.append([sum(chosen) / n - (sum(everything) - sum(chosen)) / len(theirs)
                     for chosen in itertools.combinations(everything, n)])  # the first one is what was measured
    measured = abs(sum(own[0] for own in ways))
    larger = [abs(sum(way)) >= measured - 1e-9 for way in itertools.product(*ways)]
    return sum(larger) / len(larger)


def effect(blocks):
    """(mean over blocks of the difference of the means, the same in standard deviations of runs in a block: Cohen's d).

    One block ([1, 2], [3, 4]): -2, in which two runs have a standard deviation of 0.71: -2.83 of these.
    """
    difference = statistics.mean(statistics.mean(ours) - statistics.mean(theirs) for ours, theirs in blocks)
    variance = statistics.mean(statistics.variance(side) for block in blocks for side in block)
    return difference, difference / math.sqrt(variance)


def holm(ps):
    """Holm's correction: the smallest p times their number, the next times one less, and so on, never falling.

    {"a": 0.01, "b": 0.04, "c": 0.03} gives {"a": 0.03, "c": 0.06, "b": 0.06}.
    """
    corrected, highest = {}, 0.0
    for k, name in enumerate(sorted(ps, key=ps.get)):
        highest = corrected[name] = max(highest, min(1.0, ps[name] * (len(ps) - k)))
    return corrected


def read(path):
    """{setting: {method: [record of each seed]}}, where a setting is (world, reward, turns)."""
    runs = {setting: {method: [] for method in METHODS} for setting in SETTINGS}
    records = {tuple(record["run"]): record for record in map(json.loads, path.read_text().splitlines())}
    for (*setting, method, _), record in sorted(records.items()):
        runs[tuple(setting)][method].append(record)
    return runs


# --- tables and figure ------------------------------------------------------------------------------------------------

def joint_actions_text(records, score):
    """The joint actions to a score of each seed, "never" if it is not reached: "128, 192, never"."""
    counts = sorted(joint_actions_to(score, record) for record in records)
    return ", ".join("never" if count == math.inf else f"{count:,}" for count in counts)


def print_settings(runs):
    """Four tables, a row for every setting and a column for every method that has runs: mean and deviation over seeds.

    Of joint actions every seed's is listed, of explained variance there is only the mean; untrained: the team of two.
    """
    tables = {"score": lambda records, world: spread([r["trained"] for r in records], 1),
              "reward of the last build": lambda records, world: spread([r["built"] for r in records], 2),
              f"joint actions to {FIXED['rebuilt']} (rebuilt) or {FIXED['persistent']} (persistent)":
                  lambda records, world: joint_actions_text(records, FIXED[world]),
              "explained variance of V, turn by turn": lambda records, world: ", ".join(
                  f"{statistics.mean(at_turn):.2f}" for at_turn in zip(*(r["explained"] for r in records)))
                  if world == "persistent" else ""}  # in the rebuilt one few episodes come to late turns
    shown = [method for method in METHODS if any(methods[method] for methods in runs.values())]
    for title, cell in tables.items():
        print(f"\n| {title} | seeds | untrained | {' | '.join(METHODS[method][0] for method in shown)} |\n"
              f"{'|---' * (3 + len(shown))}|")
        for (world, reward, turns), methods in runs.items():
            if teams := [record for method, records in methods.items() if method != "grpo" for record in records]:
                seeds = sorted({len(records) for records in methods.values() if records})
                untrained = f"{teams[0]['raw']:.1f}" if title == "score" else ""
                cells = [untrained, *(cell(methods[method], world) if methods[method] else "" for method in shown)]
                if any(cells):
                    print(f"| {turns} turn{'s' * (turns > 1)}, {reward}, {world} | {' or '.join(map(str, seeds))} | "
                          f"{' | '.join(cells)} |")


def print_tests(runs):
    """For each pool of settings and pair of methods: difference in points, Cohen's d and p, of two scores.

    p is corrected by Holm's method for the pairs of its pool and score, not for the pools. It speaks of other training
    seeds, not of other strings. The first step's score is left out of the mean: the untrained team plays it.
    """
    measures = {"score": lambda r: r["trained"], "mean training score": lambda r: statistics.mean(r["score"][1:])}
    print("\n| | | " + " | ".join(f"{name}: points | d | p" for name in measures) + " |\n" + "|---" * 8 + "|")
    for pool, settings in POOLS.items():
        rows, ps = {}, {}
        for pair, name in itertools.product(PAIRS, measures):
            blocks = [tuple([measures[name](r) for r in runs[setting][method]] for method in pair)
                      for setting in settings]
            if all(len(side) > 1 for block in blocks for side in block):
                rows.setdefault(pair, []).append(effect(blocks))
                ps.setdefault(name, {})[pair] = permutation_p(blocks)
        corrected = [holm(by_pair) for by_pair in ps.values()]
        for pair, effects in rows.items():
            cells = [f"{points:+.1f} | {size:+.1f} | {by_pair[pair]:.3f}"
                     for (points, size), by_pair in zip(effects, corrected)]
            print(f"| {pool} | {' − '.join(METHODS[method][0] for method in pair)} | {' | '.join(cells)} |")


def draw(runs, path):
    """Columns: worlds and rewards; above the reward of the last build, below the joint actions to the fixed score.

    A dot is a seed that reaches it; a line goes through the medians and stops where they are infinite. MAREINFORCE and
    GRPO, which ran in three settings only, are left out.
    """
    try:
        import matplotlib
    except ImportError:
        sys.exit("--svg needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "comparison"  # the same file from the same numbers
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, 4, figsize=(13, 6), layout="constrained", sharex=True, sharey="row")
    for column, (world, reward) in enumerate(itertools.product(WORLDS, ("dense", "sparse"))):
        settings = [("rebuilt", "dense", 1)] * (world == "rebuilt") + [(world, reward, turns) for turns in (2, 4, 8)]
        for method, color in zip(METHODS, ["#c8102e", "#ff9d4d", "#1f77b4", "#9467bd", "#2ca02c"]):
            by_turns = [(setting[2], runs[setting][method.rstrip("8") if setting[2] == 1 else method])
                        for setting in settings]
            for axis, measure in zip(axes[:, column], [lambda r: r["built"],
                                                       lambda r: joint_actions_to(FIXED[world], r)]):
                numbers = [(turns, [measure(r) for r in records]) for turns, records in by_turns if records]
                for turns, values in numbers:
                    axis.plot([turns] * len(values), values, ".", color=color, markersize=4)
                axis.plot([turns for turns, _ in numbers], [statistics.median(values) for _, values in numbers],
                          color=color, linestyle="--" if "8" in method else "-", label=METHODS[method][0])
        axes[0, column].set(title=f"{world}, {reward}", xscale="log")
        axes[1, column].set(xticks=[1, 2, 4, 8], xticklabels=[1, 2, 4, 8], xlabel="turns")
        axes[1, column].minorticks_off()
    axes[0, 0].set(ylabel="reward of the last build")
    axes[1, 0].set(ylabel=f"joint actions to {FIXED['rebuilt']} (rebuilt) or {FIXED['persistent']}")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="make missing runs")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of these methods")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, on one thread each (default 2)")
    parser.add_argument("--svg", help="also draw the figure there")
    args = parser.parse_args()
    if args.run:
        with ThreadPoolExecutor(args.workers) as workers:
            list(workers.map(make, jobs(args.seeds, args.methods)))
    if not LOGS.exists():
        parser.error(f"{LOGS} does not exist; --run makes it.")
    runs = read(LOGS)
    print_settings(runs)
    print_tests(runs)
    if args.svg:
        draw(runs, args.svg)
