"The check, samples and streams: against scikit-image, broken trees, and the real CamVid and AirSim where they are at hand."

import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Script
from PIL import Image
from skimage.transform import resize as skimage_resize
from trees import pairs_of, write_cityscapes, write_gta5, write_tree

from mlan import folders, samples
from mlan.checks import check_dataset
from mlan.folders import PairedFolder
from mlan.label_spaces import AIRSIM_NH, CAMVID, CITYSCAPES, IGNORE, DataError, shared_classes
from mlan.layouts import Prepared, open_dataset
from mlan.samples import Loader, Samples, Stream, prepare
from mlan.streets import Streets

SPLITS = ("train", "val", "test")
ROOT = Path(__file__).parent.parent


# The check


def test_check_names_the_file_and_the_values(tmp_path):
    write_tree(tmp_path, 6)
    labels = tmp_path / "labels" / "004.png"
    ids = np.full((12, 20), 3, np.uint8)
    ids[0, :2] = 40, 33
    Image.fromarray(ids).save(labels)
    with pytest.raises(DataError, match=r"004.* hold \[33, 40\]"):
        check_dataset(pairs_of(tmp_path))
    Image.fromarray(ids[:, ::2]).save(labels)
    with pytest.raises(DataError, match=r"004.*\(12, 20\).*\(12, 10\)"):
        check_dataset(pairs_of(tmp_path))
    labels.write_bytes(labels.read_bytes()[:50])
    with pytest.raises(DataError, match="Cannot read .*labels/004.png"):
        check_dataset(pairs_of(tmp_path))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.9])
def test_truncated_images_are_named(tmp_path, suffix, kept):
    path = write_tree(tmp_path, 3, suffix=suffix, size=(40, 60)) / "images" / f"002{suffix}"
    path.write_bytes(path.read_bytes()[: int(kept * (path.stat().st_size if kept < 1 else 1))])
    with pytest.raises(DataError, match=f"002{suffix}.*replace"):
        check_dataset(pairs_of(tmp_path))


def test_check_lists_all_that_is_wrong_with_sizes(tmp_path):
    ds = pairs_of(write_tree(tmp_path, 150))
    for i in range(0, 130, 10):
        Image.new("L", (19, 12)).save(tmp_path / "labels" / f"{i:03d}.png")
    with pytest.raises(DataError) as caught:
        check_dataset(ds, decode=1)
    said = str(caught.value).splitlines()
    assert said[0] == "13 of 150 pairs can't be trained on:" and said[-1] == "  and 3 more" and len(said) == 12
    assert "000.png is (12, 20) and its labels (12, 19)" in said[1]


def test_check_gives_up_a_hopeless_set_early(tmp_path, monkeypatch):
    ds = pairs_of(write_tree(tmp_path, 200))
    for i in range(200):
        Image.new("RGB", (20, 12)).save(tmp_path / "labels" / f"{i:03d}.png")
    read = []
    monkeypatch.setattr(folders, "read_image", lambda path: read.append(path) or np.zeros((12, 20, 3), np.uint8))
    with pytest.raises(DataError, match=r"64 of 64 pairs can't be trained on \(136 more were not read\)"):
        check_dataset(ds)
    assert len(read) == 64


def test_check_of_a_sample_still_sees_every_file(tmp_path, monkeypatch):
    ds, read = pairs_of(write_tree(tmp_path, 100)), []
    real = folders.read_image
    monkeypatch.setattr(folders, "read_image", lambda path: read.append(path.stem) or real(path))
    found = check_dataset(ds, decode=4)
    assert sorted(read) == ["000", "025", "050", "075"] and found["checked"] == 4 and found["sizes"] == {"12x20": 100}
    assert not found["warnings"], "a class may well be absent from four pairs"
    (tmp_path / "images" / "033.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match="Cannot read .*033.png"):
        check_dataset(ds, decode=4)
    assert check_dataset(pairs_of(write_tree(tmp_path / "few", 3)), decode=500)["checked"] == 3
    with pytest.raises(DataError, match="decode=0"):
        check_dataset(ds, decode=0)


def test_check_turns_sizes_as_it_turns_images(tmp_path):
    write_tree(tmp_path, 2, suffix=".jpg")
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (12, 20)).save(tmp_path / "images" / "000.jpg", exif=exif)
    assert check_dataset(pairs_of(tmp_path))["sizes"] == {"12x20": 2}
    Image.new("RGB", (12, 20)).save(tmp_path / "images" / "000.png", exif=exif)
    (tmp_path / "images" / "000.jpg").unlink()
    assert check_dataset(pairs_of(tmp_path))["sizes"] == {"12x20": 2}


def test_check_sees_files_that_went_missing_later(tmp_path):
    ds = pairs_of(write_tree(tmp_path, 3))
    (tmp_path / "images" / "001.png").unlink()
    with pytest.raises(DataError, match="001.png"):
        check_dataset(ds)


def test_check_reports_shares_sizes_and_warnings(tmp_path):
    write_tree(tmp_path, 19)
    Image.new("RGB", (30, 12)).save(tmp_path / "images" / "000.png")
    Image.new("L", (30, 12), IGNORE).save(tmp_path / "labels" / "000.png")
    found = check_dataset(pairs_of(tmp_path), shared_classes(CITYSCAPES, CAMVID).source_lut)
    assert found["sizes"] == {"12x20": 18, "12x30": 1} and found["n"] == 19
    assert found["scored"] == pytest.approx(1 - found["ignored"]) and found["warnings"] == ["No pixel of road."]
    assert found["ignored"] == pytest.approx((18 + 12 * 30) / (18 * 240 + 12 * 30))
    assert check_dataset(pairs_of(tmp_path), decode=1)["checked"] == 1
    bare = PairedFolder(tmp_path / "images", None, CITYSCAPES)
    assert check_dataset(bare)["labelled"] is False and check_dataset(bare)["warnings"] == []


class Held:
    "A data set of arrays in memory: the least that one can be."
    space, labelled = CITYSCAPES, True

    def __init__(self, images, labels):
        self.images, self.maps = images, labels

    def __len__(self): return len(self.images)
    def name(self, i): return f"held {i}"
    def image(self, i): return self.images[i]
    def labels(self, i): return self.maps[i]
    def fingerprint(self): return "held"


def test_any_object_will_do_and_is_checked_too():
    image, labels = np.zeros((6, 8, 3), np.uint8), np.zeros((6, 8), np.uint8)
    assert check_dataset(open_dataset(Held([image], [labels])))["classes"]["road"] == 1
    with pytest.raises(DataError, match="held 0 is float64"):
        check_dataset(Held([image / 255], [labels]))
    with pytest.raises(DataError, match="held 0 are int64"):
        check_dataset(Held([image], [labels.astype(np.int64)]))
    with pytest.raises(DataError, match=r"\(8, 6\)"):
        check_dataset(Held([image], [labels.T]))
    with pytest.raises(DataError, match="empty"):
        check_dataset(Held([], []))


# Samples


def test_samples_keep_axes_apart():
    "A bright left half and a road there: at (rows, columns) of another aspect they are still on the left."
    image, labels = np.zeros((20, 60, 3), np.uint8), np.full((20, 60), 10, np.uint8)
    image[:, :30], labels[:, :30] = 200, 0
    x, y = Samples(Held([image], [labels]), size=(24, 16))[0]
    assert x.shape == (3, 24, 16) and y.shape == (24, 16)
    assert (y[:, :8] == 0).all() and (y[:, 8:] == 10).all()
    assert (x[:, :, :7] == 200).all() and (x[:, :, 9:] == 0).all()


def test_batches_reach_from_0_to_1():
    image = np.zeros((4, 4, 3), np.uint8)
    image[:2] = 255
    images, _ = Samples(Held([image], [image[..., 0]]), (4, 4)).batch([0])
    assert images.unique().tolist() == [0, 1]


def test_images_are_antialiased_as_scikit_image_does():
    smooth = np.random.default_rng(0).random((6, 10, 3))
    image = (skimage_resize(smooth, (96, 160), order=1) * 255).astype(np.uint8)
    x, _ = Samples(Held([image], [np.zeros((96, 160), np.uint8)]), size=(24, 40))[0]
    means = image.reshape(24, 4, 40, 4, 3).mean(axis=(1, 3))
    assert np.abs(x.permute(1, 2, 0).numpy() - means).max() < 12
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2] = 255
    x, _ = Samples(Held([stripes], [stripes[..., 0]]), size=(8, 8), labelled=False)[0]
    assert (x.float() - 127.5).abs().max() < 25, "stripes of one pixel should turn grey, not alias"


@pytest.mark.parametrize("size", [(7, 9), (24, 40), (48, 80), (37, 61)])
def test_labels_are_picked_and_never_mixed(size):
    labels = np.random.default_rng(0).choice([0, 10, 18, IGNORE], (24, 40)).astype(np.uint8)
    ds = Held([np.zeros((24, 40, 3), np.uint8)], [labels])
    _, y = Samples(ds, size)[0]
    assert set(y.unique().tolist()) <= {0, 10, 18, IGNORE} and y.dtype == torch.int64
    rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, labels.shape))
    assert (y.numpy() == labels[np.ix_(rows, columns)]).all(), "not the pixel under the cell's centre"


def test_void_becomes_ignore_without_a_table_and_ids_stay():
    held = Held([np.zeros((2, 3, 3), np.uint8)], [np.array([[0, 5, 10], [11, 255, 1]], np.uint8)])
    held.space = CAMVID
    assert Samples(held, (2, 3))[0][1].tolist() == [[0, 5, 10], [IGNORE, IGNORE, 1]]


def test_the_target_gives_no_labels_away():
    class Guarded(Held):
        def labels(self, i): raise AssertionError("the target's labels were read")
    samples = Samples(Guarded([np.zeros((6, 8, 3), np.uint8)], [None]), (6, 8), labelled=False).load()
    assert (samples.batch([0])[1] == IGNORE).all() and not samples.labelled


def test_memory_processes_threads_and_no_memory_agree(tmp_path):
    streets = Streets("camera", n=5, size=(32, 64))
    tree = pairs_of(write_tree(tmp_path, 5))
    for ds in (streets, tree):
        ways = [Samples(ds, (16, 32)), Samples(ds, (16, 32)).load(), Samples(ds, (16, 32)).load(workers=2),
                Samples(ds, (16, 32), max_bytes=100).load(workers=2)]
        batches = [way.batch(np.array([4, 0, 0, 2])) for way in ways]
        for images, labels in batches:
            assert torch.equal(images, batches[0][0]) and torch.equal(labels, batches[0][1])
            assert images.dtype == torch.float32 and images.shape == (4, 3, 16, 32)
            assert 0 <= images.min() <= images.max() <= 1
        assert len(ways[2]._kept) == 5 and len(ways[3]._kept) == 0


def test_what_is_kept_cannot_be_spoilt_from_outside():
    samples = Samples(Streets("engine", n=1, size=(32, 32)), (32, 32))
    image, labels = samples[0]
    image.zero_(), labels.zero_()
    assert samples[0][0].any() and samples[0][1].any()
    assert torch.equal(samples[-1][0], samples[0][0])
    with pytest.raises(IndexError):
        samples[1]


def test_decoded_once():
    calls = []
    class Counted(Held):
        def image(self, i): calls.append(i); return self.images[i]
    samples = Samples(Counted([np.zeros((6, 8, 3), np.uint8)] * 2, [np.zeros((6, 8), np.uint8)] * 2), (6, 8)).load()
    samples.batch([0, 1, 1]), samples[0], samples.load()
    assert calls == [0, 1]


# Prepared data sets


@pytest.mark.parametrize("size", [(40, 72), (53, 96), (27, 33)])
def test_prepared_samples_are_the_original_ones_bit_for_bit(tmp_path, size):
    write_gta5(tmp_path / "gta5", range(1, 6))
    write_cityscapes(tmp_path / "cityscapes", {"train/aachen": 3, "train/ulm": 2, "val/lindau": 2})
    shared = shared_classes(open_dataset(f"gta5:{tmp_path}/gta5").space, CAMVID)
    for name, lut in (("gta5", shared.source_lut), ("cityscapes", None)):
        made = prepare(f"{name}:{tmp_path}/{name}", size, tmp_path / f"{name}_ready", workers=2)
        ready, original = open_dataset(f"prepared:{tmp_path}/{name}_ready"), open_dataset(f"{name}:{tmp_path}/{name}")
        assert isinstance(ready, Prepared) and ready.space == original.space and len(ready) == len(original) == 5
        assert ready.fingerprint() == made.fingerprint() and ready.name(3) == original.name(3)
        for a, b in zip(*(Samples(ds, size, lut).batch(range(5)) for ds in (ready, original))):
            assert torch.equal(a, b)
        assert check_dataset(ready)["sizes"] == {f"{size[0]}x{size[1]}": 5}


def test_splits_that_were_not_prepared_are_the_originals(tmp_path, monkeypatch):
    write_cityscapes(tmp_path / "data" / "cityscapes", {"train/aachen": 3, "train/ulm": 2, "val/lindau": 2})
    monkeypatch.setenv("MLAN_DATA", str(tmp_path / "data"))
    prepare("cityscapes", (32, 64), tmp_path / "ready")
    monkeypatch.delenv("MLAN_DATA")
    monkeypatch.chdir(tmp_path)
    opened = [open_dataset("prepared:ready", split) for split in SPLITS]
    assert [len(ds) for ds in opened] == [5, 2, 2] and [ds.labels(0).shape for ds in opened] == [(32, 64), (64, 128), (64, 128)]
    two = open_dataset("prepared:ready", n=2)
    assert [s[:3] for s in opened[1].stems] == ["ulm"] * 2 and two.name(1) == opened[0].name(2)
    assert (two.labels(1) == opened[0].labels(2)).all() and (two.image(1) == opened[0].image(2)).all()
    prepare("cityscapes:data/cityscapes", (32, 64), tmp_path / "ready", "test")
    monkeypatch.chdir("/")
    assert open_dataset(f"prepared:{tmp_path}/ready", "test").labels(0).shape == (32, 64)
    prepare(f"cityscapes:{os.path.relpath(tmp_path)}/data/cityscapes", (32, 64), tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert len(open_dataset("prepared:other", "val")) == 2


def test_an_unlabelled_set_and_an_object_are_prepared_too(tmp_path):
    bare = PairedFolder(write_tree(tmp_path / "bare", 4, labelled=False) / "images", None, CITYSCAPES)
    ready = prepare(bare, (6, 10), tmp_path / "ready")
    assert not ready.labelled and not (ready.folder / "labels.npy").exists() and (Samples(ready, (6, 10))[0][1] == IGNORE).all()
    with pytest.raises(DataError, match="without labels"):
        ready.labels(0)
    with pytest.raises(DataError, match="object in Python: prepare val"):
        open_dataset(f"prepared:{tmp_path}/ready", "val")
    with pytest.raises(DataError, match="Nothing prepared is in .*mlan prepare"):
        open_dataset(f"prepared:{tmp_path}/bare")


KILLED = """
import os, signal, sys
from mlan import samples
from mlan.streets import Streets
whole, calls = samples._sample, []
def sample(ds, i, *rest):
    if i == 70: os.kill(os.getpid(), signal.SIGKILL)
    return whole(ds, i, *rest)
samples._sample = sample
samples.prepare(Streets("engine", size=(32, 32), n=80), (24, 40), sys.argv[1])
"""


def test_a_killed_preparation_goes_on_and_is_whole(tmp_path, monkeypatch):
    ds, out = Streets("engine", size=(32, 32), n=80), tmp_path / "ready"
    assert Script(KILLED, out, told=tmp_path / "told").ends() == -signal.SIGKILL
    with pytest.raises(DataError, match="64 of 80 images.*goes on"):
        open_dataset(f"prepared:{out}")
    read, whole = [], samples._sample
    monkeypatch.setattr(samples, "_sample", lambda ds, i, *rest: read.append(i) or whole(ds, i, *rest))
    ready = prepare(ds, (24, 40), out)
    assert read == list(range(64, 80)), "what was done is not done again"
    fresh = prepare(ds, (24, 40), tmp_path / "fresh")
    for kind in ("images.npy", "labels.npy"):
        assert (ready.folder / kind).read_bytes() == (fresh.folder / kind).read_bytes()


def test_preparations_that_do_not_fit(tmp_path, monkeypatch):
    ds = pairs_of(write_tree(tmp_path, 6))
    prepare(ds, (6, 10), tmp_path / "ready")
    for other, size in ((ds, (6, 12)), (ds.take(ds.stems[:5]), (6, 10))):
        with pytest.raises(DataError, match="other data or at another size"):
            prepare(other, size, tmp_path / "ready")
    with pytest.raises(DataError, match=r"\(12, 20\) are wanted.*prepared at \(6, 10\)"):
        Samples(open_dataset({"train": Prepared(tmp_path / "ready" / "train")}), (12, 20))
    with pytest.raises(DataError, match="needs .* GB and its disk has"):
        prepare(ds, (3_000_000, 3_000_000), tmp_path / "huge")


# The loader


def batches(loader, steps):
    return [loader(step) for step in steps]


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches(tmp_path, workers):
    pairs = pairs_of(write_tree(tmp_path, 7))
    stream, lut = Stream(7, 3, seed=2), shared_classes(CITYSCAPES, CAMVID).source_lut
    steps = [0, 1, 2, 3, 4, 11, 12, 13, 5, 6, 6, 0, 1]
    alone = batches(Loader(Samples(pairs, (6, 10), lut), stream), steps)
    ahead = batches(Loader(Samples(pairs, (6, 10), lut), stream, workers), steps)
    for step, (i, images, labels), (j, others, same) in zip(steps, alone, ahead):
        assert i.dtype == np.int64 and (i == stream.indices(step)).all() and (j == i).all()
        assert images.dtype == labels.dtype == torch.uint8 and images.is_contiguous() and others.is_contiguous()
        assert torch.equal(images, others) and torch.equal(labels, same)
        x, y = Samples(pairs, (6, 10), lut).batch(i)
        assert torch.equal(images.float() / 255, x) and torch.equal(labels.long(), y)


def test_a_resumed_run_reads_what_an_unbroken_one_does(tmp_path):
    pairs, stream = pairs_of(write_tree(tmp_path, 7)), Stream(7, 2)
    unbroken = batches(Loader(Samples(pairs, (6, 10)), stream, 2), range(12))
    resumed = batches(Loader(Samples(pairs, (6, 10)), stream, 2), range(5, 12))
    for a, b in zip(unbroken[5:], resumed):
        assert all((x == y).all() for x, y in zip(a, b))


def test_workers_stay_and_read_ahead(tmp_path):
    class Telling(Held):
        def image(self, i):
            with open(tmp_path / f"{os.getpid()}", "a") as file:
                file.write(f"{i} ")
            return self.images[i]
    held = Telling([np.full((4, 4, 3), i, np.uint8) for i in range(50)], [np.zeros((4, 4), np.uint8)] * 50)
    loader = Loader(Samples(held, (4, 4)), Stream(50, 1), 2)
    loader(0), loader(30)
    assert str(os.getpid()) not in os.listdir(tmp_path) and len(os.listdir(tmp_path)) == 2, "read by the same two processes"
    for _ in range(100):
        read = sum(len((tmp_path / pid).read_text().split()) for pid in os.listdir(tmp_path))
        if read >= 6:
            break
        time.sleep(0.05)
    assert read >= 6, "two were asked for, and more are read already"


def test_workers_do_not_hoard(tmp_path):
    class Telling(Held):
        def image(self, i):
            with open(tmp_path / "read", "a") as file:
                file.write("read ")
            return self.images[i]
    held = Telling([np.zeros((4, 4, 3), np.uint8)], [np.zeros((4, 4), np.uint8)])
    batches(Loader(Samples(held, (4, 4)), Stream(1, 1), 1), range(5))
    assert len((tmp_path / "read").read_text().split()) >= 5


def test_samples_in_memory_need_no_workers():
    calls = []
    class Counted(Held):
        def image(self, i): calls.append(i); return self.images[i]
    held = Counted([np.full((4, 4, 3), i, np.uint8) for i in range(3)], [np.zeros((4, 4), np.uint8)] * 3)
    loaded = Samples(held, (4, 4)).load()
    loader = Loader(loaded, Stream(3, 2), workers=2, pin=True)
    assert loader._loader.num_workers == 0
    for step in range(4):
        indices, images, _ = loader(step)
        assert images[:, 0, 0, 0].tolist() == indices.tolist()
        images.zero_()
    assert calls == [0, 1, 2] and loaded[2][0].any(), "a batch is nobody's memory"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_is_one_sentence_and_the_loader_goes_on(tmp_path, workers):
    pairs, stream = pairs_of(write_tree(tmp_path, 6)), Stream(6, 2)
    path = Path(pairs.name(int(stream.indices(1)[0])))
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    loader = Loader(Samples(pairs, (6, 10)), stream, workers)
    loader(0)
    with pytest.raises(DataError, match=f"^Cannot read {path}.*replace") as caught:
        loader(1)
    assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert (loader(1)[0] == stream.indices(1)).all() and (loader(2)[0] == stream.indices(2)).all()
    with pytest.raises(DataError, match="make it Stream"):
        Loader(Samples(pairs, (6, 10)), Stream(5, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_where_there_is_a_gpu(tmp_path, workers):
    pairs = pairs_of(write_tree(tmp_path, 6))
    _, images, labels = Loader(Samples(pairs, (6, 10)), Stream(6, 2), workers, pin=True)(3)
    assert images.is_pinned() and labels.is_pinned()


def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    small = "--frames 2 --frame-size 128 256 --size 48 96 --workers 0 1 --seconds 0.05 --out".split()
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(sys, "argv", ["decode.py", *small, str(tmp_path / "record.jsonl")])
    runpy.run_path(str(ROOT / "benchmarks" / "decode.py"), run_name="__main__")
    record = json.loads((tmp_path / "record.jsonl").read_text())
    assert len(record["images_per_second"]) == 4 and min(record["images_per_second"].values()) > 0
    assert "prepared, 1 workers" in capsys.readouterr().out


# Streams


@pytest.mark.parametrize("n, batch_size", [(10, 4), (4, 10), (7, 7), (1, 3), (13, 1), (367, 6)])
def test_every_index_once_an_epoch(n, batch_size):
    stream = Stream(n, batch_size, seed=3)
    steps = -(-4 * n // batch_size)
    line = np.concatenate([stream.indices(t) for t in range(steps)])
    assert line.dtype == np.int64 and all(len(stream.indices(t)) == batch_size for t in range(steps))
    epochs = line[: 4 * n].reshape(4, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()
    if n > 6:
        assert len({tuple(e) for e in epochs}) == 4, "an epoch repeats another one's order"


def test_resume_is_exact_and_needs_no_past():
    whole = [Stream(11, 3, 5).indices(t).tolist() for t in range(40)]
    resumed = Stream(11, 3, 5)
    assert [resumed.indices(t).tolist() for t in range(25, 40)] == whole[25:]
    assert [resumed.indices(t).tolist() for t in (7, 0)] == [whole[7], whole[0]]


def test_source_and_target_do_not_march_together():
    orders = {tuple(Stream(50, 50, seed).indices(t)) for seed in range(20) for t in range(20)}
    assert len(orders) == 400, "seed s at epoch e + 1 equals seed s + 1 at epoch e?"


def test_order_is_the_same_everywhere():
    "Raw numbers of a bit generator are frozen by NumPy's policy, so these are, too."
    assert Stream(8, 8, 0).indices(0).tolist() == FROZEN[0] and Stream(8, 8, 0).indices(1).tolist() == FROZEN[1]


FROZEN = [[6, 3, 1, 4, 5, 2, 7, 0], [1, 3, 6, 2, 0, 7, 5, 4]]


@pytest.mark.parametrize("wrong", [(0, 1), (1, 0), (5, 2, -1)])
def test_streams_that_cannot_be(wrong):
    with pytest.raises(DataError, match="at least 1"):
        Stream(*wrong)


# Real data


@pytest.mark.data
@pytest.mark.parametrize("name, counts", [("camvid", (367, 101, 233)), ("airsim_nh", (1108, 100, 166))])
def test_real_data_are_whole(mlan_data, name, counts):
    start = time.perf_counter()
    for split, n in zip(SPLITS, counts):
        ds = open_dataset(name, split)
        found = check_dataset(ds)
        assert (found["n"], found["checked"], found["labelled"]) == (n, n, True)
        assert found["sizes"] == {{"camvid": "360x480", "airsim_nh": "144x256"}[name]: n}
        assert found["ignored"] < 0.06 and not found["warnings"]
    assert time.perf_counter() - start < 60


@pytest.mark.data
def test_real_pair_through_samples(mlan_data):
    shared = shared_classes(AIRSIM_NH, CAMVID)
    for name, lut in (("airsim_nh", shared.source_lut), ("camvid", shared.target_lut)):
        samples = Samples(open_dataset(name, "train", n=12), (64, 128), lut).load(workers=2)
        images, labels = samples.batch(Stream(12, 12, 0).indices(0))
        assert images.shape == (12, 3, 64, 128) and set(labels.unique().tolist()) <= {*range(7), IGNORE}
        sky, road = shared.classes.index("sky"), shared.classes.index("road")
        rows = torch.arange(64.0)[None, :, None].expand_as(labels)
        assert rows[labels == sky].mean() < 24 < 32 < rows[labels == road].mean(), "sky above, road below"
        assert images.mean(1)[labels == sky].mean() > images.mean(1)[labels == road].mean(), "labels off their images?"
