"The built-in streets: the same on every machine, disjoint by split and seed, one scene at any size, clear errors."
import hashlib

import numpy as np
import pytest

from mlan.label_spaces import CITYSCAPES_CLASSES, CITYSCAPES_COLORS
from mlan.streets import DOMAINS, SPLITS, draw_street

# of the image and of the labels, by domain/split/index/size
SUMS = {'camera/test/2/96x160': ['2b6ec39e139724879b7e7337f5ecc921a9e032c545b9c803a22fdc75ffc7074d',
                          'c63af0ce12b13d21f3156b5fa932f359ec1a8cfaf55ed60cf42fc549d5d61667'],
 'camera/train/0/64x128': ['8fc475351a6f86497bbef15bd66ade180021ffdbd2512ce928d4e8e1746a5ce2',
                           '8607f3158f859f69b00e46f7c630e39ec8bd62f72da45a3f6bca3a60b641cc99'],
 'camera/val/5/64x128': ['502d6690cb554731c88b102efac16da0d1f492d5969d3c4368a7045f71d3abe4',
                         '190e5deebeffa25ed0c8a0f7c5c20ab73102397b79909361ab6522526bc3a5f2'],
 'cartoon/test/2/96x160': ['717713b81ab294571d8d91a6eee9fdbed1a38221353640e0f9ac3a6a841da6c5',
                           '0f9dda1eec35f3ce424d30470f78650ba5388b04bc2cb0f5be6028c11fec48fc'],
 'cartoon/train/0/64x128': ['80ab70a3a0a980ea719530df55dda96d6d6e45e87be0baf95255bb747683fb26',
                            '6733bf996cfcd6e4c7b740234fdec39aaa9fdeef7f4a2057cf875c3ac689a18d'],
 'cartoon/val/5/64x128': ['01f420d937c6d1d0a5167c3e165c11d8f7bc868cfa92d7a68c3d6880f85750d8',
                          '133f2cc7cc753c53c6e852356621ea7f0652d294c86d117176a4ee1ad07d1b9a'],
 'engine/test/2/96x160': ['32c45f4e4782601578fed0d67844febbf334612a8dc8f8a3bb97070b3318e88d',
                          '53d1eefe561653d87f774e9c49c4b899bcab46558c96d7ebb5914d9a031f6667'],
 'engine/train/0/64x128': ['f1e6243202d732a84f8a5be701879d77dc22e9437844f88a4820ae686f7ccf4b',
                           'f37b1107f37708f1280607e6a367d46f93082e62877139af49b5c8d371fa9deb'],
 'engine/val/5/64x128': ['21a14a2a1566d14dfddcb758db87c474f89d65a4bbb02930fc5fc08f433118ef',
                         '4d09b6a2aec36993c263d5a1567fcf55efcf0b365ca0757515bee563bda67cb3']}


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
