#!/usr/bin/env bash
# Make the virtual environment .venv (or $VENV) of this clone and install anon_dist into it, with the versions of constraints.txt.
#
#   bash launch/setup.sh [EXTRA ...]     extras of pyproject.toml: deepspeed, wandb, eval, dev
#
# Does nothing when that has been done. PYTHON names the interpreter to use (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=${VENV:-.venv}
extras=$(IFS=,; echo "$*")

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "anon_dist needs Python 3.11 or newer, and '$python' is $("$python" --version 2>&1); set PYTHON=/path/to/python3.11" >&2
  exit 1
}
wanted="$("$python" --version) extras=[$extras] $(cat pyproject.toml constraints.txt | sha256sum)"
stamp="$venv/.anon_dist-$(printf '%s' "${extras:-none}" | tr ',' '-')"
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

echo "Installing anon_dist${extras:+[$extras]} into $venv (a few minutes the first time) …"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
# torch first: with it there, the other packages' ranges cannot pull another build of it.
"$venv/bin/python" -m pip install --quiet --constraint constraints.txt torch
"$venv/bin/python" -m pip install --quiet --constraint constraints.txt --editable ".${extras:+[$extras]}"
printf '%s' "$wanted" > "$stamp"
echo "Installed. In a shell of yours: source $venv/bin/activate"
