#!/usr/bin/env bash
# Coverage-guided fuzzing of the parsers: `bash scripts/quality/fuzz.sh [--seconds N]`, 10 s each by default.
set -euo pipefail
source "$(dirname "$0")/../setup.sh" dev fuzz
exec python scripts/quality/fuzz.py --seconds 10 "$@"
