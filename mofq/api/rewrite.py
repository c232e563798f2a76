"""Moves scales between tensors so that the model computes the same and quantizes better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

from mofq.api.options import Model, Option, documented
from mofq.api.preconditions import check_folder
from mofq.files.progress import Progress

if TYPE_CHECKING:
    from mofq.delivery.rewriting.choose import Choice


@dataclass(frozen=True, slots=True)
class RewriteResult:
    """A rewritten checkpoint, and what was moved in it."""

    output: Path
    method: str
    choices: Sequence[Choice]  #: one for each site at which scales can be moved
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """What was moved, for machines."""
        return {
            "sites": {
                one.site.group: {
                    "scheme": one.scheme,
                    "strength": None
                    if one.strength is None
                    else {"alpha": one.strength.alpha, "beta": one.strength.beta},
                    "kl_before": one.nats_before,
                    "kl_after": one.nats_after,
                }
                for one in self.choices
            },
            "moved": sum(one.strength is not None for one in self.choices),
            "kl_before": sum(one.nats_before for one in self.choices),
            "kl_after": sum(one.nats_after for one in self.choices),
            "folder": str(self.output),
            "seconds": round(self.seconds, 2),
        }


@documented
def rewrite(
    model: Model,
    output: Annotated[str | Path, Option("The folder to write.", short="-o")],
    *,
    stats: Annotated[str | Path, Option("From `mofq calibrate`.")],
    method: Annotated[str, Option("smoothquant, awq or bismooth.")],
    scheme: Annotated[
        str | None, Option("That it is to be quantized by, e.g. int8.channel+int8.token.")
    ] = None,
    powers_of_two: Annotated[bool, Option("Move powers of two alone: exact in bf16.")] = False,
    progress: Progress | None = None,
) -> RewriteResult:
    """Move scales between tensors so that the model computes the same and quantizes better.

    Returns:
        What was moved, with the predicted KL before and after.

    Raises:
        MofqError: An input is not valid, or the rewritten model would compute something else.
    """
    from mofq.model.checkpoint.headers import open_checkpoint

    start = monotonic()
    folder = Path(output)
    check_folder(folder, folders=[model, stats])
    checkpoint = open_checkpoint(str(model))

    from mofq.delivery.rewriting.rewrite import rewrite as rewrite_checkpoint
    from mofq.evidence.calibration.stats import read_stats

    choices = rewrite_checkpoint(
        checkpoint,
        read_stats(stats),
        folder,
        method=method,
        scheme=scheme,
        powers_of_two=powers_of_two,
        progress=progress,
    )
    return RewriteResult(folder, method, choices, monotonic() - start)
