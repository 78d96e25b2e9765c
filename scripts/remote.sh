# shellcheck shell=bash
# Sourced by launch, status, fetch and stop: their common arguments, running a function on the box, and archives.
# A function that runs on the box is sent as text with its arguments, to a bash there: no name is ever quoted twice.
# shellcheck disable=SC2034 # variables are for the scripts that source this

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
host="" dir=coconut python="" port="" identity=""
names=()                # arguments that are no options: configs or runs
overrides=()            # what follows --
used=(unpack checksums) # functions that those sent to the box call

usage() { # the comment at the head of the script
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

fail() { # fail MESSAGE [EXIT CODE]
    printf 'error: %s\n' "$1" >&2
    exit "${2:-2}"
}

value() { # the value of an option, whose name and value are the first arguments
    [ $# -ge 2 ] || fail "$1 needs a value"
    printf '%s' "$2"
}

common_argument() { # take one argument that all scripts know; $taken tells how many words it had
    taken=2
    case "$1" in
        --dir) dir=$(value "$@") ;;
        --port) port=$(value "$@") ;;
        --identity) identity=$(value "$@") ;;
        --python) python=$(value "$@") ;;
        -h | --help) usage; exit 0 ;;
        --) shift; overrides=("$@"); taken=$(($# + 1)) ;;
        -*) fail "$1 is no option of this script; see --help" ;;
        *)
            taken=1
            if [ -z "$host" ]; then host=$1; else names+=("$1"); fi
            ;;
    esac
}

connect_options() { # after all arguments: the command that reaches the box, in $ssh
    local more
    [ -n "$host" ] || { usage >&2; exit 2; }
    case "$dir" in
        \~) dir=. ;;
        \~/*) dir=${dir#\~/} ;; # what is relative is relative to the home folder there
    esac
    ssh=(ssh -o ConnectTimeout=20 -o ServerAliveInterval=30)
    [ -z "$port" ] || ssh+=(-p "$port")
    [ -z "$identity" ] || ssh+=(-i "$identity")
    read -r -a more <<<"${SSH_OPTIONS:-}"
    ssh+=(${more[@]+"${more[@]}"} "$host")
}

enter() { # on the box: go to the folder of the runs
    cd -- "$1" 2>/dev/null || {
        printf 'error: there is no folder %s on the box; launch something first, or name it with --dir\n' "$1" >&2
        exit 2
    }
}

program() { # program FOLDER FUNCTION [ARGUMENT ...]: text for a bash on the box, which runs it there on what follows the text
    printf 'set -euo pipefail\n'
    declare -f enter "${used[@]}" "$2"
    printf 'enter %q\n' "$1"
    shift
    printf '%q ' "$@"
    printf '; exit\n'
}

on_box() { # on_box FUNCTION [ARGUMENT ...]: run it in the folder of the runs, without input
    program "$dir" "$@" | "${ssh[@]}" bash -s
}

on_box_with() { # on_box_with FILE FUNCTION [ARGUMENT ...]: with a file of this machine as its input
    local input=$1
    shift
    { program "$dir" "$@"; cat -- "$input"; } | "${ssh[@]}" bash -s
}

at_home() { # as on_box, in the home folder: where there may be no folder of runs yet
    program . "$@" | "${ssh[@]}" bash -s
}

at_home_with() {
    local input=$1
    shift
    { program . "$@"; cat -- "$input"; } | "${ssh[@]}" bash -s
}

checksums() { # for each of the NUL-terminated names in the input a line: checksum and bytes, or a dash where there is no file
    local name
    while IFS= read -r -d '' name; do
        if [ -f "$name" ]; then cksum <"$name"; else echo -; fi
    done
}

unpack() ( # unpack FOLDER <ARCHIVE: put its files there, each one whole; an archive that reaches out of it is refused
    set -e
    refuse() {
        printf 'error: the archive holds %s; nothing was unpacked\n' "$1" >&2
        exit 2
    }
    mkdir -p -- "$1"
    cd -- "$1"
    stage=$(mktemp -d "$PWD/.incoming-XXXXXX")
    trap 'rm -rf -- "$stage"' EXIT
    mkdir "$stage/files"
    cat >"$stage/archive"
    tar -tzf "$stage/archive" >"$stage/names" 2>/dev/null || refuse "less than it should (it was cut)"
    tar -tvzf "$stage/archive" >"$stage/kinds" 2>/dev/null
    outside=$(grep -E '^/|(^|/)\.\.(/|$)' "$stage/names" | head -n 1) || true
    [ -z "$outside" ] || refuse "$outside, which lies outside the folder"
    if grep -q '^[^d-]' "$stage/kinds"; then refuse "something that is neither file nor folder"; fi
    tar -xzf "$stage/archive" --no-same-owner -C "$stage/files"
    (cd "$stage/files" && find . -type f -print0) >"$stage/found"
    while IFS= read -r -d '' name; do
        mkdir -p -- "$(dirname -- "$name")"
        mv -f -- "$stage/files/$name" "$name"
    done <"$stage/found"
)
