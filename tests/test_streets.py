"The built-in streets: the same on every machine, disjoint by split and seed, one scene at any size, clear errors."
import hashlib

import numpy as np
import pytest

from mlan import materials
from mlan.label_spaces import CITYSCAPES_CLASSES, CITYSCAPES_COLORS
from mlan.painter import Dice
from mlan.scenes import draw_scene
from mlan.streets import DOMAINS, SPLITS, draw_street

# of the image and of the labels, by domain/split/index/size
SUMS = {'camera/test/2/96x160': ['a2593338e90612d998b62bab5c2320ba38283e29eb5752dcf81955dd229e14d8',
                          '0e0eb255e9815f7fd9c8f8033d6dfe658100d5d310602dee969c3e7df4fbf77d'],
 'camera/train/0/64x128': ['88e9efb71a87a2121e46c87ae8512b9a83213cfdbd27b0723821db10be15e41c',
                           '8e0256e5c9f6193fd3315b68f2993530bfa7df935a306247d62ca940b38237f3'],
 'camera/val/5/64x128': ['113b41db35bda3dc524c55b6b636368ebd6d43355e929496a440288b528af082',
                         'f664936a4ad8b33361fd3fb18cf86299ce0c2cb1440b0f2b576f9ca55e48d495'],
 'cartoon/test/2/96x160': ['6383e64ce1eb04ec0cc672600c7334f22d55ce05041d770a5cc4c0c7ee9bd5ad',
                           '5a0a6617a1afef01b1e62bdf12d6acda15be64cf9caa56aaec51d887b3682087'],
 'cartoon/train/0/64x128': ['9684da4c12126bdbe660d3729997b8d5d762e9a2bfa8983373f5c2a2d9aad431',
                            '4db1299ce73ec34427b7b0339d74f0b4d7117a845dacc03ecad6744e5a48235d'],
 'cartoon/val/5/64x128': ['32fe48f667dbc75c7636388c23d11f981db1afcc980c7d2fd50b34acbc7eb65e',
                          '2277c0754c787214bef40f206b65dc90f2048022941856466d381a6c83e7f8bd'],
 'engine/test/2/96x160': ['1bcd8d98125bb0c56f4da01b6d857129a6316da512acd4bf47d9fc86380e941e',
                          '6af3772c6848a7f1abee295be8ecd3a2423525ffda64377716ddd2b10ffcc83d'],
 'engine/train/0/64x128': ['b9306fba617509c71baf052a411d68f997f69245376459211ae279a26dbf7deb',
                           '17df4984ea46af630b6a72a8ceda50807d12fdfaee61c3b3cc004ef437559606'],
 'engine/val/5/64x128': ['1bf27c2baf6a682f7ee237b44ed4c469a6c3cc777398fedecd6888e7ba012ce1',
                         '79d5050de0fdd718dc4a3536f9664a4a81282b12eb402ee234b8aa9234c4a01a']}


@pytest.mark.parametrize("key", SUMS)
def test_checksums(key):
    domain, split, index, size = key.split("/")
    pair = draw_street(domain, int(index), tuple(map(int, size.split("x"))), split)
    assert [hashlib.sha256(a.tobytes()).hexdigest() for a in pair] == SUMS[key]


@pytest.mark.parametrize("domain", DOMAINS)
def test_shapes_types_and_ids(domain):
    image, labels = draw_street(domain, 1, (48, 72))
    assert image.shape == (48, 72, 3) and labels.shape == (48, 72)
    assert image.dtype == labels.dtype == np.uint8
    assert labels.max() < len(CITYSCAPES_CLASSES) and image.flags.c_contiguous


def test_every_call_is_another_street():
    pictures = [draw_street(d, i, (32, 64), split, seed)[0].tobytes()
                for d in DOMAINS for i in range(3) for split in SPLITS for seed in (0, 1)]
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_call_leaves_no_trace(domain):
    first = draw_street(domain, 8)[0]
    np.random.seed(0)
    draw_street(domain, 9)
    np.testing.assert_array_equal(draw_street(domain, 8)[0], first)


def test_classes_of_each_domain():
    missing = {"engine": set(), "camera": set(), "cartoon": {"terrain", "truck", "train"}}
    for domain in DOMAINS:
        for shift in (0., 1.):
            seen = np.unique([draw_street(domain, i, layout_shift=shift)[1] for i in range(60)])
            assert set(CITYSCAPES_CLASSES) - {CITYSCAPES_CLASSES[i] for i in seen} == missing[domain]


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_scene_does_not_depend_on_the_size(domain):
    agree, near = [], []
    for i in range(8):
        (small, labels), (large, fine) = draw_street(domain, i), draw_street(domain, i, (128, 256))
        agree.append((labels == fine[::2, ::2]).mean())
        mean = large.reshape(64, 2, 128, 2, 3).mean((1, 3))
        near.append(np.abs(small - mean).mean())
    assert np.mean(agree) > .93 and np.mean(near) < 12


def test_classes_of_engine_and_camera_are_as_frequent():
    labels = [np.stack([draw_street(d, i)[1] for i in range(100)]).ravel() for d in ("engine", "camera")]
    share = [np.bincount(x, minlength=19) / x.size for x in labels]
    assert np.abs(share[0] - share[1]).sum() / 2 < .1 and min(map(np.min, share)) > .002


def test_hardness_is_the_knob_of_the_gap(monkeypatch):
    engine, foreign = {made for looks in materials.LOOKS["engine"].values() for made, _ in looks}, []
    for hardness in (0., .5, 1.):
        monkeypatch.setattr(materials, "HARDNESS", (hardness, hardness))
        made = [row[4] for i in range(6) for row in draw_scene("camera", (32, 64), Dice(i), 1.).pieces]
        foreign.append(np.mean([m > 1 and m not in engine for m in made]))
    assert foreign[0] == 0 and foreign[1] > .1 and foreign[2] > 1.3 * foreign[1]


def test_layout_shift_moves_the_streets():
    ends = [draw_street("cartoon", 0, layout_shift=t)[1] for t in (0., 1.)]
    assert (ends[0] != ends[1]).mean() > .1
    engine = [draw_street("engine", 0, layout_shift=t)[1] for t in (0., 1.)]
    np.testing.assert_array_equal(*engine)


def test_colours_are_the_official_ones():
    named = dict(zip(CITYSCAPES_CLASSES, map(tuple, CITYSCAPES_COLORS.tolist())))
    assert named["road"] == (128, 64, 128) and named["bicycle"] == (119, 11, 32) and named["sky"] == (70, 130, 180)


@pytest.mark.parametrize("wrong, says", [
    (dict(domain="photo"), "engine, cartoon, camera"), (dict(split="dev"), "train, val, test"),
    (dict(index=-1), "index is -1"), (dict(index=.5), "index is 0.5"), (dict(seed=-1), "seed is -1"),
    (dict(size=(31, 64)), "at least 32"), (dict(size=(64, 31)), "at least 32"),
    (dict(size=(64, 64, 3)), "height, width"),
    (dict(layout_shift=1.5), "layout_shift is 1.5")])
def test_bad_arguments(wrong, says):
    with pytest.raises(ValueError, match=says):
        draw_street(**{"domain": "engine", "index": 0, **wrong})
