"""Several processes train as one: gradients, critics, streams, evaluation, one writer (gloo, on the CPU)."""
import json
import os
import socket

import numpy as np
import pytest
import torch

from few import few
from forks import Script

from mlan.co_regularized_al import AlignmentSettings, CoRegularizedAL, map_weight
from mlan.networks import Segmenter, SmallExtractor
from mlan.objective import Flow
from mlan.output_games import OutputGame, OutputGameSettings
from mlan.samples import Share, Stream
from mlan.train import run_mlan
from mlan.trainer import Step, Training

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
    team = dict(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(count), ACCELERATE_USE_CPU="true")
    return [Script(f"import torch; torch.set_num_threads(1)\n{code}", told=tmp_path / f"told{r}", RANK=str(r), LOCAL_RANK=str(r), **team)
            for r in range(count)]


def finish(processes):
    for process in processes:
        assert process.ends(300) == 0, process.errors[-3000:]


def objective(method, net):
    "CR-AL, a part of it, or ADVENT, with heavy terms."
    heavy = dict(lambda_ent=.5, lambda_image=.5, lambda_region=.5, critic_width=4, map_weights="normalised")
    if method in ("cr_al", "regularized_il_al"):
        switches = {} if method == "cr_al" else dict(region=False, entropy="none")
        return CoRegularizedAL(64, (6, 6, 6), (8, 16, 32), SmallExtractor.rates, AlignmentSettings(**switches, **heavy))
    return OutputGame(net, OutputGameSettings(lambda_main=.5, lambda_aux=.5, critic_width=4))


def ends_of_steps(method, wide, batch, rank, count):
    "Weights and log after three steps on this process's part of the data; labels are missing in very different amounts."
    torch.manual_seed(0)
    how = Training(steps=10, lr=.01, schedule=1000, batch=batch, head_lr=2., critic_lr=2e-3, clip_norm=1., optimiser="sgd")
    net = Segmenter(SmallExtractor(), 5)
    made = objective(method, net)
    images, labels = torch.rand(8, 3, 32, 64), torch.randint(0, 5, (8, 32, 64))
    target, regions = torch.rand(8, 3, 32, 96 if wide else 64), [torch.randint(0, 6, (8, 4 // k, 8 // k)) for k in (1, 2, 4)]
    labels[::2, 4:], regions[0][1::2, 1:] = 255, 255
    streams = [Share(Stream(8, batch * count, seed), rank, count) for seed in (0, 1)]

    def flows(i):
        index = streams[0].indices(i)
        return (Flow(net, images[index], labels[index], regions=[r[index] for r in regions]), Flow(net, target[streams[1].indices(i)]))

    step = Step(net, made, flows, how)
    begin = [p.detach().clone() for m in (net, made) for p in m.parameters()]
    logs = [{k: v.item() for k, v in step(i).items()} for i in range(3)]
    moves = [p.detach() - b for p, b in zip([p for m in (net, made) for p in m.parameters()], begin)]
    return {"moves": moves, "logs": logs}


def apart(a, b):
    "Per parameter: how far two moves are apart, as a share of the move."
    return [((x - y).norm() / y.norm().clamp(min=1e-9)).item() for x, y in zip(a["moves"], b["moves"])]


@pytest.mark.parametrize("method, wide", [("cr_al", False), ("cr_al", True), ("regularized_il_al", False), ("advent", False)])
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


FEW = dict(n_source=24, n_target=10, n_test=5, warmup_steps=0, steps=4, schedule_steps=4, ramp_steps=0, translation_steps=2,
           translation_batch=1, self_training_steps=2, portions=(.3, .5), val_every=2)
RUN = """
import mlan.run_folder
from pathlib import Path
from mlan.train import run_mlan
if not {drawn}: mlan.run_folder.write_report = lambda path, *parts: Path(path).write_text("")
run_mlan("streets:engine", "streets:camera", {method!r}, out={out!r}, progress=False, **{settings})
"""


def test_a_whole_run_in_two_processes(tmp_path):
    finish(start(RUN.format(method="mlan", drawn=True, out=str(tmp_path / "two"), settings=few("mlan", batch_size=2, **FEW)), 2, tmp_path))
    record = json.loads((tmp_path / "two" / "result.json").read_text())
    assert record["processes"] == 2 and np.array(record["matrix"]).sum() > .5 * 5 * 32 * 64
    assert not list(tmp_path.glob("two/**/*.part")) and (tmp_path / "two" / "report.html").exists()
    log = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if r["stage"] == "align"] == [2, 4]          # one writer


def test_a_run_in_two_processes_is_the_run_in_one_of_twice_the_batch(tmp_path, no_report):
    settings = few("cr_al", batch_size=2, **{**FEW, "n_test": 6})
    finish(start(RUN.format(method="cr_al", drawn=False, out=str(tmp_path / "two"), settings=settings), 2, tmp_path))
    two = json.loads((tmp_path / "two" / "result.json").read_text())
    twice = {**settings, "batch_size": 4}
    one = run_mlan("streets:engine", "streets:camera", "cr_al", out=tmp_path / "one", progress=False, **twice).record
    a, b = (torch.load(tmp_path / k / "checkpoint.pt", weights_only=True)["segmenter"] for k in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
    assert np.abs(np.array(one["matrix"]) - np.array(two["matrix"])).sum() <= .002 * np.array(one["matrix"]).sum()


def test_shares_of_a_batch_are_disjoint_and_whole():
    stream = Stream(50, 6, seed=3)
    for step in range(20):
        parts = [Share(stream, r, 3).indices(step) for r in range(3)]
        assert [len(p) for p in parts] == [2, 2, 2] and np.array_equal(np.concatenate(parts), stream.indices(step))
