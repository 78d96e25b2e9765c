#!/usr/bin/env bash
# How the runs on another machine stand: a line each, then its GPU and disk.
#   bash scripts/status.sh user@host [--watch SECONDS] [--dir DIR] [--port P] [--identity FILE]
#   --watch SECONDS   show it again and again, until Ctrl-C
# On the machine itself: python -m analysis.status logs runs
set -euo pipefail
# shellcheck source=scripts/remote.sh
. "$(dirname "$0")/remote.sh"

watch=""
while [ $# -gt 0 ]; do
    taken=2
    case "$1" in
        --watch) watch=$(value "$@") ;;
        *) common_argument "$@" ;;
    esac
    shift "$taken"
done
connect_options
[ ${#names[@]} -eq 0 ] || fail "${names[0]}: nothing may follow the host but options; all runs are shown"
[[ -z "$watch" || "$watch" =~ ^[1-9][0-9]*$ ]] || fail "--watch needs whole seconds, not $watch"

show() { # show WIDTH [PYTHON]
    local places=() python=${2:-.venv/bin/python}
    command -v "$python" >/dev/null || python=python3
    if [ -d logs ]; then places+=(logs); fi
    if [ -d runs ]; then places+=(runs); fi
    if [ ${#places[@]} -eq 0 ]; then
        echo "no runs yet"
    else
        "$python" -m analysis.status "${places[@]}" --width "$1"
    fi
}

width() { # of the terminal here
    local size
    size=$({ stty size </dev/tty; } 2>/dev/null) || size="24 100"
    echo "${COLUMNS:-${size#* }}"
}

while :; do
    shown=$(on_box show "$(width)" "$python") || {
        [ -n "$watch" ] || exit 2
        shown="no answer from $host"
    }
    if [ -z "$watch" ]; then
        printf '%s\n' "$shown"
        exit 0
    fi
    printf '\033[H\033[2J%s\n\n%s: every %s s, Ctrl-C ends this (the runs go on)\n' "$shown" "$(date +%T)" "$watch"
    sleep "$watch"
done
