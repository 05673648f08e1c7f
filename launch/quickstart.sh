#!/usr/bin/env bash
# From a fresh clone to digits drawn by a LASADGen: trains on real handwritten ones, draws
# 500, and compares them with the real ones by a classifier that saw only those.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh requirements.txt

run=runs/digits
python -m lasad_jax.train --config=configs/digits.py --workdir="$run"
python -m lasad_jax.sample --workdir="$run" --num=500 --out="$run/samples/digits"
python -m lasad_jax.evaluate --workdir="$run" --samples="$run/samples/digits.npz"
echo "Look at $PWD/$run/samples/digits.png"
