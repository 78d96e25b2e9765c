#!/usr/bin/env bash
# From nothing to a gate table and a picture on a laptop: a small two-chain ProsQA, M1, M3 and M5 from scratch on a tiny
# GPT-2, through the same torchrun path as the full study. Two runs at a time, one thread each. Start it again to resume.
#   bash scripts/quickstart.sh [--all]      --all adds M2, M4, M4b and the curriculum without thoughts
set -euo pipefail

case "${1:-}" in
    "") models="m1_cot m3_coconut m5_pause" ;;
    --all) models="m1_cot m2_nocot m3_coconut m4_frozen m4b_shared m5_pause m0_nothought" ;;
    *) sed -n '2,4s/^# \{0,1\}//p' "$0"; [[ $1 == --help || $1 == -h ]] && exit 0 || exit 2 ;;
esac
# shellcheck source=scripts/setup.sh
. "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS=1
logs=results/quickstart/logs
started=$SECONDS
mkdir -p "$logs"

if [ ! -f data/quickstart/prosqa_test.json ]; then
    "$PYTHON" data/two_chain.py --out data/quickstart --force --sizes 30000 300 1000 --hops 1 3 --nodes 4 8 --species 12
fi

running="" # "pid:name pid:name"
waiting="" # names

train() { # one run, in the background; its log is appended, so that a restart keeps it
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=1 run.py "args/quickstart_$1.yaml" >>"$logs/$1.log" 2>&1 &
    running="$running $!:$1"
}

train_waiting() { # two at a time
    while [ -n "$waiting" ] && [ "$(wc -w <<<"$running")" -lt 2 ]; do
        train "${waiting%% *}"
        case "$waiting" in *" "*) waiting=${waiting#* } ;; *) waiting="" ;; esac
    done
}

last() { # the last line of a log that starts with a pattern, nothing where there is none yet
    { grep -a "^$2" "$logs/$1.log" || true; } | tail -n 1
}

progress() {
    local job name line=""
    for job in $running; do
        name=${job#*:}
        line="$line  $name: $(last "$name" 'Epoch ' | cut -d: -f1 | cut -c7-)"
        line="$line, accuracy $(last "$name" 'Accuracy on validation' | cut -d= -f2 | cut -c2-6)"
    done
    printf '%5d s%s\n' $((SECONDS - started)) "$line"
}

finish() { # wait for all runs; a failed one ends the script with its last lines
    local job still seconds=0
    while [ -n "$running" ]; do
        sleep 1
        seconds=$((seconds + 1))
        if [ $((seconds % 15)) -eq 0 ]; then progress; fi
        still=$running
        running=""
        for job in $still; do
            if kill -0 "${job%%:*}" 2>/dev/null; then
                running="$running $job"
            elif wait "${job%%:*}"; then
                if [ "${job#*:}" = stage0 ]; then waiting=${models#m1_cot }; fi
            else
                echo "error: ${job#*:} failed; the end of $logs/${job#*:}.log:" >&2
                tail -n 15 "$logs/${job#*:}.log" >&2
                exit 1
            fi
        done
        train_waiting
    done
}

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
echo "Training $models (logs in $logs; each goes on where it stopped)"
train m1_cot
train stage0 # the curriculum before its first thought, which the thinking models share: they start when it is done
finish

echo "Evaluating on 1,000 held-out problems"
for name in $models; do
    newest=$(find "runs/quickstart/$name" -name 'checkpoint_*' | sort -V | tail -n 1)
    [ "runs/quickstart/$name/eval_prosqa_test.jsonl" -nt "$newest" ] && continue
    "$PYTHON" run.py "args/quickstart_$name.yaml" only_eval=True "load_model_path=$newest" \
        resume=$((${newest##*_} - 1)) val_path=data/quickstart/prosqa_test.json >"$logs/$name-test.txt" 2>&1 ||
        { tail -n 5 "$logs/$name-test.txt" >&2; exit 1; }
done
trap - EXIT

keys=$(for name in $models; do printf '%s,' "${name%%_*}"; done)
gates=0
bash scripts/check_gates.sh "$logs" --runs runs/quickstart --models "${keys%,}" --out results/quickstart/gates.json || gates=$?
# shellcheck disable=SC2086 # names are single words
"$PYTHON" -m analysis.summary runs/quickstart --out results/quickstart --models m1_cot stage0 ${models#m1_cot }
echo "Done in $((SECONDS - started)) s; everything is in results/quickstart (a second call resumes, or finds all done)"
[ "$gates" -ne 1 ] # a blocking gate fails the script; one that is not decided yet does not
