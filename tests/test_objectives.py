"A small step moves each term of each objective the way its paper says: E one way, C_region and the critics the other."

import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from mlan.class_mix import ClassMix, MixSettings
from mlan.co_regularized_al import AlignmentSettings, CoRegularizedAL
from mlan.fourier import FourierObjective, robust_entropy
from mlan.image_al import domain_loss, image_alignment_map
from mlan.networks import Segmenter, SmallExtractor, freeze_batch_norm, resize
from mlan.objective import At, Flow, Objective, Supervised, passed_on
from mlan.output_games import VIEWS, MinEntObjective, OutputGame, OutputGameSettings, OutputWeights, entropy_loss, self_information
from mlan.region_al import region_entropy_map, region_logits
from mlan.trainer import Step, Training, optimisers

CLASSES, PATCHES = 5, (8, 16, 32)
TINY = Training(steps=10, lr=1e-2, schedule=10, batch=3, momentum=0.0, weight_decay=0.0, head_lr=1.0, critic_lr=1e-2, ramp=0)


def batch(labelled=True, size=(32, 64)):
    "A source and a target batch; without labels nothing is said of them by cross-entropy."
    g = torch.Generator().manual_seed(1)
    images, other = torch.rand(3, 3, *size, generator=g), torch.rand(3, 3, *size, generator=g).square()
    labels = torch.randint(0, CLASSES, (3, *size), generator=g) if labelled else torch.full((3, *size), 255)
    regions = [torch.randint(0, 6, (3, size[0] // p, size[1] // p), generator=g) for p in PATCHES]
    regions = regions if labelled else [r.fill_(255) for r in regions]
    return images, labels, regions, other


@dataclass
class Scene:
    "A net, an objective, and what flows."
    net: Segmenter
    objective: Objective
    data: tuple
    pseudo: torch.Tensor | None = None

    def flows(self, i=0):
        images, labels, regions, other = self.data
        beside = {} if self.pseudo is None else {"pseudo": self.pseudo}
        return Flow(self.net, images, labels, regions=regions), Flow(self.net, other, **beside)

    def parts(self):
        "{who: parameters}: what can move."
        heads, critics = (getattr(self.objective, n, None) for n in ("heads", "critics"))
        return {name: list(m.parameters()) if m else [] for name, m in (
            ("E", self.net.extractor), ("C_seg", self.net.classifier), ("heads", heads), ("critics", critics))}

    def step(self, who):
        "A short step of the trainer in which one of them moves; how much it moved."
        parts = self.parts()
        for name, parameters in parts.items():
            for p in parameters:
                p.requires_grad_(who in (name, "critics") or name == "critics")
        before, still = [p.detach().clone() for p in parts[who]], who == "critics"
        Step(self.net, self.objective, self.flows, replace(TINY, lr=0.0 if still else 30.0, critic_lr=1e-3 * still, clip_norm=7e-4))(0)
        return sum((p - b).abs().sum() for p, b in zip(parts[who], before)).item()


def scene(make, labelled=False, **beside):
    "The objective on a net whose answers are not flat."
    torch.manual_seed(0)
    net = freeze_batch_norm(Segmenter(SmallExtractor(), CLASSES))
    nn.init.normal_(net.classifier.branches[0].weight, std=0.3)
    made = Scene(net, make(net), batch(labelled), **beside)
    for p in made.objective.parameters():                         # heads with an opinion
        if p.ndim == 4:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return made


def game(net, **settings):
    weights = dict(lambda_region=1.0, lambda_ent=1.0, lambda_image=1.0, critic_width=4, map_weights="normalised")
    e = net.extractor
    return CoRegularizedAL(e.channels, (6, 6, 6), PATCHES, e.rates, AlignmentSettings(**{**weights, **settings}))


# ------------------------------------------------------------------------------------------------ the quantities of the papers

def taken_for(domain, logits):
    "Cross-entropy of a critic's logits with 1 for source, 0 for target."
    return nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, domain))


def entropies(logits):
    "Of each place, in [0, 1], by PyTorch's own."
    return torch.distributions.Categorical(logits=logits.movedim(1, -1)).entropy() / math.log(logits.shape[1])


def wrong(logits, labels):
    "Mean cross-entropy at the labels' size, by PyTorch's own."
    return nn.functional.cross_entropy(nn.functional.interpolate(logits, labels.shape[1:], mode="bilinear"), labels, ignore_index=255)


@torch.no_grad()
def cross_entropy(s):
    source, _ = s.flows()
    return wrong(source.logits, source.labels).item()


@torch.no_grad()
def relation_loss(s):
    source, _ = s.flows()
    logits = region_logits(s.objective.region_classifiers, source.features, s.objective.grids(source))
    return sum(nn.functional.cross_entropy(*both, ignore_index=255) for both in zip(logits, source.beside["regions"])).item()


@torch.no_grad()
def region_entropy(s):
    "Mean entropy of C_region on the target."
    _, target = s.flows()
    logits = region_logits(s.objective.region_classifiers, target.features, s.objective.grids(target))
    return sum(entropies(level).mean() for level in logits).item()


@torch.no_grad()
def passing_for_source(s):
    "-log C_image on the target: small where the target passes for source."
    _, target = s.flows()
    return taken_for(1.0, s.objective.domain_classifier(target.features)).item()


@torch.no_grad()
def critic_loss(s):
    source, target = s.flows()
    critic = s.objective.domain_classifier
    return (taken_for(1.0, critic(source.features)) + taken_for(0.0, critic(target.features))).item()


@torch.no_grad()
def target_entropy(s):
    return entropies(s.objective.outputs(s.flows()[1])[0]).mean().item()


@torch.no_grad()
def fooled(s, which=0):
    "-log D of the target's answers."
    view = s.objective.view(s.objective.outputs(s.flows()[1])[which])
    return taken_for(1.0, s.objective.critics[which](view)).item()


@torch.no_grad()
def output_critic_loss(s, which=0):
    answers = [s.objective.critics[which](s.objective.view(s.objective.outputs(flow)[which])) for flow in s.flows()]
    return sum(taken_for(*both) for both in zip((1.0, 0.0), answers)).item()


@torch.no_grad()
def robust(s):
    return (entropies(s.flows()[1].logits) ** 4).mean().item()


@torch.no_grad()
def pseudo_loss(s):
    return wrong(s.flows()[1].logits, s.pseudo.long()).item()


@torch.no_grad()
def mixed_loss(s):
    "Of the mixture of step 0, which is the same each time."
    images, labels, weights, _ = s.objective.mixed(*s.flows(), At(0))
    each = nn.functional.cross_entropy(resize(s.net(images), labels.shape[1:]), labels, ignore_index=255, reduction="none")
    return (weights * each).mean().item()


RL, IL = dict(image="none", entropy="plain", region=False), dict(entropy="none", image="plain", region=False)
OUTPUT = dict(lambda_main=1.0, lambda_aux=0.0, lambda_seg_aux=0.0)
PSEUDO = torch.randint(0, CLASSES, (3, 32, 64), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
MIX = MixSettings(alpha=1.0, sure=0.0, mix_jitter=0.0)
MOVES = {  # objective, are there labels, who moves, what is measured, and which way the paper wants it
    "L_seg: E": (Supervised, True, "E", cross_entropy, -1),
    "L_seg: C_seg": (Supervised, True, "C_seg", cross_entropy, -1),
    "L_region: E": (partial(game, entropy="none", image="none"), True, "E", relation_loss, -1),
    "L_region: C_region": (partial(game, entropy="none", image="none"), True, "heads", relation_loss, -1),
    "L_ent: E makes regions sure": (partial(game, **RL), False, "E", region_entropy, -1),
    "L_ent: C_region makes them unsure": (partial(game, **RL), False, "heads", region_entropy, 1),
    "L^r_ent: E": (partial(game, region=False, entropy="regularized", image="none"), False, "E", region_entropy, -1),
    "L^r_ent: C_region": (partial(game, region=False, entropy="regularized", image="none"), False, "heads", region_entropy, 1),
    "L_image: E": (partial(game, **IL), False, "E", passing_for_source, -1),
    "L_image: C_image tells": (partial(game, **IL), False, "critics", critic_loss, -1),
    "L^r_image: E": (partial(game, region=False, entropy="none", image="regularized"), False, "E", passing_for_source, -1),
    "MinEnt: E": (partial(MinEntObjective, weights=OutputWeights(**OUTPUT)), False, "E", target_entropy, -1),
    "MinEnt: C_seg": (partial(MinEntObjective, weights=OutputWeights(**OUTPUT)), False, "C_seg", target_entropy, -1),
    **{f"{view}: {who}{rest}": (partial(OutputGame, settings=OutputGameSettings(**OUTPUT, view=view, critic_width=4)), False, who, it, way)
       for view in VIEWS for who, rest, it, way in (
           ("E", "", fooled, -1), ("C_seg", "", fooled, -1), ("critics", " tell", output_critic_loss, -1))},
    "FDA's entropy: E": (partial(FourierObjective, weight=1.0, eta=2.0), False, "E", robust, -1),
    "FDA's pseudo labels: E": (partial(FourierObjective, weight=0.0, eta=2.0), False, "E", pseudo_loss, -1),
    "DACS: E": (partial(ClassMix, settings=MIX, seed=0), False, "E", mixed_loss, -1),
    "DACS: C_seg": (partial(ClassMix, settings=MIX, seed=0), False, "C_seg", mixed_loss, -1),
}


@pytest.mark.parametrize("size", ["together", "apart"])
@pytest.mark.parametrize("name", MOVES)
def test_a_small_step_moves_the_term_as_the_paper_says(name, size):
    "Both where the two domains go through E in one pass and where each goes alone."
    make, labelled, who, measure, way = MOVES[name]
    s = scene(make, labelled, pseudo=PSEUDO if "pseudo" in name else None)
    if size == "apart":
        s.data = (*s.data[:3], s.data[3][..., :48])
        s.pseudo = None if s.pseudo is None else s.pseudo[..., :48]
    before, moved = measure(s), s.step(who)
    assert moved > 0 and way * (measure(s) - before) > 1e-6, (before, measure(s))


# ------------------------------------------------------------------------------------------------ what no gradient goes through

def gradient(term, net):
    found = torch.autograd.grad(term, list(net.extractor.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(found, net.extractor.parameters())])


@pytest.mark.parametrize("term, weigher", [("entropy", "M_image"), ("image", "M_region")])
def test_a_map_weighs_the_other_game_and_is_not_moved_by_it(term, weigher):
    "Eq. 8 and 9: E's gradient is the one with the map as a constant."
    s = scene(partial(game, region=False, entropy="regularized", image="regularized"))
    al, _, target = s.objective, *s.flows()
    terms, answer = al.target_losses(target, 0.0)
    region, image = (m.detach() for m in al.maps(target))
    logits = region_logits(al.region_classifiers, target.features, al.grids(target), reverse=True)
    maps = [region_entropy_map(level, 0.0) for level in logits]
    if term == "entropy":
        weights = [resize(image[:, None], m.shape[1:])[:, 0] for m in maps]
        by_hand = -torch.stack([(m * w / w.mean()).mean() for m, w in zip(maps, weights)]).mean()
    else:
        alignment = image_alignment_map(al.domain_classifier(target.features))
        by_hand = (resize(alignment[:, None], region.shape[1:])[:, 0] * region / region.mean()).mean()
    assert_close(terms[term], by_hand, rtol=1e-4, atol=1e-6)
    assert_close(gradient(terms[term], s.net), gradient(by_hand, s.net), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in MOVES if n.startswith(("L_image: E", "L^r_image", "softmax: E", "self-information: E"))])
def test_critics_are_not_moved_by_what_e_wants(name):
    s = scene(MOVES[name][0])
    critics = s.parts()["critics"]
    before = [p.detach().clone() for p in critics]
    Step(s.net, s.objective, s.flows, replace(TINY, critic_lr=0.0))(0)
    assert all(torch.equal(p, b) for p, b in zip(critics, before))


def test_the_critic_sees_the_features_that_e_had_and_moves_no_e():
    "With E's learning rate zero, a step moves the critic alone, and by the gradient of its own loss."
    s = scene(partial(game, **IL))
    (critic, e), before = (s.parts()[n] for n in ("critics", "E")), [p.detach().clone() for p in s.parts()["E"]]
    source, target = s.flows()
    loss = domain_loss(*(s.objective.domain_classifier(f.features.detach()) for f in (source, target)))
    expected = torch.autograd.grad(loss, critic)
    step = Step(s.net, s.objective, s.flows, replace(TINY, lr=0.0))
    seen = {}
    step.judge.register_step_pre_hook(lambda optimiser, *_: seen.update(g=[p.grad.clone() for p in optimiser.param_groups[0]["params"]]))
    step(0)
    for got, wanted in zip(seen["g"], expected):
        assert_close(got, wanted, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(p, b) for p, b in zip(e, before))


def test_a_teacher_follows_after_the_step_and_takes_no_gradient():
    s = scene(partial(ClassMix, settings=replace(MIX, alpha=0.75), seed=0), labelled=True)
    teacher, states = s.objective.teacher, []
    assert not list(s.objective.parameters())
    step = Step(s.net, s.objective, s.flows, replace(TINY, frozen_norm=False))
    for i in range(6):
        old = [v.clone() for v in teacher.buffers()]
        step(i)
        alpha = min(1 - 1 / (i + 1), 0.75)
        for mine, theirs, was in zip(teacher.buffers(), s.net.state_dict().values(), old):
            wanted = alpha * was + (1 - alpha) * theirs if was.is_floating_point() else theirs
            assert_close(mine, wanted, rtol=1e-4, atol=1e-6)
        states.append(old)
    assert not torch.equal(states[0][0], states[-1][0])


def test_a_mixture_is_the_source_where_its_classes_are_pasted_and_the_teachers_elsewhere(monkeypatch):
    monkeypatch.setattr("mlan.class_mix.strongly_augmented", lambda images, *_: images)
    s = scene(partial(ClassMix, settings=replace(MIX, sure=0.3), seed=0), labelled=True)
    source, target = s.flows()
    images, labels, weights, sure = s.objective.mixed(source, target, At(0))
    pasted = (images == source.images).all(1)
    answer = resize(s.net(target.images), target.size).softmax(1)
    assert pasted.any() and not pasted.all() and 0 < sure < 1
    assert_close(sure, (answer.max(1)[0] >= 0.3).float().mean())                        # the teacher is the network yet
    assert torch.equal(images, torch.where(pasted[:, None], source.images, target.images))
    assert torch.equal(labels, torch.where(pasted, source.labels, answer.argmax(1)))
    assert_close(weights, torch.where(pasted, 1.0, sure))                               # by the share of sure pixels
    for mask, truth in zip(pasted, source.labels):                                      # whole classes, half of them, none that is ignored
        chosen, there = set(truth[mask].tolist()), set(truth.unique().tolist()) - {255}
        assert chosen <= there and len(chosen) == (len(there) + 1) // 2 and torch.equal(mask, torch.isin(truth, torch.tensor([*chosen])))


def test_a_loss_that_is_passed_on_keeps_its_factor():
    x = torch.randn(3, 4, requires_grad=True)
    leaf = (2 * x).detach().requires_grad_()
    (3 * passed_on(leaf.square().sum(), leaf, 2 * x)).backward()
    assert_close(x.grad, 3 * 2 * 2 * leaf.detach()), assert_close(passed_on(leaf.square().sum(), leaf, 2 * x), leaf.square().sum())


def test_entropies_are_those_of_pytorch():
    logits = 3 * torch.randn(2, CLASSES, 5, 7)
    h = entropies(logits)
    assert_close(self_information(logits).sum(1), h), assert_close(entropy_loss(logits), h.mean())
    assert_close(robust_entropy(logits, 2.0), ((h ** 2 + 1e-8) ** 2).mean())
    assert_close(robust_entropy(logits, 0.5), h.mean(), rtol=1e-3, atol=1e-4)
    assert_close(region_entropy_map(logits, 0.0), h)
    assert_close(region_entropy_map(logits, 0.5), (h - 0.5 * h.mean((1, 2), keepdim=True)).clamp(min=0))


def test_the_two_outputs_have_weights_of_their_own():
    made = scene(partial(OutputGame, settings=OutputGameSettings(lambda_main=2.0, lambda_aux=5.0, critic_width=4)))
    assert [v.item() for v in made.objective.weighted([torch.tensor(1.0)] * 2, 0.5, "x").values()] == [1.0, 2.5]
    assert [*made.objective.weighted([0, 0], 1.0, "fool")] == ["fool", "fool_aux"]


# ------------------------------------------------------------------------------------------------ optimisers

def test_critics_have_adam_with_the_betas_of_their_training():
    s = scene(partial(game, **IL))
    _, judge = optimisers(s.net, s.objective, replace(TINY, betas=(0.6, 0.7)))
    assert judge.param_groups[0]["betas"] == (0.6, 0.7)
    assert optimisers(s.net, s.objective, TINY)[1].param_groups[0]["betas"] == (0.9, 0.99)       # the paper's
    learn, _ = optimisers(s.net, s.objective, replace(TINY, optimiser="adam", betas=(0.6, 0.7)))
    assert learn.param_groups[0]["betas"] == (0.6, 0.7)


@pytest.mark.parametrize("optimiser, kind", [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_every_part_has_one_optimiser(optimiser, kind):
    s = scene(game)
    learn, judge = optimisers(s.net, s.objective, replace(TINY, optimiser=optimiser, head_lr=3.0, momentum=0.4, weight_decay=0.2))
    owned = [[id(p) for p in group["params"]] for group in (*learn.param_groups, *judge.param_groups)]
    of = {name: {id(p) for p in parameters} for name, parameters in s.parts().items()}
    assert type(learn) is kind and [set(group) for group in owned] == [of["E"], of["C_seg"] | of["heads"], of["critics"]]
    assert [g["factor"] for g in learn.param_groups] == [1.0, 3.0]
    if optimiser == "sgd":
        assert (learn.param_groups[0]["momentum"], learn.param_groups[0]["weight_decay"]) == (0.4, 0.2)


@pytest.mark.parametrize("shape, rates", [("poly", (1.0, 0.5 ** 0.9)), ("linear", (1.0, 1.0))])
def test_every_part_learns_at_its_rate(shape, rates):
    s = scene(game, labelled=True)
    step = Step(s.net, s.objective, s.flows, replace(TINY, lr=0.01, head_lr=3.0, critic_lr=0.2, schedule=8, shape=shape))
    for i, rate in zip((0, 4), rates):
        step(i)
        lrs = [g["lr"] for g in (*step.learn.param_groups, *step.judge.param_groups)]
        assert lrs == pytest.approx([0.01 * rate, 0.03 * rate, 0.2 * rate])


def test_only_e_and_the_heads_are_clipped():
    s = scene(game, labelled=True)
    seen = []
    step = Step(s.net, s.objective, s.flows, replace(TINY, clip_norm=1e-3))
    for part in (step.learn, step.judge):
        part.register_step_pre_hook(lambda optimiser, *_: seen.append(torch.cat(
            [p.grad.flatten() for group in optimiser.param_groups for p in group["params"]]).norm().item()))
    step(0)
    assert seen[0] == pytest.approx(1e-3, rel=1e-3) and seen[1] > 1e-2
