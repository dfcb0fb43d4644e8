"""Pictures of Figure 4 from the folders of finished runs -> pictures_PAIR.npz.

python results/make_pictures.py RUNS    RUNS holds the folders of `mlan experiments`, usually runs/experiments/runs
Predictions and maps only: photographs and truths are read from the data set when they are drawn.
"""
import sys
from pathlib import Path

from make_tables import HERE, records

from mlan.diagnosis import without_photographs
from mlan.experiments import PAIRS, Row, experiment_key, row_records
from mlan.train import load_pictures, save_pictures

METHODS = ("source_only", "rl_al", "il_al", "cr_al", "mlan")


if __name__ == "__main__":
    runs, known = Path(sys.argv[1]), records()
    for name, pair in PAIRS.items():
        first = [r for m in METHODS for r in row_records(known, Row(m), pair) if r["seed"] == r["data_seed"] == 0]
        folders = [runs / f"{r['method']}-{experiment_key(r['settings'])}" for r in first]
        if folders and all((f / "pictures.npz").exists() for f in folders):
            rows = load_pictures(*(f / "pictures.npz" for f in folders))
            save_pictures(HERE / f"pictures_{name}.npz", without_photographs(rows))
            print(name, *(r["method"] for r in first))
