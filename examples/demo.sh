#!/usr/bin/env bash
# Compiles the Mixture-of-Experts model of this repository to ONNX, checks it, measures it and lets it write.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-build/demo}
mkdir -p "$(dirname "$out")"
step() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

step moec compile examples/models/tiny-moe -o "$out" --force
step moec inspect "$out"
step moec verify "$out"
step moec eval "$out" --compare --text examples/data/kjv.heldout.txt --text examples/data/shakespeare.heldout.txt
step moec bench "$out"
step moec run "$out" --prompt "And the LORD said unto" --prompt "KING HENRY." --max-new-tokens 40 --temperature 0.7 --seed 1
printf '\nThe report is %s/report.html\n' "$out"
