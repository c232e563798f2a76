#!/usr/bin/env bash
# The default tests on a machine with a GPU, whose own torch is kept:
# `bash scripts/gpu_check.sh [pytest arguments]`. Installs nothing; PYTHON names
# the interpreter that has torch and the test packages.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
"${PYTHON:-python3}" - <<'PYTHON'
import sys

import torch

if not torch.cuda.is_available():
    sys.exit(f"gpu_check.sh: torch {torch.__version__} sees no GPU.")
print(f"torch {torch.__version__} on {torch.cuda.get_device_name()}")
PYTHON
exec env PYTHONPATH="$PWD" "${PYTHON:-python3}" -m pytest "$@"
