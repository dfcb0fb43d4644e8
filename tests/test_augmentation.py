"Augmentation: a function of seed, step and sample; what stands beside an image follows it; which stages and which images have it."

from dataclasses import replace

import numpy as np
import pytest
import torch
from few import PAIR, few

from mlan import loop
from mlan.augmentation import augmented
from mlan.counting import CountingLab
from mlan.lab import Lab, training
from mlan.methods import make_setup
from mlan.multi_level import _labeller
from mlan.pairs import open_pair
from mlan.region_labels import RegionSettings
from mlan.samples import Share, Stream
from mlan.settings import Augmentation
from mlan.views import Draws, _Finish

ALL = dict(jitter=1.0, blur=0.5, flip=0.5, crop=0.7)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    setup = make_setup(*PAIR, "cr_al", **few("cr_al", **ALL))
    return Lab(setup.settings, open_pair(setup.settings), tmp_path_factory.mktemp("stages"))


@pytest.fixture(scope="module")
def aligned(lab):
    "The views of CR-AL's alignment, as its recipe makes them."
    seen = []

    class Noting(type(lab)):
        def train(self, stage, objective, start, source, target=None, **how):
            seen.append((stage, source, target))
            return super().train(stage, objective, start, source, target, **how)

    noting = Noting(lab.s, lab.data, lab.stages)
    make_setup(*PAIR, "cr_al", **few("cr_al", **ALL)).recipe(noting)
    return next(views for stage, *views in seen if stage == "align"), noting


def test_region_labels_are_those_of_the_labels_as_drawn(aligned):
    (source, _), lab = aligned
    kept = next(change for change in source.changes if change[:2] == ("remade", "regions"))
    labeller = _labeller(*(one.value for one in kept[3:5]), kept[5])
    assert isinstance(kept[5], RegionSettings)
    draws, stored = Draws(source, training(lab.s), CPU), Draws(source, replace(training(lab.s), augment=Augmentation()), CPU)
    differ = 0
    for i in range(6):
        _, labels, beside = draws(i)
        for k, level in enumerate(beside["regions"]):
            assert level.dtype == torch.uint8
            for row, y in zip(level, labels):
                np.testing.assert_array_equal(row, labeller(y.to(torch.uint8).numpy())[k])
        differ += any(not torch.equal(a, b) for a, b in zip(beside["regions"], stored(i)[2]["regions"]))
    assert differ == 6
    _, labels, beside = stored(0)                            # and without augmentation those that were made before
    assert all(np.array_equal(row, labeller(y.to(torch.uint8).numpy())[k]) for k, level in enumerate(beside["regions"])
               for row, y in zip(level, labels))


def test_shares_of_two_processes_are_the_batch_of_one(lab):
    "The colour of an image does not depend on who draws it."
    how, stream = training(lab.s), Stream(len(lab.source), 6, 3)

    def batch(rank, count, step=4):
        share = Share(stream, rank, count)
        images, labels = zip(*(lab.source.samples[int(i)] for i in share.indices(step)))
        return _Finish(lab.source, how, share, 3)(step, torch.stack(images), torch.stack(labels).to(torch.uint8))

    whole, parts = batch(0, 1), [batch(rank, 2) for rank in (0, 1)]
    assert all(torch.equal(torch.cat(both), one) for both, one in zip(zip(*(p[:2] for p in parts)), whole[:2]))
    assert not torch.equal(whole[0], batch(0, 1, step=5)[0])


def test_each_of_seed_step_and_sample_changes_what_is_drawn(lab):
    how = training(lab.s)
    one = lab.source.samples[0]

    def drawn(seed=0, step=0, item=0):
        class Same:
            rank, count = 0, 1
            def indices(self, step): return np.array([item])
        return _Finish(lab.source, how, Same(), seed)(step, one[0][None], one[1][None].to(torch.uint8))[0].numpy().tobytes()

    assert len({drawn(), drawn(seed=1), drawn(step=1), drawn(item=1)}) == 4 and drawn() == drawn()


def test_colours_change_where_labels_are_learnt(lab):
    assert lab.source.has_labels and lab.truth.has_labels and not lab.target.has_labels
    how = training(lab.s, augment=Augmentation(jitter=2.0))
    plain = replace(how, augment=Augmentation())
    for view, changes in ((lab.source, True), (lab.truth, True), (lab.target, False)):
        assert torch.equal(Draws(view, how, CPU)(0)[0], Draws(view, plain, CPU)(0)[0]) != changes
    moved = training(lab.s, augment=Augmentation(flip=1.0))  # shapes change in both domains
    assert torch.equal(Draws(lab.target, moved, CPU)(0)[0], Draws(lab.target, plain, CPU)(0)[0].flip(-1))


@pytest.mark.parametrize("method", ["mlan", "fda", "dacs", "oracle", "advent", "cr_al+continued"])
def test_every_stage_but_the_translation_has_it(method):
    "All rows of a table alike; the translation pair learns from images as they are, with maps beside them."
    setup = make_setup(*PAIR, method, **few(method, **ALL))
    counting = CountingLab(setup.settings)
    setup.recipe(counting)
    trained = [p for p in counting.planned if p.how]
    assert len(trained) > 1
    for planned in trained:
        assert planned.how.augment == (Augmentation() if planned.stage == "translation_pair" else Augmentation(**ALL)), planned.stage


@pytest.mark.parametrize("method", ["cr_al+st", "dacs"])
def test_a_run_that_goes_on_sees_what_it_would_have_seen(method, lab, tmp_path, monkeypatch):
    setup = make_setup(*PAIR, method, **few(method, **ALL))
    ends, rows = [], []
    append = loop.append_row

    def stops(path, row):
        append(path, row)
        rows.append(row)
        if len(rows) in (2, 5):
            raise KeyboardInterrupt

    for name in ("whole", "stopped"):
        monkeypatch.setattr(loop, "append_row", stops if name == "stopped" else append)
        while True:
            try:
                ends.append(setup.recipe(Lab(setup.settings, lab.data, tmp_path / name)).value)
                break
            except KeyboardInterrupt:
                pass
    assert len(rows) > 5
    assert all(torch.equal(a, b) for a, b in zip(*(end["net"].values() for end in ends)))


def test_augmented_runs_end_elsewhere(lab, tmp_path):
    "Each of the four settings reaches the training."
    def end(**how):
        setup = make_setup(*PAIR, "source_only", **few("source_only", warmup_steps=1, steps=1, schedule_steps=1, val_every=0, **how))
        net = setup.recipe(Lab(setup.settings, lab.data, tmp_path)).value["net"]
        return float(sum(v.double().sum() for v in net.values()))


    assert len({end(), *(end(**{name: value}) for name, value in ALL.items())}) == 5


def test_nothing_to_change_costs_nothing(lab):
    "A batch is handed on as it is; and where all lies in memory nobody is started to read it."
    images, labels = torch.zeros(2, 3, 32, 64, dtype=torch.uint8), torch.zeros(2, 32, 64, dtype=torch.uint8)
    for how, colours in ((Augmentation(), True), (Augmentation(jitter=1.0, blur=1.0), False)):
        same = augmented(images, labels, how, [(0,), (1,)], colours)
        assert same[0] is images and same[1] is labels
    lab.source.load()
    plain = replace(training(lab.s), augment=Augmentation())
    assert [Draws(lab.source, how, CPU, workers=2).load._loader.num_workers for how in (plain, training(lab.s))] == [0, 2]
