#!/usr/bin/env bash
# From nothing to a gate table and a picture on a laptop: a small two-chain ProsQA, M1, M3 and M5 from scratch on a tiny
# GPT-2, through the same torchrun path as the full study. Two runs at a time, one thread each. Start it again to resume.
#   bash scripts/quickstart.sh [--all]      --all adds M2, M4, M4b and the curriculum without thoughts
set -euo pipefail

case "${1:-}" in
    "") models=(m1_cot m3_coconut m5_pause) ;;
    --all) models=(m1_cot m2_nocot m3_coconut m4_frozen m4b_shared m5_pause m0_nothought) ;;
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

train() { # one run, in the background; its log is appended, so that a restart keeps it
    "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node=1 run.py "args/quickstart_$1.yaml" >>"$logs/$1.log" 2>&1 &
    pids[$!]=$1
}

last() { # the last line of a log that starts with a pattern, nothing where there is none yet
    { grep -a "^$2" "$logs/$1.log" || true; } | tail -n 1
}

progress() {
    local name line=""
    for name in "${pids[@]}"; do
        line+="  $name: $(last "$name" 'Epoch ' | cut -d: -f1 | cut -c7-)"
        line+=", accuracy $(last "$name" 'Accuracy on validation' | cut -d= -f2 | cut -c2-6)"
    done
    printf '%5d s%s\n' $((SECONDS - started)) "$line"
}

finish() { # wait for the runs in the background; a failed one ends the script with its last lines
    local pid ticks=0
    while [ ${#pids[@]} -gt 0 ]; do
        sleep 1
        ticks=$((ticks + 1))
        [ $((ticks % 15)) -eq 0 ] && progress
        for pid in "${!pids[@]}"; do
            kill -0 "$pid" 2>/dev/null && continue
            if ! wait "$pid"; then
                echo "error: ${pids[$pid]} failed; the end of $logs/${pids[$pid]}.log:" >&2
                tail -n 15 "$logs/${pids[$pid]}.log" >&2
                exit 1
            fi
            unset "pids[$pid]"
            [ ${#waiting[@]} -gt 0 ] && { train "${waiting[0]}"; waiting=("${waiting[@]:1}"); }
        done
    done
    return 0
}

declare -A pids=()
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
waiting=()
echo "Training ${models[*]} (logs in $logs; each goes on where it stopped)"
train m1_cot
train stage0 # the curriculum before its first thought, which the thinking models share
finish
for name in "${models[@]}"; do [ "$name" = m1_cot ] || waiting+=("$name"); done
for _ in 1 2; do [ ${#waiting[@]} -gt 0 ] && { train "${waiting[0]}"; waiting=("${waiting[@]:1}"); }; done
finish

echo "Evaluating on 1,000 held-out problems"
for name in "${models[@]}"; do
    newest=$(find "runs/quickstart/$name" -name 'checkpoint_*' | sort -V | tail -n 1)
    [ "runs/quickstart/$name/eval_prosqa_test.jsonl" -nt "$newest" ] && continue
    "$PYTHON" run.py "args/quickstart_$name.yaml" only_eval=True "load_model_path=$newest" \
        resume=$((${newest##*_} - 1)) val_path=data/quickstart/prosqa_test.json >"$logs/$name-test.txt" 2>&1 ||
        { tail -n 5 "$logs/$name-test.txt" >&2; exit 1; }
done
trap - EXIT

gates=0
bash scripts/check_gates.sh "$logs" --runs runs/quickstart --out results/quickstart/gates.json || gates=$?
[ "$gates" -le 2 ] || exit "$gates"
"$PYTHON" -m analysis.summary runs/quickstart --out results/quickstart --models m1_cot stage0 "${models[@]:1}"
echo "Done in $((SECONDS - started)) s; everything is in results/quickstart (a second call resumes, or finds all done)"
