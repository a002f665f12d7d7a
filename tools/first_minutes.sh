#!/usr/bin/env bash
# How long the three uses of the README take whoever begins: minutes to the first model, lines changed in a DeepSpeed script, and commands
# and seconds from a ZeRO-3 checkpoint of AdamW to an FSDP2 run of Anon. On CPUs, two processes. Prints a line for each.
#
#   bash tools/first_minutes.sh [FOLDER]     FOLDER: where data, runs and logs go (a new one in /tmp)
#
# The installation is not in it (launch/setup.sh prints nothing of how long it takes: `time bash launch/setup.sh deepspeed`). VENV names an
# environment other than .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${VENV:-}" ] || bash launch/setup.sh deepspeed
PATH="$(realpath "${VENV:-.venv}")/bin:$PATH"
export PATH OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false LOGLEVEL=ERROR DS_ACCELERATOR=cpu PYTHONPATH=$PWD
work=${1:-$(mktemp -d)}
mkdir -p "$work"
log=$work/log

seconds_of() { # COMMAND...: its seconds; its output goes to the log
  local start
  start=$(date +%s.%N)
  "$@" >> "$log" 2>&1 || { tail -20 "$log" >&2; exit 1; }
  awk -v a="$start" -v b="$(date +%s.%N)" 'BEGIN { printf "%.0f", b - a }'
}
anon() { python -m anon_dist.cli "$@"; }
ranks() { # CONFIG [OPTION]...: the training on two processes
  local config=$1
  shift
  accelerate launch --config_file "configs/accelerate/$config.yaml" --num_processes 2 launch/pretrain.py "$@"
}

# Pretrain: what launch/quickstart.sh does after the installation.
prepared=$(seconds_of anon data prepare --source stdlib --tokenizer spm-bpe:4096 --out "$work/data")
trained=$(seconds_of ranks fsdp2-cpu --config quickstart --data.path "$work/data" --run-dir "$work/quickstart")
echo "to the first model: $prepared s for the corpus, $trained s for training, export and sample"

# One line in your own code.
before=tools/first_minutes/deepspeed_adamw.py after=tools/first_minutes/deepspeed_anon.py
changed=$({ diff "$before" "$after" || true; } | grep -c '^> .') # without the blank one
for script in "$before" "$after"; do
  seconds_of torchrun --nproc-per-node 2 "$script" "$work/$(basename "$script" .py)" > /dev/null
done
echo "in a DeepSpeed script of $(wc -l < "$before") lines: $changed lines"

# Convert and resume: a run of AdamW under ZeRO-3 is there; the commands after it count.
small=(--config quickstart --data.path "$work/data" --train.steps 40 --checkpoint.every 20 --schedule.warmup-steps 10 --log.sample-prompt None)
seconds_of ranks deepspeed-cpu "${small[@]}" --train.deepspeed-config configs/deepspeed/zero3.json --optim.name adamw \
  --run-dir "$work/zero3" > /dev/null
converted=$(seconds_of anon ckpt convert "$work/zero3/checkpoints/step-00000020" "$work/converted" --to dcp --optimizer anon)
resumed=$(seconds_of ranks fsdp2-cpu "${small[@]}" --resume "$work/converted" --run-dir "$work/anon")
echo "from ZeRO-3 of AdamW to FSDP2 of Anon: 2 commands, $converted s to convert, $resumed s to resume and take 20 steps"
grep -q "Resuming $work/converted after step 20" "$log"
