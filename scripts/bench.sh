#!/usr/bin/env bash
# Measure the speed ratios of benchmarks/bench.py and write benchmarks/cpu.* or gpu.* (JSON and a table).
#   bash scripts/bench.sh [--quick] [--out DIR] [--help]
set -euo pipefail
# shellcheck source=scripts/setup.sh
. "$(dirname "$0")/setup.sh"
exec "$PYTHON" benchmarks/bench.py "$@"
