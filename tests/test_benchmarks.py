"The benchmarks run at tiny sizes, and what they compare with ADVENT is ADVENT's step."

import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import advent_step
import peer_advent
import step

TINY = "--size 64 96 --target-size 64 64 --patches 8 16 32 --repeats 1 --threads 1 --device cpu".split()
CONFIG = dict(LEARNING_RATE=1e-3, MOMENTUM=0.9, WEIGHT_DECAY=5e-4, LEARNING_RATE_D=1e-4, MAX_ITERS=100, POWER=0.9,
              LAMBDA_SEG_MAIN=1.0, LAMBDA_SEG_AUX=0.1, LAMBDA_ADV_MAIN=0.5, LAMBDA_ADV_AUX=0.2)


def test_step_writes_a_record_a_method_and_size(tmp_path, capsys):
    file = tmp_path / "bench.jsonl"
    step.main([*TINY, "--methods", "source_only+target", "regularized_il_al", "cr_al", "--growth", "--records", str(file)])
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) == 3 * 5 and {r["batch"] for r in records} == {1, 2, 4}
    assert len({tuple(r["size"]) for r in records}) == 3
    assert all(r["ratio"] == 1 for r in records if r["method"] == step.BASE)
    flops = {r["method"]: r["gflops"] for r in records[:3]}
    assert flops["cr_al"] > flops["regularized_il_al"] > flops["source_only+target"] > 0
    assert "cr_al" in capsys.readouterr().out


def test_memory_is_measured_in_a_process_of_its_own():
    large = torch.ones(2**28)                                            # 1 GiB that is not the step's
    records = step.main([*TINY, "--methods", "cr_al", "--memory"])
    assert large.sum() > 0 and 0 < records[0]["peak_mib"] < 500


def test_base_is_one_source_step_and_a_target_forward():
    batch = step.made_up((64, 64), (64, 64), 1, (8, 16, 32), torch.device("cpu"))
    steps = step.build_steps(["source_only", step.BASE], "small", "fp32", batch, torch.device("cpu"), patches=(8, 16, 32))
    alone, both = (step.counted_flops(s) for s in steps.values())
    assert 1.2 < both / alone < 1.4                                     # forward, and backward twice as much: 3 and 4 parts


@pytest.mark.parametrize("name, precision, tf32, peak", [
    ("NVIDIA H100 80GB HBM3", "bf16", True, 989), ("NVIDIA H200", "fp32", True, 494), ("NVIDIA H100 PCIe", "fp32", False, 67),
    ("NVIDIA A100-SXM4-80GB", "bf16", False, 312), ("Some other", "fp32", False, None)])
def test_share_of_peak(name, precision, tf32, peak):
    share = step.share_of_peak(1e12, 0.1, precision, {"device": name, "tf32": tf32})
    assert share == (peak and pytest.approx(10 / peak))


def test_a_folder_without_advent_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_UDA.py"):
        peer_advent.peer_modules(tmp_path)


def _critic():
    layers = []
    for a, b in zip((19, 8, 16, 16, 16), (8, 16, 16, 16, 1)):
        layers += [torch.nn.Conv2d(a, b, 4, 2, 1), torch.nn.LeakyReLU(0.2)]
    return torch.nn.Sequential(*layers[:-1])


def _equal_step(batch, **options):
    torch.manual_seed(0)
    net = torch.nn.ModuleDict({"extractor": step.build_extractor("resnet50", "none", style="deeplab"),
                               "aux": advent_step.AtrousClassifier(1024, 19), "main": advent_step.AtrousClassifier(2048, 19)})
    step.calibrated(net["extractor"], batch[0])
    images, labels, _, target = batch[0].double(), batch[1], batch[2], batch[3].double()
    critics = [_critic().double() for _ in range(2)]
    net.double()                                                         # rounding in single precision is amplified by a fresh network
    return advent_step.EqualStep(net, critics, (images, labels, target), SimpleNamespace(TRAIN=SimpleNamespace(**CONFIG)),
                                 advent_step.Options(frozen_norm=True, once=True, **options))


def _gradients(s):
    return [p.grad.clone() for p in (*s.net.parameters(), *(q for c in s.critics for q in c.parameters())) if p.grad is not None]


def test_shortcuts_leave_advents_objective_as_it_is():
    batch = step.made_up((32, 32), (32, 32), 1, (8, 16, 32), torch.device("cpu"))
    ours = _equal_step(batch)
    losses, entropy = ours(0), lambda p: -p * torch.log2(p + 1e-30) / math.log2(19)
    plain = _equal_step(batch)
    step.freeze_batch_norm(plain.net.train())
    full = lambda m: F.interpolate(m, (32, 32), mode="bilinear", align_corners=True)
    maps = [[full(m) for m in plain._logits(x.double())] for x in (batch[0], batch[3])]
    seg = [F.cross_entropy(m, batch[1], ignore_index=255) for m in maps[0]]
    bce = lambda m, truth: F.binary_cross_entropy_with_logits(m, torch.full_like(m, truth))
    fool = [bce(c.requires_grad_(False)(entropy(m.softmax(1))), 0.0) for c, m in zip(plain.critics, maps[1])]
    (0.1 * seg[0] + seg[1] + 0.2 * fool[0] + 0.5 * fool[1]).backward()
    for truth, side in enumerate(maps):
        for c, m in zip(plain.critics, side):
            (bce(c.requires_grad_(True)(entropy(m.detach().softmax(1))), float(truth)) / 2).backward()
    assert float(losses["loss_seg_src_main"]) == pytest.approx(seg[1].item(), rel=1e-9)
    assert float(losses["loss_adv_trg_aux"]) == pytest.approx(fool[0].item(), rel=1e-9)
    for a, b in zip(_gradients(ours), _gradients(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9 * b.abs().max().item())


def test_one_forward_for_both_domains_is_equal():
    batch = step.made_up((32, 32), (32, 32), 1, (8, 16, 32), torch.device("cpu"))
    apart, together = _equal_step(batch), _equal_step(batch, together=True)
    first, second = apart(0), together(0)
    assert all(float(first[name]) == pytest.approx(float(second[name]), rel=1e-9) for name in first)
    for a, b in zip(_gradients(apart), _gradients(together), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9 * b.abs().max().item())


def test_options_are_added_one_at_a_time_and_together_needs_equal_sizes():
    names = advent_step.ladder((64, 64), (64, 96), [*advent_step.LADDER])
    assert "+ together" not in names and list(names)[:2] == ["equal", "+ once"]
    assert "+ together" in advent_step.ladder((64, 64), (64, 64), [*advent_step.LADDER])


@pytest.mark.skipif(not os.environ.get("ADVENT"), reason="ADVENT names no checkout of valeoai/ADVENT")
def test_losses_agree_with_a_checkout_of_advent():
    records = peer_advent.main([os.environ["ADVENT"], *TINY, "--options", "once", "--methods", "cr_al"])
    by_name = {r["step"]: r for r in records}
    assert max(by_name["equal"]["losses_off"].values()) < 1e-3
    assert by_name["+ once"]["losses_off"]["first"] < 1e-3
    assert by_name["cr_al"]["losses_off"] is None and by_name["ADVENT"]["gflops"] > by_name["equal"]["gflops"]
