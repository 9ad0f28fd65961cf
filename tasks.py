"""
Tasks: what each agent observes, how a joint action is rewarded, and when an episode ends.

A task is one class; the rest of this repository uses only these attributes and methods of it:

    name                                what --task and tables call it
    train_items, eval_items             lists of dicts; no item is in both
    num_agents, num_turns               n agents, at most T turns
    instructions(agent)                 the rules, given once as the system message
    observation(item, agent)            o_i,0: the first user message that agent i gets
    judge(item, responses, turn, world) an Outcome: reward, score, parts (the same numeric keys at every judgement),
                                        whether the episode ends, feedback for each agent; world is the previous turn's
                                        Outcome.world, None at turn 0
    judge_all(items, answers, ...)      the same for many episodes at once
    expert(item, agent, rng)            one answer of a sloppy expert, who has many habits, good and bad
    demonstration(rng), exercise(rng)   one conversation with that expert, and one that practises what is hardest to
                                        learn from demonstrations; the tiny base is trained on both
    draw(item, world, color)            the world as text for a terminal; draw_svg(item, world) returns an SVG picture
    check(record)                       the item described by one line of --data FILE.jsonl, or ValueError
    settings()                          the train scripts' defaults for this task
    base, base_batch, base_steps        the name of its tiny base (runs with the same name share one), conversations
                                        per training step of that base, and the number of these steps
    pattern                             regular expression that splits text into words for the tiny base's tokenizer

The class Task implements most of them; a new task must define random_item, key, observation, judge and expert.

One worked example, strbuild with the string "I" at turn 0 of 4:

    agent 0 is shown   Build 1:I with oak_planks stone.  agent 1 is shown   Build 1:I with white_concrete obsidian.
    agent 0 answers    /setblock 0 4 0 oak_planks        agent 1 answers    /setblock 1 4 0 obsidian
                       /setblock 2 4 0 stone                                /setblock 1 0 0 white_concrete

I has 13 cells; 4 are filled and nothing else is: coverage = IoU = 4/13. The three blocks in the top row touch and
differ: adjacent_same_ratio = 0. Each agent used both of its blocks: missing_palettes = 0. reward = 2 x 4/13 = 0.615;
the training reward is reward - 2 = -1.385, score is 100 x IoU = 30.8, and since -1.385 is not above -0.1 there is a
next turn: each agent gets its own answer back and is told which cells belong to the string.

    python tasks.py --task strbuild     # an item, what each agent sees, two answers and the reward taken apart
"""
import argparse
import ast
import contextlib
import copy
import fcntl
import functools
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean as mean

from tqdm import tqdm

import minecraft_sim as sim

# --- episodes ---------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """The environment's reply to one joint action."""
    reward: float           # r_t, the training reward, the same for every agent
    score: float            # percent, as shown in tables
    parts: dict             # components of the reward and other measures: name -> number
    done: bool              # solved: the episode ends early
    feedback: list          # per agent: the message that it gets before its next answer
    world: object           # the state after this joint action; strbuild: {cell: block}


@dataclass
class Turn:
    """One joint action; lists have one entry per agent unless noted otherwise."""
    prompts: list           # token ids of the rendered history h_i,t
    tokens: list            # sampled token ids of a_i,t, including the end token unless the answer was truncated
    logps: list             # log pi of each of those tokens at sampling time
    responses: list         # a_i,t as text
    outcome: Outcome
    critic_inputs: list = field(default_factory=list)  # one entry per critic: token ids of the history it reads
    values: list = field(default_factory=list)   # one per critic: V(h_t) before it learns from this step, and the
    targets: list = field(default_factory=list)  # value target; both set in training
    advantages: list = field(default_factory=list)  # one per agent, normalised over the step; set in training


@dataclass
class Episode:
    """An item and the turns played on it so far."""
    item: dict
    turns: list = field(default_factory=list)

    @property
    def world(self):
        """The state after the last turn, None before the first."""
        return self.turns[-1].outcome.world if self.turns else None

    @property
    def rewards(self):
        """r_0, r_1, ... of the turns played so far."""
        return [turn.outcome.reward for turn in self.turns]

    def returns(self, gamma):
        """Discounted sum of the rewards from each turn on: rewards [1, 2, 4] and gamma 0.5 give [3, 4, 4]."""
        return [sum(gamma ** k * reward for k, reward in enumerate(self.rewards[t:])) for t in range(len(self.turns))]


def chat_messages(*texts):
    """Chat messages with these texts, from the user and the assistant in turn."""
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(["user", "assistant"]), texts)]


def history(task, episode, agent):
    """The messages of h_i,t: the rules and o_i,0, then the agent's own last answer and the feedback that it got.

    2 messages at turn 0, 4 later: as in the official code, only the last answer is kept. Nothing of another agent is
    included, so this is all that agent i needs in decentralised execution.
    """
    texts = [task.observation(episode.item, agent)]
    if episode.turns:
        last = episode.turns[-1]
        texts += [last.responses[agent], last.outcome.feedback[agent]]
    return [{"role": "system", "content": task.instructions(agent)}] + chat_messages(*texts)


def first_line(error):
    """The first line of an error's message."""
    return (str(error) or repr(error)).splitlines()[0]


class InputError(ValueError):
    """What a user got wrong, in one sentence. Any other ValueError is a bug, such as one in a new task's code."""


@contextlib.contextmanager
def exit_on_error():
    """A user's error in this block ends the script with one sentence and exit code 2; bugs keep their traceback."""
    try:
        yield
    except (InputError, OSError, FloatingPointError, ImportError) as error:
        package = f" (pip install {error.name})" if isinstance(error, ImportError) else ""
        tqdm.write(f"error: {error}{package}", file=sys.stderr)  # below a progress bar, not behind it
        sys.exit(2)


def minibatches(episodes, group_size, num_minibatches, rng):
    """Shuffle the groups of group_size episodes and split them into at most num_minibatches lists of episodes."""
    groups = [episodes[k:k + group_size] for k in range(0, len(episodes), group_size)]
    rng.shuffle(groups)
    size = -(-len(groups) // num_minibatches)  # rounded up
    return [sum(groups[k:k + size], []) for k in range(0, len(groups), size)]


def summary(episodes, prefix, gamma, ends):
    """Means over episodes, by log key; the return is discounted from the first turn on.

    ends: the tokens that end an answer of each agent's model, a set.

    Two episodes with rewards [-1, -2] and [-1] and gamma 0.5 have return -1.5, reward -4/3 and turns 1.5.
    """
    turns = [turn for e in episodes for turn in e.turns]
    answers = [tokens for turn in turns for tokens in turn.tokens]
    last = [e.turns[-1].outcome for e in episodes]
    numbers = {
        "return": mean(e.returns(gamma)[0] for e in episodes),
        "reward": mean(turn.outcome.reward for turn in turns), "score": mean(outcome.score for outcome in last),
        "turns": len(turns) / len(episodes), "response_tokens": mean(map(len, answers)),
        "truncated": mean(tokens[-1] not in end for turn in turns for tokens, end in zip(turn.tokens, ends))}
    if prefix == "eval":  # the components of the last turn's reward
        numbers |= {name: mean(outcome.parts[name] for outcome in last) for name, number in last[0].parts.items()
                    if not isinstance(number, list) and name not in numbers}
    return {f"{prefix}/{name}": number for name, number in numbers.items()}


def log_text(line, keys):
    """Entries of a log line for the terminal: {"train/score": 43.7, "x": [1, 0.5]} gives "score 43.7 | x [1 0.5]"."""
    def text(value):
        if isinstance(value, list):
            return f"[{' '.join(map(text, value))}]"
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    return " | ".join(f"{key.removeprefix('train/').removeprefix('eval/')} {text(line[key])}" for key in keys)


def printable(text):
    """Text whose control characters are spelled out, so that it cannot steer a terminal; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def dialogue(task, episode, color):
    """A whole episode as text, turn by turn: what each agent was told and answered, the world and the reward."""
    lines = []
    for t, turn in enumerate(episode.turns):
        for agent, response in enumerate(turn.responses):
            told = history(task, Episode(episode.item, episode.turns[:t]), agent)[-1]["content"]
            prompt, answer = printable(" ".join(told.split())), printable(response.strip() or "(nothing)").split("\n")
            suffix = f" ... {len(answer)} lines" if len(answer) > 4 else ""
            lines += [f"turn {t} | agent {agent} is told: {prompt if len(prompt) < 100 else prompt[:80] + ' ...'}",
                      f"       | agent {agent} answers: {'; '.join(answer[:4])}{suffix}"]
        lines += [task.draw(episode.item, turn.outcome.world, color),
                  f"       | reward {turn.outcome.reward:.3f}, score {turn.outcome.score:.1f}\n"]
    return "\n".join(lines)


# --- what tasks have in common ----------------------------------------------------------------------------------------


class Task:
    """What tasks share. Each adds random_item, key, observation, judge and expert, and check for --data FILE.jsonl."""
    turns, agents = 1, (1, 2)                         # T, the default of --num_turns; the possible numbers of agents
    feedback_modes, worlds = ["score"], ["rebuilt"]   # the first one is the default
    max_new_tokens, base_batch, base_steps, pattern = 128, 6, 1400, r" ?[\p{L}_']+|\d|\s+|[^\s\p{L}]"
    steps, batch_size, lr = 20, 16, 1e-3              # defaults of the train scripts
    fixed_items, drawn = [], 2000                     # built-in items: these, and so many random ones
    hub_sources = []                                  # real data: [(name, training split, held-out split)]

    def __init__(self, num_agents=2, num_turns=None, feedback=None, data="builtin", reward="dense", world="rebuilt"):
        self.name = self.base = type(self).__name__.lower()
        self.num_agents, self.num_turns, self.sparse = num_agents, num_turns or self.turns, reward == "sparse"
        self.feedback_mode, self.persistent = feedback or self.feedback_modes[0], world == "persistent"
        for kind, choice, choices in [("num_agents", num_agents, self.agents), ("world", world, self.worlds),
                                      ("feedback", self.feedback_mode, self.feedback_modes),
                                      ("reward", reward, ["dense", "sparse"])]:
            if choice not in choices:
                raise InputError(f"{self.name} has no {kind} {choice!r}; choose from {', '.join(map(str, choices))}.")
        self.setup()
        if data == "hub" and not self.hub_sources:
            raise InputError(f"{self.name} has no data set on the hub; use --data builtin or a file of your own.")
        self.train_items, self.eval_items = (
            read_hub(self.hub_sources, self.check) if data == "hub" else self.builtin_items())
        if data not in ("builtin", "hub"):
            self.train_items, held_out = read_jsonl(data, self.check)
            self.eval_items = held_out or [item for item in self.eval_items if item not in self.train_items]
        if not (self.train_items and self.eval_items):
            raise InputError(f"--data {data} leaves no item to {'evaluate' if self.train_items else 'train'} on.")

    def setup(self):
        """For a task to override: what it has to set before its items are made."""

    def settings(self):
        """The train scripts' defaults that depend on the task, and a checksum of its items for --resume."""
        defaults = {name: getattr(self, name) for name in ("num_turns", "max_new_tokens", "steps", "batch_size", "lr")}
        items = json.dumps([self.train_items, self.eval_items])
        return defaults | {"feedback": self.feedback_mode, "base": self.base, "items": zlib.crc32(items.encode())}

    def builtin_items(self):
        rng = random.Random(0)
        items = self.fixed_items + [self.random_item(rng) for _ in range(self.drawn)]
        items = list({json.dumps(item): item for item in items}.values())  # each of them once
        return [item for item in items if not self.is_held_out(item)], list(filter(self.is_held_out, items))[:128]

    def is_held_out(self, item):
        """Whether an item, one in ten, is kept out of training and demonstrations; key(item) alone decides."""
        return zlib.crc32(self.key(item).encode()) % 10 == 3

    def random_training_item(self, rng):
        """A random item that is not held out."""
        while self.is_held_out(item := self.random_item(rng)):
            pass
        return item

    def check(self, record):
        raise InputError(f"{self.name} reads no items from a file: it has no check(record).")

    def instructions(self, agent):
        return f"You are agent {agent + 1} of {self.num_agents}. You cannot talk to each other."

    def judge_all(self, items, answers, turn, worlds):
        """Outcomes of one joint action per item; overridden by tasks that judge many faster than one by one."""
        return [self.judge(item, responses, turn, world) for item, responses, world in zip(items, answers, worlds)]

    def outcome(self, reward, score, parts, turn, done, world=None, feedback=None):
        """An Outcome; default feedback: the dense reward. A sparse reward is 0 in all turns but the episode's last.

        parts must have the same numeric keys at every judgement, which evaluations average; lists are not logged.
        """
        numbers = {name: part for name, part in parts.items() if not isinstance(part, list)}
        for name, number in [("reward", reward), ("score", score), *numbers.items()]:
            if not (isinstance(number, (int, float)) and abs(number) < math.inf):
                raise InputError(f"task {self.name}: {name} is {number!r} at turn {turn}; it must be a finite number.")
        known = vars(self).setdefault("part_names", list(numbers))
        if set(numbers) != set(known):
            raise InputError(f"task {self.name}: parts are {list(numbers)} at turn {turn} and were {known} before.")
        feedback = feedback or [f"Turn {turn + 2}. The last answers were worth {reward:.1f}."] * self.num_agents
        reward = 0.0 if self.sparse and not done and turn + 1 < self.num_turns else reward
        return Outcome(reward, score, parts, done, feedback, world)

    def demonstration(self, rng):
        item, team = self.random_training_item(rng), copy.copy(self)
        team.num_agents = rng.choice([*self.agents, self.agents[-1]])  # one base serves all options
        team.feedback_mode = self.feedback_modes[0]
        agent, turn = rng.randrange(team.num_agents), rng.randrange(3)
        answers = [team.expert(item, i, rng) for i in range(team.num_agents)]
        texts = [team.observation(item, agent), answers[agent]]
        if self.turns > 1:
            texts += [team.demonstration_feedback(item, answers, turn, rng)[agent], team.expert(item, agent, rng)]
        return chat_messages(*texts)

    def demonstration_feedback(self, item, responses, turn, rng):
        """The feedback on a team's first answers in a demonstration."""
        return self.judge(item, responses, turn).feedback

    def exercise(self, rng):
        return self.demonstration(rng)

    def draw(self, item, world, color=False):
        return ""

    def draw_svg(self, item, world):
        raise InputError(f"{self.name} has no picture.")


# --- strbuild: write a string in blocks -------------------------------------------------------------------------------


class StrBuild(Task):
    """Two builders write a string in 5x5 letters, each with two blocks of its own; equal neighbours cost reward.

    Rules and reward: minecraft_sim.strbuild_score. The training reward is reward - 2; above -0.1 the episode ends.
    Built-in strings have 1 to 4 letters. ICML, CLIM (the paper's evaluation strings) and one in ten of the other
    strings of two or more letters are held out: never trained on, and in no demonstration.
    """
    # a cell is one token, and a block with the line break and the command after it is another: 2 tokens per command;
    # each letter and its number are separate tokens, so that unseen strings consist of seen tokens
    pattern = r" \d+ \d+ \d+| \d+:| \w+\n(?:/setblock)?|\n?/setblock|\n|[A-Z0-9]| ?[\p{L}_']+|\s+|[^\s\p{L}]"
    turns, feedback_modes, worlds = 4, ["position", "score", "perfect"], ["rebuilt", "persistent"]
    fixed_items, drawn = [{"string": "ICML"}, {"string": "CLIM"}], 6000
    base_steps, steps = 2000, 32
    max_commands, max_new_tokens = 300, 160  # the largest string has 64 cells of 2 tokens, and 3 more tokens per letter

    def setup(self):
        if self.persistent:  # three turns' commands fill no built-in string; conversations are shorter
            self.base, self.base_batch, self.base_steps = "strbuild-persistent", 14, 1400
            self.max_commands, self.max_new_tokens = 14, 40
        self.palettes = sim.PALETTES if self.num_agents == 2 else [sum(sim.PALETTES, [])]  # one agent has all of them

    def check(self, record):
        if not isinstance(record.get("string"), str):
            raise InputError('a line needs the key "string", as in {"string": "ICML"}')
        if len(record["string"]) > 64:
            raise InputError("a string has at most 64 letters")
        try:
            sim.string_target(record["string"])
        except ValueError as error:
            raise InputError(error) from None
        return {"string": record["string"].upper()}

    def random_item(self, rng):
        while True:
            string = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(
                4 if self.persistent else rng.choice([1, 2, 3, 3, 4, 4, 4, 4])))
            if not self.persistent or len(sim.target_cells(sim.string_target(string))) > 3 * self.max_commands:
                return {"string": string}

    def key(self, item):
        return item["string"]

    def is_held_out(self, item):
        return item in self.fixed_items or len(item["string"]) > 1 and super().is_held_out(item)

    def instructions(self, agent):
        stay = (f"Blocks stay from turn to turn; a turn has room for {self.max_commands // self.num_agents} of your "
                "lines. " if self.persistent else "")
        return (f"You are builder {agent + 1} of {self.num_agents}. Together you write a string in blocks on a wall, "
                "and you cannot talk to each other. Letters are 5 columns wide and 5 rows high with 2 empty columns "
                "between them; x runs from left to right from 0, y from 0 at the bottom to 4 at the top, z is 0. Fill "
                "the cells of the letters and no others. Touching blocks of the same kind cost points; every kind "
                f"must be used. {stay}Answer with lines of the form /setblock x y z block and nothing else; "
                f"your blocks: {' or '.join(self.palettes[agent])}.")

    def observation(self, item, agent):
        return f"Build{self.letters_text(item['string'])} with {' '.join(self.palettes[agent])}."

    @staticmethod
    def letters_text(string, end=""):
        """" 1:I 2:C 3:M 4:L" for "ICML": each letter with its number."""
        return "".join(f" {number}:{letter}{end}" for number, letter in enumerate(string, 1))

    def cells_by_letter(self, cells):
        """sim.cells_by_letter, but of each letter first the cells with even x + y, one color of a checkerboard."""
        return {index: group if self.persistent else sorted(group, key=lambda cell: (cell[0] + cell[1]) % 2)
                for index, group in sim.cells_by_letter(cells).items()}

    def cells_text(self, string, cells):
        """" 2:C 8 4 0 9 3 0" for two cells of the C in "IC"; a cell between two letters belongs to the left one."""
        return "".join(f" {index + 1}:{string[index]}" + "".join(" %d %d %d" % cell for cell in group)
                       for index, group in self.cells_by_letter(cells).items())

    def judge(self, item, responses, turn, world=None):
        rows, start = sim.string_target(item["string"]), world if world and self.persistent else {}
        parts = sim.strbuild_score(rows, responses, self.palettes, self.max_commands, start)
        world, accepted, _ = sim.strbuild_world(rows, responses, self.palettes, self.max_commands, start)
        parts["overlap"] = sim.overlap(sim.target_cells(rows), accepted)
        feedback = [f"Turn {turn + 2} of {self.num_turns}. {self.feedback_text(item, agent, world, parts['reward'])}"
                    for agent in range(self.num_agents)]
        reward = parts["reward"] - 2
        return self.outcome(reward, 100 * parts["iou"], parts, turn, reward > -0.1, world, feedback)

    def feedback_text(self, item, agent, world, reward):
        """What an agent is told about the world that was built; other agents' blocks are not revealed."""
        if self.feedback_mode == "score":
            return f"The last build was worth {reward:.2f} of 2."
        target = sim.target_cells(sim.string_target(item["string"]))
        own = [cell for cell, block in world.items() if block in self.palettes[agent]]
        if self.feedback_mode == "perfect":
            wrong = sorted(set(own) - set(target))
            return f"Your wrong cells:{''.join(' %d %d %d' % cell for cell in wrong) or ' none'}."
        if self.persistent:
            return f"Your {len(own)} blocks:{self.cells_text(item['string'], own)}."
        return f"The cells:{self.cells_text(item['string'], target)}. Fill about half, no equal neighbours."

    def draw(self, item, world, color=False):
        return sim.draw(sim.wall_plan(sim.string_target(item["string"])), world, color)

    def draw_svg(self, item, world):
        return sim.draw_svg(sim.wall_plan(sim.string_target(item["string"])), world, item["string"])

    # the sloppy expert: it knows the shapes of letters and has many habits, good and bad, from which RL selects

    letter_habits = {"none": 2, "all": 4, "first": 1, "last": 1}  # habit: its weight
    block_habits = {"one": 3, "checker": 6}
    letter_habits_persistent = {"none": 4, "turn": 2, "any": 4}  # no letter, turn t's, any
    block_habits_persistent = {"one": 3, "random": 4, "checker": 2}

    def demonstration(self, rng):
        """A conversation with two answers; the tiny base learns all of its messages but the first."""
        item, team = self.random_training_item(rng), copy.copy(self)
        team.num_turns = self.turns  # one base serves all options
        team.num_agents = rng.choice([2, 2, 1])  # alone in a third of all demonstrations
        team.setup()
        agent, team.feedback_mode = rng.randrange(team.num_agents), rng.choices(self.feedback_modes, [8, 1, 1])[0]
        num_judged = rng.randint(1, 3) if self.persistent else 1
        answers = [team.expert(item, agent, rng, turn) for turn in range(num_judged + 1)]
        first_turn, world = 0 if self.persistent else rng.randrange(3), None
        for turn, answer in enumerate(answers[:num_judged], first_turn):
            outcome = team.judge(item, [answer if i == agent else "" for i in range(team.num_agents)], turn, world)
            world = outcome.world
        return chat_messages(team.observation(item, agent), answers[-2], outcome.feedback[agent], answers[-1])

    def exercise(self, rng):
        """A conversation in which the string is only spelled, twice.

        What the base learns slowest is to look up in its prompt which letter has a given number, since only one token
        in some thirty needs that: without this exercise it knows all shapes long before it stops guessing letters.
        """
        string = self.random_training_item(rng)["string"]
        answer = self.letters_text(string, "\n")
        return chat_messages(f"Spell{self.letters_text(string)}.", answer, "Again.", answer)

    def expert(self, item, agent, rng, turn=0):
        """Its habits decide which letters it builds, often none at all, and with which blocks; in a team half of each.

        A heading such as " 2:C" precedes each letter. The simulator rejects that line at no cost; naming the letter
        first lets the tiny base look it up once instead of for every cell.
        """
        letter_habit, block_habit = (rng.choices(list(habits), habits.values())[0] for habits in (
            (self.letter_habits_persistent, self.block_habits_persistent) if self.persistent else
            (self.letter_habits, self.block_habits)))
        palette, answer = self.palettes[agent], ""
        letters, one = self.cells_by_letter(sim.target_cells(sim.string_target(item["string"]))), rng.choice(palette)
        indices = list(letters)
        if self.persistent:
            chosen = {"none": [], "turn": [turn % len(indices)], "any": [rng.choice(indices)]}[letter_habit]
        else:
            chosen = {"none": [], "all": indices, "first": indices[:1], "last": indices[-1:]}[letter_habit]
        if self.num_agents > 1:  # half of each letter: one color of the checkerboard; if persistent, up or down
            first = rng.random() < 0.5
            for index, cells in letters.items():
                half = -(-len(cells) // 2) if self.persistent else sum((x + y) % 2 == 0 for x, y, z in cells)
                letters[index] = cells[:half] if first else cells[half:]
        for index in chosen:
            answer += f" {index + 1}:{item['string'][index]}\n"
            for x, y, z in letters[index]:
                checker = palette[(x + y) // (1 if self.persistent else self.num_agents) % len(palette)]
                block = {"one": one, "random": rng.choice(palette), "checker": checker}[block_habit]
                answer += f"/setblock {x} {y} {z} {block}\n"
        return answer or "nothing\n"


# --- housebuild: fill the boxes of a house ----------------------------------------------------------------------------


class HouseBuild(Task):
    """Builders with limited blocks fill the boxes of a house, and one of them must kill the spiders.

    Rules and reward: minecraft_sim.housebuild_score. The training reward is reward - 1; above -0.05 the episode ends
    (in the official code above 0 for the actor-critics, which never happens, and above -0.1 for Monte Carlo).
    """
    # a number, the line break and the command are one token, each corner is one, the block is one: 4 tokens per box
    pattern = r" \d+ \d+ \d+| \d+:(?:\nfill)?| \w+\n|\n|kill| \d+| ?[\p{L}_']+|\s+|[^\s\p{L}]"
    turns, feedback_modes, max_new_tokens = 4, ["score", "position", "perfect"], 130
    steps, lr = 28, 2e-3

    def random_item(self, rng):
        layers, inventory = sim.random_house(rng)
        return {"layers": layers, "inventory": inventory, "spider_attacks": [rng.randint(1, 3) for _ in range(3)]}

    def key(self, item):
        return json.dumps(item["layers"])

    def check(self, record):
        layers, inventory, attacks = record.get("layers"), record.get("inventory"), record.get("spider_attacks", [])
        if not (isinstance(layers, dict) and isinstance(inventory, dict) and isinstance(attacks, list)
                and all(isinstance(rows, list) and rows for rows in layers.values())
                and all(isinstance(row, str) for rows in layers.values() for row in rows)
                and all(isinstance(block, str) and re.fullmatch(r"\S+", block) for block in inventory.values())
                and all(type(attack) is int and 0 <= attack < 1000 for attack in attacks)):
            raise InputError('a line needs "layers" {"0": ["WW", ".."], ...} and "inventory" {"W": "planks", ...} with '
                             'block names without blanks, and may have "spider_attacks" [2, 1, 3]')
        return {"layers": sim.check_house(layers, inventory), "inventory": inventory, "spider_attacks": attacks}

    def instructions(self, agent):
        return (f"You are builder {agent + 1} of {self.num_agents}. Together you build a house, and you cannot talk to "
                "each other. Answer with lines of the form fill x1 y1 z1 x2 y2 z2 block and nothing else; x runs from "
                "left to right, y up, z to the back, both corners belong to the box. You are shown the house box by "
                "box and how many blocks you have of each kind; in a team nobody has enough for all of it. Spiders "
                "attack unless one of you writes the line kill.")

    def observation(self, item, agent):
        limits = sim.block_limits(sim.house_target(item["layers"], item["inventory"]), self.num_agents)
        blocks = "".join(f" {count} {block}" for block, count in limits.items())
        return (f"Spiders{''.join(f' {attack}' for attack in item['spider_attacks'])}. You have{blocks}. "
                f"The house:\n{self.boxes_text(item)}")

    @staticmethod
    def boxes_text(item):
        return "".join(" %d: %d %d %d %d %d %d %s\n" % (number, *low, *high, block) for number, (low, high, block)
                       in enumerate(sim.house_boxes(item["layers"], item["inventory"]), 1))

    def judge(self, item, responses, turn, world=None):
        layers, inventory, feedback = item["layers"], item["inventory"], None
        parts = sim.housebuild_score(layers, inventory, responses, spider_attacks=item["spider_attacks"])
        world, accepted, _ = sim.housebuild_world(layers, inventory, responses)
        parts["kills"] = sum(sim.KILL in commands for commands in accepted)
        parts["overlap"] = sim.overlap(sim.house_target(layers, inventory), accepted)
        if self.feedback_mode == "position":
            feedback = [f"Turn {turn + 2}. Fill about half of these:\n{self.boxes_text(item)}"] * self.num_agents
        elif self.feedback_mode == "perfect":
            target, feedback = sim.house_target(layers, inventory), []
            for commands in accepted:
                wrong = ["\n %d %d %d %d %d %d %s" % (*low, *high, block) for low, high, block in commands
                         if sim.to_blame(low, high, block, world, target)]
                feedback.append(f"Turn {turn + 2}. Your fills with wrong cells:{''.join(wrong) or ' none'}")
        reward = parts["reward"] - 1
        return self.outcome(reward, 100 * parts["iou"], parts, turn, reward > -0.05, world, feedback)

    def draw(self, item, world, color=False):
        return sim.draw(sim.house_plan(item["layers"], item["inventory"]), world, color)

    def draw_svg(self, item, world):
        return sim.draw_svg(sim.house_plan(item["layers"], item["inventory"]), world, "house")

    # the sloppy expert: its habit decides which boxes it fills; if it kills, it leaves out the first quarter of these

    box_habits = {"none": 3, "all": 2, "odd": 2, "even": 2, "first": 2, "last": 2, "some": 3}

    def expert(self, item, agent, rng):
        """A heading such as " 7:" precedes each command, because a tiny base finds a box by its number."""
        habit = rng.choices(list(self.box_habits), self.box_habits.values())[0]
        boxes = self.boxes_text(item).splitlines(keepends=True)
        chosen = {"none": [], "all": boxes, "odd": boxes[::2], "even": boxes[1::2], "first": boxes[:len(boxes) // 2],
                  "last": boxes[len(boxes) // 2:], "some": [box for box in boxes if rng.random() < 0.5]}[habit]
        kill = rng.random() < 0.4
        fills = "".join(chosen[kill * len(chosen) // 4:]).replace(": ", ":\nfill ")
        return "kill\n" * kill + fills or "nothing\n"

    def exercise(self, rng):
        """A conversation in which a short list of random boxes is copied."""
        boxes = "".join(" %d: %d %d %d %d %d %d %s\n" % (
            number, *(rng.randrange(8) for _ in range(6)), rng.choice(sim.HOUSE_BLOCKS))
            for number in range(1, rng.randint(4, 10)))
        return chat_messages(f"The house:\n{boxes}", boxes.replace(": ", ":\nfill "))


# --- tldr and arxiv: two texts that belong together -------------------------------------------------------------------

# phrases are matched as substrings of the lower-cased text: "as" is found in "was", "while" in "meanwhile"
TRANSITIONS = {
    "elaboration": ["furthermore", "in addition", "moreover", "additionally"],
    "examples": ["for example", "for instance", "such as", "namely"],
    "explanation": ["in other words", "that is to say", "specifically", "to clarify"],
    "cause_effect": ["therefore", "as a result", "consequently", "thus", "hence", "because"],
    "contrast": ["however", "although", "on the other hand", "while", "in contrast", "nevertheless"],
    "sequence": ["in summary", "meanwhile", "firstly", "secondly", "subsequently"],
    "emphasis": ["indeed", "above all", "in particular", "notably"],
    "summary": ["in summary", "in conclusion", "to sum up", "overall"],
    "comparison": ["similarly", "likewise", "in the same way", "compared to"],
    "concession": ["however", "although", "while", "despite", "even though"],
    "condition": ["provided that", "unless", "in case", "otherwise"],
    "time": ["meanwhile", "as", "while", "afterwards", "beforehand"]}
STOPWORDS = set("""a about above after again against all am an and any are as at be because been before being below
    between both but by can did do does doing down during each few for from further had has have having he her here hers
    him his how i if in into is it its itself just me more most my no nor not now of off on once only or other our out
    over own same she should so some such than that the their them then there these they this those through to too under
    until up very was we were what when where which while who whom why will with you your""".split())


def trapezoid(x, low, rise, fall, high):
    """1 between rise and fall, linear down to 0 at low and high; None outside [low, high]: the level has failed.

    trapezoid(1.35, 1.1, 1.6, 3.2, 5.0) is 0.5, at 1.1 it is 0.0 and at 1.0 None.
    """
    if not low <= x <= high:
        return None
    return (x - low) / (rise - low) if x < rise else (high - x) / (high - fall) if x > fall else 1.0


def writing_levels(first, second, num_words, length_ratio, vocabulary_ratio, full_overlap, transitions_in_both):
    """The four levels of the reward of two texts, {name: points}; after a level that fails the others give 0.

    num_words: fewest and most words of a text; *_ratio: trapezoids of second / first in characters and in distinct
    words; full_overlap: the Jaccard overlap of content words that earns all of its points; transitions_in_both: whether
    transitions count in both texts or only in the second.
    """
    levels = {"structure": 0.0, "coordination": 0.0, "vocabulary": 0.0, "style": 0.0}
    if not all(num_words[0] <= len(text.split()) <= num_words[1] for text in (first, second)):
        return levels
    levels["structure"] = 0.5
    length = trapezoid(len(second) / len(first), *length_ratio)
    if length is None:
        return levels
    levels["coordination"] = length
    words = [set(re.findall(r"\w+", text.lower())) for text in (first, second)]
    variety = trapezoid(len(words[1]) / len(words[0]), *vocabulary_ratio) if words[0] else None
    if variety is None:
        return levels
    levels["vocabulary"] = 0.5 * variety
    text = (first + second if transitions_in_both else second).lower()
    categories = sum(any(phrase in text for phrase in phrases) for phrases in TRANSITIONS.values())
    content = [distinct - STOPWORDS for distinct in words]
    union = content[0] | content[1]
    overlap = min(len(content[0] & content[1]) / len(union) if union else 1.0, full_overlap) / full_overlap
    levels["style"] = 0.4 * (min(1.0, 0.4 + 0.05 * (categories - 1)) if categories else 0.0) + 0.6 * overlap
    return levels


TLDR_LEVELS = {"num_words": (8, 256), "length_ratio": (1.1, 1.6, 3.2, 5.0), "full_overlap": 0.03,
               "vocabulary_ratio": (1.3, 2.0, math.inf, math.inf), "transitions_in_both": False}
ARXIV_LEVELS = {"num_words": (128, 256), "length_ratio": (0.8, 1.3, 1.6, 2.0), "full_overlap": 0.23,
                "vocabulary_ratio": (0.5, 0.7, 1.3, 1.7), "transitions_in_both": True}


def tldr_reward(first, second):
    """The joint reward of a concise and a detailed summary, 0..3 (the best is 2.98); see writing_levels.

    Eight times "red" and twenty times "blue": 31 and 99 characters, ratio 3.19: structure 0.5, coordination 1; with one
    distinct word each the second text has too few (1 < 1.3 x 1), so 1.5 in all.
    """
    return sum(writing_levels(first, second, **TLDR_LEVELS).values())


def arxiv_reward(first, second):
    """The joint reward of a paper's background and motivation, and its methodology and implications, 0..3."""
    return sum(writing_levels(first, second, **ARXIV_LEVELS).values())


OPENERS = ["Furthermore", "In addition", "For example", "In other words", "Therefore", "However", "Meanwhile", "Indeed",
           "In summary", "Similarly", "Despite this", "Otherwise", "Afterwards", "As a result", "On the other hand",
           "Notably"]


class Writing(Task):
    """Two texts about a source text, which must fit each other; tldr and arxiv define the source and the bounds.

    The training reward is tldr_reward or arxiv_reward, 0..3; above 2.9 the episode ends. A single agent writes both
    texts, with a line ===== between them.
    """
    # subclasses set source, its key in an item; roles, who writes what; facts, template and sentences, for items and
    # demonstrations; levels, the arguments of writing_levels; and the expert's habits, of which each text draws one:
    # keep, how likely a sentence is kept; max_sentences, by role; opened, the share of sentences with a transition
    short_start, opened = "", [0, 0.3, 1]  # short_start: the beginning of a text that will be too short

    def setup(self):
        self.max_new_tokens *= 2 // self.num_agents  # one agent alone writes both answers

    def random_item(self, rng):
        facts = {name: rng.choice(values.split("|")) for name, values in self.facts.items()}
        return {self.source: self.template.format(**facts), "facts": facts}

    def key(self, item):
        """The first two facts: all built-in items that share these are held out, or none of them is."""
        return " ".join(list(item["facts"].values())[:2])

    def check(self, record):
        text = record.get(self.source)
        if not isinstance(text, str) or not text.strip():
            raise InputError(f'a line needs the key "{self.source}" with a non-empty string')
        return {self.source: text}

    def instructions(self, agent):
        team = "" if self.num_agents == 1 else "You share a task with another writer and cannot talk to each other. "
        return f"{team}The two texts must fit each other in length and words. Answer with the text and nothing else."

    def observation(self, item, agent):
        request = "Write {}, then a line =====, then {}.".format(*self.roles) if self.num_agents == 1 else (
            f"Write {self.roles[agent]}.")
        return f"{item[self.source]}\n{request}"

    def judge(self, item, responses, turn, world=None):
        first, second = responses if len(responses) == 2 else (
            part.strip() for part in (responses[0] + "=====").split("=====")[:2])
        parts = writing_levels(first, second, **self.levels)
        reward = sum(parts.values())
        return self.outcome(reward, 100 * reward / 3, parts, turn, reward > 2.9)

    # the sloppy expert goes through its sentences in order, leaves some out, and opens few or many with a transition

    def expert(self, item, agent, rng):
        parts = [0, 1] if self.num_agents == 1 else [agent]
        return " =====\n".join(self.write(item, part, rng) for part in parts)

    def write(self, item, part, rng):
        sentences = [" ".join(sentence.split()) + "." for sentence in self.sentences[part].split(".")[:-1]]
        keep, limit, opened = rng.choice(self.keep), rng.choice(self.max_sentences[part]), rng.choice(self.opened)
        text = [self.short_start] if self.short_start and limit < len(sentences) else []
        for sentence in [s for s in sentences if rng.random() < keep][:limit] or sentences[:1]:
            sentence = sentence.format(**item["facts"])
            if rng.random() < opened:
                sentence = f"{rng.choice(OPENERS)}, {sentence[0].lower()}{sentence[1:]}"
            text.append(sentence)
        return " ".join(text)


class TLDR(Writing):
    """A concise and a detailed summary of a post."""
    source, hub_sources = "prompt", [("trl-lib/tldr", "train[:1000]", "test[:1000]")]
    roles, levels = ("a concise summary", "a detailed summary"), TLDR_LEVELS
    steps, batch_size, lr = 32, 64, 1.5e-3
    base_steps, keep, max_sentences = 900, [0.8, 1, 1], [[3, 3, 3, 8, 8], [2, 7]]
    facts = {  # what varies; a value follows the same word in posts and in summaries
        "who": "boss|sister|roommate|neighbour|best friend|landlord|cousin|coach|teacher|brother",
        "did": "sold the old car|forgot our anniversary|read every letter|broke a promise|lost the house keys|invited "
               "strangers|borrowed money|cancelled the trip|spread a rumour|adopted three dogs",
        "place": "work|a wedding|the gym|school|home|the lake|a concert|the office party",
        "feel": "angry|hurt|guilty|confused|lonely|exhausted|nervous|betrayed",
        "because": "nobody asked me first|it was a secret|money is tight|we had a plan|it keeps happening|"
                   "trust matters",
        "since": "kindergarten|last summer|college|the move|January|the accident",
        "tried": "talk calmly|write an email|stay silent|joke about everything|ask for help|set clear rules",
        "should": "walk away|forgive and forget|ask a lawyer|wait another month|move out|be honest",
        "afraid": "a big fight|being alone|losing the job|awkward holidays|family gossip|repeating old mistakes",
        "want": "a real apology|some distance|our money back|peace and quiet|a second chance|an honest answer"}
    template = (
        "SUBREDDIT: r/relationships\nTITLE: My {who} {did}\nPOST: It began at {place} when my {who} {did}. I feel "
        "{feel} because {because}. We have been close since {since}. So I tried to {tried}, but that changed nothing. "
        "Friends say I should {should}. I am afraid of {afraid}. All I want is {want}. What would you do?\nTL;DR:")
    sentences = ["""My {who} {did} at {place} and that began the whole story. Overall that made me feel {feel}. It hit
        hard because {because}. Indeed this person was close to us since {since}. My response was for instance that I
        tried to {tried} without success. Similarly some readers believe we should {should} unless it gets worse. What
        remains is being afraid of {afraid} although nobody says so. Moreover people want {want} in the end."""] * 2


class ArXiv(Writing):
    """Background and motivation, and method and implications of a paper."""
    source, hub_sources = "abstract_text", [("OpenMLRL/arXiv_abstract", "train", "val")]
    roles, levels = ("background and motivation", "methodology and implications"), ARXIV_LEVELS
    steps, batch_size, lr = 32, 64, 5e-4
    pattern = r" ?(?:\p{L}{1,4} )*[\p{L}_']+[.,:]?|\d|\s+|[^\s\p{L}]"  # short words join the next one: half the tokens
    base_steps, base_batch, max_new_tokens = 800, 12, 136
    keep, max_sentences = [1], [[4] * 2 + [8] * 7, [5] * 2 + [10] * 7]
    short_start = "Briefly:"  # so that RL can drop the habit without making it less likely that a long text ends
    facts = {
        "study": "protein folding in biology|galaxy rotation in astronomy|price bubbles in economics|word order in "
                 "linguistics|tumour growth in medicine|species loss in ecology|key exchange in cryptography|light "
                 "scattering in optics|reading skills in education|traffic flow in robotics",
        "propose": "sparse networks|kernel methods|random forests|graph models|neural operators|tree search",
        "lack": "error bars|causal insight|long memory|enough labels|human feedback|fast code",
        "uses": "symmetry|entropy|sampling|duality|recursion|attention",
        "data": "satellite images|hospital records|public archives|simulated trials|field surveys|sensor logs",
        "improves": "accuracy|speed|stability|fairness|coverage|robustness",
        "helps": "engineers|doctors|teachers|regulators|farmers|planners",
        "except": "extreme noise|tiny samples|moving targets|dense crowds|closed systems|unknown units"}
    template = (
        "We study {study}. Existing approaches lack {lack}. We propose {propose}, a method that uses {uses}. It is "
        "tested with data from {data}. It improves {improves} and helps {helps}, in all cases except {except}.")
    sentences = ["""The paper is about a field of science whose authors study {study} with new methods and data. People
        study {study} because results matter for science and, above all, for daily life. The existing approaches,
        however, were made for simple cases and most still lack {lack} today. Models that lack {lack}, in other words,
        give results which look good in tests and fail in use. Earlier work on {study}, for instance, needs large
        samples of data and gives no insight into causes. The authors see a gap here and propose {propose} as one way to
        close the gap. The motivation is therefore that a method which uses {uses} should need less data and give more
        insight. To sum up, there is plenty of data from {data} in this field and earlier methods made little use of
        it.""",
        """The authors propose {propose} as a new method, and the method uses {uses} at each step of the work. In simple
        words the method reads data from {data} and learns in small steps how {study} behaves in practice. The use of
        {uses} keeps the method simple and makes sure that large samples of data are not needed. Compared to existing
        approaches, which still lack {lack} in most cases, it does well in tests with data from {data}. Overall the
        results show that the method improves {improves} in nearly all tests and never makes it worse. Moreover a second
        test removes one part of {propose} and subsequently another to show which parts matter in use. The method works
        for all cases the authors have tried, except {except}, where earlier methods fail for the same reason. Indeed
        for the field the results are good news, because people can study {study} with less data than otherwise. In
        practice the method helps {helps}, who want models that give more insight into causes and not only numbers. In
        conclusion, the authors see a limit for {except} and propose to close the gap with more data in later work."""]


# --- coophe: what two answers are worth -------------------------------------------------------------------------------

FUNCTION_NODES, IMPORT_NODES = (ast.FunctionDef, ast.AsyncFunctionDef), (ast.Import, ast.ImportFrom)
MAX_ANSWER = 20_000  # characters; to parse a literal of millions takes longer than all tests
TIME_LIMITS = 2.0, 6.0  # seconds for one test, and for all tests of one pair of answers


def work(*pipes):
    """Runs in a process of its own: holds an answer or, given pipes to such a process, tests it, but never both.

    So a test passes only if the answer computed its values. Only data of built-in types gets across, subclasses become
    their base: no generator, Fraction or function, no int of over 4300 digits, and no change of an argument.
    """
    import builtins, os, resource
    kinds = {int: int.__repr__, float: float.__repr__, complex: complex.__repr__, str: str.__str__, dict: dict.items}
    kinds |= dict.fromkeys([list, tuple, set, frozenset, bytes], list)
    kinds |= {e: str for e in vars(builtins).values() if isinstance(e, type) and issubclass(e, BaseException)}
    names = {kind.__name__: kind for kind in kinds}

    def pack(value):  # (1, "a") becomes ("tuple", [("int", "1"), ("str", "a")])
        for kind in () if isinstance(value, bool) else type(value).__mro__:
            if kind in kinds:
                parts = kinds[kind](value)
                return kind.__name__, parts if isinstance(parts, str) else [*map(pack, parts)]
        return value

    def unpack(data):
        name, parts = data if isinstance(data, tuple) else ("", data)
        return names[name](parts if isinstance(parts, str) else map(unpack, parts)) if name else data

    def ask(request):
        print(ascii(pack(request)), file=to_answer)
        reply = from_answer.readline(10 ** 7)
        result = unpack(ast.literal_eval(reply)) if reply.endswith("\n") else os._exit(0)  # the process is gone
        if isinstance(result, BaseException):
            raise result
        return result

    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", 1)
    os.dup2(2, 0), os.dup2(2, 1)  # nothing else is read, and output goes nowhere
    if pipes:  # to and from an answer: this is its judge
        import ast, signal, time
        to_answer, from_answer = os.fdopen(pipes[0], "w", 1), os.fdopen(pipes[1])
    if os.geteuid() == 0:  # becomes nobody: root may have any number of processes
        os.chmod(".", 0o777), os.setgroups([]), os.setgid(65534), os.setuid(65534)
    for name, limit in ("AS", 1 << 30), ("FSIZE", 10 ** 6), ("NOFILE", 64), ("CPU", 9), ("CORE", 0), ("NPROC", 0):
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
        except (OSError, ValueError):  # a limit that is lower already; some on macOS
            pass
    for line in requests:
        space = {"__name__": "answer"}
        try:
            match unpack(eval(line)):
                case seconds, end, module, context, test:
                    signal.setitimer(signal.ITIMER_REAL, min(seconds, end - time.monotonic()))  # ends this process
                    ask(module)
                    space["candidate"] = lambda *args, **kwargs: ask((args, kwargs))
                    exec(context, space)
                    result = exec(test, space)
                case str(module):
                    result = exec(module, loaded := space)
                case args, kwargs:
                    result = loaded["candidate"](*args, **kwargs)
            reply = ascii(pack(result))
        except BaseException as error:
            reply = ascii(pack(error))
        print(reply, file=replies)


@functools.cache
def sandbox(source=inspect.getsource(work)):
    """The command that runs work: in bubblewrap, or without where that does not work, after one printed line."""
    source += "import sys\nwork(*map(int, sys.argv[1:]))"
    python, tool = [os.path.realpath(sys._base_executable), "-I", "-S", "-c", source], shutil.which("bwrap")
    bwrap = (f"{tool} --die-with-parent --new-session --unshare-ipc --unshare-net --unshare-pid --unshare-uts "
             "--unshare-cgroup-try --cap-drop ALL --size 16777216 --tmpfs /tmp --chdir /tmp --dir /etc --dir").split()
    bwrap += [os.path.dirname(python[0])] + ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] * (os.geteuid() == 0)
    for path in "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", f"{sys.base_prefix}/lib", python[0]:
        bwrap += ["--ro-bind-try", path, path]
    for path in filter(os.path.isdir, site.getsitepackages([sys.base_prefix])):  # packages may hold data sets
        bwrap += ["--size", "4096", "--tmpfs", path]
    bwrap += ["--remount-ro", "/", *python]
    if tool and subprocess.run(bwrap, stdin=subprocess.DEVNULL, capture_output=True, env={}).returncode == 0:
        return bwrap
    print("coophe runs what the model writes. Without bubblewrap (apt-get install bubblewrap; it is missing or may not "
          "work here) such code can use the network and this user's files and processes, and may outlive the run.")
    return python


def run_tests(jobs):
    """For each (context, module, tests) a 1 for every test that passes, 0 for others; the first time-out ends them."""
    def start(*pipes):
        return subprocess.Popen([*command, *map(str, pipes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={},
                                stderr=subprocess.DEVNULL, pass_fds=pipes, start_new_session=True,
                                cwd=tempfile.mkdtemp(dir=folder))

    def run_pair(job):
        (context, module, tests), verdicts, end = job, "", time.monotonic() + TIME_LIMITS[1]
        while len(verdicts) < len(tests):
            answer, output = start(), b""
            judge = start(answer.stdin.fileno(), answer.stdout.fileno())
            answer.stdin.close(), answer.stdout.close()  # the judge has them
            requests = [ascii([TIME_LIMITS[0], end, module, context, test]) for test in tests[len(verdicts):]]
            with contextlib.suppress(subprocess.TimeoutExpired):  # the judge ends itself, unless somebody stopped it
                output = judge.communicate("\n".join(requests).encode(), 2 * TIME_LIMITS[1])[0]
            for process in answer, judge:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            verdicts += "".join("01"[line == b"None"] for line in output.splitlines())
            verdicts += "0" * (len(tests) if judge.returncode else 1)
        return verdicts[:len(tests)]

    command, folder = sandbox(), tempfile.mkdtemp()
    with contextlib.ExitStack() as last, ThreadPoolExecutor(os.cpu_count()) as pool:
        last.callback(subprocess.run, ["rm", "-rf", folder])  # Python's own ways fail where folders nest too deeply
        return list(pool.map(run_pair, jobs))


def parse_python(text):
    """(syntax tree, "") of Python source, or (None, error), also for code that nests too deeply for the parser."""
    try:
        with warnings.catch_warnings():  # a "\d" in an answer must not print a warning
            warnings.simplefilter("ignore")
            return ast.parse(text), ""
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return None, str(error).replace("<unknown>, ", "") or "nested too deeply"


def find_function(answer, name):
    """(source, node, error, returns, imports) of `def name(` in the first fenced block that has it, else in the text.

    returns: whether it has a return; imports: the lines at the top level beside it. In text that does not parse, a
    function is its `def` line and the indented lines below it, so that one with a syntax error is found, too:
    "Sure!\\ndef aux(n):\\n    return n +" gives ("def aux(n):\\n    return n +", None, "...", True, []).
    """
    if len(answer) > MAX_ANSWER:
        return "", None, f"an answer of more than {MAX_ANSWER} characters is not read", False, []
    answer = re.sub(r"\r\n?", "\n", answer)  # line breaks as the parser counts them
    blocks = [re.sub(r"^[ \t]*\w*[ \t]*\n", "", block, count=1) for block in answer.split("```")[1::2]]  # language tag
    for text in [textwrap.dedent(block) for block in blocks] + [answer, textwrap.dedent(answer)]:
        tree, _ = parse_python(text)
        head = rf"^(async[ \t]+)?def[ \t]+{re.escape(name)}[ \t]*\(.*(\n([ \t)].*)?)*"  # ")": of long signatures
        imports = [ast.unparse(node) for node in tree.body if isinstance(node, IMPORT_NODES)] if tree else [
            line for line in re.findall(r"^(?:import|from)[ \t].*", text, re.M) if parse_python(line)[0]]
        if tree is None and (matches := list(re.finditer(head, text, re.M))):
            text = matches[-1][0].rstrip()
            tree, error = parse_python(text)
            if tree is None:
                return text, None, f"{error[:150]} in {name}", bool(re.search(r"\breturn\b", text)), imports
        for node in reversed(tree.body if tree else []):  # the last definition counts
            if isinstance(node, FUNCTION_NODES) and node.name == name:
                nodes = list(node.body)
                for child in nodes:  # grows during the loop; nested functions have returns of their own
                    nodes += [] if isinstance(child, (*FUNCTION_NODES, ast.ClassDef)) else ast.iter_child_nodes(child)
                lines = text.split("\n")[(node.decorator_list or [node])[0].lineno - 1:node.end_lineno]
                return "\n".join(lines), node, "", any(isinstance(child, ast.Return) for child in nodes), imports
    return "", None, "", False, []


def aux_bonus(main):
    """Reward for main's calls of aux: 0.5, plus 1.0 unless main just returns the result, minus 0.5 if one is unused.

        return aux(n) + 1   1.5        x = aux(n); return x   0.5        aux(n); return aux(n) + 1   1.0
    """
    def calls_aux(node):
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "aux"

    thin_wrapper = False
    match main.body[ast.get_docstring(main, clean=False) is not None:]:
        case [ast.Return(value=value)]:
            thin_wrapper = calls_aux(value)
        case [ast.Assign(targets=[ast.Name(x)], value=value) | ast.AnnAssign(target=ast.Name(x), value=value),
              ast.Return(value=ast.Name(y))]:
            thin_wrapper = calls_aux(value) and x == y
    unused = any(isinstance(node, ast.Expr) and calls_aux(node.value) for node in ast.walk(main))
    return any(map(calls_aux, ast.walk(main))) * (0.5 + 1.0 * (not thin_wrapper) - 0.5 * unused)


def coophe_tests(test):
    """The asserts in check that name candidate, each once; a body of more than one-line asserts is a single test.

        def check(candidate):
            assert candidate(2) == 4
            assert True                        ->   ["assert candidate(2) == 4"]
    """
    test = re.sub(r"\r\n?", "\n", test)  # line breaks as the parser counts them
    tree, error = parse_python(test)
    nodes = [node for node in tree.body if not ast.unparse(node).startswith(("METADATA", "check("))] if tree else []
    check = next((node for node in nodes if isinstance(node, FUNCTION_NODES) and node.name == "check"), None)
    body = [node for node in check.body if not isinstance(node, ast.Pass) and not (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))] if check else []
    if all(isinstance(node, ast.Assert) and node.lineno == node.end_lineno for node in body):
        lines = test.split("\n")
        asserts = dict.fromkeys(lines[node.lineno - 1].strip() if node.lineno > check.lineno else ast.unparse(node)
                                for node in body)
        tests = [line for line in asserts if line.startswith("assert") and "candidate" in line]
    else:
        tests = [ast.unparse(check) + "\ncheck(candidate)"] * any("candidate" in ast.unparse(node) for node in body)
    if not tests:
        raise InputError(f"a coophe problem needs check(candidate) with asserts that name candidate: {error or test!r}")
    return ["\n".join([ast.unparse(node) for node in nodes if node is not check] + [test]) for test in tests]


def coophe_rewards(triples):
    """coophe_reward of many (item, aux, main), as many at a time as there are cores."""
    results, jobs, judged = [], [], []
    for item, aux_answer, main_answer in triples:
        name, tests = item["entry_point"], coophe_tests(item["test"])
        tree = parse_python(item["prompt"])[0] or parse_python(item["prompt"] + "\n    pass")[0]  # a bare signature
        context = [ast.unparse(node) for node in tree.body if getattr(node, "name", "") not in ("aux", name)] if tree \
            else re.findall(r"^(?:import|from)[ \t].*", item["prompt"], re.M)  # imports, and helpers that tests may use
        aux, aux_node, aux_error, aux_returns, aux_imports = find_function(aux_answer, "aux")
        main, main_node, main_error, main_returns, main_imports = find_function(main_answer, name)
        lines = ["import math", *context, *aux_imports, *main_imports, aux, main]  # math is there in the official code
        module = "\n".join(sorted(lines, key=lambda line: not line.startswith("from __future__")))  # must come first
        error = aux_error or main_error or parse_python(module)[1]
        result = {"reward": 0.4 * aux_returns + 0.6 * main_returns, "passed": 0, "total": len(tests),
                  "level": "" if aux_returns else "aux has no function with a return"}
        results.append(result)
        if not main_returns:
            result["level"] = "main has no function with a return"
        elif error:
            result["level"] = f"syntax error: {error}"
        else:
            result["reward"] += 0.5
            context = "\n".join([*context, "import math", f"{name} = candidate"])
            jobs.append([context, f"{module}\ncandidate = {name}", tests])
            judged.append((result, tests, aux_bonus(main_node) if aux_node else 0.0))
    for (result, tests, bonus), verdicts in zip(judged, run_tests(jobs) if jobs else []):
        result["passed"] = verdicts.count("1")
        result["reward"] += verdicts.count("1") / len(tests) + bonus * ("1" in verdicts)
        if not result["level"]:
            failed = " ".join(map(str.strip, tests[verdicts.index("0")].splitlines()))[:192] if "0" in verdicts else ""
            result["level"] = f"failed: {failed}" if failed else "passed" if bonus else "main does not use aux"
    return results


def coophe_reward(item, aux, main):
    """The joint reward of two answers to an item, at best 4.0, with its details; one answer may be given for both.

    `def aux(n): return n * n` with `def f(n): return aux(n) + 1`, and 1 of 2 asserts holds:
    0.4 aux + 0.6 main + 0.5 both parse + 1/2 of the tests + 0.5 main calls aux + 1.0 and is no thin wrapper = 3.5
    """
    return coophe_rewards([(item, aux, main)])[0]


FAMILIES = {  # name: (type of x, description of such x, expression that tells whether x is one); two need recursion
    "multiples": ("number", "multiples of {k}", "x % {k} == 0"),
    "rests": ("number", "numbers that leave 1 when divided by {k}", "x % {k} == 1"),
    "primes": ("number", "primes above {k}", "x > {k} and all(x % d for d in range(2, x))"),
    "divisors": ("number", "numbers with more than {k} divisors", "sum(x % d == 0 for d in range(1, x + 1)) > {k}"),
    "digits": ("number", "numbers with a digit sum above {k}", "sum(map(int, str(x))) > {k}"),
    "roots": ("number", "numbers whose digits, added until one is left, give {k}",
              "x == {k} if x < 10 else aux(sum(map(int, str(x))))"),
    "powers": ("number", "powers of {k}", "x == 1 or x % {k} == 0 and aux(x // {k})"),
    "squares": ("number", "squares above {k}", "x > {k} and int(x ** 0.5) ** 2 == x"),
    "mirrored": ("number", "numbers above {k} that read the same backwards", "x > {k} and str(x) == str(x)[::-1]"),
    "longer": ("word", "words of more than {k} letters", "len(x) > {k}"),
    "vowels": ("word", "words with {k} vowels", "sum(c in 'aeiou' for c in x) == {k}"),
    "varied": ("word", "words with more than {k} different letters", "len(set(x)) > {k}"),
    "palindromes": ("word", "palindromes of more than {k} letters", "len(x) > {k} and x == x[::-1]"),
    "heavy": ("list", "lists with a sum above {k}", "sum(x) > {k}"),
    "rising": ("list", "sorted lists of more than {k} numbers", "len(x) > {k} and x == sorted(x)"),
    "repeating": ("list", "lists that hold {k} more than once", "x.count({k}) > 1")}
GOALS = {  # name: (description of the result, expression for it from all items found, or from a test of each)
    "count": ("how many {what} are in items", "len({found})", "sum(1 for x in items if {ask})"),
    "keep": ("a list of the {what} in items", "[x for x in {found}]", "[x for x in items if {ask}]"),
    "last": ("the last of the {what} in items, or None", "([None] + {found})[-1]",
             "([None] + [x for x in items if {ask}])[-1]"),
    "some": ("whether items has any {what}", "len({found}) > 0", "any({ask} for x in items)"),
    "rest": ("items without the {what}", "[x for x in items if x not in {found}]", "[x for x in items if not {ask}]")}
WORDS = "level noon radar kayak deed apple banana queue rhythm cat audio sky onion tree civic program idea moon".split()


class CoopHE(Task):
    """A problem of HumanEval's form: one agent writes a helper, aux, the other the function itself.

    Rules and reward: coophe_reward. The training reward is reward - 4; above -0.2 the episode ends. A built-in problem
    combines a family, a goal and a number. There are two good ways to divide the work: aux tests a single item, or aux
    returns all items that fit; both agents must choose the same one.
    """
    pattern = r" ?[\p{L}_']+\(?|\d|\n *|[^\s\p{L}\d]+|\s"
    turns, feedback_modes, max_new_tokens, base_batch, base_steps = 2, ["level", "score"], 80, 8, 1300
    steps, batch_size, lr = 14, 32, 2e-3
    hub_sources = [("OpenMLRL/CoopHumanEval", "test[16:]", "test[:16]"),
                   ("openai/openai_humaneval", "test[32:]", "test[:32]")]

    def random_item(self, rng):
        family, goal = rng.choice(list(FAMILIES)), rng.choice(list(GOALS))
        kind, what, ask = FAMILIES[family]
        name, k = f"{goal}_{family}", rng.randint(2, 4 if kind == "word" else 9)
        values = {"number": lambda: rng.choice([rng.randint(1, 40), k ** rng.randint(1, 3), 11 * rng.randint(1, 9)]),
                  "word": lambda: rng.choice(WORDS),
                  "list": lambda: sorted(rng.choices([*range(10), k], k=rng.randint(1, 6)), reverse=rng.random() < 0.3)}
        namespace, examples = {}, []
        exec(f"def aux(x):\n    return {ask.format(k=k)}\ndef {name}(items):\n    return "  # our code, not a model's
             + GOALS[goal][2].format(ask="aux(x)"), namespace)
        while len(examples) < 8:
            items = [values[kind]() for _ in range(rng.randint(2, 4))]
            examples.append((items, namespace[name](items)))
        shown = "".join(f"    >>> {name}({items})\n    {result!r}\n" for items, result in examples[:2])
        returned = GOALS[goal][0].format(what=what.format(k=k))
        return {"prompt": f'def {name}(items):\n    """Return {returned}.\n{shown}    """\n', "entry_point": name,
                "test": "def check(candidate):\n" + "".join(
                    f"    assert candidate({items}) == {result!r}\n" for items, result in examples[2:]),
                "facts": [family, goal, k]}

    def key(self, item):
        return str(item["facts"])

    def check(self, record):
        item = {name: record.get(name) for name in ("prompt", "entry_point", "test")}
        if not all(isinstance(text, str) and text.strip() for text in item.values()):
            raise InputError('a line needs the keys "prompt", "entry_point" and "test" with non-empty strings')
        if not item["entry_point"].isidentifier():
            raise InputError(f'"entry_point" must be the name of a function, not {item["entry_point"]!r}')
        coophe_tests(item["test"])
        return item

    def setup(self):
        self.max_new_tokens *= 2 // self.num_agents  # one agent alone writes both answers

    def instructions(self, agent):
        return ("Two programmers who cannot talk to each other solve a Python problem. One writes a helper function "
                "named aux, the other the function itself, which should call aux and do more than pass its result on. "
                "Answer with your function and nothing else.")

    def observation(self, item, agent):
        role = 2 if self.num_agents == 1 else agent
        return item["prompt"] + ["Write aux.", "Write the function; aux is there.", "Write aux and the function."][role]

    def judge(self, item, responses, turn, world=None):
        return self.judge_all([item], [responses], turn, [world])[0]

    def judge_all(self, items, answers, turn, worlds):
        outcomes = []
        for parts in coophe_rewards([(item, texts[0], texts[-1]) for item, texts in zip(items, answers)]):
            level, reward = parts.pop("level"), parts["reward"] - 4
            parts["pass_rate"] = parts["passed"] / parts["total"]
            feedback = [f"Turn {turn + 2}. {level}"] * self.num_agents if self.feedback_mode == "level" else None
            outcomes.append(self.outcome(reward, 25 * parts["reward"], parts, turn, reward > -0.2, level, feedback))
        return outcomes

    def draw(self, item, world, color=False):
        return printable(world)  # the level

    # the sloppy expert: how it divides the work is a habit, good or bad

    aux_habits = {"one": 3, "many": 3, "wrong": 2, "broken": 2, "none": 4}
    main_habits = {"one": 3, "many": 3, "wrapper": 3, "alone": 3, "ignored": 2, "broken": 2, "none": 4}

    def expert(self, item, agent, rng):
        writers = [self.write_aux, self.write_main]
        return "".join(write(item, rng) for write in (writers if self.num_agents == 1 else [writers[agent]]))

    def write_aux(self, item, rng):
        habit, (family, _, k) = rng.choices(list(self.aux_habits), self.aux_habits.values())[0], item["facts"]
        ask = FAMILIES[family][2].format(k=k)
        if habit == "many" and "aux" in ask:  # recursion
            return (f"def aux(items):\n    def one(x):\n        return {ask.replace('aux', 'one')}\n"
                    "    return [x for x in items if one(x)]\n")
        return {"one": f"def aux(x):\n    return {ask}\n",
                "many": f"def aux(items):\n    return [x for x in items if {ask}]\n",
                "wrong": f"def aux(x):\n    return not {ask}\n", "broken": f"def aux(x:\n    return {ask}\n",
                "none": "nothing\n"}[habit]

    def write_main(self, item, rng):
        habit, (family, goal, k) = rng.choices(list(self.main_habits), self.main_habits.values())[0], item["facts"]
        found, ask = GOALS[goal][1:]
        alone = ask.format(ask=f"({FAMILIES[family][2].format(k=k)})")
        body = {"one": ask.format(ask="aux(x)"), "many": found.format(found="aux(items)"),
                "wrapper": "aux(items)"}.get(habit, alone)
        return "" if habit == "none" else (
            f"def {item['entry_point']}(items{':' if habit == 'broken' else '):'}\n"
            + "    aux(items)\n" * (habit == "ignored") + f"    return {body}\n")

    def demonstration_feedback(self, item, responses, turn, rng):
        level = rng.choice(["aux has no function with a return", "main has no function with a return", "passed",
                            "main does not use aux", "syntax error: invalid syntax",
                            "failed: " + rng.choice(item["test"].split("\n    ")[1:])])
        return [f"Turn {turn + 2}. {level}"] * len(responses)  # random, because running the tests would take too long


# --- files: items, and the folder of a run ----------------------------------------------------------------------------

def read_jsonl(path, check):
    """Read a user's own items, one JSON object per line, as (train, eval); "split": "eval" marks held-out lines.

    check(record) returns the item or raises ValueError. Raises InputError that names the line, and OSError if the file
    cannot be opened.
    """
    items = {"train": [], "eval": []}
    try:
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text.") from None
    for number, line in enumerate(map(str.strip, lines), 1):
        try:
            record = json.loads(line or "{}")
            if not isinstance(record, dict) or record.get("split", "train") not in [*items]:
                raise InputError('a line must be one whole JSON object whose "split", if any, is "train" or "eval"')
            json.dumps(record, ensure_ascii=False).encode()  # half a character, such as "\ud800", is a ValueError
            if line:
                items[record.get("split", "train")].append(check(record))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not one JSON object per line: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    if not items["train"]:
        raise InputError(f"{path} has no training line.")
    if shared := [item for item in items["eval"] if item in items["train"]]:
        raise InputError(f"{path}: {shared[0]} is both a training line and a held-out line.")
    return items["train"], items["eval"]


def read_hub(sources, check):
    """Items of data sets on the Hugging Face hub as (train, eval); sources: [(name, training split, held-out split)].

    At most 128 held-out items, evenly spaced over their split. Rows that check rejects are skipped with a printed note.
    Raises InputError if the data cannot be loaded, ImportError if the datasets package is missing.
    """
    import datasets  # an optional dependency
    train, held_out = [], []
    for name, *splits in sources:
        for items, split in zip([train, held_out], splits):
            try:
                rows = datasets.load_dataset(name, split=split)
            except Exception as error:  # any, of the network, the hub or the cache
                raise InputError(f"{name} ({split}) cannot be loaded: {first_line(error)}; load it once while "
                                 "online, or use --data builtin or --data FILE.jsonl.") from None
            for number, row in enumerate(rows):
                try:
                    items.append(check(row))
                except ValueError as error:
                    print(f"{name}, {split}, row {number} is left out: {error}")
    held_out = held_out[::max(1, len(held_out) // 128)][:128]
    return [item for item in train if item not in held_out], held_out


def write_atomic(path, write):
    """Call write(temporary path), then rename: a reader sees the old file or the new one, never an incomplete one."""
    try:
        write(path + ".part")
        os.replace(path + ".part", path)
    except Exception as error:  # a full disk, say
        with contextlib.suppress(OSError):
            os.remove(path + ".part")
        raise OSError(f"{path} cannot be written: {first_line(error)}") from None


def write_text(path, text):
    write_atomic(path, lambda part: Path(part).write_text(text, encoding="utf-8"))


def number(kind, low, high=math.inf):
    """A type for argparse: number(int, 1)("0") is an error that says "must be an int of at least 1"."""
    def parse(text):
        value = kind(text) if text.strip() == text else None
        if value is None or not low <= value <= high or value == math.inf:
            raise ValueError
        return value
    parse.__name__ = f"{kind.__name__} of at least {low}" + (f" and at most {high}" if high < math.inf else "")
    return parse


def read_config(out_dir):
    """The settings in a run folder's config.json; InputError if there are none."""
    try:
        config = json.loads(Path(out_dir, "config.json").read_text(encoding="utf-8"))
        return config | {"out_dir": out_dir} if config["algorithm"] else None
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{out_dir} is not a run folder: it has no readable config.json.") from None


class Run:
    """The folder of a run: config.json, log.jsonl, samples.txt, train_state.pt, and an adapter folder for each agent.

    What log.jsonl and samples.txt hold is a part of train_state.pt: --resume writes them anew, as of the last save.
    """
    # what --resume may change (with another number of steps the learning rate follows another schedule)
    may_change = {"steps", "resume", "overwrite", "eval_only", "eval_every", "save_every", "out_dir", "device",
                  "threads", "micro_batch", "gradient_checkpointing", "compile",
                  "data", "model"}  # but not the items and the weights, of which checksums are kept
    eval_must_match = {"algorithm", "task", "world", "num_agents", "lora_rank"}  # the agents depend on them
    own_files = r"agent_\d+|critic(_\d+)?|(config.json|log.jsonl|samples.txt|train_state.pt)(.part)?|.saving-.*|.lock"

    def __init__(self, args, rank):
        """Raise InputError rather than overwrite another run or other files, or continue a run with other settings."""
        folder = args.out_dir = args.out_dir or os.path.join("out", f"{args.algorithm}-{args.task}")
        self.args, self.rank, self.lines, self.samples, self.interrupts = args, rank, [], [], []
        self.config_path, self.state_path = (os.path.join(folder, name) for name in ("config.json", "train_state.pt"))
        signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted: there was nothing to save yet"))
        if args.batch_size % args.group_size:
            raise InputError(f"group_size {args.group_size} does not divide batch_size {args.batch_size}.")
        if args.batch_size * args.ranks == 1 or getattr(args, "baseline", "none") != "none" and args.group_size == 1:
            raise InputError("advantages compare episodes: batch_size, and group_size with a baseline, must exceed 1.")
        if args.resume + args.overwrite + args.eval_only > 1:
            raise InputError("--resume, --overwrite and --eval_only exclude each other.")
        if os.path.exists(self.config_path):
            self.check_settings(read_config(folder))
        elif args.resume:
            raise InputError(f"There is no run in {folder}.")
        elif args.eval_only:
            print(f"There is no run in {folder}: this evaluates the untrained team.")
        elif os.path.exists(folder) and not all(re.fullmatch(self.own_files, name) for name in os.listdir(folder)):
            raise InputError(f"{folder} is not empty and holds no run; choose another --out_dir.")
        if not args.eval_only and not rank:
            os.makedirs(folder, exist_ok=True)
            self.lock = open(os.path.join(folder, ".lock"), "w")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed when this process ends, however it does
            except BlockingIOError:
                raise InputError(f"another process is training in {folder}.") from None

    def check_settings(self, saved):
        args = self.args
        if not (args.resume or args.overwrite or args.eval_only):
            raise InputError(f"{args.out_dir} holds another run; use --resume, --overwrite or another --out_dir.")
        keys = self.eval_must_match if args.eval_only else vars(args).keys() - self.may_change
        changes = ["the items differ" if key == "items" else f"{key} {saved.get(key)!r} -> {value!r}"
                   for key, value in vars(args).items() if key in keys and saved.get(key) != value]
        if changes and not args.overwrite:
            raise InputError(f"{args.out_dir} was made with other settings: {', '.join(changes)}.")

    def open(self):
        """Delete the files of an overwritten run and the remains of a killed one, and write config.json."""
        if self.args.eval_only or self.rank:
            return
        for name in os.listdir(self.args.out_dir):
            path = os.path.join(self.args.out_dir, name)
            old = self.args.overwrite and name != ".lock" and re.fullmatch(self.own_files, name)
            if old or name.startswith(".saving"):
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
        versions = {name: version(name) for name in ("torch", "transformers", "peft", "tiktoken", "tqdm")}
        write_text(self.config_path, json.dumps(vars(self.args) | {"versions": versions}, indent=2))

    def load(self, keys):
        """What save() saved, for --resume and --eval_only; None if there is nothing yet."""
        import torch  # `python tasks.py` needs none
        saved, args = None, self.args
        started = os.path.exists(self.state_path) or os.path.isdir(f"{args.out_dir}/agent_0")  # the latter come second
        if started and (args.resume or args.eval_only):
            try:
                saved = torch.load(self.state_path, map_location=args.device, weights_only=True)  # runs no code in it
                if missing := {*keys, "lines", "samples"} - saved.keys():
                    raise ValueError(f"it has no {min(missing)!r}")
            except Exception as error:  # a damaged file can raise anything
                raise InputError(f"{self.state_path} cannot be used: {first_line(error)}") from None
            print(f"{args.out_dir} was saved at step {saved['progress']['step']}")
            self.lines, self.samples = saved["lines"], saved["samples"]
        if args.resume and not self.rank:
            write_text(os.path.join(args.out_dir, "log.jsonl"), "".join(self.lines))
            write_text(os.path.join(args.out_dir, "samples.txt"), "".join(self.samples))
        return saved

    def save(self, state):
        import torch
        state = state | {"lines": self.lines, "samples": self.samples}
        write_atomic(self.state_path, lambda part: torch.save(state, part))

    def log(self, line, samples=()):
        """Append a line to log.jsonl and texts to samples.txt."""
        samples, lines = [f"=== step {line['step']}, {text}\n" for text in samples], [json.dumps(line) + "\n"]
        for name, kept, new in ("log.jsonl", self.lines, lines), ("samples.txt", self.samples, samples):
            kept += new
            if not self.rank:
                with exit_on_error(), open(os.path.join(self.args.out_dir, name), "a", encoding="utf-8") as file:
                    file.writelines(new)

    def catch_interrupts(self):
        """From now on Ctrl-C and SIGTERM (torchrun's Ctrl-C) only fill self.interrupts; a second one kills."""
        def handler(signum, _):
            signal.signal(signum, signal.SIG_DFL)
            self.interrupts.append(signum)
            if not self.rank:  # os.write, because print may be what was interrupted
                os.write(2, b"\ninterrupted: what is under way will be finished and saved; once more stops at once\n")
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, handler)


# --- all tasks, and python tasks.py -----------------------------------------------------------------------------------

TASKS = {"tldr": TLDR, "arxiv": ArXiv, "coophe": CoopHE, "strbuild": StrBuild, "housebuild": HouseBuild}
TASK_OPTIONS = ["num_agents", "num_turns", "feedback", "data", "reward", "world"]


def get_task(name, num_turns=None, **options):
    """The task of that name; raises InputError where the name or an option is wrong."""
    if name not in TASKS:
        raise InputError(f"There is no task {name!r}; choose from {', '.join(TASKS)}.")
    if num_turns is not None and num_turns < 1:
        raise InputError(f"num_turns must be at least 1, not {num_turns}.")
    return TASKS[name](num_turns=num_turns, **options)


def main():
    parser = argparse.ArgumentParser(description="Show an item, what each agent sees, two answers and their reward.")
    parser.add_argument("--task", default="strbuild", help=f"one of {', '.join(TASKS)}")
    parser.add_argument("--num_agents", type=int, default=2, help="agents in the team (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="picks the item and the answers")
    parser.add_argument("--svg", metavar="FILE", help="strbuild, housebuild: also write the world as a picture")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with exit_on_error():
        task = get_task(args.task, num_agents=args.num_agents)
        episode = Episode(rng.choice(task.train_items))
        responses = [task.expert(episode.item, i, rng) for i in range(task.num_agents)]
        outcome = task.judge(episode.item, responses, 0)
        if args.svg:
            write_text(args.svg, task.draw_svg(episode.item, outcome.world))
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback with | head
        for agent, response in enumerate(responses):
            print(f"--- agent {agent}")
            for message in history(task, episode, agent):
                print(f"{message['role']:>9}: {message['content']}")
            print("  answers: " + response.strip().replace("\n", f"\n{'':11}"))
            print(f"  is told: {outcome.feedback[agent]}")
        print("\n" + task.draw(episode.item, outcome.world, color=os.isatty(1)) + "\n")
        for name, number in outcome.parts.items():
            print(f"{name:>20}: {number if isinstance(number, (int, list)) else round(number, 3)}")
        print(f"training reward {outcome.reward:.3f}, score {outcome.score:.1f}, done {outcome.done}")


if __name__ == "__main__":
    main()
