#!/usr/bin/env bash
# What only a GPU can show, in at most 8 minutes on one: ends in a table in Markdown, and the same as JSON. Without a GPU all of it runs on the
# CPU, at toy sizes.
#
#   bash tools/gpu_check.sh [--out runs/gpu-check] [--seconds 480] [--device cpu] [--only PART ...]
#
# Takes $PYTHON, the clone's .venv or python3, whichever has what anon_dist needs; if none has, launch/setup.sh installs it into .venv first.
set -euo pipefail
cd "$(dirname "$0")/.."
export GPU_CHECK_BEGUN=$EPOCHSECONDS # what Python's imports take counts
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

for python in "${PYTHON:-}" "${VENV:-.venv}/bin/python" python3 ""; do
  if [ -n "$python" ] && "$python" -c 'import anon_dist.cli, anon_dist.data, anon_dist.train.loop' > /dev/null 2>&1; then
    break
  fi
done
if [ -z "$python" ]; then
  echo "Neither ${PYTHON:+$PYTHON, }${VENV:-.venv}/bin/python nor python3 can import anon_dist; installing (PYTHON=… names another python)" >&2
  python3 -c 'import anon_dist.cli, anon_dist.data, anon_dist.train.loop' 2>&1 | tail -n 1 >&2 || true
  bash launch/setup.sh
  python=${VENV:-.venv}/bin/python
  GPU_CHECK_BEGUN=$EPOCHSECONDS # what the installation took does not
fi
PATH="$(dirname "$(command -v "$python")"):$PATH" exec "$python" tools/gpu_check/check.py "$@"
