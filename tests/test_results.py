"""What is shown is what the records say."""
import json
import runpy
from pathlib import Path

import pytest
from forks import Script

from mlan.loop import TrainingError
from mlan.study.evidence import (
    ablation, agreement_table, condition_table, coverage_table, gap_table, order_table, pairs_table, pretrained_table, repeat_differences,
    search_table)
from mlan.study.paper_tables import PAPER_MIOU, STEPS, gain
from mlan.study.records import read_records
from mlan.study.rows import BENCHMARK, PAIRS, Row, row_setup, trials
from mlan.study.records import example_record as record
from mlan.study.runner import measure
from mlan.study.verdicts import WORDS, answers, data_set_table, fair_table, findings, outcome_table, repeat_table, tally

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "results" / "experiments.jsonl"


def counted(table) -> dict:
    "A tally as numbers."
    assert tally(table).heads == ("pair", *WORDS, "clear among all")
    return {line[0]: [int(n) for n in line[1:5]] for line in tally(table).rows}


def as_in_the_paper(seeds=(0, 1, 2)) -> list:
    "Runs whose means are the paper's, with noise that differs from row to row."
    return [record(Row(m), v + 0.01 * ((3 * i + 7 * s) % 5), seed=s) for i, (m, v) in enumerate(PAPER_MIOU.items()) for s in seeds]


@pytest.mark.parametrize("page", ["README.md", "results/README.md", "benchmarks/README.md"])
def test_tables_are_made_from_the_records(page):
    make_tables = runpy.run_path(str(ROOT / "results" / "make_tables.py"))
    text = (ROOT / page).read_text(encoding="utf-8")
    assert make_tables["with_tables"](text, make_tables["MADE"][page]) == text, "run `python results/make_tables.py --write`"


def test_records_say_what_made_them():
    records = read_records(RECORDS)
    assert records
    for r in (r for r in records if r["miou"] is not None):
        assert {"settings", "seed", "commit", "versions", "device", "seconds", "peak_mib", "per_class", "matrix"} <= set(r)
        assert r["benchmark"] == BENCHMARK and r["commit"] and not r["commit"].endswith("-dirty")


def test_no_record_names_a_place_on_somebodys_machine():
    for r in read_records(RECORDS):
        assert not [v for v in r["settings"].values() if isinstance(v, str) and ("/" in v or "\\" in v)]


def test_the_papers_own_numbers_are_reproduced_in_every_step():
    table = outcome_table(as_in_the_paper())
    assert counted(table)["streets"] == [len(STEPS), 0, 0, 0] and counted(table)["cartoon"] == [0, 0, 0, len(STEPS)]
    assert [line[1] for line in table.rows] == [f"{gain(*two):+.1f}" for two in STEPS]


def test_one_seed_leaves_every_step_open():
    for seeds in ((0,), (0, 1)):
        assert counted(outcome_table(as_in_the_paper(seeds)))["streets"] == [0, 0, len(STEPS), 0]


def test_the_papers_numbers_upside_down_contradict_it():
    upside_down = [{**r, "miou": 100 - r["miou"]} for r in as_in_the_paper()]
    assert counted(outcome_table(upside_down))["streets"] == [0, len(STEPS), 0, 0]


EVERY = (outcome_table, coverage_table, data_set_table, order_table, pairs_table, condition_table, pretrained_table, search_table,
         fair_table, gap_table, findings)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    "What `measure` writes of a training that breaks."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlan.study.runner.adapt", lambda **_: (_ for _ in ()).throw(TrainingError("the loss is not finite")))
        return measure(row_setup(Row("rll"), seed=1), tmp_path_factory.mktemp("broken"))


def test_a_training_that_broke_is_no_score_and_no_obstacle(broken):
    runs = [r for r in as_in_the_paper() if (r["method"], r["seed"]) != ("rll", 1)] + [broken]
    assert counted(outcome_table(runs))["streets"] == [len(STEPS) - 2, 0, 2, 0]
    for made in EVERY:
        made(runs)
    assert {"commit", "versions", "device"} <= set(broken)
    assert "rll" in repeat_differences(runs, runs) and len(repeat_differences(runs, runs)["rll"]) == 2
    repeat_table(runs, runs)
    make_tables = runpy.run_path(str(ROOT / "results" / "make_tables.py"))
    assert "19 classes" in make_tables["about"]([broken, *read_records(RECORDS)[:1]])


def test_nothing_was_run_and_every_table_says_so():
    for made in EVERY:
        made([])
    assert agreement_table([]).rows == [] and repeat_table([], []).rows == []
    assert "not run against the plain sum" in findings([]) and "clearly reproduced 0, by themselves 0" in findings([])


def test_unknown_names_are_refused_with_those_that_exist():
    for wrong in (lambda: answers([], {"?": ("cr_all", {"fda": "FDA"})}), lambda: answers([], {"?": ("cr_al", {"fda": "FDA"})}, "kitti"),
                  lambda: ablation([], "kitti", ("1",), []), lambda: ablation([], "streets", ("9",), []),
                  lambda: outcome_table([], pairs=("kitti",))):
        with pytest.raises(ValueError, match="there is no '.*'; choose from"):
            wrong()


def test_order_agrees_with_itself_and_not_with_its_reverse():
    same = order_table(as_in_the_paper())
    swapped = {"1": "0 of 21", "2": "0 of 15"}
    assert [(line[0], line[1], line[3], line[6]) for line in same.rows] == [("streets", t, "+1.00", n) for t, n in swapped.items()]
    assert all(float(line[4]) < .05 and line[5].endswith("(3 runs)") for line in same.rows)
    back = [record(Row(m), 100 - v) for m, v in PAPER_MIOU.items()]
    assert [line[3] for line in order_table(back).rows] == ["-1.00", "-1.00"]


def test_rows_stand_in_the_papers_order_and_controls_after_them():
    table = ablation(as_in_the_paper(), "streets", ("1", "2", "references", "controls"), STEPS).methods
    assert [line[1] for line in table.rows[:len(PAPER_MIOU)]] == [f"{v:.1f}" for v in PAPER_MIOU.values()]
    assert all(line[1] == "" for line in table.rows[len(PAPER_MIOU):])
    names = [line[0] for line in table.rows]
    assert len(set(names)) == len(names) and "CR-AL, maps normalised" not in names and "CR-AL, maps turned" in names


def test_the_best_of_a_pair_is_bold_and_the_oracle_apart():
    runs = [record(Row("cr_al"), 41.0), record(Row("mlan"), 40.0), record(Row("oracle"), 60.0), record(Row("fda"), 9.0, pair="cartoon")]
    table = pairs_table(runs)
    bold = {(table.rows[i][0], table.heads[j]) for i, j in table.bold}
    assert bold == {("CR-AL", "streets"), ("FDA, images only", "cartoon")} and table.rows[-1][0] == "oracle"


def test_rows_are_ranked_on_the_runs_that_all_have():
    "An easy data set that one row has seen more of does not make it the best, nor change the order."
    runs = [record(Row("source_only"), 40.0), record(Row("source_only"), 20.0, data_seed=1), record(Row("cr_al"), 39.0),
            record(Row("cr_al"), 19.0, data_seed=1), record(Row("rll"), 35.0)]
    table = pairs_table(runs)
    assert [table.rows[i][0] for i, _ in table.bold] == ["source only"]
    assert order_table(runs).rows[0][3:] == ("-0.33", "1", "one run", "2 of 3")


def searched(row, values, best=0, **changes):
    "A row's three trials on val; the best has the runs of `values` on test."
    tried = trials(row)
    return [record(t, values[0] if i == best else 1.0, 50.0 if i == best else 1.0) for i, t in enumerate(tried)] + [
        record(tried[best], v, seed=s) for s, v in enumerate(values[1:], 1)]


def test_each_row_at_its_own_weights_is_compared_with_what_it_was_built_on():
    "CR-AL's better weights count against IL-AL, not against CR-AL + ST, which was trained from CR-AL at the shared weights."
    runs = [*searched(Row("cr_al"), [43.0], best=1), *searched(Row("regularized_il_al"), [39.0]), *searched(Row("cr_al+st"), [41.0]),
            *searched(Row("cr_al+rit"), [60.0], best=2), *searched(Row("mlan"), [44.0])]
    runs = [{**r, "miou": {"cr_al": 40.0, "cr_al+rit": 42.0}[r["method"]]} if r["miou"] == 1.0 and r["method"] in ("cr_al", "cr_al+rit")
            else r for r in runs]
    cells = {line[0]: line[1:] for line in fair_table(runs).rows}
    assert cells["CR-AL over regularized IL-AL"] == ("+2.2", "1", "open +1.0 (1 seed)", "open +4.0 (1 seed)")
    assert cells["CR-AL+ST over CR-AL"] == ("+1.7", "1", "open +1.0 (1 seed)", "open +1.0 (1 seed)")
    assert cells["MLAN over CR-AL+RIT"] == ("+2.2", "1", "open +2.0 (1 seed)", "open +2.0 (1 seed)")
    assert cells["RLL over source only"][1:] == ("0", "not run", "not run")


def test_shared_and_own_weights_are_compared_on_the_same_runs():
    "A further data set at the shared weights alone must not change a verdict."
    runs = [*searched(Row("cr_al"), [41.0, 42.0, 43.0]), *searched(Row("regularized_il_al"), [40.0, 41.0, 42.0], best=1),
            *[record(Row("regularized_il_al"), 40.0 + s, seed=s) for s in (1, 2)]]
    before = {line[0]: line[2:] for line in fair_table(runs).rows}["CR-AL over regularized IL-AL"]
    more = [record(Row(m), v, data_seed=1) for m, v in (("cr_al", 10.0), ("regularized_il_al", 50.0))]
    assert {line[0]: line[2:] for line in fair_table(runs + more).rows}["CR-AL over regularized IL-AL"] == before
    assert before[0] == "3"


def test_clear_is_what_is_clear_among_all_that_is_asked():
    "A p value of .03 stands by itself, and not beside another comparison."
    differences = (1.0, 1.5, 0.5, 1.2)                                              # t = 4.9 with three degrees of freedom: p about .016
    runs = [record(Row(m), v, seed=s) for s, d in enumerate(differences) for m, v in (("cr_al", 40.0 + d), ("fda", 40.0), ("adabn", 40.0))]
    runs += [record(Row("mlan"), 40.0 + (-1) ** s, seed=s) for s in range(4)]
    one = answers(runs, {"?": ("cr_al", {"fda": "FDA"})})["?"]
    more = answers(runs, {"?": ("cr_al", {"fda": "FDA"}), "!": ("cr_al", {"adabn": "AdaBN", "mlan": "MLAN"}),
                          "x": ("mlan", {"fda": "FDA"})})
    assert "clearly above FDA" in one and "by itself above FDA" in more["?"] and "by itself above AdaBN" in more["!"]
    assert "not clearly apart from FDA" in more["x"]


def test_the_final_notebook_runs_a_row_again_in_little_time(tmp_path):
    "Its last cells in a process of their own, with MLAN_RERUN unset."
    cells = json.loads((ROOT / "nbs" / "99_results.ipynb").read_text())["cells"]
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    needed = [c for c in code if c.startswith(("#| hide\nimport os", "from mlan.study", "wanted, records", "smoke ="))]
    assert len(needed) == 4
    beside = Script("\n".join(["import os; os.environ.pop('MLAN_RERUN', None)", *needed]), told=tmp_path / "told", folder=ROOT / "nbs")
    assert beside.ends(300) == 0 and "was run again" in beside.output, beside.errors


def test_the_final_notebook_is_committed_with_its_outputs():
    cells = [c for c in json.loads((ROOT / "nbs" / "99_results.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    silent = ["".join(c["source"]).splitlines()[-1] for c in cells if not c["outputs"] and "#|" not in "".join(c["source"])[:3]]
    assert not [line for line in silent if line.startswith(("outcome", "table", "search", "pairs", "tally", "agreement", "drawn", "TABLE"))]


@pytest.mark.parametrize("pair", PAIRS)
def test_records_of_a_pair_share_their_data(pair):
    seen = {(0, "test"): set()}
    for r in read_records(RECORDS):
        if (r["source"], r["target"]) == (PAIRS[pair].source, PAIRS[pair].target) and r["miou"] is not None:
            seen.setdefault((r["data_seed"], "test"), set()).add(r["data"]["test"])
            if r["method"] != "oracle":                      # older ones name what they learnt from: the target
                seen.setdefault((r["data_seed"], "source"), set()).add(r["data"]["source"])
    assert all(len(prints) == 1 for prints in seen.values())
