#!/bin/bash
# A run on several machines under Slurm: it stops in time, queues again, and goes on until it is done.
#     sbatch docs/slurm.sh
#SBATCH --job-name=tilewright
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Five minutes before that, SIGUSR1 comes to this script alone: enough for a step, a validation and a checkpoint.
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

# On a file system that all machines share, as data/ has to be.
RUN=runs/gpt2-xl

# With the store that torchrun shares by default, processes started again find the addresses of those before them
# (github.com/pytorch/pytorch/issues/135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
out_of_time=

stop() {
    out_of_time=1
    # One process of them all is enough: they agree, end after the same step with a checkpoint, and exit with 0. torchrun
    # itself, whose command line begins differently, would die of the signal.
    pkill -USR1 -u "$USER" -f '^[^ ]*python[^ ]* -u -m tilewright\.train '
}
trap stop USR1

srun torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --max-restarts=3 \
    -m tilewright.train gpt2-xl --out "$RUN" --parallel fsdp --resume auto &
launcher=$!
# The signal ends a wait, not what is waited for.
wait "$launcher"
status=$?
while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher"
    status=$?
done

if [ -n "$out_of_time" ] && [ "$status" -eq 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
