"""Several processes train as one: gradients, critics, streams, evaluation, one writer (gloo, on the CPU)."""
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from mlan.co_regularized_al import ABLATIONS, AlignmentSettings, CoRegularizedAL, map_weight
from mlan.networks import Segmenter, SmallExtractor
from mlan.samples import Share, Stream
from mlan.settings import make_settings
from mlan.train import run_mlan
from mlan.trainer import SegmentationStep

MAPS = torch.arange(4 * 2 * 3).view(4, 2, 3).float()

STEPS = """
import sys, torch
sys.path.insert(0, {folder!r})
from test_processes import MAPS, ends_of_steps
from mlan.co_regularized_al import map_weight
from mlan.trainer import processes
team = processes("cpu")
ends = ends_of_steps({method!r}, {wide}, 2, team.process_index, team.num_processes)
ends["maps"] = map_weight(MAPS[2 * team.process_index :][:2], "normalised")
torch.save(ends, f"{out}/{{team.process_index}}.pt")
"""


def start(code, count, tmp_path):
    "Run a script in `count` processes, as torchrun does; its outputs are files."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "script.py").write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
                   "ACCELERATE_USE_CPU": "true"}
    return [subprocess.Popen([sys.executable, tmp_path / "script.py"], stderr=subprocess.PIPE, text=True,
                             env={**environment, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(count)]


def finish(processes):
    for process in processes:
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told[-3000:]


def ends_of_steps(method, wide, batch, rank, count):
    "Weights and log after three steps on this process's part of the data; labels are missing in very different amounts."
    torch.manual_seed(0)
    s = make_settings("a", "b", size=(32, 64), target_size=(32, 64), critic_width=4, map_weights="normalised", ramp_steps=0, head_lr=2.,
                      lr=.01, lambda_ent=.5, lambda_image=.5, lambda_region=.5, schedule_steps=1000, steps=10, clip_norm=1.,
                      optimiser="sgd")
    net = Segmenter(SmallExtractor(), 5)
    weights = AlignmentSettings(critic_width=4, map_weights="normalised", lambda_ent=.5, lambda_image=.5, lambda_region=.5)
    alignment = CoRegularizedAL(ABLATIONS[method], 64, (6, 6, 6), SmallExtractor.rates, weights)
    images, labels = torch.rand(8, 3, 32, 64), torch.randint(0, 5, (8, 32, 64))
    target, regions = torch.rand(8, 3, 32, 96 if wide else 64), [torch.randint(0, 6, (8, 4 // k, 8 // k)) for k in (1, 2, 4)]
    labels[::2, 4:], regions[0][1::2, 1:] = 255, 255
    streams = [Share(Stream(8, batch * count, seed), rank, count) for seed in (0, 1)]

    def source_batch(i):
        index = streams[0].indices(i)
        return images[index], labels[index], [r[index] for r in regions]

    step = SegmentationStep(net, source_batch, s.lr, s, alignment, lambda i: target[streams[1].indices(i)])
    begin = [p.detach().clone() for m in (net, alignment) for p in m.parameters()]
    logs = [{k: v.item() for k, v in step(i).items()} for i in range(3)]
    moves = [p.detach() - b for p, b in zip([p for m in (net, alignment) for p in m.parameters()], begin)]
    return {"moves": moves, "logs": logs}


def apart(a, b):
    "Per parameter: how far two moves are apart, as a share of the move."
    return [((x - y).norm() / y.norm().clamp(min=1e-9)).item() for x, y in zip(a["moves"], b["moves"])]


@pytest.mark.parametrize("method, wide", [("cr_al", False), ("cr_al", True), ("regularized_il_al", False)])
def test_two_processes_at_batch_2_are_one_at_batch_4(method, wide, tmp_path):
    finish(start(STEPS.format(folder=os.path.dirname(__file__), method=method, wide=wide, out=tmp_path), 2, tmp_path))
    first, second = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    alone = ends_of_steps(method, wide, 4, 0, 1)
    fresh = ends_of_steps(method, wide, 2, 0, 1)
    assert all(torch.equal(a, b) for a, b in zip(first["moves"], second["moves"]))
    assert max(apart(first, alone)) < .01 < .1 < np.median(apart(fresh, alone))      # and half the batch alone does not pass
    torch.testing.assert_close(torch.cat([first["maps"], second["maps"]]), map_weight(MAPS, "normalised"))
    for step in range(3):
        for name, value in alone["logs"][step].items():
            assert np.mean([r["logs"][step][name] for r in (first, second)]) == pytest.approx(value, rel=1e-3, abs=1e-5)


FEW = dict(size=(32, 64), target_size=(32, 64), n_source=24, n_target=10, n_val=4, n_test=5, min_samples=3, warmup_steps=0, steps=4,
           schedule_steps=4, ramp_steps=0, critic_width=4, translation_steps=2, translation_width=4, translation_batch=1,
           self_training_steps=2, log_every=2, val_every=2, checkpoint_every=2, device="cpu")
RUN = """
from mlan.train import run_mlan
run_mlan("streets:engine", "streets:camera", {method!r}, out={out!r}, progress=False, batch_size=2, **{settings})
"""


def test_a_whole_run_in_two_processes(tmp_path):
    finish(start(RUN.format(method="mlan", out=str(tmp_path / "two"), settings=FEW), 2, tmp_path))
    record = json.loads((tmp_path / "two" / "result.json").read_text())
    assert record["processes"] == 2 and np.array(record["matrix"]).sum() > .5 * 5 * 32 * 64
    assert not list(tmp_path.glob("two/**/*.part")) and (tmp_path / "two" / "report.html").exists()
    log = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if r["stage"] == "align"] == [2, 4]          # one writer


def test_a_run_in_two_processes_is_the_run_in_one_of_twice_the_batch(tmp_path):
    settings = {**FEW, "n_test": 6}
    finish(start(RUN.format(method="cr_al", out=str(tmp_path / "two"), settings=settings), 2, tmp_path))
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    one = run_mlan("streets:engine", "streets:camera", "cr_al", out=tmp_path / "one", progress=False, batch_size=4, **settings).record
    a, b = (torch.load(tmp_path / k / "checkpoint.pt", weights_only=True)["segmenter"] for k in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
    assert np.abs(np.array(one["matrix"]) - np.array(two["matrix"])).sum() <= .002 * np.array(one["matrix"]).sum()


def test_shares_of_a_batch_are_disjoint_and_whole():
    stream = Stream(50, 6, seed=3)
    for step in range(20):
        parts = [Share(stream, r, 3).indices(step) for r in range(3)]
        assert [len(p) for p in parts] == [2, 2, 2] and np.array_equal(np.concatenate(parts), stream.indices(step))
