"""The paper's profile, method by method and backbone by backbone: three steps on small trees in the official layouts."""
import json

import pytest
import torch
import torchvision
from few import fitting
from trees import write_cityscapes, write_gta5, write_synthia

from mlan.command_line import main
from mlan.counting import CountingLab
from mlan.dry_run import dry_run, step_cost
from mlan.methods import METHODS, make_setup
from mlan.run_folder import load_segmenter
from mlan.settings import PROFILES
from mlan.train import run_mlan

# what is made small: images, steps, and what so few patches ask of DBSCAN. All else is the paper's.
SMALL = dict(size=(72, 128), target_size=(64, 128), steps=3, weights="none", device="cpu", log_every=1, workers=0)
OWN = dict(patches=(8, 16, 32), min_samples=2, region_sample=500, translation_steps=3, self_training_steps=3, portions=(0.2, 0.25, 0.3),
           betas=(0.01, 0.09), rounds=1, band_steps=2)


def small(method, **changes):
    "The small settings that a method has."
    return {**fitting(method, **SMALL, **OWN), **changes}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    root = tmp_path_factory.mktemp("trees")
    write_gta5(root / "gta5", range(1, 7), size=(105, 191))
    write_synthia(root / "synthia", 5)
    write_cityscapes(root / "cityscapes", {"train/aachen": 4, "train/jena": 1, "val/lindau": 2})
    return {name: f"{name}:{root / name}" for name in ("gta5", "synthia", "cityscapes")}


@pytest.fixture(scope="module")
def resnet101(tmp_path_factory):
    "Random weights as a file, with BatchNorm that has seen images and blocks that begin as identities: frozen and deep, others explode."
    torch.manual_seed(0)
    net, path = torchvision.models.resnet101(zero_init_residual=True), tmp_path_factory.mktemp("weights") / "resnet101.pth"
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0
    net.train()(2 * torch.randn(8, 3, 1, 1) + .5 * torch.randn(8, 3, 64, 64))   # plain colours, as the trees' images have
    torch.save(net.state_dict(), path)
    return str(path)


@pytest.mark.parametrize("source, backbone, method, classes", [
    ("gta5", "resnet101", "cr_al", 19), ("synthia", "vgg16", "cr_al", 16),
    *(pytest.param(source, backbone, "mlan", n, marks=pytest.mark.slow) for source, backbone, n in
      (("gta5", "vgg16", 19), ("synthia", "vgg16", 16), ("synthia", "resnet101", 16))),
    pytest.param("gta5", "vgg16", "cr_al+rst", 19, marks=pytest.mark.slow),
    *(pytest.param("gta5", "resnet101", method, 19, marks=pytest.mark.slow) for method in METHODS if method != "cr_al")])
def test_three_steps_of_the_paper(source, backbone, method, classes, trees, resnet101, tmp_path, no_report):
    weights = resnet101 if backbone == "resnet101" else "none"
    result = run_mlan(trees[source], trees["cityscapes"], method, "paper", out=tmp_path, progress=False,
                      **small(method, backbone=backbone, weights=weights))
    record = result.record
    assert len(record["classes"]) == classes and ("miou_13" in record) == (classes <= 16 or source == "gta5")
    assert record["images"] == {"source": 6 if source == "gta5" else 5, "target": 5, "val": 1, "test": 2}
    papers = dict(lr=2.5e-4, momentum=.9, weight_decay=1e-4, optimiser="sgd", batch_size=1)
    of_mlan = dict(lambda_region=5e-3, lambda_ent=1e-3, lambda_image=1e-3, n_relations=100) if "n_relations" in record["settings"] else {}
    assert record["settings"] == {**record["settings"], **papers, **of_mlan}
    assert sum(map(sum, record["matrix"])) > .5 * 2 * 64 * 128
    assert load_segmenter(result.out / "checkpoint.pt")[1]["size"] == (64, 128)


def test_the_paper_s_numbers():
    setup = make_setup("gta5", "cityscapes", profile="paper")
    s, m = setup.settings, setup.recipe
    assert (s.lr, s.momentum, s.weight_decay, s.power, s.optimiser) == (2.5e-4, .9, 1e-4, .9, "sgd")          # Section 4.2
    assert (m.lambda_region, m.lambda_ent, m.lambda_image, m.n_relations) == (5e-3, 1e-3, 1e-3, 100)
    assert (s.size, s.target_size, s.batch_size, s.head_lr, s.critic_lr) == ((720, 1280), (512, 1024), 1, 10., 1e-4)   # R13
    assert (s.steps, s.schedule_steps, s.warmup_steps, s.backbone, s.weights) == (120_000, 250_000, 0, "resnet101", "imagenet")
    assert (m.map_weights, m.reading, m.pooling, m.critic_width, s.ramp_steps, s.clip_norm) == ("raw", "entropy", "resize", 64, 0, 0.)
    assert set(PROFILES["paper"]) <= {"workers"}, "the defaults of Settings are the paper's"
    assert all(make_setup("a", "b", name, "paper").recipe == method.recipe for name, method in METHODS.items())
    assert make_setup("synthia:/data", "cityscapes", profile="paper").settings.size == (760, 1280)


def test_a_dry_run_trains_nothing_and_says_what_would_be(trees, tmp_path, capsys):
    argv = ["run", "--source", trees["gta5"], "--target", trees["cityscapes"], "--profile", "paper", "--out", str(tmp_path / "run"),
            "--dry-run", "--weights", "none", "--backbone", "vgg16"]
    assert main(argv) == 0
    said = capsys.readouterr().out
    for words in ("lambda_region 0.005", "6 of 24,966", "5 of 2,975", "align_translated   120000 steps", "GiB",
                  "the images of stage translation take"):
        assert words in said, words
    assert not (tmp_path / "run").exists()


def test_dry_run_counts_what_the_data_has(trees):
    planned = dry_run(trees["synthia"], trees["cityscapes"], "cr_al", "paper", **small("cr_al", backbone="small"))
    assert [e.stage for e in planned.stages] == ["regions", "align", "scoring"] and len(planned.classes) == 16
    assert planned.stages[0].seconds > 0 and planned.stages[1].amount == "3 steps" and planned.stages[2].amount == "3 images"
    json.dumps([e.seconds for e in planned.stages])


def heaviest(**given):
    "The cost of CR-AL's step with the paper's settings."
    setup = make_setup("a", "b", "cr_al", "paper", weights="none", **given)
    lab = CountingLab(setup.settings)
    setup.recipe(lab)
    planned = lab.planned[-1]
    assert planned.stage == "align"
    return step_cost(lambda: lab.step(planned))


@pytest.mark.parametrize("backbone", ["resnet101", "vgg16"])
@pytest.mark.parametrize("source_size", [(720, 1280), (760, 1280)])
def test_the_heaviest_step_fits_twelve_gigabytes(backbone, source_size):
    assert 1 < heaviest(backbone=backbone, size=source_size).gib < 6                    # and about one for the device's own


def test_checkpointing_and_mixed_precision_need_less():
    at = dict(backbone="resnet50", size=(256, 512), target_size=(256, 512), patches=(16, 32, 64))
    plain, half, again = (heaviest(**at, **change) for change in ({}, {"precision": "bf16"}, {"checkpointing": True}))
    assert half.peak < .75 * plain.peak and again.peak < .9 * plain.peak
    assert half.flops == plain.flops and 1.1 < again.flops / plain.flops < 1.4


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])  # bf16 is slow on a CPU
def test_every_stage_of_the_gpu_profile_runs(precision, tmp_path, no_report):
    few = dict(size=(64, 64), target_size=(64, 64), patches=(8, 16, 32), n_source=8, n_target=6, n_val=2, n_test=2, min_samples=2,
               warmup_steps=1, steps=2, schedule_steps=2, ramp_steps=1, batch_size=2, translation_steps=1, self_training_steps=3,
               weights="none", device="cpu", workers=0, precision=precision, val_every=0)
    record = run_mlan("streets:engine", "streets:camera", "mlan", "gpu", out=tmp_path, progress=False, **few).record
    assert record["miou"] is not None and record["settings"]["backbone"] == "resnet50" and record["profile"] == "gpu"
    assert [record["facts"][f"pseudo_labels_{r}"]["portion"] for r in range(3)] == [.2, .35, .5] and len(record["classes"]) == 19
