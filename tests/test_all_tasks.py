"""Every task: its items, demonstrations and whole runs; housebuild, tldr and arxiv in particular; coophe has its own file."""
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

ROOT = Path(__file__).resolve().parent.parent
GENERATED = [name for name in tasks.TASKS if name != "strbuild"]  # strbuild's items have tests of their own
get_task = functools.cache(tasks.get_task)


@pytest.mark.parametrize("name", GENERATED)
def test_a_held_out_item_is_in_no_training_item_and_no_demonstration(name):
    task, rng = get_task(name), random.Random(1)
    train, held_out = {task.key(item) for item in task.train_items}, {task.key(item) for item in task.eval_items}
    assert not train & held_out and len(held_out) > 5 and len(train) > 50 and len(task.eval_items) <= 128
    shown = {task.observation(item, 0).rsplit("\n", 1)[0] for item in task.eval_items}
    seen = {task.demonstration(rng)[0]["content"].rsplit("\n", 1)[0] for _ in range(150)}
    assert len(seen) > 100 and not seen & shown


@pytest.mark.parametrize("name", GENERATED)
@pytest.mark.parametrize("num_agents", [1, 2])
def test_a_sloppy_team_is_worth_something_but_not_much(name, num_agents):
    task, rng = get_task(name, num_agents=num_agents), random.Random(2)
    items = [task.random_training_item(rng) for _ in range(50)]
    answers = [[task.expert(item, agent, rng) for agent in range(num_agents)] for item in items]
    outcomes = task.judge_all(items, answers, 0, [None] * 50)
    assert 20 < sum(outcome.score for outcome in outcomes) / 50 < 70
    assert all(len(outcome.feedback) == num_agents for outcome in outcomes)
    assert task.judge(items[0], answers[0], 0) == outcomes[0]


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_runs_with_other_options_share_a_base(name):
    """Their items and demonstrations are the same, because the first of these runs builds the base for all."""
    team, alone = get_task(name), get_task(name, num_agents=1, num_turns=3, reward="sparse")
    for task in [alone, *[get_task(name, feedback=feedback) for feedback in team.feedback_modes[1:]]]:
        assert (task.train_items, task.eval_items) == (team.train_items, team.eval_items)
        assert all(task.demonstration(random.Random(seed)) == team.demonstration(random.Random(seed)) for seed in range(12))


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_no_answer_breaks_the_judge(name):
    rng, k, n = random.Random(0), 100_000, 20
    nasty = ["", "\0", "a" * k, "a b " * k, "(" * k, "=====" * k, "\ud800", "```" * 9, "/\n" * k, "1" * k + ".", "- " * k, " " * k + "x",
             "fill 0 0 0 9999999 9999999 9999999 stone\n" * 50, "setblock " + "9" * 10_000 + " 0 0 stone", "```" + "a" * k + "```",
             f"setblock {'1' * 4299} 0 0 stone", "def aux(x):\n" + " return " + "-" * 19_000 + "x", "kill\n" * 30_000, "\n" * k,
             "".join(chr(rng.randrange(0x110000)) for _ in range(k))]
    answers = [list(pair) for pair in zip(nasty, nasty[1:] + [""])]
    for outcome in get_task(name).judge_all(get_task(name).train_items[:1] * n, answers, 0, [None] * n):
        assert 0 <= outcome.score <= 100 and not outcome.done  # false for a score that is not a number


def test_demonstrations_show_every_agent_of_a_larger_team(monkeypatch):
    monkeypatch.setattr(tasks.HouseBuild, "agents", (1, 2, 3))
    monkeypatch.setattr(tasks.HouseBuild, "observation", lambda self, item, agent: f"agent {agent}")
    shown = {get_task("housebuild").demonstration(random.Random(seed))[0]["content"] for seed in range(50)}
    assert shown == {"agent 0", "agent 1", "agent 2"}


def boxes(item):
    """The boxes by which a house is shown: [("x y z", "x y z", block), ...]."""
    return re.findall(r"^ \d+: (\d+ \d+ \d+) (\d+ \d+ \d+) (\w+)$", get_task("housebuild").observation(item, 0), re.M)


def test_the_boxes_of_a_house_are_the_house_and_two_builders_can_build_it():
    task, best, sizes = get_task("housebuild"), [], set()
    for item in task.train_items[:200]:
        target, built, lines = sim.house_target(item["layers"], item["inventory"]), {}, []
        for low, high, block in boxes(item):
            lines.append(f"fill {low} {high} {block}\n")
            box = set(itertools.product(*(range(a, b + 1) for a, b in zip(map(int, low.split()), map(int, high.split())))))
            assert not box & built.keys()
            built |= dict.fromkeys(box, block)
        assert built == target and set(target.values()) == set(item["inventory"].values())
        sizes.add((len(item["layers"][0][0]), len(item["layers"]), len(item["layers"][0])))
        best.append(task.judge(item, ["".join(lines[::2]) + "kill", "".join(lines[1::2])], 0).score)
        assert task.judge(item, ["".join(lines)] * 2, 0).score < 100  # nobody has blocks for all of it
    assert sum(best) / len(best) > 85 and max(best) > 95
    assert [set(lengths) for lengths in zip(*sizes)] == [set(range(4, 9))] * 3
    # by hand: a box has at most half of all cells of its kind, and grows along x, z, then up
    more = {"inventory": {"P": "planks"}, "spider_attacks": []}
    assert boxes({"layers": {0: ["PP"], 1: ["P."]}} | more) == [(at, at, "planks") for at in ("0 0 0", "1 0 0", "0 1 0")]
    assert boxes({"layers": {y: ["PPP"] * 3 for y in range(3)}} | more)[0] == ("0 0 0", "2 0 2", "planks")
    assert "Spiders 1 1 2." in task.observation(item | {"spider_attacks": [1, 1, 2]}, 0)
    assert len({str(i["spider_attacks"]) for i in task.train_items}) == 27
    assert list(task.check(HOUSE)["layers"]) == [5, 6]  # an own house may stand anywhere, and be of any blocks
    own = task.check({"layers": {"0": ["GG"]}, "inventory": {"G": "minecraft:gold_block"}})
    assert "You have 1 gold_block. The house:\n 1: 0 0 0 0 0 0 gold_block\n" in task.observation(own, 0)
    assert task.judge(own, ["fill 0 0 0 0 0 0 gold_block", "fill 1 0 0 1 0 0 gold_block"], 0).score == 100


def test_housebuild_feedback():
    item = {"layers": {0: ["PP", ".P"]}, "inventory": {"P": "planks"}, "spider_attacks": []}
    answers = ["fill 0 0 0 0 0 0 planks", "fill 1 0 0 1 0 0 planks\nfill 0 0 1 0 0 1 planks"]  # 1 of 4 is wrong, 1 missing
    assert get_task("housebuild").judge(item, answers, 0).feedback == ["Turn 2. The last answers were worth -0.5."] * 2


def words(count, distinct=None, length=0, start=0):
    """A text of so many words of three characters, so many of them distinct, padded to this length: 000 001 002 ..."""
    return " ".join(f"{start + k % (distinct or count):03x}" for k in range(count)).ljust(length)


STOP = "the and of to in on at by", "the and of to in on at by if or from with under down up out"  # only stopwords
TLDR = [(words(7), words(20), 0), (words(8), words(257), 0), ("", "", 0),   # too few words, too many
    (words(8), words(8), 0.5), (words(8), words(45), 0.5),              # ratio 1 < 1.1; 179 / 31 > 5
    (" ".join(["red"] * 8), " ".join(["blue"] * 20), 1.5),              # 31 and 99 characters; 1 distinct word each
    ("- " * 8, "word " * 6 + "- " * 2, 1.5),                            # no word in the first
    (words(10), words(20, start=100), 2.0),                             # 39 and 79: 1; 10 and 20 distinct: 0.5; no style
    (words(10), words(20), 2.6),                                        # 10 of 20 are shared: overlap is full
    (words(20, 20, 100), words(40, 40, 200, 19), 2.0 + 0.6 / 59 / 0.03),  # 1 of 59 is shared
    (words(10) + " therefore", words(22), 2.6),                         # in the first text it does not count
    (words(10), words(16), 0.5 + 1 + 0.5 * 0.3 / 0.7 + 0.6),            # 39 and 63: 1; 1.6 times as many words
    (words(10, start=170), words(20, start=170).upper() + " HOWEVER, However!", 2.6 + 0.4 * 0.45),  # case does not matter
    (*STOP, 2.6), (STOP[0] + " dog", STOP[1] + " sun moon", 2.0),       # no content words: they agree; these do not
    *[(words(10), f"{words(21)} {phrase}", 2.6 + 0.4 * (0.35 + 0.05 * categories)) for phrase, categories in [
        ("however", 2), ("although", 2), ("furthermore", 1), ("in addition", 1), ("therefore", 1), ("for example", 1),
        ("in summary", 2), ("meanwhile", 4), ("on the other hand", 1), ("as a result", 2)]]]
ARXIV = [(words(128), words(180, start=200), 0.5 + 1 + 0.5 * (1.7 - 180 / 128) / 0.4),  # 511 and 719 characters
    (words(128), words(128), 0.5 + (1 - 0.8) / 0.5 + 0.5 + 0.6),
    (words(128) + " furthermore", words(180), 0.5 + 1 + 0.5 * (1.7 - 180 / 129) / 0.4 + 0.4 * 0.4 + 0.6),  # the first counts as well
    (words(200, 100, 1000), words(200, 100, 1500, 80), 2.0 + 0.6 * 20 / 180 / 0.23)]  # 20 of 180 are shared


def test_texts_by_hand():
    for task_reward, (first, second, reward) in [(tasks.tldr_reward, case) for case in TLDR] + [(tasks.arxiv_reward, case) for case in ARXIV]:
        assert task_reward(first, second) == pytest.approx(reward, abs=1e-9), (first, second)


@pytest.mark.parametrize("name, level, next_level, first, second, steps", [
    ("tldr", "coordination", "vocabulary", (20, 10, 100), (20, 20, None),
     {109: None, 110: 0, 135: 0.5, 160: 1, 320: 1, 410: 0.5, 500: 0, 501: None}),
    ("arxiv", "coordination", "vocabulary", (200, 100, 1000), (190, 100, None),
     {799: None, 800: 0, 1050: 0.5, 1300: 1, 1600: 1, 1800: 0.5, 2000: 0, 2001: None}),
    ("tldr", "vocabulary", "style", (20, 10, 100), (30, None, 200), {12: None, 13: 0, 14: 0.5 / 7, 20: 0.5, 30: 0.5}),
    ("arxiv", "vocabulary", "style", (200, 100, 1000), (200, None, 1500),
     {49: None, 50: 0, 60: 0.25, 70: 0.5, 130: 0.5, 150: 0.25, 170: 0, 171: None}),
    ("tldr", "structure", "style", (64, 64, 1000), (None, 5, 2000), {7: None, 257: None}),
    ("arxiv", "structure", "style", (200, 100, 1000), (None, 99, 1300), {127: None, 128: 0.5, 256: 0.5, 257: None})])
def test_levels_at_every_bound(name, level, next_level, first, second, steps):
    """{words, distinct words or characters of the second text: points}; None: the level fails, so the next earns nothing."""
    for number, earned in steps.items():
        texts = [words(*first), words(*[number if size is None else size for size in second])]
        parts = get_task(name).judge({}, texts, 0).parts
        assert parts[level] == pytest.approx(earned or 0, abs=1e-9) and (parts[next_level] > 0) == (earned is not None), number
        if level == "structure":  # the bounds hold for the first text, too
            assert (get_task(name).judge({}, texts[::-1], 0).reward > 0) == (earned is not None)


@pytest.mark.parametrize("name", ["tldr", "arxiv"])
def test_one_agent_writes_both_texts(name):
    alone, team, texts = get_task(name, num_agents=1), get_task(name), ["word " * 150, "other " * 160]
    one = alone.judge({}, [f"{texts[0]}\n=====\n{texts[1]}"], 0)
    assert one.parts == team.judge({}, [text.strip() for text in texts], 0).parts and one.reward > 0.5
    assert alone.judge({}, ["no line between them"], 0).reward == 0 and alone.settings()["max_new_tokens"] == 2 * team.max_new_tokens


@pytest.mark.parametrize("name", list(tasks.TASKS))
def test_a_real_model_is_told_all_and_an_agent_alone_gets_twice_the_tokens(name):
    tiny, real, alone = get_task(name), get_task(name, model="x"), get_task(name, num_agents=1, model="x")
    assert alone.settings()["max_new_tokens"] == 2 * real.settings()["max_new_tokens"] >= 512
    item, rng = real.train_items[0], random.Random(0)
    told = [task.judge(item, [task.expert(item, i, rng) for i in range(2)], 0).feedback[1] for task in (real, tiny)]
    assert ["a better one" in text for text in told] == [True, False]
    if name in ("tldr", "arxiv", "coophe", "strbuild"):  # a house is shown box by box
        assert len(real.observation(item, 1)) > len(tiny.observation(item, 1)) + 20


@pytest.mark.parametrize("name, size, done", [  # where strbuild's episodes end stands in a test of the sparse reward
    ("housebuild", 9, False), ("housebuild", 11, True),  # one of 18 cells costs 0.056; one of 22, 0.045
    ("tldr", 7, False), ("tldr", 9, True),               # so many words with transitions
    ("coophe", 4, False), ("coophe", 6, True)])          # one of 4 tests costs 0.25, one of 6 costs 0.167
def test_where_an_episode_ends(name, size, done):
    transitions = ["although", "meanwhile", "furthermore", "therefore", "for", "example", "in", "summary", "indeed"]
    item = {"layers": {0: ["P" * size] * 2}, "inventory": {"P": "planks"}, "spider_attacks": [], "prompt": "", "entry_point": "f",
            "test": "def check(candidate):\n" + "".join(f"    assert candidate({k}) == {max(1, k)}\n" for k in range(size))}
    answers = {"housebuild": [f"fill 0 0 0 {size - 1} 0 0 planks", f"fill 1 0 1 {size - 1} 0 1 planks"],
               "tldr": [" ".join("bcdfghjk") + " zzzzzzzzzzzzzzzzzzzzzz", " ".join([*"bcdfghjklmnpqrtv", *transitions[:size]])],
               "coophe": ["def aux(n):\n    return n", "def f(n):\n    return aux(n) + 0"]}
    outcome = get_task(name).judge(item, answers[name], 0)
    assert outcome.done is done and outcome.parts.get("pass_rate", (size - 1) / size) == (size - 1) / size


HOUSE = {"layers": {"5": ["A" * 16] * 16, "6": ["A" * 16] * 16}, "inventory": {"A": "planks"}}
NO_TESTS = ["x = 1", "def check(candidate):\n    assert True", "def check(candidate:", "def check(candidate):\n    for i in []:\n        pass"]


@pytest.mark.parametrize("name, record, message", [
    ("tldr", {"prompt": " "}, "prompt"), ("tldr", {"text": "a"}, "prompt"), ("arxiv", {"abstract_text": 3}, "abstract_text"),
    *[("housebuild", HOUSE | {"layers": layers}, "layer|'B'|4096") for layers in (  # not equally long, not consecutive, no rows, ...
        {"0": ["AA", "A"]}, {"0": ["A"], "1": ["AA"]}, {"0": ["A"], "2": ["A"]}, {"0": [["A"]]}, {"0": 5}, {"0": [], "1": ["A"]},
        {"0": [".."]}, {"0": ["A"], "00": ["A"]}, {"low": ["A"]}, {"0": ["A" * 4097]}, {"0": ["AB"]})],
    *[("housebuild", HOUSE | {"inventory": {"A": block}}, "inventory") for block in (5, "gold block", "")],
    *[("housebuild", HOUSE | {"spider_attacks": [attack]}, "spider_attacks") for attack in (10 ** 400, -1, True)],
    ("coophe", {"prompt": "def f(x):", "entry_point": "f(", "test": "assert candidate(1)"}, "name of a function"),
    *[("coophe", {"prompt": "def f(x):", "entry_point": "f", "test": test}, "assert") for test in NO_TESTS],
    ("coophe", {"prompt": "def f(x):", "entry_point": "f"}, "test")], ids=lambda value: str(value)[:40])
def test_a_record_that_is_no_item(name, record, message):
    with pytest.raises(ValueError, match=message):
        get_task(name).check(record)


def test_data_sets_of_the_hub(tmp_path, monkeypatch, capsys):
    """A local folder with a data set's name is read by the same call. Held-out rows are spread evenly and not trained on."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(ValueError, match="trl-lib/tldr .*--data"):  # the hub cannot be reached
        tasks.get_task("tldr", data="hub")
    def problems(*numbers):
        return [{"prompt": f"def f{n}(x):", "entry_point": f"f{n}", "test": "def check(candidate):\n    assert candidate(1)"}
                for n in range(*numbers)]
    for folder, split, rows in [("trl-lib/tldr", "train", [{"prompt": text, "other": 5} for text in ["0", "1", " ", "4", "x"]]),
            ("trl-lib/tldr", "test", [{"prompt": str(n), "other": 5} for n in range(400)]),
            ("OpenMLRL/CoopHumanEval", "test", problems(82)), ("openai/openai_humaneval", "test", problems(70, 234))]:
        Path(folder).mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(f"{folder}/{split}.parquet")
    task = tasks.get_task("coophe", data="hub")  # 12 problems are held out in one set and in the training part of the other
    train, held_out = ([int(item["entry_point"][1:]) for item in items] for items in (task.train_items, task.eval_items))
    assert held_out == [*range(16), *range(70, 102)] and train == [*range(16, 70), *range(102, 234)]
    monkeypatch.setattr(tasks.TLDR, "hub_sources", [("trl-lib/tldr", "train", "test")])  # not the first 1,000 rows only
    task = tasks.get_task("tldr", data="hub")
    assert [item["prompt"] for item in task.train_items] == ["1", "4", "x"] and "row 2 is left out" in capsys.readouterr().out
    assert [item["prompt"] for item in task.eval_items] == [str(n) for n in range(0, 384, 3)]


@pytest.mark.parametrize("name, script, num_agents", [
    ("tldr", "train_dc.py", 2), ("arxiv", "train_mc.py", 1), ("coophe", "train_cc.py", 2), ("housebuild", "train_dc.py", 1)])
def test_every_task_is_played(workplace, name, script, num_agents):
    """With strbuild's briefly trained base, which knows none of these tasks: a model's answers may be anything."""
    data, out = workplace.folder / f"{name}.jsonl", workplace.folder / f"play-{name}"
    data.write_text("".join(json.dumps(item | {"split": "eval" if k > 5 else "train"}) + "\n"
                            for k, item in enumerate(get_task(name).train_items[:8])))
    run = workplace.run(script, "--task", name, "--model", workplace.tiny, "--data", data, "--steps", 1, "--batch_size", 4,
                        "--max_new_tokens", 8, "--num_agents", num_agents, "--out_dir", out)
    assert run.code == 0, run.err
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 1] and 0 <= lines[-1]["eval/score"] <= 100
    assert lines[1]["joint_actions"] == 4 * get_task(name).num_turns


def test_the_task_that_the_readme_adds(tmp_path):
    """The README's class, pasted into tasks.py where the README says, can be trained."""
    block = re.search(r"```python\n(class .*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    name = re.match(r"class (\w+)\(Task\)", block)[1]
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    code, heading = (tmp_path / "tasks.py").read_text(), "# --- all tasks, and python tasks.py"
    block += f"\n\n{name}.base_steps = 30  # a worse base, sooner\n\n"
    (tmp_path / "tasks.py").write_text(code.replace(heading, block + heading).replace("TASKS = {", f'TASKS = {{"own": {name}, '))
    command = [sys.executable, "train_cc.py", "--task", "own", "--steps", "1", "--batch_size", "8"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert '"step": 1, ' in (tmp_path / "out/cc-own/log.jsonl").read_text().splitlines()[-1]
