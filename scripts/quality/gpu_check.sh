#!/usr/bin/env bash
# What can be proved and measured on a GPU in eight minutes: `bash scripts/quality/gpu_check.sh`
# runs gpu_check.py, which has the options; with --tests, first, the default tests instead, whose
# arguments follow. Installs nothing and needs no network. PYTHON names the interpreter, whose torch
# is kept; SITE a folder with the packages that it lacks (by default `site` here, if it is there).
set -euo pipefail
cd "$(dirname "$0")/../.."
site=${SITE:-$PWD/site}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -d "$site" ]; then PYTHONPATH="$PYTHONPATH:$site"; fi
python=${PYTHON:-python3}
if [ "${1:-}" = --tests ]; then
    shift
    exec "$python" -m pytest "$@"
fi
exec "$python" scripts/quality/gpu_check.py "$@"
