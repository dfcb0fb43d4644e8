"Evaluation against oracles that others wrote, degenerate sets, native sizes; reading ahead, shards, and a device that is not asked."
import json
import math
import threading
import time

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix as sklearn_matrix
from sklearn.metrics import jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex

import mlan.evaluation as evaluation
from mlan.evaluation import SYNTHIA_13, Scores, class_iou, confusion_matrix, evaluate, mean_iou, network_input, predict_labels

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
    from mlan.label_spaces import CITYSCAPES_CLASSES
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


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_shards_add_up(world, batch_size):
    whole = evaluate(coarse_reader, Set(SIZES), LUT, NAMES, (32, 64))
    parts = [evaluate(coarse_reader, Set(SIZES), LUT, NAMES, (32, 64), batch_size=batch_size, shard=(rank, world)) for rank in range(world)]
    assert whole.miou < 100 and torch.equal(sum(parts[1:], parts[0]).matrix, whole.matrix)
    pixels = [sum(h * w for h, w in SIZES[rank::world]) for rank in range(world)]
    assert [part.matrix.sum().item() for part in parts] == pixels and parts[0].matrix.dtype == torch.int64


def coarse_reader(images):
    "The same at a quarter of the size, so that borders are wrong."
    return torch.nn.functional.avg_pool2d(reader(images), 4)


def plain_matrix(data, size):
    "One image after the other, as a reader would write it."
    total = torch.zeros(5, 5, dtype=torch.int64)
    for i in range(len(data)):
        logits = coarse_reader(network_input(data.image(i), size)[None])
        labels = torch.tensor(LUT[data.labels(i)])
        full = torch.nn.functional.interpolate(logits, size=labels.shape, mode="bilinear")
        total += confusion_matrix(full[0].argmax(0), labels, 5)
    return total


@pytest.mark.parametrize("how", [{}, dict(batch_size=1), dict(batch_size=3, threads=1), dict(threads=16), dict(batch_size=64)])
def test_equals_the_plain_loop(how, monkeypatch):
    expected = plain_matrix(Set(SIZES), (32, 64))
    assert torch.equal(evaluate(coarse_reader, Set(SIZES), LUT, NAMES, (32, 64), **how).matrix, expected)
    monkeypatch.setattr(evaluation, "_AT_ONCE", 1)  # the least memory: a label map at a time
    assert torch.equal(evaluate(coarse_reader, Set(SIZES), LUT, NAMES, (32, 64), **how).matrix, expected)


def test_the_network_gets_the_pixels_of_training_in_order():
    data, seen = Set(SIZES), []
    evaluate(lambda x: seen.append(x.clone()) or reader(x), data, LUT, NAMES, (24, 40), batch_size=2)
    assert [len(x) for x in seen] == [2, 2, 1]
    assert torch.equal(torch.cat(seen), torch.stack([network_input(data.image(i), (24, 40)) for i in range(5)]))


class Watched(Set):
    "Notes which images were read, and by which thread."
    def __init__(self, n):
        super().__init__([(16, 32)])
        self.n, self.read, self.threads = n, [], set()

    def __len__(self):
        return self.n

    def image(self, i):
        self.read.append(i)
        self.threads.add(threading.get_ident())
        return super().image(0)

    def labels(self, i):
        return super().labels(0)


def test_reads_ahead_but_not_too_far():
    data, ahead = Watched(40), []

    def predict(images):
        "The network of batch k is not done before batch k + 1 has been read: a reader that waited for it would never be."
        wanted, give_up = min(40, 2 * (len(ahead) + 2)), time.time() + 20
        while len(data.read) < wanted and time.time() < give_up:
            time.sleep(.001)
        time.sleep(.01)
        ahead.append(len(data.read) - 2 * (len(ahead) + 1))
        assert len(data.read) >= wanted
        return reader(images)

    evaluate(predict, data, LUT, NAMES, (16, 32), batch_size=2, threads=4)
    assert sorted(data.read) == list(range(40)) and threading.get_ident() not in data.threads
    assert max(ahead) <= 8  # four batches beyond the one that is scored, at most


def test_the_device_is_asked_nothing_until_the_end():
    "On the device `meta` no tensor has a value, so whoever asks for one fails."
    calls = []

    def predict(images):
        calls.append(images.device.type)
        return torch.empty(len(images), 5, 8, 16, device="meta")

    with pytest.raises((RuntimeError, NotImplementedError)):
        evaluate(predict, Set(SIZES), LUT, NAMES, (32, 64), batch_size=2, device="meta")
    assert calls == ["meta"] * 3


def test_a_file_that_cannot_be_read_stops_the_count():
    class Torn(Watched):
        def labels(self, i):
            if i == 7:
                raise OSError("image file is truncated: 7.png")
            return super().labels(i)

    with pytest.raises(OSError, match="7.png"):
        evaluate(reader, Torn(12), LUT, NAMES, (16, 32), batch_size=2)


def test_labels_of_another_type_and_stray_ids():
    class Wide(Watched):
        def labels(self, i):
            return super().labels(i).astype(np.int64)

    with pytest.raises(ValueError, match=r"labels\(0\) of the data set are int64, expected uint8"):
        evaluate(reader, Wide(2), LUT, NAMES, (16, 32))
    stray = LUT.copy()
    stray[Set([(16, 32)]).labels(0).max()] = 9
    with pytest.raises(ValueError, match="turns the id 1[0-4] into 9, expected 0 to 4 or 255"):
        evaluate(reader, Watched(2), stray, NAMES, (16, 32))
    stray[:] = 77
    stray[10:15] = range(5)
    assert evaluate(reader, Watched(2), stray, NAMES, (16, 32)).miou == 100  # ids that do not occur may be anything
    with pytest.raises(TypeError, match="batchsize"):
        evaluate(reader, Watched(2), LUT, NAMES, (16, 32), batchsize=2)
    for shard in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="0 <= rank < world"):
            evaluate(reader, Watched(2), LUT, NAMES, (16, 32), shard=shard)


def test_predict_labels_of_a_batch():
    logits = torch.randn(3, 5, 7, 9)
    batch = predict_labels(logits, (20, 31))
    assert batch.shape == (3, 20, 31) and batch.dtype == torch.int64
    assert all(torch.equal(predict_labels(each, (20, 31)), guess) for each, guess in zip(logits, batch))
    ties = predict_labels(torch.zeros(5, 2, 2), (4, 4))
    assert torch.equal(ties, torch.zeros(4, 4, dtype=torch.int64))  # the first of equals, as argmax has it


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
