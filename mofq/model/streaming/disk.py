"""Whether a disk holds what is kept between the layers of a model that runs layer by layer."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedModel

from mofq.exceptions import MofqError, option

#: Steps whose results are on the disk at once while nothing is kept for gradients: of the one that
#: runs, what it reads, and what is not known yet to be looked at no more. Embeddings of positions
#: and a second stream are such steps.
KEPT_STEPS = 6


def hidden_size(model: PreTrainedModel) -> int:
    """Numbers that a step returns for a token; a model with several streams returns more."""
    return int(getattr(model.config.get_text_config(), "hidden_size", 0) or 0)


def check_disk(
    folder: Path, needed: int, *, fewer: str, error: type[MofqError] = MofqError
) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        folder: What a run that was stopped has written to it takes no more.
        needed: What is kept at once, about [bytes].
        fewer: The option of which less would take less.
        error: What is raised.

    Raises:
        error: There is less space than that.
    """
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if needed - written > free:
        raise error(
            f"{folder}: what is kept between layers needs about {needed - written:,} bytes, found "
            f"{free:,} free. Free some space, take fewer {option(fewer)}, or give an output "
            f"elsewhere (without one, set TMPDIR)."
        )
