#!/usr/bin/env bash
# A study on a real PostgreSQL server: `bash scripts/quality/check_postgres.sh [pytest arguments]`.
# Installs Debian's server where there is none and apt-get may; the test starts and stops it.
set -euo pipefail
source "$(dirname "$0")/../setup.sh" dev
if ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 && ! command -v pg_ctl >/dev/null; then
    echo "Installing postgresql" >&2
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq postgresql
fi
exec python -m pytest -m postgres tests/decision/test_optuna_postgres.py "$@"
