"Readers, layouts and names: trees of odd files, and the real CamVid and AirSim where they are at hand."

import os
import zlib

import numpy as np
import pytest
from PIL import Image
from trees import pairs_of, png_chunk, write_tree

from mlan import streets
from mlan.folders import PairedFolder, folder, read_image, read_labels
from mlan.label_spaces import CAMVID, CITYSCAPES, IGNORE, DataError
from mlan.layouts import open_dataset
from mlan.streets import Streets, draw_street

SPLITS = ("train", "val", "test")


# Files


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".JPG", ".JPEG", ".webp", ".bmp", ".tif", ".TIFF"])
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


def test_files_that_are_not_read_are_told(tmp_path):
    write_tree(tmp_path, 2)
    for name in ("a.gif", "b.heic", "._c.jpg"):
        (tmp_path / "images" / name).write_bytes(b"")
    Image.new("L", (20, 12)).save(tmp_path / "labels" / "009.png")
    assert pairs_of(tmp_path).notes == ["1 labels have no image (009.png).",
                                        "2 files beside the images were not read, for their suffix (a.gif, b.heic)."]
    for path in (tmp_path / "images").glob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match=r"No image is in .*a.gif, b.heic.*\.webp"):
        pairs_of(tmp_path)


def test_all_missing_labels_are_counted(tmp_path):
    write_tree(tmp_path, 30)
    for i in range(3, 15):
        (tmp_path / "labels" / f"{i:03d}.png").unlink()
    with pytest.raises(DataError, match=r"12 of 30 .*003.png, 004.png, 005.png, 006.png, 007.png and 7 more\): add"):
        pairs_of(tmp_path)


def test_pairs_that_cannot_be(tmp_path):
    write_tree(tmp_path, 2)
    with pytest.raises(DataError, match="007"):
        PairedFolder(tmp_path / "images", None, CITYSCAPES).take(["001", "007"])
    (tmp_path / "labels" / "001.png").rename(tmp_path / "labels" / "001.jpg")
    with pytest.raises(DataError, match=r"1 of 2 images in .*images have no label in .*labels \(001.png\)"):
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
    assert len(seen) == 4
    os.utime(tmp_path / "labels" / "001.png", ns=(1, 1))
    assert ds.fingerprint() in seen, "a copy has other times"
    labels = tmp_path / "labels" / "001.png"
    spoilt = bytearray(labels.read_bytes())
    spoilt[-1] ^= 1
    labels.write_bytes(spoilt)
    seen.add(ds.fingerprint())
    labels.write_bytes(spoilt + b"!")
    assert len(seen | {ds.fingerprint()}) == 6


def test_fingerprint_of_many_files_sees_any_size(tmp_path):
    ds = pairs_of(write_tree(tmp_path, 40))
    before = ds.fingerprint()
    for name in ("images/013.png", "labels/026.png"):
        with open(tmp_path / name, "ab") as file:
            file.write(b"!")
        assert ds.fingerprint() != before
        before = ds.fingerprint()


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
        with pytest.raises(DataError, match="cityscapes, camvid, airsim_nh, folder"):
            open_dataset(spec)
    with pytest.raises(DataError, match="engine, cartoon, camera"):
        open_dataset("streets")
    with pytest.raises(DataError, match="lacks"):
        open_dataset([1, 2])
    with pytest.raises(DataError, match="train, val, test"):
        open_dataset("streets:engine", "training")


def test_paths_without_a_name_are_helped(tmp_path, monkeypatch):
    for spec in (tmp_path, str(tmp_path), f"{tmp_path}/nowhere"):
        with pytest.raises(DataError, match=f"write folder:{spec}"):
            open_dataset(spec)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tree(tmp_path / "mine", 20)
    assert len(open_dataset("folder:~/mine", "train")) == 14
    monkeypatch.setenv("MLAN_DATA", "~")
    (tmp_path / "mine").rename(tmp_path / "folder")
    assert len(open_dataset("folder", "val")) == 3


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
    monkeypatch.setattr(streets, "_SCENES", {})
    monkeypatch.setattr(streets, "_ROOM", 3 * 4 * 32 * 32)
    monkeypatch.setattr(streets, "draw_street", lambda *scene: drawn.append(scene[1]) or draw_street(*scene))
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
    monkeypatch.setattr(streets, "_SCENES", {})
    monkeypatch.setattr(streets, "_LITTLE", 0)
    ds = Streets("camera", "val", size=(32, 32), n=4)
    ds.draw(workers=2)
    assert [scene[1] for scene in streets._SCENES] == [0, 1, 2, 3]
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


# Real data


@pytest.mark.data
def test_real_splits_are_disjoint(mlan_data):
    for name in ("camvid", "airsim_nh"):
        stems = [s for split in SPLITS for s in open_dataset(name, split).stems]
        assert len(stems) == len(set(stems))
