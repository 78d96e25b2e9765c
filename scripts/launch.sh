#!/usr/bin/env bash
# Train configs on another machine over ssh, one after another, in the background there; nothing here needs to stay on.
#   bash scripts/launch.sh user@host CONFIG [CONFIG ...] [options] [-- key=value ...]
# Checks the box, sends this tree and the data files that the configs name (only what differs), makes .venv there, and starts.
#   --dir DIR         folder on the box (default: coconut in the home folder there)
#   --nproc N         processes a run (default: as many as there are GPUs, else 1)
#   --port P, --identity FILE, and more for ssh in SSH_OPTIONS
#   --python PATH     interpreter on the box that has everything installed, instead of .venv
#   --python3 PATH    interpreter on the box that .venv is made from (default python3; 3.11 or newer)
#   --min-free GB     refuse below this free space (default: 10, or 1 once the environment is there)
#   --dry-run         check and say what would be sent, and change nothing
# Then: scripts/status.sh, scripts/fetch.sh and scripts/stop.sh with the same user@host, --dir, --port and --identity.
set -euo pipefail
# shellcheck source=scripts/remote.sh
. "$(dirname "$0")/remote.sh"

nproc=auto dry="" python3=python3 min_free=""
while [ $# -gt 0 ]; do
    taken=2
    case "$1" in
        --nproc) nproc=$(value "$@") ;;
        --python3) python3=$(value "$@") ;;
        --min-free) min_free=$(value "$@") ;;
        --dry-run) dry=yes taken=1 ;;
        *) common_argument "$@" ;;
    esac
    shift "$taken"
done
connect_options
[ ${#names[@]} -gt 0 ] || fail "name at least one config, for example args/prosqa_coconut_1gpu.yaml"
cd "$here"
work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT

# ---------------------------------------------------------------- what to send

configs=()
for config in "${names[@]}"; do
    config=${config#"$here/"}
    [ -f "$config" ] || fail "there is no config $config (paths are relative to $here)"
    case "/$config/" in
        //* | */../*) fail "$config lies outside $here; copy it into args/" ;;
    esac
    configs+=("${config#./}")
done

tree() { # names of all files that the box needs, without data, outputs and environments
    if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
        git ls-files -z --cached --others --exclude-standard -- . \
            ':!logs' ':!runs' ':!results' ':!wandb' ':!.venv'
    else
        find . \( -name .git -o -name .venv -o -name __pycache__ -o -name '.*_cache' \
            -o -path './data/*.json' -o -path './data/*/*' \
            -o -path ./logs -o -path ./runs -o -path ./results -o -path ./wandb \) -prune -o -type f -print0
    fi
}

setting() { # setting KEY CONFIG: its value in the overrides or the YAML, where it is written on one line
    {
        sed -nE "s/^$1:[[:space:]]+//p" "$2" | sed -E "s/[[:space:]]+#.*//; s/[[:space:]]+\$//
            s/^\"(.*)\"\$/\1/; /^'/{s/^'(.*)'\$/\1/; s/''/'/g;}"
        printf '%s\n' ${overrides[@]+"${overrides[@]}"} | sed -nE "s/^$1=//p"
    } | tail -n 1
}

data_files() { # names of the data files that configs and overrides name
    local config key
    for config in "${configs[@]}"; do
        for key in train_path val_path; do
            case "$key $(setting only_eval "$config")" in "train_path True" | "train_path true") continue ;; esac
            case "$(setting "$key" "$config")" in
                "" | None | none | null) ;;
                *) setting "$key" "$config" ;;
            esac
        done
    done | sort -u
}

: >"$work/names"
add() { # to the files to send, once
    local name
    while IFS= read -r -d '' name; do
        if [ "$name" = "$1" ]; then return; fi
    done <"$work/names"
    printf '%s\0' "$1" >>"$work/names"
}

tree >"$work/tree"
while IFS= read -r -d '' name; do
    name=${name#./}
    if [ -f "$name" ]; then printf '%s\0' "$name" >>"$work/names"; fi # what git lists may have been deleted
done <"$work/tree"
for config in "${configs[@]}"; do
    add "$config"
done
data_files >"$work/data"
remote_data=()
while IFS= read -r name; do
    case "/$name/" in
        //* | */../*) remote_data+=("$name") ;;
        *) if [ -f "$name" ]; then add "$name"; else remote_data+=("$name"); fi ;;
    esac
done <"$work/data"

# ---------------------------------------------------------------- what the box is

check_box() { # check_box FOLDER PYTHON BASE_PYTHON MIN_FREE [DATA FILE ...]: lines about the box; code 2 where it will not do
    local python=${2:-$3} free least=${4:-10} place=. code=0 name
    if [ -d "$1" ]; then place=$1; fi
    if [ -z "$4" ] && { [ -n "$2" ] || [ -f "$place/.venv/installed" ]; }; then least=1; fi
    if ! command -v "$python" >/dev/null; then
        printf 'error: there is no %s on the box; install Python 3.11 or newer and name it with --python3\n' "$python" >&2
        code=2
    elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        printf 'error: %s on the box is %s; name one of 3.11 or newer with --python3\n' "$python" \
            "$("$python" --version 2>&1)" >&2
        code=2
    elif [ -z "$2" ] && ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
        printf 'error: %s on the box makes no environments; apt-get install python3-venv there\n' "$python" >&2
        code=2
    else
        printf 'box: %s, %s\n' "$(uname -sm)" "$("$python" --version 2>&1)"
    fi
    for name in bash tar flock setsid; do
        command -v "$name" >/dev/null || { printf 'error: there is no %s on the box\n' "$name" >&2; code=2; }
    done
    nvidia-smi --query-gpu=name,memory.total --format=csv,noheader 2>/dev/null | sed 's/^/GPU: /' ||
        echo "GPU: none, runs go to the CPU"
    free=$(df -Pk "$place" | awk 'NR == 2 { printf "%d", $4 / 1000000 }')
    printf 'disk: %s GB free for %s\n' "$free" "$1"
    if [ "$free" -lt "$least" ]; then
        printf 'error: %s GB are free on the box, %s are needed; make room or say --min-free\n' "$free" "$least" >&2
        code=2
    fi
    for name in "${@:5}"; do
        case "$name" in
            /*) place=$name ;;
            *) place=$1/$name ;;
        esac
        if [ -f "$place" ]; then
            printf 'data: %s is on the box\n' "$name"
        else
            printf 'error: data: %s is neither here nor on the box; make it (data/*.py) or copy it\n' "$name" >&2
            code=2
        fi
    done
    return $code
}

at_home check_box "$dir" "$python" "$python3" "$min_free" ${remote_data[@]+"${remote_data[@]}"} || {
    [ $? -eq 2 ] || fail "cannot reach $host, or the check failed there" 1
    exit 2
}

# ---------------------------------------------------------------- send what differs, and start

compare() { # compare FOLDER: as checksums, in a folder that may not be there yet
    if cd -- "$1" 2>/dev/null; then checksums; fi
    while IFS= read -r -d '' _; do echo -; done
}

make_folder() {
    mkdir -p -- "$1"
}

if [ -z "$dry" ]; then at_home make_folder "$dir"; fi
checksums <"$work/names" >"$work/here"
at_home_with "$work/names" compare "$dir" >"$work/there"
bytes=0 count=0
while IFS= read -r -d '' name && read -r ours <&3 && read -r theirs <&4; do
    if [ "$ours" = "$theirs" ]; then continue; fi
    printf '%s\0' "$name" >>"$work/changed"
    count=$((count + 1)) bytes=$((bytes + ${ours##* }))
    if [ -n "$dry" ] || grep -qxF -- "$name" "$work/data"; then printf 'sends %s\n' "$name"; fi
done <"$work/names" 3<"$work/here" 4<"$work/there"
printf '%s of %s files differ: %s bytes to send\n' "$count" "$(tr -dc '\0' <"$work/names" | wc -c | tr -d ' ')" "$bytes"
if [ -n "$dry" ]; then
    printf 'would run, one after another:\n'
    printf '  %s\n' "${configs[@]}"
    exit 0
fi
if [ "$count" -gt 0 ]; then
    COPYFILE_DISABLE=1 tar --null -chzf "$work/archive" -T "$work/changed"
    on_box_with "$work/archive" unpack .
fi

start() { # start PYTHON BASE_PYTHON NPROC CONFIG [CONFIG ...] -- [key=value ...]
    if [ -n "$1" ]; then export PYTHON="$1"; else unset PYTHON; fi
    export PYTHON3="$2"
    shift 2
    bash scripts/run_queue.sh add "$@" </dev/null
}
on_box start "$python" "$python3" "$nproc" "${configs[@]}" -- ${overrides[@]+"${overrides[@]}"}
printf 'Started on %s. See scripts/status.sh, scripts/fetch.sh, scripts/stop.sh; this machine may go\n' "$host"
