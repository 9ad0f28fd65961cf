"""
Minecraft without Minecraft: the StrBuild world, its rules and its score, in plain Python.

A team is given a string drawn in 5x5 letters and writes it as blocks on a wall. Each agent answers with lines
"/setblock x y z block"; it may only use the blocks of its own palette and only its share of the commands. The world
starts empty and is built from agent 0's accepted commands, then agent 1's; later commands overwrite earlier ones.
The rules are those of the official environment of arXiv 2601.21972, so scores can be compared with the paper's.

One worked example. The target is 2 rows of 3 columns: 4 target cells, 2 background cells.

    target   agent 0 writes              agent 1 writes              world
    ###      setblock 0 1 0 oak_planks   setblock 1 1 0 obsidian     OB.     . = target cell, empty
    #..      setblock 0 0 0 stone        setblock 1 0 0 obsidian     Sb      b = obsidian on background

    coverage             3 of 4 target cells are filled                                 0.75
    extra_ratio          1 of 2 background cells is filled                              0.50
    adjacent_same_ratio  4 pairs of blocks share a side, 1 has equal blocks: obsidian   0.25
    missing_palettes     agent 1 never used white_concrete                              1
    reward = 2 x 0.75 - 1.5 x 0.50 - 0.25 - 0.25 x 1 = 0.25   (the best is 2);   IoU = 3 / (4 + 1) = 0.6

    python minecraft_sim.py [LLM] [--svg llm.svg]     # two scripted builders write ICML or LLM; and a picture of it
"""
import argparse
import collections
import itertools
import os
import re
import signal

# --- the target: a string as a wall of cells --------------------------------------------------------------------------

GLYPHS = """
A     B     C     D     E     F     G     H     I     J     K     L     M     N     O     P     Q     R
.###. ####. .#### ####. ##### ##### .#### #...# ##### ##### #...# #.... #...# #...# .###. ####. .###. ####.
#...# #...# #.... #...# #.... #.... #.... #...# ..#.. ...#. #..#. #.... ##.## ##..# #...# #...# #...# #...#
##### ####. #.... #...# ####. ####. #.### ##### ..#.. ...#. ###.. #.... #.#.# #.#.# #...# ####. #.#.# ####.
#...# #...# #.... #...# #.... #.... #...# #...# ..#.. #..#. #..#. #.... #...# #..## #...# #.... #..#. #..#.
#...# ####. .#### ####. ##### #.... .#### #...# ##### .##.. #...# ##### #...# #...# .###. #.... .##.# #...#
S     T     U     V     W     X     Y     Z     0     1     2     3     4     5     6     7     8     9
.#### ##### #...# #...# #...# #...# #...# ##### .###. ..#.. ####. ####. #..#. ##### .###. ##### .###. .###.
#.... ..#.. #...# #...# #...# .#.#. .#.#. ...#. #..## .##.. ....# ....# #..#. #.... #.... ....# #...# #...#
.###. ..#.. #...# #...# #.#.# ..#.. ..#.. ..#.. #.#.# ..#.. .###. .###. ##### ####. ####. ...#. .###. .####
....# ..#.. #...# .#.#. ##.## .#.#. ..#.. .#... ##..# ..#.. #.... ....# ...#. ....# #...# ..#.. #...# ....#
####. ..#.. .###. ..#.. #...# #...# ..#.. ##### .###. ##### ##### ####. ...#. ####. .###. ..#.. .###. .###.
""".split()
# each band of the sheet has 18 names, then 5 rows of 18 pieces: successive rows of a glyph are 18 words apart
LETTERS = {GLYPHS[band + i]: GLYPHS[band + i + 18:band + 108:18] for band in (0, 108) for i in range(18)}


def string_target(text):
    """The target of a string: 5 top-down rows of '#' and '.', two empty columns between two letters.

    string_target("IC") has 5 + 2 + 5 = 12 columns; its first row is "#####...####".
    """
    wrong = [f"character {char!r} cannot be drawn" for char in text if char.upper() not in LETTERS]
    if wrong or not text:
        raise ValueError(f"The {wrong[0] if wrong else 'string is empty'}; use letters A-Z and digits 0-9.")
    return ["..".join(LETTERS[char.upper()][row] for char in text) for row in range(5)]


def target_cells(target_rows):
    """The cells (x, y, z) to fill, in reading order; y counts blocks up from the ground, so the top row is y = H-1.

    target_cells(["##", "#."]) is [(0, 1, 0), (1, 1, 0), (0, 0, 0)].
    """
    H = len(target_rows)
    return [(x, H - 1 - r, 0) for r, row in enumerate(target_rows) for x, char in enumerate(row) if char == "#"]


def cells_by_letter(cells, by_color=False):
    """{index: the cells of the letter at that index, from the top}; by_color: first those with even x + y.

    cells_by_letter([(7, 0, 0), (0, 3, 0), (0, 4, 0)]) is {0: [(0, 4, 0), (0, 3, 0)], 1: [(7, 0, 0)]}.
    """
    ordered = sorted(cells, key=lambda cell: (cell[0] // 7, by_color and sum(cell) % 2, -cell[1], cell[0]))
    return {index: list(group) for index, group in itertools.groupby(ordered, lambda cell: cell[0] // 7)}


def cells_text(cells):
    """Their coordinates: " 8 4 0 9 4 0" for two cells."""
    return "".join(" %d %d %d" % cell for cell in cells)


def letters_text(text, cells=None, end="", by_color=False):
    """" 1:I 2:C" for "IC": each letter with its number. Given two cells of the C: " 2:C 8 4 0 9 4 0"."""
    letters = dict.fromkeys(range(len(text)), []) if cells is None else cells_by_letter(cells, by_color)
    return "".join(f" {index + 1}:{text[index]}{cells_text(group)}{end}" for index, group in letters.items())

# --- reading answers: lines that are no command are rejected, whatever a model wrote ---------------------------------

PALETTES = [["oak_planks", "stone"], ["white_concrete", "obsidian"]]  # agent 0's blocks, agent 1's blocks
EMPTY = ("air", "cave_air", "void_air")
KILL = (0, 0, 0), (-1, -1, -1), "kill"  # a command that fills no cell


def command_lines(response):
    r"""The lines of an answer that may be commands, without code fences, blank lines and list markers.

    "Sure!\n```text\n1. /setblock 0 0 0 stone\n\n- kill\n```\nDone." gives ["/setblock 0 0 0 stone", "kill"].
    A bare kill in the line below the opening fence is kept; the official code takes it for a language and loses it.
    """
    parts = response.split("```", 2)
    if len(parts) == 3:  # two fences or more: read between the first two
        tag, newline, rest = parts[1].partition("\n")  # a language tag; "/kill" is not one
        response = rest if newline and re.fullmatch(r"[\w+#.-]+", tag.strip()) else parts[1]
    lines = [re.sub(r"^([-*]+|\d+[.)])\s*", "", line.strip()) for line in response.splitlines()]
    return [line for line in lines if line]


def read_command(line, verb, blocks, bbox):
    """A line as a command (low corner, high corner, block); ValueError with the reason if it is none.

    verb is "setblock", which names one cell, or "fill", with which a kill counts as a command, too. bbox holds the
    corners of the box to build in. "/setblock 1 0 0 minecraft:stone" is ((1, 0, 0), (1, 0, 0), "stone").
    """
    words, size = line.removeprefix("/").split(), {"setblock": 5, "fill": 8}[verb]
    name = words[0].lower() if words else ""  # "/ setblock" is one, "//setblock" is not
    if name == "kill" and verb == "fill":
        return KILL
    if name != verb:
        raise ValueError(f"not a {verb} command")
    if len(words) < size or verb == "fill" and len(words) > size:  # further words of a setblock are ignored
        raise ValueError(f"{'fewer' if len(words) < size else 'more'} than {size} words")
    try:
        numbers = [int(word) for word in words[1:size - 1]]  # "+2" is one; "1.0", "~1" and 5,000 digits are not
    except ValueError:
        raise ValueError("a coordinate is not an integer") from None
    block = words[size - 1].removeprefix("minecraft:")
    if block != "air" and block not in {name.removeprefix("minecraft:") for name in blocks}:  # case-sensitive
        raise ValueError("block not in the palette")
    if not all(bbox[0][i % 3] <= number <= bbox[1][i % 3] for i, number in enumerate(numbers)):
        raise ValueError("outside the box")
    low, high = (tuple(map(pick, numbers[:3], numbers[-3:])) for pick in (min, max))
    return low, high, block


def box_cells(low, high):
    """The cells between two corners: (0, 0, 0) and (1, 0, 0) give [(0, 0, 0), (1, 0, 0)]."""
    return list(itertools.product(*(range(a, b + 1) for a, b in zip(low, high))))


def read_commands(response, blocks, bbox, share, verb="setblock", limits=None):
    r"""Split one agent's answer into accepted commands, `share` at most, and rejected [(line, reason), ...] ones.

    limits is {block: how many this agent may use}, None for no limit. "/setblock 1 0 0 stone\n/kill" gives
    [((1, 0, 0), (1, 0, 0), "stone")] and [("/kill", "not a setblock command")].
    """
    accepted, rejected, used = [], [], collections.Counter()
    for line in command_lines(response):
        try:
            low, high, block = read_command(line, verb, blocks, bbox)
            volume = len(box_cells(low, high))
            if len(accepted) >= share:
                raise ValueError("over the share of commands")
            if limits is not None and block != "air" and used[block] + volume > limits.get(block, 0):
                raise ValueError("too few blocks")  # uses up nothing: a later, smaller fill may be accepted
            used[block] += volume
            accepted.append((low, high, block))
        except ValueError as reason:
            rejected.append((line, str(reason)))
    return accepted, rejected


def build_world(responses, palettes, bbox, max_commands, start=(), verb="setblock", limits=None):
    """Build a joint action on a world `start`: (world, accepted, rejected); the last two hold a list per agent, and
    world is {(x, y, z): block} without air. If agent 1 overwrites agent 0's only block, stone, with obsidian, it is
    {(0, 0, 0): "obsidian"}; with air it is {}. Of 7 max_commands agent 0 has 4 and agent 1 has 3, and each at least 1.
    """
    world, accepted, rejected, num_agents = dict(start), [], [], len(responses)
    for agent, (response, palette) in enumerate(zip(responses, palettes)):
        share = max(1, max_commands // num_agents) + (max_commands % num_agents if agent == 0 else 0)
        commands, others = read_commands(response, palette, bbox, share, verb, limits)
        accepted.append(commands)
        rejected.append(others)
        for low, high, block in commands:  # in order: later ones overwrite
            world.update(dict.fromkeys(box_cells(low, high), block))
    return {cell: block for cell, block in world.items() if block not in EMPTY}, accepted, rejected


def overlap(target, accepted):
    """Share of the target's cells that two agents' accepted commands fill: 1/2 if one of two cells is filled twice."""
    filled = [{cell for low, high, block in own if block not in EMPTY for cell in box_cells(low, high)}
              for own in accepted]
    return sum(sum(cell in cells for cells in filled) > 1 for cell in target) / max(1, len(target))

# --- strbuild: the world and its score --------------------------------------------------------------------------------

def strbuild_world(target_rows, responses, palettes, max_commands=300, start=()):
    """build_world of a string; start is empty by the official rules, the last turn's world in a persistent one."""
    bbox = (0, 0, 0), (len(target_rows[0]) - 1, len(target_rows) - 1, 0)
    return build_world(responses, palettes, bbox, max_commands, start)


def texture(block):
    """The texture of a block: oak_planks is wood, stone and cobblestone are both stone."""
    kinds = {"wood": ("_planks", "_wood"), "stone": ("_stone", "_stone_bricks"), "concrete": "_concrete"}
    name = "_stone" if block in ("stone", "cobblestone", "stone_bricks") else block
    return next((kind for kind, endings in kinds.items() if name.endswith(endings)), block)


def strbuild_score(target_rows, responses, palettes, max_commands=300, start=()):
    """Score a joint action; the example at the top of this file gives reward 0.25 and iou 0.6.

    reward is at most 2; iou, coverage, extra_ratio and adjacent_same_ratio are in 0..1 (0 where they would divide by
    zero); missing_palettes counts agents with an unused block; accepted is the number of accepted commands per agent.
    """
    world, accepted, _ = strbuild_world(target_rows, responses, palettes, max_commands, start)
    target, size = set(target_cells(target_rows)), len(target_rows) * len(target_rows[0])
    covered, extra = len(target & world.keys()), len(world.keys() - target)
    pairs = [(block, world[neighbour]) for (x, y, z), block in world.items()
             for neighbour in [(x + 1, y, z), (x, y + 1, z)] if neighbour in world]
    coverage, extra_ratio = covered / max(1, len(target)), extra / max(1, size - len(target))
    adjacent_same_ratio = sum(texture(a) == texture(b) for a, b in pairs) / max(1, len(pairs))
    used, own = {*EMPTY, *world.values()}, palettes[:len(responses)]
    missing = sum(any(block.removeprefix("minecraft:") not in used for block in palette) for palette in own)
    return {"reward": 2 * coverage - 1.5 * extra_ratio - adjacent_same_ratio - 0.25 * missing,
            "iou": covered / max(1, len(target) + extra), "coverage": coverage, "extra_ratio": extra_ratio,
            "adjacent_same_ratio": adjacent_same_ratio, "missing_palettes": missing, "accepted": [*map(len, accepted)]}

# --- housebuild -------------------------------------------------------------------------------------------------------

HOUSE_BLOCKS = ["white_concrete", "obsidian", "stone_stairs", "stone_bricks", "planks"]  # of our generated houses


def house_target(layers, inventory):
    """{(x, y, z): block} of a blueprint, without air: layers is {y: rows of letters}; a row is z, a column is x.

    {0: ["AB", ".A"]} with {"A": "planks", "B": "obsidian"} is planks at (0, 0, 0) and (1, 0, 1) and obsidian at
    (1, 0, 0); "." is air unless the inventory says otherwise. Any other letter missing there raises ValueError.
    """
    inventory = {letter: block.removeprefix("minecraft:") for letter, block in ({".": "air"} | inventory).items()}
    letters = {(x, y, z): row[x] for y, rows in layers.items() for z, row in enumerate(rows) for x in range(len(row))}
    if unknown := sorted(set(letters.values()) - inventory.keys()):
        raise ValueError(f"The letter {unknown[0]!r} of the blueprint is not in the inventory.")
    return {cell: inventory[letter] for cell, letter in letters.items() if inventory[letter] not in EMPTY}


def random_house(rng):
    """A blueprint (layers, inventory): walls with posts and a door, a floor, a gabled roof of stairs; 4..8 cells wide,
    deep and high. The roof rises one layer per row from the front and the back; its gables and its ridge are bricks.
    """
    W, D = rng.randint(4, 8), rng.randint(4, 8)
    roof = -(-D // 2)
    walls, door = rng.randint(2, 8 - roof), rng.randint(1, W - 2)
    def block(x, y, z):
        if y < walls:
            side_x, side_z = x in (0, W - 1), z in (0, D - 1)
            wall = "O" if side_x and side_z else "." if (x, z) == (door, 0) and y < 2 else "W"
            return wall if side_x or side_z else "P" if y == 0 else "."
        k = y - walls
        if z in (k, D - 1 - k):
            return "B" if 2 * k + 1 == D else "S"
        return "B" if k < z < D - 1 - k and x in (0, W - 1) else "."
    return ({y: ["".join(block(x, y, z) for x in range(W)) for z in range(D)] for y in range(walls + roof)},
            dict(zip("WOSBP", HOUSE_BLOCKS)))


def check_house(layers, inventory, attacks):
    """A person's house as an item, with integers instead of texts as heights; ValueError if it is none."""
    if not (isinstance(layers, dict) and isinstance(inventory, dict) and isinstance(attacks, list)
            and all(re.fullmatch(r"-?\d+", str(y)) and isinstance(rows, list) and rows for y, rows in layers.items())
            and all(isinstance(row, str) for rows in layers.values() for row in rows)
            and all(isinstance(block, str) and re.fullmatch(r"\S+", block) for block in inventory.values())
            and all(type(attack) is int and 0 <= attack < 1000 for attack in attacks)):
        raise ValueError('a line needs "layers" {"0": ["WW", ".."], ...} and "inventory" {"W": "planks", ...} with '
                         'block names without blanks, and may have "spider_attacks" [2, 1, 3]')
    house = {int(y): rows for y, rows in layers.items()}
    sizes = [(len(rows), len(row)) for rows in house.values() for row in rows]
    if sum(width for _, width in sizes) > 4096:
        raise ValueError("a house has at most 4096 cells (16 x 16 x 16)")
    if len(set(sizes)) != 1 or max(house) - min(house) != len(layers) - 1 or not house_target(house, inventory):
        raise ValueError("the layers of a house must be consecutive rectangles, equally large, and hold a block")
    return {"layers": house, "inventory": inventory, "spider_attacks": attacks}


def house_text(layers, inventory):
    r"""A blueprint as the text of boxes, layer by layer from the ground.

    A box has one kind of block and at most half of all cells of that kind (or it is a single cell), because no agent
    may fill many more. {0: ["PP"], 1: ["P."]} with planks P gives three boxes, since half of 3 is 1:
    " 1: 0 0 0 0 0 0 planks\n 2: 1 0 0 1 0 0 planks\n 3: 0 1 0 0 1 0 planks\n".
    """
    remaining, boxes = house_target(layers, inventory), []
    most = {block: max(1, count // 2) for block, count in collections.Counter(remaining.values()).items()}
    for low in sorted(remaining, key=lambda cell: (cell[1], cell[2], cell[0])):  # by layer, row, column
        if low not in remaining:
            continue
        block, cells = remaining[low], [low]
        for axis in (0, 2, 1):  # grow as long as the box is of one block
            while len(cells) <= most[block] and all(remaining.get(cell) == block for cell in cells):
                high = cells[-1]
                cells = box_cells(low, [x + (i == axis) for i, x in enumerate(high)])
            cells = box_cells(low, high)
        boxes.append((low, high, block))
        for cell in cells:
            del remaining[cell]
    return boxes_text(boxes)


def boxes_text(boxes):
    """The boxes as numbered lines, such as " 1: 0 0 0 1 0 0 planks"."""
    return "".join(" %d: %d %d %d %d %d %d %s\n" % (number, *low, *high, block)
                   for number, (low, high, block) in enumerate(boxes, 1))


def block_limits(target, num_agents):
    """How many blocks of each kind one agent may use: 10 in the target and two agents give 5 + 2 = 7 each."""
    return {block: -(-count // num_agents) + count // (2 * num_agents)
            for block, count in collections.Counter(target.values()).items()}


def housebuild_world(layers, inventory, responses, max_commands=600, limited_resource=True):
    """build_world of a house; every agent may use the blocks of the inventory, and air."""
    rows, limits = next(iter(layers.values())), block_limits(house_target(layers, inventory), len(responses))
    bbox = (0, min(layers), 0), (len(rows[0]) - 1, max(layers), len(rows) - 1)
    return build_world(responses, [inventory.values()] * len(responses), bbox, max_commands, verb="fill",
                       limits=limits if limited_resource else None)


def housebuild_score(layers, inventory, responses, player_hp=5, spider_attacks=(), max_commands=600,
                     limited_resource=True):
    """Score a joint action. reward = match - spider_penalty, at most 1; iou is that of the non-air cells.

    match counts air cells, too; the penalty is 0.1 x min(1, sum of attacks / player_hp) if a team of two or more is
    attacked and no kill was accepted. "fill 0 0 0 1 0 0 planks" of a house {0: ["PP"], 1: [".P"]} of planks: match 3/4,
    iou 2/3; with a silent second agent and attacks (1, 2) the penalty is 0.1 x 3/5 = 0.06.
    """
    world, accepted, _ = housebuild_world(layers, inventory, responses, max_commands, limited_resource)
    target = house_target(layers, inventory)
    size = sum(len(row) for rows in layers.values() for row in rows)
    union, damage, penalty = world.keys() | target.keys(), sum(spider_attacks), 0.0
    match = (size - sum(world.get(cell) != target.get(cell) for cell in union)) / size
    if len(responses) >= 2 and damage > 0 and player_hp > 0 and not any(KILL in commands for commands in accepted):
        penalty = 0.1 * min(1.0, damage / player_hp)
    return {"reward": match - penalty, "iou": len(world.keys() & target.keys()) / max(1, len(union)),
            "match": match, "spider_penalty": penalty, "accepted": [len(commands) for commands in accepted]}

# --- pictures ---------------------------------------------------------------------------------------------------------

BLOCKS = {"oak_planks": ("O", (184, 142, 86)), "stone": ("S", (125, 125, 125)), "obsidian": ("B", (44, 32, 66)),
          "white_concrete": ("W", (214, 221, 224)), "stone_stairs": ("T", (104, 108, 112)),
          "stone_bricks": ("N", (140, 138, 134)), "planks": ("P", (162, 120, 68))}  # letter; red, green, blue
OTHER_COLOR = (196, 92, 160)  # of blocks in a person's own house, whose letters may coincide


def wall_plan(item):
    """An item as the drawing functions need it: ({target cell: None, meaning any block}, rows of cells, title)."""
    rows = string_target(item["string"])
    grid = [[(x, y, 0) for x in range(len(rows[0]))] for y in reversed(range(len(rows)))]
    return dict.fromkeys(target_cells(rows)), grid, item["string"]


def house_plan(item):
    """The same for a house: ({target cell: block}, rows, title); layers, four side by side, are seen from above."""
    layers, grid = item["layers"], []
    ys, rows = sorted(layers), next(iter(layers.values()))
    for band in range(0, len(ys), 4):
        grid += [[cell for y in ys[band:band + 4] for cell in [*((x, y, z) for x in range(len(rows[0]))), None, None]]
                 for z in reversed(range(len(rows)))] + [[]]
    return house_target(layers, item["inventory"]), grid[:-1], "house"


def draw(plan, world, color=False):
    """The plan's rows and a legend: a letter per block, small if it is stray, and "." (in colour xx, []) if missing."""
    target, grid, _ = plan
    color = color and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    correct = {cell: cell in target and target[cell] in (None, block) for cell, block in world.items()}
    missing, blank = ("\x1b[2m[]\x1b[0m", "  ") if color else (".", " ")

    def paint(block, correct):
        letter, (r, g, b) = BLOCKS.get(block, (block[0].upper(), OTHER_COLOR))
        if color:
            return f"\x1b[48;2;{r};{g};{b};38;2;255;64;64m{'  ' if correct else 'xx'}\x1b[0m"
        return letter if correct else letter.lower()

    lines = ["".join(paint(world[cell], correct[cell]) if cell in world else missing if cell in target else blank
                     for cell in row).rstrip(" " if None in row else "") for row in grid]
    legend = [f"{paint(block, not stray)} {block}{' (stray)' * stray}"
              for block, stray in sorted({(block, not correct[cell]) for cell, block in world.items()})]
    return "\n".join([*lines, "  ".join([*legend, f"{missing} missing"])])


def draw_svg(plan, world):
    """A standalone isometric picture (SVG text): cubes of 20 pixels, missing ones dashed, stray ones with red edges."""
    def screen(x, y, z):  # x runs right and up, z right and down towards the viewer, in pixels
        return 17.32 * (x + z), 10 * (z - x) - 20 * y
    def shade(color, light):  # light > 0 mixes with white, < 0 with black
        return "#" + "".join(f"{round(c + light * (255 - c if light > 0 else c)):02x}" for c in color)
    target, grid, title = plan
    xs, ys, zs = zip(*(cell for row in grid for cell in row if cell))
    top = screen(1 + max(xs), 1 + max(ys), 0)[1] - 34  # room for the title
    width = 20 + round(max(screen(1 + max(xs), 0, 1 + max(zs))[0], 9 * len(title)))
    height = round(screen(0, min(ys), 1 + max(zs))[1] + 10 - top)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
             f'viewBox="-10 {top:.0f} {width} {height}" stroke-linejoin="round">',
             f'<rect x="-10" y="{top:.0f}" width="{width}" height="{height}" rx="8" fill="#f2f5f9"/>',
             f'<text x="2" y="{top + 24:.0f}" font-family="sans-serif" font-size="15" fill="#333">{title}</text>']
    faces = [(0.25, [(0, 1, 0), (1, 1, 0), (1, 1, 1), (0, 1, 1)]),    # top
             (-0.35, [(0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 0, 1)]),   # left side
             (0, [(0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1)])]       # front
    for cell in sorted(target.keys() | world.keys(), key=lambda cell: (cell[2], -cell[0], cell[1])):  # back to front
        block, (_, color) = world.get(cell), BLOCKS.get(world.get(cell), ("", OTHER_COLOR))
        edge = shade(color, -0.45) if cell in target and target[cell] in (None, block) else "#e02020"
        lines.append(f'<g class="cube" stroke="{edge}">' if block else
                     '<g class="missing" stroke="#a9b4c2" stroke-dasharray="2">')
        for light, corners in faces:
            points = " ".join("{:.1f},{:.1f}".format(*screen(*map(sum, zip(cell, corner)))) for corner in corners)
            lines.append(f'<polygon points="{points}" fill="{shade(color, light) if cell in world else "none"}"/>')
        lines.append("</g>")
    return "\n".join(lines + ["</svg>"]) + "\n"

# --- python minecraft_sim.py: a perfect team, on a checkerboard so that no two blocks of one agent touch --------------

def scripted_builders(target_rows):
    """Two answers, perfect but for X and Y: agent 0 fills cells with even x + y, agent 1 odd ones, blocks by turns."""
    answers = [[], []]
    for x, y, z in target_cells(target_rows):
        lines, palette = answers[(x + y) % 2], PALETTES[(x + y) % 2]
        lines.append(f"/setblock {x} {y} {z} {palette[len(lines) % len(palette)]}")
    return ["\n".join(lines) for lines in answers]


def main():
    parser = argparse.ArgumentParser(description="Two scripted builders write a string in blocks.")
    parser.add_argument("text", nargs="?", default="ICML", help="letters A-Z and digits 0-9 (default: ICML)")
    parser.add_argument("--svg", metavar="FILE", help="also write an isometric picture, for a browser or a README")
    args = parser.parse_args()
    try:
        target, grid, title = wall_plan({"string": args.text.upper()})
        responses = scripted_builders(rows := string_target(title))
        score, (world, *_) = (f(rows, responses, PALETTES) for f in (strbuild_score, strbuild_world))
        if args.svg:
            with open(args.svg, "w", encoding="utf-8") as file:
                file.write(draw_svg((target, grid, f"{title}, IoU {score['iou']:.2f}"), world))
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback with | head
        for agent, response in enumerate(responses):
            print(f"agent {agent} has {' and '.join(PALETTES[agent])}; answers: {' '.join(response.split()[:5])} ...")
        print(f"\n{draw((target, grid, title), world, os.isatty(1))}\n")
        print(", ".join(f"{name} {part:.3f}" for name, part in score.items() if name != "accepted"), flush=True)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
