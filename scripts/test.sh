#!/usr/bin/env bash
# The default tests: `bash scripts/test.sh [pytest arguments]`. Needs no network after set-up.
set -euo pipefail
source "$(dirname "$0")/setup.sh" dev
# One thread per worker: two workers fill two cores better than one with two threads.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
exec python -m pytest -n "${MOFQ_TEST_WORKERS:-2}" "$@"
