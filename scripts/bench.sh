#!/usr/bin/env bash
# Measure the speed ratios on the CPU (see benchmarks/bench.py) and write benchmarks/cpu.json and cpu.md.
#   bash scripts/bench.sh [--quick] [--out DIR] [--help]
set -euo pipefail
# shellcheck source=scripts/setup.sh
. "$(dirname "$0")/setup.sh"
exec "$PYTHON" -m benchmarks.bench "$@"
