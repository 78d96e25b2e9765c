#!/usr/bin/env bash
# A whole study in one command: data, trainings, experiments, verdict, report. Start it again to resume.
#   bash scripts/study.sh args/study_quickstart.yaml [--quick] [--models m1,m3] [--seeds 0,1] [--dry-run]
set -euo pipefail
# shellcheck source=scripts/setup.sh
. "$(dirname "$0")/setup.sh"
exec "$PYTHON" -m analysis.study "$@"
