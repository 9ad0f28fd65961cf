"""
The README's scores and results/EPISODES.md, from runs of `python train_cc.py --task T --seed K`.

    python results/five_tasks.py                             # the README's scores, from results/tasks/T-seedK.jsonl
    python results/five_tasks.py out/cc-tldr out/cc-arxiv    # prints an episode of each before and after training
"""
import argparse
import glob
import json
import os
import statistics

PAPER = {"tldr": "30.3 / 91.7 / 95.2", "arxiv": "44.0 / 91.0 / 95.0", "coophe": "", "strbuild": "36.6 / 46.1 / 68.5",
         "housebuild": "43.2 / 54.6 / 52.7"}


def table(folder):
    """One row per task: its first and last evaluation, mean ± standard deviation."""
    rows = ["| task | joint actions | untrained team | CoLLM-CC | reward per turn "
            "| in the paper: raw / GRPO / CoLLM-CC |", "|---|---|---|---|---|---|"]
    for task, paper in PAPER.items():
        runs = []
        for path in sorted(glob.glob(os.path.join(folder, f"{task}-seed*.jsonl"))):
            with open(path, encoding="utf-8") as file:
                runs.append([line for line in map(json.loads, file) if "eval/score" in line])
        if not runs:
            continue

        def first(key):
            return statistics.mean(run[0][key] for run in runs)

        def last(key, digits):
            values = [run[-1][key] for run in runs]
            return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

        more, actions = "", statistics.mean(run[-1]["joint_actions"] for run in runs)
        if task == "coophe":
            trained = statistics.mean(run[-1]["eval/pass_rate"] for run in runs)
            more = f"; pass rate {100 * first('eval/pass_rate'):.0f}% → {100 * trained:.0f}%"
        if task == "housebuild":
            more = (f"; agents that kill {first('eval/kills'):.2f} → {last('eval/kills', 2)}, spider penalty "
                    f"{first('eval/spider_penalty'):.3f} → {last('eval/spider_penalty', 3)}")
        rows.append(f"| `{task}` | {actions:,.0f} | {first('eval/score'):.1f} | {last('eval/score', 1)}{more} | "
                    f"{last('eval/reward', 2)} | {paper} |")
    return "\n".join(rows)


def episodes(folders):
    """Print, for each run, the episode of samples.txt whose score gained most, before and after training."""
    for folder in folders:
        with open(os.path.join(folder, "config.json")) as file:
            config = json.load(file)
        with open(os.path.join(folder, "samples.txt"), encoding="utf-8") as file:
            parts = [part.partition(", ") for part in file.read().split("=== step ")[1:]]
        last = parts[-1][0]
        before, after = ([text.rstrip() for step, _, text in parts if step == which] for which in ("0", last))
        score = [[float(text.rsplit("score ", 1)[1]) for text in texts] for texts in (before, after)]
        chosen = max(range(len(before)), key=lambda k: score[1][k] - score[0][k])
        print(f"## {config['task']}\n\nBefore training:\n\n```\n{before[chosen]}\n```\n\n"
              f"After {last} steps:\n\n```\n{after[chosen]}\n```\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", help="of runs, each with a config.json and a samples.txt")
    args = parser.parse_args()
    for folder in args.folders:
        if not os.path.exists(os.path.join(folder, "samples.txt")):
            parser.error(f"{folder} is not the folder of a run: it has no samples.txt.")
    if args.folders:
        episodes(args.folders)
    else:
        print(table(os.path.join(os.path.dirname(os.path.abspath(__file__)), "tasks")))
