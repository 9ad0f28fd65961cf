"""Tests of every task, and of tldr, arxiv and housebuild in particular; the reward of coophe has a file of its own."""
import functools
import itertools
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import minecraft_sim as sim
import tasks
from minecraft_sim import house_boxes
from tasks import Episode, get_task, history

ROOT = Path(__file__).resolve().parent.parent
NAMES = list(tasks.TASKS)
GENERATED = [name for name in NAMES if name != "strbuild"]  # strbuild's items have tests of their own
OURS = ["tldr", "arxiv", "coophe", "housebuild"]  # some tests are for these only, not for tasks that a user adds


# --- items ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", GENERATED)
def test_a_held_out_item_is_in_no_training_item_and_no_demonstration(name):
    task, rng = get_task(name), random.Random(1)
    train, held_out = {task.key(item) for item in task.train_items}, {task.key(item) for item in task.eval_items}
    assert not train & held_out and len(held_out) > 5 and len(train) > 50 and len(task.eval_items) <= 128
    shown = {task.observation(item, 0).rsplit("\n", 1)[0] for item in task.eval_items}
    seen = {task.demonstration(rng)[0]["content"].rsplit("\n", 1)[0] for _ in range(150)}
    assert len(seen) > 100 and not seen & shown
    assert task.train_items == get_task(name, num_agents=1).train_items  # the same every time, for every team


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("num_agents", [1, 2])
def test_a_sloppy_team_is_worth_something_but_not_much(name, num_agents):
    task, rng = get_task(name, num_agents=num_agents), random.Random(2)
    items = [task.random_training_item(rng) for _ in range(60)]
    answers = [[task.expert(item, agent, rng) for agent in range(num_agents)] for item in items]
    outcomes = task.judge_all(items, answers, 0, [None] * 60)
    assert 20 < sum(outcome.score for outcome in outcomes) / 60 < 70
    assert all(len(outcome.feedback) == num_agents for outcome in outcomes)
    assert task.judge(items[0], answers[0], 0) == outcomes[0]


@pytest.mark.parametrize("name", [*OURS, "strbuild"])
def test_what_a_demonstration_begins_with_is_what_an_agent_is_shown(name):
    rng, shown = random.Random(3), set()
    for item in get_task(name).train_items[:40]:
        shown |= {get_task_once(name, n).observation(item, agent) for n in (1, 2) for agent in range(n)}
    def form(text):  # its first word, which all observations of a task share
        return re.split(r"[\W\d]+", text)[:1]
    assert {form(get_task_once(name, 2).demonstration(rng)[0]["content"])[0] for _ in range(40)} <= {
        form(text)[0] for text in shown}


@pytest.mark.parametrize("name", NAMES)
def test_runs_with_other_options_share_a_base(name):
    """Their demonstrations must be the same, because the first of these runs builds the base for all."""
    others = [get_task(name, num_agents=1, num_turns=3, reward="sparse")]
    others += [get_task(name, feedback=feedback) for feedback in others[0].feedback_modes[1:]]
    for task in others:
        assert [task.demonstration(random.Random(seed)) for seed in range(12)] == [
            get_task_once(name, 2).demonstration(random.Random(seed)) for seed in range(12)]


@functools.cache
def get_task_once(name, num_agents):
    return get_task(name, num_agents=num_agents)


@pytest.mark.parametrize("name", NAMES)
def test_no_answer_breaks_the_judge(name):
    task, item = get_task_once(name, 2), get_task_once(name, 2).train_items[0]
    nasty = ["", "\0", "a" * 100_000, "a b " * 25_000, "(" * 100_000, "=====" * 20_000, "\ud800", "```" * 9,
             "fill 0 0 0 9999999 9999999 9999999 stone\n" * 50, "setblock " + "9" * 10_000 + " 0 0 stone",
             "def aux(x):\n" + " return " + "-" * 50_000 + "x", "kill\n" * 30_000]
    for one, two in itertools.zip_longest(nasty, nasty[1:], fillvalue=""):
        outcome = task.judge(item, [one, two], 0)
        assert outcome.score == outcome.score and 0 <= outcome.score <= 100 and not outcome.done


# --- housebuild -------------------------------------------------------------------------------------------------------

def test_boxes_by_hand():
    layers = {0: ["PP"], 1: ["P."]}
    assert house_boxes(layers, {"P": "planks"}) == [((0, 0, 0), (0, 0, 0), "planks"), ((1, 0, 0), (1, 0, 0), "planks"),
                                                    ((0, 1, 0), (0, 1, 0), "planks")]
    cube = {y: ["PPP"] * 3 for y in range(3)}  # 27 planks: at most 13 in a box; it grows along x, z, then up
    assert house_boxes(cube, {"P": "planks"})[0] == ((0, 0, 0), (2, 0, 2), "planks")


def test_the_boxes_of_a_house_are_the_house_and_two_builders_can_build_it():
    task, best = get_task_once("housebuild", 2), []
    sizes = set()
    for item in task.train_items[:200]:
        target = sim.house_target(item["layers"], item["inventory"])
        cells = {}
        for low, high, block in house_boxes(item["layers"], item["inventory"]):
            box = set(itertools.product(*(range(a, b + 1) for a, b in zip(low, high))))
            assert not box & cells.keys()
            cells |= dict.fromkeys(box, block)
        assert cells == target and set(target.values()) == set(sim.HOUSE_BLOCKS[:5])
        sizes.add((len(item["layers"][0][0]), len(item["layers"]), len(item["layers"][0])))
        boxes = task.boxes_text(item).splitlines(keepends=True)
        answers = ["".join(part).replace(": ", ":\nfill ") for part in (boxes[::2], boxes[1::2])]
        best.append(task.judge(item, [answers[0] + "kill", answers[1]], 0).score)
        assert task.judge(item, ["".join(answers)] * 2, 0).score < 100  # nobody has blocks for all of it
    assert sum(best) / len(best) > 85 and max(best) > 95
    assert {size for size, *_ in sizes} == {size for *_, size in sizes} == set(range(4, 9))
    assert {height for _, height, _ in sizes} == set(range(4, 9))


def test_spiders_are_shown_and_cost_unless_somebody_kills():
    task = get_task_once("housebuild", 2)
    item = task.train_items[0] | {"spider_attacks": [1, 1, 2]}
    assert "Spiders 1 1 2." in task.observation(item, 0) and len({str(i["spider_attacks"]) for i in task.train_items}) == 27
    peace, war = (task.judge(item, [answer, "nothing"], 0) for answer in ("kill", "nothing"))
    assert peace.reward - war.reward == pytest.approx(0.1 * 4 / 5) and (peace.parts["kills"], war.parts["kills"]) == (1, 0)


def test_housebuild_feedback():
    item = {"layers": {0: ["PP", ".P"]}, "inventory": {"P": "planks"}, "spider_attacks": []}
    answers = ["fill 0 0 0 0 0 0 planks\nfill 0 0 1 0 0 1 planks", "fill 1 0 0 1 0 0 planks"]
    def told(feedback):
        return get_task("housebuild", feedback=feedback).judge(item, answers, 0).feedback
    assert told("score") == ["Turn 2. The last answers were worth -0.5."] * 2  # 2 of 4 cells are right, one is wrong, one missing
    assert told("perfect") == ["Turn 2. Your fills with wrong cells:\n 0 0 1 0 0 1 planks", "Turn 2. Your fills with wrong cells: none"]
    assert " 3: 1 0 1 1 0 1 planks" in told("position")[0]
    answers = ["fill 0 0 0 1 0 1 air\nfill 0 0 0 1 0 0 planks", "fill 1 0 1 1 0 1 planks"]  # later commands repair everything
    assert told("perfect") == ["Turn 2. Your fills with wrong cells: none"] * 2
    answers = ["fill 0 0 0 0 0 0 air", "fill 0 0 1 0 0 1 air"]  # air where planks belong, and where air belongs
    assert told("perfect") == ["Turn 2. Your fills with wrong cells:\n 0 0 0 0 0 0 air", "Turn 2. Your fills with wrong cells: none"]


# --- tldr and arxiv ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["tldr", "arxiv"])
def test_one_agent_writes_both_texts(name):
    alone, team = get_task_once(name, 1), get_task_once(name, 2)
    item, texts = team.train_items[0], ["word " * 150, "other " * 160]
    one = alone.judge(item, [f"{texts[0]}\n=====\n{texts[1]}"], 0)
    assert one.parts == team.judge(item, [text.strip() for text in texts], 0).parts and one.reward > 0.5
    assert alone.judge(item, ["no line between them"], 0).reward == 0
    assert alone.max_new_tokens == 2 * team.max_new_tokens


# --- users' own data --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, line, message", [
    ("tldr", {"prompt": " "}, "prompt"), ("tldr", {"text": "a"}, "prompt"), ("arxiv", {"abstract_text": 3}, "abstract_text"),
    ("housebuild", {"layers": {"0": ["AB"]}, "inventory": {"A": "planks"}}, "'B'"),
    ("housebuild", {"layers": {"0": ["AA", "A"]}, "inventory": {"A": "planks"}}, "equally"),
    ("housebuild", {"layers": {"0": ["A"]}, "inventory": {"A": "gold block"}}, "planks"),
    ("housebuild", {"layers": {"low": ["A"]}, "inventory": {"A": "planks"}}, "not 'low'"),
    ("housebuild", {"layers": {"0": [["A"]]}, "inventory": {"A": "planks"}}, "layers"),
    ("housebuild", {"layers": {"0": ["A"], "2": ["A"]}, "inventory": {"A": "planks"}}, "layers"),
    ("housebuild", {"layers": {"0": [".."]}, "inventory": {}}, "hold a block"),
    ("housebuild", {"layers": {"0": ["A"], "00": ["A"]}, "inventory": {"A": "planks"}}, "same height"),
    ("housebuild", {"layers": {"0": 5}, "inventory": {"A": "planks"}}, "layers"),
    ("housebuild", {"layers": {"0": [], "1": ["A"]}, "inventory": {"A": "planks"}}, "layers"),
    ("housebuild", {"layers": {"0": ["A"]}, "inventory": {"A": "planks"}, "spider_attacks": [10 ** 400]}, "spider_attacks"),
    ("housebuild", {"layers": {"0": ["A" * 5000]}, "inventory": {"A": "planks"}}, "4096"),
    ("housebuild", {"layers": {"0": ["A" * 4097]}, "inventory": {"A": "planks"}}, "4096"),
    ("housebuild", {"layers": {"0": ["A"]}, "inventory": {"A": "planks"}, "spider_attacks": [-1]}, "spider_attacks"),
    ("housebuild", {"layers": {"0": ["A"]}, "inventory": {"A": "planks"}, "spider_attacks": [True]}, "spider_attacks"),
    ("tldr", {"prompt": "a \ud800"}, "UTF-8"),
    ("coophe", {"prompt": "def f(x):", "entry_point": "f"}, "test"),
    ("coophe", {"prompt": "def f(x):", "entry_point": "f(", "test": "assert candidate(1)"}, "name of a function"),
    ("coophe", {"prompt": "def f(x):", "entry_point": "f", "test": "def check(candidate):\n    pass"}, "assert"),
])
def test_a_line_that_is_no_item(tmp_path, name, line, message):
    good = get_task_once(name, 2).train_items[0]
    path = tmp_path / "own.jsonl"
    path.write_text(f"{json.dumps(good)}\n{json.dumps(line)}\n")
    with pytest.raises(ValueError, match=rf"own.jsonl, line 2: .*{re.escape(message)}") as error:
        get_task(name, data=str(path))
    assert "\n" not in str(error.value)


def test_a_house_may_be_as_large_as_16_cubed_and_stand_anywhere(tmp_path):
    house = {"layers": {str(y): ["A" * 16] * 16 for y in range(5, 21)}, "inventory": {"A": "planks"}}
    (tmp_path / "own.jsonl").write_text(json.dumps(house))
    item = get_task("housebuild", data=str(tmp_path / "own.jsonl")).train_items[0]
    assert list(item["layers"]) == [*range(5, 21)] and item["spider_attacks"] == []


def test_a_file_with_a_mark_in_front_and_one_that_is_no_text(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a post"}\r\n{"prompt": "another"}')  # as Windows editors save it
    assert len(get_task("tldr", data=str(path)).train_items) == 2
    path.write_bytes(b'{"prompt": "a post"}\n{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="line 2: .*UTF-8"):
        get_task("tldr", data=str(path))


HUB = {"tldr": ("trl-lib/tldr", {"train": "prompt", "test": "prompt"}),
       "arxiv": ("OpenMLRL/arXiv_abstract", {"train": "abstract_text", "val": "abstract_text"})}


@pytest.mark.parametrize("name", HUB)
@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_the_real_data_sets_are_read(tmp_path, monkeypatch, capsys, name, format):
    """A local folder with the data set's name replaces the hub: the datasets package reads it by the same call."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, splits = HUB[name]
    for split, column in splits.items():
        rows = datasets.Dataset.from_dict({column: [f"{split} text {k}" for k in range(1100)] + ["  "], "other": list(range(1101))})
        Path(folder).mkdir(parents=True, exist_ok=True)
        with open(f"{folder}/README.md", "w") as card:  # it names the splits; "val" would be guessed as "validation"
            card.write("---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(
                f"  - split: {split}\n    path: {split}.{format}\n" for split in splits) + "---\n")
        rows.to_parquet(f"{folder}/{split}.parquet") if format == "parquet" else rows.to_json(f"{folder}/{split}.jsonl")
    task = get_task(name, data="hub")
    column = list(splits.values())[0]
    limit = 1000 if name == "tldr" else 1100
    assert [item[column] for item in task.train_items] == [f"train text {k}" for k in range(limit)]
    assert len(task.eval_items) == 128 and all(item[column].startswith(list(splits)[1]) for item in task.eval_items)
    assert ("row 1100 is left out" in capsys.readouterr().out) == (name == "arxiv")


def test_coophe_reads_both_of_its_data_sets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    def problem(number):
        return {"task_id": f"P/{number}", "prompt": f"def f{number}(x):\n    \"\"\"Add {number}.\"\"\"\n", "entry_point": f"f{number}",
                "canonical_solution": f"    return x + {number}\n",
                "test": f"METADATA = {{}}\n\ndef check(candidate):\n    assert candidate(1) == {1 + number}\n"}
    for folder, count, start in [("OpenMLRL/CoopHumanEval", 82, 0), ("openai/openai_humaneval", 164, 70)]:
        Path(folder).mkdir(parents=True)
        datasets.Dataset.from_list([problem(start + k) for k in range(count)]).to_parquet(f"{folder}/test.parquet")
    task = get_task("coophe", data="hub")
    numbers = [[int(item["entry_point"][1:]) for item in items] for items in (task.train_items, task.eval_items)]
    assert numbers[1] == [*range(16), *range(70, 102)] and numbers[0] == [*range(16, 70), *range(102, 234)][:54] + [*range(102, 234)]
    outcome = task.judge(task.eval_items[3], ["def aux(x):\n    return x", "def f3(x):\n    return aux(x) + 3"], 0)
    assert outcome.score == 100 and outcome.done


def test_held_out_rows_are_spread_evenly_and_not_trained_on(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    Path("own/set").mkdir(parents=True)
    for split, numbers in [("train", [0, 1, 4, -1]), ("test", range(400))]:  # 0 is in both; so is 1, which is no
        datasets.Dataset.from_list([{"n": n} for n in numbers]).to_json(f"own/set/{split}.jsonl")  # row that is evaluated
    train, held_out = tasks.read_hub([("own/set", "train", "test")], lambda row: {"n": row["n"]})
    assert train == [{"n": 1}, {"n": 4}, {"n": -1}] and held_out == [{"n": n} for n in range(0, 384, 3)]


def test_the_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError) as missing:
        get_task("tldr", data="hub")
    assert missing.value.name == "datasets"  # so that a script says: pip install datasets
    monkeypatch.undo()
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"trl-lib/tldr \(train\[:1000\]\) cannot be loaded.*--data") as error:
        get_task("tldr", data="hub")
    assert "\n" not in str(error.value)


# --- whole runs -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("script, num_agents", [("train_cc.py", 2), ("train_dc.py", 1), ("train_mc.py", 2)])
def test_every_script_plays_every_task(workplace, name, script, num_agents):
    """With strbuild's briefly trained base, which knows none of these tasks: a model's answers may be anything."""
    items = get_task_once(name, 2).train_items[:8]
    data = workplace.folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(item | {"split": "eval" if k > 5 else "train"}) + "\n" for k, item in enumerate(items)))
    out = workplace.folder / f"{script}-{name}-{num_agents}"
    run = workplace.run(script, "--task", name, "--model", workplace.tiny, "--data", data, "--steps", 1, "--batch_size", 4,
                        "--max_new_tokens", 8, "--num_agents", num_agents, "--out_dir", out)
    assert run.code == 0, run.err
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 1] and 0 <= lines[-1]["eval/score"] <= 100
    assert lines[1]["joint_actions"] == 4 * get_task_once(name, 2).num_turns
    assert sorted(path.name for path in out.glob("agent_*")) == [f"agent_{i}" for i in range(num_agents)]
    if script == "train_cc.py":  # also: the team plays without the critic, one process per agent
        played = workplace.run("model.py", out)
        assert played.code == 0 and "agent 1 answers" in played.out and "score" in played.out, played.err
        refused = workplace.run("model.py", out, "--string", "CLIM")
        assert refused.code == 2 and refused.err == f"error: --string is for strbuild; this team plays {name}.\n"


def test_the_task_that_the_readme_adds(workplace):
    """The README's class, pasted into tasks.py where the README says, can be trained."""
    block = re.search(r"```python\n(class .*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    name = re.match(r"class (\w+)\(Task\)", block)[1]
    assert len([line for line in block.splitlines() if line.strip()]) <= 20
    folder = workplace.folder / "fork"
    folder.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    code, heading = (folder / "tasks.py").read_text(), "# --- all tasks, and python tasks.py"
    assert code.count(heading) == 1
    block = re.sub(r"\b600\b", "60", block)  # a worse base, sooner
    (folder / "tasks.py").write_text(code.replace(heading, block + "\n\n" + heading).replace(
        'TASKS = {', f'TASKS = {{"{name.lower()}": {name}, '))
    run = subprocess.run([sys.executable, "train_cc.py", "--task", name.lower(), "--steps", "3"], cwd=folder, capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in (folder / f"out/cc-{name.lower()}/log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3 and "eval/score" in lines[-1]


# --- where an episode ends --------------------------------------------------------------------------------------------

def test_where_an_episode_ends():
    """The threshold lies between the two cases of each pair."""
    def ended(name, item, first, second):
        return get_task_once(name, 2).judge(item, [first, second], 0).done
    for string, done in [("I", False), ("IC", True)]:  # a missing cell of 13 costs 0.154, of 24 it costs 0.083
        rows = sim.string_target(string)
        first, second = sim.scripted_builders(rows)
        assert ended("strbuild", {"string": string}, first, second.rsplit("\n", 1)[0]) is done
    for width, done in [(9, False), (11, True)]:  # one of 18 cells, 0.056; one of 22, 0.045
        house = {"layers": {0: ["P" * width] * 2}, "inventory": {"P": "planks"}, "spider_attacks": []}
        assert ended("housebuild", house, f"fill 0 0 0 {width - 1} 0 0 planks", f"fill 1 0 1 {width - 1} 0 1 planks") is done
    red, blue = " ".join("bcdfghjk"), " ".join("bcdfghjklmnpqrtv")
    more = "although meanwhile furthermore therefore for example in summary indeed similarly unless".split(" ")
    for phrases, done in [(more[:7], False), (more[:9], True)]:
        assert ended("tldr", {"prompt": ""}, red + " zzzzzzzzzzzzzzzzzzzzzz", f"{blue} {' '.join(phrases)}") is done
    for tests, done in [(4, False), (6, True)]:  # one of 4 tests costs 0.25, one of 6 costs 0.167
        item = {"prompt": "", "entry_point": "f", "test": "def check(candidate):\n" + "".join(
            f"    assert candidate({k}) == {max(1, k)}\n" for k in range(tests))}
        assert ended("coophe", item, "def aux(n):\n    return n", "def f(n):\n    return aux(n) + 0") is done
