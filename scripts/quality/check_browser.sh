#!/usr/bin/env bash
# The explorer page in a real browser: `bash scripts/quality/check_browser.sh [pytest arguments]`.
# Needs Chromium and its driver; installs Debian's where there are none and apt-get may.
set -euo pipefail
source "$(dirname "$0")/../setup.sh" dev browser
if ! command -v chromium >/dev/null || ! command -v chromedriver >/dev/null; then
    echo "Installing chromium and chromium-driver" >&2
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium chromium-driver
fi
exec python -m pytest -m browser tests/explore/test_explore_browser.py "$@"
