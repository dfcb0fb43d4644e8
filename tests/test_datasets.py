"Data sets against what other libraries say, trees of odd files, and the real CamVid and AirSim where they are at hand."

import os
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from skimage.transform import resize as skimage_resize

from mlan import datasets
from mlan.datasets import (
    AIRSIM_NH,
    CAMVID,
    CITYSCAPES,
    SYNTHIA16,
    DataError,
    LabelSpace,
    PairedFolder,
    Samples,
    Stream,
    Streets,
    check_dataset,
    folder,
    merged_groups,
    open_dataset,
    read_image,
    read_labels,
    shared_classes,
)
from mlan.streets import CITYSCAPES_CLASSES, CITYSCAPES_COLORS, IGNORE, draw_street

SPLITS = ("train", "val", "test")
SPACES = (CITYSCAPES, SYNTHIA16, CAMVID, AIRSIM_NH)


def write_tree(root, n, labelled=True, suffix=".png", size=(12, 20)):
    "n pairs of noise whose pair i has the label i % 19 everywhere but in one corner."
    rng = np.random.default_rng(0)
    for part in ("images", "labels")[: 1 + labelled]:
        (root / part).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / "images" / f"{i:03d}{suffix}")
        if labelled:
            ids = np.full(size, i % 19, np.uint8)
            ids[0, 0] = IGNORE
            Image.fromarray(ids).save(root / "labels" / f"{i:03d}.png")
    return root


def pairs_of(root):
    return PairedFolder(root / "images", root / "labels", CITYSCAPES)


# Label spaces


@pytest.mark.parametrize("source", SPACES, ids=lambda s: s.name)
@pytest.mark.parametrize("target", SPACES, ids=lambda s: s.name)
def test_groups_are_the_connected_components_that_scipy_finds(source, target):
    index = CITYSCAPES_CLASSES.index
    edges = [(index(a), index(b)) for s in (source, target) for cover in s.covers for a in cover for b in cover]
    rows, columns = zip(*edges)
    _, component = connected_components(coo_matrix((np.ones(len(edges)), (rows, columns)), shape=(19, 19)))
    groups = merged_groups(source, target)
    assert sorted(c for group in groups for c in group) == sorted(CITYSCAPES_CLASSES)
    assert {frozenset(group) for group in groups} == {
        frozenset(np.array(CITYSCAPES_CLASSES)[component == k].tolist()) for k in set(component)}


CAMVID_11 = (
    "road", "sidewalk", "building", "fence", "pole", "traffic light", "vegetation", "sky", "person", "rider", "car")
PAIRS = [
    (CITYSCAPES, CAMVID, CAMVID_11),
    (SYNTHIA16, CAMVID, CAMVID_11),
    (AIRSIM_NH, CAMVID, ("road", "building", "fence", "pole", "vegetation", "sky", "car")),
    (CITYSCAPES, CITYSCAPES, CITYSCAPES_CLASSES),
    (SYNTHIA16, CITYSCAPES, SYNTHIA16.classes),
    (SYNTHIA16, SYNTHIA16, SYNTHIA16.classes),
    (AIRSIM_NH, AIRSIM_NH, AIRSIM_NH.classes),
    (CAMVID, CAMVID, CAMVID_11),
]


@pytest.mark.parametrize("source, target, classes", PAIRS, ids=lambda x: getattr(x, "name", ""))
def test_shared_classes(source, target, classes):
    shared = shared_classes(source, target)
    assert shared.classes == tuple(classes) == tuple(m[0] for m in shared.members)
    assert shared.colors.shape == (len(classes), 3) and shared.colors.dtype == np.uint8
    for space, lut in ((source, shared.source_lut), (target, shared.target_lut)):
        assert lut.shape == (256,) and lut.dtype == np.uint8
        assert set(lut[lut != IGNORE].tolist()) == set(range(len(classes))), "a scored class that this side never shows"
        assert (lut[[v for v in range(256) if v not in space.ids]] == IGNORE).all()
        for raw, cover in zip(space.ids, space.covers):
            assert lut[raw] == IGNORE or cover <= set(shared.members[lut[raw]])


def test_camvid_table_entry_by_entry():
    lut = shared_classes(AIRSIM_NH, CAMVID).target_lut
    road, building, fence, pole, vegetation, sky, car = range(7)
    none = IGNORE
    assert lut[:12].tolist() == [sky, building, pole, road, road, vegetation, none, fence, car, none, none, none]
    lut = shared_classes(CITYSCAPES, CAMVID).source_lut
    assert lut[:19].tolist() == [0, 1, 2, 2, 3, 4, 5, 5, 6, 6, 7, 8, 9, 10, 10, 10, 10, 9, 9]


def test_colors_follow_cityscapes():
    assert (CITYSCAPES.colors == CITYSCAPES_COLORS).all()
    assert (CAMVID.colors[3] == CITYSCAPES_COLORS[0]).all()


def test_label_spaces_that_cannot_be():
    covers = (frozenset({"road"}), frozenset({"sky"}))
    with pytest.raises(DataError, match="twins"):
        LabelSpace("twins", ("a", "b"), covers, (0, 0))
    with pytest.raises(DataError, match="its own"):
        LabelSpace("void", ("a", "b"), covers, (0, IGNORE))
    with pytest.raises(DataError, match="2 classes"):
        LabelSpace("short", ("a", "b"), covers[:1], (0, 1))
    with pytest.raises(DataError, match="share no class"):
        shared_classes(LabelSpace("a", ("a",), covers[:1], (0,)), LabelSpace("b", ("b",), covers[1:], (0,)))


def test_a_class_without_a_counterpart_is_ignored():
    mine = LabelSpace("mine", ("road", "boat"), (frozenset({"road"}), frozenset()), (0, 1))
    shared = shared_classes(mine, CITYSCAPES)
    assert shared.classes == ("road",) and shared.source_lut[:2].tolist() == [0, IGNORE]
    assert mine.colors[1].tolist() == [0, 0, 0]


# Files


def png_chunk(kind, data):
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".JPG"])
def test_image_formats_keep_height_and_width(tmp_path, suffix):
    gradient = np.tile(np.linspace(0, 255, 30, dtype=np.uint8), (10, 1))
    Image.fromarray(np.stack([gradient] * 3, -1)).save(tmp_path / f"a{suffix}", quality=95)
    image = PairedFolder(tmp_path, None, CITYSCAPES).image(0)
    assert image.shape == (10, 30, 3) and image.dtype == np.uint8
    assert np.abs(image[..., 1].astype(int) - gradient).max() <= 6


def test_images_in_grey_with_alpha_with_palette_and_on_their_side(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.png")
    assert (read_image(tmp_path / "grey.png") == rgb[..., :1]).all()
    Image.fromarray(np.dstack([rgb, rgb[..., 0]])).save(tmp_path / "alpha.png")
    assert (read_image(tmp_path / "alpha.png") == rgb).all()
    few = Image.fromarray(rgb // 128 * 255).quantize(8)
    few.save(tmp_path / "palette.png")
    assert (read_image(tmp_path / "palette.png") == np.array(few.convert("RGB"))).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    Image.fromarray(rgb).save(tmp_path / "side.png", exif=exif)
    assert (read_image(tmp_path / "side.png") == np.rot90(rgb, -1)).all()


def test_a_deep_image_is_refused(tmp_path):
    Image.fromarray(np.full((4, 5), 3000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match="deep.png.* 8"):
        read_image(tmp_path / "deep.png")


def test_labels_are_ids_whatever_the_png(tmp_path):
    ids = np.random.default_rng(0).integers(0, 19, (5, 8)).astype(np.uint8)
    ids[0, 0] = IGNORE
    Image.fromarray(ids).save(tmp_path / "8.png")
    Image.fromarray(ids.astype(np.uint16)).save(tmp_path / "16.png")
    palette = Image.fromarray(ids)
    palette.putpalette(np.random.default_rng(1).integers(0, 256, 768, dtype=np.uint8).tobytes())
    assert palette.mode == "P"
    palette.save(tmp_path / "palette.png")
    for name in ("8", "16", "palette"):
        found = read_labels(tmp_path / f"{name}.png")
        assert found.dtype == np.uint8 and (found == ids).all(), name
    Image.fromarray(ids > 9).save(tmp_path / "1.png")
    assert (read_labels(tmp_path / "1.png") == (ids > 9)).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_labels_in_colours_are_refused(tmp_path, mode):
    Image.new(mode, (8, 5)).save(tmp_path / "colours.png")
    with pytest.raises(DataError, match=f"colours.png.*{mode}"):
        read_labels(tmp_path / "colours.png")


def test_small_bit_depths_are_not_stretched_to_255(tmp_path):
    "Pillow shows a grey PNG of 4 bits as brightness: id 3 would come out as 51."
    rows = b"".join(b"\0" + bytes([0x12, 0x3F]) for _ in range(2))
    header = (4).to_bytes(4, "big") + (2).to_bytes(4, "big") + bytes([4, 0, 0, 0, 0])
    data = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    (tmp_path / "4bit.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    assert read_labels(tmp_path / "4bit.png").tolist() == [[1, 2, 3, 15]] * 2


def test_pairs_by_stem_and_in_the_order_of_names(tmp_path):
    write_tree(tmp_path, 4)
    (tmp_path / "images" / "notes.txt").write_text("not an image")
    (tmp_path / "images" / "._000.png").write_bytes(b"a system's own file")
    ds = pairs_of(tmp_path)
    assert ds.stems == ["000", "001", "002", "003"]
    assert [int(ds.labels(i)[1, 1]) for i in range(4)] == [0, 1, 2, 3]
    assert [int(ds.take(["003", "001"]).labels(i)[1, 1]) for i in range(2)] == [3, 1]


def test_pairs_that_cannot_be(tmp_path):
    write_tree(tmp_path, 2)
    with pytest.raises(DataError, match="007"):
        PairedFolder(tmp_path / "images", None, CITYSCAPES, stems=["007"])
    (tmp_path / "labels" / "001.png").rename(tmp_path / "labels" / "001.jpg")
    with pytest.raises(DataError, match=r"images/001.png has no label .*labels/001.png"):
        pairs_of(tmp_path)
    with pytest.raises(DataError, match="no folder .*elsewhere"):
        PairedFolder(tmp_path / "images", tmp_path / "elsewhere", CITYSCAPES)
    (tmp_path / "images" / "001.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="001.png is the second"):
        PairedFolder(tmp_path / "images", None, CITYSCAPES)


def test_fingerprint_notices_what_changed(tmp_path):
    ds = pairs_of(write_tree(tmp_path, 3))
    seen = {ds.fingerprint(), pairs_of(tmp_path).fingerprint()}
    assert len(seen) == 1
    seen |= {ds.take(ds.stems[:2]).fingerprint(), PairedFolder(tmp_path / "images", None, CITYSCAPES).fingerprint()}
    seen |= {PairedFolder(tmp_path / "images", tmp_path / "labels", CAMVID).fingerprint()}
    os.utime(tmp_path / "labels" / "001.png", ns=(1, 1))
    seen.add(ds.fingerprint())
    assert len(seen) == 5


# Splits and names


@pytest.mark.parametrize("n", [3, 4, 7, 20, 33])
def test_blocks_share_out_a_folder(tmp_path, n):
    whole = pairs_of(write_tree(tmp_path, n)).stems
    parts = [folder(tmp_path, split).stems for split in SPLITS]
    assert sum(parts, []) == whole and all(parts)
    assert len(parts[1]) == len(parts[2]) == max(1, round(0.15 * n))


def test_too_few_to_split(tmp_path):
    write_tree(tmp_path, 2)
    with pytest.raises(DataError, match="too few to give val and test"):
        folder(tmp_path, "train")


def test_split_folders(tmp_path):
    for split, n in zip(SPLITS, (5, 3, 2)):
        write_tree(tmp_path / split, n)
    assert [len(folder(tmp_path, s)) for s in SPLITS] == [5, 3, 2]


def test_unlabelled_train_with_a_labelled_test(tmp_path):
    write_tree(tmp_path / "train", 5, labelled=False)
    write_tree(tmp_path / "test", 2)
    opened = [open_dataset(f"folder:{tmp_path}", s) for s in SPLITS]
    assert [(len(d), d.labelled) for d in opened] == [(5, False), (5, False), (2, True)]
    with pytest.raises(DataError, match="has no labels"):
        opened[0].labels(0)


def write_segnet(root):
    for split, n in zip(SPLITS, (3, 2, 2)):
        write_tree(root / "tmp", n)
        (root / "tmp" / "images").rename(root / split)
        (root / "tmp" / "labels").rename(root / f"{split}annot")
    return root


def test_camvid_layout(tmp_path):
    write_segnet(tmp_path / "camvid")
    assert [len(open_dataset("camvid", s, data_root=tmp_path)) for s in SPLITS] == [3, 2, 2]
    ds = open_dataset(f"camvid:{tmp_path}/camvid", "val")
    assert ds.space is CAMVID and ds.labels(1)[1, 1] == 1
    assert check_dataset(ds)["classes"]["Building"] > 0.4


def test_airsim_validation_keeps_its_distance(tmp_path):
    for part in ("images", "labels"):
        (tmp_path / "train" / part).mkdir(parents=True)
    for stem in [f"front{i:05d}" for i in range(470, 601)] + [f"back{i:05d}" for i in range(470, 640)]:
        for part, mode in (("images", "RGB"), ("labels", "L")):
            Image.new(mode, (4, 3)).save(tmp_path / "train" / part / f"{stem}.png")
    train, val = (open_dataset(f"airsim_nh:{tmp_path}", s).stems for s in ("train", "val"))
    assert val == [f"front{i:05d}" for i in range(501, 601)]
    gap = min(abs(int(a[-5:]) - int(b[-5:])) for a in train for b in val)
    assert gap == 21 and any(int(s[-5:]) > 620 for s in train)


def test_n_thins_evenly_and_never_repeats(tmp_path):
    write_tree(tmp_path, 20)
    assert open_dataset(f"folder:{tmp_path}", "train", n=7).stems == [f"{i:03d}" for i in range(0, 14, 2)]
    assert len(open_dataset(f"folder:{tmp_path}", "train", n=99)) == 14
    with pytest.raises(DataError, match="n=0"):
        open_dataset(f"folder:{tmp_path}", "train", n=0)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.delenv("MLAN_DATA", raising=False)
    with pytest.raises(DataError, match="set MLAN_DATA"):
        open_dataset("camvid")
    monkeypatch.setenv("MLAN_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"{tmp_path}/camvid.*correct MLAN_DATA"):
        open_dataset("camvid")
    for spec in ("kitti", "", "kitti:/somewhere"):
        with pytest.raises(DataError, match="camvid, airsim_nh, folder"):
            open_dataset(spec)
    with pytest.raises(DataError, match="engine, cartoon, camera"):
        open_dataset("streets")
    with pytest.raises(DataError, match="lacks"):
        open_dataset([1, 2])
    with pytest.raises(DataError, match="train, val, test"):
        open_dataset("streets:engine", "training")


def test_mlan_data_is_where_names_are_found(tmp_path, monkeypatch):
    write_segnet(tmp_path / "camvid")
    monkeypatch.setenv("MLAN_DATA", str(tmp_path))
    assert len(open_dataset("camvid", "test")) == 2


def test_objects_pass_as_they_are():
    ds = Streets("engine", n=2)
    assert open_dataset(ds, "test") is ds and open_dataset({"train": ds}, "train") is ds
    with pytest.raises(DataError, match="'val'"):
        open_dataset({"train": ds}, "val")


# Streets


def test_a_scene_is_drawn_once_and_the_oldest_makes_room(monkeypatch):
    drawn, size = [], (32, 32)
    monkeypatch.setattr(datasets, "_SCENES", {})
    monkeypatch.setattr(datasets, "_ROOM", 3 * 4 * 32 * 32)
    monkeypatch.setattr(datasets, "draw_street", lambda *scene: drawn.append(scene[1]) or draw_street(*scene))
    ds = Streets("engine", size=size, n=5)
    for i in (0, 0, 1, 2, 0):
        ds.image(i), ds.labels(i)
    assert drawn == [0, 1, 2]
    ds.image(3)
    ds.image(2), ds.image(3), ds.image(0)
    assert drawn == [0, 1, 2, 3, 0]
    image, labels = draw_street("engine", 2, size)
    assert (ds.image(2) == image).all() and (ds.labels(2) == labels).all()


def test_scenes_drawn_by_workers_are_those_drawn_alone(monkeypatch):
    monkeypatch.setattr(datasets, "_SCENES", {})
    ds = Streets("camera", "val", size=(32, 32), n=4)
    Samples(ds, (32, 32)).load(workers=2)
    assert [scene[1] for scene in datasets._SCENES] == [0, 1, 2, 3]
    for i in range(4):
        image, labels = draw_street("camera", i, (32, 32), "val")
        assert (ds.image(i) == image).all() and (ds.labels(i) == labels).all()


def test_streets_differ_by_split_seed_and_domain_and_repeat():
    def first(**change):
        settings = dict(domain="engine", split="train", size=(32, 48), n=2, seed=0) | change
        return Streets(**settings)
    base = first()
    assert (base.image(1) == first().image(1)).all() and base.fingerprint() == first().fingerprint()
    for change in (dict(split="val"), dict(seed=1), dict(domain="camera")):
        assert (base.image(0) != first(**change).image(0)).any(), change
        assert base.fingerprint() != first(**change).fingerprint(), change
    base.image(1)[:] = 0
    assert base.image(1).any(), "the cached drawing was handed out itself"
    assert [len(Streets("engine", s)) for s in SPLITS] == [600, 120, 200]
    with pytest.raises(IndexError):
        base.image(2)
    for wrong in (dict(n=0), dict(size=(16, 48)), dict(seed=-1), dict(layout_shift=2)):
        with pytest.raises(DataError, match="Cannot draw"):
            first(**wrong)


@pytest.mark.parametrize("domain", ["engine", "cartoon", "camera"])
def test_streets_keep_to_their_label_space(domain):
    ds = Streets(domain, size=(64, 128), n=20)
    known = {*ds.space.ids, IGNORE}
    assert all(set(np.unique(ds.labels(i)).tolist()) <= known for i in range(20))
    assert check_dataset(ds)["checked"] == 1


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
    assert check_dataset(pairs_of(tmp_path), decode=False)["checked"] == 1
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
def test_real_splits_are_disjoint(mlan_data):
    for name in ("camvid", "airsim_nh"):
        stems = [s for split in SPLITS for s in open_dataset(name, split).stems]
        assert len(stems) == len(set(stems))


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
