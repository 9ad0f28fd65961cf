"""
A run as one page, report.html: the learning curve, a held-out item before and after training, the settings.

    python results/report.py out/cc-strbuild                    # writes out/cc-strbuild/report.html, as training does
    python results/report.py out/cc-strbuild out/mc-strbuild    # writes ./report.html: both curves in one plot, the
                                                                # settings side by side, the first run's typical item
    python results/report.py out/cc-strbuild --svg results      # instead, writes results/curve.svg, the plot, and
                                                                # results/before.svg and after.svg, the pictures
    python results/report.py results/table1/tldr*.jsonl --svg . # only the plot, because these are mere logs

The page is HTML, CSS and SVG in one file; it runs no script and loads nothing. Pictures are drawn anew from the answers
in samples.jsonl, which the task judges again, turn by turn.
"""
import argparse
import json
import math
import os
import sys
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import minecraft_sim as sim
from tasks import TASK_OPTIONS, InputError, Task, exit_on_error, get_task, printable, read_config, write_atomic

COLORS = ["#c8102e", "#1f77b4", "#2ca02c", "#9467bd", "#e07b00", "#17a2b8", "#8c564b", "#6c757d"]
HEAD = """<!DOCTYPE html><html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"><style>
body { max-width: 1000px; margin: 2em auto; padding: 0 1em; font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a }
h1, h2, h3 { line-height: 1.2; margin: 1.5em 0 .4em }  h1 { margin-top: 0 }  h4, p { margin: .4em 0 }
pre { padding: .5em .7em; max-height: 27em; overflow: auto; background: #f5f6f8; font: 12px/1.45 monospace;
      white-space: pre-wrap; overflow-wrap: anywhere; margin: .4em 0 }
table { border-collapse: collapse }  table, summary, .note { font-size: 13px }  summary, .note { color: #595959 }
summary { cursor: pointer; overflow: hidden; white-space: nowrap; text-overflow: ellipsis }  details pre { color: #555 }
th, td { text-align: left; padding: .15em 1.2em .15em 0; border-bottom: 1px solid #e4e6ea; overflow-wrap: anywhere }
.differs { background: #fff4d6 }  svg { max-width: 100%; height: auto }  .legend { margin-right: 1.5em }
.row { display: flex; gap: 1.2em; align-items: flex-start }  .row > * { flex: 1; min-width: 0 }
.turn { padding: .8em 0; border-top: 1px solid #d5d8dd }  .turn > :first-child { flex: 0 0 250px }
</style>"""


def text(value):
    r"""A value as harmless HTML: "<b>\x1b" is shown as it stands here, and 0.123456 as 0.1235."""
    return escape(printable(f"{value:.4g}" if isinstance(value, float) else str(value)))


def read_lines(path, *keys):
    """The objects in a run's .jsonl file; InputError if it is empty, or if a line is no object or lacks a key."""
    objects, lines = [], Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines or [""], 1):
        try:
            objects.append(json.loads(line))
            [objects[-1][key] for key in keys]
        except (ValueError, TypeError, KeyError):
            raise InputError(f"{path}, line {number} is not a JSON object with {', '.join(keys)}.") from None
    return objects


def table(head, rows, mark=False):
    """An HTML table; mark: highlight rows whose values, after the first, are not all the same."""
    html = "".join(f"<th>{text(name)}</th>" for name in head)
    for row in rows:
        differs = ' class="differs"' if mark and len({*map(str, row[1:])}) > 1 else ""
        html += f"</tr>\n<tr{differs}>{''.join(f'<td>{text(value)}</td>' for value in row)}"
    return f"<table><tr>{html}</tr></table>"


def ticks(low, high):
    """At most nine round numbers between two others: ticks(0, 1279) is [0, 200, 400, 600, 800, 1000, 1200]."""
    power = 10 ** math.floor(math.log10(max(8, high - low) / 8))
    gap = next(k * power for k in (1, 2, 5, 10) if high - low <= 8 * k * power)
    return [gap * k for k in range(math.ceil(low / gap), math.floor(high / gap) + 1)]


def chart(logs):
    """Learning curves as SVG: scores against joint actions, a line for training, large dots for evaluations."""
    keys = {"train/score": 'r="2"', "eval/score": 'r="6" stroke="#1a1a1a" stroke-width="1.5"'}  # and the dots' looks
    points = [[(key, line["joint_actions"], line[key], line["step"]) for key in keys for line in log if key in line]
              for log in logs]
    _, actions, scores, _ = zip((0, 1, 0, 0), (0, 0, 100, 0), *sum(points, []))
    right, low, high = max(actions), min(scores), max(scores)

    def place(actions, score):  # in pixels
        return f"{50 + 915 * actions / right:.1f}", f"{10 + 345 * (high - score) / (high - low):.1f}"
    svg = ['<svg xmlns="http://www.w3.org/2000/svg" width="980" height="400" viewBox="0 0 980 400" font-size="13" '
           'font-family="sans-serif" text-anchor="middle"><rect width="980" height="400" fill="#fff"/><path d="M50 10V355H965" stroke="#444" fill="none"/>'
           '<text x="507" y="394">joint actions</text><text transform="translate(12 182) rotate(-90)">score</text>']
    for tick in ticks(low, high):
        x, y = place(0, tick)
        svg.append(f'<path d="M{x} {y}H965" stroke="#ddd"/><text x="42" y="{y}" dy="4" text-anchor="end">{tick}</text>')
    for tick in ticks(0, right):
        x, y = place(tick, low)
        svg.append(f'<path d="M{x} {y}v5" stroke="#444"/><text x="{x}" y="{y}" dy="19">{tick:,}</text>')
    for k, own in enumerate(points):
        color = COLORS[k % len(COLORS)]
        curve = " ".join(",".join(place(actions, score)) for key, actions, score, _ in own if key == "train/score")
        svg.append(f'<polyline points="{curve}" stroke="{color}" stroke-width="1.8" fill="none"/>')
        for key, actions, score, step in own:
            x, y = place(actions, score)
            svg.append(f'<circle cx="{x}" cy="{y}" {keys[key]} fill="{color}">'
                       f'<title>{key} {score:.1f} at step {text(step)}</title></circle>')
    return "\n".join([*svg, "</svg>"])


def episode(task, record):
    """(The last picture, all turns: picture and reward, then each agent's prompt and whole answer), both as HTML."""
    picture, html, world, item = "", "", None, record["item"]
    has_picture = task.plan is not None
    if has_picture and type(task).check is not Task.check:
        item = task.check(item)  # JSON made texts of the heights of a house
    for t, turn in enumerate(record["turns"]):
        if has_picture:
            world = task.judge(item, turn["answers"], t, world).world
            picture = sim.draw_svg(task.plan(item), world)
        parts = table([], [("training reward", turn["reward"]), *turn["parts"].items()])
        html += f'<div class="row turn"><div><h4>turn {t}</h4>{picture}{parts}</div>'
        for agent, (told, answer) in enumerate(zip(turn["told"], turn["answers"])):
            prompt = "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in told)
            html += (f"<div><h4>agent {agent}</h4><details><summary>is told: {text(told[-1]['content'][:80])}</summary>"
                     f"<pre>{text(prompt)}</pre></details><pre>{text(answer) or '(nothing)'}</pre></div>\n")
        html += "</div>\n"
    return picture, html


def typical_item(config, records):
    """(An item as JSON, [(title, picture, turns)] of it at the first and, if there is another, the last evaluation).

    It is the held-out item with the median gain in score between the two: of an even number the upper one, of equal
    gains by the items' order. With one evaluation no item gains, so it is the middle one of that order.
    """
    options = {name: config[name] for name in TASK_OPTIONS if name in config} | {"data": "builtin"}  # no file is needed
    task, by_item = get_task(config["task"], **options), {}
    for record in records:
        by_item.setdefault(json.dumps(record["item"], ensure_ascii=False), []).append(record)
    by_gain = sorted(by_item, key=lambda item: by_item[item][-1]["score"] - by_item[item][0]["score"])
    typical = by_gain[len(by_gain) // 2]
    first, *later = by_item[typical]
    return typical, [(f"step {text(record['step'])}: score {text(record['score'])} after {len(record['turns'])} turns",
                      *episode(task, record)) for record in [first, *later[-1:]]]


def before_and_after(config, records):
    """The typical held-out item before and after training: pictures side by side, then everything turn by turn."""
    item, shown = typical_item(config, records)
    pictures = "".join(f"<div><h3>{title}</h3>{picture}</div>" for title, picture, _ in shown if picture)
    return (f'<pre>{text(item)}</pre><div class="row">{pictures}</div>'
            + "".join(f"<h3>{title}, turn by turn</h3>\n{turns}" for title, _, turns in shown))


def save(path, content):
    """Write a text file as a whole, and say so."""
    write_atomic(path, lambda part: Path(part).write_text(content, encoding="utf-8"))
    print(f"wrote {path}")


def pictures(runs, folder):
    """Write the plot of these runs (folders, or logs alone) and, of the first folder, its typical item's pictures."""
    logs = [run if run.endswith(".jsonl") else os.path.join(run, "log.jsonl") for run in runs]
    save(os.path.join(folder, "curve.svg"), chart([read_lines(log, "step", "joint_actions") for log in logs]))
    if not runs[0].endswith(".jsonl"):
        records = read_lines(os.path.join(runs[0], "samples.jsonl"), "step", "item", "score", "turns")
        for name, (_, picture, _) in zip(("before", "after"), typical_item(read_config(runs[0]), records)[1]):
            if picture:
                save(os.path.join(folder, f"{name}.svg"), picture)


def page(runs):
    """The report of these run folders as HTML."""
    configs = [config | config.pop("versions", {}) for config in map(read_config, runs)]
    logs = [read_lines(os.path.join(run, "log.jsonl"), "step", "joint_actions") for run in runs]
    samples, episodes = os.path.join(runs[0], "samples.jsonl"), "No samples.jsonl: this run kept no whole episodes."
    if os.path.exists(samples):
        episodes = before_and_after(configs[0], read_lines(samples, "step", "item", "score", "turns"))
    legend = "".join(f'<span class="legend"><b style="color: {COLORS[k % len(COLORS)]}">&#9679;</b> {text(run)}</span>'
                     for k, run in enumerate(runs))
    columns = ["step", "joint_actions", "eval/score", "eval/reward", "eval/turns"]
    scores = [[run, *map(line.get, columns)] for run, log in zip(runs, logs) for line in log if "eval/score" in line]
    names = dict.fromkeys(name for config in configs for name in config)
    settings = [[name, *(config.get(name, "") for config in configs)] for name in names]
    return f"""{HEAD}<title>{text(", ".join(runs))}</title>
<h1>{text(" and ".join(runs))}</h1><p>{legend}</p>
{chart(logs)}
<p class="note">Scores of each step's training episodes (line) and of all held-out items (large dots; table).</p>
{table(["", *columns], scores)}
<h2>A typical held-out item of {text(runs[0])}</h2>
<p class="note">The one with the median gain in score from the first to the last evaluation. Step 0 is the untrained
team; click on what an agent is told to unfold its prompt.</p>
{episodes}
<h2>Settings</h2>
<div style="columns: {3 if len(runs) == 1 else 1}">{table(["", *runs], settings, mark=True)}</div></html>
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", metavar="FILE", help="default: RUN/report.html; report.html here for several runs")
    parser.add_argument("--svg", metavar="FOLDER", help="instead, write curve.svg, before.svg and after.svg there")
    args = parser.parse_args()
    with exit_on_error():
        if args.svg:
            pictures(args.runs, args.svg)
        else:
            out = args.out or os.path.join(args.runs[0] if len(args.runs) == 1 else "", "report.html")
            save(out, page(args.runs))
