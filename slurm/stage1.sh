#!/usr/bin/env bash
# Stage one: captioning, 224 px.     sbatch slurm/stage1.sh [flags of pretrain.launch]
# The cluster's choices are below and overridden before the script's name, as in `sbatch --nodes 4
# slurm/stage1.sh`; the recipe's come after it, as in `sbatch slurm/stage1.sh --recipe stages:small`.
#SBATCH --job-name=stage1
#SBATCH --nodes=32
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
env=${SLURM_SUBMIT_DIR:-$PWD}/slurm/env.sh
[[ -f $env ]] || { echo "error: call sbatch in the repository's root: there is no $env" >&2; exit 2; }
# shellcheck source=slurm/env.sh
source "$env"

supervise srun --kill-on-bad-exit=1 python -m pretrain.launch \
    --recipe stages --stage one --out "$RUN_DIR" "$@"
