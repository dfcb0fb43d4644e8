"The control that sees the target's labels, the local critic, and what tells whether a map can matter."

import pytest
import torch
from few import PAIR, few
from torch import nn
from torch.testing import assert_close

from mlan.co_regularized_al import AlignmentSettings, CoRegularizedAL, error_map, regularized_entropy, regularized_image
from mlan.image_al import image_alignment_map
from mlan.lab import Lab, training
from mlan.methods import make_setup
from mlan.networks import Segmenter
from mlan.objective import Flow
from mlan.pairs import open_pair
from mlan.region_al import region_entropy_map, region_logits
from mlan.samples import Share, Stream
from mlan.study.map_gradients import cosines
from mlan.views import _Finish


class Tiny(nn.Module):
    channels, rates, middle_channels = 6, (1, 2, 3, 4), None

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 3, 2, 1)

    def levels(self, images):
        return None, self.layer(images)


@pytest.mark.parametrize("pooling", ["resize", "local"])
def test_the_true_error_weighs_both_games(pooling):
    torch.manual_seed(0)
    net = Segmenter(Tiny(), 4)
    settings = AlignmentSettings(critic_width=4, map_weights="error", pooling=pooling, lambda_ent=1.0, lambda_image=1.0)
    al = CoRegularizedAL(6, (5, 5, 5), (8, 16, 32), Tiny.rates, settings)
    labels = torch.randint(0, 4, (2, 32, 64))
    labels[:, :3] = 255
    flow = Flow(net, torch.rand(2, 3, 32, 64), labels)
    error = error_map(flow, (4, 8))
    predicted = nn.functional.interpolate(flow.logits, (32, 64), mode="bilinear").argmax(1)
    cell = labels[1, 8:16, 16:24], predicted[1, 8:16, 16:24]
    assert error[1, 1, 2] == pytest.approx((cell[0] != cell[1]).float().mean().item()) and not error.requires_grad
    rim = labels[0, 3:8, :8] != predicted[0, 3:8, :8]                       # three of eight rows are void, and don't count
    assert error[0, 0, 0] == pytest.approx(rim.float().mean().item())
    maps = [region_entropy_map(level, 0.5) for level in region_logits(al.region_classifiers, flow.features, al.grids(flow))]
    terms, answer = al.target_losses(flow, 0.5)
    assert_close(terms["entropy"], -regularized_entropy(maps, error, "normalised"))
    assert_close(terms["image"], regularized_image(image_alignment_map(answer), error, "normalised"))
    assert answer.shape[2:] == ((3, 3) if pooling == "resize" else (16, 32))


def test_the_row_that_sees_the_truth_says_so_and_keeps_the_target_s_colours(tmp_path):
    setup = make_setup(*PAIR, "cr_al", **few("cr_al", map_weights="error", jitter=1.0, flip=0.5, pooling="local"))
    seen = []

    class Noting(Lab):
        def train(self, stage, objective, start, source, target=None, **how):
            seen.append(target)
            return super().train(stage, objective, start, source, target, **how)

    lab = Noting(setup.settings, open_pair(setup.settings), tmp_path)
    trained = setup.recipe(lab)
    assert lab.seen == "truth" and all(v.isfinite().all() for v in trained.value["net"].values())
    target = next(view for view in seen if view is not None)
    assert target.samples.labelled and not target.learnt
    assert not _Finish(target, training(lab.s), Share(Stream(16, 3), 0, 1), 0).colours


def test_cosines_of_known_vectors():
    def batch(a, b, c, d):
        values = dict(zip(("plain", "normalised", "shuffled", "error"), map(torch.tensor, (a, b, c, d))))
        return {"entropy": values, "image": values}

    found = cosines([batch([1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]), batch([0.0, 2.0], [0.0, 1.0], [1.0, 0.0], [0.0, -5.0])])
    assert found["image"] == found["entropy"] == {"plain": 1.0, "shuffled": 0.0, "error": -1.0, "batches": 0.0}
    assert cosines([batch([1.0], [1.0], [1.0], [1.0])])["image"]["batches"] is None
