#!/usr/bin/env bash
# Pretrain on several nodes with `torchrun`. The same command on each, but for NODE_RANK; options are those of launch/pretrain.py:
#
#   NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash launch/multinode/torchrun.sh --config gpt2-small --run-dir /shared/runs/gpt2-small
#
# The engine is --train.engine, fsdp2 by default.
set -euo pipefail

# -- change these, here or in the environment -------------------------------------------------------------------------
NODES=${NODES:-2}                                   # how many machines; 2:4 with c10d: at least 2, at most 4
RANKS_PER_NODE=${RANKS_PER_NODE:-8}                 # processes on each: its GPUs
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-}}           # 0 to NODES - 1, another on every machine
MASTER_ADDR=${MASTER_ADDR:-}                        # an address of node 0 that all nodes reach
MASTER_PORT=${MASTER_PORT:-29500}                   # a free port there, open in the firewall
INTERFACE=${INTERFACE:-}                            # network interface between the nodes, such as eth0 or ib0; empty: guessed
RENDEZVOUS=${RENDEZVOUS:-static}                    # static: ranks follow NODE_RANK. c10d: they follow addresses; can restart
RENDEZVOUS_SECONDS=${RENDEZVOUS_SECONDS:-600}       # how long nodes wait for each other at the start
MAX_RESTARTS=${MAX_RESTARTS:-0}                     # c10d: how often all ranks start again, from the last checkpoint, after one failed
DOCTOR=${DOCTOR:-}                                  # 1: look at all nodes first, and start nothing where something is wrong
STOPPED_CODE=${STOPPED_CODE:-0}                     # exit code of a run that a signal stopped before all was done
# ---------------------------------------------------------------------------------------------------------------------

# shellcheck source=common.sh
source "$(dirname "$0")/common.sh"
need_rank_and_address
check_options "$@"
doctor_first "$@"
conf=$(rendezvous_conf) address=$(own_address)

run_launcher torchrun --nnodes "$NODES" --nproc-per-node "$RANKS_PER_NODE" --node-rank "$NODE_RANK" \
  --rdzv-backend "$RENDEZVOUS" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-conf "$conf" --local-addr "$address" \
  --max-restarts "$MAX_RESTARTS" \
  launch/pretrain.py "$@"
