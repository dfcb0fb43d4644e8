"""Where the smallest runs end: at the weights of commit bcccc02, whose trainer and stages knew MLAN alone.

On one machine and one thread the weights were equal to the bit. Other processors round otherwise, so this holds the way that they went
from the warm-up's end: its length, and its direction by sixteen random projections. `ends.json` was made from that commit's own states.
"""
import json
from pathlib import Path

import pytest
import torch
from few import PAIR, few

from mlan.lab import Lab
from mlan.methods import make_setup
from mlan.pairs import open_pair

GENTLE = dict(optimiser="sgd", lr=1e-3, warmup_lr=1e-2, self_training_lr=1e-3, translation_lr=1e-4)    # AdamW enlarges roundings
ENDS = json.loads(Path(__file__).with_name("ends.json").read_text())


def way(begin: dict, end: dict) -> list:  # states -> length, and sixteen numbers of about the size 1
    "From one state to another."
    change = torch.cat([(end[name] - begin[name]).flatten().double() for name in begin if begin[name].is_floating_point()])
    signs = torch.randint(0, 2, (16, len(change)), generator=torch.Generator().manual_seed(0), dtype=torch.int8).double() * 2 - 1
    return [change.norm().item(), *(signs @ change / change.norm()).tolist()]


@pytest.mark.parametrize("method", ENDS)
def test_a_run_ends_where_it_did(method, tmp_path):
    setup = make_setup(*PAIR, method, **few(method, **GENTLE))
    lab = Lab(setup.settings, open_pair(setup.settings), tmp_path)
    end = setup.recipe(lab).value["net"]
    length, *turns = way(lab.made["warm_up"].value["net"], end)
    assert length == pytest.approx(ENDS[method][0], rel=0.01) and turns == pytest.approx(ENDS[method][1:], abs=2e-3)
