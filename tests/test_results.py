"""The arithmetic of the comparison; that the benchmark runs; that README's links point at the lines that they name."""
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import LanguageModel
from tasks import Episode, get_task, history

ROOT = Path(__file__).resolve().parent.parent
compare = runpy.run_path(str(ROOT / "results" / "compare.py"))


def test_permutation_test_by_hand():
    p = compare["permutation_p"]
    assert p([1, 2], [3, 4]) == pytest.approx(2 / 6)  # the example in its docstring
    assert p([1, 2, 3, 4, 5], [11, 12, 13, 14, 15]) == pytest.approx(2 / 252)
    assert p([1, 4], [2, 3]) == 1 and p([1, 1], [1, 1]) == 1


def test_holm_by_hand():
    corrected = compare["holm"]({"a": 0.01, "b": 0.04, "c": 0.03})
    assert corrected == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert compare["holm"]({"a": 0.5, "b": 0.9})["b"] == 1.0


def test_benchmark_measures_ours(tmp_path):
    run = subprocess.run([sys.executable, ROOT / "results" / "benchmark.py", "--only", "ours", "--small", "--algorithms",
                          "cc", "--turns", "2", "--threads", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in run.stdout.splitlines() if "| cc |" in line]
    speeds, floors = ["ours, as the peer", "ours, as the peer, torchrun", "ours"], ["ours, as the peer", "ours"]
    assert [row[:3] for row in rows] == [["cc", "2", side] for side in speeds + floors]
    assert all(float(row[3]) > 0 for row in rows[:3]) and float(rows[4][-1]) > 0 and not any(tmp_path.iterdir())


def test_links_of_the_readme_point_at_the_lines_that_they_name():
    links = re.findall(r"\[`([^`]+)`\]\((\w+\.py)#L(\d+)\)", (ROOT / "README.md").read_text())
    assert len(links) >= 6
    wrong = [link for link in links if link[0] not in (ROOT / link[1]).read_text().splitlines()[int(link[2]) - 1]]
    assert not wrong


def test_a_model_of_a_real_shape_reads_and_writes(tmp_path, monkeypatch):
    """results/scaling.py --build: what it answers is read as about as many tokens in the next turn."""
    monkeypatch.syspath_prepend(ROOT / "results")
    import scaling
    monkeypatch.setitem(scaling.SHAPES, "small", (32, 1, 2, 1, 16, 64, 151936, True))
    scaling.build("small", tmp_path / "small")
    lm, task = LanguageModel(str(tmp_path / "small")), get_task("strbuild")
    tokens, _ = lm.generate([None], [lm.render(history(task, Episode(task.eval_items[0]), 0))], torch.rand(
        1, 200, generator=torch.Generator().manual_seed(0)))
    again = lm.tokenizer(lm.decode(tokens)[0]).input_ids
    assert len(tokens[0]) == 200 and 150 < len(again) < 400


def test_memory_by_formula_follows_the_shape(monkeypatch):
    """What a layer keeps for the backward pass is counted on a real layer; rows and checkpointing change the sum."""
    monkeypatch.syspath_prepend(ROOT / "results")
    import scaling
    narrow, wide = (64, 4, 4, 2, 16, 128, 1000, True), (64, 4, 4, 2, 16, 256, 1000, True)
    # an MLP 128 wider keeps gate, up, the activation and their product in bf16, and what three adapter matrices have
    # more (16 x 128 each, in bf16) is shared by 128 tokens
    assert scaling.kept_by_a_layer(wide) - scaling.kept_by_a_layer(narrow) == 4 * 2 * 128 + 3 * 2 * 16
    one, two = scaling.memory(wide, micro_batch=1), scaling.memory(wide, micro_batch=2)
    assert two["update"] == pytest.approx(2 * one["update"]) and one["cache"] == two["cache"]
    assert one["checkpointed"] < one["update"]
