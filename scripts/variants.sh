#!/usr/bin/env bash
# What precision and parallel thoughts cost in accuracy, on the quickstart's models: trains M1, M3 and M5 again in bf16
# autocast and with another seed (how far two runs lie apart anyway), M3 with one and two parallel iterations, and compares
# all with the quickstart's float32 runs. Two runs at a time, one thread each; start it again to resume.
#   bash scripts/variants.sh
set -euo pipefail

if [ $# -gt 0 ]; then
    sed -n '2,5s/^# \{0,1\}//p' "$0"
    [[ $1 == --help || $1 == -h ]] && exit 0 || exit 2
fi
bash "$(dirname "$0")/quickstart.sh"
# shellcheck source=scripts/setup.sh
. "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS=1 PYTHON
root=runs/quickstart-variants
mkdir -p "$root/logs"

trained_and_tested() { # model folder [key=value ...]; each command says whether the next may follow (set -e is off within if)
    local model=$1 folder=$2 newest
    shift 2
    "$PYTHON" run.py "args/quickstart_$model.yaml" "$@" || return 1
    newest=$(find "$folder" -name 'checkpoint_*' | sort -V | tail -n 1)
    if [ "$model" = stage0 ] || [ -z "$newest" ] || [ "$folder/eval_prosqa_test.jsonl" -nt "$newest" ]; then return 0; fi
    "$PYTHON" run.py "args/quickstart_$model.yaml" "$@" only_eval=True "load_model_path=$newest" \
        "resume=$((${newest##*_} - 1))" val_path=data/quickstart/prosqa_test.json
}

variant() { # variant model [key=value ...]: train, then evaluate on the held-out problems; both do nothing a second time
    local name=$1 model=$2 folder=$root/$1/$2
    shift 2
    if ! trained_and_tested "$model" "$folder" "save_path=$root/$name" "$@" >>"$root/logs/$name-$model.log" 2>&1; then
        echo "error: $name $model failed; see $root/logs/$name-$model.log" >&2
        return 255 # ends xargs
    fi
    echo "$name $model done"
}
export -f trained_and_tested variant
export root

two_at_a_time() { # lines of arguments for `variant`
    xargs -P 2 -L 1 bash -c 'variant "$@"' _
}

two_at_a_time <<'END'
bf16 stage0 bf16=True
seed-1 stage0 seed=1
END
two_at_a_time <<END
parallel-1 m3_coconut latent_iterations=1
parallel-2 m3_coconut latent_iterations=2
bf16 m3_coconut bf16=True load_model_path=$root/bf16/stage0
seed-1 m3_coconut seed=1 load_model_path=$root/seed-1/stage0
bf16 m5_pause bf16=True load_model_path=$root/bf16/stage0
seed-1 m5_pause seed=1 load_model_path=$root/seed-1/stage0
bf16 m1_cot bf16=True
seed-1 m1_cot seed=1
tf32 m1_cot tf32=True max_steps=200
END
for iterations in 1 2 3; do # the float32 model as it is, thinking in parallel
    "$PYTHON" run.py args/quickstart_m3_coconut.yaml "save_path=$root/parallel-$iterations-untrained" \
        "latent_iterations=$iterations" only_eval=True resume=4 load_model_path=runs/quickstart/m3_coconut/checkpoint_5 \
        val_path=data/quickstart/prosqa_test.json >"$root/logs/parallel-$iterations-untrained.log" 2>&1
done
"$PYTHON" -m analysis.variants "$root" --reference runs/quickstart --out results/quickstart-variants
