# shellcheck shell=bash
# Sourced by the other scripts: go to the repository's root and leave the interpreter in $PYTHON, installing .venv if needed.
# PYTHON=/path/to/python skips the installation and uses that interpreter as it is.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

install_environment() {
    local base=${PYTHON3:-python3} wanted
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: Python 3.11 or newer is needed; set PYTHON3 to one (found: $("$base" --version 2>&1))" >&2
        return 1
    fi
    wanted=$(cat requirements.txt)
    if [ ! -x .venv/bin/python ] || [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
        echo "Installing requirements.txt into .venv (once)"
        if ! "$base" -m venv .venv ||
            ! .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt; then
            echo "error: the installation failed; see the lines above and start again" >&2
            return 1
        fi
        printf '%s\n' "$wanted" >.venv/installed
    fi
    PYTHON=.venv/bin/python
}

if [ -z "${PYTHON:-}" ]; then
    install_environment || exit 1
fi
