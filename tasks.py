"""
Tasks: what each agent observes, how a joint action is rewarded, and when an episode ends.

A task is one class. It must define these; the class Task shows what else it may define or set:

    random_item(rng), key(item)         an item, which is a dict; its key decides whether it is held out
    observation(item, agent)            o_i,0: the first user message that agent i gets
    judge(item, responses, turn, world) the Outcome of a joint action; world is that of the last turn, None at turn 0
    expert(item, agent, rng)            one answer of a sloppy expert, whose many habits, good and bad, RL selects from

One worked example, strbuild with the string "I" at turn 0 of 4:

    agent 0 is shown   Build 1:I with oak_planks stone.  agent 1 is shown   Build 1:I with white_concrete obsidian.
    agent 0 answers    /setblock 0 4 0 oak_planks        agent 1 answers    /setblock 1 4 0 obsidian
                       /setblock 2 4 0 stone                                /setblock 1 0 0 white_concrete

4 of I's 13 cells are filled and no others; no equal blocks touch, and each agent used both of its blocks: reward =
2 x 4/13 = 0.615. The training reward is 0.615 - 2 = -1.385, score is 100 x IoU = 30.8, and since -1.385 is not above
-0.1 there is a next turn: each agent gets its own answer back and is told which cells belong to the string.

    python tasks.py --task strbuild     # an item, what each agent sees, two answers and the reward taken apart
"""
import argparse
import ast
import contextlib
import copy
import fcntl
import functools
import inspect
import io
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
    targets: list = field(default_factory=list)  # value target, if it has any; both set in training
    advantages: list = field(default_factory=list)  # one per critic, then one per agent, normalised over the step


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


def printable(text):
    """Text whose control characters are spelled out, so that it cannot steer a terminal; line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def dialogue(task, episode, color, last=False):
    """An episode (or its last turn) as text: what each agent was told and answered, the world and the reward."""
    lines = []
    for t, turn in list(enumerate(episode.turns))[-1 if last else 0:]:
        for agent, response in enumerate(turn.responses):
            told = history(task, Episode(episode.item, episode.turns[:t]), agent)[-1]["content"]
            prompt, answer = printable(" ".join(told.split())), printable(response.strip() or "(nothing)").split("\n")
            suffix = f" ... {len(answer)} lines" if len(answer) > 4 else ""
            lines += [f"turn {t} | agent {agent} is told: {prompt if len(prompt) < 100 else prompt[:80] + ' ...'}",
                      f"       | agent {agent} answers: {'; '.join(answer[:4])}{suffix}"]
        lines += [*filter(None, [task.draw(episode.item, turn.outcome.world, color)]),
                  f"       | reward {turn.outcome.reward:.3f}, score {turn.outcome.score:.1f}\n"]
    return "\n".join(lines)


def record(task, episode, step):
    """An episode for samples.jsonl: what each agent was told, the messages of h_i,t, and its whole answers."""
    turns = [{"told": [history(task, Episode(episode.item, episode.turns[:t]), i) for i in range(task.num_agents)],
              "answers": turn.responses, "reward": turn.outcome.reward, "parts": turn.outcome.parts}
             for t, turn in enumerate(episode.turns)]
    return {"step": step, "item": episode.item, "score": episode.turns[-1].outcome.score, "turns": turns}

# --- what tasks have in common ----------------------------------------------------------------------------------------

class Task:
    """What tasks share; the methods that a new task must add stand at the top of this file."""
    turns, agents = 1, (1, 2)                         # T, the default of --num_turns; the possible numbers of agents
    feedback_modes, worlds = ["score"], ["rebuilt"]   # the first one is the default
    max_new_tokens, steps, batch_size, lr = 128, 20, 16, 1e-3  # the train scripts' defaults for the tiny base, and
    real = {"max_new_tokens": 256, "steps": 25, "batch_size": 16, "lr": 5e-4, "critic_lr": 2e-4, "temperature": 0.7,
            "eval_items": 24}  # those that differ for any other model; tried with one of 135M parameters on tldr
    one_writes_both = False                           # whether a tiny agent alone needs two agents' tokens
    base_batch, base_steps = 6, 1400                  # the tiny base: conversations per training step, steps
    pattern = r" ?[\p{L}_']+|\d|\s+|[^\s\p{L}]"      # splits text into words for the tiny base's tokenizer
    fixed_items, drawn = [], 2000                     # built-in items: these, and so many random ones
    source = ""                                       # the key of an item that is a text, if it is
    hub_sources, plan = [], None  # real data: [(name, training split, held-out split)]; what minecraft_sim.draw shows

    def __init__(self, num_agents=2, num_turns=None, feedback=None, data="builtin", reward="dense", world="rebuilt",
                 model="tiny"):
        self.name = self.base = type(self).__name__.lower()
        self.is_real = {*model.split(",")} != {"tiny"} and not Path(model, "trained_on.txt").exists()  # fuller prompts
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
        """The train scripts' defaults that depend on the task and its model."""
        tiny = {name: getattr(self, name) for name in ("num_turns", "max_new_tokens", "steps", "batch_size", "lr")}
        tiny |= {"critic_lr": 2e-3, "temperature": 1.0, "eval_items": 128, "feedback": self.feedback_mode}
        own = tiny | self.real if self.is_real else tiny
        twice = self.num_agents == 1 and (self.is_real or self.one_writes_both)  # alone, it writes both answers
        return own | {"max_new_tokens": own["max_new_tokens"] * (1 + twice)}

    def checksum(self):
        """A checksum of the items, for --resume."""
        return zlib.crc32(json.dumps([self.train_items, self.eval_items]).encode())

    def builtin_items(self):
        rng = random.Random(0)
        items = self.fixed_items + [self.random_item(rng) for _ in range(self.drawn)]
        items = list({json.dumps(item): item for item in items}.values())  # each of them once
        return [item for item in items if not self.is_held_out(item)], list(filter(self.is_held_out, items))[:128]

    def is_held_out(self, item):
        """Whether an item, one in ten, is kept out of training and demonstrations; key(item) alone decides."""
        return zlib.crc32(self.key(item).encode()) % 10 == 3

    def random_training_item(self, rng):
        item = self.random_item(rng)
        return self.random_training_item(rng) if self.is_held_out(item) else item

    def check(self, record):
        """The item that one line of --data FILE.jsonl describes, or ValueError."""
        raise InputError(f"{self.name} takes no items of your own: it has no check(record).")

    def own_item(self, text):
        """A person's item: a JSON object as in --data, or just its text, if such items are texts; or InputError."""
        try:
            return self.check(json.loads(text) if text.lstrip().startswith("{") else {self.source: text.strip()})
        except ValueError as error:
            raise InputError(f"this is no item of {self.name}: {error}") from None

    def instructions(self, agent):
        """The rules, given once as the system message."""
        return f"You are agent {agent + 1} of {self.num_agents}. You cannot talk to each other."

    def judge_all(self, items, answers, turn, worlds):
        """Outcomes of one joint action per item; overridden by tasks that judge many faster than one by one."""
        return [self.judge(item, responses, turn, world) for item, responses, world in zip(items, answers, worlds)]

    def outcome(self, reward, score, parts, turn, done, world=None, feedback=None):
        """An Outcome; default feedback: the dense reward. A sparse reward is 0 in all turns but the episode's last."""
        numbers = {name: part for name, part in parts.items() if not isinstance(part, list)}  # evaluations average them
        for name, number in [("reward", reward), ("score", score), *numbers.items()]:
            if not (isinstance(number, (int, float)) and abs(number) < math.inf):
                raise InputError(f"task {self.name}: {name} is {number!r} at turn {turn}; it must be a finite number.")
        known = vars(self).setdefault("part_names", list(numbers))
        if set(numbers) != set(known):
            raise InputError(f"task {self.name}: parts are {list(numbers)} at turn {turn} and were {known} before.")
        feedback = feedback or [f"Turn {turn + 2}. The last answers were worth {reward:.1f}."] * self.num_agents
        again = "\nWrite a whole new answer, a better one." * (self.is_real and not self.persistent)
        feedback = [told + again for told in feedback]
        reward = 0.0 if self.sparse and not done and turn + 1 < self.num_turns else reward
        return Outcome(reward, score, parts, done, feedback, world)

    def demonstration(self, rng):
        """A conversation with the expert, on which the tiny base is trained."""
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
        """A conversation that practises what the tiny base learns too slowly from demonstrations."""
        return self.demonstration(rng)

    def draw(self, item, world, color=False):
        return sim.draw(self.plan(item), world, color) if self.plan else ""

# --- strbuild: write a string in blocks -------------------------------------------------------------------------------

class StrBuild(Task):
    """Two builders write a string in 5x5 letters, each with two blocks of its own; equal neighbours cost reward.

    Rules and reward: minecraft_sim.strbuild_score. The training reward is reward - 2; above -0.1 the episode ends.
    Held out are ICML and CLIM, the paper's evaluation strings, and one in ten of all others of two or more letters.
    """
    # a cell is one token, and a block with the line break and the command after it is another: 2 tokens per command;
    # each letter and its number are separate tokens, so that unseen strings consist of seen tokens
    pattern = r" \d+ \d+ \d+| \d+:| \w+\n(?:/setblock)?|\n?/setblock|\n|[A-Z0-9]| ?[\p{L}_']+|\s+|[^\s\p{L}]"
    source = "string"
    turns, feedback_modes, worlds = 4, ["position", "score", "perfect"], ["rebuilt", "persistent"]
    fixed_items, drawn, plan = [{"string": "ICML"}, {"string": "CLIM"}], 6000, staticmethod(sim.wall_plan)
    base_steps, steps = 2000, 32
    real = Task.real | {"max_new_tokens": 512, "batch_size": 8, "lr": 1e-4, "eval_items": 16}
    max_commands, max_new_tokens = 300, 160  # the largest string has 64 cells of 2 tokens, and 3 more tokens per letter

    def setup(self):
        if self.persistent:  # a string has a letter per turn, and more cells than one turn less has room for
            if not 2 <= self.num_turns <= 8:
                raise InputError(f"a persistent world takes 2 to 8 turns, not {self.num_turns}.")
            self.base, self.base_batch, self.max_commands, self.max_new_tokens = "strbuild-persistent", 14, 14, 40
            self.fixed_items = [item for item in self.fixed_items if len(item["string"]) == self.num_turns]
        self.palettes = sim.PALETTES if self.num_agents == 2 else [sum(sim.PALETTES, [])]  # one agent has all of them

    def check(self, record):
        string = record.get("string")
        if not (isinstance(string, str) and re.fullmatch("[A-Za-z0-9]{1,64}", string)):
            raise InputError(f'a line needs a "string" of at most 64 letters A-Z and digits 0-9, not {string!r:.90}')
        return {"string": string.upper()}

    def random_item(self, rng):
        length = self.num_turns if self.persistent else rng.choice([1, 2, 3, 3, 4, 4, 4, 4])
        string = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(length))
        too_small = self.persistent and len(sim.target_cells(sim.string_target(string))) <= (length - 1) * self.max_commands
        return self.random_item(rng) if too_small else {"string": string}

    def key(self, item):
        return item["string"]

    def is_held_out(self, item):
        return item in StrBuild.fixed_items or len(item["string"]) > 1 and super().is_held_out(item)

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
        wall = "\n".join(["The wall, # to be filled, from y 4 down to 0:", *sim.string_target(item["string"]), ""])
        return f"{wall * self.is_real}Build{sim.letters_text(item['string'])} with {' '.join(self.palettes[agent])}."

    def judge(self, item, responses, turn, world=None):
        string, start, feedback = item["string"], self.persistent and world or {}, []
        rows = sim.string_target(string)
        parts = sim.strbuild_score(rows, responses, self.palettes, self.max_commands, start)
        world, accepted, _ = sim.strbuild_world(rows, responses, self.palettes, self.max_commands, start)
        target = sim.target_cells(rows)
        cells, parts["overlap"] = sim.letters_text(string, target, by_color=True), sim.overlap(target, accepted)
        for palette in self.palettes:  # other agents' blocks are not revealed
            own = {cell for cell, block in world.items() if block in palette}
            told = {"score": f"The last build was worth {parts['reward']:.2f} of 2.",
                    "perfect": f"Your wrong cells:{sim.cells_text(sorted(own.difference(target))) or ' none'}.",
                    "position": f"Your {len(own)} blocks:{sim.letters_text(string, own)}." if self.persistent else (
                        f"The cells:{cells}. Fill about half, no equal neighbours.")}
            feedback.append(f"Turn {turn + 2} of {self.num_turns}. {told[self.feedback_mode]}")
        reward = parts["reward"] - 2
        return self.outcome(reward, 100 * parts["iou"], parts, turn, reward > -0.1, world, feedback)

    # the sloppy expert: it knows the shapes of letters and has many habits, good and bad, from which RL selects
    letter_habits = {"none": 5, "all": 8, "first": 2, "last": 2}  # habit: its weight
    block_habits = {"one": 3, "checker": 6}
    letter_habits_persistent = {"none": 4, "turn": 2, "any": 4}  # no letter, turn t's, any
    block_habits_persistent = {"one": 3, "random": 4, "checker": 2}

    def with_turns(self, rng):
        """A copy for one conversation of the tiny base: of 2 to 8 turns in a persistent world, else of the default."""
        task = copy.copy(self)
        task.num_turns = rng.randint(2, 8) if self.persistent else self.turns
        return task

    def demonstration(self, rng):
        """A conversation with two answers; the tiny base learns all of its messages but the first."""
        team = self.with_turns(rng)
        item, team.num_agents = team.random_training_item(rng), rng.choice([2, 2, 1])  # alone in a third of them
        team.setup()
        agent, team.feedback_mode = rng.randrange(team.num_agents), rng.choices(self.feedback_modes, [8, 1, 1])[0]
        num_judged = rng.randint(1, team.num_turns - 1) if self.persistent else 1
        answers = [team.expert(item, agent, rng, turn) for turn in range(num_judged + 1)]
        first_turn, world = 0 if self.persistent else rng.randrange(3), None
        for turn, answer in enumerate(answers[:num_judged], first_turn):
            outcome = team.judge(item, [answer if i == agent else "" for i in range(team.num_agents)], turn, world)
            world = outcome.world
        return chat_messages(team.observation(item, agent), answers[-2], outcome.feedback[agent], answers[-1])

    def exercise(self, rng):
        """A conversation in which the string is only spelled, twice."""
        # else only one token in some thirty looks up which letter has a given number, and the tiny base would know all
        # shapes long before it stops guessing letters
        string = self.with_turns(rng).random_training_item(rng)["string"]
        answer = sim.letters_text(string, end="\n")
        return chat_messages(f"Spell{sim.letters_text(string)}.", answer, "Again.", answer)

    def expert(self, item, agent, rng, turn=0):
        """Its habits decide which letters it builds, often none at all, and with which blocks; in a team half of each.

        That half is one color of a checkerboard, at random, or in a persistent world the upper or the lower cells.
        """
        letter_habit, block_habit = (rng.choices(list(habits), habits.values())[0] for habits in (
            (self.letter_habits_persistent, self.block_habits_persistent) if self.persistent else
            (self.letter_habits, self.block_habits)))
        palette, answer, target = self.palettes[agent], "", sim.target_cells(sim.string_target(item["string"]))
        letters = [*sim.cells_by_letter(target, by_color=not self.persistent).items()]
        one = rng.choice(palette)
        if self.persistent:
            chosen = {"none": [], "turn": [letters[turn]], "any": [rng.choice(letters)]}[letter_habit]
        else:
            chosen = {"none": [], "all": letters, "first": letters[:1], "last": letters[-1:]}[letter_habit]
        if self.num_agents > 1:
            first = rng.random() < 0.5
            halves = [(len(cells) + 1) // 2 if self.persistent else sum((x + y) % 2 == 0 for x, y, _ in cells)
                      for _, cells in chosen]
            chosen = [(index, cells[:half] if first else cells[half:]) for (index, cells), half in zip(chosen, halves)]
        for index, cells in chosen:  # the heading, rejected at no cost, lets the tiny base look a letter up only once
            answer += f" {index + 1}:{item['string'][index]}\n"
            for x, y, z in cells:
                checker = palette[(x + y) // (1 if self.persistent else self.num_agents) % len(palette)]
                blocks = {"one": one, "random": rng.choice(palette), "checker": checker}
                answer += f"/setblock {x} {y} {z} {blocks[block_habit]}\n"
        return answer or "nothing\n"

# --- housebuild: fill the boxes of a house ----------------------------------------------------------------------------

class HouseBuild(Task):
    """Builders with limited blocks fill the boxes of a house, and one of them must kill the spiders.

    Rules and reward: minecraft_sim.housebuild_score. The training reward is reward - 1; above -0.05 the episode ends.
    """
    # a number, the line break and the command are one token, each corner is one, the block is one: 4 tokens per box
    pattern = r" \d+ \d+ \d+| \d+:(?:\nfill)?| \w+\n|\n|kill| \d+| ?[\p{L}_']+|\s+|[^\s\p{L}]"
    turns = 4
    max_new_tokens, steps, lr, plan, real = 130, 28, 2e-3, staticmethod(sim.house_plan), StrBuild.real

    def random_item(self, rng):
        layers, inventory = sim.random_house(rng)
        return {"layers": layers, "inventory": inventory, "spider_attacks": [rng.randint(1, 3) for _ in range(3)]}

    def key(self, item):
        return json.dumps(item["layers"])

    def check(self, record):
        return sim.check_house(record.get("layers"), record.get("inventory"), record.get("spider_attacks", []))

    def instructions(self, agent):
        return (f"You are builder {agent + 1} of {self.num_agents}. Together you build a house, and you cannot talk to "
                "each other. Answer with lines of the form fill x1 y1 z1 x2 y2 z2 block and nothing else; x runs from "
                "left to right, y up, z to the back, both corners belong to the box. You are shown the house box by "
                "box and how many blocks you have of each kind; in a team nobody has enough for all of it. Spiders "
                "attack unless one of you writes the line kill.")

    def observation(self, item, agent):
        limits = sim.block_limits(sim.house_target(item["layers"], item["inventory"]), self.num_agents)
        blocks = "".join(f" {count} {block}" for block, count in limits.items())
        attacks = "".join(f" {attack}" for attack in item["spider_attacks"])
        return f"Spiders{attacks}. You have{blocks}. The house:\n{sim.house_text(item['layers'], item['inventory'])}"

    def judge(self, item, responses, turn, world=None):
        house = item["layers"], item["inventory"]
        parts = sim.housebuild_score(*house, responses, spider_attacks=item["spider_attacks"])
        world, accepted, _ = sim.housebuild_world(*house, responses)
        parts["kills"] = sum(sim.KILL in commands for commands in accepted)
        parts["overlap"] = sim.overlap(sim.house_target(*house), accepted)
        reward = parts["reward"] - 1
        return self.outcome(reward, 100 * parts["iou"], parts, turn, reward > -0.05, world)

    # the sloppy expert: its habit decides which boxes it fills; if it kills, it leaves out the first quarter of these
    box_habits = {"none": 3, "all": 2, "odd": 2, "even": 2, "first": 2, "last": 2, "some": 3}

    def expert(self, item, agent, rng):
        """A heading such as " 7:" precedes each command, because a tiny base finds a box by its number."""
        habit = rng.choices(list(self.box_habits), self.box_habits.values())[0]
        boxes = sim.house_text(item["layers"], item["inventory"]).splitlines(keepends=True)
        chosen = {"none": [], "all": boxes, "odd": boxes[::2], "even": boxes[1::2], "first": boxes[:len(boxes) // 2],
                  "last": boxes[len(boxes) // 2:], "some": [box for box in boxes if rng.random() < 0.5]}[habit]
        kill = rng.random() < 0.4
        fills = "".join(chosen[kill * len(chosen) // 4:]).replace(": ", ":\nfill ")
        return "kill\n" * kill + fills or "nothing\n"

    def exercise(self, rng):
        """A conversation in which a short list of random boxes is copied."""
        boxes = sim.boxes_text([([rng.randrange(8) for _ in range(3)], [rng.randrange(8) for _ in range(3)],
                                 rng.choice(sim.HOUSE_BLOCKS)) for _ in range(rng.randint(3, 9))])
        return chat_messages(f"The house:\n{boxes}", boxes.replace(": ", ":\nfill "))

# --- tldr and arxiv: two texts that belong together -------------------------------------------------------------------

TRANSITIONS = {  # regular expressions, which find "as" in "was" and "while" in "meanwhile"
    "elaboration": "furthermore|in addition|moreover|additionally",
    "examples": "for example|for instance|such as|namely",
    "explanation": "in other words|that is to say|specifically|to clarify",
    "cause_effect": "therefore|as a result|consequently|thus|hence|because",
    "contrast": "however|although|on the other hand|while|in contrast|nevertheless",
    "sequence": "in summary|meanwhile|firstly|secondly|subsequently",
    "emphasis": "indeed|above all|in particular|notably",
    "summary": "in summary|in conclusion|to sum up|overall",
    "comparison": "similarly|likewise|in the same way|compared to",
    "concession": "however|although|while|despite|even though",
    "condition": "provided that|unless|in case|otherwise",
    "time": "meanwhile|as|while|afterwards|beforehand"}
STOPWORDS = set("""a about above after again against all am an and any are as at be because been before being below
    between both but by can did do does doing down during each few for from further had has have having he her here hers
    him his how i if in into is it its itself just me more most my no nor not now of off on once only or other our out
    over own same she should so some such than that the their them then there these they this those through to too under
    until up very was we were what when where which while who whom why will with you your""".split())


def trapezoid(x, low, rise, fall, high):
    """1 between rise and fall, linear down to 0 at low and high; None outside [low, high]: the level has failed.

    trapezoid(1.35, 1.1, 1.6, 3.2, 5.0) is 0.5, at 1.1 it is 0.0 and at 1.0 None.
    """
    return min(1.0, (x - low) / (rise - low), (high - x) / (high - fall)) if low <= x <= high else None


def writing_levels(first, second, num_words, length_ratio, vocabulary_ratio, full_overlap, transitions_in_both):
    """The four levels of the reward of two texts, {name: points}; from the first one that fails they give 0.

    num_words: fewest and most words of a text; *_ratio: trapezoids of second / first in characters and distinct words;
    full_overlap: the Jaccard overlap of content words that earns all points; transitions_in_both: not in second alone.
    """
    fit = all(num_words[0] <= len(text.split()) <= num_words[1] for text in (first, second))
    one, two = (set(re.findall(r"\w+", text.lower())) for text in (first, second))
    text = (first + second if transitions_in_both else second).lower()
    categories = sum(bool(re.search(phrases, text)) for phrases in TRANSITIONS.values())
    transitions = min(1.0, 0.4 + 0.05 * (categories - 1)) if categories else 0.0
    shared, union = (one & two) - STOPWORDS, (one | two) - STOPWORDS
    overlap = min(len(shared) / len(union) if union else 1.0, full_overlap) / full_overlap
    levels = {"structure": (0.5, 1.0 if fit else None),  # name: (its most points, the share that is earned)
              "coordination": (1.0, trapezoid(len(second) / max(1, len(first)), *length_ratio)),
              "vocabulary": (0.5, trapezoid(len(two) / len(one) if one else 0, *vocabulary_ratio)),
              "style": (1.0, 0.4 * transitions + 0.6 * overlap)}
    earned = itertools.takewhile(lambda level: level[1][1] is not None, levels.items())
    return dict.fromkeys(levels, 0.0) | {name: most * share for name, (most, share) in earned}


def tldr_reward(first, second):
    """The joint reward of a concise and a detailed summary, 0..3 (the best is 2.98); see writing_levels.

    Eight times "red", twenty times "blue": 31 and 99 characters, ratio 3.19, give 0.5 + 1; one distinct word fails.
    """
    return sum(writing_levels(first, second, **TLDR.levels).values())


def arxiv_reward(first, second):
    """The joint reward of a paper's background and motivation, and its methodology and implications, 0..3."""
    return sum(writing_levels(first, second, **ArXiv.levels).values())


OPENERS = ("Furthermore|In addition|For example|In other words|Therefore|However|Meanwhile|Indeed|In summary|Similarly|"
           "Despite this|Otherwise|Afterwards|As a result|On the other hand|Notably").split("|")


class Writing(Task):
    """Two texts about a source text, which must fit each other; a single agent writes both, a line ===== in between.

    The training reward is that of writing_levels, 0..3; above 2.9 the episode ends. tldr and arxiv set source, its key
    in an item; roles, who writes what, and what real models are told besides; levels, the bounds of the reward; facts,
    template and sentences, of which items and demonstrations are made; and an expert's habits, of which each text draws
    one: keep, how likely a sentence is kept; max_sentences, by role; opened, the share of sentences with a transition.
    """
    short_start, opened, one_writes_both = "", [0, 0.3, 1], True  # short_start: how a text that is too short begins

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
        team = "You write two texts" if self.num_agents == 1 else (
            "You share a task with another writer and cannot talk to each other. There are two texts")
        (fewest, most), (_, low, high, _) = self.levels["num_words"], self.levels["length_ratio"]
        return (f"{team}: {self.roles[0]}, and {self.roles[1]}. The second is {low} to {high} times as long and has "
                f"{self.distinct} different words. Each has {fewest} to {most} words. Both use the key words of the "
                "source. Answer with your text and nothing else.")

    def observation(self, item, agent):
        roles = [role + more * self.is_real for role, more in zip(self.roles, self.more)]
        roles = roles if self.num_agents == 1 else roles[agent:agent + 1]
        return f"{item[self.source]}\nWrite {', then a line =====, then '.join(roles)}."

    def judge(self, item, responses, turn, world=None):
        first, second = responses if len(responses) == 2 else (
            part.strip() for part in (responses[0] + "=====").split("=====")[:2])
        parts = writing_levels(first, second, **self.levels)
        reward = sum(parts.values())
        return self.outcome(reward, 100 * reward / 3, parts, turn, reward > 2.9)

    def expert(self, item, agent, rng):
        """It goes through its sentences in order, leaves some out, and opens few or many with a transition."""
        texts = []
        for part in [0, 1] if self.num_agents == 1 else [agent]:
            sentences = [" ".join(sentence.split()) + "." for sentence in self.sentences[part].split(".")[:-1]]
            keep, limit, opened = rng.choice(self.keep), rng.choice(self.max_sentences[part]), rng.choice(self.opened)
            text = [self.short_start] if self.short_start and limit < len(sentences) else []
            for sentence in [s for s in sentences if rng.random() < keep][:limit] or sentences[:1]:
                if rng.random() < opened:
                    sentence = f"{rng.choice(OPENERS)}, {sentence[0].lower()}{sentence[1:]}"
                text.append(sentence.format(**item["facts"]))
            texts.append(" ".join(text))
        return " =====\n".join(texts)


class TLDR(Writing):
    """A concise and a detailed summary of a post."""
    source, hub_sources = "prompt", [("trl-lib/tldr", "train[:1000]", "test[:1000]")]
    roles = "a concise summary", "a detailed summary"
    more, distinct = (" of the post in one sentence of about 25 words", " of the post in four sentences of about 15 "
                      "words, with However, Therefore, For example, In addition"), "at least twice as many"
    levels = {"num_words": (8, 256), "length_ratio": (1.1, 1.6, 3.2, 5.0), "full_overlap": 0.03,
              "vocabulary_ratio": (1.3, 2.0, 1e8, 1e9), "transitions_in_both": False}  # many more words do not hurt
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
    roles, real = ("background and motivation", "methodology and implications"), Task.real | {"max_new_tokens": 288}
    more, distinct = (" of this paper in two long paragraphs, about 150 words", " of this paper in three long "
                      "paragraphs, about 220 words, with However, Therefore, For example, In addition"), "about as many"
    levels = {"num_words": (128, 256), "length_ratio": (0.8, 1.3, 1.6, 2.0), "full_overlap": 0.23,
              "vocabulary_ratio": (0.5, 0.7, 1.3, 1.7), "transitions_in_both": True}
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


def work():
    """Runs in a process of its own: holds an answer or, given pipes to such a process, tests it, but never both.

    So only values that the answer computed pass. Data of built-in types gets across; subclasses become their base. That
    excludes a Fraction, a generator, a function, an int of over 4300 digits, and changes of an argument in place.
    """
    import builtins, os, resource, sys
    kinds = {int: int.__repr__, float: float.__repr__, complex: complex.__repr__, str: str.__str__, dict: dict.items}
    kinds |= dict.fromkeys([list, tuple, set, frozenset, bytes], list) | {bool: "1".__mul__}  # bool("") is False
    kinds |= {e: lambda e: str(e)[:999] for e in vars(builtins).values() if BaseException in getattr(e, "__mro__", ())}
    names = {kind.__name__: kind for kind in kinds}
    def pack(value):  # (1, "a") becomes ("tuple", [("int", "1"), ("str", "a")])
        kind = next(filter(kinds.get, type(value).__mro__), None)
        parts = kinds[kind](value) if kind else value
        return (kind.__name__, parts if isinstance(parts, str) else [*map(pack, parts)]) if kind else value
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
    requests, replies, sys.stdin, sys.stderr = sys.stdin, sys.stderr, None, sys.stdout  # prints go nowhere
    if len(sys.argv) > 1:  # pipes to and from an answer: this is its judge
        import ast, signal, time
        to_answer, from_answer = open(int(sys.argv[1]), "w", 1), open(int(sys.argv[2]))
    os.geteuid() or (os.setgroups([]), os.setgid(65534), os.setuid(65534))  # root becomes nobody, without capabilities
    for name, limit in ("AS", 1 << 30), ("FSIZE", 10 ** 6), ("NOFILE", 64), ("CPU", 9), ("CORE", 0), ("NPROC", 0):
        try:  # without contextlib, whose import takes longer than an honest answer
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
        except (OSError, ValueError):
            pass  # a limit that is lower already; some on macOS
    for line in requests:
        try:
            match unpack(eval(line)):  # written by the trainer or by a judge
                case seconds, end, module, test:
                    signal.setitimer(signal.ITIMER_REAL, min(seconds, end - time.monotonic()))  # ends this process
                    ask(module)
                    result = exec(test, {"candidate": lambda *args, **kwargs: ask((args, kwargs))})
                case str(module):
                    result = exec(module, space := {})
                case args, kwargs:
                    result = space["candidate"](*args, **kwargs)
        except BaseException as error:
            result = error
        print(ascii(pack(result)), file=replies)


@functools.cache
def sandbox(source=inspect.getsource(work)):
    """The command that runs work: in bubblewrap, or without where that does not work, after one printed line."""
    python = [exe := os.path.realpath(sys._base_executable), "-ISWignore", "-c", source + "work()"]
    own = [shutil.which("unshare") or "", "--user"] * (os.geteuid() > 0)  # a user namespace: it traces nobody outside
    bwrap = [shutil.which("bwrap") or "", *"""--die-with-parent --new-session --unshare-ipc --unshare-net --unshare-pid
        --unshare-uts --unshare-cgroup-try --size 16777216 --tmpfs /tmp --chdir /tmp""".split()]
    for path in [*"/lib /lib64 /usr/lib /usr/lib64 /etc/ld.so.cache".split(), f"{sys.base_prefix}/lib", exe, *own[:1]]:
        bwrap += ["--dir", os.path.dirname(path), "--ro-bind-try", path, path]
    for path in filter(os.path.isdir, site.getsitepackages([sys.base_prefix])):  # packages may hold data sets
        bwrap += ["--size", "4096", "--tmpfs", path]
    for start in [*bwrap, "--remount-ro", "/", *own], [*bwrap, "--remount-ro", "/"], own, []:
        with contextlib.suppress(OSError):  # there is no such program
            ran = subprocess.run([*start, *python], input="'import math'\n", text=True, capture_output=True, env={})
            if ran.stderr == "None\n":
                if start[:1] != bwrap[:1]:
                    print("No working bubblewrap (apt-get install it): models' code can use your network and files.")
                return [*start, *python]
    raise InputError(f"nobody may not read {exe}: apt-get install bubblewrap, or chmod a+x the folders above.")


def run_tests(jobs):
    """For each (module, tests) a 1 for every test that passes, 0 for others; the first time-out ends them."""
    def start(*pipes, command=sandbox()):
        with tempfile.TemporaryDirectory() as cwd:  # gone as soon as the process runs in it: no file can be made
            return subprocess.Popen([*command, *map(str, pipes)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                    stderr=subprocess.PIPE, errors="replace", env={}, cwd=cwd, pass_fds=pipes,
                                    start_new_session=True)
    def run_pair(job):
        (module, tests), verdicts, end = job, "", time.monotonic() + TIME_LIMITS[1]
        while len(verdicts) < len(tests):  # a crash of the answer ends both processes and costs one test
            requests = [ascii([TIME_LIMITS[0], end, module, test]) for test in tests[len(verdicts):]]
            with start() as answer, start(answer.stdin.fileno(), answer.stderr.fileno()) as judge:
                lines = judge.communicate("\n".join(requests))[1].splitlines()
                with contextlib.suppress(OSError):  # macOS refuses if the process has ended
                    os.killpg(answer.pid, signal.SIGKILL)
            verdicts += "".join("01"[line == "None"] for line in lines) + "0" * (len(tests) if judge.returncode else 1)
        return verdicts[:len(tests)]
    return list(ThreadPoolExecutor(os.cpu_count()).map(run_pair, jobs))


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
    nodes = list(ast.walk(main))
    calls = [node for node in nodes if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "aux"]
    unused = any(isinstance(node, ast.Expr) and node.value in calls for node in nodes)
    match main.body[ast.get_docstring(main, clean=False) is not None:]:
        case [ast.Return(value)]:
            thin_wrapper = value in calls
        case [ast.Assign([ast.Name(x)], value) | ast.AnnAssign(ast.Name(x), _, value), ast.Return(ast.Name(y))]:
            thin_wrapper = value in calls and x == y
        case _:
            thin_wrapper = False
    return 0.5 + 1.0 * (not thin_wrapper) - 0.5 * unused if calls else 0.0


def coophe_tests(test):
    """The asserts in check that name candidate, each once; a body of more than one-line asserts is a single test.

        def check(candidate):
            assert candidate(2) == 4
            assert True                        ->   ["assert candidate(2) == 4"]
    """
    test = re.sub(r"\r\n?", "\n", test)  # line breaks as the parser counts them
    tree, error = parse_python(test)
    nodes = tree.body if tree else []
    check = next((node for node in nodes if isinstance(node, FUNCTION_NODES) and node.name == "check"), None)
    body = [node for node in check.body if not isinstance(node, ast.Pass) and not (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))] if check else []
    if all(isinstance(node, ast.Assert) and check.lineno < node.lineno == node.end_lineno for node in body):
        lines = dict.fromkeys(test.split("\n")[node.lineno - 1].strip() for node in body)
        tests = [line for line in lines if line.startswith("assert") and "candidate" in line]
    else:
        tests = [f"{ast.unparse(check)}\ncheck(candidate)"] * any("candidate" in ast.unparse(node) for node in body)
    if not tests:
        raise InputError(f"a coophe problem needs check(candidate) with asserts that name candidate: {error or test!r}")
    others = [ast.unparse(node) for node in nodes if node is not check]
    others = [line for line in others if not line.startswith(("METADATA", "check(", "from __future__"))]
    return ["\n".join([*others, test]) for test in tests]


def coophe_rewards(triples):
    """coophe_reward of many (item, aux, main), as many at a time as there are cores."""
    found, jobs = [], []
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
        level = ("main has no function with a return" if not main_returns else f"syntax error: {error}" if error else
                 "" if aux_returns else "aux has no function with a return")
        reward, runs = 0.4 * aux_returns + 0.6 * main_returns, main_returns and not error
        bonus = aux_bonus(main_node) if runs and aux_node else 0.0
        found.append((reward + 0.5 * runs, tests, bonus, level))
        before = "\n".join([*context, "import math", f"{name} = candidate"])
        jobs.append((f"{module}\ncandidate = {name}", [f"{before}\n{test}" for test in tests] * runs))
    results = []
    for (reward, tests, bonus, level), verdicts in zip(found, run_tests(jobs)):
        reward += verdicts.count("1") / len(tests) + bonus * ("1" in verdicts)
        failed = " ".join(map(str.strip, tests[verdicts.index("0")].splitlines()))[:192] if "0" in verdicts else ""
        level = level or (f"failed: {failed}" if failed else "passed" if bonus else "main does not use aux")
        results.append({"reward": reward, "passed": verdicts.count("1"), "total": len(tests), "level": level})
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
    steps, batch_size, lr, one_writes_both, real = 14, 32, 2e-3, True, Task.real | {"lr": 1e-4}
    hub_sources = [("OpenMLRL/CoopHumanEval", "test[16:]", "test[:16]"),
                   ("openai/openai_humaneval", "test[32:]", "test[:32]")]

    def random_item(self, rng):
        family, goal = rng.choice(list(FAMILIES)), rng.choice(list(GOALS))
        kind, what, ask = FAMILIES[family]
        name, k = f"{goal}_{family}", rng.randint(2, 4 if kind == "word" else 9)
        values = {"number": lambda: rng.choice([rng.randint(1, 40), k ** rng.randint(1, 3), 11 * rng.randint(1, 9)]),
                  "word": lambda: rng.choice(WORDS),
                  "list": lambda: sorted(rng.choices([*range(10), k], k=rng.randint(1, 6)), reverse=rng.random() < 0.3)}
        namespace = {}
        exec(f"def aux(x):\n    return {ask.format(k=k)}\ndef {name}(items):\n    return "  # our code, not a model's
             + GOALS[goal][2].format(ask="aux(x)"), namespace)
        lists = [[values[kind]() for _ in range(rng.randint(2, 4))] for _ in range(8)]
        examples = [(items, namespace[name](items)) for items in lists]
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

    def instructions(self, agent):
        return ("Two programmers who cannot talk to each other solve a Python problem. One writes a helper function "
                "named aux, the other the function itself, which should call aux and do more than pass its result on. "
                "Answer with the Python code of your function, which returns its result, and nothing else: no example, "
                "no test, no remark.")

    def observation(self, item, agent):
        f, role = item["entry_point"], 2 if self.num_agents == 1 else agent
        tiny = ["Write aux.", "Write the function; aux is there.", "Write aux and the function."]
        real = [f"Write only def aux(...): a helper that does a part of the work of {f}, which somebody else writes.",
                f"Write only def {f}(...) as described above, which calls aux(...): this helper exists already.",
                f"Write def aux(...), a helper, and def {f}(...), which calls it."]
        return item["prompt"] + ("\n" + real[role] if self.is_real else tiny[role])

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

    habits = [{"one": 3, "many": 3, "wrong": 2, "broken": 2, "none": 4},  # of aux, of the function
              {"one": 3, "many": 3, "wrapper": 3, "alone": 3, "ignored": 2, "broken": 2, "none": 4}]

    def expert(self, item, agent, rng):
        return "".join(self.write(item, part, *rng.choices(list(self.habits[part]), self.habits[part].values()))
                       for part in ([0, 1] if self.num_agents == 1 else [agent]))

    def write(self, item, agent, habit):
        family, goal, k = item["facts"]
        (_, found, each), ask = GOALS[goal], FAMILIES[family][2].format(k=k)
        if habit == "none":
            return "" if agent else "nothing\n"
        if agent:
            body = {"one": each.format(ask="aux(x)"), "many": found.format(found="aux(items)"),
                    "wrapper": "aux(items)"}.get(habit, each.format(ask=f"({ask})"))
            head = f"def {item['entry_point']}(items" + (":\n" if habit == "broken" else "):\n")
            return head + "    aux(items)\n" * (habit == "ignored") + f"    return {body}\n"
        if habit == "many" and "aux" in ask:  # recursion
            return (f"def aux(items):\n    def one(x):\n        return {ask.replace('aux', 'one')}\n"
                    "    return [x for x in items if one(x)]\n")
        return {"one": f"def aux(x):\n    return {ask}\n", "wrong": f"def aux(x):\n    return not {ask}\n",
                "many": f"def aux(items):\n    return [x for x in items if {ask}]\n",
                "broken": f"def aux(x:\n    return {ask}\n"}[habit]

    def demonstration_feedback(self, item, responses, turn, rng):
        level = rng.choice(["aux has no function with a return", "main has no function with a return", "passed",
                            "main does not use aux", "syntax error: invalid syntax",
                            "failed: " + rng.choice(item["test"].split("\n    ")[1:])])
        return [f"Turn {turn + 2}. {level}"] * len(responses)  # random, because running the tests would take too long

# --- files: items, and the folder of a run ----------------------------------------------------------------------------

def read_jsonl(path, check):
    """Read a user's own items, one JSON object per line, as (train, eval); "split": "eval" marks held-out lines.

    check(record) returns the item or raises ValueError. Raises InputError that names the line.
    """
    items = {"train": [], "eval": []}
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        try:
            if text := line.decode("utf-8-sig").strip():
                record = json.loads(text)
                json.dumps(record, ensure_ascii=False).encode()  # half a character, as "\ud800", is a ValueError
                if not isinstance(record, dict) or record.get("split", "train") not in [*items]:
                    raise InputError('it is none, or its "split" is neither "train" nor "eval"')
                items[record.get("split", "train")].append(check(record))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number} must be an item as one whole JSON object in UTF-8: "
                             f"{getattr(error, 'msg', error)}") from None  # msg: without json's own line number
    if shared := [item for item in items["eval"] if item in items["train"]]:
        raise InputError(f"{path}: {shared[0]} is both a training line and a held-out line.")
    return items["train"], items["eval"]


def read_hub(sources, check):
    """Items of data sets on the Hugging Face hub as (train, eval); sources: [(name, training split, held-out split)].

    At most 128 held-out items, evenly spaced over their split. Rows that check rejects are left out with a note.
    """
    import datasets  # an optional dependency
    train, held_out = [], []
    for name, *splits in sources:
        for items, split in zip([train, held_out], splits):
            try:
                rows = datasets.load_dataset(name, split=split)
            except Exception as error:  # any, of the network, the hub or the cache
                raise InputError(f"{name} cannot be loaded, use --data builtin or FILE: {first_line(error)}") from None
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
        write(f"{path}.part")
        os.replace(f"{path}.part", path)
    except Exception as error:  # a full disk, say: make room
        Path(f"{path}.part").unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {first_line(error)}") from None


def number(kind, low, high=math.inf):
    """A type for argparse: number(int, 1)("0") is an error that says "invalid int of at least 1 value"."""
    def parse(text):
        if not low <= kind(text) <= high or kind(text) == math.inf:  # NaN is not in range either
            raise ValueError
        return kind(text)
    parse.__name__ = f"{kind.__name__} of at least {low}" + (f" and at most {high}" if high < math.inf else "")
    return parse


def read_config(out_dir):
    """The settings in a run folder's config.json; InputError if there are none."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        config = json.loads(Path(out_dir, "config.json").read_text(encoding="utf-8"))
        if "algorithm" in config:  # a model's folder has a config.json too
            return config
    raise InputError(f"{out_dir} is not a run folder: it has no readable config.json.")


def eval_defaults(folder):
    """What --eval_only takes from a run's config.json, where there is one, unless it is given."""
    config = read_config(folder) if Path(folder, "config.json").exists() else {}
    names = {"lora_rank", "dtype", "batch_size", "group_size", "max_new_tokens", "temperature", "top_p", *TASK_OPTIONS}
    return {name: config[name] for name in names & config.keys()}


class Output(io.TextIOWrapper):
    """A standard stream of a run: where it is closed or its disk is full, what is printed is lost, not the training."""

    def write(self, text):
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)


class Run:
    """A run's folder: config.json, log.jsonl, samples.txt, samples.jsonl, report.html, train_state.pt, agent_0/, ...

    What the log and the samples hold is a part of train_state.pt: --resume writes them anew, as of the last save.
    """
    # what --resume may change; of the items and the model's weights, checksums are kept
    may_change = {"steps", "resume", "overwrite", "eval_only", "eval_every", "save_every", "out_dir", "device",
                  "threads", "micro_batch", "gradient_checkpointing", "compile", "data", "model"}
    team = {"algorithm", "task", "world", "num_agents", "lora_rank"}  # what --eval_only may not change
    columns = [  # of the table that is printed: head, key in the log, width, digits
        ("step", "step", 5, 0), ("joint actions", "joint_actions", 15, 0), ("score", "/score", 8, 1),
        ("return", "/return", 9, 2), ("tokens", "/response_tokens", 8, 0), ("entropy", "policy/entropy", 9, 3),
        ("cut", "/truncated", 7, 2), ("seconds", "seconds", 9, 1)]

    def __init__(self, args, rank, given):
        """Raise InputError rather than overwrite another run or other files, or continue a run with other settings."""
        self.args, self.rank, self.interrupts, self.folder = args, rank, [], Path(args.out_dir)
        self.rows, self.warnings = 0, []  # printed so far
        self.texts = {"log.jsonl": "", "samples.txt": "", "samples.jsonl": ""}
        if not rank:
            fds = (os.dup(fd) if stream else os.devnull for fd, stream in ((1, sys.stdout), (2, sys.stderr)))
            sys.stdout, sys.stderr = (Output(open(fd, "wb", 0), "utf-8", write_through=True) for fd in fds)
        signal.signal(signal.SIGINT, lambda *_: sys.exit("interrupted: there was nothing to save yet"))
        if args.batch_size % args.group_size:
            raise InputError(f"group_size {args.group_size} does not divide batch_size {args.batch_size}.")
        if args.batch_size * args.ranks == 1 or getattr(args, "baseline", "none") != "none" and args.group_size == 1:
            raise InputError("advantages compare episodes: batch_size, and group_size with a baseline, must exceed 1.")
        if (self.folder / "config.json").exists():
            saved, new = read_config(self.folder), vars(args)
            if not (args.resume or args.overwrite or args.eval_only):
                raise InputError(f"{self.folder} holds another run; use --resume, --overwrite or another --out_dir.")
            fixed = set() if args.overwrite else self.team if args.eval_only else new.keys() - self.may_change
            if changes := ["the items differ" if key == "items" else f"{key} {saved.get(key)!r} -> {new[key]!r}"
                           for key in new if key in fixed and saved.get(key) != new[key]]:
                raise InputError(f"{self.folder} was made with other settings: {', '.join(changes)}.")
        elif args.resume:
            raise InputError(f"There is no run in {self.folder}.")
        elif args.eval_only:
            print(f"There is no run in {self.folder}: this evaluates the untrained team.")
        elif self.folder.exists() and {*os.listdir(self.folder)} - {".lock", "config.json.part"}:
            raise InputError(f"{self.folder} is not empty and holds no run; choose another --out_dir.")
        if not (args.eval_only or rank):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed when this process ends, however it does
            except BlockingIOError:
                raise InputError(f"another process is training in {self.folder}.") from None
        for title, names in ("given", given), (f"defaults of {args.task} with {args.model}", vars(args).keys() - given):
            settings = ", ".join(f"{name}={value}" for name, value in vars(args).items() if name in names)
            print(textwrap.fill(f"{title}: {settings or 'nothing'}", 100, subsequent_indent="    "))

    def prepare(self, keys):
        """Prepare the folder's files; returns what save() saved, for --resume and --eval_only, or None."""
        import torch  # `python tasks.py` needs none
        path, args, saved = self.folder / "train_state.pt", self.args, None
        if (args.resume or args.eval_only) and (path.exists() or (self.folder / "agent_0").exists()):
            try:
                saved = torch.load(path, map_location=args.device, weights_only=True)  # runs no code in it
                if missing := {*keys, "texts"} - saved.keys():
                    raise ValueError(f"it has no {min(missing)!r}")
            except Exception as error:  # a damaged file can raise anything
                raise InputError(f"{path} cannot be used: {first_line(error)}") from None
            print(f"{self.folder} was saved at step {saved['progress']['step']}")
            self.texts = saved["texts"]
        if not (args.eval_only or self.rank):
            for path in [*self.folder.iterdir()] if args.overwrite else []:
                if re.fullmatch(r"critic|(critic|agent)_\d+|train_state\.pt", path.name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            versions = {name: version(name) for name in ("torch", "transformers", "peft", "tiktoken", "tqdm")}
            config = json.dumps(vars(args) | {"versions": versions}, indent=2)
            for name, text in ("config.json", config), *self.texts.items():
                write_atomic(self.folder / name, lambda part: Path(part).write_text(text, encoding="utf-8"))
        return saved

    def save(self, state):
        import torch
        write_atomic(self.folder / "train_state.pt", lambda part: torch.save(state | {"texts": self.texts}, part))

    def log(self, line, task=None, episodes=()):
        """Append a line to log.jsonl, episodes to samples.jsonl, and four of them, for reading, to samples.txt."""
        step, records = line["step"], [json.dumps(record(task, e, line["step"])) + "\n" for e in episodes]
        texts = [f"=== step {step}, {episode.item}\n{dialogue(task, episode, False)}\n" for episode in episodes[:4]]
        for name, text in zip(self.texts, (json.dumps(line) + "\n", "".join(texts), "".join(records))):
            self.texts[name] += text
            if not self.rank:
                with exit_on_error(), open(self.folder / name, "a", encoding="utf-8") as file:
                    file.write(text)

    def show(self, line, seconds, left=None):
        """Print a line of the log as a row of a table; its heads return every 20 rows, a warning comes once."""
        kind = "eval" if "eval/score" in line else "train"
        line = {key.removeprefix(kind): value for key, value in line.items()} | {"seconds": seconds}
        row = "".join(f"{line[key]:{width}.{digits}f}" if key in line else " " * width
                      for _, key, width, digits in self.columns)
        heads = "".join(f"{head:>{width}}" for head, _, width, _ in self.columns) + "      left\n"
        tqdm.write(heads * (self.rows % 20 == 0) + row + (
            "  held-out" if left is None else f"{left // 60:7.0f}:{int(left % 60):02}"))
        self.rows += 1
        for holds, warning in [(line["/truncated"] > 0.5, "most answers are cut at max_new_tokens"),
                               (line.get("policy/grad_norm") == 0, "equal returns in a step: nothing to learn")]:
            if holds and warning not in self.warnings:
                self.warnings.append(warning)
                tqdm.write(f"warning: {warning}")

    def evaluations(self):
        """The first and the last evaluation of the run, lines of its log."""
        lines = [line for line in map(json.loads, self.texts["log.jsonl"].splitlines()) if "eval/score" in line]
        return lines[0], lines[-1]

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
TASK_OPTIONS = ["num_agents", "num_turns", "feedback", "data", "reward", "world", "model"]


def get_task(name, **options):
    """The task of that name; raises InputError where the name or an option is wrong."""
    if name not in TASKS:
        raise InputError(f"There is no task {name!r}; choose from {', '.join(TASKS)}.")
    return TASKS[name](**options)


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
        item = rng.choice(task.train_items)
        responses = [task.expert(item, i, rng) for i in range(task.num_agents)]
        outcome = task.judge(item, responses, 0)
        if args.svg:
            if not task.plan:
                raise InputError(f"{task.name} has no picture.")
            Path(args.svg).write_text(sim.draw_svg(task.plan(item), outcome.world), encoding="utf-8")
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback with | head
        for agent in range(task.num_agents):
            print(f"--- agent {agent}")
            told = history(task, Episode(item, [Turn(None, None, None, responses, outcome)]), agent)
            for message in told[:None if task.num_turns > 1 else -1]:  # the feedback, where there is a next turn
                print(f"{message['role']:>9}: " + message["content"].strip().replace("\n", f"\n{'':11}"))
        print(f"\n{task.draw(item, outcome.world, color=os.isatty(1))}\n")
        for name, part in outcome.parts.items():
            print(f"{name:>20}: {round(part, 3) if isinstance(part, float) else part}")
        print(f"training reward {outcome.reward:.3f}, score {outcome.score:.1f}, done {outcome.done}")


if __name__ == "__main__":
    main()
