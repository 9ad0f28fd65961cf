"""The arithmetic of the curve; that the benchmark runs; that README's links point at the lines that they name."""
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import curve
import scaling
import table1
from model import LanguageModel
from tasks import Episode, get_task, history

ROOT = Path(__file__).resolve().parent.parent


def test_numbers_of_the_curve_by_hand():
    p, effect, holm, until = curve.permutation_p, curve.effect, curve.holm, curve.joint_actions_to
    assert p([([1, 2], [3, 4])]) == pytest.approx(2 / 6)  # the examples in the docstrings
    assert effect([([1, 2], [3, 4])]) == (-2, pytest.approx(-2 / 0.5 ** 0.5))
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    record = {"score": [40, 50, 60, 70], "joint_actions": [64, 128, 192, 256]}
    assert (until(50, record), until(60, record), until(61, record)) == (192, 256, float("inf"))
    assert p([([1, 2, 3, 4, 5], [11, 12, 13, 14, 15])]) == pytest.approx(2 / 252)
    assert p([([1, 4], [2, 3])]) == 1 and p([([1, 1], [1, 1])]) == 1
    # two blocks of 6 ways: -2, -1, 0, 0, 1, 2 and ten times these; -22 is measured, and 2 of 36 sums are as large
    assert p([([1, 2], [3, 4]), ([10, 20], [30, 40])]) == pytest.approx(2 / 36)
    assert p([([1, 2], [3, 4])] * 4) == pytest.approx(2 / 6 ** 4)
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_the_tables_of_the_curve(tmp_path, capsys):
    with open(tmp_path / "curve.jsonl", "w") as file:
        for method, turns, seed in itertools.product(("cc", "dc"), (1, 2), (0, 1)):
            trained = {"cc": 70, "dc": 50}[method] + 10 * seed
            file.write(json.dumps({"run": ["rebuilt", "dense", turns, method, seed], "joint_actions": [64, 128, 192],
                                   "score": [trained - 5] * 3, "explained": [0.5] * turns, "raw": 10,
                                   "trained": trained, "built": trained / 50}) + "\n")
    runs = curve.read(tmp_path / "curve.jsonl")
    curve.print_settings(runs)
    curve.print_tests(runs)
    rows = [line for line in capsys.readouterr().out.splitlines() if "| 1 turn," in line or "| short" in line]
    cells = ["10.0 | 75.0 ± 7.1 | 55.0 ± 7.1", " | 1.50 ± 0.14 | 1.10 ± 0.14", " | 192, never | never, never"]
    assert rows[:3] == [f"| 1 turn, dense, rebuilt | 2 | {cell} |" for cell in cells]
    # of 36 ways two differ as much
    assert rows[3] == "| short and dense | CoLLM-CC − CoLLM-DC | +20.0 | +2.8 | 0.056 | +20.0 | +2.8 | 0.056 |"


def test_table_1(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no tiny base here, so nothing is timed
    for (method, rate), (seed, score) in itertools.product({"one": "1e-3", "cc": "2e-3"}.items(), enumerate((50, 52))):
        steps = [{"train/score": score + k, "joint_actions": 160 * k} for k in range(1, 5 + seed)]
        lines = [{"eval/score": 10, "eval/turns": 1, "eval/response_tokens": 5, "joint_actions": 0, "slowest": 8,
                  "command": f"train_cc.py --lr {rate}"}, *steps, {"eval/score": score, "eval/turns": 2,
                  "eval/response_tokens": 20, "joint_actions": 160 * len(steps), "slowest": 30}]
        Path(f"tldr-{method}-seed{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    head, _, agent, team, one, cc, *paper = table1.table("tldr", tmp_path).splitlines()
    # steps 2 to 4 count, of seed 1, too, which takes 800 joint actions: means 53 and 55
    heads = "joint actions | score | training score at 640 | turns | tokens | slowest | command"
    assert head == f"| tldr | seeds | {heads} |"
    assert agent == "| untrained agent | 1 | 0 | 10.0 |  | 1.00 | 5 | 8 |  |" and team == agent.replace("agent", "team")
    trained = "2 | 720 ± 113 | 51.0 ± 1.4 | 54.0 ± 1.4 | 2.00 ± 0.00 | 40 ± 0 | 30 ± 0 | `train_cc.py --lr"
    assert one == f"| actor-critic, one agent | {trained} 1e-3` |" and cc == f"| CoLLM-CC | {trained} 2e-3` |"
    assert paper[1].endswith("30.3 / 91.7 / 95.2.") and table1.table("arxiv", tmp_path) == ""
    runs = {"cc": (1, 2), "mc": (3, 4), "dc": (5,)}
    runs = {method: [[{"eval/score": score}] for score in scores] for method, scores in runs.items()}
    assert table1.differences(runs) == "CoLLM-CC against MAGRPO -2.0 (p 0.333)"
    assert (table1.spread([1, 2, 3], 1), table1.spread([], 1)) == ("2.0 ± 1.0", "")


def test_benchmark_measures_a_checkout(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "results" / "benchmark.py", "--only", "also", "--also", ROOT,
                          "--small", "--algorithms", "mc", "--turns", "2", "--threads", "1", "--ranks", "2"],
                         cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in run.stdout.splitlines() if "| mc |" in line]
    assert [row[:3] for row in rows] == [["mc", "2", "also, torchrun"]] and not any(tmp_path.iterdir())
    assert float(rows[0][5]) == pytest.approx(2 * float(rows[0][3]), abs=0.02) and float(rows[0][8]) > 0


def test_links_of_the_readme_point_at_the_lines_that_they_name():
    links = re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", (ROOT / "README.md").read_text())
    assert len(links) >= 6
    wrong = [link for link in links if link[0] not in (ROOT / link[1]).read_text().splitlines()[int(link[2]) - 1]]
    assert not wrong, "these lines moved or changed; as part of an exercise that is harmless"


def test_a_model_of_a_real_shape_reads_and_writes(tmp_path, monkeypatch, capsys):
    """results/scaling.py --build: what it answers is read as about as many tokens in the next turn; and --speed."""
    monkeypatch.setitem(scaling.SHAPES, "small", (32, 1, 2, 1, 16, 64, 151936, True))
    scaling.build("small", tmp_path / "small")
    lm, task = LanguageModel(str(tmp_path / "small")), get_task("strbuild")
    lm.add_adapter("agent_0")
    tokens, _, texts = lm.generate("agent_0", [lm.render(history(task, Episode(task.eval_items[0]), 0))], torch.rand(
        1, 200, generator=torch.Generator().manual_seed(0)))
    again = lm.tokenizer(texts[0]).input_ids
    assert len(tokens[0]) == 200 and 150 < len(again) < 400
    scaling.speed(str(tmp_path / "small"), False, prompt=20, answer=4, rows=4)
    lines = capsys.readouterr().out.splitlines()
    # fp32, both agents: 9,312 weights in the layer, 32 x 151,936 of the output, 4 rows of 20 + 16 + 2 keys and values
    # of 16 numbers
    assert f"read the {2 * 4 * (9312 + 4861952 + 4864) / 1e9:.4g} GB of weights" in lines[1]
    assert [line.split(" with")[0] for line in lines[2:]] == [f"an update of {rows} rows" for rows in (1, 2, 4, 8)]


def test_memory_by_formula_follows_the_shape():
    """What a layer keeps for the backward pass is counted on a real layer; rows and checkpointing change the sum."""
    narrow, wide = (64, 4, 4, 2, 16, 128, 1000, True), (64, 4, 4, 2, 16, 256, 1000, True)
    # an MLP 128 wider keeps gate, up and the activation in bf16, and their product as its adapter's input in fp32
    assert scaling.kept_by_a_layer(wide) - scaling.kept_by_a_layer(narrow) == (3 * 2 + 4) * 128
    one, two = scaling.memory(wide, micro_batch=1), scaling.memory(wide, micro_batch=2)
    assert two["kept"] == pytest.approx(2 * one["kept"]) and one["KV cache"] == two["KV cache"]
    # base: 61,440 weights a layer in matrices and 160 in norms, 64 x 1000 in the embedding, 64 in the last norm;
    # adapters: 16 x 1408 a layer; cache: 8 rows of 900 + 512 tokens, keys and values of 2 x 16 bf16 numbers a layer
    part, total = {name: size * 2 ** 30 for name, size in one.items()}, 4 * (61440 + 160) + 64000 + 64
    assert part["base"] == 2 * total and part["adapters"] == 16 * 4 * 16 * 1408 * (2 + 1)
    assert part["KV cache"] == 8 * (900 + 512) * 4 * 2 * 2 * 16 * 2
    layer, logits = scaling.kept_by_a_layer(wide), 18 * 512 * 1000
    assert part["kept"] == pytest.approx(1412 * 4 * layer + logits)
    assert part["checkpointed"] == pytest.approx(1412 * (4 * 2 * 64 + layer) + logits)
    assert one["peak, kept"] == one["base"] + one["adapters"] + max(one["KV cache"], one["kept"])
