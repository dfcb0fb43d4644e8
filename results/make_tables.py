"""Tables of the README, the index and the benchmarks' README from the records beside this file.

python results/make_tables.py            prints them
python results/make_tables.py --write    puts them between the marks in README.md and benchmarks/README.md
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


def rows_of(name: str) -> list:
    "Records of one benchmark."
    return [json.loads(line) for line in (HERE / f"bench_{name}.jsonl").read_text().splitlines()]


def table(heads: str, rows: list) -> str:
    "A Markdown table; heads are separated by |."
    return "\n".join(["| " + " | ".join(heads.split("|")) + " |", "|---" * len(heads.split("|")) + "|",
                      *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def shown(value, form: str = "{}") -> str:
    return "" if value is None else form.format(value)


def sizes_of(r: dict) -> str:
    return "{} x {} and {} x {}".format(*r["size"], *r["target_size"])


def benchmark_tables() -> str:
    "A table a benchmark."
    peer, step, regions = rows_of("peer"), rows_of("step"), rows_of("region_labels")
    decode, scoring = rows_of("decode")[-1], rows_of("evaluation")
    seconds = [(sizes_of(r), r["step"], shown(r["times_faster"], "{:.2f}"), f"{r['seconds']['median']:.2f}", shown(r["peak_mib"], "{:.0f}"))
               for r in peer]
    steps = [(r["backbone"], r["precision"], sizes_of(r), r["batch"], r["method"], shown(r["ratio"], "{:.2f}"),
              f"{r['seconds']['median']:.3f}", f"{r['gflops']:.1f}", shown(r["peak_mib"], "{:.0f}")) for r in step]
    maps = [(r["maps"], r["jobs"], r["seconds"], r["maps_a_second"], r["peak_mib"]) for r in regions]
    read = [(name, rate, decode["main_process_ms_per_image"][name]) for name, rate in decode["images_per_second"].items()]
    kept = ("plain_images_a_second", "images_a_second", "ratio")
    score = [(r["backbone"], r["batch_size"], *(f"{r[k]:.2f}" for k in kept)) for r in scoring]
    parts = [
        ("**ADVENT's step beside ours**", table("source and target, pixels|step|times faster|seconds|MiB", seconds), peer[0]),
        ("**Steps**: ratio to source only with target forward", table(
            "backbone|precision|source and target, pixels|batch|method|ratio|seconds|Gflop|MiB", steps), step[0]),
        ("**Region labels** at 720 x 1280", table("maps|processes|seconds|maps a second|MiB", maps), regions[0]),
        ("**Decoding** {} x {} to {} x {}".format(*decode["frame_size"], *decode["size"]), table(
            "from|images a second|ms an image in the training process", read), decode),
        ("**Scoring** at {} x {} for labels of {} x {}".format(*scoring[0]["size"], *scoring[0]["label_size"]), table(
            "backbone|batch|images a second one by one|images a second|times faster", score), scoring[0])]
    return "\n\n".join(f"{title}, {r.get('device', r.get('machine'))}:\n\n{made}" for title, made, r in parts)


MADE = {"README.md": tables, "benchmarks/README.md": benchmark_tables}


def with_tables(text: str, make=tables) -> str:
    "A page's text with fresh tables between the marks."
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{make()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    if "--collect" in sys.argv:
        collect(*map(Path, sys.argv[2:4]))
    for page, make in MADE.items():
        if "--write" in sys.argv:
            path = HERE.parent / page
            path.write_text(with_tables(path.read_text(), make))
        elif "--collect" not in sys.argv:
            print(make())
