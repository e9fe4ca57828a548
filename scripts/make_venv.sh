#!/usr/bin/env bash
# Creates the environment FOLDER, unless it exists, with PYTHON or the first fitting interpreter found.
set -euo pipefail
folder=$1
wanted=${2:-}

fits='import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'
[ -x "$folder/bin/python" ] && "$folder/bin/python" -c 'import pip' 2>/dev/null && exit 0

# 3.11 and 3.12 first: for them a Redis server comes as a wheel.
for python in ${wanted:-python3.11 python3.12 python3.13 python3.14 python3}; do
  if "$python" -c "$fits" 2>/dev/null; then
    echo "creating $folder with $("$python" --version)"
    exec "$python" -m venv "$folder"
  fi
done
echo "FusionRoute needs Python 3.11 or later with the venv module; tried: ${wanted:-python3.11 ... python3}." >&2
echo "Name one with: make venv PYTHON=/path/to/python" >&2
exit 1
