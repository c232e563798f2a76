#!/usr/bin/env bash
# The whole flow on the small bundled model: `bash scripts/demo.sh`.
set -euo pipefail
source "$(dirname "$0")/setup.sh" ""
export HF_HUB_OFFLINE=1
exec mofq demo "$@"
