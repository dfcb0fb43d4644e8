"""Region labels of a whole data set: maps a second, and memory, at growing sizes; what GTA5's 24,966 maps would take.

    python benchmarks/region_labels.py --sizes 50 100 200 400 --jobs 1 2 --records results/bench_region_labels.jsonl

The built-in scenes are drawn, enlarged to 720 x 1280 by the nearest pixel, and written as PNG files; labelling reads them as it would
read GTA5's. Each measurement has a process of its own. `cpu_seconds` counts all processes and is what a busy machine leaves
unchanged; `seconds` is the wall's. Memory is the parent's peak, and with several jobs the largest worker's peak for each of them.
"""

import argparse
import json
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from joblib.externals.loky import get_reusable_executor
from PIL import Image
from records import append_records, commit, cpu_name

from mlan.region_labels import RegionLabeller, RegionSettings, fit_vocabularies, label_dataset
from mlan.streets import draw_street

GTA5 = 24966  # maps
SIZE = 720, 1280


@dataclass
class LabelFiles:
    "Label maps by index, read from PNG files that come round again."
    files: list

    def __call__(self, i: int) -> np.ndarray:
        return np.asarray(Image.open(self.files[i % len(self.files)]))


def write_maps(folder: Path, n: int) -> LabelFiles:
    "n scenes drawn at 256 x 512 and enlarged."
    rows, cols = ((np.arange(n) + .5) * small / n for n, small in zip(SIZE, (256, 512)))
    files = [folder / f"{i:04}.png" for i in range(n)]
    for i, file in enumerate(files):
        labels = draw_street("engine", i, size=(256, 512))[1]
        Image.fromarray(labels[rows.astype(int)][:, cols.astype(int)]).save(file)
    return LabelFiles(files)


def used(who: int) -> tuple:  # CPU seconds, peak resident MiB
    "What this process, or its children that have ended, used."
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def measure(given: Path, n: int, jobs: int) -> dict:
    "Label n maps in this process and its workers."
    maps, labeller = pickle.loads(given.read_bytes())
    before, start = used(resource.RUSAGE_SELF)[0], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        label_dataset(maps, n, labeller, jobs, folder, chunk=16)  # small chunks: fifty maps are to keep two workers busy
    seconds = time.perf_counter() - start
    if jobs > 1:
        get_reusable_executor().shutdown(wait=True)
    (own, peak), (of_workers, largest) = used(resource.RUSAGE_SELF), used(resource.RUSAGE_CHILDREN)
    return {"maps": n, "jobs": jobs, "seconds": round(seconds, 2), "cpu_seconds": round(own - before + of_workers, 2),
            "maps_a_second": round(n / seconds, 2), "peak_mib": round(peak + (largest * jobs if jobs > 1 else 0))}


def machine() -> dict:
    "What a record says about where it was measured."
    return {"device": cpu_name(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "commit": commit()}


def report(rows: list):
    "The table, and what it says of GTA5."
    print(f"{'maps':>6} {'jobs':>5} {'seconds':>9} {'maps/s':>8} {'CPU s':>8} {'peak MiB':>9}")
    for r in rows:
        print(f"{r['maps']:6} {r['jobs']:5} {r['seconds']:9.1f} {r['maps_a_second']:8.1f} {r['cpu_seconds']:8.1f} {r['peak_mib']:9}")
    for jobs in sorted({r["jobs"] for r in rows}):
        n, seconds, cpu = np.array([(r["maps"], r["seconds"], r["cpu_seconds"]) for r in rows if r["jobs"] == jobs], float).T
        if len(n) > 1:
            (wall, _), (work, _) = np.polyfit(n, seconds, 1), np.polyfit(n, cpu, 1)
            print(f"{jobs} job(s): {1 / wall:.1f} maps a second by the slope; {GTA5:,} maps in {GTA5 * wall / 3600:.2f} hours "
                  f"({GTA5 * work / 3600:.2f} CPU hours)")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 100, 200, 400])
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--files", type=int, default=100, help="distinct maps")
    parser.add_argument("--records", type=Path, help="append the records to this file, a JSON object a line")
    parser.add_argument("--one", nargs=3, metavar=("GIVEN", "MAPS", "JOBS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        return print(json.dumps(measure(Path(args.one[0]), *map(int, args.one[1:]))))
    with tempfile.TemporaryDirectory() as folder:
        maps, settings = write_maps(Path(folder), args.files), RegionSettings()
        start = time.perf_counter()
        labeller = RegionLabeller(fit_vocabularies(maps, GTA5, settings), settings)
        print(f"vocabularies of {[v.n for v in labeller.vocabularies]} relations in {time.perf_counter() - start:.0f} s, whatever the set")
        given = Path(folder) / "given.pickle"
        given.write_bytes(pickle.dumps((maps, labeller)))
        rows = []
        for jobs in args.jobs:
            for n in args.sizes:
                call = [sys.executable, __file__, "--one", str(given), str(n), str(jobs)]
                rows.append(json.loads(subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]))
        report(rows)
    append_records([{"benchmark": "region_labels", "size": SIZE, **r, **machine()} for r in rows], args.records)


if __name__ == "__main__":
    main()
