#!/usr/bin/env bash
# The tests: linter, type checker, and every test that needs no GPU.
#
#   bash tests/run.sh              about 13 minutes on 2 cores
#   bash tests/run.sh --all        the long soaks too
#   bash tests/run.sh -k schedule  further arguments go to pytest, without the linter; -n 0: in one process
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh deepspeed dev
bin=$(realpath "${VENV:-.venv}")/bin
export PATH="$bin:$PATH" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Compiled operators of this run stay out of the user's caches.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export TORCH_EXTENSIONS_DIR="$scratch/extensions" TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" ANON_DIST_CACHE="$scratch/kernels"

if [ $# -eq 0 ] || [ "$1" = --all ]; then
  ruff check .
  ruff format --check .
  mypy
fi
if [ "${1:-}" = --all ]; then
  shift
  set -- --hypothesis-profile soak "$@"
else
  set -- -m "not slow" "$@"
fi
# Two at a time, file by file, in the order of tests/conftest.py: the longest first.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
