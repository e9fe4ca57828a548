#!/usr/bin/env bash
# Installs the project without constraints into a throw-away environment and records what came.
# Local version labels (torch 2.13.0+cpu) are cut, so that any build of the same release fits.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-}
shift || true
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
scripts/make_venv.sh "$folder/venv" "$python"
"$folder/venv/bin/python" -m pip install --quiet "$@" 'torch==2.13.0' --editable '.[dev,oracle,browser]'
{
  echo "# What CI tests, on Linux x86-64. Written by: make constraints"
  "$folder/venv/bin/python" -m pip freeze --all --exclude-editable | grep -v "^pip==" | sed -E 's/\+[A-Za-z0-9.]+$//' | LC_ALL=C sort -f
} >"$folder/constraints.txt"
mv "$folder/constraints.txt" constraints.txt
echo "constraints.txt: $(grep -c == constraints.txt) packages"
