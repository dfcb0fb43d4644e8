"The runner: stopped anywhere, started again, two at once; and the tables that it fills."

import json
import os
import time
from functools import cache
from pathlib import Path

import pytest
from forks import Script

from mlan.co_regularized_al import MAP_WEIGHTS
from mlan.command_line import main
from mlan.methods import METHODS, Setup, make_setup
from mlan.settings import PROFILES, RUNTIME_SETTINGS
from mlan.study import runner
from mlan.study.examination import PORTIONS
from mlan.study.records import example_record, experiment_key, experiment_title, lookup, of_profile, planned, read_records, row_records
from mlan.study.rows import BENCHMARK, FACTORS, PAIRS, TABLES, Row, row_setup, trials
from mlan.study.runner import expected_seconds, missing, run_missing, work

pytestmark = pytest.mark.usefixtures("no_report")           # drawing takes longer than the smallest run

TINY = dict(size=(32, 64), target_size=(32, 64), n_source=24, n_target=12, n_val=4, n_test=4, min_samples=3, warmup_steps=6, steps=6,
            schedule_steps=6, ramp_steps=2, critic_width=4, batch_size=3, log_every=2, val_every=3, checkpoint_every=2,
            self_training_steps=4, portions=(0.35,), translation_steps=4, translation_batch=2, translation_width=4, device="cpu")
FLAGS = [text for name, value in TINY.items() if name in row_setup(Row("fda")).values
         for text in (f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value]))]
ROWS = ("source_only", "cr_al", "adabn", "fda")


def plan(methods=ROWS, **changes) -> list:
    "Some rows of the built-in pair on tiny scenes."
    return [row_setup(Row(m), **{**TINY, **changes}) for m in methods]


def scores(path: Path) -> dict:
    "Every record's matrix, by method."
    return {r["method"]: r["matrix"] for r in read_records(path)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    "A folder in which all rows were run in one go."
    folder = tmp_path_factory.mktemp("whole")
    assert run_missing(plan(), folder / "records.jsonl", folder, progress=False) == []
    return folder


def start(folder: Path, name: str, *more: str) -> Script:
    "`mlan experiments` on the references, in a process of its own."
    code = "import sys, torch; torch.set_num_threads(1); from mlan.command_line import main; sys.exit(main(sys.argv[1:]))"
    flags = ["experiments", "--table", "references", "--records", str(folder / "records.jsonl"), "--folder", str(folder), "--quiet", *FLAGS]
    return Script(code, *flags, *more, told=folder / name)


def test_records_are_those_of_adapt_and_say_which_benchmark(whole):
    for record in read_records(whole / "records.jsonl"):
        out = whole / "runs" / f"{record['method']}-{experiment_key(record['settings'])}"
        own = json.loads((out / "result.json").read_text())
        diagnosed = {k: v for k, v in record["cost"].items() if k == "diagnosis"}
        assert {**{k: record[k] for k in own}, "cost": {**record["cost"]}} == {**own, "cost": {**own["cost"], **diagnosed}}
        assert record["benchmark"] == BENCHMARK and bool(diagnosed) == (record["method"] == "cr_al")
        assert ("diagnosis" in record) == (record["method"] == "cr_al")
    portions = [r["portion"] for r in read_records(whole / "records.jsonl")[1]["diagnosis"]["pseudo_labels"]["rows"]]
    assert sorted({*portions}) == sorted({*PORTIONS, 0.35})      # the recipe's own among them


def test_shared_stages_are_made_once(whole):
    made = [p.name.split("-")[0] for p in (whole / "stages").iterdir() if p.suffix in (".pt", ".npy")]
    assert sorted(made) == ["adabn", "align", "align", "align_translated", "regions", "translation", "warm_up"]


def test_a_budget_stops_before_a_run_that_would_not_end_in_time(whole, tmp_path):
    known = read_records(whole / "records.jsonl")
    long = [{**r, "seconds": 0.0, "cost": {"align": 1000.0, "maps": None}, "settings": {**r["settings"], "seed": 7}} for r in known]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in long))
    left = run_missing(plan(), tmp_path / "records.jsonl", tmp_path, budget=900, progress=False)
    assert len(left) == len(ROWS) and not (tmp_path / "stages").exists()


def test_a_run_that_is_killed_is_made_again_and_nothing_is_lost(tmp_path):
    running = start(tmp_path, "first")
    deadline = time.time() + 240
    while time.time() < deadline and not list((tmp_path / "stages").glob("warm_up-*.jsonl")) and running.running():
        time.sleep(0.05)
    running.kill()
    assert len(read_records(tmp_path / "records.jsonl")) < len(TABLES["references"])
    again = start(tmp_path, "again")
    assert again.ends() == 0, again.errors
    assert again.output.strip() == f"3 of 3 experiments are in {tmp_path / 'records.jsonl'}"
    assert sorted(scores(tmp_path / "records.jsonl")) == ["adabn", "fda", "oracle"]


def test_several_jobs_share_the_work_and_are_killed(tmp_path):
    "What was under way when all were killed is lost and no more; the file has whole lines, and the next call fills it."
    file, running = tmp_path / "records.jsonl", start(tmp_path, "first", "--jobs", "2")
    deadline = time.time() + 300
    while time.time() < deadline and not read_records(file) and running.running():
        time.sleep(0.05)
    running.kill()
    kept = read_records(file)
    assert 1 <= len(kept) <= 3
    again = start(tmp_path, "again", "--jobs", "2")
    assert again.ends() == 0, again.errors
    assert read_records(file)[: len(kept)] == kept and sorted(r["method"] for r in read_records(file)) == ["adabn", "fda", "oracle"]


def test_a_runner_whose_parent_is_gone_begins_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "parent_process", lambda: type("Gone", (), {"is_alive": staticmethod(lambda: False)}))
    assert len(run_missing(plan(("oracle",)), tmp_path / "r.jsonl", tmp_path, progress=False)) == 1


def test_rows_by_name(capsys, tmp_path):
    rows = {s.settings.method for s in planned(("1", "controls"), only=("il_al", "cr_al+fda"))}
    assert rows == {"il_al", "cr_al+fda"} and len(planned(("controls",), only=("cr_al map_weights=shuffled",))) == 1
    with pytest.raises(ValueError, match="there is no 'mlan'; choose from source_only, cr_al"):
        planned(("1",), only=("mlan",))
    arguments = ["experiments", "--table", "1", "--only", "rll", "--seeds", "3", "--dry-run", "--records", str(tmp_path / "r.jsonl")]
    assert main(arguments) in (None, 0)
    assert capsys.readouterr().out.splitlines()[0] == "streets:engine to streets:camera: RLL, seed 3, data seed 0"
    with pytest.raises(ValueError, match="jobs is 0; give at least 1"):
        run_missing(plan(), tmp_path / "r.jsonl", tmp_path, jobs=0)


@pytest.mark.parametrize("method", ["source_only", "fda", "mlan", "advent"])
def test_all_that_a_method_has_counts_in_a_key_but_what_changes_no_result(method):
    settings = row_setup(Row(method)).values
    for name, value in settings.items():
        other = {str: f"{value}x", int: 77, float: 0.77, bool: not value, tuple: (77, 77)}[type(value)]
        same = name in ("device", "workers", "checkpointing", "compile", "log_every", "checkpoint_every")
        assert (experiment_key({**settings, name: other}) == experiment_key(settings)) == same, name
    for name in {*row_setup(Row("mlan")).values} - {*settings}:
        assert experiment_key({**settings, name: 77}) == experiment_key(settings), name          # an old record has those of all methods
    def named(weights): return experiment_key({**settings, "weights": weights})
    assert named("/here/a.pt") == named("/there/a.pt") == named("a.pt") != named("caffe:a.pt") == named("caffe:/here/a.pt")


def test_a_key_survives_json():
    for s in plan():
        assert experiment_key(json.loads(json.dumps(s.values))) == experiment_key(s)


@pytest.fixture(scope="module")
def kept() -> list:
    "All records that lie here; those of rounding.jsonl are older than the benchmark's number, and on the same data."
    folder = Path(__file__).parent.parent / "results"
    return [{**r, "benchmark": BENCHMARK, "file": f} for f in ("experiments", "rounding") for r in read_records(folder / f"{f}.jsonl")]


usual_values = cache(lambda method: make_setup("", "", method).values)


def made_by(record: dict, setup: Setup) -> bool:
    "Does a record agree with a setup in all that its method has? What it does not know was as it is in the profile."
    usual = usual_values(setup.settings.method)
    return all(json.dumps(record["settings"].get(k, usual[k])) == json.dumps(v) for k, v in setup.values.items()
               if k not in (*RUNTIME_SETTINGS, "seed", "data_seed"))


def test_every_record_is_found_by_the_row_and_pair_that_it_was_made_for(kept):
    find, rows = lookup(kept), {row for table in TABLES.values() for row in table}
    lost = {id(r) for r in kept}
    for pair in PAIRS:
        for row in rows:
            runs, setup = find(row, pair), row_setup(row, pair)
            own = [r for r in kept if r["method"] == row.method and r["source"] == setup.settings.source and made_by(r, setup)]
            assert {id(r) for r in runs} == {id(r) for r in own}, (row.name, pair)
            assert len({(r["file"], r["seed"], r["data_seed"]) for r in runs}) == len(runs)
            lost -= {id(r) for r in runs}
    assert not lost and len(kept) == 329 + 39


def test_no_two_experiments_share_a_key(kept):
    for name in ("experiments", "rounding"):
        keys = [experiment_key(r["settings"]) for r in kept if r["file"] == name]
        assert len({*keys}) == len(keys)


def test_tables_hold_the_papers_rows():
    assert {r.method for r in TABLES["1"]} == {"source_only", "rll", "rl_al", "regularized_rl_al", "il_al", "regularized_il_al", "cr_al"}
    assert {r.method for r in TABLES["2"]} == {"cr_al", "cr_al+it", "cr_al+rit", "cr_al+st", "cr_al+rst", "mlan"}
    others = {name for name, method in METHODS.items() if method.reference in ("Tables 3 and 4", "outlook")}
    assert {r.method for t in TABLES.values() for r in t} == {*METHODS} - others | {"dacs"}           # beside augmentation
    assert {dict(r.set).get("map_weights") for r in TABLES["controls"]} == {None, *MAP_WEIGHTS} - {"error"}


@pytest.mark.parametrize("figure, weight", [("figure5", "lambda_ent"), ("figure6", "lambda_image")])
def test_figures_scale_one_weight_and_pass_through_the_table(figure, weight):
    usual, made = row_setup(Row("rl_al")), [row_setup(row) for row in TABLES[figure]]
    assert sorted({round(s.values[weight] / usual.values[weight], 6) for s in made}) == sorted(FACTORS)
    table = {experiment_key(row_setup(r)) for r in TABLES["1"]}
    assert sum(experiment_key(s) in table for s in made) == 2


def test_the_search_gives_every_row_the_same_budget():
    for table in ("1", "2", "references", "controls"):
        for row in TABLES[table]:
            tried = trials(row)
            assert len({experiment_key(row_setup(t)) for t in tried}) == 3, row.name
            assert set(tried) <= set(TABLES["search"])


def test_first_seed_of_all_pairs_before_the_second_of_any():
    made = planned(("1",), ("streets", "cartoon"), seeds=(0, 1), data_seeds=(0, 1))
    seeds = [(s.settings.data_seed, s.settings.seed) for s in made]
    assert seeds == sorted(seeds)
    assert len({experiment_key(s) for s in made}) == len(made) == 7 * 2 * 4


def test_another_version_of_the_benchmark_is_not_seen(whole, tmp_path):
    old = [{**r, "benchmark": BENCHMARK - 1} for r in read_records(whole / "records.jsonl")]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in old))
    assert missing(plan(), tmp_path / "records.jsonl") == plan()
    assert row_records([{**example_record(Row("cr_al")), "benchmark": BENCHMARK - 1}], Row("cr_al")) == []


def test_a_missing_data_set_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MLAN_DATA", raising=False)
    flags = ["experiments", "--table", "1", "--pair", "airsim_camvid", "--records", str(tmp_path / "r.jsonl"), "--folder", str(tmp_path)]
    assert main([*flags, "--quiet"]) == 2
    assert "MLAN_DATA" in capsys.readouterr().err and not os.path.exists(tmp_path / "r.jsonl")


def test_unknown_names_are_refused(capsys, tmp_path):
    for flag, name in (("--table", "9"), ("--pair", "kitti")):
        assert main(["experiments", flag, name, "--records", str(tmp_path / "r.jsonl")]) == 2
        assert f"there is no '{name}'; choose from" in capsys.readouterr().err


def test_every_experiment_has_a_title_of_its_own():
    for table in TABLES:
        made = planned((table,), tuple(PAIRS), seeds=(0, 1))
        assert len({experiment_title(s) for s in made}) == len(made)
    plain = experiment_title(row_setup(Row("cr_al"), "airsim_camvid"))
    assert plain == "airsim_nh to camvid: CR-AL, seed 0, data seed 0"          # the pair's own size is not worth a word
    assert "mlan" in experiment_title(make_setup("a", "b", "mlan")).lower()


def test_a_dry_run_names_every_experiment_and_its_time(tmp_path, capsys):
    (tmp_path / "r.jsonl").write_text("")
    assert main(["experiments", "--table", "figure5", "--records", str(tmp_path / "r.jsonl"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len({*lines}) == 11 and sum("lambda_ent 0.006" in line for line in lines) == 2


def test_a_budget_knows_the_times_of_this_device_alone():
    s, one = row_setup(Row("cr_al")), example_record(Row("cr_al"))
    both = [{**one, "cost": {"align": seconds}, "device": device} for seconds, device in ((100.0, "a"), (9.0, "b"))]
    assert [expected_seconds(s, both, d) for d in ("a", "b", "c")] == [100.0, 9.0, 0.0] and expected_seconds(s, both) == 100.0
    mlan, run = row_setup(Row("mlan")), s.settings
    images, more = run.batch_size * (run.warmup_steps + run.steps), mlan.recipe
    further = run.batch_size * (run.steps + more.self_training_steps) + more.translation_batch * more.translation_steps
    assert expected_seconds(mlan, both, "a") == pytest.approx(100.0 * (images + further) / images)


def test_what_a_run_takes_is_read_off_its_recipe():
    "Pixels of all its trainings, whichever they are; of old records, too, whose settings are those of all methods."
    s = row_setup(Row("cr_al"), "streets_camvid").settings
    usual = s.size[0] * s.size[1] * s.batch_size * (s.warmup_steps + s.steps)
    for method in ("source_only", "il_al", "fda", "cr_al+fda", "oracle", "adabn", "advent"):
        assert work(row_setup(Row(method), "streets_camvid", seed=3)) == usual, method
    recipe = row_setup(Row("cr_al+st")).recipe
    for method in ("cr_al+st", "cr_al+continued"):
        assert work(row_setup(Row(method))) == 64 * 128 * 6 * (900 + 500 + recipe.self_training_steps), method
    assert work(row_setup(Row("fda_mbt"))) == 64 * 128 * 6 * (900 + 2 * 3 * 150)
    old = example_record(Row("cr_al+rit"))
    old["settings"] |= {"method": "fda", "fourier_beta": 0.05}
    assert expected_seconds(row_setup(Row("fda"), batch_size=12), [old]) == 720.0


def test_what_one_experiment_cannot_do_does_not_stop_the_others(whole, tmp_path, monkeypatch, capsys):
    "No BatchNorm for AdaBN, no memory, no map to look at."
    import torch

    def adapt(method, adapt=runner.adapt, **given):
        if method == "adabn":
            raise ValueError("vgg16 has no BatchNorm")
        if method == "oracle":
            raise torch.OutOfMemoryError("no memory\nand a long story")
        return adapt(method=method, **given)

    def diagnose(lab, portions):
        raise ValueError("maps are zero everywhere")
    for name, fake in (("adapt", adapt), ("diagnose", diagnose)):
        monkeypatch.setattr(runner, name, fake)
    file = tmp_path / "r.jsonl"
    left = run_missing(plan(("adabn", "oracle", "cr_al", "fda")), file, whole)
    assert [s.settings.method for s in left] == ["adabn", "oracle"] and [r["method"] for r in read_records(file)] == ["cr_al", "fda"]
    assert "zero everywhere" in read_records(file)[0]["diagnosis_failed"] and read_records(file)[0]["miou"] > 0
    said = capsys.readouterr().err
    assert "left out: vgg16 has no BatchNorm" in said and "left out: no memory" in said and "long story" not in said


def test_a_data_set_that_lacks_is_named_before_the_first_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLAN_DATA", raising=False)
    both = [*plan(("source_only",)), row_setup(Row("source_only"), "airsim_camvid", device="cpu")]
    with pytest.raises(ValueError, match="MLAN_DATA"):
        run_missing(both, tmp_path / "r.jsonl", tmp_path, progress=False)
    assert not (tmp_path / "runs").exists()


def test_several_processes_do_not_share_an_experiment(tmp_path, monkeypatch):
    monkeypatch.setattr("mlan.study.runner.processes", lambda: type("Team", (), {"num_processes": 2}))
    with pytest.raises(ValueError, match="an experiment is one process"):
        run_missing(plan(), tmp_path / "r.jsonl", tmp_path, progress=False)


def test_another_data_seed_is_no_other_photograph():
    made = planned(("1",), ("streets_camvid", "airsim_camvid"), data_seeds=(0, 1))
    assert len(made) == 3 * 7 and {s.settings.data_seed for s in made if s.settings.source == "airsim_nh"} == {0}


def test_a_flag_does_not_unmake_a_row():
    with pytest.raises(ValueError, match="the row CR-AL, maps raw sets map_weights itself"):
        planned(("controls",), map_weights="shuffled")
    assert {s.settings.steps for s in planned(("controls",), steps=7)} == {7}


def test_a_flag_is_for_the_rows_that_have_it_and_one_that_none_has_is_refused(tmp_path, capsys):
    made = planned(("1", "references"), lambda_ent=0.7, fourier_beta=0.3)
    assert {s.values.get("lambda_ent") for s in made} == {None, 0.7} and {s.values.get("fourier_beta") for s in made} == {None, 0.3}
    assert main(["experiments", "--table", "references", "--lambda-ent", "1", "--records", str(tmp_path / "r.jsonl"), "--dry-run"]) == 2
    assert "method oracle has no setting 'lambda_ent' (rll" in capsys.readouterr().err
    with pytest.raises(ValueError, match="method fda has no setting 'patches'"):
        row_setup(Row("fda", set=(("patches", (8,)),)))


def test_own_weights_need_a_whole_search_of_the_same_settings():
    known = [example_record(t, val=30.0 + i) for row in TABLES["1"] for i, t in enumerate(trials(row))]
    chosen = planned(("1",), chosen=known, seeds=(3,))
    assert [s.settings.lr for s in chosen if s.title == "source only"] == [3 * row_setup(Row("source_only")).settings.lr]
    for wrong, said in ((dict(chosen=known[1:]), "has not had its three trials"), (dict(steps=9), "has not had its three trials"),
                        (dict(pairs=("cartoon",)), "on cartoon"), (dict(tables=("figure5",)), "point of a figure")):
        with pytest.raises(ValueError, match=said):
            planned(**{"tables": ("1",), "chosen": known, **wrong})


def test_rows_of_two_profiles_do_not_mix():
    both = [example_record(Row("cr_al"), profile=p) for p in ("quick", "paper")]
    with pytest.raises(ValueError, match="of_profile"):
        row_records(both, Row("cr_al"))
    for p in ("quick", "paper"):
        assert [r["settings"]["profile"] for r in row_records(of_profile(both, p), Row("cr_al"))] == [p]


@pytest.mark.parametrize("line", ["1", "[]", '{"benchmark": 1}', "{"])
def test_a_line_that_is_no_record_is_named(line, tmp_path, capsys):
    (tmp_path / "r.jsonl").write_text(line + "\n")
    assert main(["experiments", "--records", str(tmp_path / "r.jsonl"), "--dry-run"]) == 2
    assert "line 1" in capsys.readouterr().err


@pytest.mark.parametrize("flags, said", [(("--budget", "-5"), "no number of seconds"), (("--seed", "3"), "there is no --seed"),
                                         (("--data", "3"), "there is no --data")])
def test_flags_that_mean_nothing_are_refused(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["experiments", "--records", str(tmp_path / "r.jsonl"), *flags])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("pair", PAIRS)
def test_profiles_know_every_row(pair):
    for profile in PROFILES:
        for row in {r for table in TABLES.values() for r in table}:
            assert isinstance(row_setup(row, pair, profile), Setup)


def test_photographs_are_not_squeezed():
    "CamVid's are 4:3."
    for pair, profile in ((p, n) for p in PAIRS if PAIRS[p].target == "camvid" for n in PROFILES if n != "paper"):
        setup = row_setup(Row("cr_al"), pair, profile)
        s, patches = setup.settings, setup.recipe.patches
        assert s.size == s.target_size and 4 * s.size[0] == 3 * s.size[1] and all(s.size[0] % p == 0 for p in patches[:2])
