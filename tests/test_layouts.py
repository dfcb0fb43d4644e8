"GTA5, SYNTHIA and Cityscapes in their published layouts: small trees with the real depths, palettes and, once, sizes."

import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from trees import (
    a_map,
    raw_ids,
    save,
    train_ids,
    write_cityscapes,
    write_deep_png,
    write_gta5,
    write_synthia,
)

from mlan.checks import check_dataset
from mlan.folders import image_size, read_first_channel
from mlan.label_spaces import (
    CITYSCAPES, CITYSCAPES_CLASSES, CITYSCAPES_IDS, IGNORE, SYNTHIA, DataError, label_table, shared_classes)
from mlan.layouts import MissingSplit, cityscapes, gta5, open_dataset, synthia
from mlan.samples import Samples

CITIES = {"train/aachen": 3, "train/hanover": 1, "train/jena": 2, "train/ulm": 2, "train/zurich": 1, "val/lindau": 2, "val/munster": 1}

# The ids as the field's code has them: ADVENT's tables for Cityscapes and GTA5, and for SYNTHIA
LABEL_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15,
             31: 16, 32: 17, 33: 18}
SYNTHIA_IDS = {3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 1: 10, 10: 11, 17: 12, 8: 13, 19: 15, 12: 17, 11: 18}


@pytest.mark.parametrize("space, ids", [(CITYSCAPES_IDS, LABEL_IDS), (SYNTHIA, SYNTHIA_IDS)], ids=lambda x: getattr(x, "name", ""))
def test_ids_are_those_of_the_field(space, ids):
    assert {raw: CITYSCAPES_CLASSES.index(name) for raw, name in zip(space.ids, space.classes)} == ids
    table = label_table(space, tuple((name,) for name in CITYSCAPES_CLASSES))
    assert table.tolist() == [ids.get(raw, IGNORE) for raw in range(256)]


def test_the_pairs_of_the_paper():
    assert shared_classes(CITYSCAPES_IDS, CITYSCAPES).classes == CITYSCAPES_CLASSES
    assert len(shared_classes(SYNTHIA, CITYSCAPES).classes) == len(shared_classes(SYNTHIA, CITYSCAPES_IDS).classes) == 16


# GTA5


@pytest.mark.parametrize("palette", [True, False])
def test_gta5(tmp_path, palette):
    write_gta5(tmp_path, palette=palette)
    assert Image.open(tmp_path / "labels" / "00001.png").mode == ("P" if palette else "L")
    ds = open_dataset(f"gta5:{tmp_path}")
    assert ds.stems == ["00001", "00002", "00003"] and ds.space is CITYSCAPES_IDS
    for i in range(3):
        assert (train_ids(ds.labels(i), ds.space) == a_map((53, 96), i + 1)).all() and (ds.image(i) == i + 1).all()
    assert check_dataset(ds)["warnings"][0] == "3 of 24,966: a part of the official set."


def test_gta5_at_its_own_size(tmp_path):
    write_gta5(tmp_path, (1,), (1052, 1914))
    write_gta5(tmp_path, (2,), (1080, 1920))
    found = check_dataset(gta5(tmp_path, "train"))
    assert found["sizes"] == {"1052x1914": 1, "1080x1920": 1}
    images, labels = Samples(gta5(tmp_path, "train"), (720, 1280)).batch([0, 1])
    assert images.shape == (2, 3, 720, 1280) and labels.shape == (2, 720, 1280)


def test_gta5_splits(tmp_path):
    write_gta5(tmp_path, range(1, 8))
    for split in ("val", "test"):
        with pytest.raises(MissingSplit, match=f"{split} is given by .*split.mat, which is not there"):
            gta5(tmp_path, split)
    numbers = {"trainIds": [[1], [2], [6]], "valIds": [[3], [9]], "testIds": [[7], [4], [5]]}
    savemat(tmp_path / "split.mat", numbers)
    assert [gta5(tmp_path, s).stems for s in ("val", "test")] == [["00003"], ["00004", "00005", "00007"]]
    assert len(gta5(tmp_path, "train")) == 7, "the field trains on every frame"
    savemat(tmp_path / "split.mat", {"valIds": np.array([[300]])})
    with pytest.raises(MissingSplit, match="None of the 7 frames"):
        gta5(tmp_path, "val")
    with pytest.raises(DataError, match="Cannot read testIds in .*split.mat"):
        gta5(tmp_path, "test")
    (tmp_path / "split.mat").write_text("<html>")
    with pytest.raises(DataError, match="Cannot read valIds in .*split.mat"):
        gta5(tmp_path, "val")


def test_gta5_labels_of_another_size(tmp_path):
    write_gta5(tmp_path, (1, 2, 3), (1052 // 4, 1914 // 4))
    labels = tmp_path / "labels" / "00002.png"
    Image.open(labels).crop((0, 0, 478, 261)).save(labels)
    found = check_dataset(gta5(tmp_path, "train"))
    assert [w for w in found["warnings"] if "1 pairs have labels of another size" in w and "00002" in w]
    Image.open(labels).crop((0, 0, 478, 200)).save(labels)
    with pytest.raises(DataError, match=r"00002.png is \(263, 478\) and its labels \(200, 478\)"):
        check_dataset(gta5(tmp_path, "train"), decode=1)


def test_gta5_mistakes(tmp_path):
    write_gta5(tmp_path)
    save(tmp_path / "labels" / "00002.png", np.full((53, 96), 60, np.uint8))
    with pytest.raises(DataError, match=r"00002.png hold \[60\], and cityscapes_ids knows"):
        check_dataset(gta5(tmp_path, "train"))
    save(tmp_path / "labels" / "00002.png", np.zeros((53, 96, 3), np.uint8))
    with pytest.raises(DataError, match=r"00002.png holds colours \(mode RGB\)"):
        check_dataset(gta5(tmp_path, "train"))
    (tmp_path / "labels" / "00002.png").unlink()
    with pytest.raises(DataError, match=r"1 of 3 images .*have no label .*00002.png"):
        gta5(tmp_path, "train")


# SYNTHIA


def test_synthia(tmp_path):
    write_synthia(tmp_path)
    ds = open_dataset(f"synthia:{tmp_path}")
    for i in range(2):
        truth = a_map((76, 128), i)
        lacking = np.isin(truth, [CITYSCAPES_CLASSES.index(c) for c in ("terrain", "truck", "train")])
        assert (train_ids(ds.labels(i), SYNTHIA) == np.where(lacking, IGNORE, truth)).all()
    assert check_dataset(ds)["warnings"][0] == "2 of 9,400: a part of the official set."
    with pytest.raises(MissingSplit, match="no val"):
        synthia(tmp_path, "val")


def test_every_filter_of_png_at_the_real_size(tmp_path):
    rng = np.random.default_rng(0)
    channels = np.stack([rng.integers(0, 23, (760, 1280)), rng.integers(0, 65536, (760, 1280)), rng.integers(0, 256, (760, 1280))], -1)
    write_deep_png(tmp_path / "deep.png", channels)
    labels = read_first_channel(tmp_path / "deep.png")
    assert labels.dtype == np.uint8 and (labels == channels[..., 0]).all() and image_size(tmp_path / "deep.png") == (760, 1280)


def test_synthia_mistakes(tmp_path):
    write_synthia(tmp_path)
    labels = tmp_path / "GT" / "LABELS" / "0000001.png"
    whole = labels.read_bytes()
    for stored, mode in ((raw_ids(a_map((76, 128)), SYNTHIA), "L"), (np.zeros((76, 128, 3), np.uint8), "RGB")):
        save(labels, stored)
        with pytest.raises(DataError, match=rf"0000001.png is not RGB of 16 bits a channel \(mode {mode}\)"):
            check_dataset(synthia(tmp_path, "train"))
    labels.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="Cannot read .*0000001.png"):
        check_dataset(synthia(tmp_path, "train"))
    write_deep_png(labels, np.full((76, 128, 3), 300))
    with pytest.raises(DataError, match="0000001.png holds a label of 256 or more"):
        check_dataset(synthia(tmp_path, "train"))
    write_deep_png(labels, np.full((76, 128, 3), 23))
    with pytest.raises(DataError, match=r"0000001.png hold \[23\]"):
        check_dataset(synthia(tmp_path, "train"))


def test_a_damaged_deep_png_never_passes_in_silence(tmp_path):
    write_synthia(tmp_path, 1)
    labels = tmp_path / "GT" / "LABELS" / "0000000.png"
    whole, truth, rng = labels.read_bytes(), read_first_channel(labels), np.random.default_rng(0)
    refused = 0
    for place in rng.integers(57, len(whole) - 12, 60):
        labels.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1:])
        try:
            assert (read_first_channel(labels) == truth).all(), place
        except DataError:
            refused += 1
    assert refused > 50


# Cityscapes


@pytest.mark.parametrize("kinds, space", [
    (("labelIds",), CITYSCAPES_IDS), (("labelTrainIds",), CITYSCAPES), (("labelIds", "labelTrainIds"), CITYSCAPES)])
def test_cityscapes(tmp_path, kinds, space):
    write_cityscapes(tmp_path, CITIES, kinds=kinds)
    train, val, test = (open_dataset(f"cityscapes:{tmp_path}", s) for s in ("train", "val", "test"))
    assert [len(ds) for ds in (train, val, test)] == [9, 5, 3] and train.labelled and train.space is space
    assert {s.split("_")[0] for s in val.stems} == {"hanover", "jena", "ulm"} and set(val.stems) <= set(train.stems)
    assert {s.split("_")[0] for s in test.stems} == {"lindau", "munster"} and "leftImg8bit/val/" in test.name(0)
    assert (train_ids(train.labels(1), space) == a_map((64, 128), 1)).all()
    assert (train_ids(test.labels(2), space) == a_map((64, 128), 600)).all()
    assert train.notes == ["9 of 2,975: a part of the official set."] and test.notes == ["3 of 500: a part of the official set."]
    assert check_dataset(val)["n"] == 5


def test_cityscapes_train_ids_half_made(tmp_path):
    "Where the script that makes train ids was stopped, the label ids, which are whole, are taken."
    write_cityscapes(tmp_path, CITIES)
    save(tmp_path / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png", a_map((64, 128)))
    assert cityscapes(tmp_path, "train").space is CITYSCAPES_IDS and len(cityscapes(tmp_path, "train")) == 9


def test_cityscapes_without_labels_to_train_on(tmp_path):
    write_cityscapes(tmp_path, CITIES)
    shutil.rmtree(tmp_path / "gtFine" / "train")
    assert [cityscapes(tmp_path, s).labelled for s in ("train", "test")] == [False, True]


def test_cityscapes_mistakes(tmp_path):
    write_cityscapes(tmp_path, {"train/aachen": 2, "val/lindau": 2})
    with pytest.raises(MissingSplit, match="has none of hanover, jena, ulm"):
        cityscapes(tmp_path, "val")
    (tmp_path / "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images in .*leftImg8bit/train have no label in .*gtFine/train .*aachen_000001"):
        cityscapes(tmp_path, "train")
    with pytest.raises(DataError, match="no folder .*leftImg8bit"):
        cityscapes(tmp_path / "val", "train")
    save(tmp_path / "gtFine/val/lindau/lindau_000001_000019_gtFine_labelIds.png", np.full((64, 128), 77, np.uint8))
    with pytest.raises(DataError, match=r"lindau_000001.* hold \[77\]"):
        check_dataset(cityscapes(tmp_path, "test"))


def test_cityscapes_at_its_own_size(tmp_path):
    write_cityscapes(tmp_path, {"val/lindau": 1}, (1024, 2048))
    assert check_dataset(cityscapes(tmp_path, "test"))["sizes"] == {"1024x2048": 1}
