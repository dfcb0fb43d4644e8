"""Pictures of Figure 4 from the folders of finished runs -> pictures_PAIR.npz.

python results/make_pictures.py RUNS    RUNS holds the folders of `mlan experiments`, usually runs/experiments/runs
Predictions and maps only: photographs and truths are read from the data set when they are drawn.
"""
import sys
from pathlib import Path

from make_tables import HERE, records

from mlan.run_folder import load_pictures, save_pictures
from mlan.study.diagnosis import without_photographs
from mlan.study.records import experiment_key, row_records
from mlan.study.rows import PAIRS, Row

METHODS = ("source_only", "rl_al", "il_al", "cr_al", "mlan")


def main(runs: Path):
    "What can be made is made; of the rest it is said what lacks."
    if not runs.is_dir():
        sys.exit(f"there is no folder {runs}; give the folder `runs` of `mlan experiments`")
    known = records()
    for pair in PAIRS:
        first = [r for m in METHODS for r in row_records(known, Row(m), pair) if r["seed"] == r["data_seed"] == 0 and r["miou"] is not None]
        files = [runs / f"{r['method']}-{experiment_key(r['settings'])}" / "pictures.npz" for r in first]
        if lacking := [r["method"] for r, file in zip(first, files) if not file.exists()] or {*METHODS} - {r["method"] for r in first}:
            print(f"{pair}: not made, for {runs} has no pictures of {', '.join(sorted(lacking))} at seed 0")
            continue
        save_pictures(HERE / f"pictures_{pair}.npz", without_photographs(load_pictures(*files)))
        print(f"{pair}:", *(r["method"] for r in first))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python results/make_pictures.py RUNS")
    main(Path(sys.argv[1]))
