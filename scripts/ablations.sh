#!/usr/bin/env bash
# Ablations: c_thought 0 to 3 and uniform_prob 0, 0.05, 0.3, tested with 0 to 6 thoughts forced; trainings, scores, tables, figure.
# Start it again to resume.
#   bash scripts/ablations.sh [args/ablations.yaml] [--quick] [--full] [--processes N] [--dry-run] [--analyse-only]
set -euo pipefail
# shellcheck source=scripts/setup.sh
. "$(dirname "$0")/setup.sh"
exec "$PYTHON" -m analysis.ablations "$@"
