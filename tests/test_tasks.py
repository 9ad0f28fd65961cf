"""What tasks share, and strbuild: items, what an agent may see, what answers are worth, and how bad files are reported."""
import json
import random
import re
import subprocess
import sys

import pytest

import minecraft_sim as sim
import tasks
from critic import summary
from model import training_checksum
from tasks import Episode, Outcome, Turn, get_task, history

ICML, CAT = {"string": "ICML"}, b'{"string": "CAT"}'


def cells(text):
    """The cells that a text names."""
    return [tuple(map(int, cell.split())) for cell in re.findall(r"\d+ \d+ \d+", text)]


def letters(text):
    """The string whose numbered letters a text names."""
    return "".join(re.findall(r"\d:([A-Z])", text))


def test_the_worked_example_of_the_header():
    task, item = get_task("strbuild"), {"string": "I"}
    assert all(task.observation(item, agent) in tasks.__doc__ for agent in range(2))
    responses = ["/setblock 0 4 0 oak_planks\n/setblock 2 4 0 stone", "/setblock 1 4 0 obsidian\n/setblock 1 0 0 white_concrete"]
    assert all(line in tasks.__doc__ for response in responses for line in response.split("\n"))
    outcome = task.judge(item, responses, 0)
    assert (outcome.reward, outcome.score) == (pytest.approx(2 * 4 / 13 - 2), pytest.approx(100 * 4 / 13)) and not outcome.done
    assert {"4/13", "0.615", "-1.385", "30.8"} <= set(re.findall(r"-?\d+[./]\d+", tasks.__doc__))


def test_what_the_log_says_of_scores_and_answers():
    """The score and the parts are the last turn's; an answer is truncated when its own agent's end token is missing."""
    def turn(reward, score, *tokens):
        parts = {"iou": score / 100, "reward": 9, "accepted": [1, 2]}
        return Turn(None, list(tokens), None, ["", ""], Outcome(reward, score, parts, False, [], None))
    episodes = [Episode({}, [turn(-1, 10, [5, 1], [5, 2]), turn(-2, 30, [1], [7, 7, 1])]), Episode({}, [turn(-1, 50, [2], [2])])]
    assert Episode({}, [turn(reward, 0, [1], [2]) for reward in (1, 2, 4)]).returns(0.5) == [3, 4, 4]
    assert (line := summary(episodes, "eval", 0.5, [{1, 7}, {2}])) == {
        "eval/return": -1.5, "eval/reward": pytest.approx(-4 / 3), "eval/score": 40, "eval/turns": 1.5,
        "eval/response_tokens": 10 / 6, "eval/truncated": 2 / 6, "eval/iou": 0.4}
    assert line.keys() - {"eval/iou"} == {name.replace("train", "eval") for name in summary(episodes, "train", 1, [{1}, {2}])}


def test_minibatches_are_shuffled_groups():
    episodes = list(range(10))  # five groups of two: 2k and 2k + 1
    parts = [tasks.minibatches(episodes, 2, 2, random.Random(seed)) for seed in range(8)]
    for part in parts:
        assert [len(batch) for batch in part] == [6, 4] and sorted(sum(part, [])) == episodes
        assert all(two == one + 1 and one % 2 == 0 for batch in part for one, two in zip(batch[::2], batch[1::2]))
    assert len({str(part) for part in parts}) > 4


def test_held_out_strings_are_in_no_training_item_and_no_demonstration():
    task, rng = get_task("strbuild"), random.Random(1)
    train, held_out = ({item["string"] for item in items} for items in (task.train_items, task.eval_items))
    assert not train & held_out and {"ICML", "CLIM"} <= held_out and len(train) >= 1000
    assert len(held_out) == len(task.eval_items) >= 16, "a held-out string counts twice"
    assert {len(string) for string in train} == {1, 2, 3, 4} and set("ABCDEFGHIJKLMNOPQRSTUVWXYZ") <= train
    for conversation in task.demonstration, task.exercise:
        shown = {letters(conversation(rng)[0]["content"]) for _ in range(1500)}
        assert not shown & held_out and len(shown & train) > 100 and set("ABCDEFGHIJKLMNOPQRSTUVWXYZ") <= shown


def test_demonstrations_are_sloppy_but_they_are_answers_of_the_task():
    """Their commands are accepted, use the given blocks only, and are mostly on the letters; headings build nothing."""
    task, rng, rejected, scores = get_task("strbuild"), random.Random(2), [], []
    for _ in range(200):
        asked, _, _, answer = [message["content"] for message in task.demonstration(rng)]
        rows, team = sim.string_target(letters(asked)), [sum(sim.PALETTES, [])]
        _, accepted, bad = sim.strbuild_world(rows, [answer], team)
        assert all(part in asked for part in [*re.findall(r" \d:[A-Z]", answer), *(block for *_, block in accepted[0])])
        rejected += [line for line, _ in bad[0]]
        scores.append(sim.strbuild_score(rows, [answer], team)["iou"])
        spell, first, _, second = [message["content"] for message in task.exercise(rng)]
        assert letters(spell) == letters(first) == letters(second)
    assert 0.2 < sum(scores) / len(scores) < 0.7
    assert {re.sub(r"\d:[A-Z]", "N:L", line) for line in rejected} == {"N:L", "nothing"}


def test_a_team_of_two_good_habits_earns_the_best_reward():
    """In a team each expert builds one color of the checkerboard, alone all cells: the best answers earn all 2 points."""
    item, rng, rewards = {"string": "CAT"}, random.Random(4), {1: set(), 2: set()}
    for num_agents in (1, 2):
        task = get_task("strbuild", num_agents=num_agents)
        for _ in range(200):
            answers = [task.expert(item, agent, rng) for agent in range(num_agents)]
            rewards[num_agents].add(round(task.judge(item, answers, 0).reward, 6))
            assert all(len({(x + y) % 2 for x, y, z in cells(answer)}) <= 1 for answer in answers) or num_agents == 1
    assert max(rewards[1]) == max(rewards[2]) == 0 and len(rewards[2]) > 20


def test_overlap_is_what_two_agents_build_both():
    builds = "/setblock 0 4 0 stone\n/setblock 1 4 0 stone\n/setblock 0 3 0 stone", "/setblock 0 4 0 obsidian\n/setblock 1 4 0 air"
    assert get_task("strbuild").judge({"string": "I"}, builds, 0).parts["overlap"] == pytest.approx(1 / 13)
    house = {"layers": {"0": ["PPP"]}, "inventory": {"P": "planks"}, "spider_attacks": []}
    house = get_task("housebuild").check(house)
    fills = "fill 0 0 0 1 0 0 planks\nkill", "fill 1 0 0 2 0 0 planks\nfill 1 0 0 1 0 0 planks\nkill"
    assert get_task("housebuild").judge(house, fills, 0).parts["overlap"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("world", ["rebuilt", "persistent"])
@pytest.mark.parametrize("feedback", ["position", "score", "perfect"])
def test_a_demonstration_reads_like_an_episode(feedback, world):
    """Its first message reads like an observation, its third one like feedback from judge()."""
    def form(text):  # the text with its numbers, strings and blocks taken out
        text = re.sub(r"(Build) .* (with) .*\.$", r"\1 S \2 B.", text)
        text = re.sub(r" \d+:[A-Z](?= )", "", text)
        return re.sub(r"-?\d+(\.\d+)?( -?\d+)*", "N", text).replace("none", "N")
    for num_agents in (1, 2):
        task, rng = get_task("strbuild", num_agents=num_agents, feedback=feedback, world=world), random.Random(3)
        told = task.judge({"string": "I"}, ["/setblock 0 0 0 stone\n/setblock 0 1 0 stone"] * num_agents, 0).feedback
        demonstrations = [task.demonstration(rng) for _ in range(100)]
        assert {form(d[0]["content"]) for d in demonstrations} == {form(task.observation({"string": "I"}, 0))}
        assert form(told[0]) in {form(d[2]["content"]) for d in demonstrations}


@pytest.mark.parametrize("feedback", ["position", "score", "perfect"])
def test_a_history_holds_nothing_of_the_other_agent(feedback):
    task, item = get_task("strbuild", feedback=feedback), {"string": "IC"}
    episode = Episode(item)
    answers = [["/setblock 0 4 0 oak_planks #ONE", "/setblock 1 1 0 obsidian #TWO"],
               ["/setblock 4 4 0 stone #THREE", "/setblock 3 3 0 white_concrete #FOUR"]]
    for t in range(3):
        seen = [json.dumps(history(task, episode, agent)) for agent in range(2)]
        for agent in range(2):
            assert all(block in seen[agent] for block in task.palettes[agent])
            assert not any(block in seen[agent] for block in task.palettes[1 - agent])
            assert len(history(task, episode, agent)) == (4 if t else 2)
            for earlier in range(t):  # only the agent's own answers, and of these only the last
                word = answers[earlier][agent].split("#")[1]
                assert (word in seen[agent]) == (earlier == t - 1)
                assert answers[earlier][1 - agent].split("#")[1] not in seen[agent]
            if t:
                assert history(task, episode, agent)[-1]["content"] == episode.turns[-1].outcome.feedback[agent]
        if t < 2:
            episode.turns.append(Turn(None, None, None, answers[t], task.judge(item, answers[t], t)))
    silent = [answers[1][0], "nothing"]  # with position feedback nothing of agent 1 reaches agent 0, not even by the reward
    other = Episode(item, [episode.turns[0], Turn(None, None, None, silent, task.judge(item, silent, 1))])
    assert (history(task, other, 0) == history(task, episode, 0)) == (feedback != "score")


def test_what_each_feedback_names():
    def told(feedback, *answers, turn=0):
        return get_task("strbuild", feedback=feedback).judge({"string": "IC"}, list(answers), turn).feedback
    answers = "/setblock 1 1 0 stone\n/setblock 0 3 0 stone\n/setblock 0 4 0 stone", "/setblock 3 3 0 obsidian"
    in_order = [(x, y, z) for k, letter in enumerate("IC") for color in range(2) for x, y, z in sim.target_cells(
        sim.string_target("IC")) if x // 7 == k and (x + y) % 2 == color]
    assert [cells(text) for text in told("position", *answers)] == [in_order] * 2  # by letter and color
    assert [cells(text) for text in told("perfect", *answers)] == [[(0, 3, 0), (1, 1, 0)], [(3, 3, 0)]]  # its own wrong ones
    taken_back = told("perfect", "/setblock 1 1 0 stone\n/setblock 1 1 0 air", "")
    assert [cells(text) for text in taken_back] == [[], []]
    assert all("1:I 0 4 0" in text and "2:C 8 4 0" in text for text in told("position", "", ""))  # by letter
    assert all(f"{turn} of 4" in told("score", "", "", turn=turn - 2)[0] for turn in (2, 3, 4))  # the next turn


def test_when_an_episode_ends_and_where_a_sparse_reward_comes():
    task, alone = get_task("strbuild"), get_task("strbuild", num_agents=1)
    for item in task.eval_items[:8]:
        answers = sim.scripted_builders(sim.string_target(item["string"]))
        for outcome in task.judge(item, answers, 0), alone.judge(item, ["\n".join(answers)], 0):  # a single agent owns every block
            assert outcome.done and outcome.score == 100 and outcome.reward == pytest.approx(0)
    silent = task.judge(ICML, ["", "\0 ``` /setblock"], 3)
    assert not silent.done and silent.score == 0 and silent.reward == pytest.approx(-2.5)
    dense, sparse = get_task("strbuild", num_turns=3), get_task("strbuild", num_turns=3, reward="sparse")
    item, (first, second) = {"string": "I"}, sim.scripted_builders(sim.string_target("I"))
    nothing = [sparse.judge(item, ["", ""], t) for t in range(3)]
    assert [outcome.reward for outcome in nothing] == [0, 0, dense.judge(item, ["", ""], 2).reward]
    almost = sparse.judge(item, [first, second.rsplit("\n", 1)[0]], 0)  # one block of 13 is missing
    assert not any(outcome.done for outcome in [*nothing, almost]) and almost.reward == 0  # not the 0 of a perfect build
    first, second = sim.scripted_builders(sim.string_target("IC"))
    early = sparse.judge({"string": "IC"}, [first, second.rsplit("\n", 1)[0]], 0)  # 23 of 24: good enough, not perfect
    assert early.done and early.reward == pytest.approx(-2 / 24)


def test_a_persistent_world():
    """Agents build the halves of one letter a turn, each as a checkerboard; a turn has no room for more."""
    for turns in (2, 4, 8):  # a letter a turn, and more cells than the room of all turns but one
        task = get_task("strbuild", world="persistent", num_turns=turns)
        for item in task.train_items + task.eval_items:
            assert len(item["string"]) == turns and len(sim.target_cells(sim.string_target(item["string"]))) > 14 * (turns - 1)
        assert training_checksum(task) == training_checksum(get_task("strbuild", world="persistent"))  # one base for all
    for turns in (1, 9):
        with pytest.raises(ValueError, match="2 to 8 turns"):
            get_task("strbuild", world="persistent", num_turns=turns)
    task, world = get_task("strbuild", world="persistent"), None
    for t, letter in enumerate("ICML"):
        shape = [(x + 7 * t, y, z) for x, y, z in sim.target_cells(sim.LETTERS[letter])]
        middle = -(-len(shape) // 2)
        responses = ["\n".join(f"/setblock {x} {y} {z} {palette[(x + y) % 2]}" for x, y, z in half)
                     for palette, half in zip(task.palettes, (shape[:middle], shape[middle:]))]
        outcome = task.judge(ICML, responses, t, world)
        assert outcome.parts["accepted"] == [middle, len(shape) - middle] and outcome.done == (t == 3)
        assert len(outcome.world) == len(world or {}) + len(shape)
        world = outcome.world
    assert outcome.score == 100
    assert get_task("strbuild").judge(ICML, responses, 3, world).score < 25  # by the official rules the last letter only
    for num_agents, room in [(2, [7, 7]), (1, [14])]:
        task = get_task("strbuild", world="persistent", num_agents=num_agents)
        many = task.judge(ICML, [f"/setblock 0 0 0 {palette[0]}\n" * 99 for palette in task.palettes], 0)
        assert many.parts["accepted"] == room and f" {room[0]} " in task.instructions(0)
    task, item = get_task("strbuild", world="persistent"), {"string": "IC"}  # an agent sees its own blocks
    first = task.judge(item, ["/setblock 7 4 0 stone\n/setblock 0 4 0 stone", "/setblock 1 4 0 obsidian"], 0)
    second = task.judge(item, ["/setblock 2 4 0 stone", "/setblock 0 4 0 obsidian"], 1, first.world)
    assert [cells(text) for text in first.feedback] == [[(0, 4, 0), (7, 4, 0)], [(1, 4, 0)]]
    assert [cells(text) for text in second.feedback] == [[(2, 4, 0), (7, 4, 0)], [(0, 4, 0), (1, 4, 0)]]  # one was built over


def test_a_file_of_ones_own(tmp_path):
    path, sums = tmp_path / "words.jsonl", []
    def strings(*lines):
        path.write_text("\ufeff" + "\n".join(lines), newline="\r\n")  # as Windows editors save it
        task = get_task("strbuild", data=str(path))
        sums.append(task.checksum())
        return [[item["string"] for item in items] for items in (task.train_items, task.eval_items)]
    one, two, held_out = '{"string": "cat"}', '{"string": "DOG", "split": "train", "note": 1}', '{"string": "Cow", "split": "eval"}'
    assert strings(one, "", two, held_out) == [["CAT", "DOG"], ["COW"]]
    assert strings(one, held_out)[0] == ["CAT"] and strings('{"string": "%s"}' % ("m" * 64))[0] == ["M" * 64]
    assert strings(one, held_out.replace("Cow", "OX"))[1] == ["OX"]
    train, held_out = strings('{"string": "ICML"}')  # held out by default, but here the user trains on it
    assert train == ["ICML"] and "ICML" not in held_out and "CLIM" in held_out
    assert len(set(sums)) == 5  # other training or held-out items are other settings: --resume with them is refused
    with pytest.raises(ValueError, match="no item to evaluate on"):
        strings(*map(json.dumps, get_task("strbuild").eval_items))


@pytest.mark.parametrize("lines, message", [
    ([CAT, b'{"string": "DOG"'], "line 2"), ([CAT, b'', b'["DOG"]'], "line 3"),  # not JSON; blank lines count
    ([b'{"text": "CAT"}'], "line 1"), ([b'{"string": 5}'], "line 1"), ([b'{"string": ""}'], "line 1"),
    ([CAT, b'{"string": "D?G"}'], r"line 2.*'D\?G'"),                           # cannot be drawn
    ([b'{"string": "CAT", "split": "test"}'], "line 1"), ([b'{"string": "CAT", "split": ["eval"]}'], "line 1"),
    ([b'{"string": "%s"}' % (b"M" * 65)], "line 1.*at most 64"),                 # it would take seconds to judge
    ([CAT, b'{"string": "cat", "split": "eval"}'], "CAT"),                       # in both
    ([b'{"string": "CAT", "split": "eval"}'], "no item to train on"), ([b''], "no item to train on"),
    ([b"[" * 100_000], "line 1"), ([b"9" * 5000], "line 1"),
    ([rb'{"string": "\ud800"}'], "line 1"), ([CAT, b'{"string": "\xff"}'], "line 2.*UTF-8.*0xff")], ids=range(16))
def test_a_broken_file_is_named_with_its_line(tmp_path, lines, message):
    (path := tmp_path / "words.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=rf"words\.jsonl.*{message}") as error:
        get_task("strbuild", data=str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"num_agents": 3}, {"num_agents": 0}, {"feedback": "praise"}, {"data": "hub"}])
def test_options_that_make_no_sense(options):
    with pytest.raises(ValueError, match=str(*options.values())):
        get_task("strbuild", **options)


def test_the_script_shows_an_item():
    one, again, other = (subprocess.run([sys.executable, tasks.__file__, "--seed", seed], capture_output=True, text=True).stdout
                         for seed in "334")
    assert one == again != other and "training reward" in one and "/setblock" in one and "agent 1" in one


def test_numbers_that_a_judge_must_not_give():
    """They would train on silently, or break the log at the end of an evaluation."""
    task = get_task("strbuild")
    assert task.outcome(0.5, 50, {"a": 1, "counts": [1, 2]}, 0, False).parts == {"a": 1, "counts": [1, 2]}
    for reward, parts, message in [(0.5, {"a": float("nan")}, "task strbuild: a is nan at turn 3"), (0.5, {"a": "1"}, "a is"),
                                   (-float("inf"), {"a": 1}, "reward is -inf"), (None, {"a": 1}, "reward is None"),
                                   (0.5, {"b": 1}, r"parts are \['b'\] at turn 3 and were \['a'\]"), (0.5, {}, "parts are")]:
        with pytest.raises(tasks.InputError, match=message):
            task.outcome(reward, 50, parts, 3, False)


def test_what_agents_write_cannot_steer_a_terminal(monkeypatch):
    task, item = get_task("tldr"), {"prompt": "Post\x1b[2J"}
    answers = ["red\x1b]0;x\x07\nline two", "\r\x9b1m\u202eblue"]
    e = Episode(item, [Turn(None, None, None, answers, task.judge(item, answers, 0))])
    shown = tasks.dialogue(task, e, True)
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert "red\\x1b]0;x\\x07; line two" in shown and "Post\\x1b[2J" in shown
    plan = sim.wall_plan({"string": "I"})
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b" in sim.draw(plan, {}, True)
    for name, value in [("NO_COLOR", "1"), ("TERM", "dumb")]:
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert "\x1b" not in sim.draw(plan, {}, True)
