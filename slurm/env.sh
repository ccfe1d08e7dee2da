# shellcheck shell=bash
# What the batch scripts share. Sourced on the first node of a job, once per start; it knows the cluster and
# nothing of recipes. The place for a `module load` of yours.
#
#   VENV      a virtual environment to enter; without it, the one that was active where sbatch was called
#   RUN_DIR   where the run lives
set -euo pipefail

refuse() {
    echo "error: $1" >&2
    exit 2
}

RUN_DIR=${RUN_DIR:-runs/stages}

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    # No job: the same training on this machine is what follows `srun --kill-on-bad-exit=1 python`.
    supervise() {
        local launcher=python
        ! nvidia-smi -L &>/dev/null || launcher="torchrun --nproc-per-node gpu"
        refuse "this is a script for sbatch; on this machine: $launcher$(printf ' %q' "${@:4}")"
    }
    return
fi

# Programs run from the repository's root, where sbatch was called; Slurm itself runs a copy of the script.
cd "$SLURM_SUBMIT_DIR"

if [[ -n ${VENV:-} ]]; then
    [[ -f $VENV/bin/activate ]] || refuse "VENV is no virtual environment: $VENV/bin/activate does not exist"
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
fi

# A rank for each GPU, else GPUs idle or CPUs train what was meant for them. To mean CPUs: --gpus-per-node 0.
if [[ ${SLURM_GPUS_PER_NODE:-} != 0 ]]; then
    gpus=${SLURM_GPUS_ON_NODE:-0} tasks=${SLURM_NTASKS_PER_NODE:-1}
    [[ $gpus != 0 ]] ||
        refuse "this job has no GPUs: sbatch --gpus-per-node 8, or to train on CPUs --gpus-per-node 0"
    [[ $gpus == "$tasks" ]] ||
        refuse "a node of this job has $gpus GPUs for $tasks ranks: sbatch --ntasks-per-node $gpus"
fi

# Slurm 22.05 and later do not hand the job's choice on to its steps: each rank would get one core.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
# Ranks share a node; what decodes images has threads of its own. As torchrun does it.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# A crash in native code (a driver, a decoder) says in which Python line it was.
export PYTHONFAULTHANDLER=1
# NCCL's warnings name the link or host that failed, at the time. What PyTorch does about a failed collective
# is right by default and left alone: TORCH_NCCL_ASYNC_ERROR_HANDLING=3 ends the process without waiting for
# NCCL, TORCH_NCCL_DUMP_ON_TIMEOUT=1 dumps the flight recorder.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Starts a command again where it crashes; where it was interrupted and has saved, the whole job. In place of
# this shell, which signals for the job would end before the command has saved.
supervise() {
    exec python -m pretrain.supervise -- "$@"
}
