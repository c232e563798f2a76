"""The environments of peers: each has its own packages, in pinned versions."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from scripts.shared.environment import python_with

_REQUIREMENTS = Path(__file__).parent / "requirements"


def pins(peer: str) -> str:
    """The packages of a peer, one a line."""
    lines = (_REQUIREMENTS / f"{peer}.txt").read_text("utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def python_of(peer: str) -> Path:
    """The Python of a peer's environment, which is made when first needed, in the user's cache."""
    pinned = pins(peer)
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    digest = hashlib.sha256(pinned.encode()).hexdigest()[:8]
    return python_with(pinned, Path(cache).expanduser() / "mofq" / f"{peer}-{digest}")
