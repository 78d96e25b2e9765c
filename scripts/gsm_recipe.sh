#!/usr/bin/env bash
# GSM8K from nothing to its lines of Table 1: chain of thought, Coconut from its best checkpoint, the choice among fully latent
# checkpoints by validation, the test set with the right number of latents, the table. Start it again to resume.
#   bash scripts/gsm_recipe.sh [--args-prefix gsm|arith_gsm] [--rows cot,coconut] [--seed N] [--gpus N] [--out DIR] [--dry-run]
#                              [key=value ...]      overrides of every config; --help says more
set -euo pipefail
# shellcheck source=scripts/setup.sh
. "$(dirname "$0")/setup.sh"
exec "$PYTHON" -m analysis.gsm_recipe "$@"
