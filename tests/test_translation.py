"Regularized translation (Eq. 12): who is moved by what, limits of the map, oracles and misuse."
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from mlan.translation import (Generator, PatchCritic, TranslationPair, TranslationSettings, adversarial_term,
                              critic_losses, critic_term, edge_agreement, generator_losses, weighted_mean)

TERMS = {
    "adversarial_source": {"target_to_source"},
    "adversarial_target": {"source_to_target"},
    "cycle": {"source_to_target", "target_to_source"},
    "identity": {"source_to_target", "target_to_source"},
    "source_critic": {"source_critic"},
    "target_critic": {"target_critic"},
}


def make_pair(seed=0, **settings):
    "A pair whose generators are no longer the identity, so that gradients reach all of their layers."
    torch.manual_seed(seed)
    pair = TranslationPair(TranslationSettings(width=6, critic_width=6, **settings))
    for generator in pair.heads:
        nn.init.normal_(generator.decoder[0].weight, std=0.05)
    return pair


@pytest.fixture
def images():
    g = torch.Generator().manual_seed(0)
    return torch.rand(3, 3, 16, 32, generator=g), torch.rand(3, 3, 16, 32, generator=g) * 0.5 + 0.3


@pytest.fixture
def maps():
    return torch.rand(3, 4, 8, generator=torch.Generator().manual_seed(1)) * 2


@pytest.mark.parametrize("weigh_critic", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("term", TERMS)
def test_each_term_moves_exactly_its_networks(term, weighted, weigh_critic, images, maps):
    pair = make_pair(lambda_identity=1.0, weigh_critic=weigh_critic)
    maps = maps if weighted else None
    {**generator_losses(pair, *images, maps), **pair.critic_losses(*images, maps)}[term].backward()
    for name, module in pair.named_children():
        for label, p in module.named_parameters():
            reached = p.grad is not None and bool(p.grad.abs().sum() > 0)
            if name not in TERMS[term]:
                assert p.grad is None, f"{term} reached {name}.{label}"
            elif label.endswith("weight"):
                assert reached, f"{term} did not reach {name}.{label}"


def test_all_parameters_are_trainable_after_losses(images):
    pair = make_pair()
    generator_losses(pair, *images)
    pair.critic_losses(*images)
    assert all(p.requires_grad for p in pair.parameters())


def test_optimisers_split_the_parameters():
    pair = make_pair()
    split = [{id(p) for m in side for p in m.parameters()} for side in (pair.heads, pair.critics)]
    assert not split[0] & split[1]
    assert split[0] | split[1] == {id(p) for p in pair.parameters()}


def test_first_step_leaves_the_identity(images):
    torch.manual_seed(0)
    pair = TranslationPair()
    sum(generator_losses(pair, *images).values()).backward()
    for generator in pair.heads:
        assert generator.decoder[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("weigh_critic", [False, True])
def test_ones_are_plain(weigh_critic, images):
    pair, ones = make_pair(lambda_identity=1.0, weigh_critic=weigh_critic), torch.ones(3, 4, 8)
    for losses in (generator_losses, critic_losses):
        plain, weighted = losses(pair, *images), losses(pair, *images, ones)
        assert plain.keys() == weighted.keys()
        for name in plain:
            assert_close(weighted[name], plain[name])


def test_zero_map_silences_one_term_only(images):
    pair, zeros = make_pair(lambda_identity=1.0), torch.zeros(3, 4, 8)
    plain, silent = generator_losses(pair, *images), generator_losses(pair, *images, zeros)
    assert silent["adversarial_source"] == 0 < plain["adversarial_source"]
    for name in plain.keys() - {"adversarial_source"}:
        assert_close(silent[name], plain[name])
    silent["adversarial_source"].backward()
    assert all(p.grad is None or not p.grad.any() for p in pair.parameters())


def test_map_weighs_the_critic_only_on_request(images, maps):
    plain, letter = make_pair(), make_pair(weigh_critic=True)
    assert_close(plain.critic_losses(*images, maps), plain.critic_losses(*images))
    weighted, unweighted = letter.critic_losses(*images, maps), letter.critic_losses(*images)
    assert not torch.isclose(weighted["source_critic"], unweighted["source_critic"])
    assert_close(weighted["target_critic"], unweighted["target_critic"])


def test_a_map_belongs_to_its_image(images, maps):
    pair = make_pair()
    order = [2, 0, 1]
    together = generator_losses(pair, *images, maps)["adversarial_source"]
    assert_close(generator_losses(pair, images[0], images[1][order], maps[order])["adversarial_source"], together)
    assert not torch.isclose(generator_losses(pair, images[0], images[1][order], maps)["adversarial_source"], together)


def test_weighted_mean_equals_a_loop_and_is_linear_in_the_map(maps):
    values = torch.rand(3, 8, 16)
    loop = sum((v * F.interpolate(m[None, None], v.shape, mode="bilinear", align_corners=False)[0, 0]).sum()
               for v, m in zip(values, maps)) / values.numel()
    assert_close(weighted_mean(values, maps), loop)
    assert_close(weighted_mean(values, 3 * maps), 3 * loop)
    assert_close(weighted_mean(values[:, :4, :8], torch.ones(3, 32, 64)), values[:, :4, :8].mean())


def test_weighted_term_against_finite_differences():
    logits = torch.randn(2, 1, 6, 5, dtype=torch.float64, requires_grad=True)
    maps = torch.rand(2, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: adversarial_term(z, maps), logits)
    assert torch.autograd.gradcheck(lambda z: critic_term(z.flip(0), z, maps), logits)


def test_generator_gradient_against_finite_differences():
    torch.manual_seed(0)
    pair = make_pair().double()
    source, target = torch.rand(1, 3, 8, 8).double(), torch.rand(1, 3, 8, 8).double()
    maps = torch.rand(1, 2, 2).double()
    value = lambda: generator_losses(pair, source, target, maps)["adversarial_source"]  # noqa: E731
    weight = pair.target_to_source.decoder[0].weight
    gradient, = torch.autograd.grad(value(), weight)
    direction = torch.randn_like(weight)
    with torch.no_grad():
        weight += 1e-6 * direction
        up = value()
        weight -= 2e-6 * direction
        down = value()
    assert_close((up - down) / 2e-6, (gradient * direction).sum(), rtol=1e-5, atol=1e-9)


def test_map_is_a_constant(images):
    pair = make_pair(weigh_critic=True)
    maps = torch.rand(3, 4, 8, requires_grad=True)
    sum({**generator_losses(pair, *images, maps), **pair.critic_losses(*images, maps)}.values()).backward()
    assert maps.grad is None


def test_critic_step_lowers_its_loss_and_separates(images):
    pair = make_pair()
    adam = torch.optim.Adam([p for m in pair.critics for p in m.parameters()], 1e-3)

    def separation():
        with torch.no_grad():
            fake = pair.target_to_source(images[1])
            return (pair.source_critic(images[0]).mean() - pair.source_critic(fake).mean()).item()

    before, apart = sum(pair.critic_losses(*images).values()).item(), separation()
    generators = [p.clone() for m in pair.heads for p in m.parameters()]
    for _ in range(5):
        adam.zero_grad()
        sum(pair.critic_losses(*images).values()).backward()
        adam.step()
    assert sum(pair.critic_losses(*images).values()).item() < before
    assert separation() > apart
    for p, q in zip(generators, (p for m in pair.heads for p in m.parameters())):
        assert torch.equal(p, q)


def test_generator_step_fools_the_critic(images):
    pair = make_pair()
    critics = torch.optim.Adam([p for m in pair.critics for p in m.parameters()], 1e-3)
    for _ in range(10):
        critics.zero_grad()
        sum(pair.critic_losses(*images).values()).backward()
        critics.step()
    adam = torch.optim.Adam(pair.target_to_source.parameters(), 1e-3)
    verdict = lambda: pair.source_critic(pair.target_to_source(images[1])).mean().item()  # noqa: E731
    before = verdict()
    for _ in range(5):
        adam.zero_grad()
        generator_losses(pair, *images)["adversarial_source"].backward()
        adam.step()
    assert verdict() > before


@pytest.mark.parametrize("size", [(64, 128), (33, 71), (9, 10), (8, 8)])
def test_any_size(size):
    pair = make_pair(lambda_identity=1.0)
    source, target = torch.rand(2, 3, *size), torch.rand(2, 3, *size)
    assert pair.translate(source).shape == source.shape
    assert PatchCritic(4)(source).shape == (2, 1, size[0] // 4, size[1] // 4)
    terms = {**generator_losses(pair, source, target, torch.rand(2, 3, 3)), **pair.critic_losses(source, target)}
    assert all(t.ndim == 0 and t.isfinite() for t in terms.values())


def test_generator_starts_as_the_identity_and_stays_in_range():
    generator, some = Generator(8), torch.rand(1, 3, 16, 16)
    x = torch.cat([some, torch.zeros_like(some), torch.ones_like(some)])
    assert torch.equal(generator(x), x)
    nn.init.normal_(generator.decoder[0].weight, std=10.0)
    assert 0 <= generator(x).min() and generator(x).max() <= 1
    nn.init.zeros_(generator.decoder[0].weight)
    nn.init.ones_(generator.decoder[0].bias)
    assert (generator(x) > x)[:2].all()  # black can leave black


def train_briefly(seed, images, steps=2):
    torch.manual_seed(seed)
    pair = TranslationPair(TranslationSettings(width=6, critic_width=6))
    sides = [[p for m in side for p in m.parameters()] for side in (pair.heads, pair.critics)]
    adams = [torch.optim.Adam(side, 1e-3) for side in sides]
    for _ in range(steps):
        for adam, losses in zip(adams, (generator_losses, critic_losses)):
            adam.zero_grad()
            sum(losses(pair, *images).values()).backward()
            adam.step()
    return pair.translate(images[0])


def test_a_seed_gives_the_same_translation(images):
    first = train_briefly(3, images)
    assert torch.equal(first, train_briefly(3, images))
    assert not torch.equal(first, train_briefly(4, images))
    assert not torch.equal(first, images[0])


def test_translate_in_batches_restores_the_mode(images):
    pair = make_pair().train()
    whole = pair.translate(images[0])
    assert pair.training and not whole.requires_grad
    assert_close(pair.translate(images[0], batch_size=2), whole)
    assert_close(whole, pair.source_to_target(images[0]))
    assert not pair.eval().translate(images[0]).requires_grad and not pair.training


def test_state_survives_saving(images, tmp_path):
    pair = make_pair()
    torch.save(pair.state_dict(), tmp_path / "pair.pt")
    other = make_pair(seed=9)
    other.load_state_dict(torch.load(tmp_path / "pair.pt", weights_only=True))
    assert torch.equal(other.translate(images[0]), pair.translate(images[0]))


def test_edge_agreement_sees_movement_not_colour(images):
    x = images[0]
    assert_close(edge_agreement(x, x * 0.3 + 0.4), torch.ones(3), atol=1e-4, rtol=0)
    assert edge_agreement(x, x.roll(1, -1)).max() < 0.8
    flat = torch.full_like(x, 0.5)
    assert edge_agreement(x, flat).abs().max() < 1e-3  # an image without edges agrees with nothing, and is no nan


@pytest.mark.parametrize("shape", [(2, 4, 8), (4, 8), (3, 1, 4, 8)])
def test_wrong_maps_are_refused(shape, images):
    with pytest.raises(ValueError, match="one consistency map for each target image"):
        generator_losses(make_pair(), *images, torch.rand(*shape))


def test_bytes_are_refused(images):
    with pytest.raises(ValueError, match="divide by 255"):
        make_pair().translate((images[0] * 255).byte())
