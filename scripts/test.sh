#!/usr/bin/env bash
# The tests of every change, in at most three minutes: `bash scripts/test.sh [pytest arguments]`.
# With --all, first, those that are marked long too. Needs no network after set-up.
set -euo pipefail
source "$(dirname "$0")/setup.sh" dev
others="not real and not postgres and not slow and not browser"
if [ "${1:-}" = --all ]; then
    shift
    chosen=$others
else
    chosen="$others and not long"
fi
# What Python compiled is kept, also where the environment says otherwise: both workers and the
# processes that they start read it.
unset PYTHONDONTWRITEBYTECODE
# One thread per worker: two workers fill two cores better than one with two threads.
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
exec python -m pytest -n "${MOFQ_TEST_WORKERS:-2}" --dist worksteal -m "$chosen" "$@"
