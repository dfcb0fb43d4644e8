"""Tables of the READMEs (the front page's, this folder's, the benchmarks') from the records beside this file.

python results/make_tables.py            prints them
python results/make_tables.py --write    puts them between the marks in the three pages, draws nbs/figures/results.png
"""
import json
import sys
from pathlib import Path

from mlan.study.comparison import Table, ablation_figure
from mlan.study.evidence import ablation, augmentation_table, condition_table, coverage_table, pairs_table, pretrained_table, search_table
from mlan.study.paper_tables import PAPER_MIOU, STEPS
from mlan.study.records import read_records, row_records, row_scores
from mlan.study.rows import CONTROL_STEPS, PAIRS, Row
from mlan.study.verdicts import MAIN, data_set_table, fair_table, findings, outcome_table

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: made by results/make_tables.py -->", "<!-- end of results -->"
CLEARLY = ("What these records say, in points with 95 % intervals. *Clearly*: the interval leaves out zero, and still does when all these "
           "comparisons are taken together (Holm); *by itself*: it leaves out zero, but not among all, so read it as open.")


def records() -> list:
    "All records of runs."
    return read_records(HERE / "experiments.jsonl")


def about(runs: list) -> str:
    "What the runs of a pair have in common."
    first = next(r for r in runs if r["miou"] is not None)
    s = first["settings"]
    return (f"{len(first['classes'])} classes, {s['size'][0]} x {s['size'][1]} pixels, backbone `{s['backbone']}` with weights "
            f"`{Path(s['weights']).name}`, {first['device']}")


def tables() -> str:
    "The main table, and what the records say."
    runs = records()
    main, first = ablation(runs, "streets", MAIN, STEPS).methods, row_records(runs, Row("source_only"))
    return "\n\n".join(["**With and without augmentation**, mIoU on test, on the runs that both have:", augmentation_table(runs).markdown(),
                        f"**{PAIRS['streets'].source} to {PAIRS['streets'].target}**, no augmentation, {about(first)}:", main.markdown(),
                        CLEARLY, findings(runs)])


def all_tables() -> str:
    "The paper's steps, controls, all rows on all pairs, conditions, rows from ImageNet's weights, the search, and what was run."
    runs = records()
    return "\n\n".join([
        "**Each step that the paper takes**: *reproduced* or *contradicted* where the 95 % interval leaves out zero; *(Holm)* where it is "
        "clear among all steps of that pair:", outcome_table(runs).markdown(),
        "**Controls** on the first pair, in the same way:", ablation(runs, "streets", MAIN, CONTROL_STEPS).comparisons.markdown(),
        "**Each set of built-in scenes by itself:**", data_set_table(runs).markdown(),
        "**All pairs**, mIoU on test, mean and standard deviation over runs:", pairs_table(runs).markdown(),
        "**Conditions**, on the first pair:", condition_table(runs).markdown(),
        "**From ImageNet's weights** (VGG-16), on the first pair:", pretrained_table(runs).markdown(),
        "**The search**: mIoU on val with each row's own weights lower, as they are, higher; on test, what the choice gains in runs "
        "that had no part in it:", search_table(runs).markdown(),
        "**What it changes**: each comparison with the shared weights, and with each row at its own best, on the same runs:",
        fair_table(runs).markdown(),
        "**What was run**; hours with all stages that a run used:", coverage_table(runs).markdown()])


def picture():
    "The staircase of Tables 1 and 2, the paper's beside ours."
    scores = row_scores(records(), [Row(m) for m in PAPER_MIOU])
    figure = ablation_figure(scores, PAPER_MIOU)
    figure.axes[1].set_title("ours ({0.source} to {0.target})".format(PAIRS["streets"]), loc="left", fontsize=10)
    return figure


def rows_of(name: str) -> list:
    "Records of one benchmark."
    return [json.loads(line) for line in (HERE / f"bench_{name}.jsonl").read_text().splitlines()]


def table(heads: str, rows: list) -> str:
    "A Markdown table; heads are separated by |."
    return Table(tuple(heads.split("|")), [tuple(map(str, row)) for row in rows]).markdown()


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


MADE = {"README.md": tables, "results/README.md": all_tables, "benchmarks/README.md": benchmark_tables}


def with_tables(text: str, make=tables) -> str:
    "A page's text with fresh tables between the marks."
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{make()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        picture().savefig(HERE.parent / "nbs" / "figures" / "results.png", metadata={"Software": None})
    for page, make in MADE.items():
        if "--write" in sys.argv:
            path = HERE.parent / page
            path.write_text(with_tables(path.read_text(), make))
        else:
            print(make())
