#!/usr/bin/env bash
# Stop runs on another machine: a run saves and ends, and goes on when it is launched again.
#   bash scripts/stop.sh user@host [RUN ...] [--now] [--dir DIR] [--port P] [--identity FILE]
# Without names: all that waits is taken out of the queue, and the run that trains is stopped. Waits until it has ended.
#   --now             kill it; it goes on from what was saved last (within an epoch: every save_every_steps updates)
set -euo pipefail
# shellcheck source=scripts/remote.sh
. "$(dirname "$0")/remote.sh"

now=""
while [ $# -gt 0 ]; do
    taken=1
    case "$1" in
        --now) now=--now ;;
        *) common_argument "$@" ;;
    esac
    shift "$taken"
done
connect_options

stop() {
    bash scripts/run_queue.sh stop "$@" </dev/null
}
on_box stop ${now:+"$now"} ${names[@]+"${names[@]}"}
