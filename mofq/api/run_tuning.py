"""The norms of the recipe that a run found, tuned where that helps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mofq.api.calibrate import chosen_execution
from mofq.api.options import Tell, Where
from mofq.api.run_evidence import Subject
from mofq.api.run_request import Checked
from mofq.api.tune import STEPS
from mofq.exceptions import MofqError, Remark, option
from mofq.files.progress import Progress

if TYPE_CHECKING:
    from mofq.decision.recipe import Recipe


def tune_where_it_helps(
    run: Checked, recipe: Recipe, subject: Subject, *, progress: Progress | None, tell: Tell
) -> Recipe:
    """A recipe with tuned norms, where they help on what they were not tuned on.

    Args:
        run: That found the recipe.
        recipe: Not tuned.
        subject: The model that it is applied to.
        progress: As of `run`.
        tell: As of `run`.

    Returns:
        The recipe as it was where norms cannot be tuned here, or nothing is gained; that is told.
    """
    from mofq.delivery.rewriting.remake import Base
    from mofq.delivery.tuning.tune_recipe import tune_recipe
    from mofq.model.checkpoint.headers import open_checkpoint

    if set(recipe.schemes.values()) == {"bf16"}:
        return recipe
    if reason := _refusal(run):
        tell(Remark(f"Norms are not tuned: {reason}."))
        return recipe
    try:
        found = tune_recipe(
            run.checkpoint,
            recipe,
            run.windows,
            base=Base(open_checkpoint(subject.model), subject.stats),
            plan=run.plan,
            steps=STEPS,
            device=run.request.device,
            progress=progress,
        )
    except MofqError as error:  # what is wrong with the recipe itself, its validation says
        tell(Remark(f"Norms are not tuned: {error.template}"))
        return recipe
    if not found.helps:
        tell(f"Norms are not tuned: tuned ones have KL {found.tuning.gain}.")
        return recipe
    return found.recipe


def _refusal(run: Checked) -> str | None:
    """Why norms cannot be tuned for a request; None where they can."""
    from mofq.delivery.backends import RECIPE_EXPORTERS
    from mofq.engines import find_engine

    asked = run.request
    if asked.request.budgets.max_kl is not None:
        return "a budget in nats is proved of the recipe as it was found"
    if asked.engine is not None and (reads := find_engine(asked.engine).reads) in RECIPE_EXPORTERS:
        return f"a file for {reads} is of the model as it is"
    if asked.device_map is not None:
        return f"{option('device_map')} spreads the model"
    execution = chosen_execution(
        asked.execution,
        run.checkpoint,
        run.layers,
        run.plan,
        where=Where(device=asked.device),
        device_map=None,
    )
    if execution.is_streamed or asked.no_stats:
        return "the model is run layer by layer"
    return None
