"""
The paper's Table 1 with tiny bases: five tasks, untrained agents, two single agents, MAGRPO, CoLLM-DC, CoLLM-CC.

    python results/table1.py                      # prints the table of the runs in results/table1
    python results/table1.py --run strbuild tldr  # makes missing runs first, two at a time on one thread each
    python results/table1.py --run coophe --seeds 10

Every run has the task's default settings but RATES, hence equally many episodes. It may be stopped and continued: a run
that has ended is kept as results/table1/TASK-METHOD-seedK.jsonl, evaluations and scores of its log; others start anew.
"""
import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
TASKS = ["tldr", "arxiv", "coophe", "strbuild", "housebuild"]
METHODS = {"grpo": ("GRPO, one agent", "train_mc.py --num_agents 1"),
           "one": ("actor-critic, one agent", "train_cc.py --num_agents 1"), "mc": ("MAGRPO", "train_mc.py"),
           "dc": ("CoLLM-DC", "train_dc.py"), "cc": ("CoLLM-CC", "train_cc.py")}
COLUMNS = {"joint actions": ("joint_actions", 0), "score": ("eval/score", 1), "training score at {}": ("equal", 1),
           "reward per turn": ("eval/reward", 2), "turns": ("eval/turns", 2), "tokens": ("agent_tokens", 0),
           "slowest": ("slowest", 0), "seconds": ("seconds", 2), "IoU": ("eval/iou", 2),
           "adjacency": ("eval/adjacent_same_ratio", 2), "overlap": ("eval/overlap", 2), "killers": ("eval/kills", 2),
           "pass rate": ("eval/pass_rate", 2)}
PAPER = {"tldr": "30.3 / 91.7 / 95.2", "arxiv": "44.0 / 91.0 / 95.0", "strbuild": "36.6 / 46.1 / 68.5",
         "housebuild": "43.2 / 54.6 / 52.7"}  # raw model, GRPO, CoLLM-CC; of coophe none that compares
PAIRS = [("cc", "mc"), ("dc", "mc"), ("cc", "dc"), ("one", "grpo")]  # whose scores are compared by a test
RATES = {("housebuild", "grpo"): " --lr 1e-3"}  # half of the task's, where a trial run gained 2 points; see NOTES.md
KEPT = ["step", "joint_actions", "wall_s", "train/score", "train/return"]  # of a training step


def command(task, method):
    """What stands beside a row: the train script and its flags, without seed, threads and folder."""
    return f"{METHODS[method][1]} --task {task}{RATES.get((task, method), '')}"


def train(arguments):
    """Run the train script arguments[0] on one thread; returns its output folder and its log's lines."""
    folder = Path(arguments[arguments.index("--out_dir") + 1])
    run = subprocess.run([sys.executable, HERE.parent / arguments[0], *arguments[1:]], stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if run.returncode:
        sys.exit(f"{folder}: {run.stderr}")
    return folder, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def add_slowest(folder, evaluations):
    """Add to each evaluation the tokens of the slowest agent per episode, for which the team waits.

    Agents write at the same time: answers of [5, 7] and [9, 3] tokens in two turns are 7 + 9 = 16 to wait for. Every
    answer counts with an end token, also one that was cut.
    """
    from transformers import AutoTokenizer
    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(f"out/tiny-{config['base']}")
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for line in evaluations:
        episodes = [record["turns"] for record in records if record["step"] == line["step"]]
        line["slowest"] = statistics.mean(sum(1 + max(len(tokenizer(answer).input_ids) for answer in turn["answers"])
                                              for turn in turns) for turns in episodes)


def token_seconds(task):
    """CPU seconds per token of one agent, alone on one thread of this machine, at best; None without out/tiny-TASK."""
    if not Path(f"out/tiny-{task}").exists():
        return None
    sys.path.insert(0, str(HERE.parent))
    import torch
    from model import LanguageModel
    torch.set_num_threads(1)
    lm = LanguageModel(f"out/tiny-{task}", "cpu")
    lm.add_adapter("agent")
    lm.ends, seconds = [], []  # no end: it writes on to the limit
    for _ in range(25):
        start = time.thread_time()
        lm.generate("agent", [list(range(100))], torch.full((1, 64), 0.5))
        seconds.append((time.thread_time() - start) / 64)
    return min(seconds)


def make(job):
    """Run one training and keep its log in compact form, unless that has been done."""
    path = HERE / "table1" / "{}-{}-seed{}.jsonl".format(*job)
    if path.exists():
        return
    made_by = command(*job[:2])
    folder, lines = train(f"{made_by} --seed {job[2]} --threads 1 --device cpu --out_dir out/table1/{path.stem} "
                          "--overwrite".split())
    lines = [line if "eval/score" in line else {key: line[key] for key in KEPT} for line in lines]
    add_slowest(folder, [lines[0], lines[-1]])
    lines[0]["command"] = made_by  # RATES may change later
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{path.stem}: score {lines[0]['eval/score']:.1f} -> {lines[-1]['eval/score']:.1f}", flush=True)


def spread(numbers, digits):
    """Mean and standard deviation: [1, 2, 3] with 1 digit is "2.0 ± 1.0", [] is empty."""
    deviation = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):,.{digits}f}{deviation}" if numbers else ""


def differences(runs):
    """Differences of mean scores, and p of curve.py's exact permutation test, corrected for PAIRS by Holm's method.

    Scores [1, 2] of cc and [3, 4] of mc give "CoLLM-CC against MAGRPO -2.0 (p 0.333)": of 6 ways two differ as much.
    """
    from curve import holm, permutation_p  # here, because curve.py imports this file
    scores = {method: [log[-1]["eval/score"] for log in logs] for method, logs in runs.items() if len(logs) > 1}
    blocks = {pair: tuple(scores[method] for method in pair) for pair in PAIRS if scores.keys() >= {*pair}}
    ps = holm({pair: permutation_p([block]) for pair, block in blocks.items()})
    return "; ".join(f"{' against '.join(METHODS[method][0] for method in pair)} "
                     f"{statistics.mean(ours) - statistics.mean(theirs):+z.1f} (p {ps[pair]:.3f})"
                     for pair, (ours, theirs) in blocks.items())


def table(task, folder=HERE / "table1"):
    """The rows of one task in Markdown: untrained, then methods that have runs; below: tests, the paper's scores.

    training score: mean of the last three steps within as many joint actions as every team of the task has.
    tokens: of an agent in an episode; slowest: of the agent for which others wait; seconds: of the CPU, for these.
    A method's command stands in its row; it was run with --seed 0, 1, ... and --threads 1.
    """
    runs = {method: [[json.loads(line) for line in path.read_text().splitlines()] for path in
                     sorted(Path(folder).glob(f"{task}-{method}-seed*.jsonl"))] for method in METHODS}
    equal = min((log[-1]["joint_actions"] for method in ("mc", "dc", "cc") for log in runs[method]), default=math.inf)
    every = [log for logs in runs.values() for log in logs]
    for log in every:
        steps = [line["train/score"] for line in log if "train/score" in line and line["joint_actions"] <= equal]
        log[-1]["equal"] = statistics.mean(steps[-3:])
    seconds = token_seconds(task)
    for line in [log[k] for log in every for k in (0, -1)]:
        line["agent_tokens"] = line["eval/response_tokens"] * line["eval/turns"]
        if seconds:
            line["seconds"] = line["slowest"] * seconds
    rows = [(f"untrained {who}", [log[0] for method in methods for log in runs[method]][:1], "")
            for who, methods in (("agent", ("grpo", "one")), ("team", ("mc", "dc", "cc")))]
    for method, logs in runs.items():
        made_by = " or ".join(sorted({f"`{log[0]['command']}`" for log in logs}))
        rows.append((METHODS[method][0], [log[-1] for log in logs], made_by))
    rows = [row for row in rows if row[1]]
    known = {key for _, evaluations, _ in rows for line in evaluations for key in line}
    shown = {head.format(f"{equal:,}"): column for head, column in COLUMNS.items() if column[0] in known}
    lines = [f"| {task} | seeds | {' | '.join(shown)} | command |", "|---" * (len(shown) + 3) + "|"]
    lines += [f"| {name} | {len(evaluations)} | " + " | ".join(
        spread([line[key] for line in evaluations if key in line], digits) for key, digits in shown.values())
        + f" | {made_by} |" for name, evaluations, made_by in rows]
    below = []
    if tests := differences(runs):
        below.append(f"\nScores: {tests}.")
    if task in PAPER:
        below.append(f"\nThe paper's, raw model / GRPO / CoLLM-CC, of other items and larger models: {PAPER[task]}.")
    return "\n".join(lines + below) if rows else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", choices=TASKS, default=[], metavar="TASK", help="make missing runs")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of these methods")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default 3)")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, on one thread each (default 2)")
    args = parser.parse_args()
    for task in args.run:  # builds the tiny base
        subprocess.run([sys.executable, HERE.parent / "train_cc.py", "--task", task, "--eval_only", "--eval_items", "1",
                        "--out_dir", "out/table1/base"], stdout=subprocess.DEVNULL, check=True)
    jobs = [(task, method, seed) for seed in range(args.seeds) for task in args.run for method in args.methods]
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(make, jobs))
    print("\n\n".join(filter(None, map(table, TASKS))))
