"""Makes an environment with pinned packages for a script that needs others than mofq's own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


def python_with(pinned: str, folder: Path, *, at_start: Path | None = None) -> Path:
    """The Python of a venv, which is made when first needed.

    Args:
        pinned: Requirements, one a line: every package, direct or not, in one version.
        folder: The venv; its name should say what is pinned.
        at_start: A ``sitecustomize.py``, which each of its Pythons runs first.
    """
    python, done = folder / "bin" / "python", folder / ".installed"
    if done.is_file():
        return python
    print(f"installing packages into {folder} (minutes)", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    listed = folder / "requirements.txt"
    listed.write_text(pinned, encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run([*install, "--requirement", str(listed)], check=True, stdout=sys.stderr)
    if at_start is not None:
        (packages,) = folder.glob("lib/python*/site-packages")
        shutil.copy(at_start, packages)
    done.touch()
    return python
