"""Tables of the README and the index from the records beside this file.

python results/make_tables.py            prints them
python results/make_tables.py --write    puts them between the marks in README.md
python results/make_tables.py --collect FOLDER FILE    writes the records of all finished runs in FOLDER to FILE first
"""
import json
import sys
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: made by results/make_tables.py -->", "<!-- end of results -->"
NAMES = {"source_only": "source only", "adabn": "source only + AdaBN", "rll": "RLL", "rl_al": "RL-AL",
         "regularized_rl_al": "regularized RL-AL", "il_al": "IL-AL", "regularized_il_al": "regularized IL-AL", "cr_al": "CR-AL",
         "cr_al+st": "CR-AL + ST", "cr_al+rst": "CR-AL + RST", "cr_al+it": "CR-AL + IT", "cr_al+rit": "CR-AL + RIT",
         "mlan": "MLAN", "oracle": "oracle"}


def records() -> list:
    "All records of runs, in the order of the files' names."
    return [json.loads(line) for path in sorted(HERE.glob("runs_*.jsonl")) for line in path.read_text().splitlines()]


def controls() -> list:
    "AdaBN on the weights of source only, from `make_gap.py`."
    rows = map(json.loads, (HERE / "streets_gap.jsonl").read_text().splitlines())
    return [row for row in rows if row["method"] == "adabn"]


def collect(folder: Path, file: Path) -> None:
    "Write the records of a folder's finished runs to one file, by seed and method."
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))]
    rows.sort(key=lambda r: (r["seed"], r["method"]))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def spread(values: list) -> str:
    "Mean and standard deviation over seeds."
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def pair_table(runs: list) -> str:
    "One source and target: a row a method, mIoU on test, paired differences to source only, seconds of all its stages."
    base = {r["seed"]: r["miou"] for r in runs if r["method"] == "source_only"}
    lines = ["| method | seeds | test mIoU | against source only, seed by seed | seconds |", "|---|---|---|---|---|"]
    for method, name in NAMES.items():
        rows = [r for r in runs if r["method"] == method]
        if rows:
            gains = [r["miou"] - base[r["seed"]] for r in rows if r["seed"] in base]
            gain = "" if method == "source_only" or not gains else " ".join(f"{g:+.1f}" for g in gains)
            seconds = f"{mean(sum(r['cost'].values()) for r in rows):.0f}" if "cost" in rows[0] else ""
            lines.append(f"| {name} | {len(rows)} | {spread([r['miou'] for r in rows])} | {gain} | {seconds} |")
    return "\n".join(lines)


def tables() -> str:
    "Every pair that has records, each with what it was run with."
    parts, runs = [], records() + controls()
    for pair in dict.fromkeys((r["source"], r["target"], len(r["classes"])) for r in runs):
        own = [r for r in runs if (r["source"], r["target"], len(r["classes"])) == pair]
        s = own[0]["settings"]
        parts.append(f"**{pair[0]} to {pair[1]}**, {pair[2]} classes, {s['size'][0]} x {s['size'][1]} pixels, backbone "
                     f"`{s['backbone']}` with weights `{Path(s['weights']).name}`, {own[0]['device']}:\n\n{pair_table(own)}")
    return "\n\n".join(parts)


def with_tables(text: str) -> str:
    "The README's text with fresh tables between the marks."
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    readme = HERE.parent / "README.md"
    if "--collect" in sys.argv:
        collect(*map(Path, sys.argv[2:4]))
    elif "--write" in sys.argv:
        readme.write_text(with_tables(readme.read_text()))
    else:
        print(tables())
