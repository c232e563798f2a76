#!/usr/bin/env bash
# The documentation as a site, every link and anchor of it checked: into build/site.
set -euo pipefail
source "$(dirname "$0")/../setup.sh" dev docs
exec python -m mkdocs build --quiet --strict --site-dir build/site
