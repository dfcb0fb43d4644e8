"""Whole runs: every method, what they share, bad input that is named before training, real photographs."""
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from few import PAIR, few
from PIL import Image

from mlan.co_regularized_al import map_weight, turned
from mlan.command_line import main
from mlan.evaluation import evaluate
from mlan.files import read_rows
from mlan.lab import warm_up
from mlan.label_spaces import DataError
from mlan.methods import METHODS, make_setup
from mlan.objective import Supervised
from mlan.pairs import PairData, open_pair
from mlan.run_folder import load_pictures, load_segmenter, report_runs
from mlan.streets import Streets
from mlan.train import adapt, run_mlan


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


def run(method, out, stages=None, **changes):
    "The smallest run of a method."
    return adapt(*PAIR, method, out=out, stages=stages, progress=False, **few(method, **changes))


def opened(method="source_only", **changes):
    "The data of the smallest run."
    return open_pair(make_setup(*PAIR, method, **few(method, **changes)).settings)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_leaves_a_whole_folder(method, stages, tmp_path, request):
    if not (drawn := method == "mlan"):
        request.getfixturevalue("no_report")
    result = run(method, tmp_path / "run", stages)
    assert set(os.listdir(result.out)) == {"settings.json", "log.jsonl", "checkpoint.pt", "pictures.npz", "report.html",
                                           "result.json", *["pictures"] * drawn}
    assert 0 <= result.miou <= 100 and set(result.per_class) == set(result.record["classes"])
    net, about = load_segmenter(result.out / "checkpoint.pt")
    assert len(about["classes"]) == 19 and not net.training
    for key in ("settings", "seed", "commit", "versions", "device", "seconds", "peak_mib", "per_class", "matrix", "recipe", "seen"):
        assert key in result.record
    assert result.record["title"] == METHODS[method].title and result.record["method"] == method
    assert result.record["seen"] == {"source_only": "source", "rll": "source", "oracle": "truth"}.get(method, "target")


def test_methods_share_what_is_equal_by_definition(tmp_path, no_report):
    first, second = (run(method, tmp_path / method, tmp_path / "stages") for method in ("cr_al+rst", "cr_al+st"))
    tuned = ["pseudo_labels_0", "self_training_0", "pseudo_labels_1", "self_training_1"]
    assert list(first.record["cost"]) == ["regions", "warm_up", "align", "maps", *tuned]
    assert list(second.record["cost"]) == ["regions", "warm_up", "align", *tuned]
    for stage in ("regions", "warm_up", "align"):
        assert second.record["cost"][stage] == first.record["cost"][stage] is not None
    assert len(list((tmp_path / "stages").glob("align-*.pt"))) == len(list((tmp_path / "stages").glob("warm_up-*.pt"))) == 1
    alone = run("cr_al+st", tmp_path / "c")
    assert alone.record["matrix"] == second.record["matrix"]


def test_two_methods_in_one_folder_of_stages_end_as_each_alone(tmp_path, no_report):
    "The continuation after translation once got the network of the continuation without."
    both = METHODS["cr_al+continued"].recipe, replace(METHODS["cr_al+continued"].recipe, translate="fourier")
    given = dict(progress=False, **few("mlan", patches=(8, 16, 32)))
    ends = [adapt(*PAIR, recipe, out=tmp_path / str(k), stages=tmp_path / "stages", **given) for k, recipe in enumerate(both)]
    alone = adapt(*PAIR, both[1], out=tmp_path / "alone", **given)
    nets = [torch.load(r.out / "checkpoint.pt", weights_only=True)["segmenter"]["classifier.branches.0.weight"] for r in (*ends, alone)]
    assert torch.equal(nets[1], nets[2]) and not torch.equal(nets[0], nets[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the peak is that of the process")
def test_peak_memory_is_a_runs_own_and_not_that_of_the_process(stages, tmp_path, no_report):
    large = np.ones(10 ** 8)                                         # 800 MB that are gone before the run begins
    assert large.sum() > 0
    del large
    peak = run("source_only", tmp_path / "run", stages).record["peak_mib"]
    now = next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmRSS"))
    assert now / 2 < peak < now + 600


def test_turned_maps_have_the_same_values_and_the_opposite_order():
    "Image by image as a weight of a game; over all images at once for RST."
    maps = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    other = map_weight(maps, "turned") * maps.mean()
    for one, its in zip(maps.flatten(1), other.flatten(1)):
        torch.testing.assert_close(its.sort()[0], one.sort()[0])
        assert torch.equal(its.argsort().flip(0), one.argsort())
    everywhere = turned(maps.flatten())
    assert torch.equal(everywhere.argsort().flip(0), maps.flatten().argsort()) and torch.equal(turned(everywhere), maps.flatten())


def test_a_run_that_goes_on_does_not_read_all_files_again(tmp_path, monkeypatch):
    import mlan.pairs
    reads, check = [], mlan.pairs.check_dataset
    monkeypatch.setattr(mlan.pairs, "check_dataset", lambda ds: reads.append(ds) or check(ds))
    root = _folder(tmp_path / "set")
    args = make_setup(f"folder:{root}", PAIR[1], "source_only", **few("source_only")).settings
    notes = [open_pair(args, stages=tmp_path / "stages").notes for _ in range(2)]
    assert len(reads) == 4 and notes[0] == notes[1] != ()
    Image.fromarray(np.zeros((36, 64), np.uint8)).save(root / "labels" / "000.png")
    open_pair(args, stages=tmp_path / "stages")
    assert len(reads) == 8


def test_maps_in_pictures_are_those_of_the_network_that_was_aligned(stages, tmp_path, no_report):
    aligned, tuned = (run(method, tmp_path / method, stages) for method in ("cr_al", "cr_al+st"))
    pairs = zip(load_pictures(aligned.out / "pictures.npz"), load_pictures(tuned.out / "pictures.npz"), strict=True)
    for a, b in pairs:
        assert all(np.array_equal(a.maps[k], b.maps[k]) for k in a.maps) and a.maps
    assert aligned.record["matrix"] != tuned.record["matrix"]


def test_a_device_that_is_not_there_is_named_and_leaves_the_folder_free(tmp_path, capsys):
    for device in ("gpu", "cuda:99"):
        assert main(["run", "--source", PAIR[0], "--target", PAIR[1], "--out", str(tmp_path / "run"), "--device", device]) == 2
        assert f"device '{device}' cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class AllRoad(Streets):
    "Scenes in which everything is called road."
    def labels(self, i):
        return super().labels(i) * 0


def test_validation_looks_at_val_and_the_result_at_test(tmp_path, no_report):
    "On a val split whose labels are others than test's: in the log, at the end, and in the record."
    target = {"train": Streets("camera", "train", (32, 64), 16), "val": AllRoad("camera", "val", (32, 64), 4),
              "test": Streets("camera", "test", (32, 64), 4)}
    result = adapt(PAIR[0], target, "source_only", out=tmp_path / "run", progress=False, **few("source_only"))
    net, about = load_segmenter(result.out / "checkpoint.pt")
    scores = {split: evaluate(net, target[split], np.append(np.arange(19), [255] * 237).astype(np.uint8), about["classes"], (32, 64))
              for split in ("val", "test")}
    logged = [row["miou_val"] for row in read_rows(result.out / "log.jsonl") if row["stage"] == "align" and "miou_val" in row]
    assert result.miou == pytest.approx(scores["test"].miou) != pytest.approx(scores["val"].miou)
    assert result.record["miou_val"] == pytest.approx(scores["val"].miou) == logged[-1]
    assert sum(np.array(result.record["matrix"]).sum(1) > 0) > 5   # rows of the test split's classes


def test_target_labels_are_not_loaded():
    data = opened()
    assert isinstance(data, PairData)
    assert (data.target.batch(np.arange(4))[1] == 255).all() and (data.source.batch(np.arange(4))[1] != 255).any()


def test_oracle_trains_on_target_images_and_labels():
    data = opened("oracle", size=(48, 64))
    truth, target, one = data.view("truth"), data.view("target"), np.array([0])
    assert truth.samples.size == (32, 64)                         # the target's, at which it is scored
    assert torch.equal(truth.batch(one)[0], target.batch(one)[0])
    assert (truth.batch(one)[1] != 255).any() and (target.batch(one)[1] == 255).all()


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
    every = few("source_only", n_source=0, n_target=0, n_val=0, n_test=0)
    result = run_mlan(f"folder:{source}", f"folder:{photos}", "source_only", out=tmp_path / "run", progress=False, **every)
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
        run_mlan(f"folder:{root}", "streets:camera", "cr_al", out=tmp_path / "run", progress=False, **few("cr_al"))
    assert str(error.value).count("\n") == 0
    assert not (tmp_path / "run").exists()


def test_unlabelled_source_is_refused(tmp_path):
    root = _folder(tmp_path / "set", labels=False)
    with pytest.raises(DataError, match=f"folder:{root} has no labels to train on"):
        run_mlan(f"folder:{root}", "streets:camera", "cr_al", out=tmp_path / "run", progress=False, **few("cr_al"))
    with pytest.raises(DataError, match=f"folder:{root} has no labels to train on"):
        run_mlan("streets:engine", f"folder:{root}", "oracle", out=tmp_path / "run", progress=False, **few("oracle"))


def test_data_that_changed_after_a_run_is_not_answered_with_the_old_result(tmp_path, no_report):
    root = _folder(tmp_path / "set")
    args = dict(out=tmp_path / "run", progress=False, **few("source_only", warmup_steps=1, steps=1, schedule_steps=1))
    first = run_mlan(f"folder:{root}", "streets:camera", "source_only", **args)
    assert run_mlan(f"folder:{root}", "streets:camera", "source_only", **args).record == first.record
    Image.fromarray(np.zeros((36, 64), np.uint8)).save(root / "labels" / "000.png")
    with pytest.raises(ValueError, match="the data has changed since the run"):
        run_mlan(f"folder:{root}", "streets:camera", "source_only", **args)


def test_report_on_runs_of_different_pairs_is_refused(stages, tmp_path, no_report):
    a = run("source_only", tmp_path / "a", stages)
    b = run_mlan("streets:cartoon", "streets:camera", "source_only", out=tmp_path / "b", progress=False, **few("source_only"))
    assert len(b.record["classes"]) == 16 and "miou_13" in b.record
    with pytest.raises(ValueError, match="different data"):
        report_runs([a.out, b.out], tmp_path / "r.html")
    with pytest.raises(ValueError, match="two runs of one method"):
        report_runs([a.out, a.out], tmp_path / "r.html")


def test_checkpoints_that_are_torn_or_foreign_are_refused(stages, tmp_path, no_report):
    result = run("source_only", tmp_path / "a", stages)
    torn = tmp_path / "torn.pt"
    torn.write_bytes((result.out / "checkpoint.pt").read_bytes()[:5000])
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    for path in (torn, tmp_path / "foreign.pt"):
        with pytest.raises(ValueError, match=path.name):
            load_segmenter(path)


@pytest.mark.data
@pytest.mark.parametrize("source, n_classes", [("airsim_nh", 7), ("streets:engine", 11)])
def test_real_photographs(source, n_classes, mlan_data, tmp_path, no_report):
    settings = few("cr_al", size=(48, 64), target_size=(48, 64), n_source=60)
    result = run_mlan(source, "camvid", "cr_al", out=tmp_path / "run", progress=False, **settings)
    assert len(result.record["classes"]) == n_classes
    assert np.array(result.record["matrix"]).sum() > 0.8 * 4 * 360 * 480          # scored at the labels' own size


def test_a_finished_run_is_believed_only_of_the_same_recipe(tmp_path, no_report):
    def recipes(steps):
        def mine(lab):
            return lab.train("mine", Supervised, warm_up(lab), lab.source, steps=steps)
        return mine

    given = dict(out=tmp_path, progress=False, **few("source_only"))
    first, same, other = (adapt(*PAIR, recipes(steps), **given).record for steps in (2, 2, 4))
    assert first == same and other["settings"] == first["settings"] and other["recipe"] != first["recipe"]
    assert other["matrix"] != first["matrix"]
