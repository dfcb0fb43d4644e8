"Evaluation against oracles that others wrote, degenerate sets, native sizes."
import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix as sklearn_matrix
from sklearn.metrics import jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex

from mlan.evaluation import (SYNTHIA_13, Scores, class_iou, confusion_matrix, evaluate, mean_iou, predict_labels)

IGNORE = 255
NAMES = ("road", "sidewalk", "building", "wall", "sky")


def random_maps(seed, n_classes, true=None, predicted=None, ignored=.2):
    "A batch of maps that hold only the given classes."
    rng = np.random.default_rng(seed)
    labels = rng.choice(list(true or range(n_classes)), (3, 24, 31))
    guess = rng.choice(list(predicted or range(n_classes)), labels.shape)
    prediction = np.where(rng.random(labels.shape) < .5, labels, guess)
    return torch.tensor(prediction), torch.tensor(np.where(rng.random(labels.shape) < ignored, IGNORE, labels))


CASES = {
    "random": dict(n_classes=19),
    "two classes": dict(n_classes=2),
    "one class": dict(n_classes=1),
    "a class absent from the truth": dict(n_classes=5, true=(0, 1, 2, 3)),
    "a class absent from both": dict(n_classes=5, true=(0, 2, 3), predicted=(0, 2, 3)),
    "nothing ignored": dict(n_classes=7, ignored=0),
    "nearly all ignored": dict(n_classes=7, ignored=.99),
    "one true class": dict(n_classes=4, true=(2,)),
}


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_against_scikit_learn(case, seed):
    n_classes = CASES[case]["n_classes"]
    prediction, labels = random_maps(seed, **CASES[case])
    kept = labels != IGNORE
    matrix, ids = confusion_matrix(prediction, labels, n_classes), list(range(n_classes))
    np.testing.assert_array_equal(matrix, sklearn_matrix(labels[kept], prediction[kept], labels=ids))
    theirs = 100 * jaccard_score(labels[kept], prediction[kept], average=None, labels=ids, zero_division=0)
    there = (matrix.sum(0) + matrix.sum(1) > 0).numpy()
    np.testing.assert_allclose(class_iou(matrix)[there], theirs[there])
    assert class_iou(matrix)[~there].isnan().all()
    assert mean_iou(matrix) == pytest.approx(theirs[there].mean())


@pytest.mark.parametrize("case", [c for c in CASES if c != "one class"])
def test_against_torchmetrics(case):
    n_classes = CASES[case]["n_classes"]
    prediction, labels = random_maps(7, **CASES[case])
    theirs = MulticlassJaccardIndex(n_classes, average="macro", ignore_index=IGNORE)
    for p, t in zip(prediction, labels):
        theirs.update(p[None], t[None])
    ours = mean_iou(confusion_matrix(prediction, labels, n_classes))
    assert ours == pytest.approx(100 * theirs.compute().item(), abs=1e-4)


def test_all_ignored_has_no_score():
    scores = Scores(confusion_matrix(torch.zeros(4, 4), torch.full((4, 4), IGNORE), 5), NAMES)
    assert scores.matrix.sum() == 0 and math.isnan(scores.miou)
    assert set(scores.per_class.values()) == {None} and json.loads(json.dumps(scores.record()))["miou"] is None
    assert "-" in repr(scores) and "-" in scores._repr_markdown_()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_any_integer_type_and_no_pixel_at_all(dtype):
    prediction, labels = random_maps(0, 19)
    expected = confusion_matrix(prediction, labels, 19)
    torch.testing.assert_close(confusion_matrix(prediction.to(dtype), labels.to(dtype), 19), expected)
    assert confusion_matrix(torch.zeros(0, dtype=dtype), torch.zeros(0, dtype=dtype), 3).shape == (3, 3)


@pytest.mark.parametrize("prediction, labels, message", [
    ([0, 5], [0, 0], "prediction holds the id 5"), ([0, -1], [0, 0], "prediction holds the id -1"),
    ([0, 255], [0, 255], "prediction holds the id 255"), ([0, 0], [0, 7], "labels holds the id 7"),
    ([0, 0], [0, -1], "labels holds the id -1"), ([0, 0, 0], [0, 0], "resize"),
])
def test_ids_that_do_not_fit(prediction, labels, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(torch.tensor(prediction), torch.tensor(labels), 5)


def test_synthia_13():
    from mlan.streets import CITYSCAPES_CLASSES
    sixteen = [c for c in CITYSCAPES_CLASSES if c not in ("terrain", "truck", "train")]
    assert [c for c in sixteen if c not in ("wall", "fence", "pole")] == list(SYNTHIA_13)
    matrix = torch.randint(1, 50, (16, 16))
    iou = dict(zip(sixteen, class_iou(matrix).tolist()))
    assert mean_iou(matrix, sixteen, SYNTHIA_13) == pytest.approx(np.mean([iou[c] for c in SYNTHIA_13]))
    with pytest.raises(ValueError, match="terrain"):
        mean_iou(matrix, sixteen, ("terrain",))
    with pytest.raises(ValueError, match="subset"):
        mean_iou(matrix, subset=SYNTHIA_13)


class Set:
    "Label maps with images whose red channel is the class, at any sizes; raw ids are the class + 10."
    labelled = True

    def __init__(self, sizes):
        rng = np.random.default_rng(0)
        self.maps = [np.kron(rng.integers(0, 5, (h // 8, w // 8)), np.ones((8, 8))).astype(np.uint8) for h, w in sizes]

    def __len__(self):
        return len(self.maps)

    def image(self, i):
        return np.repeat(self.maps[i][..., None] * 50, 3, axis=2)

    def labels(self, i):
        return self.maps[i] + 10


LUT = np.full(256, IGNORE, np.uint8)
LUT[10:15] = range(5)
SIZES = [(64, 128), (64, 128), (32, 48), (80, 40), (64, 128)]


def reader(images):
    "Reads the class from the red channel."
    return -(images[:, :1] * 255 - torch.arange(5).view(1, 5, 1, 1) * 50).abs()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_every_label_counts_at_its_own_size(batch_size):
    scores = evaluate(reader, Set(SIZES), LUT, NAMES, (64, 128), batch_size=batch_size)
    assert scores.matrix.sum() == sum(h * w for h, w in SIZES) and scores.classes == NAMES
    assert evaluate(reader, Set(SIZES[:2]), LUT, 5, (64, 128), batch_size=batch_size).miou == 100
    torch.testing.assert_close(scores.matrix, evaluate(reader, Set(SIZES), LUT, 5, (64, 128), batch_size=3).matrix)


def test_unscored_ids_are_ignored():
    lut = LUT.copy()
    lut[12] = IGNORE
    data = Set(SIZES[:2])
    scores = evaluate(reader, data, lut, NAMES, (64, 128))
    assert scores.matrix[2].sum() == 0 and scores.matrix.sum() == sum((m != 2).sum() for m in data.maps)


def test_logits_are_resized_before_argmax():
    def columns(weak):  # four pixels between a strong first class and a weak second one
        return predict_labels(torch.tensor([[[3., 0.]], [[0., weak]]]), (1, 4)).tolist()
    assert columns(.8) == [[0, 0, 0, 1]]  # argmax first, or nearest, would give 0 0 1 1
    assert columns(1.2) == [[0, 0, 1, 1]]  # align_corners would give 0 0 0 1


class Broken(Set):
    labelled = False


@pytest.mark.parametrize("predict, data, message", [
    (reader, Broken(SIZES), "no labels"), (torch.nn.Conv2d(3, 5, 1), Set(SIZES), "training mode"),
    (lambda x: reader(x)[:, :3], Set(SIZES), "expected"), (lambda x: reader(x).argmax(1), Set(SIZES), "before argmax"),
    (lambda x: reader(x) / 0, Set(SIZES), "NaN"),
])
def test_what_cannot_be_scored(predict, data, message):
    with pytest.raises(ValueError, match=message):
        evaluate(predict, data, LUT, NAMES, (64, 128))


def test_evaluate_leaves_a_module_alone():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 1), torch.nn.BatchNorm2d(5)).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    evaluate(net, Set(SIZES), LUT, NAMES, (64, 128))
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, before[key])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_matrix_on_a_gpu():
    prediction, labels = random_maps(0, 19)
    there = confusion_matrix(prediction.cuda(), labels.cuda(), 19)
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), confusion_matrix(prediction, labels, 19))
    on_gpu = evaluate(lambda x: reader(x.cpu()).cuda(), Set(SIZES), LUT, NAMES, (64, 128), device="cuda")
    torch.testing.assert_close(on_gpu.matrix, evaluate(reader, Set(SIZES), LUT, NAMES, (64, 128)).matrix)
