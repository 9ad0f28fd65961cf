"""StrBuild and HouseBuild: every number was computed by hand, or a second time by the brute force below."""
import itertools
import random
import subprocess
import sys

import pytest

import minecraft_sim as sim
from minecraft_sim import LETTERS, PALETTES, strbuild_score, strbuild_world, string_target, target_cells
from tasks import get_task

EXAMPLE = ["###", "#.."]  # the worked example of the header
ANSWERS = ["setblock 0 1 0 oak_planks\nsetblock 0 0 0 stone", "setblock 1 1 0 obsidian\nsetblock 1 0 0 obsidian"]
STONE = "setblock 0 0 0 stone"


def test_letters_and_targets():
    assert "".join(sorted(LETTERS)) == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ" and len(set(map(str, LETTERS.values()))) == 36
    assert all([len(row) for row in rows] == [5] * 5 and set("".join(rows)) == set("#.") for rows in LETTERS.values())
    assert string_target("9") == [".###.", "#...#", ".####", "....#", ".###."]
    assert string_target("ic")[:2] == ["#####...####", "..#....#...."]
    assert target_cells(["##", "#."]) == [(0, 1, 0), (1, 1, 0), (0, 0, 0)]
    assert (sim.letters_text("IC"), sim.letters_text("IC", [(9, 4, 0), (8, 4, 0)])) == (" 1:I 2:C", " 2:C 8 4 0 9 4 0")
    for text in ["", "A B", "ß", "A\0"]:
        with pytest.raises(ValueError):
            string_target(text)


@pytest.mark.parametrize("answer, accepted", [  # A, B and C stand for commands
    ("Sure!\n```text\n1. /A\n\n- B\n```\nC", "AB"),            # inside of the first fences only, without list markers
    ("A\n```\nB", "AB"), ("```A```", "A"), ("``````\nA", ""),  # a single fence encloses nothing
    ("```\nA\n```\n```\nB\n```", "A"), ("```/A\nB```", "AB"), ("``` c++ \r\nA\r\n```\nB", "A"),
    ("* A\n12) B\n 3.\tC", "ABC"), ("-A\n**B\n1.C", "ABC"), ("-*- A\n-1. B\n1. - C", "A"),
    ("- - A\n\u2022 B\n`C`", ""), ("//A\n/ B\nset C", "B")])
def test_where_commands_are_read(answer, accepted):
    for x, name in enumerate("ABC"):
        answer = answer.replace(name, f"setblock {x} 0 0 stone")
    assert set(strbuild_world(["..."], [answer], [["stone"]])[0]) == {("ABC".index(name), 0, 0) for name in accepted}


ACCEPTED = ["setblock 1 0 0 stone", "SetBlock 1 0 0 minecraft:stone", "setblock 1 0 0 stone replace now", "setblock\t+1 -0 0_0 stone",
            "setblock 1 00 0 stone", "setblock \u0661 0 0 stone", "  /SETBLOCK   1   0   0   stone  "]
REJECTED = ["fill 1 0 0 stone", "/", "set block 1 0 0 stone", "setblock 1 0 0", "setblock", "setblock 1.0 0 0 stone",
            "setblock ~1 0 0 stone", "setblock ^ 0 0 stone", "setblock 1, 0, 0 stone", "setblock 0x1 0 0 stone",
            "setblock 1\0 0 0 stone", "setblock \ud800 0 0 stone", f"setblock {'1' * 5001} 0 0 stone", "setblock 1 0 0 STONE",
            "setblock 1 0 0 obsidian", "setblock 1 0 0 cave_air", "setblock 1 0 0 minecraft:minecraft:stone", "setblock 3 0 0 stone",
            "setblock 0 2 0 stone", "setblock 0 0 1 stone", "setblock -1 0 0 stone", f"setblock {'9' * 4000} 0 0 stone"]


@pytest.mark.parametrize("line", ACCEPTED + REJECTED, ids=lambda line: ascii(line[:30]))
def test_lines(line):
    world = strbuild_world(EXAMPLE, [line], [["oak_planks", "stone"]])[0]
    assert world == ({(1, 0, 0): "stone"} if line in ACCEPTED else {})


def test_shares():
    """The first agent gets the remainder, everybody at least one command; a rejected line uses none up."""
    answer = "setblock 9 0 0 stone\n" + f"{STONE}\n" * 200
    for max_commands, num_agents, accepted in (7, 2, [4, 3]), (300, 2, [150, 150]), (5, 1, [5]), (1, 2, [2, 1]), (11, 3, [5, 3, 3]):
        assert strbuild_score(["#"], [answer] * num_agents, [["stone"]] * num_agents, max_commands)["accepted"] == accepted


def test_worked_example_air_order_and_empty_cases():
    assert strbuild_score(EXAMPLE, ANSWERS, PALETTES) == {"reward": 0.25, "iou": 0.6, "coverage": 0.75,
        "extra_ratio": 0.5, "adjacent_same_ratio": 0.25, "missing_palettes": 1, "accepted": [2, 2]}
    cave = strbuild_score(["#"], ["setblock 0 0 0 cave_air"], [["cave_air"]])  # a block of this palette, but none of the world
    assert (cave["accepted"], cave["coverage"]) == ([1], 0)
    stray = strbuild_score([".."], [STONE], [["stone", "air", "cave_air"]])  # no target; air need not be used
    assert (stray["reward"], stray["iou"], stray["missing_palettes"]) == (-0.75, 0, 0)
    full = strbuild_score(["##"], [STONE + "\nsetblock 1 0 0 cobblestone"], [["stone", "cobblestone"]])
    assert (full["reward"], full["extra_ratio"], full["adjacent_same_ratio"]) == (1.0, 0, 1)  # no background
    merged = strbuild_score(["#"], [STONE], [PALETTES[0] + PALETTES[1], ["unused"]])
    assert (merged["reward"], merged["missing_palettes"]) == (1.75, 1)  # agents count, not palettes
    start, answers = {(0, 1, 0): "stone", (1, 0, 0): "obsidian"}, ["setblock 1 1 0 stone", "setblock 1 0 0 air"]
    score = strbuild_score(EXAMPLE, answers, PALETTES, start=start)  # commands find the world that the last turn left
    assert strbuild_world(EXAMPLE, answers, PALETTES, start=start)[0] == {(0, 1, 0): "stone", (1, 1, 0): "stone"}
    assert (score["coverage"], score["extra_ratio"], score["adjacent_same_ratio"]) == (0.5, 0, 1)
    assert start == {(0, 1, 0): "stone", (1, 0, 0): "obsidian"}  # the caller's world is unchanged


def test_blocks_of_one_texture_are_the_same():
    kinds = ["oak_planks oak_wood", "stone cobblestone smooth_stone end_stone stone_bricks mossy_stone_bricks", "nether_bricks",
             "white_concrete red_concrete", "planks", "sandstone", "obsidian"]
    textures = {block: kind for kind in kinds for block in kind.split()}
    for one, two in itertools.combinations(textures, 2):
        score = strbuild_score(["##"], [f"setblock 0 0 0 {one}\nsetblock 1 0 0 {two}"], [[one, two]])
        assert score["adjacent_same_ratio"] == (textures[one] == textures[two]), (one, two)


def test_score_against_brute_force():
    looks = {"oak_planks": 1, "birch_wood": 1, "stone": 2, "smooth_stone": 2, "white_concrete": 3, "obsidian": 4}
    rng = random.Random(1)
    for _ in range(300):
        W, H, n, total = rng.randint(1, 5), rng.randint(1, 4), rng.randint(1, 3), rng.choice([1, 5, 8, 17, 300])
        target = ["".join(rng.choice("##.") for _ in range(W)) for _ in range(H)]
        palettes = [rng.sample(sorted(looks), rng.randint(1, 3)) for _ in range(n)]
        grid, responses, counts = [[None] * W for _ in range(H)], [], []  # grid rows are top-down, like the target
        for agent, palette in enumerate(palettes):
            share, used, lines = max(1, total // n) + (total % n if agent == 0 else 0), 0, []
            for _ in range(rng.randint(0, 25)):
                x, y, block = rng.randint(-1, W), rng.randint(-1, H), rng.choice([*palette, *palette, "air", *looks])
                lines.append(f"setblock {x} {y} 0 {block}")
                if 0 <= x < W and 0 <= y < H and (block == "air" or block in palette) and used < share:
                    used += 1
                    grid[H - 1 - y][x] = None if block == "air" else block
            counts.append(used)
            responses.append("\n".join(lines))
        cells = [(target[r][c] == "#", grid[r][c]) for r in range(H) for c in range(W)]
        wanted, hit = sum(want for want, _ in cells), sum(want and block is not None for want, block in cells)
        stray = sum(not want and block is not None for want, block in cells)
        sides = [(grid[r][c], grid[r][c + 1]) for r in range(H) for c in range(W - 1)]
        sides += [(grid[r][c], grid[r + 1][c]) for r in range(H - 1) for c in range(W)]
        sides = [looks[a] == looks[b] for a, b in sides if a and b]
        missing = sum(any(block not in sum(grid, []) for block in palette) for palette in palettes)
        parts = [hit / max(1, wanted), stray / max(1, W * H - wanted), sum(sides) / max(1, len(sides)), missing]
        expected = [2 * parts[0] - 1.5 * parts[1] - parts[2] - 0.25 * missing, hit / max(1, wanted + stray), *parts]
        score = strbuild_score(target, responses, palettes, total)
        assert score.pop("accepted") == counts
        assert list(score.values()) == pytest.approx(expected, abs=1e-9, rel=0)  # in the order of the keys


HOUSE, INVENTORY = {0: ["PPP", "P.P", "PPP"], 1: ["OOO", "O.O", "O.O"]}, {"P": "planks", "O": "obsidian"}


def house_score(*responses, **options):
    return sim.housebuild_score(HOUSE, INVENTORY, list(responses), **options)


def test_what_the_letters_of_a_house_mean():
    """A row is z, a column is x; "." is air unless the inventory says otherwise, and any air is no block."""
    assert sim.house_target({0: ["PO", ".P"]}, INVENTORY) == {(0, 0, 0): "planks", (1, 0, 0): "obsidian", (1, 0, 1): "planks"}
    assert sim.house_target({0: [".AC"]}, {".": "planks", "A": "air", "C": "cave_air"}) == {(0, 0, 0): "planks"}
    with pytest.raises(ValueError, match="'Z'"):
        sim.house_target({0: ["Z"]}, INVENTORY)
    for low in (-3, 2):  # a house need not stand at height 0
        fills = enumerate(["air", "planks", "obsidian", "air"], low - 1)
        answer = "\n".join(f"fill 0 {y} 0 0 {y} 0 {block}" for y, block in fills)
        score = sim.housebuild_score({low: ["PP"], low + 1: ["O."]}, INVENTORY, [answer])
        assert score["accepted"] == [2] and score["match"] == 0.75


def test_any_blocks_with_or_without_a_prefix():
    score = strbuild_score(["#."], ["setblock 0 0 0 stone\nsetblock 1 0 0 minecraft:stone"], [["minecraft:stone", "minecraft:air"]])
    assert (score["accepted"], score["missing_palettes"], score["coverage"]) == ([2], 0, 1)
    house = {0: ["GGA"]}, {"G": "minecraft:gold_block", "A": "minecraft:air", "X": "glass"}
    assert sim.house_target(*house) == {(0, 0, 0): "gold_block", (1, 0, 0): "gold_block"}
    for block, limited, free in [("gold_block", 2, 2), ("glass", 0, 2), ("planks", 0, 0), ("air", 2, 2)]:  # the target has no glass
        for options, accepted in [({}, limited), ({"limited_resource": False}, free)]:
            score = sim.housebuild_score(*house, [f"fill 0 0 0 0 0 0 {block}\nfill 1 0 0 1 0 0 minecraft:{block}"], **options)
            assert score["accepted"] == [accepted] and (score["reward"] == 1) == (block == "gold_block")


@pytest.mark.parametrize("line, accepted", [
    ("/fill 0 0 0 2 0 0 planks", 1), ("FILL 2 0 0 0 0 0 minecraft:planks", 1), ("1. fill 0 1 0 2 1 0 air", 1),
    ("fill 0 0 0 2 0 0 planks replace", 0), ("fill 0 0 0 2 0 planks", 0), ("fill 0 0 0 3 0 0 planks", 0),
    ("fill 0 0 ~0 2 0 0 planks", 0), ("fill 0 0 0 2 0 0 dirt", 0), ("fill 0 -1 0 2 0 0 planks", 0),
    ("kill", 1), ("```\nkill\n```", 1), ("/KILL @e[type=spider]", 1), ("kills", 0), ("- kill all", 1), ("setblock 0 0 0 planks", 0),
    ("```kill\nfill 0 0 0 2 0 0 planks\n```", 1), ("```/kill\nfill 0 0 0 2 0 0 planks\n```", 2),  # the first kill is a language tag
    ("fill 0 0 0 2 0 2 planks", 0), ("fill 0 0 0 2 0 1 planks", 1), ("fill 0 1 0 2 1 1 obsidian", 0),
    ("fill 0 0 0 " + "9" * 5000 + " 0 0 planks", 0)], ids=range(21))
def test_a_house_command_is_accepted_or_not(line, accepted):
    """Two agents share 8 planks and 7 obsidian: each may use up 4 + 2 = 6 and 4 + 1 = 5."""
    assert house_score(line, "")["accepted"] == [accepted, 0]


def test_blocks_run_out_and_a_smaller_fill_may_still_pass():
    score = house_score("fill 0 0 0 2 0 0 planks\nfill 0 0 0 1 0 1 planks\nfill 0 0 0 1 0 0 planks\nfill 2 0 2 2 0 2 planks\n"
                        "fill 1 0 2 1 0 2 planks", "")  # volumes 3, 4: too many, 2: overlaps use up blocks, too, 1, and 1 too many
    assert score["accepted"] == [3, 0] and score["match"] == pytest.approx((18 - 15 + 4) / 18, abs=1e-9)
    assert house_score("fill 0 0 0 2 0 2 planks", "", limited_resource=False)["accepted"] == [1, 0]
    assert house_score("fill 0 0 0 2 1 2 air\n" * 9, "")["accepted"] == [9, 0]  # air is free
    answer, bbox = "fill 1 0 0 0 0 0 planks\n/kill @e\nfill 0 0 0 0 0 0 obsidian", ((0, 0, 0), (1, 1, 1))
    assert sim.read_commands(answer, ["planks", "obsidian"], bbox, 9, "fill", {"planks": 2}) == (
        [((0, 0, 0), (1, 0, 0), "planks"), sim.KILL], [("fill 0 0 0 0 0 0 obsidian", "too few blocks")])


def test_a_house_by_hand():
    """Agent 0 fills the floor's front and back, agent 1 the left wall and, by mistake, the empty middle above."""
    score = house_score("fill 0 0 0 2 0 0 planks\nfill 2 0 2 0 0 2 planks",
                        "kill\nfill 0 1 0 0 1 2 obsidian\nfill 1 1 1 1 1 1 planks", spider_attacks=[3, 3, 3])
    # 15 cells are wanted, 9 are right, 6 missing, 1 stray: 11 of 18 agree
    assert score["match"] == pytest.approx(11 / 18, abs=1e-9) and score["iou"] == pytest.approx(9 / 16, abs=1e-9)
    assert score["spider_penalty"] == 0 and score["accepted"] == [2, 3]
    wrong = sim.housebuild_score({0: ["PO"]}, INVENTORY, ["fill 0 0 0 1 0 0 planks"], limited_resource=False)
    assert (wrong["iou"], wrong["match"]) == (1, 0.5)  # a block of the wrong kind counts for the IoU but not for the match
    layers, answer = {0: ["PP"], 1: [".P"]}, "fill 0 0 0 1 0 0 planks"  # the example of the docstring, with spiders
    assert sim.housebuild_score(layers, INVENTORY, [answer], spider_attacks=(1, 2)) == {  # a single agent pays no penalty
        "reward": 0.75, "iou": 2 / 3, "match": 0.75, "spider_penalty": 0, "accepted": [1]}
    two = sim.housebuild_score(layers, INVENTORY, [answer, ""], spider_attacks=(1, 2))
    assert two["reward"] == pytest.approx(0.69, abs=1e-9) and two["spider_penalty"] == pytest.approx(0.06, abs=1e-9)
    for attacks, hp, penalty in [([1, 1, 1], 5, 0.06), ([3, 3, 3], 5, 0.1), ([], 5, 0), ([2], 0, 0)]:
        assert house_score("", "", spider_attacks=attacks, player_hp=hp)["spider_penalty"] == pytest.approx(penalty, abs=1e-9)
    over = house_score("fill 0 0 0 0 0 0 planks\nkill", "", spider_attacks=[5], max_commands=2)
    assert over["spider_penalty"] == pytest.approx(0.1, abs=1e-9) and over["accepted"] == [1, 0]  # a kill over the share does not count


def test_pictures():
    """Of a wall whose I has one of 13 cells, and one stray block; of a house with two blocks of the wrong kind."""
    world = {(0, 4, 0): "oak_planks", (0, 0, 0): "stone", (0, 1, 0): "obsidian"}
    house = {"layers": {-60: ["PP"], -59: ["OO"]}, "inventory": INVENTORY}
    for name, item, world, cubes, missing, wrong, rows in [
            ("strbuild", {"string": "I"}, world, 3, 11, 1, ["O....", "  .  ", "  .  ", "b .  ", "S...."]),
            ("housebuild", house, {(0, -60, 0): "planks", (1, -59, 0): "planks"}, 2, 2, 1, ["P.  .p"])]:
        task = get_task(name)
        assert task.draw(item, world).split("\n")[:len(rows)] == rows
        svg = sim.draw_svg(task.plan(item), world)  # with red edges where a block is wrong
        assert [svg.count(mark) for mark in ('class="cube"', 'class="missing"', "#e02020")] == [cubes, missing, wrong]


def test_scripted_builders_are_perfect(tmp_path):
    for text in [*LETTERS, "ICML", "CLIM"]:
        target = string_target(text)
        reward = strbuild_score(target, sim.scripted_builders(target), PALETTES)["reward"]
        assert reward == (1.75 if text in "XY" else 2), text  # X and Y have too few cells for agent 1's two blocks
    command = [sys.executable, sim.__file__, "llm", "--svg", tmp_path / "a.svg"]
    assert "reward 2.000" in subprocess.run(command, capture_output=True, text=True).stdout and (tmp_path / "a.svg").exists()
