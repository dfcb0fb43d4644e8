"""How many images a second reach training, at the paper's size: frames in GTA5's layout, decoded and resized, and the same prepared.

python benchmarks/decode.py                      about a minute; the frames are made in a temporary folder
python benchmarks/decode.py --out FILE.jsonl     appends the record, too
All files are read once before, so that memory and not the disk is measured.
"""

import argparse
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from records import append_records

from mlan.checks import check_dataset
from mlan.label_spaces import CITYSCAPES_IDS
from mlan.layouts import gta5, open_dataset
from mlan.samples import Loader, Samples, Stream, prepare
from mlan.streets import Streets


def write_frames(root: Path, n: int, size: tuple[int, int]) -> float:
    "Streets drawn at a quarter, enlarged, and given a camera's noise, so that PNGs are as large as the published ones; their mean MB."
    drawn, rng, megabytes = Streets("engine", size=(size[0] // 4, size[1] // 4), n=n), np.random.default_rng(0), []
    raw = np.zeros(256, np.uint8)
    raw[:19] = CITYSCAPES_IDS.ids
    for part in ("images", "labels"):
        (root / part).mkdir(parents=True)
    for i in range(n):
        smooth = np.asarray(Image.fromarray(drawn.image(i)).resize(size[::-1], Image.Resampling.BICUBIC), np.float32)
        noisy = (smooth + rng.normal(0, 1.2, (*size, 1))).round().clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(root / "images" / f"{i + 1:05d}.png")
        labels = Image.fromarray(raw[drawn.labels(i)]).resize(size[::-1], Image.Resampling.NEAREST)
        labels.putpalette(list(range(256)) * 3)
        labels.save(root / "labels" / f"{i + 1:05d}.png")
        megabytes.append((root / "images" / f"{i + 1:05d}.png").stat().st_size / 1e6)
    return float(np.mean(megabytes))


def rate(read, seconds: float, batch: int) -> tuple[float, float]:
    "Images a second over at least so many seconds, after four batches that fill what is read ahead; this process's milliseconds an image."
    for step in range(4):
        read(step)
    start, busy, step = time.perf_counter(), time.process_time(), 4
    while time.perf_counter() - start < seconds:
        read(step)
        step += 1
    images = (step - 4) * batch
    return round(images / (time.perf_counter() - start), 1), round(1000 * (time.process_time() - busy) / images, 1)


def measure(folder: Path, args) -> dict:
    "What one look at the files and each way of reading them gives."
    megabytes = write_frames(folder / "gta5", args.frames, tuple(args.frame_size))
    found, start = {}, time.perf_counter()
    check_dataset(gta5(folder / "gta5", "train"))
    checked = args.frames / (time.perf_counter() - start)
    start = time.perf_counter()
    prepare(f"gta5:{folder}/gta5", tuple(args.size), folder / "ready")
    prepared = args.frames / (time.perf_counter() - start)
    for name, spec in (("PNG", f"gta5:{folder}/gta5"), ("prepared", f"prepared:{folder}/ready")):
        samples = Samples(open_dataset(spec, "train"), tuple(args.size), max_bytes=0)
        for workers in args.workers:
            loader = Loader(samples, Stream(len(samples), args.batch), workers)
            found[f"{name}, {workers} workers"] = rate(loader, args.seconds, args.batch)
            del loader
    return {"png_megabytes": round(megabytes, 2), "pairs_checked_per_second": round(checked, 1),
            "pairs_prepared_per_second": round(prepared, 1), "images_per_second": {way: images for way, (images, _) in found.items()},
            "main_process_ms_per_image": {way: busy for way, (_, busy) in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--frame-size", type=int, nargs=2, default=(1052, 1914), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--size", type=int, nargs=2, default=(720, 1280), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--workers", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6, help="for each way")
    parser.add_argument("--out", type=Path, help="a .jsonl file to append the record to")
    args = parser.parse_args()
    load = round(os.getloadavg()[0], 1)  # processes of others that share the processors
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), args)
    record = {"frame_size": list(args.frame_size), "size": list(args.size), "frames": args.frames, "batch": args.batch, **measured,
              "processors": os.cpu_count(), "load_before": load, "machine": platform.machine(), "python": platform.python_version(),
              "versions": {name: version(name) for name in ("torch", "pillow", "numpy")}}
    print(f"frames of {record['frame_size']} ({record['png_megabytes']} MB a PNG) to {record['size']}")
    print(f"{record['processors']} processors, load {load} before")
    print(f"check {record['pairs_checked_per_second']} pairs/s, prepare {record['pairs_prepared_per_second']} pairs/s")
    for way, images in record["images_per_second"].items():
        print(f"{way:22s} {images:8.1f} images/s, {record['main_process_ms_per_image'][way]:6.1f} ms of the main process an image")
    append_records([record], args.out)


if __name__ == "__main__":
    main()
