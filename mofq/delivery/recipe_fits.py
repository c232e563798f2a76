"""Opens the statistics that a recipe's schemes are fitted to, and refuses others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mofq.decision.recipe import Recipe
from mofq.evidence.calibration.stats import (
    Stats,
    earlier_stats,
    passing_stats,
    read_stats,
    verify_sequences,
)
from mofq.evidence.fits import Fits, needs_stats
from mofq.evidence.kept_fits import KeptFits, has_kept_fits
from mofq.exceptions import RecipeError, StatsError
from mofq.model.layers import FusionGroup
from mofq.numbers.numerics import EARLIER_FITTED_CODES, NUMERICS
from mofq.numbers.schemes import Scheme, parse_scheme


@contextmanager
def open_fits(
    recipe: Recipe, stats: str | Path | None, *, index_sha256: str | None = None
) -> Iterator[Fits | None]:
    """Open what a recipe's schemes are fitted to.

    Args:
        recipe: Any.
        stats: The folder from `mofq calibrate`; it may be None, and is not looked at, where
            no scheme is fitted.
        index_sha256: Of the checkpoint that the recipe is applied to.

    Yields:
        For ``fits`` of whatever applies or checks the recipe; None where it needs none.

    Raises:
        StatsError: There is no folder where one is needed, it is of another model, or it
            changed since it was written.
        RecipeError: The recipe rests on other statistics, or on fits as this mofq does not make
            them.
    """
    fitted = next((group for group in recipe.groups if parse_scheme(group.scheme).is_fitted), None)
    if fitted is None:
        yield None
        return
    _check_numerics(recipe, fitted.scheme)
    if stats is None:
        raise needs_stats(fitted.layers[0])
    recorded = _recorded(recipe)
    if has_kept_fits(stats):
        with KeptFits(stats) as kept:
            if not kept.stats.sha256.startswith(recorded or ""):
                raise _is_fitted_to_others(recipe, kept.stats, "these are fits to")
            _check_model(recipe, kept.stats, index_sha256)
            yield kept
        return
    opened = read_stats(stats)
    # Corpora may have been added to the folder since.
    fitted_to = opened if recorded is None else _of_hash(opened, recorded)
    if fitted_to is None:
        raise _is_fitted_to_others(recipe, opened, "this folder has")
    _check_model(recipe, opened, index_sha256)
    verify_sequences(opened)
    with Fits(fitted_to) as fits:
        yield fits


def _of_hash(stats: Stats, sha256: str) -> Stats | None:
    """The folder, or what it was before corpora were added, as a recipe names it.

    Samples that were not stored when the recipe was measured may be stored now.
    """
    if passing_stats(stats.folder, stats.plan).sha256.startswith(sha256):
        return stats
    every = (stats, *earlier_stats(stats))
    return next((one for one in every if one.sha256.startswith(sha256)), None)


def _recorded(recipe: Recipe) -> str | None:
    """The hash of the statistics that a recipe rests on; None where it is written by hand."""
    found = recipe.made_by.get("stats_sha256")
    return None if found is None else str(found)


def _is_fitted_to_others(recipe: Recipe, found: Stats, what: str) -> RecipeError:
    recorded = _recorded(recipe) or "(not noted)"
    return RecipeError(
        f"{found.folder}: {recipe.title} is fitted to stats_sha256 {recorded[:8]}, and {what} "
        f"{found.sha256[:8]}. Its codes would differ from those that were measured; give "
        "what was measured with: the folder of statistics, or the fits beside the table."
    )


def _check_model(recipe: Recipe, found: Stats, index_sha256: str | None) -> None:
    """Refuse what was calibrated on another model than the recipe is applied to."""
    if index_sha256 is not None and found.plan.index_sha256 != index_sha256:
        raise StatsError(
            f"{found.folder}: calibrated on {found.plan.model_name} "
            f"({found.plan.index_sha256[:8]}), but the model is {recipe.model_name} "
            f"({index_sha256[:8]}). Calibrate this model."
        )


def _check_numerics(recipe: Recipe, scheme: str) -> None:
    """Refuse fitted codes that would be computed otherwise than those that were measured."""
    found = recipe.made_by.get("numerics")
    is_by_hand = found is None and "stats_sha256" not in recipe.made_by
    if found not in (NUMERICS, *EARLIER_FITTED_CODES) and not is_by_hand:
        raise RecipeError(
            f"{recipe.title}: made_by: numerics: the codes of {scheme} were "
            f"fitted by numerics {found or '(not noted)'}, and this mofq fits by numerics "
            f"{NUMERICS}: they would be others than those that were measured. Measure and search "
            f"again, or take the mofq that wrote the recipe "
            f"({recipe.made_by.get('mofq', 'not noted')})."
        )


def check_fits(fits: Fits | None, group: FusionGroup, scheme: Scheme) -> None:
    """Refuse a fitted scheme without statistics, before anything is applied.

    Raises:
        StatsError: As said.
    """
    if fits is None and scheme.is_fitted:
        raise needs_stats(group.layers[0].name)
