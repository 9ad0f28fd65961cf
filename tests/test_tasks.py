"""Tasks: training and held-out items, what an agent may see, what answers are worth, and how bad files are reported."""
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minecraft_sim as sim
import tasks
from minecraft_sim import cells_by_letter
from tasks import Episode, Turn, get_task, history

ROOT = Path(__file__).resolve().parent.parent


def turn_of(task, item, responses, turn=0):
    """A Turn without the fields that only a language model can fill."""
    return Turn(None, None, None, responses, task.judge(item, responses, turn))


def strings(items):
    return [item["string"] for item in items]


# --- the worked example in the header of tasks.py ---------------------------------------------------------------------

def test_worked_example():
    task, item = get_task("strbuild"), {"string": "I"}
    for agent, blocks in enumerate(["oak_planks stone", "white_concrete obsidian"]):
        assert blocks in task.observation(item, agent) and task.observation(item, agent) in tasks.__doc__
    responses = ["/setblock 0 4 0 oak_planks\n/setblock 2 4 0 stone", "/setblock 1 4 0 obsidian\n/setblock 1 0 0 white_concrete"]
    assert all(line in tasks.__doc__ for response in responses for line in response.split("\n"))
    outcome = task.judge(item, responses, 0)
    assert outcome.reward == pytest.approx(2 * 4 / 13 - 2) and outcome.score == pytest.approx(100 * 4 / 13)
    assert {"4/13", "0.615", "-1.385", "30.8"} <= set(re.findall(r"-?\d+[./]\d+", tasks.__doc__))
    assert outcome.parts["adjacent_same_ratio"] == 0 and outcome.parts["missing_palettes"] == 0
    assert not outcome.done and len(outcome.feedback) == 2


# --- items ------------------------------------------------------------------------------------------------------------

def beginnings(task, items):
    """{how the first message about an item begins, the same for every agent: its string}."""
    return {os.path.commonprefix([task.observation(item, agent) for agent in range(task.num_agents)]): item["string"]
            for item in items}


def begins(conversation, texts):
    """Those of the texts with which the conversation's first message begins."""
    return [text for text in texts if conversation[0]["content"].startswith(text)]


def test_held_out_strings_are_in_no_training_item_and_no_demonstration():
    task = get_task("strbuild")
    train, held_out = set(strings(task.train_items)), set(strings(task.eval_items))
    assert not train & held_out and {"ICML", "CLIM"} <= held_out and len(held_out) >= 16 and len(train) >= 1000
    assert len(held_out) == len(task.eval_items), "a held-out string counts twice"
    assert {len(string) for string in train} == {1, 2, 3, 4} and set("ABCDEFGHIJKLMNOPQRSTUVWXYZ") <= train
    rng = random.Random(1)
    shown, short = beginnings(task, task.eval_items), beginnings(task, [i for i in task.train_items if len(i["string"]) < 3])
    assert len(shown) == len(held_out) and begins([{"content": task.observation({"string": "ICML"}, 1)}], shown)
    conversations = [task.demonstration(rng) for _ in range(2000)]
    assert not any(begins(conversation, shown) for conversation in conversations)
    spelled = [beginning.split(" with")[0].replace("Build", "Spell") + "." for beginning in shown]
    assert not any(begins(task.exercise(rng), spelled) for _ in range(1000))
    assert sum(bool(begins(conversation, short)) for conversation in conversations) > 300  # so the checks above could have failed


def test_items_are_the_same_every_time():
    one, two = get_task("strbuild"), get_task("strbuild", num_agents=1, num_turns=1, feedback="score")
    assert one.train_items == two.train_items and one.eval_items == two.eval_items


def test_demonstrations_are_sloppy_but_they_are_answers_of_the_task():
    """Their commands are accepted, use the given blocks only, and are mostly on the letters."""
    task, rng, accepted, rejected, scores = get_task("strbuild"), random.Random(2), 0, 0, []
    known = beginnings(task, [item for item in task.train_items if len(item["string"]) < 3])
    for _ in range(400):
        conversation = task.demonstration(rng)
        assert [message["role"] for message in conversation] == ["user", "assistant"] * 2
        for string in [known[text] for text in begins(conversation, known)]:
            answer, rows = re.sub(r" \d:[A-Z]\n|nothing\n", "", conversation[3]["content"]), sim.string_target(string)
            _, good, bad = sim.strbuild_world(rows, [answer], [sum(sim.PALETTES, [])])
            accepted, rejected = accepted + len(good[0]), rejected + len(bad[0])
            assert all(block in conversation[0]["content"] for *_, block in good[0])
            scores.append(sim.strbuild_score(rows, [answer], [sum(sim.PALETTES, [])])["iou"])
    assert accepted > 500 and rejected == 0 and 0.2 < sum(scores) / len(scores) < 0.7


def test_an_exercise_names_every_letter_and_a_heading_builds_nothing():
    task, rng = get_task("strbuild"), random.Random(4)
    for _ in range(50):
        shown, *rest = [message["content"] for message in task.exercise(rng)]
        labels = re.findall(r" \d:[A-Z]", shown)
        assert labels and rest[0] == rest[2] == "".join(f"{label}\n" for label in labels)
    headings = [line for _ in range(50) for line in task.demonstration(rng)[1]["content"].splitlines() if ":" in line]
    _, accepted, rejected = sim.strbuild_world(sim.string_target("ICML"), ["\n".join(headings)], [["stone"]])
    assert headings and not accepted[0] and len(rejected[0]) == len(headings)  # a heading builds nothing


def test_by_letter_by_hand():
    assert cells_by_letter([(7, 0, 0), (0, 3, 0), (0, 4, 0)]) == {0: [(0, 4, 0), (0, 3, 0)], 1: [(7, 0, 0)]}


@pytest.mark.parametrize("num_agents", [1, 2])
@pytest.mark.parametrize("world", ["rebuilt", "persistent"])
@pytest.mark.parametrize("feedback", ["position", "score", "perfect"])
def test_a_demonstration_reads_like_an_episode(num_agents, feedback, world):
    """Its first message reads like an observation, its third one like feedback from judge()."""
    task = get_task("strbuild", num_agents=num_agents, feedback=feedback, world=world)
    def form(text):  # the text with its numbers, strings and blocks taken out
        text = re.sub(r"(Build) .* (with) .*\.$", r"\1 S \2 B.", text)
        text = re.sub(r" \d+:[A-Z](?= )", "", text)
        return re.sub(r"-?\d+(\.\d+)?( -?\d+)*", "N", text).replace("none", "N")
    item = {"string": "I"}
    told = task.judge(item, ["/setblock 0 0 0 stone\n/setblock 0 1 0 stone"] * num_agents, 0).feedback
    rng = random.Random(3)
    demonstrations = [task.demonstration(rng) for _ in range(200)]
    assert {form(d[0]["content"]) for d in demonstrations} == {form(task.observation(item, 0))}
    assert form(told[0]) in {form(d[2]["content"]) for d in demonstrations}


# --- what an agent sees -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("feedback", ["position", "score", "perfect"])
def test_a_history_holds_nothing_of_the_other_agent(feedback):
    task, item = get_task("strbuild", feedback=feedback), {"string": "IC"}
    episode = Episode(item)
    # four answers that cannot be mistaken for anything else; agent 1 places stray blocks
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
        if t < 2:
            episode.turns.append(turn_of(task, item, answers[t], t))
    if feedback == "perfect":  # its own wrong cells, not the other's
        told = task.judge(item, answers[0], 0).feedback
        assert "1 1 0" in told[1] and "1 1 0" not in told[0]
        taken_back = task.judge(item, ["/setblock 1 1 0 stone\n/setblock 1 1 0 air", ""], 0).feedback
        assert taken_back == ["Turn 2 of 4. Your wrong cells: none."] * 2
    if feedback == "position":
        told = task.judge(item, answers[0], 0).feedback[0]
        assert all("%d %d %d" % cell in told for cell in sim.target_cells(sim.string_target("IC")))


def test_a_history_ends_with_what_this_agent_was_told():
    task, episode = get_task("strbuild", feedback="perfect"), Episode({"string": "I"})
    episode.turns.append(turn_of(task, episode.item, ["/setblock 1 1 0 stone\n/setblock 0 3 0 stone", "/setblock 3 3 0 obsidian"]))
    assert [history(task, episode, agent)[-1]["content"] for agent in range(2)] == [
        "Turn 2 of 4. Your wrong cells: 0 3 0 1 1 0.", "Turn 2 of 4. Your wrong cells: 3 3 0."]


def test_an_agents_history_is_the_same_whatever_the_other_one_writes():
    """With position feedback nothing of agent 1 reaches agent 0, not even through the reward."""
    task, item = get_task("strbuild"), {"string": "LI"}
    one, two = Episode(item), Episode(item)
    one.turns.append(turn_of(task, item, ["/setblock 0 0 0 stone", "nothing"]))
    two.turns.append(turn_of(task, item, ["/setblock 0 0 0 stone", "/setblock 0 1 0 obsidian"]))
    assert history(task, one, 0) == history(task, two, 0) and history(task, one, 1) != history(task, two, 1)


def test_a_dialogue_says_what_an_agent_was_told_before_it_answered():
    task, episode = get_task("strbuild", feedback="perfect"), Episode({"string": "I"})
    episode.turns += [turn_of(task, episode.item, ["/setblock 1 1 0 stone", " "], t) for t in range(2)]
    shown = [line[9:] for line in tasks.dialogue(task, episode, False).splitlines() if "agent" in line]
    built = ["agent 0 answers: /setblock 1 1 0 stone", "agent 1 answers: (nothing)"]
    assert shown == [f"agent 0 is told: {task.observation(episode.item, 0)}", built[0],
                     f"agent 1 is told: {task.observation(episode.item, 1)}", built[1],
                     "agent 0 is told: Turn 2 of 4. Your wrong cells: 1 1 0.", built[0],
                     "agent 1 is told: Turn 2 of 4. Your wrong cells: none.", built[1]]


# --- what an answer is worth ------------------------------------------------------------------------------------------

def test_a_perfect_team_is_done_and_a_silent_one_is_not():
    task = get_task("strbuild")
    for item in task.eval_items[:8]:
        outcome = task.judge(item, sim.scripted_builders(sim.string_target(item["string"])), 0)
        assert outcome.done and outcome.score == 100 and outcome.reward == pytest.approx(0)
    silent = task.judge({"string": "ICML"}, ["", "\0 ``` /setblock"], 3)
    assert not silent.done and silent.score == 0 and silent.reward == pytest.approx(-2.5)


def test_a_single_agent_owns_every_block():
    task = get_task("strbuild", num_agents=1)
    answer = "\n".join(sim.scripted_builders(sim.string_target("ICML")))
    outcome = task.judge({"string": "ICML"}, [answer], 0)
    assert outcome.reward == pytest.approx(0) and outcome.done and len(outcome.feedback) == 1


def test_the_feedback_says_which_turn_comes_next():
    task = get_task("strbuild", num_turns=3)
    told = [task.judge({"string": "I"}, ["", ""], turn).feedback[0] for turn in range(2)]
    assert "2 of 3" in told[0] and "3 of 3" in told[1]


# --- the persistent world and the sparse reward -----------------------------------------------------------------------

def halves(task, item):
    """The answers of two agents, turn by turn, of which each builds half of the turn's letter as a checkerboard."""
    for cells in cells_by_letter(sim.target_cells(sim.string_target(item["string"]))).values():
        middle = -(-len(cells) // 2)
        yield ["\n".join(f"/setblock {x} {y} {z} {palette[(x + y) % 2]}" for x, y, z in half)
               for palette, half in zip(task.palettes, (cells[:middle], cells[middle:]))]


def test_a_persistent_build_needs_every_turn():
    task = get_task("strbuild", world="persistent")
    for item in task.train_items + task.eval_items:
        assert len(item["string"]) == 4 and len(sim.target_cells(sim.string_target(item["string"]))) > 3 * 14
    item, world = {"string": "ICML"}, None
    for t, responses in enumerate(halves(task, item)):
        outcome = task.judge(item, responses, t, world)
        assert outcome.parts["accepted"] == [len(response.splitlines()) for response in responses]
        assert len(outcome.world) == len(world or {}) + sum(outcome.parts["accepted"]) and outcome.done == (t == 3)
        world = outcome.world
    assert outcome.score == 100
    rebuilt = get_task("strbuild")
    assert rebuilt.judge(item, responses, 3, world).score < 25  # by the official rules these answers build one letter only


def test_a_turn_in_the_persistent_world_has_room_for_a_few_commands():
    item, lines = {"string": "ICML"}, "\n".join(sim.scripted_builders(sim.string_target("ICML"))).splitlines()
    for num_agents, room in [(2, [7, 7]), (1, [14])]:
        task = get_task("strbuild", world="persistent", num_agents=num_agents)
        answers = ["\n".join(line for line in lines if line.split()[-1] in palette) for palette in task.palettes]
        assert task.judge(item, answers, 0).parts["accepted"] == room
        assert f"room for {room[0]} " in task.instructions(0)


def test_in_the_persistent_world_an_agent_sees_its_own_blocks():
    task, item = get_task("strbuild", world="persistent"), {"string": "IC"}
    first = task.judge(item, ["/setblock 0 4 0 stone\n/setblock 7 4 0 stone", "/setblock 1 4 0 obsidian"], 0)
    second = task.judge(item, ["/setblock 2 4 0 stone", "/setblock 0 4 0 obsidian"], 1, first.world)
    assert first.feedback == ["Turn 2 of 4. Your 2 blocks: 1:I 0 4 0 2:C 7 4 0.", "Turn 2 of 4. Your 1 blocks: 1:I 1 4 0."]
    assert second.feedback == ["Turn 3 of 4. Your 2 blocks: 1:I 2 4 0 2:C 7 4 0.",  # agent 1 built over one of them
                               "Turn 3 of 4. Your 2 blocks: 1:I 0 4 0 1 4 0."]


def test_a_sparse_reward_comes_with_the_last_turn_or_with_the_end():
    dense, sparse = get_task("strbuild", num_turns=3), get_task("strbuild", num_turns=3, reward="sparse")
    item, perfect = {"string": "I"}, sim.scripted_builders(sim.string_target("I"))
    outcomes = [sparse.judge(item, ["", ""], t) for t in range(3)]
    assert [outcome.reward for outcome in outcomes] == [0, 0, dense.judge(item, ["", ""], 2).reward]
    assert not any(outcome.done for outcome in outcomes)  # the 0 of an unpaid reward is not the 0 of a perfect build
    almost = perfect[0], perfect[1].rsplit("\n", 1)[0]  # one block is missing
    for answers in (perfect, almost):
        early = sparse.judge(item, answers, 0)
        assert early.done == (answers is perfect) and early.reward == (dense.judge(item, answers, 0).reward if early.done else 0)
    item, (first, second) = {"string": "IC"}, sim.scripted_builders(sim.string_target("IC"))
    early = sparse.judge(item, [first, second.rsplit("\n", 1)[0]], 0)  # 23 of 24 cells: good enough, not perfect
    assert early.done and early.reward == pytest.approx(-2 / 24)


# --- tldr and arxiv ---------------------------------------------------------------------------------------------------

def words(count, start=0):
    """So many different words of three letters, none of them a stopword or a transition: bbb, bbc, ..."""
    letters = "bcdfgjklm"
    return " ".join(letters[(start + k) // 81 % 9] + letters[(start + k) // 9 % 9] + letters[(start + k) % 9]
                    for k in range(count))


def test_trapezoid_by_hand():
    assert tasks.trapezoid(1.35, 1.1, 1.6, 3.2, 5.0) == pytest.approx(0.5) and tasks.trapezoid(1.1, 1.1, 1.6, 3.2, 5.0) == 0
    assert tasks.trapezoid(1.0, 1.1, 1.6, 3.2, 5.0) is None and tasks.trapezoid(4.1, 1.1, 1.6, 3.2, 5) == pytest.approx(0.5)


@pytest.mark.parametrize("first, second, reward", [
    (words(7), words(20), 0), (words(8), words(257), 0), ("", "", 0),   # too few words, too many
    (words(8), words(8), 0.5), (words(8), words(45), 0.5),              # ratio 1 < 1.1; 179 / 31 > 5
    (" ".join(["red"] * 8), " ".join(["blue"] * 20), 1.5),              # 31 and 99 characters; 1 distinct word each
    (words(10), words(20, 100), 2.0),                                   # 39 and 79: 1; 10 and 20 distinct: 0.5; no style
    (words(10), words(20, 0), 2.6),                                     # 10 of 20 are shared: overlap is full
    (words(10), words(20, 0) + " therefore", 2.6 + 0.4 * 0.4),          # one category
    (words(10), words(20, 0) + " however", 2.6 + 0.4 * 0.45),           # contrast and concession
    (words(10), words(20, 0) + " meanwhile", 2.6 + 0.4 * 0.55),         # sequence, time, contrast, concession
    (words(10) + " therefore", words(22, 0), 2.6),                      # in the first text it does not count
    (words(10), words(16, 0), 0.5 + 1 + 0.5 * 0.3 / 0.7 + 0.6),         # 39 and 63: 1; 1.6 times as many words
], ids=range(13))
def test_tldr_by_hand(first, second, reward):
    assert tasks.tldr_reward(first, second) == pytest.approx(reward, abs=1e-12)


@pytest.mark.parametrize("phrase, categories", [  # as the official lists have them, substrings included
    ("however", 2), ("although", 2), ("furthermore", 1), ("in addition", 1), ("therefore", 1), ("for example", 1),
    ("in summary", 2), ("meanwhile", 4), ("on the other hand", 1), ("as a result", 2)])
def test_every_published_phrase_counts_in_its_categories(phrase, categories):
    assert sum(any(p in phrase for p in phrases) for phrases in tasks.TRANSITIONS.values()) == categories
    assert tasks.tldr_reward(words(10), words(21, 0) + " " + phrase) == pytest.approx(
        0.5 + 1 + 0.5 + 0.4 * (0.4 + 0.05 * (categories - 1)) + 0.6)


def test_arxiv_by_hand():
    first = words(128)                                       # 511 characters
    assert tasks.arxiv_reward(words(127), words(128)) == 0
    assert tasks.arxiv_reward(first, words(180, 200)) == pytest.approx(0.5 + 1 + 0.5 * (1.7 - 180 / 128) / 0.4)
    assert tasks.arxiv_reward(first, first) == pytest.approx(0.5 + (1 - 0.8) / 0.5 + 0.5 + 0.6)
    assert tasks.arxiv_reward(first + " furthermore", words(180)) == pytest.approx(
        0.5 + 1 + 0.5 * (1.7 - 180 / 129) / 0.4 + 0.4 * 0.4 + 0.6)  # here the first text counts as well
    most = "however therefore for example in summary meanwhile furthermore on the other hand as a result"
    assert tasks.tldr_reward(words(8), words(16) + " " + most) <= 2.98


def made(count, distinct, length, start=0):
    """A text of so many words, distinct words and characters; its words are numbers from start on."""
    text = " ".join(str(100 + start + k % distinct) for k in range(count))
    assert len(text) <= length
    return text.ljust(length)


@pytest.mark.parametrize("name, first, second, steps", [
    ("tldr", (20, 10, 100), (20, 20), {109: None, 110: 0, 135: 0.5, 160: 1, 320: 1, 410: 0.5, 500: 0, 501: None}),
    ("arxiv", (200, 100, 1000), (190, 100), {799: None, 800: 0, 1050: 0.5, 1300: 1, 1600: 1, 1800: 0.5, 2000: 0, 2001: None})])
def test_lengths_at_every_bound(name, first, second, steps):
    """{characters of the second text: what coordination earns}; None: the level fails, so the next one earns nothing."""
    for length, earned in steps.items():
        levels = tasks.writing_levels(made(*first), made(*second, length), **tasks.TASKS[name].levels)
        assert levels["coordination"] == pytest.approx(earned or 0) and (levels["vocabulary"] > 0) == (earned is not None)


@pytest.mark.parametrize("name, first, second, steps", [
    ("tldr", (20, 10, 100), (30, 200), {12: None, 13: 0, 14: 0.5 / 7, 20: 0.5, 30: 0.5}),
    ("arxiv", (200, 100, 1000), (200, 1500), {49: None, 50: 0, 60: 0.25, 70: 0.5, 130: 0.5, 150: 0.25, 170: 0, 171: None})])
def test_distinct_words_at_every_bound(name, first, second, steps):
    for distinct, earned in steps.items():
        levels = tasks.writing_levels(made(*first), made(second[0], distinct, second[1]), **tasks.TASKS[name].levels)
        assert levels["vocabulary"] == pytest.approx(earned or 0) and (levels["style"] > 0) == (earned is not None)


def test_word_counts_overlap_and_texts_without_words():
    tldr, arxiv = tasks.TLDR_LEVELS, tasks.ARXIV_LEVELS
    for levels, counts in [(tldr, {7: 0, 8: 0.5, 256: 0.5, 257: 0}), (arxiv, {127: 0, 128: 0.5, 256: 0.5, 257: 0})]:
        for count, earned in counts.items():
            texts = made(count, 9, 1100), made(200, 9, 1100)
            assert [tasks.writing_levels(*pair, **levels)["structure"] for pair in (texts, texts[::-1])] == [earned] * 2
    few = tasks.writing_levels(made(20, 20, 100), made(40, 40, 200, start=19), **tldr)  # 1 of 59 words is shared
    assert few["style"] == pytest.approx(0.6 / 59 / 0.03)
    some = tasks.writing_levels(made(200, 100, 1000), made(200, 100, 1500, start=80), **arxiv)  # 20 of 180
    assert some["style"] == pytest.approx(0.6 * 20 / 180 / 0.23)
    assert tasks.tldr_reward("- " * 8, "word " * 6 + "- " * 2) == pytest.approx(1.5)  # no word in the first
    stop = "the and of to in on at by", "the and of to in on at by if or from with under down up out"
    assert tasks.tldr_reward(*stop) == pytest.approx(0.5 + 1 + 0.5 + 0.6)  # no content words in either: they agree
    assert tasks.tldr_reward(stop[0] + " dog", stop[1] + " sun moon") == pytest.approx(2.0)  # these do not
    loud = words(10), words(20).upper() + " HOWEVER, However!"  # case and punctuation do not matter
    assert tasks.tldr_reward(*loud) == pytest.approx(0.5 + 1 + 0.5 + 0.4 * 0.45 + 0.6)


# --- a user's own file, and invalid options ---------------------------------------------------------------------------

def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "words.jsonl"
    path.write_text('{"string": "cat"}\n\n{"string": "DOG", "split": "train", "note": 1}\n{"string": "Cow", "split": "eval"}\n')
    task = get_task("strbuild", data=str(path))
    assert strings(task.train_items) == ["CAT", "DOG"] and strings(task.eval_items) == ["COW"]
    path.write_text('{"string": "ICML"}\n')  # held out by default, but here the user trains on it
    task = get_task("strbuild", data=str(path))
    assert strings(task.train_items) == ["ICML"]
    assert "ICML" not in strings(task.eval_items) and "CLIM" in strings(task.eval_items)


@pytest.mark.parametrize("lines, message", [
    (['{"string": "CAT"}', '{"string": "DOG"'], "line 2"),                            # not JSON
    (['{"string": "CAT"}', '', '["DOG"]'], "line 3"),                                 # blank lines count
    (['{"text": "CAT"}'], "line 1"),
    (['{"string": 5}'], "line 1"),
    (['{"string": "CAT"}', '{"string": "D?G"}'], r"line 2.*'\?'"),                    # cannot be drawn
    (['{"string": ""}'], "line 1"),
    (['{"string": "CAT", "split": "test"}'], "line 1"),
    (['{"string": "CAT", "split": ["eval"]}'], "line 1"),
    (['{"string": "DOG"}', '{"string": "CAT", "splitt": "eval"}'], "line 2: it has a key \"splitt\"; did you mean \"split\"?"),
    (['{"string": "CAT", "Split": "eval"}'], "did you mean"),
    (['{"string": "CAT"}', '{"string": "cat", "split": "eval"}'], "CAT"),             # in both
    (['{"string": "CAT", "split": "eval"}'], "no training line"),
    ([''], "no training line"),
    (["[" * 100_000], "line 1"),
    (["9" * 5000], "line 1"),
])
def test_a_broken_file_is_named_with_its_line(tmp_path, lines, message):
    path = tmp_path / "words.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message) as error:
        get_task("strbuild", data=str(path))
    assert "words.jsonl" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "words.jsonl"
    if content:
        path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match="words.jsonl"):
        get_task("strbuild", data=str(path))


def test_other_items_are_other_settings(tmp_path):
    """Training items and held-out items: --resume with other ones is refused."""
    path, seen = tmp_path / "words.jsonl", set()
    for train, held_out in [("I", "IC"), ("L", "IC"), ("I", "LC")]:
        path.write_text(f'{{"string": "{train}"}}\n{{"string": "{held_out}", "split": "eval"}}\n')
        seen.add(get_task("strbuild", data=str(path)).settings()["items"])
    assert len(seen) == 3


def test_a_file_that_leaves_nothing_to_evaluate_on(tmp_path):
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in get_task("strbuild").eval_items))
    with pytest.raises(ValueError, match="no item to evaluate on"):
        get_task("strbuild", data=str(path))


@pytest.mark.parametrize("name, options, message", [
    ("chess", {}, "chess.*strbuild"), ("strbuild", {"num_turns": 0}, "num_turns"), ("strbuild", {"num_turns": -1}, "num_turns"),
    ("strbuild", {"num_agents": 3}, "3"), ("strbuild", {"num_agents": 0}, "0"), ("strbuild", {"feedback": "praise"}, "praise"),
    ("strbuild", {"data": "hub"}, "hub"),
])
def test_options_that_make_no_sense(name, options, message):
    with pytest.raises(ValueError, match=message):
        get_task(name, **options)


def test_the_script_shows_an_item(tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, "tasks.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    shown = run("--task", "strbuild", "--seed", "3")
    assert shown.returncode == 0 and "training reward" in shown.stdout and "/setblock" in shown.stdout
    assert run("--task", "strbuild", "--seed", "3").stdout == shown.stdout != run("--seed", "4").stdout
    assert "agent 1" in shown.stdout and "agent 1" not in run("--num_agents", "1").stdout
    for name in set(tasks.TASKS) - {"strbuild"}:
        shown = run("--task", name, "--svg", str(tmp_path / f"{name}.svg"))
        assert ("training reward" in shown.stdout and "agent 1" in shown.stdout) == (name == "housebuild"), shown.stderr
        assert name == "housebuild" or shown.returncode == 2 and "no picture" in shown.stderr
        assert name == "housebuild" or "training reward" in run("--task", name).stdout
    assert (tmp_path / "housebuild.svg").read_text().startswith("<svg")
    folder = tmp_path / "a folder"
    folder.mkdir()
    refused = run("--svg", str(folder))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and len(list(tmp_path.iterdir())) == 2
    wrong = run("--task", "chess")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "chess" in wrong.stderr and not wrong.stdout
    reader, writer = os.pipe()
    os.close(reader)  # as of `| head`, when it has read enough
    with os.fdopen(writer) as closed:
        for script in ("tasks.py", "minecraft_sim.py"):
            assert not subprocess.run([sys.executable, script], cwd=ROOT, stdout=closed, stderr=subprocess.PIPE).stderr


# --- the docstrings' examples, and what a user's own task may rely on -------------------------------------------------

def test_examples_of_docstrings():
    assert tasks.StrBuild.letters_text("ICML") == " 1:I 2:C 3:M 4:L"
    assert tasks.StrBuild.cells_text("IC", [(8, 4, 0), (9, 4, 0)]) == " 2:C 8 4 0 9 4 0"
    turns = [[Turn(None, [[1]], None, [""], tasks.Outcome(reward, 0, {}, False, [], None)) for reward in rewards]
             for rewards in ([-1, -2], [-1])]
    line = tasks.summary([Episode({}, played) for played in turns], "train", 0.5, [1])
    assert [line[f"train/{name}"] for name in ("return", "reward", "turns")] == pytest.approx([-1.5, -4 / 3, 1.5])
    played = [Turn(None, None, None, None, tasks.Outcome(reward, 0, {}, False, [], None)) for reward in (1, 2, 4)]
    assert Episode({}, played).returns(0.5) == [3, 4, 4]
    item = {"prompt": "def f(n):\n", "entry_point": "f",
            "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 7\n"}
    verdict = tasks.coophe_reward(item, "def aux(n): return n * n", "def f(n): return aux(n) + 1")
    assert (verdict["reward"], verdict["passed"]) == (3.5, 1)
    source, node, error, returns, _ = tasks.find_function("Sure!\ndef aux(n):\n    return n +", "aux")
    assert (source, node, returns) == ("def aux(n):\n    return n +", None, True) and error


def test_what_the_log_says_of_scores_and_answers():
    """The score and the parts are the last turn's; an answer is truncated when its own agent's end token is missing."""
    def turn(score, *tokens):
        return Turn(None, list(tokens), None, ["", ""], tasks.Outcome(0, score, {"iou": score / 100, "reward": 9, "accepted": [1, 2]},
                                                                      False, [], None))
    episodes = [Episode({}, [turn(10, [5, 1], [5, 2]), turn(30, [1], [7, 7, 1])]), Episode({}, [turn(50, [2], [2])])]
    line = tasks.summary(episodes, "eval", 1, [1, 2])
    assert line == {"eval/return": 0, "eval/reward": 0, "eval/score": 40, "eval/turns": 1.5, "eval/response_tokens": 10 / 6,
                    "eval/truncated": 2 / 6, "eval/iou": 0.4}
    assert line.keys() - {"eval/iou"} == {name.replace("train", "eval") for name in tasks.summary(episodes, "train", 1, [1, 2])}


def test_minibatches_are_shuffled_groups():
    episodes = list(range(10))  # five groups of two: 2k and 2k + 1
    parts = [tasks.minibatches(episodes, 2, 2, random.Random(seed)) for seed in range(8)]
    for part in parts:
        assert [len(batch) for batch in part] == [6, 4] and sorted(sum(part, [])) == episodes
        assert all(two == one + 1 and one % 2 == 0 for batch in part for one, two in zip(batch[::2], batch[1::2]))
    assert len({str(part) for part in parts}) > 4 and len(tasks.minibatches(episodes, 2, 9, random.Random(0))) == 5


class Count(tasks.Task):
    """Agent i of three says the number i."""
    agents = (1, 2, 3)

    def random_item(self, rng):
        return {"number": rng.randrange(50)}

    def key(self, item):
        return str(item["number"])

    def observation(self, item, agent):
        return f"agent {agent}"

    def judge(self, item, responses, turn, world=None):
        return self.outcome(0.0, 0.0, {}, turn, False)

    def expert(self, item, agent, rng):
        return str(agent)


def test_demonstrations_show_every_agent_of_a_larger_team():
    rng, task = random.Random(0), Count(num_agents=3)
    assert {task.demonstration(rng)[0]["content"] for _ in range(100)} == {"agent 0", "agent 1", "agent 2"}


def test_a_task_without_check_refuses_a_file(tmp_path):
    (tmp_path / "items.jsonl").write_text('{"number": 1}\n')
    with pytest.raises(ValueError, match="count reads no items"):
        Count(data=str(tmp_path / "items.jsonl"))


@pytest.mark.parametrize("parts, reward, message", [
    ({"a": float("nan")}, 0.5, "task count: a is nan at turn 0"), ({"a": "1"}, 0.5, "a is '1'"), ({"a": 1}, float("inf"), "reward is inf"),
    ({"a": 1}, None, "reward is None"), ({"b": 1}, 0.5, r"parts are \['b'\] at turn 0 and were \['a'\]"), ({}, 0.5, "parts are")])
def test_what_a_judge_must_not_say(parts, reward, message):
    """Such numbers would train on silently, or break the log at the end of an evaluation."""
    task = Count()
    assert task.outcome(0.5, 50, {"a": 1, "counts": [1, 2]}, 0, False).parts == {"a": 1, "counts": [1, 2]}
    with pytest.raises(tasks.InputError, match=message) as error:
        task.outcome(reward, 50, parts, 0, False)
    assert "\n" not in str(error.value)


def test_a_persons_house_may_be_of_any_blocks(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"layers": {"0": ["GG"]}, "inventory": {"G": "minecraft:gold_block"}}')
    task = get_task("housebuild", data=str(tmp_path / "own.jsonl"))
    item = task.train_items[0]
    assert "You have 1 gold_block. The house:\n 1: 0 0 0 0 0 0 gold_block\n" in task.observation(item, 0)
    assert task.judge(item, ["fill 0 0 0 0 0 0 gold_block", "fill 1 0 0 1 0 0 gold_block"], 0).score == 100


def test_a_string_of_a_file_may_not_be_endless():
    task = get_task("strbuild")
    assert task.check({"string": "m" * 64}) == {"string": "M" * 64}
    with pytest.raises(tasks.InputError, match="at most 64"):
        task.check({"string": "M" * 65})
