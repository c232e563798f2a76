#!/usr/bin/env bash
# Known vulnerabilities of the pinned packages: `bash scripts/audit.sh [pip-audit arguments]`.
# Asks the advisories of the Python package index, so it needs the network; a package that
# could not be looked up counts as a failure.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "pip-audit>=2.7"
"$folder/bin/pip-audit" --requirement scripts/constraints.txt --no-deps --disable-pip --strict "$@"
