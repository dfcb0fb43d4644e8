"Label spaces against SciPy's connected components and tables written by hand."

import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from mlan.label_spaces import (
    AIRSIM_NH,
    CAMVID,
    CITYSCAPES,
    SYNTHIA16,
    DataError,
    LabelSpace,
    merged_groups,
    shared_classes,
)
from mlan.label_spaces import CITYSCAPES_CLASSES, CITYSCAPES_COLORS, IGNORE

SPACES = (CITYSCAPES, SYNTHIA16, CAMVID, AIRSIM_NH)


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
