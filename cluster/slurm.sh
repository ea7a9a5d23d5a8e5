#!/usr/bin/env bash
# A run on Slurm: a Ray cluster for the time of the job, the head on its first node.
#
#   sbatch --nodes=4 cluster/slurm.sh python -m b2ray.run --config configs/sd14_template1.yaml
#
# Submit from a folder that all nodes see: runs/ and the cluster's token are made there. Before the
# time is up, or when the job is preempted, the run stops resumably and the job is queued again; the
# same command then goes on. Options of sbatch override the lines below.
#SBATCH --job-name=b2ray
#SBATCH --output=b2ray-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --no-kill
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "cluster/slurm.sh: no command: add python -m b2ray.run … after the script's name" >&2
    exit 2
fi
start_timeout=${START_TIMEOUT:-300} # seconds for all nodes to join
export PATH="${VENV:-$PWD/.venv}/bin:$PATH"

umask 077
job=$PWD/.b2ray-slurm-$SLURM_JOB_ID # the nodes share it
ray_dir=/tmp/b2ray-$SLURM_JOB_ID    # each node has its own; sockets' names must be short
mkdir -p "$job"
steps=()
# shellcheck disable=SC2329  # the trap below calls it
finish() {
    if [ ${#steps[@]} -gt 0 ]; then
        kill "${steps[@]}" 2>/dev/null || true
        wait "${steps[@]}" 2>/dev/null || true
    fi
    rm -rf "$job"
}
trap 'finish' EXIT

export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$job/token"
unset RAY_AUTH_TOKEN RAY_ADDRESS # a token's value would go before its file
python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH"
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # the run has ended before the nodes do

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# ray start on one node of the job; nodes that other jobs share have no fixed port to spare.
start_node() {
    local host=$1
    shift
    srun --overlap --nodes=1 --ntasks=1 --nodelist="$host" \
        --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" \
        --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 "$@" &
    steps+=($!)
}

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
dashboard=$(free_port)
rm -f "$ray_dir/ray_current_cluster" # of the try before, if the job was queued again
start_node "${hosts[0]}" --head --port=0 --temp-dir="$ray_dir" --disable-usage-stats \
    --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
    --ray-client-server-port="$(free_port)"
for ((waited = 0; ; waited++)); do
    # This script runs on the first node, too.
    [ -s "$ray_dir/ray_current_cluster" ] && break
    if ! kill -0 "${steps[0]}" 2>/dev/null || [ "$waited" -ge "$start_timeout" ]; then
        echo "cluster/slurm.sh: Ray's head did not start on ${hosts[0]}; the lines above may say why" >&2
        exit 2
    fi
    sleep 1
done
RAY_ADDRESS=$(cat "$ray_dir/ray_current_cluster")
export RAY_ADDRESS
for host in "${hosts[@]:1}"; do
    start_node "$host" --address="$RAY_ADDRESS"
done
python - ${#hosts[@]} "$start_timeout" <<'PYTHON'
import sys
import time

import ray

wanted, seconds = int(sys.argv[1]), float(sys.argv[2])
ray.init(logging_level="error", log_to_driver=False)
until = time.monotonic() + seconds
while (alive := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > until:
        sys.exit(f"cluster/slurm.sh: {alive} of {wanted} nodes joined in {seconds:.0f} s")
    time.sleep(1)
PYTHON
echo "cluster/slurm.sh: ${#hosts[@]} nodes at $RAY_ADDRESS, dashboard at ${hosts[0]}:$dashboard" \
    "(loopback), start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID"

again=
"$@" &
run=$!
# USR1 comes before the time is up. TERM is scancel, or a preemption after which Slurm itself queues
# the job again; to ask for that here would bring a cancelled job back.
trap 'again=yes; kill -TERM $run 2>/dev/null || true' USR1
trap 'kill -TERM $run 2>/dev/null || true' TERM
until wait $run || ! kill -0 $run 2>/dev/null; do :; done # a signal ends wait, not the run
code=0
wait $run || code=$? # bash remembers it
if [ -n "$again" ] && [ $code -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
