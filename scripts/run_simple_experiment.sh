#!/usr/bin/env bash
#SBATCH --job-name=noise_quick
#SBATCH --output=logs/noise_quick_%j.out
#SBATCH --error=logs/noise_quick_%j.err
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=01:00:00
#SBATCH --signal=B:TERM@120
# The first look: 25 questions, noise on the first slot, here or as a SLURM job (from the root, after mkdir -p logs).
#   bash scripts/run_simple_experiment.sh runs/gsm/gsm-coconut [any flag of analysis/noise.py]
#   sbatch scripts/run_simple_experiment.sh --model Qwen/Qwen2.5-0.5B-Instruct --benchmark gsm8k
set -euo pipefail
here=$(dirname "$0")
if [ ! -f "$here/setup.sh" ]; then here=${SLURM_SUBMIT_DIR:-.}/scripts; fi # SLURM runs a copy of this file from elsewhere
# shellcheck source=scripts/setup.sh
. "$here/setup.sh"
case "${1:---help}" in
  -*) set -- "${@:---help}" ;;
  *) set -- --checkpoint "$@" ;;
esac
exec "$PYTHON" analysis/noise.py args/noise_quick.yaml "$@"
