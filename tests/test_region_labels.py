"Region labels: against plain versions and libraries; a whole data set in chunks, killed, torn, changed, in parallel, in bounded memory."
import json
import resource
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import joblib
import numpy as np
import pytest
from skimage.feature import hog
from sklearn.metrics import pairwise_distances

from mlan.region_labels import (DESCRIPTORS, RegionLabeller, RegionSettings, Vocabulary, assign, class_histogram, describe_patches,
                                fit_vocabularies, label_dataset, patch_hog, region_grid, sample_patches, stretch)
from mlan.label_spaces import CITYSCAPES_COLORS, IGNORE
from mlan.streets import draw_street

SETTINGS = RegionSettings(patches=(8, 16, 32), min_samples=3, region_sample=400)


@dataclass
class Blocks:
    "Label maps of rectangles, by index; it notes each map that it draws in a file, and may be slow."
    size: tuple = (64, 96)
    note: Path | None = None
    seconds: float = 0

    def __call__(self, i):
        rng = np.random.default_rng(i)
        labels = np.full(self.size, rng.integers(3), np.uint8)
        for _ in range(12):
            (top, left), (high, wide) = rng.integers(0, self.size), rng.integers(4, 40, 2)
            labels[top:top + high, left:left + wide] = rng.choice([0, 1, 2, 8, 10, 13, IGNORE])
        if self.note:
            with self.note.open("a") as f:
                f.write(f"{i} {os.getpid()}\n")
        time.sleep(self.seconds)
        return labels

    def drawn(self):
        "The maps that were drawn so far, and forget them."
        seen = sorted(int(line.split()[0]) for line in self.note.read_text().splitlines())
        self.note.unlink()
        return seen


@pytest.fixture(scope="module")
def labeller():
    return RegionLabeller(fit_vocabularies(Blocks(), 40, SETTINGS), SETTINGS)


def equal(a, b):
    return len(a) == len(b) and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b))


# One map


def plain_hog(labels, patch, colors):
    colors = np.vstack([colors, np.zeros((256 - len(colors), 3))]) / 255
    blocks = hog(colors[stretch(labels, patch)], 9, (patch // 2, patch // 2), (2, 2), feature_vector=False, channel_axis=-1)
    return blocks[::2, ::2].reshape(-1, 36)


@pytest.mark.parametrize("size", [(64, 96), (75, 131), (32, 32), (33, 200)])
@pytest.mark.parametrize("patch", [2, 4, 8, 16, 32])
def test_hog_is_scikit_images(size, patch):
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (30, 3))
    noise = rng.choice([*range(30), IGNORE], size).astype(np.uint8)
    for labels in (Blocks(size)(1), Blocks(size)(2), noise, np.full(size, 3, np.uint8)):
        for palette in (CITYSCAPES_COLORS, colors):
            np.testing.assert_allclose(patch_hog(labels, patch, palette), plain_hog(labels, patch, palette), atol=2e-6)


def test_hog_of_the_papers_size_on_a_scene():
    labels = draw_street("engine", 0, size=(720, 1280))[1]
    for patch in (32, 64, 128):
        np.testing.assert_allclose(patch_hog(labels, patch), plain_hog(labels, patch, CITYSCAPES_COLORS), atol=3e-6)


@pytest.mark.parametrize("patch", [8, 16, 32])
def test_class_histogram_counts(patch):
    labels = Blocks((70, 101))(3)
    tall, n = stretch(labels, patch), region_grid(labels.shape, patch)
    rows = class_histogram(labels, patch, 11).reshape(*n, 11)  # class 13 is not among the 11
    for i, j in np.ndindex(*n):
        tile = tall[i * patch:(i + 1) * patch, j * patch:(j + 1) * patch]
        counted = max(1, (tile < 11).sum())
        np.testing.assert_allclose(rows[i, j], [(tile == c).sum() / counted for c in range(11)])


@pytest.mark.parametrize("descriptor", DESCRIPTORS)
def test_assign_takes_the_nearest_core_within_eps(descriptor):
    rows = np.vstack([describe_patches(Blocks()(i), 16, descriptor) for i in range(20)])
    rng = np.random.default_rng(0)
    cores = rows[rng.permutation(len(rows))[:40]] + rng.normal(0, .01, (40, rows.shape[1])).astype(np.float32)
    distances = pairwise_distances(rows.astype(float), cores.astype(float))
    for eps in (1e-3, .2, .5, 2.):
        v = Vocabulary(16, eps, cores, np.arange(40, dtype=np.uint8) % 7, 0.)
        expected = np.where(distances.min(1) <= eps, v.numbers[distances.argmin(1)], IGNORE)
        assert assign(rows, v).dtype == np.uint8
        np.testing.assert_array_equal(assign(rows, v), expected)


def test_a_core_at_eps_is_reached():
    v = Vocabulary(8, .5, np.array([[0., 0.], [4., 0.]], np.float32), np.array([3, 1], np.uint8), 0.)
    np.testing.assert_array_equal(assign(np.array([[.5, 0.], [.50001, 0.], [3.5, 0.], [0., 0.]], np.float32), v), [3, IGNORE, 1, 3])


# The vocabulary's sample


def test_the_sample_is_bounded_whatever_the_set(tmp_path):
    maps = Blocks(note=tmp_path / "drawn")
    few = sample_patches(maps, 500, SETTINGS)
    read = maps.drawn()
    assert [len(rows) for rows in few] == [400] * 3
    assert len(read) == len(set(read)) == -(-4 * 400 // 6)  # the coarsest level has 6 patches a map, and no map is read twice
    sample_patches(maps, 100_000, SETTINGS)
    assert len(maps.drawn()) == len(read)


def test_each_level_samples_what_it_would_sample_alone():
    together = sample_patches(Blocks(), 60, SETTINGS)
    for rows, patch in zip(together, SETTINGS.patches):
        np.testing.assert_array_equal(rows, sample_patches(Blocks(), 60, replace(SETTINGS, patches=(patch,)))[0])


# A data set


def test_chunks_jobs_and_folders_do_not_matter(labeller, tmp_path):
    whole = [np.stack(level) for level in zip(*(labeller(Blocks()(i)) for i in range(23)))]
    assert [level.shape for level in whole] == [(23, 8, 12), (23, 4, 6), (23, 2, 3)]
    for keywords in ({}, dict(chunk=5), dict(chunk=1000), dict(jobs=2, chunk=4), dict(folder=tmp_path / "a", chunk=10),
                     dict(folder=tmp_path / "b", jobs=2, chunk=3)):
        assert equal(label_dataset(Blocks(), 23, labeller, **keywords), whole), keywords


SCRIPT = """
import pickle, sys
from mlan.region_labels import label_dataset
sys.path.insert(0, {tests!r})
maps, labeller = pickle.load(open({given!r}, "rb"))
label_dataset(maps, 40, labeller, jobs={jobs}, folder={folder!r}, chunk=4)
"""


def kill_in_the_middle(tmp_path, labeller, jobs) -> list:
    "Start a call in a process group of its own, SIGKILL it after some chunks, and return these."
    given, folder = tmp_path / "given.pickle", tmp_path / "kept"
    given.write_bytes(pickle.dumps((Blocks(note=tmp_path / "drawn", seconds=.05), labeller)))
    script = SCRIPT.format(tests=str(Path(__file__).parent), given=str(given), jobs=jobs, folder=str(folder))
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    give_up = time.time() + 60
    while len(list(folder.glob("*/*.npz"))) < 3 and time.time() < give_up and process.poll() is None:
        time.sleep(.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return sorted(folder.glob("*/*.npz"))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_call_goes_on(labeller, tmp_path, jobs):
    kept = kill_in_the_middle(tmp_path, labeller, jobs)
    assert 3 <= len(kept) < 10
    times, maps = [p.stat().st_mtime_ns for p in kept], Blocks(note=tmp_path / "drawn")
    finished = {i for p in kept for i in range(*map(int, p.stem.split("-")))}
    assert finished <= set(maps.drawn())
    resumed = label_dataset(maps, 40, labeller, jobs=jobs, folder=tmp_path / "kept", chunk=4)
    assert equal(resumed, label_dataset(Blocks(), 40, labeller))
    assert set(maps.drawn()) - {0} == set(range(40)) - finished - {0}  # map 0 is read for its size
    assert [p.stat().st_mtime_ns for p in kept] == times
    assert equal(label_dataset(maps, 40, labeller, folder=tmp_path / "kept", chunk=4), resumed) and maps.drawn() == [0]


def test_another_process_finds_the_chunks(labeller, tmp_path):
    "The folder's name is made of contents, not of what one process happens to hold."
    label_dataset(Blocks(), 8, labeller, folder=tmp_path, chunk=4)
    rebuilt = replace(labeller, vocabularies=[replace(v, cores=v.cores.copy()) for v in labeller.vocabularies], colors=CITYSCAPES_COLORS)
    (tmp_path / "given").write_bytes(pickle.dumps(rebuilt))
    code = ("import joblib, pickle; from dataclasses import asdict; "
            f"print(joblib.hash(asdict(pickle.load(open({str(tmp_path / 'given')!r}, 'rb')))))")
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert [p.name for p in tmp_path.glob("chunks-*")] == [f"chunks-{seen[:12]}"]


def spoil(path: Path, how: str):
    content = path.read_bytes()
    if how == "flipped":
        middle = len(content) // 3
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1:])
    elif how == "a shorter chunk's":
        shorter = [np.zeros((2, 8, 12), np.uint8), np.zeros((2, 4, 6), np.uint8), np.zeros((2, 2, 3), np.uint8)]
        np.savez_compressed(path, **{f"labels_{i}": level for i, level in enumerate(shorter)})
    elif how == "foreign":
        np.savez(path, something=np.arange(4))
    else:
        path.write_bytes({"torn": content[:-30], "torn early": content[:40], "empty": b"", "text": b"not a chunk"}[how])


@pytest.mark.parametrize("how", ["torn", "torn early", "empty", "text", "flipped", "a shorter chunk's", "foreign"])
def test_a_broken_chunk_is_made_again(labeller, tmp_path, how):
    maps = Blocks(note=tmp_path / "drawn")
    whole = label_dataset(maps, 12, labeller, folder=tmp_path / "kept", chunk=4)
    maps.drawn()
    spoil(next((tmp_path / "kept").glob("*/000004-000008.npz")), how)
    assert equal(label_dataset(maps, 12, labeller, folder=tmp_path / "kept", chunk=4), whole)
    assert maps.drawn() == [0, 4, 5, 6, 7]


def changed(labeller, what):
    v = labeller.vocabularies[0]
    others = dict(numbers=(v.numbers + 1) % v.n, eps=v.eps / 3, cores=v.cores + .01)
    if what in others:
        return replace(labeller, vocabularies=[replace(v, **{what: others[what]}), *labeller.vocabularies[1:]])
    if what == "colors":
        return replace(labeller, colors=CITYSCAPES_COLORS[::-1].copy())
    settings = replace(SETTINGS, **{"descriptor": dict(descriptor="hog"), "region_sample": dict(region_sample=300)}[what])
    return RegionLabeller(fit_vocabularies(Blocks(), 40, settings), settings)


@pytest.mark.parametrize("what", ["numbers", "eps", "cores", "colors", "descriptor", "region_sample"])
def test_changed_settings_never_reuse_a_chunk(labeller, tmp_path, what):
    label_dataset(Blocks(), 12, labeller, folder=tmp_path, chunk=4)
    other, maps = changed(labeller, what), Blocks(note=tmp_path / "drawn")
    assert equal(label_dataset(maps, 12, other, folder=tmp_path, chunk=4), label_dataset(Blocks(), 12, other))
    assert set(maps.drawn()) == set(range(12))
    assert len(list(tmp_path.glob("chunks-*"))) == 2


class Mixed(Blocks):
    def __call__(self, i):
        return Blocks((64, 96) if i != 7 else (64, 128))(i)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_map_of_another_size_is_named(labeller, jobs):
    with pytest.raises(ValueError, match=r"label map 7 is \(64, 128\), map 0 is \(64, 96\)"):
        label_dataset(Mixed(), 12, labeller, jobs=jobs, chunk=4)


def peak_mb():
    "The most that this process held; where Linux tells it, without what its parent held when it was forked."
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


MEMORY = """
import json, sys
sys.path.insert(0, {tests!r})
from test_region_labels import *
maps = Blocks((360, 640))
labeller = RegionLabeller(fit_vocabularies(maps, 20, SETTINGS), SETTINGS)
peaks = []
for n in (20, 220):
    label_dataset(maps, n, labeller, folder={folder!r} + str(n))
    peaks.append(peak_mb())
print(json.dumps(peaks))
"""


def test_memory_does_not_grow_with_the_set(tmp_path):
    "Peak of 20 maps, then of 220 more in the same process; 200 of them kept would be 46 MB as maps, and 1.1 GB in colours."
    code = MEMORY.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "kept"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    small, large = json.loads(done.stdout)
    assert large - small < 20, f"the peak grew from {small:.0f} to {large:.0f} MB"
    assert large < 1000


def test_on_a_dask_cluster(labeller, tmp_path):
    distributed = pytest.importorskip("distributed", reason="needs dask.distributed: pip install distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, distributed.Client(cluster):
        with joblib.parallel_config(backend="dask"):
            labels = label_dataset(Blocks(note=tmp_path / "drawn"), 30, labeller, jobs=-1, folder=tmp_path / "kept", chunk=2)
    assert equal(labels, label_dataset(Blocks(), 30, labeller))
    workers = {line.split()[1] for line in (tmp_path / "drawn").read_text().splitlines()} - {str(os.getpid())}
    assert len(workers) == 2  # this process read map 0, for its size, and the cluster's two did the work
