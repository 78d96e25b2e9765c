#!/usr/bin/env bash
#SBATCH --job-name=noise
#SBATCH --output=logs/noise_%j.out
#SBATCH --error=logs/noise_%j.err
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@120
# One noise experiment, here or as a SLURM job (from the root, after mkdir -p logs). Start it again to go on where it was stopped.
#   bash scripts/run_experiment.sh args/noise_gsm.yaml --checkpoint runs/gsm/gsm-coconut [any flag of analysis/noise.py]
#   sbatch scripts/run_experiment.sh args/noise_types.yaml --model meta-llama/Llama-3.1-8B-Instruct --dtype bfloat16
set -euo pipefail
here=$(dirname "$0")
if [ ! -f "$here/setup.sh" ]; then here=${SLURM_SUBMIT_DIR:-.}/scripts; fi # SLURM runs a copy of this file from elsewhere
# shellcheck source=scripts/setup.sh
. "$here/setup.sh"
if [ $# -eq 0 ]; then set -- --help; fi
exec "$PYTHON" analysis/noise.py "$@"
