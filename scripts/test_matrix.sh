#!/usr/bin/env bash
# The tests under the oldest and the newest supported transformers, and under other versions of torch, in environments of
# their own (.matrix/<transformers>-<torch>, about 2 GB each, kept for the next time). A table at the end; exit code 1 where
# any of them failed.
#   bash scripts/test_matrix.sh [--transformers 5.17.0,newest] [--torch 2.13.0] [--quick] [pytest arguments, e.g. -k resume]
# Every transformers is tried with every torch; without --torch that is the one of requirements.txt. `newest` is the newest
# transformers 5 of the package index. --quick: only the tests of the core (numbers, rollout, generation, checkpoints, runs).
# PYTHON3 names the interpreter to make environments of (default python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

oldest=5.17.0
python=${PYTHON3:-python3}
quick=(tests/test_{golden,drift,coconut,generate,decoding,attention,backbones,checkpoint,run}.py)

pinned() { # pinned name: the version in requirements.txt
    sed -n "s/^$1==//p" requirements.txt
}

newest() { # the newest transformers 5 that pip finds, or the pinned one
    local versions
    versions=$("$python" -m pip index versions transformers 2>/dev/null | sed -n 's/^Available versions: //p') || true
    versions=$(tr -d ' ' <<<"$versions" | tr , '\n' | grep -E '^5(\.[0-9]+)+$' | sort -V | tail -n 1) || true
    [ -n "$versions" ] || echo "note: pip cannot list the versions of transformers; newest = $(pinned transformers)" >&2
    echo "${versions:-$(pinned transformers)}"
}

fail() {
    echo "error: $1" >&2
    exit 2
}

install() { # install folder transformers torch: make the environment unless it is there, complete and of these requirements
    local folder=$1 wanted
    wanted=$(sed -e "s/^transformers==.*/transformers==$2/" -e "s/^torch==.*/torch==$3/" requirements.txt)
    if [ "$(cat "$folder/installed" 2>/dev/null)" = "$wanted" ]; then return 0; fi
    rm -rf "$folder"
    "$python" -m venv "$folder" || return 1
    printf '%s\n' "$wanted" >"$folder/requirements.txt"
    "$folder/bin/python" -m pip install --disable-pip-version-check -r "$folder/requirements.txt" || return 1
    printf '%s\n' "$wanted" >"$folder/installed"
}

counts() { # counts junit.xml: "passed failed skipped seconds"
    "$python" - "$1" <<'EOF'
import sys
from xml.etree import ElementTree

suites = list(ElementTree.parse(sys.argv[1]).iter("testsuite"))
tests, failures, errors, skipped = (sum(int(s.get(k)) for s in suites) for k in ("tests", "failures", "errors", "skipped"))
print(tests - failures - errors - skipped, failures + errors, skipped, f"{sum(float(s.get('time')) for s in suites):.0f}")
EOF
}

wanted_transformers=$oldest,newest
wanted_torch=$(pinned torch)
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,8s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        --transformers | --torch)
            [ $# -gt 1 ] || fail "$1 needs versions, e.g. $1 $(pinned "${1#--}")"
            printf -v "wanted_${1#--}" %s "$2"
            shift
            ;;
        --quick) arguments+=("${quick[@]}") ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
for list in "$wanted_transformers" "$wanted_torch"; do
    [ -n "${list//[, ]/}" ] || fail "no versions given"
done
for version in ${wanted_transformers//,/ } ${wanted_torch//,/ }; do
    [[ $version =~ ^([0-9]+(\.[0-9]+)+[a-z0-9.+]*|newest)$ ]] || fail "not a version: $version"
done
[[ ,$wanted_torch, != *,newest,* ]] || fail "--torch takes version numbers only"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "Python 3.11 or newer is needed; set PYTHON3 to one"

transformers_versions=()
for version in ${wanted_transformers//,/ }; do
    [ "$version" != newest ] || version=$(newest)
    [[ " ${transformers_versions[*]-} " == *" $version "* ]] || transformers_versions+=("$version")
done

mkdir -p .matrix/logs
table=() failed=0
for torch in ${wanted_torch//,/ }; do
    for transformers in "${transformers_versions[@]}"; do
        name=$transformers-$torch
        log=.matrix/logs/$name.log xml=.matrix/logs/$name.xml
        echo "== transformers $transformers, torch $torch: installing (log: $log)"
        if ! install ".matrix/$name" "$transformers" "$torch" >"$log" 2>&1; then
            tail -n 3 "$log" >&2
            table+=("$name - - - - $log not_installed") failed=1
            continue
        fi
        echo "== transformers $transformers, torch $torch: testing"
        rm -f "$xml"
        verdict=passed
        PYTHON=.matrix/$name/bin/python bash scripts/test.sh --junitxml="$xml" ${arguments[@]+"${arguments[@]}"} \
            >"$log" 2>&1 || verdict=FAILED
        if [ "$verdict" = FAILED ]; then
            failed=1
            grep -E '^(FAILED|ERROR) ' "$log" || true
        fi
        tail -n 1 "$log"
        table+=("$name $(counts "$xml" 2>/dev/null || echo - - - -) $log $verdict")
    done
done

echo
format='%-20s %7s %7s %8s %8s  %-40s %s\n'
# shellcheck disable=SC2059
printf "$format" transformers-torch passed failed skipped seconds log ''
for line in "${table[@]}"; do
    # shellcheck disable=SC2059,SC2086
    printf "$format" $line
done
exit "$failed"
