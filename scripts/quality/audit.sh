#!/usr/bin/env bash
# Known vulnerabilities of the pinned packages: `bash scripts/quality/audit.sh [pip-audit arguments]`.
# Asks the advisories of the Python package index, so it needs the network; a package that
# could not be looked up counts as a failure. Without a network, from a copy of an advisory
# database: `bash scripts/quality/audit.sh --advisories FOLDER`.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ "${1:-}" = --advisories ]; then
    exec "${PYTHON:-python3}" scripts/quality/audit_advisories.py "${2:?a folder of advisories}"
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "pip-audit>=2.7"
for pins in constraints.txt serve/requirements.txt; do
    "$folder/bin/pip-audit" --requirement "scripts/$pins" --no-deps --disable-pip --strict "$@"
done
