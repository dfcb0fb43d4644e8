"Diagnosis against oracles: regions, rank correlations, precision; a whole run; what must be refused; what must not be kept."
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import mannwhitneyu, rankdata
from sklearn.metrics import precision_score

from mlan.consistency_map import ConsistencyMaps
from mlan.lab import Lab
from mlan.methods import make_setup
from mlan.pairs import open_pair
from mlan.region_labels import class_histogram, region_grid
from mlan.run_folder import load_pictures, picture_rows, save_pictures
from mlan.samples import Samples
from mlan.self_training import label_target
from mlan.streets import Streets
from mlan.study.diagnosis import (
    add_photographs, figure_4, map_figure, pseudo_label_figure, relation_figure, relation_shares, without_photographs)
from mlan.study.examination import (
    Examination, critic_curve, diagnose, error_agreement, error_curve, examine, label_quality, map_report, prediction_measures,
    pseudo_label_rows, region_index, region_mean, region_measures, trained_alignment)
from mlan.views import View

FEW = dict(size=(32, 64), target_size=(32, 64), n_source=40, n_target=16, n_val=4, n_test=12, min_samples=3, warmup_steps=20, steps=6,
           schedule_steps=6, ramp_steps=2, critic_width=4, batch_size=3, translation_steps=3, translation_width=4, translation_batch=2,
           self_training_steps=4, portions=(0.35,), log_every=2, val_every=3, device="cpu")
PAIR = ("streets:engine", "streets:camera")


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


def walked(method, stages):
    "A lab with which the recipe was called, and the network."
    own = make_setup(*PAIR, method).values
    setup = make_setup(*PAIR, method, **{name: value for name, value in FEW.items() if name in own})
    lab = Lab(setup.settings, open_pair(setup.settings), stages)
    return lab, lab.bench.net(setup.recipe(lab))


def beside(lab, **changes):
    "The same lab on other data."
    other = Lab(lab.s, replace(lab.data, **changes), lab.stages)
    other.made = lab.made
    return other


@pytest.fixture(scope="module")
def cr_al(stages):
    return walked("cr_al", stages)


@pytest.fixture(scope="module")
def seen(cr_al):
    return examine(cr_al[0])


def maps_of(values):
    "Maps whose M_multi is given."
    values = torch.as_tensor(values, dtype=torch.float32)
    return ConsistencyMaps(values, torch.ones(len(values), 3, 3), values)


# regions

@pytest.mark.parametrize("size, grid", [((32, 64), (4, 8)), ((8, 8), (1, 1)), ((6, 9), (6, 9))])
def test_region_mean_is_average_pooling_where_tiles_are_whole(size, grid):
    values = torch.rand(3, *size)
    kernel = size[0] // grid[0], size[1] // grid[1]
    torch.testing.assert_close(region_mean(values, grid).float(), F.avg_pool2d(values[:, None], kernel)[:, 0])


@pytest.mark.parametrize("size, patch", [((37, 50), 8), ((720, 1280), 32), ((33, 65), 32), ((90, 47), 16)])
def test_regions_are_those_that_region_labels_are_made_on(size, patch):
    grid = region_grid(size, patch)
    index = region_index(size, grid).numpy()
    assert index.max() == grid[0] * grid[1] - 1 and len(np.unique(index)) == grid[0] * grid[1]
    part = np.where(index < 255, index, 255).astype(np.uint8)
    shares = class_histogram(part, patch, 255)[:255]
    inside = shares[np.arange(len(shares)), np.arange(len(shares))]
    assert (inside > (1 - 2 / patch) ** 2).all()                # but for a pixel at the rim


def test_sums_over_regions_are_sums_over_pixels():
    values, kept = torch.rand(2, 31, 45), torch.rand(2, 31, 45) > .3
    means = region_mean(values, (4, 6), kept)
    index = region_index((31, 45), (4, 6))
    counts = torch.stack([torch.bincount(index[k], minlength=24).view(4, 6) for k in kept])
    torch.testing.assert_close((means * counts).sum(), (values * kept).double().sum())


def test_what_is_ignored_counts_neither_way():
    logits, labels = torch.randn(4, 5, 16, 16), torch.randint(5, (4, 16, 16))
    ignored = torch.rand(labels.shape) < .4
    ignored[0, :8, :8] = True                                   # a whole region
    labels[ignored] = 255
    once = prediction_measures(logits, labels, (2, 2))
    other = torch.where(ignored[:, None], torch.randn_like(logits), logits)
    again = prediction_measures(other, labels, (2, 2))
    np.testing.assert_array_equal(once["error"], again["error"])
    assert once["error"][0, 0, 0].isnan() and once["error"].isnan().sum() == 1
    wrong = (logits.argmax(1) != labels)[1, 8:, :8][~ignored[1, 8:, :8]]
    assert once["error"][1, 1, 0].item() == pytest.approx(wrong.float().mean().item())
    assert not once["entropy"].isnan().any()


def test_logits_meet_the_labels_at_the_labels_size():
    logits = torch.randn(2, 4, 8, 16)
    labels = F.interpolate(logits, (32, 64), mode="bilinear", align_corners=False).argmax(1)
    assert (prediction_measures(logits, labels, (4, 8))["error"] == 0).all()


# ranks

def random_measures(seed, shape=(9, 4, 6)):
    rng = np.random.default_rng(seed)
    error = rng.random(shape).round(2)                           # with ties
    error[rng.random(shape) < .2] = np.nan
    error[3] = np.nan                                            # an image without labels
    doubt = np.nan_to_num(error) + rng.random(shape)
    return rng.random(shape) + .5 * np.nan_to_num(error) + .3 * doubt, error, doubt


def correlation(*columns):
    return np.corrcoef(np.stack([rankdata(c) for c in columns]))[0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_agreement_against_ranks_by_hand(seed):
    values, error, doubt = random_measures(seed)
    result, known = error_agreement(values, error, doubt), ~np.isnan(error)
    assert result["regions"] == pytest.approx(correlation(values[known], error[known]))
    images = [i for i in range(len(error)) if known[i].any()]
    assert len(images) == 8
    assert result["within"] == pytest.approx(np.mean([correlation(values[i][known[i]], error[i][known[i]]) for i in images]))
    between = ([m[i][known[i]].mean() for i in images] for m in (values, error))
    assert result["between"] == pytest.approx(correlation(*between))
    m, e = values[known], error[known]
    bad = e > np.median(e)
    u = mannwhitneyu(m[bad], m[~bad]).statistic
    assert result["auc"] == pytest.approx(u / bad.sum() / (~bad).sum())


@pytest.mark.parametrize("seed", range(4))
def test_partial_correlation_against_residuals(seed):
    values, error, doubt = random_measures(seed)
    known = ~np.isnan(error)
    m, e, h = (rankdata(x[known]) for x in (values, error, doubt))
    base = np.stack([h, np.ones_like(h)], 1)
    left = [x - base @ np.linalg.lstsq(base, x, rcond=None)[0] for x in (m, e)]
    assert error_agreement(values, error, doubt)["beyond_entropy"] == pytest.approx(np.corrcoef(left)[0, 1])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values, error", [(np.ones((3, 2, 2)), np.random.rand(3, 2, 2)), (np.random.rand(3, 2, 2), np.zeros((3, 2, 2))),
                                           (np.random.rand(1, 1, 1), np.random.rand(1, 1, 1)),
                                           (np.random.rand(2, 2, 2), np.full((2, 2, 2), np.nan))])
def test_what_is_undefined_is_none_and_nothing_warns(values, error):
    result = error_agreement(values, error, values)
    assert result["regions"] is result["within"] is result["between"] is result["beyond_entropy"] is None


def test_between_needs_more_than_hard_images_and_within_more_than_hard_regions():
    rng = np.random.default_rng(0)
    hardness, pattern = rng.random((20, 1, 1)), rng.random((20, 4, 4))
    pattern /= pattern.mean((1, 2), keepdims=True)
    error, doubt = hardness * pattern, rng.random((20, 4, 4))
    image = error_agreement(hardness + 1e-6 * rng.random(error.shape), error, doubt)
    region = error_agreement(pattern, error, doubt)
    assert image["between"] > .99 and abs(image["within"]) < .25
    assert region["within"] > .99 and abs(region["between"]) < .6


def test_a_curve_does_not_depend_on_the_order_of_ties():
    rng = np.random.default_rng(1)
    values, error = rng.integers(0, 4, 100).astype(float), rng.random(100)
    order = rng.permutation(100)
    np.testing.assert_allclose(error_curve(values, error), error_curve(values[order], error[order]))
    assert error_curve(error, error) == sorted(error_curve(error, error))
    assert np.mean(error_curve(values, error)) == pytest.approx(error.mean())
    assert len(error_curve(np.arange(3.), np.arange(3.))) == 3   # fewer regions than bins


# pseudo labels

def test_label_quality_against_scikit_learn():
    rng = np.random.default_rng(0)
    truth, given = rng.integers(0, 6, (4, 20, 30)), rng.integers(0, 7, (4, 20, 30))
    truth[rng.random(truth.shape) < .2], given[rng.random(truth.shape) < .4] = 255, 255
    result = label_quality(torch.tensor(given, dtype=torch.uint8), torch.tensor(truth, dtype=torch.uint8), 7)
    both = (truth != 255) & (given != 255)
    precision = precision_score(truth[both], given[both], labels=range(7), average=None, zero_division=0)
    np.testing.assert_allclose(result["class_accuracy"], precision, rtol=1e-6)
    np.testing.assert_allclose(result["class_coverage"][:6], [(given[truth == c] != 255).mean() for c in range(6)], rtol=1e-6)
    np.testing.assert_allclose(result["class_share"], [(given == c).mean() for c in range(7)], rtol=1e-6)
    assert math.isnan(result["class_coverage"][6])                # no such pixel
    assert result["coverage"] == pytest.approx((given != 255).mean())
    assert result["accuracy"] == pytest.approx((truth == given)[both].mean())


def test_pseudo_labels_are_those_of_the_network_on_the_test_images(cr_al, seen):
    lab, net = cr_al
    test = View(Samples(lab.data.test, lab.s.target_size, lab.data.lut), "test")
    rows = {r["kind"]: r for r in pseudo_label_rows(seen, (.35,))}
    for kind, maps in (("ST", None), ("RST", seen.multi)):
        made = label_target(net.eval(), lambda: test.in_order("cpu"), .35, maps)
        again = label_target(lambda z: z, seen.full_logits, .35, maps)
        torch.testing.assert_close(made.thresholds, again.thresholds)
        assert (made.labels == again.labels).all()
        assert rows[kind]["coverage"] == pytest.approx(made.coverage, abs=1e-6)
        assert rows[kind]["accuracy"] == pytest.approx(label_quality(made.labels, seen.labels, 19)["accuracy"])
    on_train = label_target(net.eval(), lambda: lab.target.in_order("cpu"), .35)
    assert (on_train.thresholds != label_target(lambda z: z, seen.full_logits, .35).thresholds).any()


def test_a_map_that_is_the_error_chooses_wrong_labels_at_equal_coverage():
    torch.manual_seed(0)
    truth = torch.randint(4, (12, 64, 64), dtype=torch.uint8)
    wrong = (torch.rand(12, 8, 8) < .5).repeat_interleave(8, 1).repeat_interleave(8, 2)      # whole regions
    predicted = torch.where(wrong, (truth + 1) % 4, truth)
    logits = F.one_hot(predicted.long(), 4).permute(0, 3, 1, 2) * (2 + torch.rand(12, 1, 64, 64))
    error = region_mean(wrong.float(), (8, 8))
    chosen = Examination(list(logits.split(5)), truth, maps_of(.2 + error))
    st, rst, shuffled = pseudo_label_rows(chosen, (.5,))
    assert [r["kind"] for r in (st, rst, shuffled)] == ["ST", "RST", "RST, map shuffled"]
    assert max(abs(r["coverage"] - .5) for r in (st, rst, shuffled)) < .05
    assert rst["accuracy"] < .25 < .4 < st["accuracy"] < .6
    assert rst["gap"] > 1.2 and st["gap"] == pytest.approx(1, abs=.05)
    assert rst["gap"] > shuffled["gap"] and rst["accuracy"] < shuffled["accuracy"]
    agreement = map_report(region_measures(chosen))["agreement"]
    assert agreement["M_multi"]["regions"] == pytest.approx(1) and agreement["M_multi"]["auc"] == 1


# a whole run

def test_labels_larger_than_the_input_are_resized_without_inventing_classes(cr_al):
    other = beside(cr_al[0], test=Streets("camera", "test", (96, 200), n=5))
    labels = examine(other).labels
    for i in range(5):
        raw = Image.fromarray(other.data.test.labels(i)).resize((64, 32), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(labels[i], other.data.lut[np.array(raw)])


def test_errors_of_regions_add_up_to_the_error_of_pixels(seen):
    measures = region_measures(seen)
    predicted = torch.cat([z.argmax(1) for z in seen.full_logits()])
    known = seen.labels != 255
    counts = F.avg_pool2d(known[:, None].double(), 8)[:, 0].numpy() * 64
    assert np.nansum(measures["error"] * counts) == pytest.approx(((predicted != seen.labels) & known).sum().item())
    assert {m.shape for m in measures.values()} == {(12, 4, 8)}


def test_a_diagnosis_is_small_plain_and_repeatable(cr_al):
    state = torch.get_rng_state()
    result = diagnose(cr_al[0], portions=(.5, .35, .2, .5))
    assert torch.equal(state, torch.get_rng_state())             # it takes nothing from the run's random numbers
    torch.rand(3)
    assert diagnose(cr_al[0], portions=(.2, .35, .5)) == result
    text = json.dumps(result, allow_nan=False)
    assert json.loads(text) == result and len(text) < 30_000
    assert sorted({r["portion"] for r in result["pseudo_labels"]["rows"]}) == [.2, .35, .5]
    assert result["critic"]["critic"]["step"][-1] == 6 and result["critic"]["val"]["step"] == [3, 6]
    assert map_figure(result) and len(pseudo_label_figure(result, .35).axes) == 3


def test_of_two_alignments_the_last_is_diagnosed(stages):
    lab, _ = walked("mlan", stages)
    rows = [r for r in lab.logs if r["stage"] == "align_translated"]
    assert trained_alignment(lab)[0] == "align_translated"
    assert diagnose(lab, (.5,))["critic"]["critic"]["target_log_c"] == [round(r["health/target_log_c"], 4) for r in rows
                                                                       if "health/target_log_c" in r]


def test_a_run_that_cannot_be_diagnosed_is_refused(cr_al, stages):
    lab, _ = cr_al
    for method in ("rl_al", "source_only"):
        with pytest.raises(ValueError, match=f"'{method}' has left no C_region and C_image"):
            diagnose(walked(method, stages)[0])
    with pytest.raises(ValueError, match="call the recipe of 'cr_al' with a lab first"):
        diagnose(Lab(lab.s, lab.data, stages))                   # its recipe was not called yet
    with pytest.raises(ValueError, match="streets:camera has no labels"):
        diagnose(beside(lab, test=None))
    with pytest.raises(ValueError, match="no pixel of the test split is labelled"):
        map_report({"error": np.full((1, 2, 2), np.nan), "entropy": np.ones((1, 2, 2))})


def test_the_critic_is_thinned_with_both_ends():
    rows = [{"step": s, "health/target_log_c": float(s)} for s in range(10, 5000, 10)]
    curve = critic_curve(rows)["critic"]
    assert len(curve["step"]) == 60 and (curve["step"][0], curve["step"][-1]) == (10, 4990)
    assert curve["step"] == [int(v) for v in curve["target_log_c"]]
    assert critic_curve(rows[:7])["critic"]["step"] == [10, 20, 30, 40, 50, 60, 70]


# pictures

def test_kept_pictures_hold_neither_photograph_nor_truth(cr_al, tmp_path):
    lab, net = cr_al
    save_pictures(tmp_path / "p.npz", without_photographs(picture_rows(lab, net, "CR-AL", 2)))
    with np.load(tmp_path / "p.npz") as f:
        assert sum(f[k].size for k in f.files if "image" in k.lower().split("/")) == 0
        assert not any("truth" in k for k in f.files)
        assert {f[k].dtype for k in f.files if "/map/" in k} == {np.dtype(np.float16)}
        assert {f[k].dtype for k in f.files if "/prediction/" in k} == {np.dtype(np.uint8)}
    rows = load_pictures(tmp_path / "p.npz")
    whole = add_photographs(rows, lab.data.test, lab.data.lut)
    for row, i in zip(whole, (0, 11)):
        np.testing.assert_array_equal(row.image, lab.data.test.image(i))
        np.testing.assert_array_equal(row.truth, lab.data.lut[lab.data.test.labels(i)])
    assert lab.data.test.n == 12                                 # the run's own split is untouched


def test_figure_4_with_and_without_the_data_set(cr_al):
    lab, net = cr_al
    rows = without_photographs(picture_rows(lab, net, "cr_al", 2))                   # by name, as older files have it, or by title
    photographs = add_photographs(rows, lab.data.test, lab.data.lut)
    without, whole = (figure_4(r, {"cr_al": rows}, lab.data.colors, lab.data.classes) for r in (rows, photographs))
    assert [ax.get_title() for ax in without.axes] == ["CR-AL", ""] and [len(ax.images) for ax in without.axes] == [1, 1]
    assert [ax.get_title() for ax in whole.axes[:3]] == ["target image", "truth", "CR-AL"]
    assert [len(ax.images) for ax in whole.axes] == [1] * 6
    half = figure_4([replace(photographs[0], truth=None), photographs[1]], {"cr_al": rows})
    assert [len(ax.images) for ax in half.axes] == [1, 0, 1, 1, 1, 1]                # the column stays for the other row
    predicted = {lab.data.classes[c] for row in rows for c in np.unique(row.predictions["cr_al"])}
    assert {t.get_text() for t in without.legends[0].get_texts()} == predicted


def test_relations_are_named_by_what_they_hold(cr_al):
    regions = cr_al[0].made["regions"].value
    for level, labels in enumerate(regions["labels"]):
        shares = relation_shares(cr_al[0], make_setup(*PAIR, "cr_al").recipe.patches, level)
        assert [s for _, s in shares] == sorted((s for _, s in shares), reverse=True) and len(shares) <= regions["n"][level]
        assert sum(s for _, s in shares) == pytest.approx((labels != 255).double().mean().item())
    assert len(relation_figure(shares).axes[0].patches) == min(16, len(shares))
