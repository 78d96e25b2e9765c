#!/usr/bin/env bash
# On the machine that trains: runs one after another in the background, started again when they were cut.
#   bash scripts/run_queue.sh add NPROC CONFIG [CONFIG ...] [-- key=value ...]   NPROC: processes a run, or auto (all GPUs)
#   bash scripts/run_queue.sh stop [--now] [RUN ...]                            without names: the queue and what runs
# In logs/: RUN.log (appended to), RUN.pid, RUN.exit (code and word), RUN.job (what it is), queue.log, queue.pid, queue.list.
# QUEUE_RETRIES (3), QUEUE_PAUSE (30): how often and after how many seconds a run that was cut is started again.
set -euo pipefail

usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit "${2:-2}"
}

say() { # a line of queue.log, or of the terminal
    printf '%s %s\n' "$(date '+%F %T')" "$*"
}

# ---------------------------------------------------------------- the queue's files; fields end with a NUL, so any name will do

locked() { # run a function while nobody else changes the queue
    local code=0
    exec 9>logs/queue.lock
    flock 9
    "$@" || code=$?
    exec 9>&-
    return "$code"
}

alive() { # whether the process of a pid file runs and is one of ours (numbers are given again)
    local pid
    pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null &&
        grep -qaE 'run\.py|run_queue' "/proc/$pid/cmdline" 2>/dev/null
}

written() { # written FILE [FIELD ...]: replace a file's fields, whole
    local file=$1
    shift
    if [ $# -gt 0 ]; then printf '%s\0' "$@"; fi >"$file.new"
    mv -f -- "$file.new" "$file"
}

read_fields() { # into $fields
    fields=()
    [ ! -f "$1" ] || mapfile -d '' fields <"$1"
}

is_current() { # whether the queue is at this run
    local fields
    read_fields logs/queue.current
    [ "${fields[0]:-}" = "$1" ] && alive logs/queue.pid
}

is_waiting() { # in a queue that works
    local fields name
    alive logs/queue.pid || return 1
    read_fields logs/queue.list
    for name in "${fields[@]}"; do
        if [ "$name" = "$1" ]; then return 0; fi
    done
    return 1
}

# ---------------------------------------------------------------- add

describe() { # names and folders of the runs of configs, checked as run.py will check them
    "$PYTHON" - "$@" <<'PY'
import sys
from pathlib import Path

from utils import load_config

split = sys.argv.index("--")
configs, overrides = sys.argv[1:split], sys.argv[split + 1 :]
try:
    for path in configs:
        config = load_config(path, overrides)
        if config.name == "queue" or config.name.startswith((".", "-")):
            raise ValueError(f"{path}: name: {config.name} would collide with files of the queue; choose another")
        for key in ["val_path"] if config.only_eval else ["train_path", "val_path"]:
            if not Path(getattr(config, key)).is_file():
                raise ValueError(f"{path}: {key}: there is no {getattr(config, key)} on this machine; copy or make it")
        print(config.name, config.run_dir, path, sep="\0", end="\0")
except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
PY
}

enqueue() { # all of $described, or nothing; start the queue where none works
    local i name fields
    for ((i = 0; i < ${#described[@]}; i += 3)); do
        name=${described[i]}
        if alive "logs/$name.pid" || is_current "$name"; then
            fail "$name is running already (process $(cat "logs/$name.pid")); see scripts/status.sh"
        fi
        if is_waiting "$name"; then fail "$name is waiting in the queue already; see scripts/status.sh"; fi
    done
    if ! alive logs/queue.pid; then # what waited for a queue that was killed, by a restart for example
        read_fields logs/queue.list
        for name in "${fields[@]}"; do
            printf 'Note: %s waited in a queue that is gone; launch it again if it is still wanted\n' "$name"
        done
        written logs/queue.list
    fi
    for ((i = 0; i < ${#described[@]}; i += 3)); do
        name=${described[i]}
        rm -f -- "logs/$name.exit" "logs/$name.stop"
        written "logs/$name.job" "$PYTHON" "$nproc" "${described[i + 1]}" "${described[i + 2]}" "${overrides[@]}"
        printf '%s\0' "$name" >>logs/queue.list
        printf 'queued: %s (log: %s, outputs: %s)\n' "$name" "logs/$name.log" "${described[i + 1]}"
    done
    if alive logs/queue.pid; then
        echo "The queue works already; what is new runs after what waits"
        return
    fi
    nohup setsid bash scripts/run_queue.sh work >>logs/queue.log 2>&1 </dev/null 9>&- &
    echo $! >logs/queue.pid
}

add() {
    nproc=${1:-auto} configs=() overrides=()
    shift
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        configs+=("$1")
        shift
    done
    [ $# -eq 0 ] || { shift; overrides=("$@"); }
    [ ${#configs[@]} -gt 0 ] || fail "name a config"
    if [ "$nproc" = auto ]; then
        nproc=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || nproc=1
    fi
    [[ "$nproc" =~ ^[1-9][0-9]*$ ]] || fail "the number of processes must be 1 or more, not $nproc"
    mkdir -p logs
    describe "${configs[@]}" -- "${overrides[@]}" >"logs/.described-$$" || { rm -f "logs/.described-$$"; exit 2; }
    mapfile -d '' described <"logs/.described-$$"
    rm -f "logs/.described-$$"
    twice=$(
        for ((i = 0; i < ${#described[@]}; i += 3)); do printf '%s\0' "${described[i]}"; done |
            sort -z | uniq -zd | tr '\0' ' '
    )
    [ -z "$twice" ] || fail "two of the configs are named ${twice% }; give one another name"
    locked enqueue
}

# ---------------------------------------------------------------- work: in the background, until nothing waits

take_next() { # the first that waits becomes the current one; with none left the queue ends, before anyone can add to it
    local fields
    read_fields logs/queue.list
    if [ ${#fields[@]} -eq 0 ]; then
        rm -f logs/queue.pid logs/queue.current
        return 1
    fi
    written logs/queue.current "${fields[0]}"
    written logs/queue.list "${fields[@]:1}"
}

attempt() { # run the current command once; sets $code as a shell would: 128 + signal for a killed process
    local pid
    code=0
    setsid "${command[@]}" >>"logs/$name.log" 2>&1 </dev/null &
    pid=$!
    echo "$pid" >"logs/$name.pid"
    if [ -f "logs/$name.stop" ]; then kill -TERM "$pid" 2>/dev/null || true; fi # asked for before there was a process
    wait "$pid" || code=$?
}

run_one() { # one run to its end: done, failed, or stopped
    local name=$1 fields python nproc config overrides command code word tries=0
    read_fields "logs/$name.job"
    python=${fields[0]} nproc=${fields[1]} config=${fields[3]} overrides=("${fields[@]:4}")
    command=("$python")
    if [ "$nproc" -gt 1 ]; then command+=(scripts/torchrun.py --standalone "--nproc_per_node=$nproc"); fi
    command+=(run.py "$config" "${overrides[@]}")
    while :; do
        say "$name: starts"
        attempt
        say "$name: ended with code $code"
        case $code in
            0) word="done" ;;
            75) word=stopped ;;
            *) word=failed ;;
        esac
        if [ "$code" -ne 0 ] && [ -f "logs/$name.stop" ]; then word=stopped; fi
        if [ "$code" -ne 75 ] && [ "$code" -le 128 ] || [ -f "logs/$name.stop" ] || [ "$tries" -ge "${QUEUE_RETRIES:-3}" ]; then
            break
        fi
        tries=$((tries + 1))
        say "$name: was cut; starts again in ${QUEUE_PAUSE:-30} s ($tries of ${QUEUE_RETRIES:-3})"
        for ((i = 0; i < ${QUEUE_PAUSE:-30}; i++)); do
            [ -f "logs/$name.stop" ] || sleep 1
        done
        if [ -f "logs/$name.stop" ]; then
            word=stopped
            break
        fi
    done
    rm -f -- "logs/$name.stop"
    echo "$code $word" >"logs/$name.exit.new"
    mv -f -- "logs/$name.exit.new" "logs/$name.exit"
}

work() {
    local fields
    while locked take_next; do
        read_fields logs/queue.current
        run_one "${fields[0]}"
    done
    say "nothing waits any more"
}

# ---------------------------------------------------------------- stop

children() {
    grep -ls "^PPid:[[:space:]]*$1\$" /proc/[0-9]*/status | cut -d / -f 3
}

descendants() { # a process and all below it, also those in sessions of their own
    local child
    echo "$1"
    for child in $(children "$1"); do
        descendants "$child"
    done
}

signal() { # to a run: KILL to all its processes, or TERM to those that save
    local pid=$1
    # shellcheck disable=SC2046 # numbers
    if [ -n "$now" ]; then
        kill -KILL $(descendants "$pid")
    elif [ "$(tr '\0' ' ' <"/proc/$pid/cmdline" | grep -c scripts/torchrun.py)" -gt 0 ] && [ -n "$(children "$pid")" ]; then
        kill -TERM $(children "$pid") # torchrun itself would give them 30 s
    else
        kill -TERM -- "-$pid" || kill -TERM "$pid" # a process that has not become the leader of its group yet
    fi
} 2>/dev/null

ask_to_stop() { # withdraw a run that waits; send a signal to one that runs. Says which it was in $asked
    local name=$1 fields kept=() other
    asked=nothing
    if is_waiting "$name"; then
        read_fields logs/queue.list
        for other in "${fields[@]}"; do
            if [ "$other" != "$name" ]; then kept+=("$other"); fi
        done
        written logs/queue.list "${kept[@]}"
        echo "143 stopped" >"logs/$name.exit"
        asked=withdrawn
    elif is_current "$name" || alive "logs/$name.pid"; then
        : >"logs/$name.stop"
        asked=running
        if alive "logs/$name.pid"; then signal "$(cat "logs/$name.pid")" || true; fi
    fi
}

report_end() { # wait until a run that was asked to stop is gone, and say how it went
    local name=$1 begin=$SECONDS code word
    while alive "logs/$name.pid" || is_current "$name"; do
        [ $((SECONDS - begin)) -lt "${STOP_WAIT:-300}" ] ||
            fail "$name has not ended within ${STOP_WAIT:-300} s; --now kills it, and it goes on from what was saved" 1
        sleep 0.3
    done
    read -r code word 2>/dev/null <"logs/$name.exit" || code=143 word=stopped
    case "$code $word" in
        "0 done") echo "$name: had just ended by itself, done" ;;
        75*) echo "$name: stopped, everything saved; launch it again and it goes on" ;;
        *stopped) echo "$name: stopped (code $code); launched again it goes on from what was saved last" ;;
        *) echo "$name: ended with code $code; see logs/$name.log" ;;
    esac
}

stop() {
    local fields name asked now="" stopped=() given=()
    if [ "${1:-}" = --now ]; then
        now=yes
        shift
    fi
    [ -d logs ] || fail "nothing was ever launched here (there is no folder logs)"
    given=("$@")
    if [ $# -eq 0 ]; then # first those that wait, or the queue would start the next one
        read_fields logs/queue.list
        given=("${fields[@]}")
        for name in logs/*.job; do
            name=${name#logs/} name=${name%.job}
            if is_current "$name" || alive "logs/$name.pid"; then given+=("$name"); fi
        done
        [ ${#given[@]} -gt 0 ] || echo "nothing is running and nothing waits"
    fi
    for name in "${given[@]}"; do
        [ -f "logs/$name.job" ] || fail "there is no run $name here; see scripts/status.sh"
    done
    for name in "${given[@]}"; do
        locked ask_to_stop "$name"
        case $asked in
            withdrawn) echo "$name: taken out of the queue" ;;
            running) stopped+=("$name") ;;
            nothing) echo "$name: is not running" ;;
        esac
    done
    for name in "${stopped[@]}"; do
        report_end "$name"
    done
}

case "${1:-}" in
    add)
        # shellcheck source=scripts/setup.sh
        . "$(dirname "$0")/setup.sh"
        "$@"
        ;;
    work | stop)
        cd "$(dirname "${BASH_SOURCE[0]}")/.."
        "$@"
        ;;
    -h | --help) usage ;;
    *) usage >&2; exit 2 ;;
esac
