"""StrBuild and HouseBuild: every number was computed by hand, or a second time by the brute force below."""
import random
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import minecraft_sim as sim

from minecraft_sim import (LETTERS, PALETTES, command_lines, command_shares, draw, draw_svg, read_commands,
                           scripted_builders, strbuild_score, strbuild_world, string_target, target_cells, texture)

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ["###", "#.."]  # the worked example of the header
ANSWERS = ["setblock 0 1 0 oak_planks\nsetblock 0 0 0 stone", "setblock 1 1 0 obsidian\nsetblock 1 0 0 obsidian"]
BOX = (0, 0, 0), (2, 1, 0)


def read(text, palette=("oak_planks", "stone"), limit=300):
    accepted, rejected = read_commands(text, palette, BOX, limit)
    assert all(low == high for low, high, _ in accepted)
    return [(low, block) for low, _, block in accepted], [reason for _, reason in rejected]


def test_letters_and_targets():
    assert "".join(sorted(LETTERS)) == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert all([len(row) for row in rows] == [5] * 5 and set("".join(rows)) == set("#.") for rows in LETTERS.values())
    assert len({tuple(rows) for rows in LETTERS.values()}) == 36
    assert LETTERS["L"] == ["#....", "#....", "#....", "#....", "#####"]
    assert LETTERS["9"] == [".###.", "#...#", ".####", "....#", ".###."]
    assert string_target("ic")[:2] == ["#####...####", "..#....#...."]
    assert string_target("LL", gap=0)[0] == "#....#...."
    assert target_cells(["##", "#."]) == [(0, 1, 0), (1, 1, 0), (0, 0, 0)]
    for text, named in [("", "empty"), ("A B", "' '"), ("é", "'é'"), ("ß", "'ß'"), ("A\0", r"'\x00'")]:
        with pytest.raises(ValueError, match=named.replace("\\", r"\\")):
            string_target(text)


def test_reading_lines():
    assert list(command_lines("Sure!\n```text\n1. /setblock 0 0 0 stone\n\n- kill\n```\nDone.")) == [
        "/setblock 0 0 0 stone", "kill"]
    assert list(command_lines("a\n```\nb")) == ["a", "```", "b"]                    # a single fence encloses nothing
    assert list(command_lines("```\ntext\nb\n```\n```\nc\n```")) == ["text", "b"]   # the word is not on the first line
    assert list(command_lines("```/kill\nb```")) == ["/kill", "b"]                  # a command, not a language
    assert list(command_lines("``` c++ \r\nb\r\n```")) == ["b"]
    assert list(command_lines("```kill```")) == ["kill"]                            # no line break: no language tag
    assert list(command_lines("```a b\nc```")) == ["a b", "c"] and list(command_lines("``````\na")) == []
    assert list(command_lines("-a\n* - b\n12) c\n 3.\td\n-\n1.e")) == ["a", "- b", "c", "d", "e"]


@pytest.mark.parametrize("line", [
    "/setblock 1 0 0 stone", "SetBlock 1 0 0 minecraft:stone", "/ setblock 1 0 0 stone",
    "- /setblock 1 0 0 stone replace now", "2) setblock\t+1 -0 0_0 stone", "setblock 1 00 0 stone",
    "setblock \u0661 0 0 stone", "  /SETBLOCK   1   0   0   stone  "])
def test_accepted_lines(line):
    assert read(line) == ([((1, 0, 0), "stone")], [])


@pytest.mark.parametrize("line, reason", [
    ("//setblock 1 0 0 stone", "not a setblock"), ("fill 1 0 0 stone", "not a setblock"), ("/", "not a setblock"),
    ("`setblock 1 0 0 stone`", "not a setblock"), ("- - setblock 1 0 0 stone", "not a setblock"),
    ("set block 1 0 0 stone", "not a setblock"), ("\u2022 setblock 1 0 0 stone", "not a setblock"),
    ("setblock 1 0 0", "fewer than 5"), ("setblock", "fewer than 5"),
    ("setblock 1.0 0 0 stone", "not an integer"), ("setblock ~1 0 0 stone", "not an integer"),
    ("setblock ^ 0 0 stone", "not an integer"), ("setblock 1, 0, 0 stone", "not an integer"),
    ("setblock 0x1 0 0 stone", "not an integer"), ("setblock 1\0 0 0 stone", "not an integer"),
    ("setblock \ud800 0 0 stone", "not an integer"), ("setblock " + "1" * 5001 + " 0 0 stone", "not an integer"),
    ("setblock 1 0 0 STONE", "palette"), ("setblock 1 0 0 obsidian", "palette"), ("setblock 1 0 0 cave_air", "palette"),
    ("setblock 1 0 0 minecraft:minecraft:stone", "palette"), ("setblock 3 0 0 stone", "outside"),
    ("setblock 0 2 0 stone", "outside"), ("setblock 0 0 1 stone", "outside"), ("setblock -1 0 0 stone", "outside"),
    ("setblock " + "9" * 4000 + " 0 0 stone", "outside")])
def test_rejected_lines(line, reason):
    accepted, reasons = read(line)
    assert accepted == [] and len(reasons) == 1 and reason in reasons[0]


def test_shares():
    assert [command_shares(*case) for case in [(7, 2), (300, 2), (5, 1), (1, 2), (11, 3)]] == [
        [4, 3], [150, 150], [5], [2, 1], [5, 3, 3]]
    line, bad = "setblock 0 0 0 stone\n", "setblock 9 0 0 stone\n"
    assert read(bad + line * 3 + bad, limit=2) == (
        [((0, 0, 0), "stone")] * 2, ["outside the box", "over the share of commands", "outside the box"])
    assert strbuild_score(["#"], [line * 9] * 2, [["stone"]] * 2, max_commands=7)["accepted"] == [4, 3]


def test_never_raises_and_is_fast():
    rng = random.Random(0)
    k, line = 100_000, "setblock 0 0 0 stone\n"
    texts = ["", "\0" * k, "9" * k, "`" * k, "\n" * k, " " * k + "x", "- " * k, "1" * k + ".", "```" + "a" * k + "```",
             line * 5000, "/\n" * k, line.replace("0", "1" * k, 1), line.replace("0", "1" * 4299, 1) * 23,
             "".join(chr(rng.randrange(0x110000)) for _ in range(k))]
    for text in texts:
        start = time.perf_counter()
        score = strbuild_score(EXAMPLE, [text, text], PALETTES)
        assert time.perf_counter() - start < 10 and max(score["accepted"]) <= 150


def test_worked_example():
    world, accepted, rejected = strbuild_world(EXAMPLE, ANSWERS, PALETTES)
    assert world == {(0, 1, 0): "oak_planks", (0, 0, 0): "stone", (1, 1, 0): "obsidian", (1, 0, 0): "obsidian"}
    assert accepted[0] == [((0, 1, 0),) * 2 + ("oak_planks",), ((0, 0, 0),) * 2 + ("stone",)] and rejected == [[], []]
    assert strbuild_score(EXAMPLE, ANSWERS, PALETTES) == {
        "reward": 0.25, "iou": 0.6, "coverage": 0.75, "extra_ratio": 0.5, "adjacent_same_ratio": 0.25,
        "missing_palettes": 1, "accepted": [2, 2]}


def test_order_air_and_empty_cases():
    both = [["stone"], ["stone", "obsidian"]]
    stone = "setblock 0 0 0 stone"
    assert strbuild_world(["#"], [stone, "setblock 0 0 0 obsidian"], both)[0] == {(0, 0, 0): "obsidian"}
    assert strbuild_world(["#"], [stone, "setblock 0 0 0 minecraft:air"], both)[0] == {}
    assert strbuild_world(["#"], ["setblock 0 0 0 cave_air"], [["cave_air"]])[:2] == ({}, [[((0, 0, 0), (0, 0, 0), "cave_air")]])
    nothing = strbuild_score(["..", ".."], ["", ""], PALETTES)  # no target: coverage 0; both palettes unused
    assert list(nothing.values())[:6] == [-0.5, 0, 0, 0, 0, 2]
    stray = strbuild_score([".."], [stone], [["stone", "air", "cave_air"]])  # air need not be used
    assert (stray["reward"], stray["iou"], stray["missing_palettes"]) == (-0.75, 0, 0)
    full = strbuild_score(["##"], [stone + "\nsetblock 1 0 0 cobblestone"], [["stone", "cobblestone"]])
    assert (full["reward"], full["extra_ratio"], full["adjacent_same_ratio"]) == (1.0, 0, 1)  # no background
    merged = strbuild_score(["#"], [stone], [PALETTES[0] + PALETTES[1], ["unused"]])
    assert (merged["reward"], merged["missing_palettes"]) == (1.75, 1)  # agents count, not palettes
    for answers, message in [(["", "", ""], "3 agents but 2 palettes"), ([], "0 agents")]:
        with pytest.raises(AssertionError, match=message):
            strbuild_score(["#"], answers, PALETTES)


def test_commands_find_the_world_that_the_last_turn_left():
    start = {(0, 1, 0): "stone", (1, 0, 0): "obsidian"}  # one on target, one stray
    world, accepted, _ = strbuild_world(EXAMPLE, ["setblock 1 1 0 stone", "setblock 1 0 0 air"], PALETTES, start=start)
    assert world == {(0, 1, 0): "stone", (1, 1, 0): "stone"} and list(map(len, accepted)) == [1, 1]
    score = strbuild_score(EXAMPLE, ["setblock 1 1 0 stone", "setblock 1 0 0 air"], PALETTES, start=start)
    assert score["coverage"] == 2 / 4 and score["extra_ratio"] == 0 and score["adjacent_same_ratio"] == 1
    assert start == {(0, 1, 0): "stone", (1, 0, 0): "obsidian"}  # the caller's world is unchanged



def test_textures():
    names = {"oak_planks": "wood", "oak_wood": "wood", "stone": "stone", "cobblestone": "stone",
             "smooth_stone": "stone", "end_stone": "stone", "mossy_stone_bricks": "stone", "white_concrete": "concrete",
             **{own: own for own in ["planks", "sandstone", "obsidian", "concrete"]}}
    assert {name: texture(name) for name in names} == names


def test_pictures():
    world = strbuild_world(EXAMPLE, ANSWERS, PALETTES)[0]
    lines = draw(sim.wall_plan(EXAMPLE), world).split("\n")
    assert lines[:2] == ["OB.", "Sb "] and "b obsidian (stray)" in lines[2] and ". missing" in lines[2]
    ansi = draw(sim.wall_plan(EXAMPLE), world, color=True).split("\n")
    assert ansi[0].count("48;2;") == 2 and ansi[0].count("[]") == 1 and ansi[1].count("xx") == 1
    for target, world in [(EXAMPLE, world), (["##"], {}), (["."], {(0, 0, 0): "unknown"})]:
        root = ElementTree.fromstring(draw_svg(sim.wall_plan(target), world, 'a <b> & "c"\0\ud800'))
        groups = root.findall("{*}g")
        assert sum(g.get("class") == "cube" for g in groups) == len(world) and root.get("viewBox")
        assert sum(g.get("class") == "missing" for g in groups) == len(set(target_cells(target)) - world.keys())
        assert all(len(g.findall("{*}polygon")) == 3 for g in groups)
        assert root.find("{*}text").text == 'a <b> & "c"'
        left, top, width, height = map(float, root.get("viewBox").split())
        for point in " ".join(polygon.get("points") for polygon in root.findall(".//{*}polygon")).split():
            x, y = map(float, point.split(","))
            assert left <= x <= left + width and top <= y <= top + height


def test_pictures_of_a_house():
    world = sim.housebuild_world(HOUSE, INVENTORY, ["fill 0 0 0 2 0 0 planks\nfill 0 1 0 0 1 0 planks", ""])[0]
    plan = sim.house_plan(HOUSE, INVENTORY)
    front = draw(plan, world).split("\n")[2]  # z = 0 is nearest: the floor, then the layer above
    assert front == "PPP  p.."
    root = ElementTree.fromstring(draw_svg(plan, world))
    groups = root.findall("{*}g")
    assert sum(g.get("class") == "cube" for g in groups) == 4 and sum(g.get("class") == "missing" for g in groups) == 11
    assert sum(g.get("stroke") == "#e02020" for g in groups) == 1  # planks where obsidian is wanted
    for low in (-64, 60):  # a picture of the same size, wherever the house stands
        deep = {low + y: rows for y, rows in HOUSE.items()}
        root = ElementTree.fromstring(draw_svg(sim.house_plan(deep, INVENTORY), {}))
        left, top, width, height = map(float, root.get("viewBox").split())
        points = [float(point.split(",")[1]) for polygon in root.findall(".//{*}polygon") for point in polygon.get("points").split()]
        assert top <= min(points) and max(points) <= top + height < top + 250
    tall = {y: ["P"] for y in range(6)}
    assert draw(sim.house_plan(tall, INVENTORY), {}).split("\n")[:3] == [".  .  .  .", "", ".  ."]


def test_demo(tmp_path):
    def run(*args):
        return subprocess.run([sys.executable, ROOT / "minecraft_sim.py", *args], capture_output=True, text=True)
    assert scripted_builders(["##"]) == ["/setblock 0 0 0 oak_planks", "/setblock 1 0 0 white_concrete"]
    for text in [*LETTERS, "ICML", "CLIM"]:
        target = string_target(text)
        score = strbuild_score(target, scripted_builders(target), PALETTES)
        assert score["reward"] == (1.75 if text in "XY" else 2), text
    assert run("X").returncode == 0
    good = run("llm", "--svg", tmp_path / "a.svg")
    assert good.returncode == 0 and "reward 2.000" in good.stdout and "\x1b" not in good.stdout and not good.stderr
    assert len(ElementTree.parse(tmp_path / "a.svg").findall("{*}g")) == 9 + 9 + 13  # L, L, M
    for args in [["A!"], [""], ["A", "--svg", tmp_path / "no" / "a.svg"]]:
        bad = run(*args)
        assert bad.returncode == 2 and not bad.stdout and len(bad.stderr.strip().split("\n")) == 1


def test_score_against_brute_force():
    """Lines are written from known commands, so that the second computation need not parse any text."""
    looks = {"oak_planks": 1, "birch_wood": 1, "stone": 2, "smooth_stone": 2, "white_concrete": 3, "obsidian": 4}
    rng = random.Random(1)
    for _ in range(400):
        W, H, n, total = rng.randint(1, 5), rng.randint(1, 4), rng.randint(1, 3), rng.choice([1, 5, 8, 17, 300])
        target = ["".join(rng.choice("##.") for _ in range(W)) for _ in range(H)]
        palettes = [rng.sample(sorted(looks), rng.randint(1, 3)) for _ in range(n)]
        grid, responses, counts = [[None] * W for _ in range(H)], [], []  # grid rows are top-down, like the target
        for agent, palette in enumerate(palettes):
            share, used, lines = max(1, total // n) + (total % n if agent == 0 else 0), 0, []
            for _ in range(rng.randint(0, 25)):
                x, y, z = rng.randint(-1, W), rng.randint(-1, H), rng.choice([0, 0, 0, 0, 0, 1])
                block, broken = rng.choice([*palette, *palette, "air", *looks]), rng.random() < 0.1
                lines.append("".join(map(rng.choice, [
                    ["", "- ", "3. ", "  * "], ["/", ""], ["setblock", "SETBLOCK"], [f" {x} {y} {z}{'.5' * broken} "],
                    ["", "minecraft:"], [block], ["", " keep", "\n"]])))
                legal = not broken and z == 0 and 0 <= x < W and 0 <= y < H and (block == "air" or block in palette)
                if legal and used < share:
                    used += 1
                    grid[H - 1 - y][x] = None if block == "air" else block
            counts.append(used)
            fence = rng.choice(["{}", "Here:\n```\n{}\n```\nsetblock 0 0 0 stone", "```mc\n{}\n``` ```"])
            responses.append(fence.format("\n".join(lines)))
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


# --- housebuild -------------------------------------------------------------------------------------------------------

HOUSE, INVENTORY = {0: ["PPP", "P.P", "PPP"], 1: ["OOO", "O.O", "O.O"]}, {"P": "planks", "O": "obsidian"}


def house_score(*responses, **options):
    return sim.housebuild_score(HOUSE, INVENTORY, list(responses), **options)


def test_the_small_house_of_the_docstring():
    layers, answer = {0: ["PP"], 1: [".P"]}, "fill 0 0 0 1 0 0 planks"
    alone = sim.housebuild_score(layers, INVENTORY, [answer])
    assert alone == {"reward": 0.75, "iou": 2 / 3, "match": 0.75, "spider_penalty": 0, "accepted": [1]}
    two = sim.housebuild_score(layers, INVENTORY, [answer, ""], spider_attacks=(1, 2))
    assert two["reward"] == pytest.approx(0.69) and two["spider_penalty"] == pytest.approx(0.06)
    assert sim.house_target({0: ["AB", ".A"]}, {"A": "planks", "B": "obsidian"}) == {
        (0, 0, 0): "planks", (1, 0, 0): "obsidian", (1, 0, 1): "planks"}
    with pytest.raises(ValueError, match="'Z'"):
        sim.house_target({0: ["Z"]}, INVENTORY)
    accepted, rejected = sim.read_commands("fill 1 0 0 0 0 0 planks\n/kill @e\nfill 0 0 0 0 0 0 obsidian", sim.HOUSE_BLOCKS,
                                           ((0, 0, 0), (1, 1, 1)), 9, "fill", {"planks": 2})
    assert accepted == [((0, 0, 0), (1, 0, 0), "planks"), sim.KILL]
    assert rejected == [("fill 0 0 0 0 0 0 obsidian", "too few blocks")]


@pytest.mark.parametrize("line, accepted", [
    ("/fill 0 0 0 2 0 0 planks", 1), ("FILL 2 0 0 0 0 0 minecraft:planks", 1), ("1. fill 0 1 0 2 1 0 air", 1),
    ("fill 0 0 0 2 0 0 planks replace", 0), ("fill 0 0 0 2 0 planks", 0), ("fill 0 0 0 3 0 0 planks", 0),
    ("fill 0 0 ~0 2 0 0 planks", 0), ("fill 0 0 0 2 0 0 dirt", 0), ("fill 0 -1 0 2 0 0 planks", 0),
    ("kill", 1), ("/KILL @e[type=spider]", 1), ("kills", 0), ("- kill all", 1), ("setblock 0 0 0 planks", 0),
    ("fill 0 0 0 2 0 2 planks", 0), ("fill 0 0 0 " + "9" * 5000 + " 0 0 planks", 0)])
def test_a_house_command_is_accepted_or_not(line, accepted):
    """Two agents share 8 planks and 7 obsidian: each may use up 4 + 2 = 6 and 4 + 1 = 5."""
    assert house_score(line, "")["accepted"] == [accepted, 0]


def test_blocks_run_out_and_a_smaller_fill_may_still_pass():
    assert sim.block_limits(sim.house_target(HOUSE, INVENTORY), 2) == {"planks": 6, "obsidian": 5}
    score = house_score("fill 0 0 0 2 0 0 planks\nfill 0 0 0 1 0 0 planks\nfill 0 0 2 1 0 2 planks\nfill 2 0 2 2 0 2 planks", "")
    assert score["accepted"] == [3, 0] and score["match"] == pytest.approx((18 - 15 + 4) / 18)  # overlaps use up blocks, too
    assert house_score("fill 0 0 0 2 0 2 planks", "", limited_resource=False)["accepted"] == [1, 0]
    assert house_score("fill 0 0 0 2 1 2 air\n" * 9, "")["accepted"] == [9, 0]  # air is free


def test_a_house_by_hand():
    """Agent 0 fills the floor's front and back, agent 1 the left wall and, by mistake, the empty middle above."""
    score = house_score("fill 0 0 0 2 0 0 planks\nfill 0 0 2 2 0 2 planks",
                        "kill\nfill 0 1 0 0 1 2 obsidian\nfill 1 1 1 1 1 1 planks", spider_attacks=[3, 3, 3])
    # 15 cells are wanted, 9 are right, 6 missing, 1 stray: 11 of 18 agree
    assert score["match"] == pytest.approx(11 / 18) and score["iou"] == pytest.approx(9 / 16)
    assert score["spider_penalty"] == 0 and score["accepted"] == [2, 3]


def test_spiders():
    for attacks, hp, penalty in [([1, 1, 1], 5, 0.06), ([3, 3, 3], 5, 0.1), ([], 5, 0), ([2], 0, 0)]:
        assert house_score("", "", spider_attacks=attacks, player_hp=hp)["spider_penalty"] == pytest.approx(penalty)
    assert house_score("", spider_attacks=[3])["spider_penalty"] == 0  # a single agent pays no penalty
    over = house_score("fill 0 0 0 0 0 0 planks\nkill", "", spider_attacks=[5], max_commands=2)
    assert over["spider_penalty"] == pytest.approx(0.1) and over["accepted"] == [1, 0]  # a kill over the share does not count


def test_a_block_of_the_wrong_kind_counts_for_the_iou_but_not_for_the_match():
    score = sim.housebuild_score({0: ["PO"]}, INVENTORY, ["fill 0 0 0 1 0 0 planks"], limited_resource=False)
    assert (score["iou"], score["match"]) == (1, 0.5)


@pytest.mark.parametrize("low", [-3, 2])
def test_a_house_that_does_not_stand_at_height_0(low):
    layers, lines = {low: ["PP"], low + 1: ["O."]}, [f"fill 0 {low + y} 0 0 {low + y} 0 {{}}" for y in (-1, 0, 1, 2)]
    answer = "\n".join(line.format(block) for line, block in zip(lines, ["air", "planks", "obsidian", "air"]))
    score = sim.housebuild_score(layers, INVENTORY, [answer])
    assert score["accepted"] == [2] and score["match"] == 0.75


def test_an_inventory_may_use_the_dot_and_hold_any_air():
    inventory = {".": "planks", "A": "air", "C": "cave_air"}
    assert sim.house_target({0: [".AC"]}, inventory) == {(0, 0, 0): "planks"}


# --- what the official reader accepts, too ----------------------------------------------------------------------------

@pytest.mark.parametrize("marker", ["-", "**", "-*- ", "* ", "1.", "12) ", "  3.\t"])
def test_one_list_marker_is_removed_with_or_without_blanks(marker):
    assert read(f"{marker}/setblock 1 0 0 stone") == ([((1, 0, 0), "stone")], [])
    assert read(f"{marker}1. /setblock 1 0 0 stone") == ([], ["not a setblock command"])
    assert command_lines("```\nkill\n```") == ["kill"]  # officially it is lost, as a language


def test_palettes_and_inventories_may_carry_a_prefix():
    palettes, answers = [["minecraft:stone", "minecraft:air"]], ["setblock 0 0 0 stone\nsetblock 1 0 0 minecraft:stone"]
    score = strbuild_score(["#."], answers, palettes)
    assert (score["accepted"], score["missing_palettes"], score["coverage"]) == ([2], 0, 1)
    house = {0: ["PA"]}, {"P": "minecraft:planks", "A": "minecraft:air"}
    assert sim.house_target(*house) == {(0, 0, 0): "planks"}
    for block in ("planks", "minecraft:planks"):
        assert sim.housebuild_score(*house, [f"fill 0 0 0 0 0 0 {block}"])["reward"] == 1


def test_bricks_of_stone_are_stone():
    names = ["stone_bricks", "mossy_stone_bricks", "cracked_stone_bricks", "nether_bricks", "bricks"]
    assert [texture(name) for name in names] == ["stone"] * 3 + names[3:]


def test_a_house_may_be_of_any_blocks_and_allows_no_others():
    house = {0: ["GG", ".G"]}, {"G": "gold_block", "X": "minecraft:glass"}
    fills = "fill 0 0 0 1 0 0 {}\nfill 1 0 1 1 0 1 minecraft:{}"
    assert sim.housebuild_score(*house, [fills.format("gold_block", "gold_block")])["reward"] == 1
    for block, accepted in [("glass", 2), ("planks", 0), ("air", 2)]:
        score = sim.housebuild_score(*house, [fills.format(block, block)], limited_resource=False)
        assert score["accepted"] == [accepted]
    assert sim.housebuild_score(*house, [fills.format("glass", "glass")])["accepted"] == [0]  # the target has no glass
