"""
Tasks: what each agent is shown, what its answer is worth, and when an episode ends.

A task is one class; everything else in this repository knows a task only by these names:

    train_items, eval_items             lists of dicts; no item stands in both
    num_agents, num_turns               n agents, at most T turns
    max_new_tokens                      length limit of one answer, in tokens
    pattern                             regular expression that cuts the task's text into words for the tiny tokenizer
    instructions(agent)                 the rules, said once as system message
    observation(item, agent)            o_i,0: what agent i is shown first
    judge(item, responses, turn, world) an Outcome: reward, score, the end, and what each agent is told next; world is
                                        what the last turn's Outcome left, None at turn 0
    demonstration(rng), exercise(rng)   one conversation of a sloppy expert, and one that practises what building needs
                                        most; the tiny base is trained on these
    draw(item, world, color)            the world as text for a terminal; draw_svg(item, world) as a picture
    base, base_batch                    name of the tiny base that fits (runs with one name share it), and how many
                                        conversations it learns from in a step

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
import glob
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import zlib
from dataclasses import dataclass, field

import minecraft_sim as sim

# --- episodes ---------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What the environment says about one joint response."""
    reward: float           # r_t, the training reward, the same for every agent
    score: float            # percent: what tables show
    parts: dict             # the reward taken apart: name -> number
    done: bool              # solved: the episode ends before its last turn
    feedback: list          # per agent: what it is told before its next answer
    world: object           # what this joint response leaves behind; strbuild: {cell: block}


@dataclass
class Turn:
    """One joint response; a list has one entry per agent unless it says otherwise."""
    prompts: list           # token ids of the rendered history h_i,t
    tokens: list            # sampled token ids of a_i,t, the end token included unless the answer was cut
    logps: list             # log pi of each of those tokens, as sampled
    responses: list         # a_i,t as text
    outcome: Outcome
    critic_inputs: list = field(default_factory=list)  # one entry per critic: token ids of the history it reads
    values: dict = field(default_factory=dict)      # critic -> V(h_t); these three are set by the train script
    targets: dict = field(default_factory=dict)     # critic -> what V(h_t) is regressed on
    advantages: dict = field(default_factory=dict)  # agent -> advantage


@dataclass
class Episode:
    """An item and the turns played on it so far."""
    item: dict
    turns: list = field(default_factory=list)

    @property
    def world(self):
        return self.turns[-1].outcome.world if self.turns else None


def history(task, episode, agent):
    """The messages of h_i,t: the rules and o_i,0, then the agent's own last answer and what it was told about it.

    2 messages at turn 0, 4 later: like the official code, only the last answer is kept. Nothing of another agent is in
    here, so this is all that agent i needs when it works alone.
    """
    messages = [{"role": "system", "content": task.instructions(agent)},
                {"role": "user", "content": task.observation(episode.item, agent)}]
    if episode.turns:
        last = episode.turns[-1]
        messages += [{"role": "assistant", "content": last.responses[agent]},
                     {"role": "user", "content": last.outcome.feedback[agent]}]
    return messages


def paid(reward, task, turn, done):
    """r_t of this turn: the reward itself, or, with a sparse reward, 0 in every turn but the episode's last."""
    return reward if task.reward == "dense" or done or turn + 1 == task.num_turns else 0.0


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / max(1, len(numbers))


def summary(episodes, prefix, gamma, end):
    """Means over episodes under the names of the log; return is discounted from the first turn, end the end token.

    Two episodes with rewards [-1, -2] and [-1] and gamma 0.5 have return -1.5, reward -4/3 and turns 1.5.
    """
    turns = [turn for e in episodes for turn in e.turns]
    answers = [tokens for turn in turns for tokens in turn.tokens]
    last = [e.turns[-1].outcome for e in episodes]
    numbers = {
        "return": mean(sum(gamma ** t * turn.outcome.reward for t, turn in enumerate(e.turns)) for e in episodes),
        "reward": mean(turn.outcome.reward for turn in turns), "score": mean(outcome.score for outcome in last),
        "turns": len(turns) / len(episodes), "response_tokens": mean(map(len, answers)),
        "truncated": mean(tokens[-1] != end for tokens in answers)}
    if prefix == "eval":  # the task's parts, of the last turn
        numbers |= {name: mean(outcome.parts[name] for outcome in last) for name, number in last[0].parts.items()
                    if not isinstance(number, list) and name not in numbers}
    return {f"{prefix}/{name}": number for name, number in numbers.items()}


def dialogue(task, episode, color):
    """A whole episode as text: what each agent was told and answered, the world and its reward, turn by turn."""
    lines = []
    for t, turn in enumerate(episode.turns):
        for agent, response in enumerate(turn.responses):
            told = task.observation(episode.item, agent) if t == 0 else episode.turns[t - 1].outcome.feedback[agent]
            answer = response.strip().splitlines() or ["(nothing)"]
            more = f" ... {len(answer)} lines" if len(answer) > 4 else ""
            lines += [f"turn {t} | agent {agent} is told: {told if len(told) < 100 else told[:80] + ' ...'}",
                      f"       | agent {agent} answers: {'; '.join(answer[:4])}{more}"]
        lines += [task.draw(episode.item, turn.outcome.world, color),
                  f"       | reward {turn.outcome.reward:.3f}, score {turn.outcome.score:.1f}\n"]
    return "\n".join(lines)


def read_jsonl(path, check):
    """Items of a person's own file, one JSON object a line, as (train, eval); "split": "eval" marks held-out lines.

    check(object) returns the item or raises ValueError. Raises ValueError with one sentence and the line's number.
    """
    items = {"train": [], "eval": []}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict) or record.get("split", "train") not in ("train", "eval"):
                        raise ValueError('a line is an object whose "split", if any, is "train" or "eval"')
                    items[record.get("split", "train")].append(check(record))
                except (ValueError, RecursionError) as error:  # the file is a person's: say where it is broken
                    raise ValueError(f"{path}, line {number}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read {path}: {error}") from None
    if not items["train"]:
        raise ValueError(f"{path} has no training line.")
    both = [item for item in items["eval"] if item in items["train"]]
    if both:
        raise ValueError(f"{path}: {both[0]} is a training line and a held-out line; it can be only one.")
    return items["train"], items["eval"]


# --- run folders ------------------------------------------------------------------------------------------------------


def write_atomic(path, write):
    """Call write(temporary path), then rename: a reader sees the old file or the new one, never half of one."""
    write(path + ".part")
    os.replace(path + ".part", path)


def write_text(path, text):
    def write(part):
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
    write_atomic(path, write)


# may differ between a run and its continuation; another number of steps is another schedule of the learning rate
FREE = {"steps", "resume", "overwrite", "eval_only", "eval_every", "save_every", "wandb", "out_dir", "device",
        "threads", "micro_batch"}


def cut_log(path, step):
    """Forget the lines of log.jsonl after that step, and one that was half written."""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            lines = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(path, "".join(lines))


RANGES = {name: (1, 1e9) for name in (
    "threads", "max_new_tokens", "num_agents", "batch_size", "group_size", "lora_rank", "passes", "minibatches",
    "micro_batch", "save_every", "critic_tokens")} | {name: (0, 1e9) for name in (
        "steps", "lr", "critic_lr", "clip", "eval_every")} | {
    "gamma": (0, 1), "lam": (0, 1), "temperature": (1e-3, 1e3), "top_p": (1e-3, 1)}


def check_ranges(args):
    """Raise ValueError with one sentence for the first number that makes no sense."""
    for name, (low, high) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{name} must be at least {low:g} and at most {high:g}, not {value}.")


def check_run_folder(args):
    """Refuse, with ValueError, to overwrite what is no run or another run, or to continue one with other settings."""
    path = os.path.join(args.out_dir, "config.json")
    if args.resume and args.overwrite:
        raise ValueError("--resume continues a run and --overwrite deletes it; give one of them.")
    if not os.path.exists(path):
        if args.resume:
            raise ValueError(f"There is no run to resume in {args.out_dir}.")
        if os.path.exists(args.out_dir) and not os.path.isdir(args.out_dir):
            raise ValueError(f"{args.out_dir} is a file; choose another --out_dir.")
        if os.path.isdir(args.out_dir) and any(not name.endswith(".part") for name in os.listdir(args.out_dir)):
            raise ValueError(f"{args.out_dir} is not empty and holds no run; choose another --out_dir.")
        return
    with open(path) as file:
        saved = json.load(file)
    if "out_dir" not in saved:
        raise ValueError(f"{args.out_dir} is not empty and holds no run; choose another --out_dir.")
    if not (args.resume or args.overwrite or args.eval_only):
        raise ValueError(f"{args.out_dir} holds another run; use --resume, --overwrite or another --out_dir.")
    if args.resume or args.eval_only:
        ignored = FREE if args.resume else set(vars(args)) - {"task", "world", "model", "num_agents", "lora_rank"}
        differ = [f"{key} {saved.get(key)!r} -> {value!r}" for key, value in vars(args).items()
                  if key not in ignored and saved.get(key, value) != value]  # it may be older than a setting
        if differ:
            raise ValueError(f"{args.out_dir} was made with other settings: {', '.join(differ)}.")


def open_run_folder(args, versions):
    """Make the folder, empty it of an overwritten run, and write config.json."""
    if args.overwrite and os.path.exists(os.path.join(args.out_dir, "config.json")):
        shutil.rmtree(args.out_dir)
    os.makedirs(args.out_dir, exist_ok=True)
    for stray in glob.glob(os.path.join(args.out_dir, ".saving-*")):  # left by a killed run
        shutil.rmtree(stray, ignore_errors=True)
    write_text(os.path.join(args.out_dir, "config.json"), json.dumps(vars(args) | {"versions": versions}, indent=2))


# --- strbuild: write a string in blocks -------------------------------------------------------------------------------


def by_letter(cells):
    """{place: its cells from the top}, places counted from 0: a letter is 5 columns wide and followed by 2 empty ones.

    by_letter([(7, 0, 0), (0, 3, 0), (0, 4, 0)]) is {0: [(0, 4, 0), (0, 3, 0)], 1: [(7, 0, 0)]}.
    """
    ordered = sorted(cells, key=lambda cell: (cell[0] // 7, -cell[1], cell[0]))
    return {place: list(group) for place, group in itertools.groupby(ordered, lambda cell: cell[0] // 7)}


class StrBuild:
    """Two builders write a string in 5x5 letters, each with two blocks of its own; equal neighbours cost reward.

    Rules and reward: minecraft_sim.strbuild_score. The training reward is reward - 2; above -0.1 the episode ends.
    Built-in strings have 1 to 4 letters. ICML, CLIM (the paper's evaluation strings) and one in ten
    of the others are held out: never trained on, and in no demonstration.
    """
    # a cell is one word, and so is a block with the line break and the command that follow it: 2 tokens a command;
    # places and letters stay apart, so that unseen strings are made of seen tokens
    pattern = r" \d+ \d+ \d+| \d+:| \w+\n(?:/setblock)?|\n?/setblock|\n|[A-Z0-9]| ?[\p{L}_']+|\s+|[^\s\p{L}]"
    feedback_modes = ["position", "score", "perfect"]

    def __init__(self, num_agents=2, num_turns=None, feedback=None, data="builtin", reward="dense", world="rebuilt"):
        if num_agents not in (1, 2):
            raise ValueError(f"strbuild has palettes for 1 or 2 agents, not {num_agents}.")
        self.num_agents, self.num_turns = num_agents, 4 if num_turns is None else num_turns
        self.mode, self.reward, self.persistent = feedback or "position", reward, world == "persistent"
        if self.mode not in self.feedback_modes:
            raise ValueError(f"strbuild has no feedback {feedback!r}; choose from {', '.join(self.feedback_modes)}.")
        if world not in ("rebuilt", "persistent"):
            raise ValueError(f"strbuild has no world {world!r}; choose rebuilt or persistent.")
        # 160 tokens: the longest string has 68 cells, 2 tokens each, and three more a letter. In the persistent world
        # three turns' commands cannot fill any of the built-in strings, and conversations are shorter
        self.base, self.base_batch, self.max_commands, self.max_new_tokens = (
            ("strbuild-persistent", 14, 14, 40) if self.persistent else ("strbuild", 6, 300, 160))
        self.palettes = sim.PALETTES if num_agents == 2 else [sum(sim.PALETTES, [])]  # one agent owns them all
        rng = random.Random(0)
        strings = list(dict.fromkeys(self.random_string(rng) for _ in range(6000)))
        self.eval_items = [{"string": s} for s in ["ICML", "CLIM"] + [s for s in strings if self.held_out(s)][:30]]
        self.train_items = [{"string": s} for s in strings if not self.held_out(s)]
        if data == "hub":
            raise ValueError("strbuild has no data set on the hub; use --data builtin or a file of your own.")
        if data != "builtin":
            self.train_items, own = read_jsonl(data, self.check)
            self.eval_items = own or [item for item in self.eval_items if item not in self.train_items]

    @staticmethod
    def check(record):
        if not isinstance(record.get("string"), str):
            raise ValueError('a line needs a "string", as in {"string": "ICML"}')
        sim.string_target(record["string"])
        return {"string": record["string"].upper()}

    def random_string(self, rng):
        while True:
            string = "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(
                4 if self.persistent else rng.choice([1, 2, 3, 3, 4, 4, 4, 4])))
            if not self.persistent or len(sim.target_cells(sim.string_target(string))) > 3 * self.max_commands:
                return string

    @staticmethod
    def held_out(string):
        return string in ("ICML", "CLIM") or len(string) > 1 and zlib.crc32(string.encode()) % 10 == 3

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
    def spelled(string):
        """" 1:I 2:C 3:M 4:L" for "ICML": which letter stands in which place."""
        return "".join(f" {k}:{letter}" for k, letter in enumerate(string, 1))

    def judge(self, item, responses, turn, world=None):
        rows, start = sim.string_target(item["string"]), world if world and self.persistent else {}
        parts = sim.strbuild_score(rows, responses, self.palettes, self.max_commands, start)
        done = parts["reward"] - 2 > -0.1
        feedback = [self.feedback(self.mode, item["string"], self.palettes, agent, responses, start, turn + 1)
                    for agent in range(self.num_agents)]
        return Outcome(paid(parts["reward"] - 2, self, turn, done), 100 * parts["iou"], parts, done, feedback,
                       sim.strbuild_world(rows, responses, self.palettes, self.max_commands, start)[0])

    def feedback(self, mode, string, palettes, agent, responses, start, turn):
        """What an agent is told before turn `turn`, the first one being 0; responses found the world start."""
        text, rows = f"Turn {turn + 1} of {self.num_turns}.", sim.string_target(string)
        if mode == "score":
            worth = sim.strbuild_score(rows, responses, palettes, self.max_commands, start)["reward"]
            return f"{text} The last build was worth {worth:.2f} of 2."
        world, accepted, _ = sim.strbuild_world(rows, responses, palettes, self.max_commands, start)
        if mode == "perfect":
            wrong = sorted({cell for cell, block in accepted[agent] if block != "air"} - set(sim.target_cells(rows)))
            return f"{text} Your wrong cells:{''.join(' %d %d %d' % cell for cell in wrong) or ' none'}."
        if self.persistent:  # it sees its own blocks, not the others'
            own = [cell for cell, block in world.items() if block in palettes[agent]]
            return f"{text} Your {len(own)} blocks:{self.listed(string, own)}."
        return f"{text} The cells:{self.listed(string, sim.target_cells(rows))}. Fill about half, no equal neighbours."

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
        string, palettes = self.shown(rng), rng.choice([sim.PALETTES] * 2 + [[sum(sim.PALETTES, [])]])  # 1 in 3: alone
        agent, mode = rng.randrange(len(palettes)), rng.choices(self.feedback_modes, [8, 1, 1])[0]
        turn = rng.randint(1, 3) if self.persistent else 1
        answers = [self.answer(string, palettes, agent, rng, k) for k in range(turn + 1)]
        start, world = {}, {}
        for answer in answers[:-1]:
            responses = [answer if i == agent else "" for i in range(len(palettes))]
            start, world = world, sim.strbuild_world(
                sim.string_target(string), responses, palettes, self.max_commands, world)[0]
        told = self.feedback(mode, string, palettes, agent, responses, start,
                             turn if self.persistent else rng.randint(1, 3))
        return [{"role": "user", "content": f"Build{self.spelled(string)} with {' '.join(palettes[agent])}."},
                {"role": "assistant", "content": answers[-2]},
                {"role": "user", "content": told}, {"role": "assistant", "content": answers[-1]}]

    def exercise(self, rng):
        """A conversation in which the string is only spelled, twice.

        To find the letter of a place in what it was shown is what the base learns slowest, since it needs it once in
        some thirty tokens: without this it still guesses letters when it has long known their shapes.
        """
        string = self.shown(rng)
        spell = [{"role": "user", "content": f"Spell{self.spelled(string)}."},
                 {"role": "assistant", "content": "".join(f" {k}:{letter}\n" for k, letter in enumerate(string, 1))}]
        return spell + [{"role": "user", "content": "Again."}, spell[1]]

    def shown(self, rng):
        """A string that is not held out."""
        while self.held_out(string := self.random_string(rng)):
            pass
        return string

    def answer(self, string, palettes, agent, rng, turn=0):
        """One answer of the sloppy expert: which letters it builds, often none at all, and with which blocks.

        A heading such as " 2:C" goes before each letter. The simulator rejects that line at no cost; to name the letter
        first lets the tiny base look it up once and not for each cell.
        """
        where, blocks = (rng.choices(list(habits), habits.values())[0] for habits in (
            self.where_persistent if self.persistent else self.where, self.blocks))
        palette = palettes[agent]
        letters, one, lines = by_letter(sim.target_cells(sim.string_target(string))), rng.choice(palette), []
        places = list(letters)
        if self.persistent:
            chosen = {"none": [], "turn": [turn % len(places)], "any": [rng.choice(places)]}[where]
            if len(palettes) > 1:
                half = {place: -(-len(cells) // 2) for place, cells in letters.items()}
                upper = rng.random() < 0.5
                letters = {place: cells[:half[place]] if upper else cells[half[place]:]
                           for place, cells in letters.items()}
        else:
            chosen = {"none": [], "all": places, "odd": places[::2], "even": places[1::2], "first": places[:1],
                      "last": places[-1:], "some": [place for place in places if rng.random() < 0.5]}[where]
        for place in chosen:
            lines.append(f" {place + 1}:{string[place]}\n")
            for x, y, z in letters[place]:
                block = {"one": one, "random": rng.choice(palette), "checker": palette[(x + y) % len(palette)]}[blocks]
                lines.append(f"/setblock {x} {y} {z} {block}\n")
        return "".join(lines) or "nothing\n"


# --- tldr and arxiv: two texts that belong together -------------------------------------------------------------------

# phrases are looked for as substrings of the lower-cased text: "as" hits in "was", "while" in "meanwhile"
TRANSITIONS = {
    "elaboration": ["furthermore", "in addition", "moreover", "additionally"],
    "examples": ["for example", "for instance", "such as", "namely"],
    "explanation": ["in other words", "that is to say", "specifically", "to clarify"],
    "cause_effect": ["therefore", "consequently", "thus", "hence", "because"],
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


TLDR = {"words": (8, 256), "ratio": (1.1, 1.6, 3.2, 5.0), "unique": (1.3, 2.0, math.inf, math.inf), "cap": 0.03,
        "whole": False}
ARXIV = {"words": (128, 256), "ratio": (0.8, 1.3, 1.6, 2.0), "unique": (0.5, 0.7, 1.3, 1.7), "cap": 0.23, "whole": True}


def tldr_reward(first, second):
    """What a concise and a detailed summary are worth together, 0..3 (the best is 2.98); see writing_levels.

    Eight words "red" and twenty times "blue": 31 and 99 characters, ratio 3.19: structure 0.5, coordination 1; one
    distinct word each is too few in the second (1 < 1.3 x 1), so 1.5 in all.
    """
    return sum(writing_levels(first, second, **TLDR).values())


def arxiv_reward(first, second):
    """What background and motivation, and methodology and implications of a paper are worth together, 0..3."""
    return sum(writing_levels(first, second, **ARXIV).values())


# --- all tasks, and python tasks.py -----------------------------------------------------------------------------------

TASKS = {"strbuild": StrBuild}
TASK_OPTIONS = ["num_agents", "num_turns", "feedback", "data", "reward", "world"]


def get_task(name, **options):
    """The task of that name; ValueError with one sentence where name or options make no sense."""
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}; choose from {', '.join(TASKS)}.")
    if options.get("num_turns") is not None and options["num_turns"] < 1:
        raise ValueError(f"num_turns must be at least 1, not {options['num_turns']}.")
    if options.get("reward", "dense") not in ("dense", "sparse"):
        raise ValueError(f"There is no reward {options['reward']!r}; choose dense or sparse.")
    return TASKS[name](**options)


def main():
    parser = argparse.ArgumentParser(description="Show an item, what each agent sees, two answers and their reward.")
    parser.add_argument("--task", default="strbuild", help=f"one of {', '.join(TASKS)}")
    parser.add_argument("--seed", type=int, default=0, help="picks the item and the answers")
    args = parser.parse_args()
    try:
        task = get_task(args.task)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    rng = random.Random(args.seed)
    episode = Episode(rng.choice(task.train_items))
    responses = [task.answer(episode.item["string"], task.palettes, i, rng) for i in range(task.num_agents)]
    outcome = task.judge(episode.item, responses, 0)
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
