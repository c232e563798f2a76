"""Makes the environments of peers: each has its own packages, in pinned versions."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

_REQUIREMENTS = Path(__file__).parent / "requirements"


def pins(peer: str) -> str:
    """The packages of a peer, one a line."""
    lines = (_REQUIREMENTS / f"{peer}.txt").read_text("utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def python_of(peer: str) -> Path:
    """The Python of a peer's environment, which is made when first needed, in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mofq"
    folder = cache / f"{peer}-{hashlib.sha256(pins(peer).encode()).hexdigest()[:8]}"
    python, done = folder / "bin" / "python", folder / ".installed"
    if done.is_file():
        return python
    print(f"installing {peer} into {folder} (minutes)", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--requirement"]
    subprocess.run([*install, str(_REQUIREMENTS / f"{peer}.txt")], check=True, stdout=sys.stderr)
    done.touch()
    return python
