#!/usr/bin/env bash
# Judge a study's logs: every gate, or the one named by a later --gate.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: scripts/check_gates.sh LOG_DIR [more arguments of analysis/gates.py]

  scripts/check_gates.sh logs                       every gate
  scripts/check_gates.sh logs --gate post           checks after training
  scripts/check_gates.sh logs --gate flags          red flags
  scripts/check_gates.sh logs --runs runs --gate 3  one gate, run folders given

Exit code: 0 nothing blocks, 1 a blocking failure, 2 nothing could be decided yet or a mistake in the command.
EOF
}

case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    "" | -*) usage >&2; exit 2 ;;
esac

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
logs="$1"
shift
exec "$python" "$root/analysis/gates.py" --gate all --logs "$logs" "$@"
