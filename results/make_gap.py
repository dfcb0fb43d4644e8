"""The gap of the built-in pair: source only, AdaBN on the same weights, oracle, class by class -> streets_gap.jsonl.

python results/make_gap.py RUNS    RUNS holds RUNS/source_only_0 ... as `make_records.sh streets` leaves them.
AdaBN re-estimates BatchNorm's statistics on the target's training images (no labels) and changes no weight.
"""
import json
import sys
from pathlib import Path

import torch
from make_tables import HERE, records

from mlan.datasets import open_dataset
from mlan.evaluation import evaluate
from mlan.label_spaces import label_table
from mlan.samples import Samples
from mlan.train import in_order, load_segmenter


@torch.no_grad()
def re_estimate(net, samples):
    "Cumulative BatchNorm statistics over a data set; the weights stay."
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for images in in_order(samples, "cpu", 30):
        net(images)
    return net.eval()


def adabn(run: Path, record: dict) -> dict:
    "The record of AdaBN on a run's checkpoint."
    net, about = load_segmenter(run / "checkpoint.pt")
    s, size = record["settings"], about["size"]
    train, test = (open_dataset(record["target"], split, size, s["data_seed"], s[n] or None)
                   for split, n in (("train", "n_target"), ("test", "n_test")))
    net = re_estimate(net, Samples(train, size, labelled=False).load(2))
    scores = evaluate(net, test, label_table(test.space, about["members"]), about["classes"], size)
    return {**record, **scores.record(), "method": "adabn"}


if __name__ == "__main__":
    runs = [r for r in records() if (r["source"], r["target"]) == ("streets:engine", "streets:camera")]
    rows = [r for r in runs if r["method"] in ("source_only", "oracle")]
    rows += [adabn(Path(sys.argv[1]) / f"source_only_{r['seed']}", r) for r in rows if r["method"] == "source_only"]
    names = ("method", "source", "target", "seed", "miou", "per_class", "classes", "settings", "commit", "versions")
    kept = [{k: r[k] for k in names} for r in rows]
    (HERE / "streets_gap.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    for r in kept:
        print(r["method"], r["seed"], round(r["miou"], 1))
