# Sourced by the other scripts: makes .venv with the pinned packages and puts
# its commands first on the PATH. Does nothing when that was done before with
# the same pins.
#
#   source scripts/setup.sh ""            what `mofq` needs
#   source scripts/setup.sh dev           and what its tests and checks need
#   source scripts/setup.sh dev docs      several extras, installed at once

cd "$(dirname "${BASH_SOURCE[0]}")/.."

mofq_setup() {
    local extra stamp pins extras='' stamps=()
    pins=$(cat scripts/constraints.txt pyproject.toml scripts/setup.sh | cksum)
    if [ ! -x .venv/bin/python ]; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "scripts/setup.sh: mofq needs Python 3.11 or newer; found" \
                "$("${PYTHON:-python3}" --version 2>&1). Name one with PYTHON=python3.11." >&2
            return 1
        }
        echo "Making .venv" >&2
        "${PYTHON:-python3}" -m venv .venv || return 1
    fi
    for extra in "$@"; do
        stamp=".venv/.mofq-installed${extra:+-$extra}"
        if [ "$(cat "$stamp" 2>/dev/null)" != "$pins" ]; then
            extras+="${extra:+${extras:+,}$extra}"
            stamps+=("$stamp")
        fi
    done
    if [ ${#stamps[@]} -gt 0 ]; then
        echo "Installing the pinned packages into .venv (minutes the first time)" >&2
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            --constraint scripts/constraints.txt --editable ".${extras:+[$extras]}" || return 1
        echo "$pins" | tee "${stamps[@]}" >.venv/.mofq-installed
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}

mofq_setup "$@"
