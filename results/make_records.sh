#!/usr/bin/env bash
# Make the records of one pair again: bash results/make_records.sh streets|streets_camvid|airsim_camvid [FOLDER]
# Runs that are in FOLDER (default runs/records) are not done again. Weights are the last ones; nothing is chosen here.
# SEEDS and METHODS make a part; NO_COLLECT=1 leaves results/ as it is (for several calls side by side).
set -euo pipefail
cd "$(dirname "$0")/.."
pair=$1 folder=${2:-runs/records}/$1 mlan=${MLAN:-.venv/bin/mlan}
case $pair in
  streets) file=runs_1_streets.jsonl seeds="0 1 2" methods="source_only cr_al mlan oracle rl_al il_al cr_al+st cr_al+rst cr_al+it cr_al+rit
    rll regularized_rl_al regularized_il_al"
    args="--source streets:engine --target streets:camera" ;;
  streets_camvid) file=runs_2_streets_camvid.jsonl seeds="0" methods="source_only cr_al mlan oracle"
    args="--source streets:engine --target camvid --size 96 128 --target-size 96 128 --patches 12 24 48" ;;
  airsim_camvid) file=runs_3_airsim_camvid.jsonl seeds="0" methods="source_only cr_al mlan oracle"
    args="--source airsim_nh --target camvid --size 96 128 --target-size 96 128 --patches 12 24 48" ;;
  *) echo "make_records.sh: $pair is none of streets, streets_camvid, airsim_camvid" >&2; exit 2 ;;
esac
for seed in ${SEEDS:-$seeds}; do
  for method in ${METHODS:-$methods}; do
    $mlan run $args --method "$method" --seed "$seed" --out "$folder/${method}_$seed" --stages "$folder/stages" --quiet
  done
done
[ -n "${NO_COLLECT:-}" ] || python3 results/make_tables.py --collect "$folder" "results/$file"
