#!/usr/bin/env bash
# The default tests on a machine with a GPU, whose own torch is kept, and how fast weights are
# scored there: `bash scripts/quality/gpu_check.sh [pytest arguments]`. Installs nothing; PYTHON names
# the interpreter that has torch and the test packages. MODEL may name a model folder that
# the rates are measured on too.
set -euo pipefail
cd "$(dirname "$0")/../.."
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD"
python=${PYTHON:-python3}
"$python" - <<'PYTHON'
import sys

import torch

if not torch.cuda.is_available():
    sys.exit(f"gpu_check.sh: torch {torch.__version__} sees no GPU.")
print(f"torch {torch.__version__} on {torch.cuda.get_device_name()}")
PYTHON
"$python" -m pytest "$@"
exec "$python" scripts/bench/speed.py --device cuda ${MODEL:+--model "$MODEL"}
