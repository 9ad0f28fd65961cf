"""
Tasks: what each agent is shown, what its answer is worth, and when an episode ends.

A task is one class; everything else in this repository knows a task only by these names:

    name                                what --task and tables call it
    train_items, eval_items             lists of dicts; no item stands in both
    num_agents, num_turns               n agents, at most T turns
    instructions(agent)                 the rules, said once as system message
    observation(item, agent)            o_i,0: what agent i is shown first
    judge(item, responses, turn, world) an Outcome: reward, score, the end, and what each agent is told next; world is
                                        what the last turn's Outcome left, None at turn 0
    judge_all(items, answers, ...)      the same for many episodes at once
    expert(item, agent, rng)            one answer of a sloppy expert, who has many habits, good and bad
    demonstration(rng), exercise(rng)   one conversation of that expert, and one that practises what a task needs
                                        most; the tiny base is trained on these
    draw(item, world, color)            the world as text for a terminal; draw_svg(item, world) as a picture
    check(record)                       the item that a line of --data FILE.jsonl stands for, or ValueError
    settings()                          defaults of the train scripts
    base, base_batch, base_steps        name of the tiny base that fits (runs with one name share it), and how many
                                        conversations it learns from in how many steps
    pattern                             regular expression that cuts the task's text into words for the tiny tokenizer

The class Task has most of them; what a new task must say is random_item, key, observation, judge and expert.

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
import collections
import contextlib
import copy
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import warnings
import zlib
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import minecraft_sim as sim

# --- episodes ---------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What the environment says about one joint action."""
    reward: float           # r_t, the training reward, the same for every agent
    score: float            # percent: what tables show
    parts: dict             # the reward taken apart: name -> number
    done: bool              # solved: the episode ends before its last turn
    feedback: list          # per agent: what it is told before its next answer
    world: object           # what this joint action leaves behind; strbuild: {cell: block}


@dataclass
class Turn:
    """One joint action; a list has one entry per agent unless it says otherwise."""
    prompts: list           # token ids of the rendered history h_i,t
    tokens: list            # sampled token ids of a_i,t, the end token included unless the answer was cut
    logps: list             # log pi of each of those tokens, as sampled
    responses: list         # a_i,t as text
    outcome: Outcome
    critic_inputs: list = field(default_factory=list)  # one entry per critic: token ids of the history it reads
    values: dict = field(default_factory=dict)  # critic -> V(h_t) before it learned from this; set by the train script
    advantages: list = field(default_factory=list)  # one per agent, normalised over the step; set there, too


@dataclass
class Episode:
    """An item and the turns played on it so far."""
    item: dict
    turns: list = field(default_factory=list)

    @property
    def world(self):
        """What the last turn left behind, None before the first."""
        return self.turns[-1].outcome.world if self.turns else None

    @property
    def rewards(self):
        """r_0, r_1, ... of the turns played so far."""
        return [turn.outcome.reward for turn in self.turns]

    def returns(self, gamma):
        """Discounted sum of the rewards from each turn on: rewards [1, 2, 4] and gamma 0.5 give [3, 4, 4]."""
        return [sum(gamma ** k * reward for k, reward in enumerate(self.rewards[t:])) for t in range(len(self.turns))]


def talk(*texts):
    """Messages of a user and an assistant, who speak in turn."""
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(["user", "assistant"]), texts)]


def history(task, episode, agent):
    """The messages of h_i,t: the rules and o_i,0, then the agent's own last answer and what it was told about it.

    2 messages at turn 0, 4 later: like the official code, only the last answer is kept. Nothing of another agent is in
    here, so this is all that agent i needs when it works alone.
    """
    texts = [task.observation(episode.item, agent)]
    if episode.turns:
        last = episode.turns[-1]
        texts += [last.responses[agent], last.outcome.feedback[agent]]
    return [{"role": "system", "content": task.instructions(agent)}] + talk(*texts)


def first_line(error):
    """What an error says, in one line."""
    return (str(error) or repr(error)).splitlines()[0]


@contextlib.contextmanager
def refusing(parser):
    """What is wrong in this block ends the script: one sentence, exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    except ImportError as error:
        parser.exit(2, f"error: this needs a package: pip install {error.name}\n")


def minibatches(episodes, group_size, number, rng):
    """Shuffle groups of group_size episodes and deal them into at most `number` lists; each is one optimizer step."""
    groups = [episodes[k:k + group_size] for k in range(0, len(episodes), group_size)]
    rng.shuffle(groups)
    size = -(-len(groups) // number)
    return [sum(groups[k:k + size], []) for k in range(0, len(groups), size)]


def mean(numbers):
    """Mean of any iterable of numbers; 0 for none."""
    numbers = list(numbers)
    return sum(numbers) / max(1, len(numbers))


def summary(episodes, prefix, gamma, ends):
    """Means over episodes under the names of the log; return is discounted from the first turn.

    ends: the end token of each agent's model.

    Two episodes with rewards [-1, -2] and [-1] and gamma 0.5 have return -1.5, reward -4/3 and turns 1.5.
    """
    turns = [turn for e in episodes for turn in e.turns]
    answers = [tokens for turn in turns for tokens in turn.tokens]
    last = [e.turns[-1].outcome for e in episodes]
    numbers = {
        "return": mean(e.returns(gamma)[0] for e in episodes),
        "reward": mean(turn.outcome.reward for turn in turns), "score": mean(outcome.score for outcome in last),
        "turns": len(turns) / len(episodes), "response_tokens": mean(map(len, answers)),
        "truncated": mean(tokens[-1] != end for turn in turns for tokens, end in zip(turn.tokens, ends))}
    if prefix == "eval":  # the task's parts, of the last turn
        numbers |= {name: mean(outcome.parts[name] for outcome in last) for name, number in last[0].parts.items()
                    if not isinstance(number, list) and name not in numbers}
    return {f"{prefix}/{name}": number for name, number in numbers.items()}


def dialogue(task, episode, color):
    """A whole episode as text: what each agent was told and answered, the world and its reward, turn by turn."""
    lines = []
    for t, turn in enumerate(episode.turns):
        for agent, response in enumerate(turn.responses):
            told = " ".join(history(task, Episode(episode.item, episode.turns[:t]), agent)[-1]["content"].split())
            answer = response.strip().splitlines() or ["(nothing)"]
            more = f" ... {len(answer)} lines" if len(answer) > 4 else ""
            lines += [f"turn {t} | agent {agent} is told: {told if len(told) < 100 else told[:80] + ' ...'}",
                      f"       | agent {agent} answers: {'; '.join(answer[:4])}{more}"]
        lines += [task.draw(episode.item, turn.outcome.world, color),
                  f"       | reward {turn.outcome.reward:.3f}, score {turn.outcome.score:.1f}\n"]
    return "\n".join(lines)


def read_jsonl(path, check):
    """Items of a person's own file, one JSON object a line, as (train, eval); "split": "eval" marks held-out lines.

    check(object) returns the item or raises ValueError. Raises ValueError with one sentence and the line's number, and
    OSError if there is no such file.
    """
    items = {"train": [], "eval": []}
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:  # bad bytes become surrogates
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or record.get("split", "train") not in ("train", "eval"):
                    raise ValueError('a line is an object whose "split", if any, is "train" or "eval"')
                json.dumps(record, ensure_ascii=False).encode()
                items[record.get("split", "train")].append(check(record))
            except UnicodeEncodeError:
                raise ValueError(f"{path}, line {number}: this is not UTF-8 text") from None
            except (ValueError, RecursionError) as error:  # the file is a person's: say where it is broken
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not items["train"]:
        raise ValueError(f"{path} has no training line.")
    train = {json.dumps(item, sort_keys=True) for item in items["train"]}
    both = [item for item in items["eval"] if json.dumps(item, sort_keys=True) in train]
    if both:
        raise ValueError(f"{path}: {both[0]} is a training line and a held-out line; it can be only one.")
    return items["train"], items["eval"]


def read_hub(parts, check):
    """Items of data sets on the hub as (train, eval); parts: [(name, split to train on, split to hold out)].

    128 held-out items, evenly from the split. A row that check refuses is left out, and that is printed. Raises
    ValueError with one sentence without the data, and ImportError without the datasets package.
    """
    import datasets  # not everybody needs it
    train, held_out = [], []
    for name, *splits in parts:
        for kept, split in zip([train, held_out], splits):
            try:
                rows = datasets.load_dataset(name, split=split)
            except Exception as error:  # whatever went wrong on the way to the hub
                raise ValueError(f"{name} ({split}) cannot be loaded: {first_line(error)}; load it once with "
                                 "a network, or use --data builtin or --data FILE.jsonl.") from None
            for number, row in enumerate(rows):
                try:
                    kept.append(check(row))
                except ValueError as error:
                    print(f"{name}, {split}, row {number} is left out: {error}")
    held_out = held_out[::max(1, len(held_out) // 128)][:128]
    return [item for item in train if item not in held_out], held_out


# --- run folders ------------------------------------------------------------------------------------------------------


def write_atomic(path, write):
    """Call write(temporary path), then rename: a reader sees the old file or the new one, never half of one."""
    try:
        write(path + ".part")
        os.replace(path + ".part", path)
    except Exception as error:  # a full disk, say
        with contextlib.suppress(OSError):
            os.remove(path + ".part")
        raise OSError(f"{path} cannot be written: {first_line(error)}") from None


def write_text(path, text):
    write_atomic(path, lambda part: Path(part).write_text(text, encoding="utf-8"))


# may differ between a run and its continuation; another number of steps is another schedule of the learning rate
FREE = {"steps", "resume", "overwrite", "eval_only", "eval_every", "save_every", "wandb", "out_dir", "device",
        "threads", "micro_batch", "attn", "gradient_checkpointing", "compile"}
TEAM = {"algorithm", "task", "world", "model", "num_agents", "lora_rank"}  # what trained agents cannot do without
GAME = {"num_turns", "feedback", "reward", "data", "max_new_tokens", "temperature", "top_p", "gamma", "batch_size"}


def cut_log(out_dir, step, again):
    """Forget what log.jsonl and samples.txt say of steps after that one, and a line that was half written.

    again: is an evaluation due at that step? Then it is made once more, so what is there of it goes, too.
    """
    for name, entry in (("log.jsonl", r'^{"step": (\d+).*\n'),
                        ("samples.txt", r"^=== step (\d+)(?s:.*?)(?=^=== step|\Z)")):
        path = os.path.join(out_dir, name)
        if os.path.exists(path):
            text = Path(path).read_text(encoding="utf-8", errors="replace")  # a kill may have cut a character
            entries = re.finditer(entry, text, re.MULTILINE)
            write_text(path, "".join(found[0] for found in entries if int(found[1]) <= step - (
                again and (name == "samples.txt" or '"train/' not in found[0]))))


RANGES = {name: (1, 1e9) for name in (
    "max_new_tokens", "num_agents", "batch_size", "group_size", "passes", "minibatches", "micro_batch", "save_every",
    "critic_tokens")} | {name: (0, 1e9) for name in ("steps", "lr", "critic_lr", "clip", "eval_every")} | {
    "threads": (1, 1024), "lora_rank": (1, 4096), "num_turns": (1, 1000),
    "seed": (0, 2 ** 63 - 1), "gamma": (0, 1), "lam": (0, 1), "temperature": (1e-3, 1e3), "top_p": (1e-3, 1)}


def check_ranges(args):
    """Raise ValueError with one sentence for the first number that makes no sense."""
    for name, (low, high) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} must be at least {low:g} and at most {high:g}, not {value}.")
    if args.batch_size % args.group_size:
        raise ValueError(f"group_size {args.group_size} does not divide batch_size {args.batch_size}.")


def check_run_folder(args):
    """Refuse, with ValueError, to overwrite what is no run or another run, or to continue one with other settings."""
    path = os.path.join(args.out_dir, "config.json")
    if args.resume and args.overwrite:
        raise ValueError("--resume continues a run and --overwrite deletes it; give one of them.")
    if args.resume and args.eval_only:
        raise ValueError("--resume trains on and --eval_only only evaluates; give one of them.")
    try:
        saved = json.loads(Path(path).read_text()) if os.path.exists(path) else None
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(saved, dict) or "out_dir" not in saved:
        if args.resume:
            raise ValueError(f"There is no run to resume in {args.out_dir}.")
        if os.path.exists(args.out_dir) and not os.path.isdir(args.out_dir):
            raise ValueError(f"{args.out_dir} is a file; choose another --out_dir.")
        if os.path.exists(args.out_dir) and any(not name.endswith(".part") for name in os.listdir(args.out_dir)):
            raise ValueError(f"{args.out_dir} is not empty and holds no run; choose another --out_dir.")
        return
    if not (args.resume or args.overwrite or args.eval_only):
        raise ValueError(f"{args.out_dir} holds another run; use --resume, --overwrite or another --out_dir.")
    if args.resume or args.eval_only:
        if os.path.isdir(os.path.join(args.out_dir, "agent_0")) and not os.path.exists(
                os.path.join(args.out_dir, "train_state.pt")):
            raise ValueError(f"{args.out_dir} has agents but no train_state.pt, from which they could be trained or "
                             "evaluated.")
        differ = {key: f"{key} {saved[key]!r} -> {value!r}" for key, value in vars(args).items()
                  if key not in FREE and saved.get(key, value) != value}  # it may be older than a setting
        refused = [text for key, text in differ.items() if args.resume or key in TEAM]
        if refused:
            raise ValueError(f"{args.out_dir} was made with other settings: {', '.join(refused)}.")
        if changed := [text for key, text in differ.items() if key in GAME]:
            print(f"The team was trained with other settings: {', '.join(changed)}.")


def open_run_folder(args):
    """Make the folder, take out what an overwritten run wrote or a killed one left, and write config.json."""
    os.makedirs(args.out_dir, exist_ok=True)
    check_run_folder(args)  # again: another run may have begun there while the base was built
    written = r"\.saving-.*|.*\.part"
    if args.overwrite:
        written += r"|agent_\d+|critic(_\d+)?|log\.jsonl|samples\.txt|train_state\.pt"
    for path in [os.path.join(args.out_dir, name) for name in os.listdir(args.out_dir) if re.fullmatch(written, name)]:
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "tiktoken", "tqdm")}
    write_text(os.path.join(args.out_dir, "config.json"), json.dumps(vars(args) | {"versions": versions}, indent=2))


# --- what tasks have in common ----------------------------------------------------------------------------------------


class Task:
    """What tasks share. Each adds random_item, key, observation, judge and expert, and check for --data FILE.jsonl."""
    turns, agents = 1, (1, 2)                         # T unless --num_turns says otherwise; how many may play
    feedback_modes, worlds = ["score"], ["rebuilt"]   # the first one is the default
    max_new_tokens, base_batch, base_steps, pattern = 128, 6, 1400, r" ?[\p{L}_']+|\d|\s+|[^\s\p{L}]"
    steps, batch_size, lr = 20, 16, 1e-3              # what the train scripts use unless told
    first, drawn = [], 2000                           # built-in items: these, and so many random ones
    hub_parts = []                                    # real data: [(name, split to train on, split to hold out)]

    def __init__(self, num_agents=2, num_turns=None, feedback=None, data="builtin", reward="dense", world="rebuilt"):
        self.name = self.base = type(self).__name__.lower()
        if num_agents not in self.agents:
            raise ValueError(f"{self.name} is for num_agents {' or '.join(map(str, self.agents))}, not {num_agents}.")
        self.num_agents, self.num_turns, self.sparse = num_agents, num_turns or self.turns, reward == "sparse"
        self.feedback_mode, self.persistent = feedback or self.feedback_modes[0], world == "persistent"
        for kind, choice, choices in [("feedback", self.feedback_mode, self.feedback_modes),
                                      ("world", world, self.worlds), ("reward", reward, ["dense", "sparse"])]:
            if choice not in choices:
                raise ValueError(f"{self.name} has no {kind} {choice!r}; choose from {', '.join(choices)}.")
        self.setup()
        if data == "hub" and not self.hub_parts:
            raise ValueError(f"{self.name} has no data set on the hub; use --data builtin or a file of your own.")
        self.train_items, self.eval_items = (
            read_hub(self.hub_parts, self.check) if data == "hub" else self.builtin())
        if data not in ("builtin", "hub"):
            self.train_items, own = read_jsonl(data, self.check)
            self.eval_items = own or [item for item in self.eval_items if item not in self.train_items]
        if not (self.train_items and self.eval_items):
            raise ValueError(f"--data {data} leaves no item to {'evaluate' if self.train_items else 'train'} on.")

    def setup(self):
        """What a task needs to know before it can name its items."""

    def settings(self):
        """The train scripts' defaults that depend on the task, and a checksum of its items for --resume."""
        own = {name: getattr(self, name) for name in ("num_turns", "max_new_tokens", "steps", "batch_size", "lr")}
        items = json.dumps([self.train_items, self.eval_items])
        return own | {"feedback": self.feedback_mode, "items": zlib.crc32(items.encode())}

    def builtin(self):
        rng = random.Random(0)
        items = {json.dumps(item): item for item in [*self.first, *(self.random_item(rng) for _ in range(self.drawn))]}
        split = [[item for item in items.values() if self.held_out(item) == held] for held in (False, True)]
        return split[0], split[1][:128]

    def held_out(self, item):
        """One item in ten is never trained on, and in no demonstration; which ones, key(item) alone decides."""
        return zlib.crc32(self.key(item).encode()) % 10 == 3

    def shown(self, rng):
        """An item that is not held out."""
        while self.held_out(item := self.random_item(rng)):
            pass
        return item

    def check(self, record):
        raise ValueError(f"{self.name} reads no items of a person's own; it has no check(record).")

    def instructions(self, agent):
        return f"You are agent {agent + 1} of {self.num_agents}. You cannot talk to each other."

    def judge_all(self, items, answers, turn, worlds):
        """Outcomes of one joint action per item; for a task that is faster at many than one by one."""
        return [self.judge(item, responses, turn, world) for item, responses, world in zip(items, answers, worlds)]

    def outcome(self, reward, score, parts, turn, done, world=None, feedback=None):
        """An Outcome; without feedback everybody is told what the last answers were worth.

        A sparse reward is 0 in every turn but the episode's last.
        """
        told = feedback or [f"Turn {turn + 2}. The last answers were worth {reward:.1f}."] * self.num_agents
        paid = 0.0 if self.sparse and not done and turn + 1 < self.num_turns else reward
        return Outcome(paid, score, parts, done, told, world)

    def demonstration(self, rng):
        item, team = self.shown(rng), copy.copy(self)
        team.num_agents = rng.choice([*self.agents, self.agents[-1]])  # one base for all options
        team.feedback_mode = self.feedback_modes[0]
        agent, turn = rng.randrange(team.num_agents), rng.randrange(3)
        first = [team.expert(item, i, rng) for i in range(team.num_agents)]
        texts = [team.observation(item, agent), first[agent]]
        if self.turns > 1:
            texts += [team.told(item, first, turn, rng)[agent], team.expert(item, agent, rng)]
        return talk(*texts)

    def told(self, item, responses, turn, rng):
        """What the sloppy expert hears of its first answer in a demonstration."""
        return self.judge(item, responses, turn).feedback

    def exercise(self, rng):
        return self.demonstration(rng)

    def draw(self, item, world, color=False):
        return ""

    def draw_svg(self, item, world):
        raise ValueError(f"{self.name} has no picture.")


# --- strbuild: write a string in blocks -------------------------------------------------------------------------------


def by_letter(cells):
    """{place: its cells from the top}, places counted from 0: a letter is 5 columns wide and followed by 2 empty ones.

    by_letter([(7, 0, 0), (0, 3, 0), (0, 4, 0)]) is {0: [(0, 4, 0), (0, 3, 0)], 1: [(7, 0, 0)]}.
    """
    ordered = sorted(cells, key=lambda cell: (cell[0] // 7, -cell[1], cell[0]))
    return {place: list(group) for place, group in itertools.groupby(ordered, lambda cell: cell[0] // 7)}


class StrBuild(Task):
    """Two builders write a string in 5x5 letters, each with two blocks of its own; equal neighbours cost reward.

    Rules and reward: minecraft_sim.strbuild_score. The training reward is reward - 2; above -0.1 the episode ends.
    Built-in strings have 1 to 4 letters. ICML, CLIM (the paper's evaluation strings) and one in ten of the others that
    have two letters or more are held out: never trained on, and in no demonstration.
    """
    # a cell is one word, and so is a block with the line break and the command that follow it: 2 tokens a command;
    # places and letters stay apart, so that unseen strings are made of seen tokens
    pattern = r" \d+ \d+ \d+| \d+:| \w+\n(?:/setblock)?|\n?/setblock|\n|[A-Z0-9]| ?[\p{L}_']+|\s+|[^\s\p{L}]"
    turns, feedback_modes, worlds = 4, ["position", "score", "perfect"], ["rebuilt", "persistent"]
    first, drawn = [{"string": "ICML"}, {"string": "CLIM"}], 6000

    max_commands, max_new_tokens = 300, 160  # the longest string has 64 cells, 2 tokens each, and three more a letter

    def setup(self):
        if self.persistent:  # three turns' commands cannot fill any built-in string, and conversations are shorter
            self.base, self.base_batch, self.max_commands, self.max_new_tokens = "strbuild-persistent", 14, 14, 40
        self.palettes = sim.PALETTES if self.num_agents == 2 else [sum(sim.PALETTES, [])]  # one agent owns them all

    @staticmethod
    def check(record):
        if not isinstance(record.get("string"), str):
            raise ValueError('a line needs a "string", as in {"string": "ICML"}')
        sim.string_target(record["string"])
        return {"string": record["string"].upper()}

    def random_item(self, rng):
        while True:
            string = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(
                4 if self.persistent else rng.choice([1, 2, 3, 3, 4, 4, 4, 4])))
            if not self.persistent or len(sim.target_cells(sim.string_target(string))) > 3 * self.max_commands:
                return {"string": string}

    def key(self, item):
        return item["string"]

    def held_out(self, item):
        return item in self.first or len(item["string"]) > 1 and super().held_out(item)

    def instructions(self, agent):
        blocks = " or ".join(self.palettes[agent])
        stay = (f"Blocks stay from turn to turn; a turn has room for {self.max_commands // self.num_agents} of your "
                "lines. " if self.persistent else "")
        return (f"You are builder {agent + 1} of {self.num_agents}. Together you write a string in blocks on a wall, "
                "and you cannot talk to each other. Letters are 5 columns wide and 5 rows high with 2 empty columns "
                "between them; x runs from left to right from 0, y from 0 at the bottom to 4 at the top, z is 0. Fill "
                "the cells of the letters and no others. Touching blocks of the same kind cost points; every kind "
                f"must be used. {stay}Answer with lines of the form /setblock x y z block and nothing else; "
                f"your blocks: {blocks}.")

    def observation(self, item, agent):
        return f"Build{self.spelled(item['string'])} with {' '.join(self.palettes[agent])}."

    @staticmethod
    def spelled(string, end=""):
        """" 1:I 2:C 3:M 4:L" for "ICML": which letter stands in which place."""
        return "".join(f" {k}:{letter}{end}" for k, letter in enumerate(string, 1))

    def judge(self, item, responses, turn, world=None):
        rows, start = sim.string_target(item["string"]), world if world and self.persistent else {}
        parts = sim.strbuild_score(rows, responses, self.palettes, self.max_commands, start)
        world = sim.strbuild_world(rows, responses, self.palettes, self.max_commands, start)[0]
        told = [f"Turn {turn + 2} of {self.num_turns}. {self.feedback(item, agent, world, parts['reward'])}"
                for agent in range(self.num_agents)]
        reward = parts["reward"] - 2
        return self.outcome(reward, 100 * parts["iou"], parts, turn, reward > -0.1, world, told)

    def feedback(self, item, agent, world, worth):
        """What an agent is told of the world that was built, and of nobody else's blocks in it."""
        if self.feedback_mode == "score":
            return f"The last build was worth {worth:.2f} of 2."
        target = sim.target_cells(sim.string_target(item["string"]))
        own = [cell for cell, block in world.items() if block in self.palettes[agent]]
        if self.feedback_mode == "perfect":
            wrong = sorted(set(own) - set(target))
            return f"Your wrong cells:{''.join(' %d %d %d' % cell for cell in wrong) or ' none'}."
        if self.persistent:
            return f"Your {len(own)} blocks:{self.listed(item['string'], own)}."
        return f"The cells:{self.listed(item['string'], target)}. Fill about half, no equal neighbours."

    @staticmethod
    def listed(string, cells):
        """" 2:C 8 4 0 9 4 0" for two cells of the C in "IC"; a cell between two letters belongs to the left one."""
        return "".join(f" {place + 1}:{string[place]}" + "".join(" %d %d %d" % cell for cell in group)
                       for place, group in by_letter(cells).items())

    def draw(self, item, world, color=False):
        return (sim.draw_ansi if color else sim.draw_text)(sim.wall_plan(sim.string_target(item["string"])), world)

    def draw_svg(self, item, world):
        return sim.draw_svg(sim.wall_plan(sim.string_target(item["string"])), world, item["string"])

    # the sloppy expert: it knows the letters and has many habits, good and bad, from which RL selects

    where = {"none": 5, "all": 1, "odd": 2, "even": 2, "first": 2, "last": 2, "some": 2}  # which letters: by place
    blocks = {"one": 3, "random": 4, "checker": 2}
    where_persistent = {"none": 4, "turn": 2, "any": 4}  # no letter, the turn's, any one; half of it if not alone

    def demonstration(self, rng):
        """Messages of a conversation of two answers; the tiny base learns all but the first of them."""
        item, team = self.shown(rng), copy.copy(self)
        team.num_turns = self.turns  # one base for all options
        team.num_agents = rng.choice([2, 2, 1])  # one in three: alone
        team.setup()
        agent, team.feedback_mode = rng.randrange(team.num_agents), rng.choices(self.feedback_modes, [8, 1, 1])[0]
        judged = rng.randint(1, 3) if self.persistent else 1
        answers = [team.expert(item, agent, rng, turn) for turn in range(judged + 1)]
        first, world = 0 if self.persistent else rng.randrange(3), None
        for turn, answer in enumerate(answers[:judged], first):
            outcome = team.judge(item, [answer if i == agent else "" for i in range(team.num_agents)], turn, world)
            world = outcome.world
        return talk(team.observation(item, agent), answers[-2], outcome.feedback[agent], answers[-1])

    def exercise(self, rng):
        """A conversation in which the string is only spelled, twice.

        To find the letter of a place in what it was shown is what the base learns slowest, since it needs it once in
        some thirty tokens: without this it still guesses letters when it has long known their shapes.
        """
        string = self.shown(rng)["string"]
        answer = self.spelled(string, "\n")
        return talk(f"Spell{self.spelled(string)}.", answer, "Again.", answer)

    def expert(self, item, agent, rng, turn=0):
        """Which letters it builds, often none at all, and with which blocks, are habits.

        A heading such as " 2:C" goes before each letter. The simulator rejects that line at no cost; to name the letter
        first lets the tiny base look it up once and not for each cell.
        """
        where, blocks = (rng.choices(list(habits), habits.values())[0] for habits in (
            self.where_persistent if self.persistent else self.where, self.blocks))
        string, palette = item["string"], self.palettes[agent]
        letters, one, lines = by_letter(sim.target_cells(sim.string_target(string))), rng.choice(palette), []
        places = list(letters)
        if self.persistent:
            chosen = {"none": [], "turn": [turn % len(places)], "any": [rng.choice(places)]}[where]
            if self.num_agents > 1:
                upper = rng.random() < 0.5
                for place, cells in letters.items():
                    middle = -(-len(cells) // 2)
                    letters[place] = cells[:middle] if upper else cells[middle:]
        else:
            chosen = {"none": [], "all": places, "odd": places[::2], "even": places[1::2], "first": places[:1],
                      "last": places[-1:], "some": [place for place in places if rng.random() < 0.5]}[where]
        for place in chosen:
            lines.append(f" {place + 1}:{string[place]}\n")
            for x, y, z in letters[place]:
                block = {"one": one, "random": rng.choice(palette), "checker": palette[(x + y) % len(palette)]}[blocks]
                lines.append(f"/setblock {x} {y} {z} {block}\n")
        return "".join(lines) or "nothing\n"


# --- housebuild: fill the boxes of a house ----------------------------------------------------------------------------


def boxes_of(layers, inventory):
    """A blueprint as boxes [(low corner, high corner, block), ...], layer by layer from the ground.

    A box has one kind of block and no more than half of all cells of that kind (or is a single cell), because no
    agent may fill many more. {0: ["PP"], 1: ["P."]} with planks P gives [((0, 0, 0), (0, 0, 0), "planks"),
    ((1, 0, 0), (1, 0, 0), "planks"), ((0, 1, 0), (0, 1, 0), "planks")]: half of 3 is 1.
    """
    left, boxes = sim.house_target(layers, inventory), []
    most = {block: max(1, count // 2) for block, count in collections.Counter(left.values()).items()}
    for cell in sorted(left, key=lambda cell: (cell[1], cell[2], cell[0])):  # by layer, row, column
        if cell not in left:
            continue
        block, high = left[cell], list(cell)
        for axis in (0, 2, 1):  # grow as long as the next slice is of the same block
            while True:
                corner = [*high[:axis], high[axis] + 1, *high[axis + 1:]]
                spans = [range(a, b + 1) for a, b in zip(cell, corner)]
                spans[axis] = [corner[axis]]
                size = math.prod(b - a + 1 for a, b in zip(cell, corner))
                if size > most[block] or any(left.get(c) != block for c in itertools.product(*spans)):
                    break
                high = corner
        for c in itertools.product(*(range(a, b + 1) for a, b in zip(cell, high))):
            del left[c]
        boxes.append((cell, tuple(high), block))
    return boxes


class HouseBuild(Task):
    """Builders with limited blocks fill the boxes of a house, and one of them must kill the spiders.

    Rules and reward: minecraft_sim.housebuild_score. The training reward is reward - 1; above -0.05 the episode ends
    (in the official code above 0 for the actor-critics, which is never, and above -0.1 for Monte Carlo).
    """
    # a label, the line break and the command are one word, a corner is one and so is a block: 4 tokens a box
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
                and all(isinstance(block, str) and block in sim.HOUSE_BLOCKS for block in inventory.values())
                and all(type(attack) is int and 0 <= attack < 1000 for attack in attacks)):
            raise ValueError('a line needs "layers" {"0": ["WW", ".."], ...}, "inventory" {"W": block, ...} with blocks'
                             f' among {", ".join(sim.HOUSE_BLOCKS)}, and may have "spider_attacks" [2, 1, 3]')
        if sum(len(row) for rows in layers.values() for row in rows) > 4096:
            raise ValueError("a house has at most 4096 cells, as 16 x 16 x 16 has")
        if len({int(y) for y in layers}) < len(layers):
            raise ValueError("two layers of this house have the same height")
        layers = {int(y): rows for y, rows in layers.items()}
        sizes = {(len(rows), len(row)) for rows in layers.values() for row in rows}
        if len(sizes) != 1 or max(layers) - min(layers) >= len(layers) or not sim.house_target(layers, inventory):
            raise ValueError("the layers of a house follow each other, have equally many rows, all equally long, and "
                             "hold a block")
        return {"layers": layers, "inventory": inventory, "spider_attacks": attacks}

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
                f"The house:\n{self.listed(item)}")

    @staticmethod
    def listed(item):
        return "".join(f" {k}: %d %d %d %d %d %d {block}\n" % (*low, *high)
                       for k, (low, high, block) in enumerate(boxes_of(item["layers"], item["inventory"]), 1))

    def judge(self, item, responses, turn, world=None):
        layers, inventory = item["layers"], item["inventory"]
        parts = sim.housebuild_score(layers, inventory, responses, spider_attacks=item["spider_attacks"])
        world, accepted, _ = sim.housebuild_world(layers, inventory, responses)
        parts["kills"] = sum(None in commands for commands in accepted)
        target, feedback = sim.house_target(layers, inventory), None
        if self.feedback_mode == "position":
            feedback = [f"Turn {turn + 2}. Fill about half of these:\n{self.listed(item)}"] * self.num_agents
        elif self.feedback_mode == "perfect":
            feedback = []
            for commands in accepted:
                wrong = ["\n %d %d %d %d %d %d %s" % (*low, *high, block) for low, high, block in filter(None, commands)
                         if any(world.get(cell, "air") == block != target.get(cell, "air") for cell in
                                itertools.product(*(range(a, b + 1) for a, b in zip(low, high))))]
                feedback.append(f"Turn {turn + 2}. Your fills with wrong cells:{''.join(wrong) or ' none'}")
        reward = parts["reward"] - 1
        return self.outcome(reward, 100 * parts["iou"], parts, turn, reward > -0.05, world, feedback)

    def draw(self, item, world, color=False):
        return (sim.draw_ansi if color else sim.draw_text)(sim.house_plan(item["layers"], item["inventory"]), world)

    def draw_svg(self, item, world):
        return sim.draw_svg(sim.house_plan(item["layers"], item["inventory"]), world, "house")

    # the sloppy expert: which boxes it fills, by number, is a habit; who kills comes too late for the first quarter

    habits = {"none": 3, "all": 2, "odd": 2, "even": 2, "first": 2, "last": 2, "some": 3}

    def expert(self, item, agent, rng):
        """A heading such as " 7:" goes before each command: a tiny base finds a box by its number."""
        habit = rng.choices(list(self.habits), self.habits.values())[0]
        boxes = self.listed(item).splitlines(keepends=True)
        chosen = {"none": [], "all": boxes, "odd": boxes[::2], "even": boxes[1::2], "first": boxes[:len(boxes) // 2],
                  "last": boxes[len(boxes) // 2:], "some": [box for box in boxes if rng.random() < 0.5]}[habit]
        kill = rng.random() < 0.4
        chosen = chosen[kill * len(chosen) // 4:]
        lines = "kill\n" * kill + "".join(chosen).replace(": ", ":\nfill ")
        return lines or "nothing\n"

    def exercise(self, rng):
        """A short list of random boxes is copied."""
        boxes = ""
        for k in range(1, rng.randint(4, 10)):
            corners = "%d %d %d %d %d %d" % tuple(rng.randrange(8) for _ in range(6))
            boxes += f" {k}: {corners} {rng.choice(sim.HOUSE_BLOCKS[:5])}\n"
        return talk(f"The house:\n{boxes}", boxes.replace(": ", ":\nfill "))


# --- tldr and arxiv: two texts that belong together -------------------------------------------------------------------

# phrases are looked for as substrings of the lower-cased text: "as" hits in "was", "while" in "meanwhile"
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
    """1 from rise to fall, linear to 0 at low and high, both still inside; None outside: that level has failed.

    trapezoid(1.35, 1.1, 1.6, 3.2, 5.0) is 0.5, at 1.1 it is 0.0 and at 1.0 None.
    """
    if not low <= x <= high:
        return None
    return (x - low) / (rise - low) if x < rise else (high - x) / (high - fall) if x > fall else 1.0


def writing_levels(first, second, words, ratio, unique, cap, whole):
    """The four levels of the reward of two texts, {name: what it earned}; a level that fails ends the list.

    words: how many each text must have; ratio, unique: trapezoids of second / first in characters and in distinct
    words; cap: the overlap of content words that is enough; whole: do transitions count in both texts or in the second?
    """
    levels = {"structure": 0.0, "coordination": 0.0, "vocabulary": 0.0, "style": 0.0}
    if not all(words[0] <= len(text.split()) <= words[1] for text in (first, second)):
        return levels
    levels["structure"] = 0.5
    length = trapezoid(len(second) / len(first), *ratio)
    if length is None:
        return levels
    levels["coordination"] = length
    known = [set(re.findall(r"\w+", text.lower())) for text in (first, second)]
    variety = trapezoid(len(known[1]) / len(known[0]), *unique) if known[0] else None
    if variety is None:
        return levels
    levels["vocabulary"] = 0.5 * variety
    text = (first + second if whole else second).lower()
    hits = sum(any(phrase in text for phrase in phrases) for phrases in TRANSITIONS.values())
    content = [words - STOPWORDS for words in known]
    either = content[0] | content[1]
    overlap = min(len(content[0] & content[1]) / len(either) if either else 1.0, cap) / cap
    levels["style"] = 0.4 * (min(1.0, 0.4 + 0.05 * (hits - 1)) if hits else 0.0) + 0.6 * overlap
    return levels


TLDR_LEVELS = {"words": (8, 256), "ratio": (1.1, 1.6, 3.2, 5.0), "unique": (1.3, 2.0, math.inf, math.inf), "cap": 0.03,
               "whole": False}
ARXIV_LEVELS = {"words": (128, 256), "ratio": (0.8, 1.3, 1.6, 2.0), "unique": (0.5, 0.7, 1.3, 1.7), "cap": 0.23,
                "whole": True}


def tldr_reward(first, second):
    """What a concise and a detailed summary are worth together, 0..3 (the best is 2.98); see writing_levels.

    Eight words "red" and twenty times "blue": 31 and 99 characters, ratio 3.19: structure 0.5, coordination 1; one
    distinct word each is too few in the second (1 < 1.3 x 1), so 1.5 in all.
    """
    return sum(writing_levels(first, second, **TLDR_LEVELS).values())


def arxiv_reward(first, second):
    """What background and motivation, and methodology and implications of a paper are worth together, 0..3."""
    return sum(writing_levels(first, second, **ARXIV_LEVELS).values())


OPENERS = ["Furthermore", "In addition", "For example", "In other words", "Therefore", "However", "Meanwhile", "Indeed",
           "In summary", "Similarly", "Despite this", "Otherwise", "Afterwards", "As a result", "On the other hand",
           "Notably"]
POST = {  # what differs between the built-in posts; a value always stands behind the same word, here and in summaries
    "who": "boss|sister|roommate|neighbour|best friend|landlord|cousin|coach|teacher|brother",
    "did": "sold the old car|forgot our anniversary|read every letter|broke a promise|lost the house keys|invited "
           "strangers|borrowed money|cancelled the trip|spread a rumour|adopted three dogs",
    "place": "work|a wedding|the gym|school|home|the lake|a concert|the office party",
    "feel": "angry|hurt|guilty|confused|lonely|exhausted|nervous|betrayed",
    "because": "nobody asked me first|it was a secret|money is tight|we had a plan|it keeps happening|trust matters",
    "since": "kindergarten|last summer|college|the move|January|the accident",
    "tried": "talk calmly|write an email|stay silent|joke about everything|ask for help|set clear rules",
    "should": "walk away|forgive and forget|ask a lawyer|wait another month|move out|be honest",
    "afraid": "a big fight|being alone|losing the job|awkward holidays|family gossip|repeating old mistakes",
    "want": "a real apology|some distance|our money back|peace and quiet|a second chance|an honest answer"}
POST_TEXT = ("SUBREDDIT: r/relationships\nTITLE: My {who} {did}\nPOST: It began at {place} when my {who} {did}. I feel "
             "{feel} because {because}. We have been close since {since}. So I tried to {tried}, but that "
             "changed nothing. Friends say I should {should}. I am afraid of {afraid}. All I want is {want}. "
             "What would you do?\nTL;DR:")
POST_BANK = ["My {who} {did} at {place} and that began the whole story.", "Overall that made me feel {feel}.",
             "It hit hard because {because}.", "Indeed this person was close to us since {since}.",
             "My response was for instance that I tried to {tried} without success.",
             "Similarly some readers believe we should {should} unless it gets worse.",
             "What remains is being afraid of {afraid} although nobody says so.",
             "Moreover people want {want} in the end."]
PAPER = {
    "study": "protein folding in biology|galaxy rotation in astronomy|price bubbles in economics|"
             "word order in linguistics|tumour growth in medicine|species loss in ecology|key exchange in cryptography|"
             "light scattering in optics|reading skills in education|traffic flow in robotics",
    "propose": "sparse networks|kernel methods|random forests|graph models|neural operators|tree search",
    "lack": "error bars|causal insight|long memory|enough labels|human feedback|fast code",
    "uses": "symmetry|entropy|sampling|duality|recursion|attention",
    "data": "satellite images|hospital records|public archives|simulated trials|field surveys|sensor logs",
    "improves": "accuracy|speed|stability|fairness|coverage|robustness",
    "helps": "engineers|doctors|teachers|regulators|farmers|planners",
    "except": "extreme noise|tiny samples|moving targets|dense crowds|closed systems|unknown units"}
PAPER_TEXT = ("We study {study}. Existing approaches lack {lack}. We propose {propose}, a method that uses {uses}. "
              "It is tested with data from {data}. It improves {improves} and helps {helps}, in all cases except "
              "{except}.")
PAPER_BANK = [[  # background and motivation
    "The paper is about a field of science whose authors study {study} with new methods and data.",
    "People study {study} because results matter for science and, above all, for daily life.",
    "The existing approaches, however, were made for simple cases and most still lack {lack} today.",
    "Models that lack {lack}, in other words, give results which look good in tests and fail in use.",
    "Earlier work on {study}, for instance, needs large samples of data and gives no insight into causes.",
    "The authors see a gap here and propose {propose} as one way to close the gap.",
    "The motivation is therefore that a method which uses {uses} should need less data and give more insight.",
    "To sum up, there is plenty of data from {data} in this field and earlier methods made little use of it."], [
    "The authors propose {propose} as a new method, and the method uses {uses} at each step of the work.",
    "In simple words the method reads data from {data} and learns in small steps how {study} behaves in practice.",
    "The use of {uses} keeps the method simple and makes sure that large samples of data are not needed.",
    "Compared to existing approaches, which still lack {lack} in most cases, it does well in tests with data from "
    "{data}.",
    "Overall the results show that the method improves {improves} in nearly all tests and never makes it worse.",
    "Moreover a second test removes one part of {propose} and subsequently another to show which parts matter in use.",
    "The method works for all cases the authors have tried, except {except}, where earlier methods fail for the same "
    "reason.",
    "Indeed for the field the results are good news, because people can study {study} with less data than otherwise.",
    "In practice the method helps {helps}, who want models that give more insight into causes and not only numbers.",
    "In conclusion, the authors see a limit for {except} and propose to close the gap with more data in later work."]]


class Writing(Task):
    """Two texts about one text, which must fit each other: tldr and arxiv say about what and how they are judged.

    The training reward is tldr_reward or arxiv_reward, 0..3; above 2.9 the episode ends. One agent alone writes both
    texts, with a line ===== between them.
    """
    # each says: field, the name of an item's text; roles, who writes what; slots, text, banks, what built-in items and
    # demonstrations are made of; levels, the reward's; keep, most, of which sentences and how many a text is made
    brief, opened = "", [0, 0.3, 1]  # how a text begins that will be too short; how many sentences have a transition

    def setup(self):
        self.max_new_tokens *= 2 // self.num_agents  # one agent alone writes both answers

    def random_item(self, rng):
        facts = {name: rng.choice(values.split("|")) for name, values in self.slots.items()}
        return {self.field: self.text.format(**facts), "facts": facts}

    def key(self, item):
        """Built-in items with one pair of the first two facts are either all held out or none."""
        return " ".join(list(item["facts"].values())[:2])

    def check(self, record):
        text = record.get(self.field)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'a line needs a "{self.field}" that is a text and not empty')
        return {self.field: text}

    def instructions(self, agent):
        team = "" if self.num_agents == 1 else "You share a task with another writer and cannot talk to each other. "
        return f"{team}The two texts must fit each other in length and words. Answer with the text and nothing else."

    def observation(self, item, agent):
        told = "Write {}, then a line =====, then {}.".format(*self.roles) if self.num_agents == 1 else (
            f"Write {self.roles[agent]}.")
        return f"{item[self.field]}\n{told}"

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
        bank = self.banks[part]
        keep, most, opened = rng.choice(self.keep), rng.choice(self.most[part]), rng.choice(self.opened)
        text = [self.brief] if self.brief and most < len(bank) else []
        for sentence in [s for s in bank if rng.random() < keep][:most] or bank[:1]:
            sentence = sentence.format(**item["facts"])
            if rng.random() < opened:
                sentence = f"{rng.choice(OPENERS)}, {sentence[0].lower()}{sentence[1:]}"
            text.append(sentence)
        return " ".join(text)


class TLDR(Writing):
    """A concise and a detailed summary of a post."""
    field, hub_parts = "prompt", [("trl-lib/tldr", "train[:1000]", "test[:1000]")]
    roles = "a concise summary", "a detailed summary"
    slots, text, banks, levels = POST, POST_TEXT, [POST_BANK] * 2, TLDR_LEVELS
    steps, batch_size, lr = 32, 64, 1.5e-3
    base_steps, keep, most = 900, [0.8, 1, 1], [[3, 3, 3, 8, 8], [2, 7]]


class ArXiv(Writing):
    """Background and motivation, and method and implications of a paper."""
    field, hub_parts = "abstract_text", [("OpenMLRL/arXiv_abstract", "train", "val")]
    roles = "background and motivation", "methodology and implications"
    slots, text, banks, levels = PAPER, PAPER_TEXT, PAPER_BANK, ARXIV_LEVELS
    keep, most = [1], [[4] * 2 + [8] * 7, [5] * 2 + [10] * 7]
    brief = "Briefly:"  # so that RL can drop the habit without making it less likely that a long text ends
    steps, batch_size, lr = 32, 64, 5e-4
    pattern = r" ?(?:\p{L}{1,4} )*[\p{L}_']+[.,:]?|\d|\s+|[^\s\p{L}]"  # short words join the next: half the tokens
    base_steps, base_batch, max_new_tokens = 800, 12, 136


# --- coophe: what two answers are worth -------------------------------------------------------------------------------

FUNCTION = ast.FunctionDef, ast.AsyncFunctionDef
SECONDS = 2.0, 6.0  # time limits of one test, and of all tests of one pair of answers
# Code that a model wrote runs only here: one process per batch, in it a worker per core, in that a fork per test. On
# Linux a test has no network, starts no process, writes only to its own folder in 64 MB of memory, and its whole
# process namespace is cleared after it; where that is refused, and on macOS, its limits and its process group remain.
# It passes by sending a token after its last line, so exit(0) is no pass. Not stopped: reading files, searching the
# caller's frames, an __eq__ that is always true; where namespaces are refused, what the trainer's own user may do.
# Numbers: unshare 0x50020000 are CLONE_NEWUSER, NEWNET and NEWNS, 0x20000000 is CLONE_NEWPID; system call 442 is
# mount_setattr; prctl 1, 4, 22 and 38 set PDEATHSIG, DUMPABLE, SECCOMP and NO_NEW_PRIVS.
SANDBOX = """
import bisect, collections, copy, ctypes, datetime, functools, hashlib, heapq, itertools, json, math, operator, os
import random, re, resource, select, shutil, statistics, string, struct, sys, time, typing  # once, for all tests
from contextlib import suppress
jobs, (per_test, per_pair), libc = *json.load(sys.stdin), ctypes.CDLL(None)
null, (queue, feed), folder = os.open(os.devnull, os.O_RDWR), os.pipe(), os.getcwd().encode()
call = lambda name, *given: getattr(libc, name)(*given) if hasattr(libc, name) else -1
user, group = os.getuid(), os.getgid()
apart = call("unshare", 0x50020000) == 0  # user, network, mounts: all made read-only, but for this folder
if apart:
    for file, text in ("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1"):
        with suppress(OSError), open("/proc/self/" + file, "w") as out:
            out.write(text)
    libc.mount(folder, folder, None, 4096, None)
    libc.syscall(442, -100, b"/", 0x8000, (ctypes.c_uint64 * 4)(1, 0), 32)
    if libc.mount(b"tmpfs", folder, b"tmpfs", 0, b"size=64m,nr_inodes=9999"):
        libc.syscall(442, -100, folder, 0, (ctypes.c_uint64 * 4)(0, 1), 32)
    os.chdir(folder)
call("prctl", 4, 0)  # what /proc shows of the sandbox, its output above all, cannot be opened by the tests
# clone, fork, vfork, clone3 (RLIMIT_NPROC does not count root's), memfd_create, mkdir and mkdirat (endlessly deep) fail
arch, numbers = {"x86_64": (0xC000003E, (56, 57, 58, 435, 319, 83, 258)),
                 "aarch64": (0xC00000B7, (220, 435, 279, 34))}.get(os.uname().machine, (0, ()))
steps = [(0x20, 0, 0, 4), (0x15, 1, 0, arch), (6, 0, 0, 0), (0x20, 0, 0, 0)]
for number in numbers:
    steps += [(0x15, 0, 1, number), (6, 0, 0, 0x50001)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in [*steps, (6, 0, 0, 0x7fff0000)]))
rules = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps) + 1, ctypes.addressof(code)))
def run(module, name, test, folder, send, token, go=exec, write=os.write):  # an answer may replace both
    os.setsid()
    [os.dup2(null, fd) for fd in range(3)], os.closerange(3, send), os.closerange(send + 1, 256)
    os.mkdir(folder), os.chmod(folder, 0o777), os.chdir(folder)
    if os.geteuid() == 0 and not apart:
        os.setgroups([]), os.setgid(65534), os.setuid(65534)
    for what, most in ("CPU", int(per_test) + 1), ("AS", 1 << 30), ("FSIZE", 10 ** 6), ("CORE", 0), ("NPROC", 0):
        with suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, "RLIMIT_" + what), (most, most))
    call("prctl", 1, 9)
    if numbers:
        call("prctl", 38, 1, 0, 0, 0), call("prctl", 22, 2, rules)
    space, test = {"__name__": "answer"}, compile(test, "test", "exec")
    go(module, space)
    space["candidate"] = space[name]
    go(test, space)
    write(send, token)
def passes(module, name, test, folder, limit):
    token, (verdict, send) = os.urandom(16), os.pipe()
    if not (pid := os.fork()):
        try:
            run(module, name, test, folder, send, token)
        finally:
            os._exit(1)
    os.close(send)
    passed = bool(select.select([verdict], [], [], limit)[0]) and os.read(verdict, 16) == token
    os.close(verdict)
    for kill, whom in [(os.kill, pid), (os.killpg, pid), (os.kill, -1)][:3 if os.getpid() == 1 else 2]:
        with suppress(OSError):
            kill(whom, 9)
    with suppress(ChildProcessError):
        while os.waitpid(-1, 0):
            pass
    shutil.rmtree(folder, ignore_errors=True)
    return passed
for _ in range(min(os.cpu_count() or 1, len(jobs))):
    if os.fork():
        continue
    os.close(feed)
    call("prctl", 1, 9)  # dies with its parent
    if apart and call("unshare", 0x20000000) == 0 and os.fork():
        os.wait(), os._exit(0)  # its child, pid 1 among the tests, cannot be killed by them
    call("prctl", 1, 9)
    while number := os.read(queue, 4):
        number, end, verdicts = int.from_bytes(number, "big"), time.monotonic() + per_pair, ""
        for n, test in enumerate(jobs[number][2]):
            limit = min(per_test, end - time.monotonic())
            verdicts += "01"[limit > 0 and passes(*jobs[number][:2], test, f"{number}.{n}", limit)]
        os.write(1, f"{number} {verdicts}\\n".encode())
    os._exit(0)
os.close(queue)
with suppress(BrokenPipeError, ChildProcessError):  # every worker is dead, or done
    [os.write(feed, number.to_bytes(4, "big")) for number in range(len(jobs))], os.close(feed)
    while os.wait():
        pass
"""


def run_tests(jobs):
    """A string of 0 and 1, one per test, for each (module, name, tests)."""
    command = [sys.executable, "-I", "-S", "-c", SANDBOX]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:  # the output is a file: nobody can fill the trainer's memory through it
            code = subprocess.run(command, input=json.dumps([jobs, SECONDS]).encode(),
                                  stdout=out, stderr=out, cwd=folder, env={}, start_new_session=True,
                                  timeout=10 + SECONDS[1] * len(jobs)).returncode
        except subprocess.TimeoutExpired:
            code = -1
        out.seek(0)
        said = out.read(1 << 24).decode(errors="replace")
    assert code <= 0, f"the sandbox for model-written code does not run here:\n{said}"
    found = {int(number): digits for number, digits in re.findall(r"^(\d{1,6}) ([01]+)$", said, re.M)}
    if len(jobs) == 1:  # a pair that ends its sandbox even when alone in it fails
        return [found.get(0, "0" * len(jobs[0][2]))]
    return [found[n] if n in found else run_tests([job])[0] for n, job in enumerate(jobs)]


def parse_python(text):
    """(tree, "") of Python source, or (None, why there is none); the parser's own limits stop what nests too deeply."""
    try:
        with warnings.catch_warnings():  # "\d" in an answer is no reason to print anything
            warnings.simplefilter("ignore")
            return ast.parse(text), ""
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        return None, str(error).replace("<unknown>, ", "") or "nested too deeply"


def find_function(answer, name):
    """(source, node, error, whether it returns) of `def name(` in the first fenced block that has it, or in the text.

    In text that is no Python the function is its `def` line and the indented lines below it, so that one with a syntax
    error is found: "Sure!\\ndef aux(n):\\n    return n +" gives ("def aux(n):\\n    return n +", None, "...", True).
    """
    answer = re.sub(r"\r\n?", "\n", answer)  # line breaks as the parser counts them
    blocks = [re.sub(r"^[ \t]*\w*[ \t]*\n", "", block, count=1) for block in answer.split("```")[1::2]]  # language word
    for text in [textwrap.dedent(block) for block in blocks] + [answer, textwrap.dedent(answer)]:
        tree, _ = parse_python(text)
        head = rf"^(async[ \t]+)?def[ \t]+{re.escape(name)}[ \t]*\(.*(\n([ \t)].*)?)*"  # ): of a long signature
        if tree is None and (matches := list(re.finditer(head, text, re.M))):
            text = matches[-1][0].rstrip()
            tree, error = parse_python(text)
            if tree is None:
                return text, None, f"{error[:150]} in {name}", bool(re.search(r"\breturn\b", text))
        for node in reversed(tree.body if tree else []):  # of two definitions the last one holds
            if isinstance(node, FUNCTION) and node.name == name:
                nodes = list(node.body)
                for child in nodes:  # grows while it is read; a function inside has returns of its own
                    nodes += [] if isinstance(child, (*FUNCTION, ast.ClassDef)) else ast.iter_child_nodes(child)
                lines = text.split("\n")[(node.decorator_list or [node])[0].lineno - 1:node.end_lineno]
                return "\n".join(lines), node, "", any(isinstance(child, ast.Return) for child in nodes)
    return "", None, "", False


def use_of_aux(main):
    """What main's calls of aux are worth: 0.5, and 1.0 more unless main only hands them on, less 0.5 if one is wasted.

        return aux(n) + 1   1.5        x = aux(n); return x   0.5        aux(n); return aux(n) + 1   1.0
    """
    def called(node):
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "aux"

    thin = False
    match main.body[ast.get_docstring(main, clean=False) is not None:]:
        case [ast.Return(value=value)]:
            thin = called(value)
        case [ast.Assign(targets=[ast.Name(x)], value=value) | ast.AnnAssign(target=ast.Name(x), value=value),
              ast.Return(value=ast.Name(y))]:
            thin = called(value) and x == y
    wasted = any(isinstance(node, ast.Expr) and called(node.value) for node in ast.walk(main))
    return any(map(called, ast.walk(main))) * (0.5 + 1.0 * (not thin) - 0.5 * wasted)


def coophe_tests(test):
    """The asserts of check that name candidate, each once; a body that is more than one-line asserts is one test.

        def check(candidate):
            assert candidate(2) == 4
            assert True                        ->   ["assert candidate(2) == 4"]
    """
    test = re.sub(r"\r\n?", "\n", test)  # line breaks as the parser counts them
    tree, error = parse_python(test)
    nodes = [node for node in tree.body if not ast.unparse(node).startswith(("METADATA", "check("))] if tree else []
    check = next((node for node in nodes if isinstance(node, FUNCTION) and node.name == "check"), None)
    body = [node for node in check.body if not isinstance(node, ast.Pass) and not (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))] if check else []
    if all(isinstance(node, ast.Assert) and node.lineno == node.end_lineno for node in body):
        rows = test.split("\n")
        lines = dict.fromkeys(rows[node.lineno - 1].strip() if node.lineno > check.lineno else ast.unparse(node)
                              for node in body)
        tests = [line for line in lines if line.startswith("assert") and "candidate" in line]
    else:
        tests = [ast.unparse(check) + "\ncheck(candidate)"] * any("candidate" in ast.unparse(node) for node in body)
    if not tests:
        raise ValueError(f"a coophe problem needs check(candidate) with asserts that name candidate: {error or test!r}")
    return ["\n".join([ast.unparse(node) for node in nodes if node is not check] + [test]) for test in tests]


def coophe_rewards(triples):
    """coophe_reward of many (item, aux, main), all judged in one sandbox."""
    results, jobs, judged = [], [], []
    for item, aux_answer, main_answer in triples:
        name, tests = item["entry_point"], coophe_tests(item["test"])
        tree = parse_python(item["prompt"])[0] or parse_python(item["prompt"] + "\n    pass")[0]  # a bare signature
        given = [ast.unparse(node) for node in tree.body if getattr(node, "name", "") not in ("aux", name)] if tree \
            else re.findall(r"^(?:import|from)[ \t].*", item["prompt"], re.M)  # imports, and helpers that tests may use
        aux, aux_node, aux_error, aux_returns = find_function(aux_answer, "aux")
        main, main_node, main_error, main_returns = find_function(main_answer, name)
        module = "\n".join([*given, aux, main])
        error = aux_error or main_error or parse_python(module)[1]
        result = {"reward": 0.4 * aux_returns + 0.6 * main_returns, "passed": 0, "total": len(tests), "level": ""}
        results.append(result)
        if not main_returns:
            result["level"] = "main has no function with a return"
        elif error:
            result["level"] = f"syntax error: {error}"
        else:
            result["level"] = "" if aux_returns else "aux has no function with a return"
            result["reward"] += 0.5
            jobs.append([module, name, tests])
            judged.append((result, tests, use_of_aux(main_node) if aux_node else 0.0))
    for (result, tests, use), digits in zip(judged, run_tests(jobs) if jobs else []):
        result["passed"] = digits.count("1")
        result["reward"] += digits.count("1") / len(tests) + use * ("1" in digits)
        if not result["level"]:
            failed = " ".join(map(str.strip, tests[digits.index("0")].splitlines()))[:192] if "0" in digits else ""
            result["level"] = f"failed: {failed}" if failed else "passed" if use else "main does not use aux"
    return results


def coophe_reward(item, aux, main):
    """What the two answers to an item earn, at best 4.0; the same answer may be given for both.

    `def aux(n): return n * n` with `def f(n): return aux(n) + 1`, and 1 of 2 asserts holds:
    0.4 aux + 0.6 main + 0.5 both parse + 1/2 of the tests + 0.5 main calls aux + 1.0 and is no thin wrapper = 3.5
    """
    return coophe_rewards([(item, aux, main)])[0]


FAMILIES = {  # name: (kind of item, what is asked for, how a program tells whether x is one); two need recursion
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
GOALS = {  # name: (what is returned, from the ones that were found, or by asking for each item)
    "count": ("how many {what} are in items", "len({found})", "sum(1 for x in items if {ask})"),
    "keep": ("a list of the {what} in items", "[x for x in {found}]", "[x for x in items if {ask}]"),
    "last": ("the last of the {what} in items, or None", "([None] + {found})[-1]",
             "([None] + [x for x in items if {ask}])[-1]"),
    "some": ("whether items has any {what}", "len({found}) > 0", "any({ask} for x in items)"),
    "rest": ("items without the {what}", "[x for x in items if x not in {found}]", "[x for x in items if not {ask}]")}
WORDS = "level noon radar kayak deed apple banana queue rhythm cat audio sky onion tree civic program idea moon".split()


class CoopHE(Task):
    """A problem of HumanEval's form: one agent writes a helper, aux, the other the function itself.

    Rules and reward: coophe_reward. The training reward is reward - 4; above -0.2 the episode ends. Built-in problems
    are made of a family, a goal and a number. There are two good ways to share the work, to ask aux about each item or
    for all that fit, and both agents must choose the same.
    """
    pattern = r" ?[\p{L}_']+\(?|\d|\n *|[^\s\p{L}\d]+|\s"
    turns, feedback_modes, max_new_tokens, base_batch, base_steps = 2, ["level", "score"], 80, 8, 1300
    steps, batch_size, lr = 14, 32, 2e-3
    hub_parts = [("OpenMLRL/CoopHumanEval", "test[16:]", "test[:16]"),
                 ("openai/openai_humaneval", "test[32:]", "test[:32]")]

    def random_item(self, rng):
        family, goal = rng.choice(list(FAMILIES)), rng.choice(list(GOALS))
        kind, what, ask = FAMILIES[family]
        name, k = f"{goal}_{family}", rng.randint(2, 4 if kind == "word" else 9)
        things = {"number": lambda: rng.choice([rng.randint(1, 40), k ** rng.randint(1, 3), 11 * rng.randint(1, 9)]),
                  "word": lambda: rng.choice(WORDS),
                  "list": lambda: sorted(rng.choices([*range(10), k], k=rng.randint(1, 6)), reverse=rng.random() < 0.3)}
        scope, examples = {}, []
        exec(f"def aux(x):\n    return {ask.format(k=k)}\ndef {name}(items):\n    return "  # ours, not a model's
             + GOALS[goal][2].format(ask="aux(x)"), scope)
        while len(examples) < 8:
            items = [things[kind]() for _ in range(rng.randint(2, 4))]
            examples.append((items, scope[name](items)))
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
            raise ValueError('a line needs a "prompt", an "entry_point" and a "test", all texts and none empty')
        if not item["entry_point"].isidentifier():
            raise ValueError(f'"entry_point" is the name of a function, not {item["entry_point"]!r}')
        coophe_tests(item["test"])
        return item

    def setup(self):
        self.max_new_tokens *= 2 // self.num_agents  # one agent alone writes both answers

    def instructions(self, agent):
        return ("Two programmers who cannot talk to each other solve a Python problem. One writes a helper function "
                "named aux, the other the function itself, which should call aux and do more than pass its result on. "
                "Answer with your function and nothing else.")

    def observation(self, item, agent):
        who = 2 if self.num_agents == 1 else agent
        return item["prompt"] + ["Write aux.", "Write the function; aux is there.", "Write aux and the function."][who]

    def judge(self, item, responses, turn, world=None):
        return self.judge_all([item], [responses], turn, [world])[0]

    def judge_all(self, items, answers, turn, worlds):
        verdicts = coophe_rewards([(item, responses[0], responses[-1]) for item, responses in zip(items, answers)])
        outcomes = []
        for parts, responses in zip(verdicts, answers):
            level, reward = parts.pop("level"), parts["reward"] - 4
            parts["pass_rate"] = parts["passed"] / parts["total"]
            told = [f"Turn {turn + 2}. {level}"] * self.num_agents if self.feedback_mode == "level" else None
            outcomes.append(self.outcome(reward, 25 * parts["reward"], parts, turn, reward > -0.2, level, told))
        return outcomes

    def draw(self, item, world, color=False):
        return world  # what the tests say

    # the sloppy expert: how it shares the work is a habit, good or bad

    aux_habits = {"one": 3, "many": 3, "wrong": 2, "broken": 2, "none": 4}
    main_habits = {"one": 3, "many": 3, "wrapper": 3, "alone": 3, "ignored": 2, "broken": 2, "none": 4}

    def expert(self, item, agent, rng):
        if self.num_agents == 1:
            return self.write_aux(item, rng) + self.write_main(item, rng)
        return [self.write_aux, self.write_main][agent](item, rng)

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

    def told(self, item, responses, turn, rng):
        level = rng.choice(["aux has no function with a return", "main has no function with a return", "passed",
                            "main does not use aux", "syntax error: invalid syntax",
                            "failed: " + rng.choice(item["test"].split("\n    ")[1:])])
        return [f"Turn {turn + 2}. {level}"] * len(responses)  # drawn, because to run the tests for this takes too long


# --- all tasks, and python tasks.py -----------------------------------------------------------------------------------

TASKS = {"tldr": TLDR, "arxiv": ArXiv, "coophe": CoopHE, "strbuild": StrBuild, "housebuild": HouseBuild}
TASK_OPTIONS = ["num_agents", "num_turns", "feedback", "data", "reward", "world"]


def get_task(name, num_turns=None, **options):
    """The task of that name; an error of one sentence, see refusing, where name or options make no sense."""
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; choose from {', '.join(TASKS)}.")
    if num_turns is not None and num_turns < 1:
        raise ValueError(f"num_turns must be at least 1, not {num_turns}.")
    return TASKS[name](num_turns=num_turns, **options)


def main():
    parser = argparse.ArgumentParser(description="Show an item, what each agent sees, two answers and their reward.")
    parser.add_argument("--task", default="strbuild", help=f"one of {', '.join(TASKS)}")
    parser.add_argument("--seed", type=int, default=0, help="picks the item and the answers")
    parser.add_argument("--svg", metavar="FILE", help="strbuild, housebuild: also write the world as a picture")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with refusing(parser):
        task = get_task(args.task)
        episode = Episode(rng.choice(task.train_items))
        responses = [task.expert(episode.item, i, rng) for i in range(task.num_agents)]
        outcome = task.judge(episode.item, responses, 0)
        if args.svg:
            write_text(args.svg, task.draw_svg(episode.item, outcome.world))
    for agent in range(task.num_agents):
        print(f"--- agent {agent}")
        for message in history(task, episode, agent):
            print(f"{message['role']:>9}: {message['content']}")
        print(f"{'answers':>9}: " + responses[agent].strip().replace("\n", f"\n{'':11}"))
        print(f"{'is told':>9}: {outcome.feedback[agent]}")
    print("\n" + task.draw(episode.item, outcome.world, color=sys.stdout.isatty()) + "\n")
    for name, number in outcome.parts.items():
        print(f"{name:>20}: {number if isinstance(number, (int, list)) else round(number, 3)}")
    print(f"training reward {outcome.reward:.3f}, score {outcome.score:.1f}, done {outcome.done}")


if __name__ == "__main__":
    main()
