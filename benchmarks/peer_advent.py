"""One training step of ADVENT (github.com/valeoai/ADVENT), run by its own unmodified `train_advent`, beside ours.

    git clone https://github.com/valeoai/ADVENT /tmp/ADVENT
    python benchmarks/peer_advent.py /tmp/ADVENT --size 160 288 --target-size 128 256 --records results/bench_peer.jsonl

ADVENT's own loop owns the process. Between two of its iterations, inside the loader that feeds it, every step of ours takes
its turn on the same tensors; so all are timed in one run, in turn. First the equal setting: the same network (ResNet-101 of
DeepLab-V2, two heads), the same two critics on the same entropy maps at the images' size, the same weights to begin with, the
same losses, optimisers, rates, decay, single precision, BatchNorm on batch statistics. The losses of the first two iterations
are compared with those that ADVENT prints; a step that should agree and doesn't ends the run. Then our options, one added at
a time, and last our own methods as `mlan` trains them. What differs between ADVENT's step and our equal one stands in
advent_step.py.
"""

import argparse
import contextlib
import copy
import io
import statistics
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from advent_step import CHANGING, LADDER, EqualStep, ladder, our_net
from records import append_records
from step import (CLASSES, build_steps, clock, counted_flops, fitting_clock, flop_counter, machine, made_up, median_ratio,
                  peak_elsewhere, peak_mib, share_of_peak, spread, threads)
from torch import Tensor, nn

from mlan.backbones import build_extractor
from mlan.trainer import usable_device

METHODS = ("source_only", "source_only+target", "rl_al", "il_al", "cr_al")
PEER = "ADVENT"

# --- the peer --------------------------------------------------------------------------------------------------------


class _Dict(dict):
    "Stands for easydict.EasyDict where that is not installed."
    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


def peer_modules(checkout: Path) -> tuple:  # its train_UDA, its cfg, its get_deeplab_v2
    "Import ADVENT from a checkout; what it imports and a step does not use may be missing."
    if not (checkout / "advent/domain_adaptation/train_UDA.py").is_file():
        raise FileNotFoundError(f"{checkout} holds no advent/domain_adaptation/train_UDA.py; give the folder of a checkout of ADVENT")
    for name, content in {"easydict": {"EasyDict": _Dict}, "tensorboardX": {"SummaryWriter": object}, "yaml": {}}.items():
        with contextlib.suppress(ImportError):
            __import__(name)
            continue
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    from advent.domain_adaptation import train_UDA
    from advent.domain_adaptation.config import cfg
    from advent.model.deeplabv2 import get_deeplab_v2
    return train_UDA, cfg, get_deeplab_v2


@contextlib.contextmanager
def patched(changes: dict):  # {(object, name of its attribute): value}
    "Attributes changed inside."
    kept = {place: getattr(*place) for place in changes}
    for (owner, name), value in changes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name), value in kept.items():
            setattr(owner, name, value)


def without_cuda(device: torch.device) -> dict:
    "What lets code of 2019 with `.cuda()` and `.get_device()` run on a CPU; nothing on a GPU."
    if device.type == "cuda":
        return {}
    stay = lambda self, *args, **kwargs: self
    return {(Tensor, "cuda"): stay, (nn.Module, "cuda"): stay, (Tensor, "get_device"): lambda self: "cpu"}


class Feed:
    "ADVENT's source loader: it times ADVENT's iterations, and between them the other steps take their turn."

    def __init__(self, batch: tuple, device: torch.device, count_flops: bool, kind: str = "wall"):
        self.batch, self.device, self.begin, self.now = batch, device, None, lambda: clock(device, kind)
        self.steps, self.seconds, self.started, self.i = {}, {PEER: []}, None, 0
        self.counter = flop_counter() if count_flops else None

    def __iter__(self):
        return self

    def __next__(self):
        if self.i == 0 and self.begin:
            self.begin(self)
        self.stop()
        for name, step in self.steps.items():
            began = self.now()
            step(self.i)
            self.seconds.setdefault(name, []).append(self.now() - began)
        if self.counter and self.i == 0:
            self.counter.__enter__()
        self.i, self.started = self.i + 1, self.now()
        return self.batch

    def stop(self):
        "The end of an iteration of the peer."
        if self.started is None:
            return
        self.seconds[PEER].append(self.now() - self.started)
        if self.counter and self.i == 1:
            self.counter.__exit__(None, None, None)


def run_peer(peer: tuple,  # from `peer_modules`
             net: nn.Module, feed: Feed, target: Tensor, iterations: int, begin=None) -> list:  # its losses, one dict an iteration
    "Call ADVENT's train_advent for some iterations; `begin(critics)` is called before the first one."
    (train_UDA, cfg, _), losses, critics = peer, [], []

    def discriminator(**kwargs):
        critics.append(made(**kwargs))
        return critics[-1]

    def printed(current, i):
        losses.append({name: value.detach() for name, value in current.items()})
        shown(current, i)

    made, shown, size = train_UDA.get_fc_discriminator, train_UDA.print_losses, lambda t: (t.shape[-1], t.shape[-2])
    feed.begin = (lambda _: begin(critics)) if begin else None
    cfg.GPU_ID = feed.device.index or 0 if feed.device.type == "cuda" else "cpu"
    cfg.NUM_CLASSES, cfg.TRAIN.EARLY_STOP, cfg.TRAIN.SAVE_PRED_EVERY, cfg.TRAIN.TENSORBOARD_LOGDIR = CLASSES, iterations - 1, 10**9, ""
    cfg.TRAIN.INPUT_SIZE_SOURCE, cfg.TRAIN.INPUT_SIZE_TARGET = size(feed.batch[0]), size(target)
    changes = {(train_UDA, "get_fc_discriminator"): discriminator, (train_UDA, "print_losses"): printed, **without_cuda(feed.device)}
    silent = io.StringIO()
    with patched(changes), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_UDA.train_advent(net, feed, ((target, None, None, None) for _ in range(iterations)), cfg)
    feed.stop()
    return [{name: float(value) for name, value in row.items()} for row in losses]


# --- the comparison --------------------------------------------------------------------------------------------------


def furthest(ours: dict, theirs: dict) -> float:
    "The largest relative difference between two sets of losses."
    return max(abs(float(ours[name]) - value) / abs(value) for name, value in theirs.items())


def compare(args, device: torch.device) -> list:  # records
    "Run ADVENT with our steps in between; returns a record a step."
    peer = peer_modules(args.checkout)
    torch.manual_seed(0)
    net = peer[2](CLASSES, multi_level=True).to(device)
    size, target_size = tuple(args.size), tuple(args.target_size)
    batch = made_up(size, target_size, args.batch, args.patches, device)
    images, labels, _, target = batch
    mine = our_net(net, device)
    seen = mine["extractor"].normalise                                  # ADVENT's loader gives what our extractor makes itself
    feed = Feed((seen(images), labels, None, None), device, count_flops=True, kind=args.clock)
    told, flops = {}, {}
    plans = ladder(size, target_size, args.options)

    def begin(critics):
        for name, options in plans.items():
            step = EqualStep(copy.deepcopy(mine), copy.deepcopy(critics), (images, labels, target), peer[1], options)
            feed.steps[name] = (lambda i, s=step, n=name: told.setdefault(n, []).append(s(i)))
        if args.methods:
            feed.steps.update(build_steps(args.methods, "resnet101", "fp32", batch, device, patches=tuple(args.patches)))

    iterations = args.repeats + args.warm
    printed = run_peer(peer, net, feed, seen(target), iterations, begin)
    flops[PEER] = feed.counter.get_total_flops()
    flops |= {name: counted_flops(step) for name, step in feed.steps.items()}
    agreement = {name: [furthest(a, b) for a, b in zip(rows, printed)] for name, rows in told.items()}
    check(agreement, plans, device.type == "cuda")
    return [record(args, name, feed.seconds, flops[name], agreement.get(name), machine(device)) for name in feed.seconds]


def check(agreement: dict, plans: dict, on_gpu: bool, tolerance: float = 1e-3):
    "AssertionError unless losses are ADVENT's at first (and after an update, on a CPU: on a GPU repeated updates have no order)."
    for name, far in agreement.items():
        if plans[name] == replace(plans[name], **dict.fromkeys(CHANGING, False)):
            assert far[0] < tolerance, f"{name}: a loss is {far[0]:.1%} off ADVENT's in the first iteration, so the times compare nothing"
    assert on_gpu or agreement["equal"][1] < tolerance, "the losses of `equal` part from ADVENT's after one update, so its updates differ"


def record(args, name: str, seconds: dict, flops: int, far: list | None, where: dict) -> dict:
    "A line of the records."
    taken, base = (seconds[n][args.warm:] for n in (name, PEER))
    precision = "bf16" if "bf16" in args.options and name in ("+ bf16", "+ compile") else "fp32"
    middle = statistics.median(taken)
    return {"benchmark": "peer_advent", "step": name, "size": tuple(args.size), "target_size": tuple(args.target_size), "batch": args.batch,
            "precision": precision, "seconds": spread(taken), "clock": args.clock, "repeats": args.repeats,
            "gflops": round(flops / 1e9, 2),
            "times_faster": round(median_ratio(base, taken), 3), "share_of_peak": share_of_peak(flops, middle, precision, where),
            "losses_off": far and {"first": float(f"{far[0]:.2g}"), "second": float(f"{far[1]:.2g}")},
            "peak_mib": peak_of(args, name) if args.memory else None, **where}


def peak_of(args, name: str) -> float:
    "Peak memory of one step, measured in a process of its own."
    pair = lambda numbers: [str(n) for n in numbers]
    command = [__file__, str(args.checkout), "--peak-only", name, "--size", *pair(args.size), "--target-size", *pair(args.target_size),
               "--patches", *pair(args.patches), "--batch", str(args.batch), "--device", args.device, "--options", *args.options,
               "--threads", str(torch.get_num_threads())]
    return peak_elsewhere(command, name)


def peak_only(args, device: torch.device) -> float:
    "Peak memory of two iterations of one step and of nothing else."
    return peak_mib(lambda: _only(args, device), device, 1 if args.peak_only == PEER else 2)


def _only(args, device: torch.device):
    "The one step whose memory is measured."
    size, target_size = tuple(args.size), tuple(args.target_size)
    batch = made_up(size, target_size, args.batch, args.patches, device)
    images, labels, _, target = batch
    if args.peak_only in METHODS:
        step, = build_steps([args.peak_only], "resnet101", "fp32", batch, device, patches=tuple(args.patches)).values()
        return step
    train_UDA, cfg, build = peer = peer_modules(args.checkout)
    if args.peak_only == PEER:
        net, seen = build(CLASSES).to(device), build_extractor("resnet101", "none", style="deeplab").normalise.to(device)
        feed = Feed((seen(images), labels, None, None), device, count_flops=False)
        return lambda i: run_peer(peer, net, feed, seen(target), 2)
    critics = [train_UDA.get_fc_discriminator(CLASSES).to(device) for _ in range(2)]
    options = ladder(size, target_size, args.options)[args.peak_only]
    return EqualStep(our_net(build(CLASSES), device), critics, (images, labels, target), cfg, options)


def table(records: list) -> str:
    "The records for a reader."
    first = records[0]
    rows = [f"source {first['size']}, target {first['target_size']}, batch {first['batch']}",
            f"{first['device']}, {first['threads']} thread(s), tf32 {first['tf32']}",
            f"{'step':22}{'seconds':>10}{'times faster':>14}{'Gflop':>9}{'Gflop/s':>9}{'of peak':>9}{'MiB':>8}  losses off, iteration 1, 2"]
    for r in records:
        share = "-" if r["share_of_peak"] is None else f"{r['share_of_peak']:.1%}"
        off = "" if not r["losses_off"] else f"{r['losses_off']['first']:.0e}, {r['losses_off']['second']:.0e}"
        rows.append(f"{r['step']:22}{r['seconds']['median']:>10.3f}{r['times_faster']:>14.2f}{r['gflops']:>9.1f}"
                    f"{r['gflops'] / r['seconds']['median']:>9.0f}{share:>9}{r['peak_mib'] or float('nan'):>8.0f}  {off}")
    return "\n".join(rows)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("checkout", type=Path, help="folder of a checkout of valeoai/ADVENT")
    p.add_argument("--size", type=int, nargs=2, default=(160, 288), metavar=("H", "W"), help="of source images")
    p.add_argument("--target-size", type=int, nargs=2, default=(128, 256), metavar=("H", "W"))
    p.add_argument("--patches", type=int, nargs=3, default=(16, 32, 64), help="region sizes of our own methods, in pixels")
    p.add_argument("--batch", type=int, default=1, help="images of each domain")
    p.add_argument("--options", nargs="*", default=[*LADDER[:-1]], choices=LADDER,
                   metavar="OPTION", help=f"of our step, added in this order: {', '.join(LADDER)}; together only where the sizes are equal")
    p.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, metavar="METHOD", help=f"of ours: {', '.join(METHODS)}")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--warm", type=int, default=1, help="iterations that are not counted")
    p.add_argument("--threads", type=int)
    p.add_argument("--clock", default="wall", choices=("wall", "processor"), help="processor: for one thread on a CPU that others use, too")
    p.add_argument("--device", default="auto")
    p.add_argument("--memory", action="store_true", help="also measure peak memory, one process a step")
    p.add_argument("--records", type=Path, help="append a JSON line a step to this file")
    p.add_argument("--peak-only", help=argparse.SUPPRESS)                # a process of --memory
    return p


def main(argv=None) -> list:  # the records
    args = parser().parse_args(argv)
    device = usable_device(args.device)
    with threads(args.threads):
        if args.peak_only:
            return print(peak_only(args, device))
        fitting_clock(args.clock, device)
        records = compare(args, device)
    print(table(records))
    append_records(records, args.records)
    return records


if __name__ == "__main__":
    main()
