# What accelerate.sh, torchrun.sh and deepspeed.sh share; they source it after their variables.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
venv=${VENV:-.venv}
[ ! -d "$venv/bin" ] || PATH="$(realpath "$venv")/bin:$PATH"
export PATH TOKENIZERS_PARALLELISM=false
# Unset, NCCL and gloo choose: gloo the interface to which the host's name resolves, often the loopback.
if [ -n "$INTERFACE" ]; then
  export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$INTERFACE} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$INTERFACE}
fi

# c10d keeps one store for all attempts, in which ranks meet the addresses of those that are dead (torch 2.13): rather a new one for each.
if [ "${RENDEZVOUS:-}" = c10d ]; then
  export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
fi

# A signal before there are ranks ends all once what runs here has ended, as one that stops the run later.
for name in TERM USR1; do
  # shellcheck disable=SC2064  # the name of now
  trap "echo 'node ${NODE_RANK:-?} ($(uname -n)): stopped by SIG$name before its ranks were started' >&2; exit ${STOPPED_CODE:-0}" "$name"
done

need_rank_and_address() {
  : "${NODE_RANK:?set NODE_RANK: 0 on the first node, 1 on the second, ...}" "${MASTER_ADDR:?set MASTER_ADDR: an address of node 0}"
}

# Ends with what is wrong with the training's options, or with its help, before anything is started. Arguments: the training's.
check_options() {
  python -c 'import sys; from anon_dist.cli import check_training; check_training(sys.argv[1:], "launch/pretrain.py")' "$@" || exit
  [[ " $* " != *" -h "* && " $* " != *" --help "* ]] || exit 0
}

# With DOCTOR=1, the nodes look at each other first; nothing starts where something is wrong. Arguments: those of the training.
doctor_first() {
  [ -n "${DOCTOR:-}" ] || return 0
  python -m anon_dist.cli doctor --node-rank "$NODE_RANK" --num-nodes "${NODES#*:}" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
    --wait "$RENDEZVOUS_SECONDS" "$@" || { echo "node $NODE_RANK ($(uname -n)): the doctor found what is in the way; nothing is started" >&2 && return 1; }
}

# Prints --rdzv-conf for the rendezvous that was chosen.
rendezvous_conf() {
  case $RENDEZVOUS in
    static) echo "timeout=$RENDEZVOUS_SECONDS" ;;
    # Who hosts the store is said: torch would guess it from the host's name, wrongly on some. read_timeout, how long a launcher waits for a
    # store that does not answer, stays at torch's 60 s: so much longer than its ranks does the launcher of a node that was cut off live.
    c10d) echo "is_host=$((NODE_RANK == 0)),join_timeout=$RENDEZVOUS_SECONDS" ;;
    *) echo "RENDEZVOUS is static or c10d, not '$RENDEZVOUS'" >&2 && return 2 ;;
  esac
}

# Prints the address under which the other nodes reach this one: that of packets to node 0. (None is sent.) Under c10d the nodes tell each
# other; torch would say the host's full name, which need not resolve elsewhere. Under Kubernetes node 0's name is known once it has started.
own_address() {
  python - "$MASTER_ADDR" "$MASTER_PORT" "$RENDEZVOUS_SECONDS" <<'PYTHON'
import socket, sys, time

end = time.monotonic() + float(sys.argv[3])
while True:
    try:
        family, kind, _, _, address = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), type=socket.SOCK_DGRAM)[0]
        break
    except socket.gaierror as error:
        if time.monotonic() > end:
            sys.exit(f"MASTER_ADDR = {sys.argv[1]}: {error}")
        time.sleep(1)
probe = socket.socket(family, kind)
probe.connect(address)
print(probe.getsockname()[0])
PYTHON
}

# Run a launcher to its end, pass signals on to its ranks, and say how it ended: with 0, or with STOPPED_CODE, where that is set, if a signal
# stopped the run before its results were written and its last checkpoint was at checkpoint.remote: so whoever started it can tell.
# Arguments: the launcher's, of which those after launch/pretrain.py are the training's.
#
# The ranks answer SIGTERM, SIGINT and SIGUSR1 with a checkpoint, together with those of other nodes. A launcher that is signalled itself
# kills them after 30 seconds, done or not, or dies of a SIGUSR1. So the signal goes past it, and it ends when its ranks have.
run_launcher() {
  local name status
  again=
  (trap '' USR1; exec "$@") & # ignored until the ranks have their handlers
  launcher=$!
  for name in TERM INT USR1; do
    # shellcheck disable=SC2064  # the name of now
    trap "pass_on $name" "$name"
  done
  while :; do
    signalled=
    wait "$launcher" && status=0 || status=$?
    [ -n "$signalled" ] || break # else `wait` ended for the signal
  done
  trap - TERM INT USR1
  [ -z "$again" ] || kill "$again" 2>/dev/null || true
  if [ "$status" -ne 0 ]; then
    echo "node ${NODE_RANK:-?} ($(uname -n)): $1 ended with exit code $status at $(date +%T). Of all nodes, the one with the earliest such" \
      "line failed first; one without any was lost." >&2
  fi
  if [ "$status" -eq 0 ] && [ "${STOPPED_CODE:-0}" -ne 0 ] && ! is_finished "$@"; then
    status=$STOPPED_CODE
  fi
  return "$status"
}

is_finished() {
  while [ "$1" != launch/pretrain.py ]; do shift; done
  python - "${@:2}" <<'PYTHON'
import sys
from pathlib import Path

from anon_dist.train.config.parsing import parse_args
from anon_dist.train.reports.report import finished
from anon_dist.train.saves.remote import is_there

config = parse_args(sys.argv[1:])
sys.exit(not (finished(Path(config.run_dir), config) and is_there(config)))
PYTHON
}

# Ranks that are starting ignore a SIGUSR1, and take the first that they do not: so it comes again.
pass_on() {
  signalled=1
  tell_ranks "$1"
  if [ "$1" = USR1 ] && [ -z "$again" ]; then
    (while sleep 5; do tell_ranks USR1; done) >/dev/null 2>&1 &
    again=$!
  fi
}

# The launcher's children are the ranks; if there are none yet, it is the launcher itself.
tell_ranks() {
  # shellcheck disable=SC2046  # one process id per word
  kill -s "$1" $(cat "/proc/$launcher/task/"*/children 2>/dev/null) 2>/dev/null || kill -s "$1" "$launcher" 2>/dev/null || true
}
