#!/usr/bin/env bash
# Measure speed and memory on a GPU in pieces that can be continued (see benchmarks/bench_gpu.py), JSON and a table.
#   bash scripts/bench_gpu.sh [--seconds 540] [--out DIR] [--only PIECE] [--list] [--full] [--tiny] [--help]
# PYTHON=python3 uses that interpreter as it is: for a machine that has torch and transformers, and no network.
set -euo pipefail
# shellcheck source=scripts/setup.sh
. "$(dirname "$0")/setup.sh"
exec "$PYTHON" -m benchmarks.bench_gpu "$@"
