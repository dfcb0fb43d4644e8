"""Tables of the READMEs (the front page's, this folder's, the benchmarks') from the records beside this file.

python results/make_tables.py            prints them
python results/make_tables.py --write    puts them between the marks in the three pages, draws nbs/figures/results.png
"""
import json
import sys
from pathlib import Path

from mlan.comparison import Table, ablation_figure, paired_difference, summary
from mlan.experiments import PAIRS, Row, read_records, row_records, row_scores, trials
from mlan.paper_tables import PAPER_MIOU, STEPS
from mlan.results import (
    WORDS, ablation, answer, condition_table, fair_table, outcome_table, pairs_table, pretrained_tables, search_table, tally)

HERE = Path(__file__).parent
BEGIN, END = "<!-- results: made by results/make_tables.py -->", "<!-- end of results -->"
MAIN = ("1", "2", "references", "controls")


def records() -> list:
    "All records of runs."
    return read_records(HERE / "experiments.jsonl")


def about(runs: list) -> str:
    "What the runs of a pair have in common."
    s = runs[0]["settings"]
    return (f"{len(runs[0]['classes'])} classes, {s['size'][0]} x {s['size'][1]} pixels, backbone `{s['backbone']}` with weights "
            f"`{Path(s['weights']).name}`, {runs[0]['device']}")


def tables() -> str:
    "The main table, and what the records say."
    runs = records()
    main, first = ablation(runs, "streets", MAIN, STEPS).methods, row_records(runs, Row("source_only"), PAIRS["streets"])
    return "\n\n".join([f"**{PAIRS['streets'].source} to {PAIRS['streets'].target}**, {about(first)}:", main.markdown(),
                        "What these records say (differences in points, with their 95 % interval):", told(runs)])


def all_tables() -> str:
    "The paper's steps and all rows on all pairs, conditions, rows from ImageNet's weights, the search and what it changes."
    runs = records()
    return "\n\n".join([
        "**Each step that the paper takes**: *reproduced* or *contradicted* where the 95 % interval leaves out zero (each by itself; "
        "Holm's mark for all together is in notebook 25):", outcome_table(runs).markdown(),
        "**All pairs**, mIoU on test, mean and standard deviation over runs:", pairs_table(runs).markdown(),
        "**Conditions**, on the first pair:", condition_table(runs).markdown(),
        "**From ImageNet's weights** (VGG-16), on the first pair:", pretrained_tables(runs).markdown(),
        "**The search**: mIoU on val with each row's own weights lower, as they are, higher:", search_table(runs).markdown(),
        "**What it changes**: each comparison with the shared weights, and with each row at its own best:", fair_table(runs).markdown()])


def told(runs: list) -> str:
    "What the records of the built-in pair say, in sentences."
    def level(row, pair="streets"):
        scores = row_scores(runs, [row], PAIRS[pair])[row.name].values()
        return summary(scores).told if scores else "not run"

    counts = dict(zip(WORDS, tally(outcome_table(runs)).rows[0][1:]))
    own = [line[3].split()[0] for line in fair_table(runs, steps=STEPS).rows]
    raw = Row("cr_al", set=(("map_weights", "raw"),))
    both = Row("cr_al"), Row("source_only")
    gains = {pair: paired_difference(row_scores(runs, both, PAIRS[pair]), "cr_al", "source_only") for pair in PAIRS}
    lost = [f"{PAIRS[p].source} to {PAIRS[p].target} ({level(both[0], p)} against {level(both[1], p)})" for p, d in gains.items()
            if d and d.mean < 0]
    return "\n".join("- " + line for line in (
        f"**The paper's steps:** of {len(STEPS)}, {counts['reproduced']} are reproduced, {counts['contradicted']} contradicted, "
        f"{counts['open']} open; with each row at its own best weights {own.count('reproduced')}, {own.count('contradicted')} and "
        f"{own.count('open')}.",
        "**The maps:** " + answer(runs, "cr_al", {"rl_al_and_il_al": "the plain sum of its games",
                                                  "cr_al map_weights=shuffled": "its own maps at shuffled places"}),
        f"**Their scale:** with raw maps, as printed, CR-AL ends at {level(raw)}, with a third of the weights at {level(trials(raw)[1])}; "
        "the `quick` profile gives them mean 1.",
        "**What costs less:** " + answer(runs, "cr_al", {"adabn": "AdaBN (no training)", "fda": "FDA (some frequencies swapped)"}),
        "**Translation:** " + answer(runs, "cr_al+rit", {"cr_al": "CR-AL", "cr_al+it": "the unweighted pair",
                                                         "cr_al+fda": "CR-AL with FDA"}),
        "**Self-training:** " + answer(runs, "cr_al+rst", {"cr_al": "CR-AL", "cr_al+st": "ST",
                                                           "cr_al+continued": "CR-AL trained on for as long"}),
        "**It can hurt:** CR-AL stays below source only on " + (", ".join(lost) or "no pair")
        + ", with loss weights that were found on the first pair."))


def picture():
    "The staircase of Tables 1 and 2, the paper's beside ours."
    scores = row_scores(records(), [Row(m) for m in PAPER_MIOU], PAIRS["streets"])
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
