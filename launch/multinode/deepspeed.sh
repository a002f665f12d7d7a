#!/usr/bin/env bash
# Pretrain on several nodes with DeepSpeed's launcher and host file. Options are those of launch/pretrain.py:
#
#   bash launch/multinode/deepspeed.sh --config gpt2-small --optim.basis None --run-dir /shared/runs/a    over ssh, from one node
#   NODE_RANK=0 bash launch/multinode/deepspeed.sh …                                                      without ssh, on every node
#
# The presets have a basis, which ZeRO's stage 2 cannot hold; with --train.deepspeed-config configs/deepspeed/zero3.json it stays.
# ZeRO does not need this launcher: accelerate.sh starts it too. To stop a run with a checkpoint, signal any one of its ranks (SIGTERM to
# a pretrain.py; they agree): DeepSpeed's launcher does not pass signals on without ssh, and over ssh it kills.
set -euo pipefail

# -- change these, here or in the environment -------------------------------------------------------------------------
HOSTFILE=${HOSTFILE:-launch/multinode/hostfile} # a line per node: see hostfile.example
NODE_RANK=${NODE_RANK:-}                    # empty: over ssh. Else the line of this node in the host file, from 0
MASTER_ADDR=${MASTER_ADDR:-}                # an address of the first node that all nodes reach; empty: asked over ssh
MASTER_PORT=${MASTER_PORT:-29500}           # a free port there, open in the firewall
INTERFACE=${INTERFACE:-}                    # network interface between the nodes, such as eth0 or ib0; empty: guessed
SSH_WITH=${SSH_WITH:-pdsh}                  # how the nodes are reached: pdsh, openmpi, mpich, impi, mvapich or slurm
DOCTOR=${DOCTOR:-}                          # 1: look at all nodes first, and start nothing where something is wrong
# ---------------------------------------------------------------------------------------------------------------------

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
[ -f "$HOSTFILE" ] || { echo "no host file $HOSTFILE: copy launch/multinode/hostfile.example, and name your nodes in it" >&2 && exit 2; }
check_options "$@"

options=(--hostfile "$HOSTFILE" --master_port "$MASTER_PORT" --no_local_rank)
[ -z "$MASTER_ADDR" ] || options+=(--master_addr "$MASTER_ADDR")
if [ -n "$NODE_RANK" ]; then
  : "${MASTER_ADDR:?set MASTER_ADDR: the address of the first node; without ssh it cannot be asked}"
  NODES=$(sed 's/#.*//' "$HOSTFILE" | grep -c '[^[:space:]]') RENDEZVOUS_SECONDS=600
  doctor_first "$@"
  options+=(--no_ssh --node_rank "$NODE_RANK")
else
  if [ -n "$DOCTOR" ]; then
    python -m anon_dist.cli doctor --nodes "$HOSTFILE" --master-port "$MASTER_PORT" ${MASTER_ADDR:+--master-addr "$MASTER_ADDR"} "$@"
  fi
  options+=(--launcher "$SSH_WITH")
  # DeepSpeed's launcher passes on variables of NCCL and Python, and those of such a file; not gloo's.
  environment=$(mktemp)
  cat ${DS_ENV_FILE:-~/.deepspeed_env .deepspeed_env} > "$environment" 2>/dev/null || true
  env | grep -E '^(GLOO_|NCCL_|OMP_NUM_THREADS=|HF_|TOKENIZERS_|ANON_DIST_)' >> "$environment" || true
  export DS_ENV_FILE=$environment
fi
exec deepspeed "${options[@]}" launch/pretrain.py "$@"
