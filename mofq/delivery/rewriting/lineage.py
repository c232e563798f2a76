"""Which model a rewritten one comes from, as `mofq rewrite` notes it beside the weights."""

from __future__ import annotations

from pathlib import Path

from mofq.exceptions import CheckpointError
from mofq.model.checkpoint.headers import read_json

#: What the folder is and where it comes from.
LINEAGE_FILE = "rewrite.json"


def rewritten_from(folder: Path) -> str | None:
    """The name of the model that a folder was rewritten from; None where it says no such thing."""
    path = folder / LINEAGE_FILE
    if not path.is_file():
        return None
    try:
        model = read_json(path).get("model")
    except CheckpointError:  # a file of that name which mofq did not write
        return None
    name = model.get("name") if isinstance(model, dict) else None
    return name if isinstance(name, str) and name.isprintable() else None
