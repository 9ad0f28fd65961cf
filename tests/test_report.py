"""The page of a run: what it shows, that it runs and loads nothing, and what is said about wrong input."""
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

from tasks import Episode, Turn, get_task, record

SCRIPT = Path(__file__).resolve().parent.parent / "results" / "report.py"
EVIL = '<script>alert(1)</script> & "\x1b[31m\u202e\nlast line'
BEFORE, AFTER = ["/setblock 0 4 0 stone", EVIL], ["fill 0 0 0 0 0 0 obsidian", "/setblock 1 4 0 obsidian"]


def make_run(folder, name="strbuild", **options):
    """A run of 3 steps whose team says nothing at the second turn."""
    task, kept, config = get_task(name, **options), [], {"algorithm": "cc", "task": name, "data": "gone.jsonl", **options}
    for step, answers in (0, BEFORE), (3, AFTER):
        episode = Episode({"string": "I"} if name == "strbuild" else task.eval_items[0])
        for t, texts in enumerate([answers, ["", ""]]):
            episode.turns.append(Turn([], [], [], texts, task.judge(episode.item, texts, t, episode.world)))
        kept.append(record(task, episode, step))
    if name == "strbuild":  # one item loses and one gains, so "I" is the typical one
        kept = [line | {"item": {"string": other}, "score": line["step"] * gain}
                for other, gain in (("L", -9), ("M", 9)) for line in kept] + kept
    log = [{"step": k, "joint_actions": 8 * k, "train/score" if k in (1, 2) else "eval/score": 20 * k} for k in range(4)]
    folder.mkdir()
    for file, lines in ("config.json", [config]), ("log.jsonl", log), ("samples.jsonl", kept):
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))


def report(cwd, *runs, code=0):
    """Make a report; returns its text, [(tag, attribute, value)], and what the script says on stderr."""
    run = subprocess.run([sys.executable, SCRIPT, *runs, "--out", "page"], cwd=cwd, capture_output=True, text=True)
    assert run.returncode == code and "Traceback" not in run.stderr, run.stderr
    parser, texts, tags, source = HTMLParser(), [], [], (cwd / "page").read_text(encoding="utf-8") if code == 0 else ""
    parser.handle_starttag, parser.handle_data = lambda tag, found: tags.extend((tag, *pair) for pair in found), texts.append
    parser.feed(source)
    source = source.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert not [word for word in ("<script", "http", "src=", "href=", "\x1b") if word in source]
    return "".join(texts), tags, run.stderr


def test_reports_of_good_and_bad_runs(tmp_path):
    make_run(tmp_path / "one", num_turns=2, world="persistent")
    text, tags, _ = report(tmp_path, "one")
    assert ("polyline", "points", "355.0,286.0 660.0,217.0") in tags  # 50 + 915 k / 3, 355 - 3.45 x 20 k
    assert [value for tag, name, value in tags if (tag, name) == ("circle", "r")] == ["2", "2", "6", "6"]
    assert tags.count(("g", "class", "cube")) == 2 * 3 and tags.count(("g", "class", "missing")) == 2 * 3 * 12
    for shown in (*AFTER, EVIL.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e"), "You are builder 2 of 2",
                  "Build 1:I", "Your 1 blocks: 1:I 0 4 0", "(nothing)", "adjacent_same_ratio", "gone.jsonl"):
        assert shown in text
    make_run(tmp_path / "two", "tldr"), make_run(tmp_path / "three", "housebuild")
    text, tags, _ = report(tmp_path, "two", "one")  # both curves, and texts instead of pictures
    assert [tag for tag, name, _ in tags].count("polyline") == 2 * 4 and AFTER[0] in text and "cube" not in str(tags)
    assert ("tr", "class", "differs") in tags and ("g", "class", "cube") in report(tmp_path, "three")[1]
    command = [sys.executable, SCRIPT, "one", "two/log.jsonl", "--svg", "."]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).returncode == 0
    curve, before, after = ((tmp_path / f"{name}.svg").read_text() for name in ("curve", "before", "after"))
    assert curve.count("<polyline") == 2 and before.count("cube") == after.count("cube") == 1 and before != after
    (tmp_path / "one" / "samples.jsonl").unlink()  # made by earlier code
    assert "kept no whole episodes" in report(tmp_path, "one")[0]
    (tmp_path / "one" / "log.jsonl").unlink()
    (tmp_path / "two" / "log.jsonl").write_text('{"step": 0, "joint_actions": 0}\n{"step": 1,\n')
    for name, said in ("no", "no is not a run"), ("one", "one/log.jsonl"), ("two", "line 2 is not a JSON object with step"):
        assert said in report(tmp_path, name, code=2)[2]
