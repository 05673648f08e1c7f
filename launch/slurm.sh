#!/usr/bin/env bash
# Submits a command to Slurm: one process for each GPU, which find each other by themselves.
#
#   bash launch/slurm.sh --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=12 \
#       --time=24:00:00 -- python -m lasad_jax.train ...
#
# What stands before -- goes to sbatch (--partition, --account, ...), beside what
# launch/slurm.sbatch asks for: SIGTERM two minutes before the time is over, upon which a trainer
# saves and the job is queued again. Give as many tasks as GPUs to a node, and no --gpus-per-task
# or --gpu-bind: every process takes its own among those that it sees.
#
# The environment is made here, on the submitting machine, and must be seen from the nodes:
# this folder on a shared file system. ACCELERATOR=cuda13 (or none) is what it is made for.
# DRY_RUN=1 prints the call.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh

split_command "$@"
[[ ${flags[0]:-} != --help ]] || { usage && exit; }
[[ ${#command[@]} -gt 0 ]] || fail "no command; it follows after --"
accelerator=${ACCELERATOR:-cuda13}
requirements=(requirements.txt)
[[ $accelerator == none ]] || requirements+=("launch/requirements-$accelerator.txt")
[[ -e ${requirements[-1]} ]] || fail "ACCELERATOR: '$accelerator' is none of tpu, cuda13, none"
if [[ ! ${DRY_RUN:-} ]]; then
    source launch/environment.sh "${requirements[@]}"
    mkdir -p logs # Where sbatch cannot write it says nothing and the job fails.
fi
call sbatch "${flags[@]}" launch/slurm.sbatch "${command[@]}"
