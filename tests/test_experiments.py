"The runner: stopped anywhere, started again, two at once; and the tables that it fills."

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from mlan.command_line import main
from mlan.study.experiments import (
    BENCHMARK, FACTORS, PAIRS, TABLES, Row, expected_seconds, experiment_key, experiment_title, missing, of_profile, planned, read_records,
    row_records, row_scores, row_settings, run_missing, trials)
from mlan.settings import MAP_WEIGHTS, PLANS, PROFILES, Settings, make_settings

TINY = dict(size=(32, 64), target_size=(32, 64), n_source=24, n_target=12, n_val=4, n_test=4, min_samples=3, warmup_steps=6, steps=6,
            schedule_steps=6, ramp_steps=2, critic_width=4, batch_size=3, log_every=2, val_every=3, checkpoint_every=2,
            self_training_steps=4, translation_steps=4, translation_batch=2, translation_width=4, device="cpu")
FLAGS = [text for name, value in TINY.items()
         for text in (f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else [value]))]
METHODS = ("source_only", "cr_al", "adabn", "fda")


def plan(methods=METHODS, **changes) -> list:
    "Some rows of the built-in pair on tiny scenes."
    return [row_settings(Row(m), PAIRS["streets"], **{**TINY, **changes}) for m in methods]


def scores(path: Path) -> dict:
    "Every record's matrix, by method."
    return {r["method"]: r["matrix"] for r in read_records(path)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    "A folder in which all rows were run in one go."
    folder = tmp_path_factory.mktemp("whole")
    assert run_missing(plan(), folder / "records.jsonl", folder, progress=False) == []
    return folder


def start(folder: Path, *more: str) -> subprocess.Popen:
    "`mlan experiments` on the references, in a process of its own."
    command = "import sys, torch; torch.set_num_threads(1); from mlan.command_line import main; sys.exit(main(sys.argv[1:]))"
    flags = ["experiments", "--table", "references", "--records", str(folder / "records.jsonl"), "--folder", str(folder), "--quiet", *FLAGS]
    return subprocess.Popen([sys.executable, "-c", command, *flags, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_records_are_those_of_run_mlan_and_say_which_benchmark(whole):
    for record in read_records(whole / "records.jsonl"):
        out = whole / "runs" / f"{record['method']}-{experiment_key(record['settings'])}"
        own = json.loads((out / "result.json").read_text())
        diagnosed = {k: v for k, v in record["cost"].items() if k == "diagnosis"}
        assert {**{k: record[k] for k in own}, "cost": {**record["cost"]}} == {**own, "cost": {**own["cost"], **diagnosed}}
        assert record["benchmark"] == BENCHMARK and bool(diagnosed) == (record["method"] == "cr_al")
        assert ("diagnosis" in record) == (record["method"] == "cr_al")


def test_shared_stages_are_made_once(whole):
    made = [p.name.split("-")[0] for p in (whole / "stages").glob("*.pt")]
    assert sorted(made) == ["adabn", "align", "align", "align_translated", "translation", "warm_up"]


def test_a_budget_stops_before_a_run_that_would_not_end_in_time(whole, tmp_path):
    known = read_records(whole / "records.jsonl")
    long = [{**r, "seconds": 0.0, "cost": {"align": 1000.0, "maps": None}, "settings": {**r["settings"], "seed": 7}} for r in known]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in long))
    left = run_missing(plan(), tmp_path / "records.jsonl", tmp_path, budget=900, progress=False)
    assert len(left) == len(METHODS) and not (tmp_path / "stages").exists()


def test_a_run_that_is_killed_is_made_again_and_nothing_is_lost(tmp_path):
    running = start(tmp_path)
    deadline = time.time() + 240
    while time.time() < deadline and not list((tmp_path / "stages").glob("warm_up-*.jsonl")) and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert len(read_records(tmp_path / "records.jsonl")) < len(TABLES["references"])
    again = start(tmp_path)
    said, told = again.communicate(timeout=400)
    assert again.returncode == 0, told
    assert said.strip() == f"3 of 3 experiments are in {tmp_path / 'records.jsonl'}"
    assert sorted(scores(tmp_path / "records.jsonl")) == ["adabn", "fda", "oracle"]


def test_two_runners_share_the_work(tmp_path):
    both = [start(tmp_path) for _ in range(2)]
    for one in both:
        told = one.communicate(timeout=400)[1]
        assert one.returncode == 0, told
    left = start(tmp_path)                      # a runner that came second leaves what the first was at
    assert left.wait(400) == 0
    methods = [r["method"] for r in read_records(tmp_path / "records.jsonl")]
    assert sorted(methods) == ["adabn", "fda", "oracle"]


def test_every_setting_counts_in_a_key_but_those_that_change_no_result():
    settings = asdict(plan()[0])
    for name, value in settings.items():
        other = {str: f"{value}x", int: 77, float: 0.77, bool: True, tuple: (77, 77)}[type(value)]
        same = name in ("device", "workers", "checkpointing", "compile", "log_every", "checkpoint_every")
        assert (experiment_key({**settings, name: other}) == experiment_key(settings)) == same, name
    def named(weights): return experiment_key({**settings, "weights": weights})
    assert named("/here/a.pt") == named("/there/a.pt") == named("a.pt") != named("caffe:a.pt") == named("caffe:/here/a.pt")


def test_a_key_survives_json():
    for s in plan():
        assert experiment_key(json.loads(json.dumps(asdict(s)))) == experiment_key(s)


def test_tables_hold_the_papers_rows():
    assert {r.method for r in TABLES["1"]} == {"source_only", "rll", "rl_al", "regularized_rl_al", "il_al", "regularized_il_al", "cr_al"}
    assert {r.method for r in TABLES["2"]} == {"cr_al", "cr_al+it", "cr_al+rit", "cr_al+st", "cr_al+rst", "mlan"}
    assert {r.method for t in TABLES.values() for r in t} == set(PLANS)
    assert {dict(r.set).get("map_weights") for r in TABLES["controls"]} == {None, *MAP_WEIGHTS}


@pytest.mark.parametrize("figure, weight", [("figure5", "lambda_ent"), ("figure6", "lambda_image")])
def test_figures_scale_one_weight_and_pass_through_the_table(figure, weight):
    usual = row_settings(Row("rl_al"), PAIRS["streets"])
    made = [row_settings(row, PAIRS["streets"]) for row in TABLES[figure]]
    assert sorted({round(getattr(s, weight) / getattr(usual, weight), 6) for s in made}) == sorted(FACTORS)
    table = {experiment_key(row_settings(r, PAIRS["streets"])) for r in TABLES["1"]}
    assert sum(experiment_key(s) in table for s in made) == 2


def test_the_search_gives_every_row_the_same_budget():
    for table in ("1", "2", "references", "controls"):
        for row in TABLES[table]:
            tried = trials(row)
            assert len({experiment_key(row_settings(t, PAIRS["streets"])) for t in tried}) == 3, row.name
            assert set(tried) <= set(TABLES["search"])


def test_first_seed_of_all_pairs_before_the_second_of_any():
    made = planned(("1",), ("streets", "cartoon"), seeds=(0, 1), data_seeds=(0, 1))
    assert [(s.data_seed, s.seed) for s in made] == sorted((s.data_seed, s.seed) for s in made)
    assert len({experiment_key(s) for s in made}) == len(made) == 7 * 2 * 4


def test_another_version_of_the_benchmark_is_not_seen(whole, tmp_path):
    old = [{**r, "benchmark": BENCHMARK - 1} for r in read_records(whole / "records.jsonl")]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in old))
    assert missing(plan(), tmp_path / "records.jsonl") == plan()
    assert row_records(old, Row("cr_al"), PAIRS["streets"]) == []


def test_a_missing_data_set_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MLAN_DATA", raising=False)
    flags = ["experiments", "--table", "1", "--pair", "airsim_camvid", "--records", str(tmp_path / "r.jsonl"), "--folder", str(tmp_path)]
    assert main([*flags, "--quiet"]) == 2
    assert "MLAN_DATA" in capsys.readouterr().err and not os.path.exists(tmp_path / "r.jsonl")


def test_unknown_names_are_refused(capsys, tmp_path):
    for flag, name in (("--table", "9"), ("--pair", "kitti")):
        assert main(["experiments", flag, name, "--records", str(tmp_path / "r.jsonl")]) == 2
        assert f"there is no '{name}'; choose from" in capsys.readouterr().err


def a_record(s: Settings, miou=40.0, val=40.0, **more) -> dict:
    "A made-up run."
    settings = json.loads(json.dumps(asdict(s)))
    return {"benchmark": BENCHMARK, "settings": settings, "method": s.method, "seed": s.seed, "data_seed": s.data_seed, "miou": miou,
            "miou_val": val, "cost": {"align": 100.0}, "device": "a", **more}


def test_every_experiment_has_a_title_of_its_own():
    for table in TABLES:
        made = planned((table,), tuple(PAIRS), seeds=(0, 1))
        assert len({experiment_title(s) for s in made}) == len(made)
    plain = experiment_title(row_settings(Row("cr_al"), PAIRS["airsim_camvid"]))
    assert plain == "airsim_nh to camvid: CR-AL, seed 0, data seed 0"          # the pair's own size is not worth a word
    assert "mlan" in experiment_title(make_settings("a", "b", "mlan")).lower()


def test_a_dry_run_names_every_experiment_and_its_time(tmp_path, capsys):
    (tmp_path / "r.jsonl").write_text("")
    assert main(["experiments", "--table", "figure5", "--records", str(tmp_path / "r.jsonl"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len({*lines}) == 11 and sum("lambda_ent 0.006" in line for line in lines) == 2


def test_a_budget_knows_the_times_of_this_device_alone():
    s = row_settings(Row("cr_al"), PAIRS["streets"])
    both = [a_record(s), a_record(s, cost={"align": 9.0}, device="b")]
    assert [expected_seconds(s, both, d) for d in ("a", "b", "c")] == [100.0, 9.0, 0.0] and expected_seconds(s, both) == 100.0
    longer = expected_seconds(row_settings(Row("mlan"), PAIRS["streets"]), both, "a")
    steps = s.warmup_steps + s.steps
    assert longer == pytest.approx(100.0 * (steps + s.steps + s.translation_steps + s.self_training_steps) / steps)


def test_what_one_experiment_cannot_do_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    "No BatchNorm for AdaBN, no memory, no map to look at."
    import torch
    from mlan import experiments

    def run_mlan(method, out, stages, progress, **settings):
        if method == "adabn":
            raise ValueError("vgg16 has no BatchNorm")
        if method == "oracle":
            raise torch.OutOfMemoryError("no memory\nand a long story")
        s = make_settings(method=method, **settings)
        return type("Result", (), {"record": a_record(s)})

    def diagnose(run):
        raise ValueError("maps are zero everywhere")
    for name, fake in (("run_mlan", run_mlan), ("diagnose", diagnose), ("walk", lambda run: None)):
        monkeypatch.setattr(experiments, name, fake)
    file = tmp_path / "r.jsonl"
    left = run_missing(plan(("adabn", "oracle", "cr_al", "fda")), file, tmp_path)
    assert [s.method for s in left] == ["adabn", "oracle"] and [r["method"] for r in read_records(file)] == ["cr_al", "fda"]
    assert "zero everywhere" in read_records(file)[0]["diagnosis_failed"] and read_records(file)[0]["miou"] == 40.0
    said = capsys.readouterr().err
    assert "left out: vgg16 has no BatchNorm" in said and "left out: no memory" in said and "long story" not in said


def test_a_data_set_that_lacks_is_named_before_the_first_run(tmp_path, monkeypatch):
    monkeypatch.delenv("MLAN_DATA", raising=False)
    both = [*plan(("source_only",)), row_settings(Row("source_only"), PAIRS["airsim_camvid"], device="cpu")]
    with pytest.raises(ValueError, match="MLAN_DATA"):
        run_missing(both, tmp_path / "r.jsonl", tmp_path, progress=False)
    assert not (tmp_path / "runs").exists()


def test_several_processes_do_not_share_an_experiment(tmp_path, monkeypatch):
    monkeypatch.setattr("mlan.study.experiments.processes", lambda: type("Team", (), {"num_processes": 2}))
    with pytest.raises(ValueError, match="an experiment is one process"):
        run_missing(plan(), tmp_path / "r.jsonl", tmp_path, progress=False)


def test_another_data_seed_is_no_other_photograph():
    made = planned(("1",), ("streets_camvid", "airsim_camvid"), data_seeds=(0, 1))
    assert len(made) == 3 * 7 and {s.data_seed for s in made if s.source == "airsim_nh"} == {0}


def test_a_flag_does_not_unmake_a_row():
    with pytest.raises(ValueError, match="the row CR-AL, maps raw sets map_weights itself"):
        planned(("controls",), map_weights="shuffled")
    assert {s.steps for s in planned(("controls",), steps=7)} == {7}


def test_own_weights_need_a_whole_search_of_the_same_settings():
    rows = [Row("source_only"), Row("cr_al")]
    known = [a_record(row_settings(t, PAIRS["streets"]), val=30.0 + i) for row in TABLES["1"] for i, t in enumerate(trials(row))]
    chosen = planned(("1",), chosen=known, seeds=(3,))
    assert [s.lr for s in chosen if s.method == "source_only"] == [3 * row_settings(rows[0], PAIRS["streets"]).lr]
    for wrong, said in ((dict(chosen=known[1:]), "has not had its three trials"), (dict(steps=9), "has not had its three trials"),
                        (dict(pairs=("cartoon",)), "on cartoon"), (dict(tables=("figure5",)), "point of a figure")):
        with pytest.raises(ValueError, match=said):
            planned(**{"tables": ("1",), "chosen": known, **wrong})


def test_rows_of_two_profiles_do_not_mix():
    both = [a_record(row_settings(Row("cr_al"), PAIRS["streets"], p)) for p in ("quick", "paper")]
    with pytest.raises(ValueError, match="of_profile"):
        row_records(both, Row("cr_al"), PAIRS["streets"])
    for p in ("quick", "paper"):
        assert [r["settings"]["profile"] for r in row_records(of_profile(both, p), Row("cr_al"), PAIRS["streets"])] == [p]


def test_a_run_that_stands_twice_is_refused():
    twice = [a_record(row_settings(Row("cr_al"), PAIRS["streets"]), miou) for miou in (40.0, 30.0)]
    with pytest.raises(ValueError, match="two records for row 'cr_al'"):
        row_scores(twice, [Row("cr_al")], PAIRS["streets"])


@pytest.mark.parametrize("line", ["1", "[]", '{"benchmark": 1}', "{"])
def test_a_line_that_is_no_record_is_named(line, tmp_path, capsys):
    (tmp_path / "r.jsonl").write_text(line + "\n")
    assert main(["experiments", "--records", str(tmp_path / "r.jsonl"), "--dry-run"]) == 2
    assert "line 1" in capsys.readouterr().err


@pytest.mark.parametrize("flags, said", [(("--budget", "-5"), "no number of seconds"), (("--seed", "3"), "unrecognized"),
                                         (("--data", "3"), "unrecognized")])
def test_flags_that_mean_nothing_are_refused(flags, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["experiments", "--records", str(tmp_path / "r.jsonl"), *flags])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("pair", PAIRS)
def test_profiles_know_every_row(pair):
    for profile in PROFILES:
        for row in {r for table in TABLES.values() for r in table}:
            assert isinstance(row_settings(row, PAIRS[pair], profile), Settings)


def test_photographs_are_not_squeezed():
    "CamVid's are 4:3."
    for pair, profile in ((p, n) for p in PAIRS.values() if p.target == "camvid" for n in PROFILES if n != "paper"):
        s = row_settings(Row("cr_al"), pair, profile)
        assert s.size == s.target_size and 4 * s.size[0] == 3 * s.size[1] and all(s.size[0] % p == 0 for p in s.patches[:2])
