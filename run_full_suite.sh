#!/usr/bin/env bash
# The whole matrix: every dp x tp x pp that fits, against one device. Sets up what is missing.
#
#   bash run_full_suite.sh [arguments of `parity run`]
#
#   TRAIN_STEPS    training steps per run                 (matrix.yaml: 10)
#   MICRO_BATCHES  microbatches per dp rank and step      (matrix.yaml: 8)
#   THRESH         allow this relative error everywhere   (default: bounds measured per tensor)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source tests/setup.sh
find_python

chosen=()
[ -n "${TRAIN_STEPS:-}" ] && chosen+=(--steps "$TRAIN_STEPS")
[ -n "${MICRO_BATCHES:-}" ] && chosen+=(--set "micro_batches=$MICRO_BATCHES")
[ -n "${THRESH:-}" ] && chosen+=(--thresh "$THRESH")
exec "$PYTHON" -m parity run "${chosen[@]}" "$@"
