"""Moves scales between tensors, or rotates them: the same function, easier to quantize."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mofq.api.options import Model, Option, documented
from mofq.api.preconditions import check_folder
from mofq.exceptions import MofqError, option
from mofq.files.progress import Progress

if TYPE_CHECKING:
    from mofq.decision.rewriting import RotatedModel
    from mofq.delivery.rewriting.choose_scales import Choice
    from mofq.model.checkpoint.headers import Checkpoint


@dataclass(frozen=True, slots=True)
class RewriteResult:
    """A rewritten checkpoint, and what was moved in it."""

    output: Path
    method: str
    choices: Sequence[Choice]  #: one for each site at which scales can be moved
    seconds: float
    rotation: RotatedModel | None = None  #: by which the model was rotated
    untied_bytes: int = 0  #: of an lm_head that is no longer the embedding [bytes]

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
            "rotation": None if self.rotation is None else asdict(self.rotation),
            "untied_bytes": self.untied_bytes,
            "folder": str(self.output),
            "seconds": round(self.seconds, 2),
        }


@documented
def rewrite(
    model: Model,
    output: Annotated[str | Path, Option("The folder to write.", short="-o")],
    *,
    stats: Annotated[
        str | Path | None, Option("From `mofq calibrate`; all methods but rotate need it.")
    ] = None,
    method: Annotated[
        Literal["smoothquant", "awq", "bismooth", "rotate"],
        Option("smoothquant, awq, bismooth or rotate."),
    ],
    scheme: Annotated[
        str | None,
        Option("The scheme that it is made better for; by default that of the method."),
    ] = None,
    powers_of_two: Annotated[bool, Option("Move powers of two alone: exact in bf16.")] = False,
    seed: Annotated[int | None, Option("Of the random signs of rotate; 0 by default.")] = None,
    progress: Progress | None = None,
) -> RewriteResult:
    """Rewrite a model: the same function, easier to quantize.

    Scales move between tensors, or the residual stream and the values of attention heads are
    rotated.

    Returns:
        What was moved, with the predicted KL before and after; or how it was rotated.

    Raises:
        MofqError: An input is not valid, or the rewritten model would compute something else.
    """
    from mofq.decision.rewriting import ROTATE
    from mofq.model.checkpoint.headers import open_checkpoint

    start = monotonic()
    folder = Path(output)
    check_folder(folder, folders=[model, stats])
    checkpoint = open_checkpoint(str(model))
    if method == ROTATE:
        return _rotate(
            checkpoint,
            folder,
            seed or 0,
            unused={"stats": stats, "scheme": scheme, "powers_of_two": powers_of_two or None},
            start=start,
            progress=progress,
        )
    if seed is not None:
        raise MofqError(f"{option('seed')}: is for {option('method', ROTATE)}. Leave it out.")
    if stats is None:
        raise MofqError(
            f"{option('method', method)}: scales follow from what the model computes: give "
            f"{option('stats')}, a folder of `mofq calibrate`."
        )

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


def _rotate(
    checkpoint: Checkpoint,
    folder: Path,
    seed: int,
    *,
    unused: Mapping[str, object],
    start: float,
    progress: Progress | None,
) -> RewriteResult:
    """Write the rotated model; options of other methods are refused."""
    from mofq.decision.rewriting import ROTATE
    from mofq.delivery.rewriting.rotate import plan_rotation, rotated_model, write_rotated

    for name, value in unused.items():
        if value is not None:
            raise MofqError(
                f"{option(name)}: a rotation follows from its seed alone. Leave it out with "
                f"{option('method', ROTATE)}."
            )
    if not 0 <= seed < 2**63:
        raise MofqError(f"{option('seed', seed)}: needed an integer of 0 or more, below 2**63.")
    turning = plan_rotation(checkpoint, seed)
    write_rotated(turning, folder, seed=seed, progress=progress)
    return RewriteResult(
        folder,
        ROTATE,
        (),
        monotonic() - start,
        rotation=rotated_model(turning, seed),
        untied_bytes=turning.untied_bytes,
    )
