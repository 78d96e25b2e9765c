#!/usr/bin/env bash
#SBATCH --job-name=noise-branch
#SBATCH --output=logs/noise_branch_%j.out
#SBATCH --error=logs/noise_branch_%j.err
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@120
# K answers to each question with independent noise on the thoughts and by chance, and their votes; here or as a SLURM job (from
# the root, after mkdir -p logs). Without a YAML: args/noise_branch.yaml. Start it again to go on where it was stopped.
#   bash scripts/run_branch_experiment.sh --checkpoint runs/prosqa/prosqa-coconut --num-questions all
#   sbatch scripts/run_branch_experiment.sh args/noise_ablation.yaml --checkpoint runs/gsm/gsm-coconut
set -euo pipefail
here=$(dirname "$0")
if [ ! -f "$here/setup.sh" ]; then here=${SLURM_SUBMIT_DIR:-.}/scripts; fi # SLURM runs a copy of this file from elsewhere
# shellcheck source=scripts/setup.sh
. "$here/setup.sh"
case "${1:-}" in
    *.yaml | *.yml | --help | -h) ;;
    "") set -- --help ;;
    *) set -- args/noise_branch.yaml "$@" ;;
esac
exec "$PYTHON" -m analysis.branching "$@"
