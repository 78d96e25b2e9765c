#!/usr/bin/env bash
# Download GSM8K-Aug (385,620 / 500 / 1,319 rows) and convert it to gsm_{train,valid,test}.json.
#   bash scripts/get_gsm8k.sh [--out DIR] [--keep-text] [--force] [--base-url URL] [--expect FILE]
#   --out DIR         folder of the JSON files, and of the text files on the way (default: data)
#   --keep-text       leave gsm_{train,valid,test}.txt there
#   --force           even if the three JSON files are there
#   --base-url URL    a mirror: URL/train.txt, URL/valid.txt and URL/test.txt
#   --expect FILE     lines `file bytes sha256 rows` to check instead of the built-in ones, a dash for what is not known
# Source: github.com/da03/Internalize_CoT_Step_by_Step, commit e06a32e. Start it again after an interruption: it goes on. What
# came is recorded in DIR/gsm8k.sha256, and what comes or lies there at another start must be the same.
# Without a network, `python data/arithmetic.py` makes a stand-in.
set -euo pipefail

fail() {
    echo "error: $*" >&2
    exit 2
}

usage() {
    sed -n '2,11s/^# \{0,1\}//p' "$0"
    exit "$1"
}

repository=da03/Internalize_CoT_Step_by_Step
commit=e06a32ee5e4cd117171daeb4755d2a97ece62761
# Bytes and SHA-256 of train.txt are those of its Git LFS pointer at this commit.
expectations='train.txt 87805358 0a3909a9e7d8d2f7ad6b8c7b5608aa744988d835f9bf874d4cf06ca77df6bf8c 385620
valid.txt - - 500
test.txt - - 1319'

out=$(dirname "$0")/../data keep=no force=no mirror="" expect=""
while [ $# -gt 0 ]; do
    case "$1" in
        --out | --base-url | --expect)
            [ $# -gt 1 ] || fail "$1 needs a value; see --help"
            case "$1" in
                --out) out=$2 ;;
                --base-url) mirror=${2%/} ;;
                --expect) expect=$2 ;;
            esac
            shift
            ;;
        --keep-text) keep=yes ;;
        --force) force=yes ;;
        --help | -h) usage 0 ;;
        *) fail "unknown argument $1; see --help" ;;
    esac
    shift
done
command -v curl >/dev/null || fail "curl is not installed"
if [ -n "$expect" ]; then
    expectations=$(cat -- "$expect") || fail "--expect $expect cannot be read"
fi
mkdir -p -- "$out" || fail "--out $out cannot be made"
out=$(cd -- "$out" && pwd)

if [ $force = no ] && [ -f "$out/gsm_train.json" ] && [ -f "$out/gsm_valid.json" ] && [ -f "$out/gsm_test.json" ]; then
    echo "gsm_{train,valid,test}.json are in $out already; --force makes them anew"
    exit 0
fi
# shellcheck source=scripts/setup.sh
. "$(dirname "$0")/setup.sh"

expected() { # expected NAME FIELD: bytes (2), sha256 (3) or rows (4) of a file, a dash where it is not known
    awk -v name="$1" -v field="$2" '$1 == name { print $field; found = 1 } END { if (!found) print "-" }' <<<"$expectations"
}

size() {
    wc -c <"$1" | tr -d ' '
}

digest() {
    "$PYTHON" -c 'import hashlib, sys; print(hashlib.file_digest(open(sys.argv[1], "rb"), "sha256").hexdigest())' "$1"
}

address() { # where a file is; Git LFS keeps the contents of train.txt at another host
    if [ -n "$mirror" ]; then
        echo "$mirror/$1"
    elif [ "$1" = train.txt ]; then
        echo "https://media.githubusercontent.com/media/$repository/$commit/data/gsm8k/$1"
    else
        echo "https://raw.githubusercontent.com/$repository/$commit/data/gsm8k/$1"
    fi
}

get() { # get URL FILE [OPTION ...]: prints the answer's status
    curl -fsSL --retry 2 --connect-timeout 20 --speed-limit 1 --speed-time 60 -w '%{http_code}' -o "$2" "${@:3}" "$1"
}

download() { # download NAME PART: what is missing of a file
    local url code=0 status
    if [ -f "$2" ] && [ "$(size "$2")" = "$(expected "$1" 2)" ]; then return; fi # stopped before it was checked
    url=$(address "$1")
    echo "$url"
    status=$(get "$url" "$2" -C -) || code=$?
    if [ -s "$2" ] && { [ $code -eq 33 ] || [ "$status" = 416 ]; }; then # the server does not send parts, or has no more
        rm -f -- "$2"
        code=0
        status=$(get "$url" "$2") || code=$?
    fi
    case $code in
        0) ;;
        5 | 6 | 7 | 28 | 35) fail "no network, or no way to $url (curl ends with $code); start again to go on, or make a" \
            "STAND-IN with: python data/arithmetic.py" ;;
        18 | 56) fail "the connection broke within $1 ($(size "$2") bytes came); start again to go on" ;;
        22) fail "$url answers with $status" ;;
        *) fail "curl ends with $code for $url; start again to go on" ;;
    esac
}

refuse() { # refuse FILE MESSAGE ...: one that was downloaded goes, one that lay there stays
    case "$1" in
        *.part) rm -f -- "$1"; fail "${*:2}; start again" ;;
        *) fail "${*:2}; remove $1 and start again" ;;
    esac
}

check() { # check NAME FILE: whether it is the right one
    local bytes hash got
    if [ "$(head -c 23 -- "$2" | tr -d '\0')" = "version https://git-lfs" ]; then
        refuse "$2" "$1 is a Git LFS pointer, not the data, which lies at media.githubusercontent.com/media/$repository"
    fi
    bytes=$(expected "$1" 2) hash=$(expected "$1" 3) got=$(size "$2")
    [ "$bytes" = - ] || [ "$got" = "$bytes" ] || refuse "$2" "$1 has $got bytes, must have $bytes"
    got=$(digest "$2")
    [ "$hash" = - ] || [ "$got" = "$hash" ] || refuse "$2" "$1 has the SHA-256 $got, must have $hash"
    hash=$(awk -v name="$1" '$2 == name { print $1 }' "$out/gsm8k.sha256" 2>/dev/null || true)
    if [ -z "$hash" ]; then
        echo "$got  $1" >>"$out/gsm8k.sha256"
    elif [ "$got" != "$hash" ]; then
        fail "$1 is not what came before (SHA-256 $got, recorded $hash); remove $2, or gsm8k.sha256 to accept it"
    fi
}

for name in train.txt valid.txt test.txt; do
    text=$out/gsm_$name
    if [ ! -f "$text" ]; then
        download "$name" "$text.part"
        check "$name" "$text.part"
        mv -f -- "$text.part" "$text"
    else
        check "$name" "$text"
    fi
done

more=()
if [ $keep = no ]; then more+=(--delete-raw); fi
rows="$(expected train.txt 4) $(expected valid.txt 4) $(expected test.txt 4)"
case "$rows" in
    *-*) ;;
    *) # shellcheck disable=SC2206 # three numbers
        more+=(--expect-rows $rows) ;;
esac
"$PYTHON" data/gsm.py --raw "$out" --out "$out" "${more[@]+"${more[@]}"}"
