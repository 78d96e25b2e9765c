#!/usr/bin/env bash
# The A x B x C study of LAHR: power, eight cells x seeds, scores on test rows, statistics. Start it again to resume.
#   bash scripts/factorial.sh args/lahr_factorial.yaml [--processes N] [--seeds 0,1] [--cells baseline,A] [--dry-run] [--quick]
set -euo pipefail
# shellcheck source=scripts/setup.sh
. "$(dirname "$0")/setup.sh"
exec "$PYTHON" -m analysis.factorial "$@"
