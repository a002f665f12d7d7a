#!/usr/bin/env bash
# From a fresh clone to a trained model: install, prepare a corpus, pretrain a small GPT with sharded Anon, export it, sample from it.
#
#   bash launch/quickstart.sh [--section.field value ...]     options of launch/pretrain.py, over configs/train/quickstart.yaml
#
# A second call goes on with a run that was interrupted, and says so when there is nothing to do. Two processes on CPU (gloo), or one per
# visible GPU (NCCL). PYTHON names the interpreter; RANKS another number of processes.
set -euo pipefail
cd "$(dirname "$0")/.."

bash launch/setup.sh deepspeed
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false

# A mistake is told before minutes go into the corpus, and no launcher's traceback follows it.
python -c 'import sys; from anon_dist.cli import check_training; check_training(sys.argv[1:], "launch/quickstart.sh", data=False)' \
  --config configs/train/quickstart.yaml "$@"
[[ " $* " != *" -h "* && " $* " != *" --help "* ]] || exit 0 # that was it

anon-dist data prepare --source stdlib --tokenizer spm-bpe:4096 --out data/stdlib

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
  ranks=${RANKS:-$gpus} accelerate_config=configs/accelerate/fsdp2.yaml
else
  ranks=${RANKS:-2} accelerate_config=configs/accelerate/fsdp2-cpu.yaml
  cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
fi

# Of torch's launcher errors only: after a Ctrl-C the run itself says what there is to say.
export LOGLEVEL=${LOGLEVEL:-ERROR} TORCH_LOGS=${TORCH_LOGS:--torch.distributed.elastic}
exec accelerate launch --config_file "$accelerate_config" --num_processes "$ranks" \
  launch/pretrain.py --config configs/train/quickstart.yaml "$@"
