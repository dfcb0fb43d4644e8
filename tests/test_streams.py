"Which samples a step sees: source, target and a continuation each have their own, and a share is the share that was asked for."

import numpy as np
import pytest
import torch
from few import PAIR, few, noted

import mlan.lab
from mlan.counting import CountingLab
from mlan.files import save_whole
from mlan.lab import Lab, training
from mlan.methods import make_setup
from mlan.objective import Objective
from mlan.pairs import open_pair
from mlan.views import Draws, Kept


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    setup = make_setup(*PAIR, "cr_al+continued", **few("cr_al+continued"))
    return Lab(setup.settings, open_pair(setup.settings), tmp_path_factory.mktemp("stages"))


def drawn(view, how, steps=8, **more):
    "The samples of some steps, in their order."
    draws = Draws(view, how, torch.device("cpu"), **more)
    return [draws.share.indices(how.first + i).tolist() for i in range(steps)]


def test_source_and_target_draw_from_streams_of_their_own(lab):
    "As many samples in both: the same stream would show the same positions."
    same = lab.target.samples.__class__(lab.data.source.ds, (32, 64))
    target = lab.target.__class__(same, "other", lab.target.stream)
    how = training(lab.s)
    assert len(target) == len(lab.source) and drawn(lab.source, how) != drawn(target, how)
    assert drawn(lab.source, how) == drawn(lab.source, how)
    assert drawn(lab.source, how) != drawn(lab.source, training(lab.s, seed=1))
    assert drawn(lab.source, how) != drawn(lab.source, training(lab.s, streams=2)) != drawn(target, training(lab.s, streams=2))


def test_two_views_of_one_domain_draw_from_two_streams(lab, monkeypatch):
    class Both(Objective):
        def __init__(self, net): super().__init__()
        def losses(self, source, target, at): yield {"seg": source.logits.square().mean() + target.logits.square().mean()}

    with noted(mlan.lab, "Draws") as made:
        lab.train("both", Both, lab.fresh, lab.target, lab.target.beside(), steps=1)
    (first, *_, a, _), (second, *_, b, _) = made
    assert a != b and drawn(first, training(lab.s), stream=a) != drawn(second, training(lab.s), stream=b)


def test_a_seed_never_gives_the_stream_of_another(lab):
    "Four streams a seed: source, target, and those two of the translation pair."
    streams = [drawn(view, training(lab.s, seed=seed, streams=streams)) for seed in (0, 1, 2) for streams in (0, 2)
               for view in (lab.source, lab.source.__class__(lab.source.samples, "x", 1))]
    assert len({str(s) for s in streams}) == len(streams)


def test_the_continuation_goes_on_with_the_stream(lab):
    "It begins where the alignment ended, and not with the alignment's first batches again."
    setup = make_setup(*PAIR, "cr_al+continued", **few("cr_al+continued"))
    with noted(mlan.lab, "train_loop") as loops:
        setup.recipe(lab)
    hows = {str(prefix.name).partition("-")[0]: step.how for step, _, prefix, *_ in loops}
    assert hows["align"].first == 0 and hows["continued"].first == setup.settings.steps == hows["align"].steps
    assert hows["continued"].steps == setup.recipe.self_training_steps and hows["continued"].ramp == 0
    assert hows["continued"].lr == setup.recipe.self_training_lr
    ratio = setup.recipe.self_training_lr / setup.settings.lr
    assert hows["continued"].critic_lr == pytest.approx(setup.settings.critic_lr * ratio)


@pytest.fixture
def black(lab, tmp_path):
    "Every source image in a style of its own: black."
    path = tmp_path / "black.npy"
    np.save(path, np.zeros((len(lab.source), 3, 32, 64), np.uint8))
    return Kept("black", path)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_so_many_of_the_images_are_styled(share, lab, black):
    draws, seen = Draws(lab.source.styled(black, share), training(lab.s), torch.device("cpu")), []
    for i in range(200):
        images, labels, _ = draws(i)
        seen += (images.flatten(1).amax(1) == 0).tolist()
        assert torch.equal(labels, lab.source.batch(draws.share.indices(i))[1])          # labels stay
    assert np.mean(seen) == pytest.approx(share, abs=0.05) and (share in (0, 1)) == (len({*seen}) == 1)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_method_passes_its_share_on(share, lab, tmp_path):
    "translated_share 0.25 is a quarter in target style, not three quarters."
    for method in ("cr_al+it", "fda"):
        setup = make_setup(*PAIR, method, **few(method, translated_share=share))
        counting = CountingLab(setup.settings)
        setup.recipe(counting)
        last = next(p for p in counting.planned if p.stage == "align_translated")
        (_, _, of_images), = [change for change in last.views[0].changes if change[0] == "images"]
        assert of_images == share


def test_weights_are_there_each_time_a_view_is_drawn(lab, tmp_path):
    save_whole(torch.tensor([1.0] + [0.0] * (len(lab.source) - 1)), tmp_path / "w.pt")
    view = lab.source.sampled(Kept("w", tmp_path / "w.pt"))
    for _ in range(2):
        assert {*sum(drawn(view, training(lab.s)), [])} == {0}
