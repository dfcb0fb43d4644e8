"""Seconds, peak memory and arithmetic of one training step, by method, backbone and precision; and how they grow.

    python benchmarks/step.py --backbone small resnet101 --methods source_only+target cr_al --size 160 288 --target-size 128 256

Every step is driven as the trainer drives it, on made-up images that lie in memory: no decoding, no loader. All methods of
a backbone take turns in one process (A B C A B C), so that whatever else the machine does hits all alike. Peak memory is
measured in a process of its own for each method: the tensors that are alive at a time on a CPU, what PyTorch allocated on a GPU.
"""

import argparse
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from records import append_records, commit, cpu_name

from mlan.backbones import build_extractor
from mlan.counting import CountingLab
from mlan.dry_run import LiveMemory, flop_counter
from mlan.methods import make_setup, own_values
from mlan.networks import Segmenter, freeze_batch_norm
from mlan.objective import Flow
from mlan.region_labels import region_grid
from mlan.trainer import Step, usable_device

METHODS = ("source_only", "source_only+target", "rll", "rl_al", "regularized_rl_al", "il_al", "regularized_il_al", "cr_al",
           "minent", "adaptseg", "advent", "dacs")
BASE = "source_only+target"  # what the ratios are to: one source step, and the target's features without gradient
CLASSES, RELATIONS = 19, 100
TERAFLOPS = {  # dense peaks of the makers' data sheets, in 1e12 operations a second
    "H200": {"bf16": 989, "tf32": 494, "fp32": 67}, "H100": {"bf16": 989, "tf32": 494, "fp32": 67},
    "A100": {"bf16": 312, "tf32": 156, "fp32": 19.5}, "L40S": {"bf16": 362, "tf32": 183, "fp32": 91.6},
    "L4": {"bf16": 121, "tf32": 60, "fp32": 30.3}, "A10": {"bf16": 125, "tf32": 62.5, "fp32": 31.2},
}


def clock(device: torch.device, kind: str = "wall") -> float:  # seconds
    "The time when all work given to the device is done; kind `processor` counts only what this process computed."
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time() if kind == "processor" else time.perf_counter()


def fitting_clock(kind: str, device: torch.device):
    "ValueError where processor time would mean something else than time."
    if kind == "processor" and (device.type == "cuda" or torch.get_num_threads() > 1):
        raise ValueError("--clock processor is for one thread on a CPU: give --threads 1 --device cpu, or --clock wall")


def machine(device: torch.device) -> dict:
    "What a record says about where it was measured."
    return {"device": device_name(device), "torch": torch.__version__, "threads": torch.get_num_threads(), "commit": commit(),
            "tf32": device.type == "cuda" and torch.backends.cudnn.allow_tf32}


def device_name(device: torch.device) -> str:
    "The GPU's name, or the processor's."
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def share_of_peak(flops: float, seconds: float, precision: str, where: dict) -> float | None:  # None: peak unknown
    "The share of the device's peak arithmetic that a step reaches."
    kind = "tf32" if precision == "fp32" and where["tf32"] else precision
    peak = next((row[kind] for name, row in TERAFLOPS.items() if name in where["device"].replace("-", " ").split()), None)
    return None if peak is None else flops / seconds / peak / 1e12


def peak_mib(build, device: torch.device, times: int = 2) -> float:  # build: function () -> step
    "Peak memory of a step that is built and taken twice: what PyTorch allocated on a GPU, the tensors alive at a time on a CPU."
    with nullcontext() if device.type == "cuda" else LiveMemory() as memory:
        step = build()
        for i in range(times):
            step(i)
        clock(device)
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory.peak) / 2**20


def counted_flops(step) -> int:  # operations of convolutions and matrix products, forward and backward
    "What PyTorch's counter finds in one step; a fused multiply-add counts twice."
    with flop_counter() as counter:
        step(0)
    return counter.get_total_flops()


def take_turns(steps: dict,  # {name: function of the iteration's number}
               repeats: int, device: torch.device, kind: str = "wall", warm: int = 1) -> dict:  # {name: seconds of each repeat}
    "Time the steps in turn; the first rounds are not counted."
    seconds = {name: [] for name in steps}
    for i in range(warm + repeats):
        for name, step in steps.items():
            began = clock(device, kind)
            step(i)
            seconds[name].append(clock(device, kind) - began)
    return {name: taken[warm:] for name, taken in seconds.items()}


def spread(seconds: list) -> dict:
    "Median, least and most of a list of times."
    return {"median": round(statistics.median(seconds), 5), "min": round(min(seconds), 5), "max": round(max(seconds), 5)}


def median_ratio(seconds: list, base: list) -> float:
    "Median over the rounds of how many times the base's time a step took."
    return statistics.median(a / b for a, b in zip(seconds, base, strict=True))


# --- the steps -------------------------------------------------------------------------------------------------------


def made_up(size: tuple, target_size: tuple, batch: int, patches: tuple, device: torch.device) -> tuple:
    "Images, labels and region labels of a source batch, and images of a target batch: noise, with a tenth of the labels ignored."
    g = torch.Generator().manual_seed(0)
    images, target = (torch.rand(batch, 3, *s, generator=g).to(device) for s in (size, target_size))
    labels = torch.randint(CLASSES, (batch, *size), generator=g)
    labels[torch.rand(batch, *size, generator=g) < 0.1] = 255
    regions = [torch.randint(RELATIONS, (batch, *region_grid(size, p)), generator=g).to(device) for p in patches]
    return images, labels.to(device), regions, target


def calibrated(extractor: torch.nn.Module, images: torch.Tensor) -> torch.nn.Module:
    "Give BatchNorm the statistics of these images, so that frozen layers pass numbers of ordinary size."
    norms = [m for m in extractor.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        extractor.train()(images)
    for norm in norms:
        norm.momentum = 0.1
    return freeze_batch_norm(extractor)


def build_steps(methods: list, backbone: str, precision: str, batch: tuple,  # from `made_up`
                device: torch.device, **overrides) -> dict:  # {method: step}
    "One network for all methods of a backbone: its weights move, which changes no time; optimisers and heads are each method's own."
    images, _, _, target = batch
    torch.manual_seed(0)
    given = dict(backbone=backbone, weights="none", size=tuple(images.shape[-2:]), target_size=tuple(target.shape[-2:]),
                 batch_size=len(images), precision=precision)
    net = Segmenter(build_extractor(backbone, "none", checkpointing=overrides.get("checkpointing", False)), CLASSES).to(device)
    freeze_batch_norm(calibrated(net.extractor, images), affine=backbone != "small")    # as with ImageNet weights
    if overrides.pop("compile", False):
        net.extractor.levels = torch.compile(net.extractor.levels)
    return {name: _step(name, net, batch, given | overrides) for name in methods}


def _step(method, net, batch, given):
    "The first training of a method that sees the target, or the one that it has, as a lab would build it."
    images, labels, regions, target = batch
    name, profile = method.removesuffix("+target"), "quick" if given["backbone"] == "small" else "paper"
    own = own_values(make_setup("", "", name).recipe)
    setup = make_setup("made-up", "made-up", name, profile, **{k: v for k, v in given.items() if k != "patches" or k in own})
    lab = CountingLab(setup.settings)
    setup.recipe(lab)
    planned = next(p for p in lab.planned if p.how and p.stage != "warm_up")
    objective = planned.kept.objective(net).to(target.device)

    def flows(i):
        return Flow(net, images, labels, regions=regions), planned.views[1] and Flow(net, target)

    step = Step(net, objective, flows, planned.how)
    if method != BASE:
        return step

    def with_target(i):
        step(i)
        with torch.no_grad():
            net.extractor(target)
    return with_target


# --- the command -----------------------------------------------------------------------------------------------------


@contextmanager
def threads(number: int | None):
    "So many threads inside; None leaves them as they are."
    usual = torch.get_num_threads()
    torch.set_num_threads(number or usual)
    yield
    torch.set_num_threads(usual)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--backbone", nargs="+", default=["small"])
    p.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD", help=", ".join(METHODS))
    p.add_argument("--size", type=int, nargs=2, default=(160, 288), metavar=("H", "W"), help="of source images")
    p.add_argument("--target-size", type=int, nargs=2, default=(128, 256), metavar=("H", "W"))
    p.add_argument("--patches", type=int, nargs=3, default=(16, 32, 64), help="region sizes in pixels")
    p.add_argument("--batch", type=int, default=1, help="images of each domain")
    p.add_argument("--precision", nargs="+", default=["fp32"], choices=("fp32", "bf16"))
    p.add_argument("--checkpointing", action="store_true", help="the extractor computes activations again instead of keeping them")
    p.add_argument("--compile", action="store_true", help="torch.compile the extractor")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--threads", type=int)
    p.add_argument("--clock", default="wall", choices=("wall", "processor"), help="processor: for one thread on a CPU that others use, too")
    p.add_argument("--device", default="auto")
    p.add_argument("--growth", action="store_true", help="also at 1.5 and 2 times the size, and at 2 and 4 times the batch")
    p.add_argument("--memory", action="store_true", help="also measure peak memory, one process a method")
    p.add_argument("--records", type=Path, help="append a JSON line a measurement to this file")
    p.add_argument("--peak-only", action="store_true", help=argparse.SUPPRESS)     # a process of --memory
    return p


def chosen(args) -> dict:
    "The settings that the arguments give."
    return {"patches": tuple(args.patches), "checkpointing": args.checkpointing, "compile": args.compile}


def cases(args) -> list:  # (size, target size, batch)
    "The sizes to measure: the one asked for, and its multiples for the growth."
    size, target = tuple(args.size), tuple(args.target_size)
    found = [(size, target, args.batch)]
    if args.growth:
        found += [(*(tuple(round(k * n / 32) * 32 for n in s) for s in (size, target)), args.batch) for k in (1.5, 2)]
        found += [(size, target, args.batch * k) for k in (2, 4)]
    return found


def measure(args, backbone: str, precision: str, case: tuple, device: torch.device) -> list:  # records
    "All methods at one size."
    size, target_size, n = case
    batch = made_up(size, target_size, n, args.patches, device)
    steps = build_steps(args.methods, backbone, precision, batch, device, **chosen(args))
    seconds, where = take_turns(steps, args.repeats, device, args.clock), machine(device)
    records = []
    for name, step in steps.items():
        flops, middle = counted_flops(step), statistics.median(seconds[name])
        share = share_of_peak(flops, middle, precision, where)
        records.append({"benchmark": "step", "backbone": backbone, "method": name, "precision": precision, "size": size,
                        "target_size": target_size, "batch": n, "seconds": spread(seconds[name]),
                        "clock": args.clock, "repeats": args.repeats,
                        "checkpointing": args.checkpointing, "compile": args.compile,
                        "ratio": round(median_ratio(seconds[name], seconds[BASE]), 3) if BASE in seconds else None,
                        "gflops": round(flops / 1e9, 2), "share_of_peak": share,
                        "peak_mib": peak_of(args, backbone, precision, case, name) if args.memory else None, **where})
    return records


def _only(args, backbone: str, precision: str, case: tuple, device: torch.device):
    "The one step whose memory is measured."
    images = made_up(*case, args.patches, device)
    step, = build_steps(args.methods, backbone, precision, images, device, **chosen(args)).values()
    return step


def peak_of(args, backbone: str, precision: str, case: tuple, method: str) -> float:
    "Peak memory of a method, measured in a process of its own."
    (size, target, batch), text = case, lambda pair: [str(n) for n in pair]
    flags = [f"--{name}" for name in ("checkpointing", "compile") if getattr(args, name)]
    command = [__file__, "--peak-only", *flags, "--backbone", backbone, "--methods", method, "--precision", precision,
               "--size", *text(size), "--target-size", *text(target), "--patches", *text(args.patches), "--batch", str(batch),
               "--device", args.device, "--threads", str(torch.get_num_threads())]
    return peak_elsewhere(command, method)


def peak_elsewhere(command: list, name: str) -> float:  # MiB
    "The number that a Python command prints last."
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process that measures {name} failed: {done.stderr.strip()[-500:]}")
    return round(float(done.stdout.split()[-1]), 1)


def table(records: list) -> str:
    "The records for a reader."
    rows = [f"{'backbone':10}{'method':20}{'precision':10}{'source':>10}{'target':>10}{'batch':>6}"
            f"{'seconds':>10}{'ratio':>8}{'Gflop':>10}{'Gflop/s':>9}{'peak':>7}{'MiB':>8}"]
    for r in records:
        middle = r["seconds"]["median"]
        share = "-" if r["share_of_peak"] is None else f"{r['share_of_peak']:.1%}"
        rows.append(f"{r['backbone']:10}{r['method']:20}{r['precision']:10}{'x'.join(map(str, r['size'])):>10}"
                    f"{'x'.join(map(str, r['target_size'])):>10}{r['batch']:>6}{middle:>10.4f}{r['ratio'] or float('nan'):>8.2f}"
                    f"{r['gflops']:>10.1f}{r['gflops'] / middle:>9.0f}{share:>7}{r['peak_mib'] or float('nan'):>8.0f}")
    return "\n".join(rows)


def main(argv=None) -> list:  # the records
    args = parser().parse_args(argv)
    device, records = usable_device(args.device), []
    with threads(args.threads):
        fitting_clock(args.clock, device)
        for backbone in args.backbone:
            for precision in args.precision:
                for case in cases(args)[:1] if args.peak_only else cases(args):
                    if args.peak_only:
                        return print(peak_mib(lambda b=backbone, p=precision, c=case: _only(args, b, p, c, device), device))
                    records += measure(args, backbone, precision, case, device)
    print(table(records))
    append_records(records, args.records)
    return records


if __name__ == "__main__":
    main()
