# shellcheck shell=bash
# Sourced by the batch files: go to the folder that sbatch was called in, find the interpreter, and run what may be preempted.

cd "${SLURM_SUBMIT_DIR:-.}" || exit 1
if [ ! -f scripts/setup.sh ]; then
    echo "error: call sbatch in the repository's folder, not in $PWD" >&2
    exit 2
fi
# shellcheck source=scripts/setup.sh
. scripts/setup.sh

# run_or_requeue COMMAND ...: SIGUSR1 and SIGTERM reach it as SIGTERM; where it ends with 75, the job is queued again
run_or_requeue() {
    local child code=0
    "$@" &
    child=$!
    trap 'kill -TERM "$child" 2>/dev/null || true' USR1 TERM
    while kill -0 "$child" 2>/dev/null; do
        wait "$child" || true # ends also when a signal comes
    done
    wait "$child" || code=$?
    trap - USR1 TERM
    if [ "$code" -eq 75 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        echo "Interrupted with everything saved; job $SLURM_JOB_ID is queued again"
        scontrol requeue "$SLURM_JOB_ID" || echo "error: it is not; submit the same job again to go on" >&2
    fi
    return "$code"
}
