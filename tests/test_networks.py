"What an extractor must give, and the check that nothing remembers."

import pytest
import torch
from torch import nn

from mlan.networks import Extractor, Normalise, Segmenter, SmallExtractor, check_extractor


class Chain(Extractor):
    "Everything that could remember a pass: statistics, random numbers, a mode of its own."
    channels, middle_channels = 6, 4

    def __init__(self):
        super().__init__()
        self.normalise = Normalise((0.5,) * 3, (0.25,) * 3)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.Sequential(nn.Dropout(0.5), nn.Conv2d(4, 6, 3, 2, 1)))


class Noisy(Chain):
    "Draws in evaluation mode too."

    def forward(self, images):
        return super().forward(images) + torch.randn(())


def gives(levels, called=None, channels=6, middle_channels=4):
    "An extractor by what it gives, whatever the image."
    net = Chain()
    net.channels, net.middle_channels, net.levels = channels, middle_channels, lambda images: levels
    net.forward = lambda images: levels[1] if called is None else called
    return net


def maps(*shapes): return tuple(s and torch.zeros(s) for s in shapes)


def test_random_weights_of_the_small_extractor_are_drawn_in_their_order():
    torch.manual_seed(1)
    net = SmallExtractor()
    torch.manual_seed(1)
    convolutions = [nn.Conv2d(a, b, 3, bias=False) for a, b in 8 * [(64, 64)] + [(3, 32), (32, 64)]]      # the blocks come first
    ours = [m for m in net.body[4:].modules() if isinstance(m, nn.Conv2d)] + [net.body[0][0], net.body[2][0]]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(ours, convolutions, strict=True))


@pytest.mark.parametrize("train", [True, False])
def test_the_small_extractors_middle_goes_into_its_last_block(train):
    net, images, seen = SmallExtractor().train(train), torch.rand(2, 3, 40, 56), []
    net.body[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    middle, features = net.levels(images)
    assert middle.shape == (2, net.middle_channels, 10, 14) and features.shape == (2, net.channels, 10, 14)
    assert torch.equal(middle, seen[0]) and not torch.equal(middle, features)
    if not train:
        assert torch.equal(net(images), features) and torch.equal(net.body(net.normalise(images)), features)


def test_a_segmenter_takes_any_extractor():
    net = Chain()
    segmenter = Segmenter(net, 5)
    assert [b.dilation[0] for b in segmenter.classifier.branches] == [6, 12, 18, 24]
    assert segmenter(torch.rand(2, 3, 64, 96)).shape == (2, 5, 8, 12)
    net.rates = (1, 2)
    assert [b.dilation[0] for b in Segmenter(net, 5).classifier.branches] == [1, 2]


@pytest.mark.parametrize("make", [Chain, Noisy, SmallExtractor])
def test_the_check_leaves_no_trace(make):
    net = make().train()
    net.body[1].eval()                                                          # one part frozen, the rest training
    before, modes = {k: v.clone() for k, v in net.state_dict().items()}, [m.training for m in net.modules()]
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert check_extractor(net, "x") is net
    assert torch.equal(torch.rand(4), expected)
    assert modes == [m.training for m in net.modules()] and False in modes
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_check_that_fails_leaves_no_trace_either():
    net = Noisy().train()
    net.channels, state = 7, torch.get_rng_state()
    with pytest.raises(ValueError, match="says channels 7"):
        check_extractor(net, "x")
    assert net.training and torch.equal(torch.get_rng_state(), state) and net.body[1].num_batches_tracked == 0


@pytest.mark.parametrize("net, told", [
    (object(), "x is no extractor"),
    (nn.Conv2d(3, 8, 1), "x is no extractor"),
    (gives(maps((1, 4, 32, 48), (1, 5, 16, 24))), r"channels 6 .* gives levels \(1, 4, 32, 48\) and \(1, 5, 16, 24\)"),
    (gives(maps((1, 3, 32, 48), (1, 6, 16, 24))), "middle_channels 4"),
    (gives(maps(None, (1, 6, 16, 24))), "gives levels None and"),
    (gives(maps((1, 4, 32, 48), (1, 6, 16, 24)), middle_channels=None), "middle_channels None"),
    (gives(maps((1, 4, 32, 48), (1, 6, 16, 24))), None),
    (gives(maps((1, 4, 32, 48), (2, 6, 16, 24))), "channels 6"),                                    # another batch
    (gives(maps((1, 4, 32, 48), (1, 6))), "channels 6"),                                            # pooled away
    (gives(maps((1, 4, 32, 48), (1, 6, 1, 1))), "channels 6"),
    (gives(maps(None, (1, 24, 16, 6)), channels=24, middle_channels=None), "channels 24"),          # the image turned
    (gives(maps((1, 4, 32, 48), (1, 6, 16, 24)), called=torch.zeros(1, 6, 8, 12)), r"called, it gives \(1, 6, 8, 12\)"),
    (gives(None), "fails on an image of 128 x 192"),
])
def test_what_breaks_its_word_is_refused_with_what_is_needed(net, told):
    if told is None:
        assert check_extractor(net, "x") is net
        return
    with pytest.raises(ValueError, match=told + ".*; an extractor is an nn.Module with `channels` and a method `levels"):
        check_extractor(net, "x")


def test_a_plain_module_gets_what_it_did_not_say():
    class Plain(nn.Conv2d):
        channels = 5
        def levels(self, images): return None, self(images)

    net = check_extractor(Plain(3, 5, 8, 8).double(), "x")
    assert (net.rates, net.middle_channels, net.style) == ((6, 12, 18, 24), None, None)
    net = Plain(3, 5, 8, 8)
    net.rates = (1, 2)
    assert check_extractor(net, "x").rates == (1, 2)
