#!/usr/bin/env bash
# Everything that must be green before a commit: format, lint, types, the tests of scripts/test.sh.
# With --all, those that are marked long too, as in CI.
set -euo pipefail
source "$(dirname "$0")/setup.sh" dev
ruff format --check .
ruff check .
mypy
exec bash scripts/test.sh "$@"
