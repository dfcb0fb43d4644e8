"""Whole runs: every method, resume after a kill, bad input that is named before training, real photographs."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from mlan.co_regularized_al import map_weight, turned
from mlan.command_line import main
from mlan.files import is_whole
from mlan.label_spaces import DataError
from mlan.networks import weights_digest
from mlan.pairs import PairData, open_pair
from mlan.stages import Run, walk
from mlan.train import load_pictures, load_segmenter, report_runs, run_mlan
from mlan.settings import PLANS, make_settings
from mlan.trainer import TrainingError, _keep, _restored

FEW = dict(size=(32, 64), target_size=(32, 64), n_source=40, n_target=16, n_val=4, n_test=4, min_samples=3, warmup_steps=6, steps=6,
           schedule_steps=6, ramp_steps=2, critic_width=4, batch_size=3, translation_steps=3, translation_width=4, translation_batch=2,
           self_training_steps=4, portions=(0.4, 0.5), log_every=2, val_every=6, checkpoint_every=2, device="cpu")
PAIR = ("streets:engine", "streets:camera")


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.mark.parametrize("method", PLANS)
def test_every_method_runs_and_leaves_a_whole_folder(method, stages, tmp_path):
    result = run_mlan(*PAIR, method, out=tmp_path / "run", stages=stages, progress=False, **FEW)
    assert set(os.listdir(result.out)) == {"settings.json", "log.jsonl", "checkpoint.pt", "pictures.npz", "report.html",
                                           "pictures", "result.json"}
    assert 0 <= result.miou <= 100 and set(result.per_class) == set(result.record["classes"])
    net, about = load_segmenter(result.out / "checkpoint.pt")
    assert len(about["classes"]) == 19 and not net.training
    for key in ("settings", "seed", "commit", "versions", "device", "seconds", "peak_mib", "per_class", "matrix"):
        assert key in result.record


def test_methods_share_what_is_equal_by_definition(tmp_path):
    shared = dict(stages=tmp_path / "stages", progress=False, **FEW)
    first = run_mlan(*PAIR, "cr_al+rst", out=tmp_path / "a", **shared)
    second = run_mlan(*PAIR, "cr_al+st", out=tmp_path / "b", **shared)
    assert set(first.record["cost"]) == {"regions", "warm_up", "align", "maps", "self_training"}
    assert set(second.record["cost"]) == {"regions", "warm_up", "align", "self_training"}
    for stage in ("regions", "warm_up", "align"):
        assert second.record["cost"][stage] == first.record["cost"][stage] > 0
    assert len(list((tmp_path / "stages").glob("align-*.pt"))) == len(list((tmp_path / "stages").glob("warm_up-*.pt"))) == 1
    alone = run_mlan(*PAIR, "cr_al+st", out=tmp_path / "c", progress=False, **FEW)
    assert alone.record["matrix"] == second.record["matrix"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the peak is that of the process")
def test_peak_memory_is_a_runs_own_and_not_that_of_the_process(stages, tmp_path):
    large = np.ones(10 ** 8)                                         # 800 MB that are gone before the run begins
    assert large.sum() > 0
    del large
    few = run_mlan(*PAIR, "source_only", out=tmp_path / "run", stages=stages, progress=False, **FEW).record["peak_mib"]
    now = next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmRSS"))
    assert now / 2 < few < now + 600


def test_only_regularized_self_training_hears_of_its_reading(tmp_path):
    "R12: three rules, three outcomes of RST, one of ST."
    used, shares = {}, {}
    for method in ("cr_al+rst", "cr_al+st"):
        data = open_pair(make_settings(*PAIR, method, **FEW))
        for reading in ("portion", "threshold", "turned"):
            run = Run(make_settings(*PAIR, method, **FEW, rst_reading=reading), data, tmp_path)
            net = walk(run)
            used.setdefault(method, []).append(run.used["self_training"].name)
            shares[method, reading] = [r["coverage"] for r in run.facts["self_training"]]
            assert all(p.isfinite().all() for p in net.parameters())
    assert len({*used["cr_al+rst"]}) == 3 and len({*used["cr_al+st"]}) == 1
    assert shares["cr_al+rst", "threshold"] != shares["cr_al+rst", "portion"]


def test_turned_maps_have_the_same_values_and_the_opposite_order():
    "Image by image as a weight of a game; over all images at once for RST."
    maps = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    other = map_weight(maps, "turned") * maps.mean()
    for one, its in zip(maps.flatten(1), other.flatten(1)):
        torch.testing.assert_close(its.sort()[0], one.sort()[0])
        assert torch.equal(its.argsort().flip(0), one.argsort())
    everywhere = turned(maps.flatten())
    assert torch.equal(everywhere.argsort().flip(0), maps.flatten().argsort()) and torch.equal(turned(everywhere), maps.flatten())


@pytest.mark.parametrize("setting, stage", [("lr", "align"), ("lambda_ent", "align"), ("warmup_lr", "warm_up"), ("n_relations", "regions"),
                                            ("seed", "warm_up"), ("map_weights", "align"), ("map_placement", "align"),
                                            ("self_training_lr", "self_training")])
def test_a_setting_that_matters_makes_a_new_stage(setting, stage, tmp_path):
    value = {"n_relations": 5, "seed": 3, "map_weights": "shuffled", "map_placement": "own"}.get(setting, 0.0123)
    data = open_pair(make_settings(*PAIR, "cr_al+st", **FEW))
    keys = []
    for change in ({}, {setting: value}):
        run = Run(make_settings(*PAIR, "cr_al+st", **{**FEW, **change}), data, tmp_path)
        walk(run)
        keys.append(run.used[stage].name)
    assert keys[0] != keys[1]


def weights_of(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["segmenter"]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_times_ends_as_the_undisturbed_one(kills, tmp_path):
    settings = {**FEW, "warmup_steps": 12, "steps": 12, "schedule_steps": 12, "map_weights": "shuffled"}
    code = (f"import torch; torch.set_num_threads({torch.get_num_threads()}); from mlan.train import run_mlan; print('go', flush=True); "
            f"run_mlan(*{PAIR}, 'mlan', out=r'{tmp_path / 'killed'}', progress=False, **{settings})")
    began = time.time()
    whole = run_mlan(*PAIR, "mlan", out=tmp_path / "whole", progress=False, **settings)
    usual, done = time.time() - began, []
    random = np.random.default_rng()
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        process.stdout.readline()                                 # imports are done, the run begins
        time.sleep(random.uniform(0, 1.5 * usual / kills))       # each kill leaves a little more behind, on average
        process.send_signal(signal.SIGKILL)
        process.wait()
        done.append(len([p for p in (tmp_path / "killed").rglob("*") if p.suffix in (".pt", ".npz")]))
    subprocess.run([sys.executable, "-c", code], check=True)
    record = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert record["matrix"] == whole.record["matrix"], done
    killed, undisturbed = (weights_of(tmp_path / k) for k in ("killed", "whole"))
    assert all(torch.equal(killed[name], undisturbed[name]) for name in undisturbed), done
    assert not list((tmp_path / "killed").rglob("*.part"))


@pytest.mark.parametrize("tear", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b[:4000] + bytes([b[4000] ^ 1]) + b[4001:],
                                  lambda b: b"not a checkpoint"])
def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(tear, tmp_path, monkeypatch):
    import mlan.stages
    settings = make_settings(*PAIR, "cr_al", **{**FEW, "steps": 8, "schedule_steps": 8, "map_weights": "shuffled"})
    data, calls = open_pair(settings), []
    whole = walk(Run(settings, data, tmp_path / "a"))
    step = mlan.stages.SegmentationStep.__call__

    def stops(self, i):
        if self.alignment and i == 7 and 7 not in calls:
            calls.append(i)
            raise KeyboardInterrupt
        if self.alignment:
            calls.append(i)
        return step(self, i)

    monkeypatch.setattr(mlan.stages.SegmentationStep, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        walk(Run(settings, data, tmp_path / "b"))
    newer, = (tmp_path / "b").glob("align-*.partial.pt")
    newer.write_bytes(tear(newer.read_bytes()))
    del calls[:-1]
    with pytest.warns(UserWarning, match=f"{newer.name} cannot be used"):
        again = walk(Run(settings, data, tmp_path / "b"))
    assert calls == [7, 4, 5, 6, 7]                               # from step 4's checkpoint, not from step 6's
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))


def test_no_damage_to_a_file_is_an_error_of_its_own(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "a.npz"
    np.savez_compressed(path, **{f"a{i}": rng.integers(0, 5, 300, dtype=np.uint8) for i in range(4)})
    torch.save({"w": torch.rand(50)}, tmp_path / "b.pt")
    for file in (path, tmp_path / "b.pt"):
        whole = file.read_bytes()
        assert is_whole(file)
        for place in rng.integers(0, len(whole), 300):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << int(rng.integers(8)))]) + whole[place + 1:])
            assert is_whole(file) in (True, False)               # a bit that nobody reads may pass; nothing may raise
    torch.save(torch.rand(3), tmp_path / "foreign.pt")
    with pytest.warns(UserWarning, match="foreign.pt cannot be used"):
        assert _restored({"net": torch.nn.Linear(1, 1)}, tmp_path / "foreign.pt") is None


def test_a_kill_while_a_checkpoint_is_written_leaves_a_good_one(tmp_path, monkeypatch):
    import mlan.trainer
    net, file = torch.nn.Linear(1, 1), tmp_path / "a.partial.pt"
    for step in (5, 10):
        _keep({"net": net}, step, file)
    file.write_bytes(file.read_bytes()[:300])                     # the newer one is torn
    with pytest.warns(UserWarning):
        assert _restored({"net": net}, file) is None

    def dies(value, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(mlan.trainer, "save_whole", dies)
    with pytest.raises(KeyboardInterrupt):
        _keep({"net": net}, 15, file)
    assert _restored({"net": net}, file.with_suffix(".before.pt")) == 5


def test_what_a_kill_leaves_beside_a_stage_does_no_harm(tmp_path):
    settings = make_settings(*PAIR, "cr_al+it", **FEW)
    data = open_pair(settings)
    first = Run(settings, data, tmp_path)
    whole = walk(first)
    aligned = first.used["align_translated"]
    for name in (f"{aligned.name}.7.part", f"{aligned.stem}.partial.pt.7.part", f"{aligned.stem}.jsonl.7.part"):
        (tmp_path / name).write_bytes(b"half")
    first.used["warm_up"].with_name(first.used["warm_up"].name + ".seconds").write_text("")
    first.used["translation"].with_suffix(".npy").write_bytes(b"half")
    aligned.unlink()
    second = Run(settings, data, tmp_path)
    again = walk(second)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    assert not list(tmp_path.glob("*part")) and second.cost["warm_up"] is None and second.cost["align_translated"] > 0


def test_weights_are_known_by_their_content(tmp_path):
    for name, content in (("a.pth", b"1"), ("b.pth", b"1"), ("c.pth", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (weights_digest(str(tmp_path / f"{k}.pth")) for k in "abc")
    assert a == b != c and weights_digest(f"caffe:{tmp_path / 'a.pth'}") != a and weights_digest("imagenet") == "imagenet"
    with pytest.raises(FileNotFoundError, match="give 'none', 'imagenet', an existing file, or STYLE:FILE with a style of"):
        weights_digest(str(tmp_path / "d.pth"))


def test_a_run_that_goes_on_does_not_read_all_files_again(tmp_path, monkeypatch):
    import mlan.pairs
    reads, check = [], mlan.pairs.check_dataset
    monkeypatch.setattr(mlan.pairs, "check_dataset", lambda ds: reads.append(ds) or check(ds))
    root = _folder(tmp_path / "set")
    args = make_settings(f"folder:{root}", "streets:camera", "source_only", **FEW)
    notes = [open_pair(args, stages=tmp_path / "stages").notes for _ in range(2)]
    assert len(reads) == 4 and notes[0] == notes[1] != ()
    Image.fromarray(np.zeros((36, 64), np.uint8)).save(root / "labels" / "000.png")
    open_pair(args, stages=tmp_path / "stages")
    assert len(reads) == 8


def test_interrupted_inside_a_stage_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    settings = make_settings(*PAIR, "cr_al", **{**FEW, "steps": 8, "schedule_steps": 8, "map_weights": "shuffled"})
    data = open_pair(settings)
    whole = walk(Run(settings, data, tmp_path / "a"))
    import mlan.stages
    calls, stopped = [], []
    step = mlan.stages.SegmentationStep.__call__

    def stops(self, i):
        calls.append(i)
        if self.alignment and i == 5 and not stopped:
            stopped.append(i)
            raise KeyboardInterrupt
        return step(self, i)

    monkeypatch.setattr(mlan.stages.SegmentationStep, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        walk(Run(settings, data, tmp_path / "b"))
    assert list((tmp_path / "b").glob("align-*.partial.pt"))
    calls.clear()
    torch.manual_seed(12345)                                      # another random state: the checkpoint's must win
    run = Run(settings, data, tmp_path / "b")
    again = walk(run)
    assert calls == [4, 5, 6, 7]
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values()))
    assert [r["step"] for r in run.logs if r["stage"] == "align"] == [2, 4, 6, 8]


def test_nan_stops_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    import mlan.trainer
    seen, loss = [], mlan.trainer.segmentation_loss

    def breaks(*args):
        seen.append(1)
        return loss(*args) * (float("nan") if len(seen) == FEW["warmup_steps"] + 5 else 1)

    monkeypatch.setattr(mlan.trainer, "segmentation_loss", breaks)
    with pytest.raises(TrainingError, match=r"loss/seg is not finite at step 5; the checkpoint before it is"):
        run_mlan(*PAIR, "source_only", out=tmp_path / "run", progress=False, **FEW)
    kept, = (tmp_path / "run" / "stages").glob("align-*.partial.pt")
    state = torch.load(kept, weights_only=True)
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["parts"]["net"].values())
    assert not (tmp_path / "run" / "result.json").exists()


def test_weights_that_break_after_a_finite_loss_are_not_kept(tmp_path, monkeypatch):
    import mlan.trainer
    descend = mlan.trainer.descend

    def breaks(optimiser, *args):
        descend(optimiser, *args)
        with torch.no_grad():
            optimiser.param_groups[0]["params"][0].fill_(float("inf"))

    monkeypatch.setattr(mlan.trainer, "descend", breaks)
    few = {**FEW, "checkpoint_every": 1, "log_every": 1}
    with pytest.raises(TrainingError, match="the weights of net are not finite after step 1"):
        run_mlan(*PAIR, "source_only", out=tmp_path / "run", progress=False, **few)
    assert not list((tmp_path / "run" / "stages").glob("*.pt"))


def test_two_processes_share_a_stage_that_neither_has_made(tmp_path):
    code = (f"import sys, torch; torch.set_num_threads({torch.get_num_threads()}); from mlan.train import run_mlan; "
            f"run_mlan(*{PAIR}, sys.argv[1], out=sys.argv[2], stages=r'{tmp_path / 'stages'}', progress=False, **{FEW})")
    methods = ("rl_al", "il_al")
    both = [subprocess.Popen([sys.executable, "-c", code, m, str(tmp_path / m)]) for m in methods]
    assert [p.wait() for p in both] == [0, 0]
    log, = (tmp_path / "stages").glob("warm_up-*.jsonl")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [2, 4, 6]
    alone = run_mlan(*PAIR, "il_al", out=tmp_path / "alone", progress=False, **FEW)
    assert alone.record["matrix"] == json.loads((tmp_path / "il_al" / "result.json").read_text())["matrix"]


def test_maps_in_pictures_are_those_of_the_network_that_was_aligned(stages, tmp_path):
    aligned, tuned = (run_mlan(*PAIR, m, out=tmp_path / m, stages=stages, progress=False, **FEW) for m in ("cr_al", "cr_al+st"))
    pairs = zip(load_pictures(aligned.out / "pictures.npz"), load_pictures(tuned.out / "pictures.npz"), strict=True)
    for a, b in pairs:
        assert all(np.array_equal(a.maps[k], b.maps[k]) for k in a.maps) and a.maps
    assert aligned.record["matrix"] != tuned.record["matrix"]


def test_a_device_that_is_not_there_is_named_and_leaves_the_folder_free(tmp_path, capsys):
    for device in ("gpu", "cuda:99"):
        assert main(["run", "--source", PAIR[0], "--target", PAIR[1], "--out", str(tmp_path / "run"), "--device", device]) == 2
        assert f"device '{device}' cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_target_labels_are_not_loaded():
    data = open_pair(make_settings(*PAIR, "cr_al", **FEW))
    assert isinstance(data, PairData)
    assert (data.target.batch(np.arange(4))[1] == 255).all() and (data.source.batch(np.arange(4))[1] != 255).any()


def test_oracle_trains_on_target_images_and_labels():
    data = open_pair(make_settings(*PAIR, "oracle", **{**FEW, "size": (48, 64)}))
    assert data.source.size == (32, 64)                           # the target's, at which it is scored
    assert torch.equal(data.source.batch([0])[0], data.target.batch([0])[0])
    assert (data.source.batch([0])[1] != 255).any()


def _folder(root, n=12, size=(36, 64), labels=True):
    rng = np.random.default_rng(0)
    for part in ("images", "labels")[: 1 + labels]:
        (root / part).mkdir(parents=True)
    for i in range(n):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(root / "images" / f"{i:03}.png")
        if labels:
            rows = np.repeat(np.arange(4, dtype=np.uint8), size[0] // 4)
            Image.fromarray(rows[:, None].repeat(size[1], 1)).save(root / "labels" / f"{i:03}.png")
    return root


def test_own_folders_with_unlabelled_photographs(tmp_path):
    source, photos = _folder(tmp_path / "synthetic"), _folder(tmp_path / "photos", labels=False)
    settings = {**FEW, "n_source": 0, "n_target": 0, "n_val": 0, "n_test": 0, "min_samples": 2}
    result = run_mlan(f"folder:{source}", f"folder:{photos}", "source_only", out=tmp_path / "run", progress=False, **settings)
    assert result.miou is None and (result.out / "report.html").exists() and len(load_pictures(result.out / "pictures.npz")) == 4
    weights = str(result.out / "checkpoint.pt")
    assert main(["predict", "--checkpoint", weights, "--images", str(photos / "images"), "--out", str(tmp_path / "p")]) == 0
    assert np.array(Image.open(tmp_path / "p" / "ids" / "000.png")).shape == (36, 64)


@pytest.mark.parametrize("break_it, words", [
    (lambda root: (root / "labels" / "003.png").unlink(), "003.png"),
    (lambda root: (root / "images" / "003.png").write_bytes(b"no picture"), "003.png"),
    (lambda root: (root / "images" / "003.png").write_bytes((root / "images" / "003.png").read_bytes()[:300]), "003.png"),
    (lambda root: Image.fromarray(np.full((36, 64), 77, np.uint8)).save(root / "labels" / "003.png"), "77"),
    (lambda root: Image.fromarray(np.zeros((10, 64), np.uint8)).save(root / "labels" / "003.png"), "make them alike"),
])
def test_broken_data_stops_a_run_before_its_first_step(break_it, words, tmp_path):
    root = _folder(tmp_path / "set")
    break_it(root)
    with pytest.raises(DataError, match=words) as error:
        run_mlan(f"folder:{root}", "streets:camera", "cr_al", out=tmp_path / "run", progress=False, **FEW)
    assert str(error.value).count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_unlabelled_source_is_refused(tmp_path):
    root = _folder(tmp_path / "set", labels=False)
    with pytest.raises(DataError, match=f"folder:{root} has no labels to train on"):
        run_mlan(f"folder:{root}", "streets:camera", out=tmp_path / "run", progress=False, **FEW)
    with pytest.raises(DataError, match=f"folder:{root} has no labels to train on"):
        run_mlan("streets:engine", f"folder:{root}", "oracle", out=tmp_path / "run", progress=False, **FEW)


def test_data_that_changed_after_a_run_is_not_answered_with_the_old_result(tmp_path):
    root = _folder(tmp_path / "set")
    args = dict(out=tmp_path / "run", progress=False, **{**FEW, "warmup_steps": 1, "steps": 1, "schedule_steps": 1})
    first = run_mlan(f"folder:{root}", "streets:camera", "source_only", **args)
    assert run_mlan(f"folder:{root}", "streets:camera", "source_only", **args).record == first.record
    Image.fromarray(np.zeros((36, 64), np.uint8)).save(root / "labels" / "000.png")
    with pytest.raises(ValueError, match="the data has changed since the run"):
        run_mlan(f"folder:{root}", "streets:camera", "source_only", **args)


def test_report_on_runs_of_different_pairs_is_refused(stages, tmp_path):
    a = run_mlan(*PAIR, "source_only", out=tmp_path / "a", stages=stages, progress=False, **FEW)
    b = run_mlan("streets:cartoon", "streets:camera", "source_only", out=tmp_path / "b", progress=False, **FEW)
    assert len(b.record["classes"]) == 16 and "miou_13" in b.record
    with pytest.raises(ValueError, match="different data"):
        report_runs([a.out, b.out], tmp_path / "r.html")
    with pytest.raises(ValueError, match="two runs of one method"):
        report_runs([a.out, a.out], tmp_path / "r.html")


def test_checkpoints_that_are_torn_or_foreign_are_refused(stages, tmp_path):
    result = run_mlan(*PAIR, "source_only", out=tmp_path / "a", stages=stages, progress=False, **FEW)
    torn = tmp_path / "torn.pt"
    torn.write_bytes((result.out / "checkpoint.pt").read_bytes()[:5000])
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    for path in (torn, tmp_path / "foreign.pt"):
        with pytest.raises(ValueError, match=path.name):
            load_segmenter(path)


@pytest.mark.data
@pytest.mark.parametrize("source, n_classes", [("airsim_nh", 7), ("streets:engine", 11)])
def test_real_photographs(source, n_classes, mlan_data, tmp_path):
    settings = {**FEW, "size": (48, 64), "target_size": (48, 64), "n_source": 60}
    result = run_mlan(source, "camvid", "cr_al", out=tmp_path / "run", progress=False, **settings)
    assert len(result.record["classes"]) == n_classes
    assert np.array(result.record["matrix"]).sum() > 0.8 * 4 * 360 * 480          # scored at the labels' own size
