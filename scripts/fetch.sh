#!/usr/bin/env bash
# Bring logs, metrics, records and checkpoints of runs from another machine to the same places here; only what is new.
#   bash scripts/fetch.sh user@host [RUN ...] [--checkpoints best|last|all|none|N,M] [--to DIR] [--dir DIR] [--port P]
# RUN is a run's name, or its folder on the box; without any all runs that were launched, and all below runs/.
#   --checkpoints     which checkpoint_N come, with their state_N (default: best)
#   --to DIR          below another folder (default: this tree)
# Start it again after an interruption: it goes on, also within a checkpoint. A file appears in its place when it is whole.
set -euo pipefail
# shellcheck source=scripts/remote.sh
. "$(dirname "$0")/remote.sh"

checkpoints=best to=$here
while [ $# -gt 0 ]; do
    taken=2
    case "$1" in
        --checkpoints) checkpoints=$(value "$@") ;;
        --to) to=$(value "$@") ;;
        *) common_argument "$@" ;;
    esac
    shift "$taken"
done
connect_options
[[ "$checkpoints" =~ ^(best|last|all|none|[0-9]+(,[0-9]+)*)$ ]] ||
    fail "--checkpoints must be best, last, all, none or numbers like 10,50, not $checkpoints"

describe() { # describe PLACE [TEST OF FIND ...]: "bytes seconds name" of each file, ended by a NUL
    find -H "$@" -type f -printf '%s %Ts %p\0' 2>/dev/null || true
}

numbers_of() { # the numbers of a run folder's checkpoints, rising
    find -H "$1" -maxdepth 1 -name 'checkpoint_*' | sed -nE 's/.*checkpoint_([0-9]+)$/\1/p' | sort -n
}

listing() { # listing CHECKPOINTS [RUN ...]: all files that are asked for
    local checkpoints=$1 run folder number numbers fields folders=()
    declare -A seen=()
    shift
    shopt -s nullglob
    if [ $# -eq 0 ]; then
        for run in logs/*.job; do
            run=${run#logs/}
            set -- "$@" "${run%.job}"
        done
        for run in runs/*/run.json runs/*/*/run.json; do folders+=("${run%/run.json}"); done
        [ $(($# + ${#folders[@]})) -gt 0 ] || { echo "error: there are no runs on the box yet" >&2; exit 2; }
    fi
    for run in "$@"; do
        if [ -f "logs/$run.job" ]; then
            mapfile -d '' fields <"logs/$run.job"
            folders+=("${fields[2]}")
            describe "logs/$run.log" "logs/$run.exit"
        elif [ -d "$run" ]; then
            folders+=("$run")
        else
            printf 'error: there is no run %s on the box; scripts/status.sh lists them\n' "$run" >&2
            exit 2
        fi
    done
    describe logs/queue.log
    for folder in "${folders[@]}"; do
        folder=$(realpath -sm --relative-to=. -- "$folder")
        case "$folder/" in
            ../*)
                printf 'Warning: %s lies outside the folder of the runs and does not come; copy it by hand\n' "$folder" >&2
                continue
                ;;
        esac
        if [ ! -d "$folder" ] || [ -n "${seen[$folder]:-}" ]; then continue; fi # one that waits has nothing yet
        seen[$folder]=yes
        describe "$folder" -maxdepth 1 \( -name '*.jsonl' -o -name run.json -o -name best.json \)
        case "$checkpoints" in
            none) continue ;;
            best) numbers=$(sed -nE 's/.*"file": *"checkpoint_([0-9]+)".*/\1/p' "$folder/best.json" 2>/dev/null) || true ;;
            last) numbers=$(numbers_of "$folder" | tail -n 1) ;;
            all) numbers=$(numbers_of "$folder") ;;
            *) numbers=${checkpoints//,/ } ;;
        esac
        for number in $numbers; do
            describe "$folder/checkpoint_$number" "$folder/state_$number"
            [ -f "$folder/checkpoint_$number" ] || printf 'Warning: %s has no checkpoint_%s\n' "$folder" "$number" >&2
        done
        [ -n "$numbers" ] || printf 'Note: %s has no %s checkpoint yet\n' "$folder" "$checkpoints" >&2
    done
}

pack() { # an archive of the files whose names are in the input; one that grows meanwhile comes as long as it was
    tar --null --ignore-failed-read -czf - -T - || [ $? -eq 1 ]
}

piece() { # piece FILE BYTES: a file from there on
    tail -c "+$(($2 + 1))" -- "$1"
}

known() { # known FILE BYTES SECONDS: whether it is here already, with that size and time
    local found
    found=$(stat -c '%s %Y' -- "$1" 2>/dev/null || stat -f '%z %m' -- "$1" 2>/dev/null) || return 1
    [ "$found" = "$2 $3" ]
}

stamp() { # stamp FILE SECONDS: set its time of change
    local text
    text=$(TZ=UTC date -d "@$2" +%Y%m%d%H%M.%S 2>/dev/null || TZ=UTC date -r "$2" +%Y%m%d%H%M.%S)
    TZ=UTC touch -t "$text" -- "$1"
}

mkdir -p -- "$to"
to=$(cd -- "$to" && pwd)
work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
used+=(describe numbers_of)
on_box listing "$checkpoints" ${names[@]+"${names[@]}"} >"$work/listing"

# ---------------------------------------------------------------- what is new

: >"$work/small"
: >"$work/large"
large=() sizes=() times=() here_already=0 coming=0
while IFS=' ' read -r -d '' bytes seconds name; do
    case "/$name/" in
        //* | */../*) fail "the box offers $name, which would land outside $to; nothing was fetched" ;;
    esac
    if known "$to/$name" "$bytes" "$seconds"; then
        here_already=$((here_already + 1))
        continue
    fi
    coming=$((coming + 1))
    case "${name##*/}" in
        checkpoint_*)
            large+=("$name") sizes+=("$bytes") times+=("$seconds")
            printf '%s\0' "$name" >>"$work/large"
            ;;
        *) printf '%s\0' "$name" >>"$work/small" ;;
    esac
done <"$work/listing"

# ---------------------------------------------------------------- small files in one archive, checkpoints one by one

if [ -s "$work/small" ]; then
    on_box_with "$work/small" pack >"$work/archive" || fail "the connection was cut; start the same command again" 1
    unpack "$to" <"$work/archive"
fi
on_box_with "$work/large" checksums >"$work/sums"
for ((i = 0; i < ${#large[@]}; i++)); do
    IFS= read -r sum <&3
    name=${large[i]}
    folder=$to/$(dirname -- "$name")
    part=$folder/.part-${name##*/}
    mkdir -p -- "$folder"
    begin=0
    if [ -f "$part" ]; then begin=$(($(wc -c <"$part"))); fi
    printf '%s (%s MB%s)\n' "$name" "$((sizes[i] / 1000000))" "$([ "$begin" -eq 0 ] || echo ", from byte $begin on")"
    on_box piece "$name" "$begin" >>"$part" || fail "$name was cut; start the same command again and it goes on" 1
    if [ "$(cksum <"$part")" != "$sum" ]; then
        rm -f -- "$part"
        fail "$name changed on the box while it came; start the same command again" 1
    fi
    stamp "$part" "${times[i]}"
    mv -f -- "$part" "$to/$name"
done 3<"$work/sums"
printf '%s files fetched to %s, %s were here already\n' "$coming" "$to" "$here_already"
