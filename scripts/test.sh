#!/usr/bin/env bash
# The tests, offline, on the CPU; installs the environment if needed.
#   bash scripts/test.sh [pytest arguments, e.g. -k resume]; --all: also the slow ones; -n 0 runs them one after the other, in this process
set -euo pipefail
# shellcheck source=scripts/setup.sh
. "$(dirname "$0")/setup.sh"
export HF_HUB_OFFLINE=1 WANDB_MODE=disabled CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder "$@"
