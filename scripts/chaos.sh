#!/usr/bin/env bash
# Faults on purpose: killed, stopped, full disk, damaged files ...; every run must end as if nothing had happened (tests/chaos.py).
#   bash scripts/chaos.sh [--quick] [--only FAULT,...] [--list] [--seed N] [--out results/chaos]
set -euo pipefail
# shellcheck source=scripts/setup.sh
. "$(dirname "$0")/setup.sh"
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
exec "$PYTHON" tests/chaos.py "$@"
