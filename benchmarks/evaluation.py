"""Scoring: images a second, beside the plain loop that takes one image after the other; both in one run, in turn.

    python benchmarks/evaluation.py --images 8 --rounds 3 --records results/bench_evaluation.jsonl

Scenes are drawn and written as PNG files of 1024 x 2048; the network sees 512 x 1024, and each prediction is scored at its label's size.
The plain loop is how a reader would write it: decode, forward, resize, argmax, one confusion matrix a time. The two matrices
must agree, but for the pixels whose two likeliest classes differ by less than the rounding of another memory layout.
`cpu_seconds` counts all threads; on a machine with other users it says more than the wall's clock.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from records import append_records
from region_labels import machine
from step import device_name

from mlan.backbones import build_extractor
from mlan.evaluation import confusion_matrix, evaluate, network_input
from mlan.networks import Segmenter
from mlan.streets import draw_street
from mlan.trainer import usable_device

CLASSES = 19
LUT = np.arange(256, dtype=np.uint8)


class Files:
    "Images and label maps as PNG files."
    labelled = True

    def __init__(self, folder: Path, n: int, size: tuple):
        self.folder, self.n = folder, n
        for i in range(n):
            for kind, picture in zip(("image", "labels"), draw_street("camera", i, size=size)):
                Image.fromarray(picture).save(folder / f"{kind}_{i}.png")

    def __len__(self) -> int: return self.n
    def image(self, i: int) -> np.ndarray: return np.array(Image.open(self.folder / f"image_{i}.png"))
    def labels(self, i: int) -> np.ndarray: return np.array(Image.open(self.folder / f"labels_{i}.png"))


@torch.inference_mode()
def plain_loop(net, files: Files, size: tuple, device: torch.device) -> torch.Tensor:
    "One image after the other."
    total = torch.zeros(CLASSES, CLASSES, dtype=torch.int64, device=device)
    table = torch.as_tensor(LUT).long().to(device)
    for i in range(len(files)):
        logits = net(network_input(files.image(i), size)[None].to(device))
        labels = table[torch.as_tensor(files.labels(i)).long().to(device)]
        full = F.interpolate(logits.float(), size=labels.shape, mode="bilinear", align_corners=False)[0]
        total += confusion_matrix(full.argmax(0), labels, CLASSES)
    return total.cpu()


def clocked(work) -> tuple:  # what it gives, seconds, CPU seconds
    "The matrices come back to the CPU, so that all work is done when the clock stops."
    start, cpu = time.perf_counter(), time.process_time()
    return work(), time.perf_counter() - start, time.process_time() - cpu


@torch.inference_mode()
def forward_seconds(net, size: tuple, device: torch.device, batches=(1, 2, 4, 8)) -> dict:  # {batch: CPU seconds an image}
    "What an image costs the network alone in batches of several sizes; the least of three. Only said of a CPU."
    if device.type != "cpu":
        return {}
    made = {b: torch.rand(b, *size, 3).permute(0, 3, 1, 2) for b in batches}
    return {b: round(min(clocked(lambda x=x: net(x))[2] for _ in range(3)) / b, 4) for b, x in made.items()}


def compare(net, files: Files, size: tuple, device: torch.device, args) -> dict:
    "Medians over rounds in which both take their turn; the ratio is that of each round."
    def plain(): return plain_loop(net, files, size, device)
    def ours():
        return evaluate(net, files, LUT, CLASSES, size, batch_size=args.batch_size, device=device, threads=args.threads).matrix

    expected, found = plain(), ours()  # warm, and compared
    apart = (expected - found).abs().sum().item() / 2 / expected.sum().item()
    assert expected.sum() == found.sum() and apart < 1e-4, f"{apart:.2e} of the pixels are counted otherwise"
    rounds = [[clocked(work)[1:] for work in (plain, ours)] for _ in range(args.rounds)]
    n = len(files)
    return {"images": n, "plain_images_a_second": n / statistics.median(p[0] for p, _ in rounds),
            "images_a_second": n / statistics.median(o[0] for _, o in rounds),
            "ratio": statistics.median(p[0] / o[0] for p, o in rounds),
            "plain_cpu_seconds": statistics.median(p[1] for p, _ in rounds) / n,
            "cpu_seconds": statistics.median(o[1] for _, o in rounds) / n,
            "cpu_ratio": statistics.median(p[1] / o[1] for p, o in rounds), "otherwise": apart}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[512, 1024], help="of the network's input")
    parser.add_argument("--label-size", type=int, nargs=2, default=[1024, 2048])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="at most: evaluate takes fewer on a CPU")
    parser.add_argument("--threads", type=int, default=4, help="that read ahead")
    parser.add_argument("--backbone", default="small")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--records", type=Path, help="append the record to this file, a JSON object a line")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = usable_device(args.device)
    net = Segmenter(build_extractor(args.backbone, "none"), CLASSES).eval().to(device, memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        result = {"forward_cpu_seconds": forward_seconds(net, tuple(args.size), device)}
        result |= compare(net, Files(Path(folder), args.images, tuple(args.label_size)), tuple(args.size), device, args)
    about = {**machine(), "device": device_name(device)}
    record = {"benchmark": "evaluation", "backbone": args.backbone, "size": args.size, "label_size": args.label_size,
              "batch_size": args.batch_size, "threads": args.threads, "torch_threads": torch.get_num_threads(), "rounds": args.rounds,
              **{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}, **about}
    for key, value in record.items():
        print(f"{key:22} {value}")
    append_records([record], args.records)


if __name__ == "__main__":
    main()
