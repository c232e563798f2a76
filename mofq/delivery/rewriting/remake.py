"""Makes the rewritten model that a recipe is for again, from the original and its statistics.

From one recipe file, the original and its statistics an exported folder is made again, bit for
bit: a rotation follows from its seed; scales that moved after it follow from the statistics, by the
method and strengths that the recipe notes of each site. The hash of the weights shows that they
are those that were measured.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mofq.decision.recipe import Recipe
from mofq.decision.rewriting import Rewriting, RotatedModel, SiteRewriting
from mofq.delivery.rewriting.choose_scales import Choice, scales_of
from mofq.delivery.rewriting.moved_stats import (
    check_no_channel_lost,
    write_moved_stats,
    write_rotated_stats,
)
from mofq.delivery.rewriting.rotate import plan_rotation, rotated_model, write_rotated
from mofq.delivery.rewriting.scales import METHODS, Strength
from mofq.delivery.rewriting.sites import find_sites
from mofq.delivery.rewriting.write import write_rewritten
from mofq.evidence.calibration.stats import (
    Stats,
    check_same_model,
    earlier_stats,
    read_stats,
    verify_sequences,
)
from mofq.exceptions import RecipeError, RewriteError, StatsError, nearest_name, option
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.layers import find_layers

#: Of the method in ``rewrite.json`` where each site has its own.
BY_SITE = "by site"


@dataclass(frozen=True, slots=True)
class Base:
    """The model that a recipe is applied to, and the statistics that fitted schemes rest on."""

    checkpoint: Checkpoint
    stats: str | Path | None


def rewriting_of(
    checkpoint: Checkpoint,
    stats: Stats,
    choices: Sequence[Choice],
    *,
    rotation: RotatedModel | None = None,
) -> Rewriting:
    """What a recipe notes of choices that were made for a model, or for it after a rotation.

    Args:
        checkpoint: The original.
        stats: Of the original.
        choices: What moved.
        rotation: Of the original, before anything moved.
    """
    sites = {
        one.site.group: SiteRewriting(one.method, one.strength.alpha, one.strength.beta)
        for one in choices
        if one.strength is not None
    }
    return Rewriting(
        model=checkpoint.name,
        index_sha256=checkpoint.index_sha256,
        weights_sha256=hash_weights(checkpoint),
        stats_sha256=stats.sha256,
        rotation=rotation,
        sites=sites,
        inputs="all" if sites and stats.plan.inputs else "kept",
    )


@contextmanager
def base_of(recipe: Recipe, checkpoint: Checkpoint, stats: str | Path | None) -> Iterator[Base]:
    """What a recipe is applied to: the checkpoint, or the one that it rewrites it to.

    Args:
        recipe: Any.
        checkpoint: The original; or the rewritten model that the recipe is for, with its stats.
        stats: The original's, where the recipe rewrites it by them or has fitted schemes.

    Yields:
        The base. One that was rewritten lies in a temporary folder.

    Raises:
        RecipeError: The recipe rewrites another model, or what comes out is not its model.
        StatsError: There are no statistics where it needs them, or others.
        RewriteError: Its sites are not those of the model, or the disk has too little space.
    """
    rewriting = recipe.rewriting
    if rewriting is None or _is_of(recipe, checkpoint):
        yield Base(checkpoint, stats)
        return
    opened = _checked_stats(recipe, rewriting, checkpoint, stats)
    with TemporaryDirectory(prefix="mofq-rewritten-") as work:
        _check_disk(Path(work), rewriting, checkpoint, opened)
        folders = base_folders(Path(work), recipe.model_name)
        base = make_base(rewriting, checkpoint, opened, folders)
        if recipe.weights_sha256 is not None and not _is_of(recipe, base.checkpoint):
            raise RecipeError(
                f"{recipe.title}: the rewriting gives other weights here than it gave where it was "
                f"measured. Take the processor and the version of mofq that measured it "
                f"({recipe.made_by.get('mofq', 'not noted')}), or run again."
            )
        yield base


def _check_disk(
    work: Path, rewriting: Rewriting, checkpoint: Checkpoint, stats: Stats | None
) -> None:
    """Refuse to begin what the disk cannot hold: the model and its statistics once more.

    Where scales move in a rotated model, both are there twice.
    """
    needed = sum(info.kept_bytes for info in checkpoint.tensors.values())
    if stats is not None:
        files = (path for one in stats.plan.corpora for path in stats.files(one.name))
        needed += sum(path.stat().st_size for path in files)
    needed *= 2 if rewriting.rotation is not None and rewriting.sites else 1
    free = shutil.disk_usage(work).free
    if needed > free:
        raise RewriteError(
            f"{work.parent}: the rewritten model needs about {needed:,} bytes here while it is "
            f"used, found {free:,} free. Set TMPDIR to a folder with more space."
        )


def _is_of(recipe: Recipe, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has the weights that a recipe names; of one without a hash: no."""
    named = recipe.weights_sha256
    return named is not None and hash_weights(checkpoint).startswith(named)


def base_folders(work: Path, name: str) -> tuple[Path, Path]:
    """Where a rewritten model and its statistics lie in a folder."""
    return work / name, work / f"{name}.stats"


def make_base(
    rewriting: Rewriting, checkpoint: Checkpoint, stats: Stats | None, folders: tuple[Path, Path]
) -> Base:
    """Write a rewritten model and its statistics.

    Args:
        rewriting: Of the model.
        checkpoint: The original.
        stats: Of it; None where no scales move, and then none are made.
        folders: Of the model, and of the statistics; those that are there are complete, and kept.

    Raises:
        RewriteError: As `write_rewritten` and `plan_rotation`; or a site is none of the model's.
    """
    if rewriting.rotation is None:
        return _move(rewriting, checkpoint, stats, folders)
    if not rewriting.sites:
        return _rotate(rewriting.rotation, checkpoint, stats, folders)
    model, moved = folders
    if not (model.exists() and moved.exists()):
        model.parent.mkdir(parents=True, exist_ok=True)
        # Where there is room for the other: the folder for temporary files may have none.
        with TemporaryDirectory(prefix="mofq-rotated-", dir=model.parent) as work:
            between = base_folders(Path(work), checkpoint.name)
            rotated = _rotate(rewriting.rotation, checkpoint, stats, between)
            assert rotated.stats is not None
            _move(rewriting, rotated.checkpoint, read_stats(rotated.stats), folders)
    return Base(open_checkpoint(str(model)), moved)


def _move(
    rewriting: Rewriting, checkpoint: Checkpoint, stats: Stats | None, folders: tuple[Path, Path]
) -> Base:
    model, moved = folders
    assert stats is not None
    if not (model.exists() and moved.exists()):
        choices = _choices(rewriting, checkpoint, stats)
        if not model.exists():
            write_rewritten(checkpoint, choices, model, method=BY_SITE, stats=stats)
        if not moved.exists():
            rewritten = open_checkpoint(str(model))
            write_moved_stats(stats, rewritten, choices, moved, inputs=rewriting.inputs == "all")
    return Base(open_checkpoint(str(model)), moved)


def _rotate(
    rotation: RotatedModel, checkpoint: Checkpoint, stats: Stats | None, folders: tuple[Path, Path]
) -> Base:
    model, moved = folders
    if not model.exists() or (stats is not None and not moved.exists()):
        turning = plan_rotation(checkpoint, rotation.seed)
        found = rotated_model(turning, rotation.seed)
        if found != rotation:
            raise RewriteError(
                f"rewriting: rotation: {checkpoint.folder} has {found.hidden} channels and "
                f"{found.head} in a head, and the recipe says {rotation.hidden} and "
                f"{rotation.head}. Give the model that was measured."
            )
        if stats is not None:
            check_no_channel_lost(turning)  # before a model is written that would not be used
        if not model.exists():
            write_rotated(turning, model, seed=rotation.seed)
        if stats is not None and not moved.exists():
            write_rotated_stats(stats, open_checkpoint(str(model)), turning, moved)
    return Base(open_checkpoint(str(model)), None if stats is None else moved)


def _checked_stats(
    recipe: Recipe, rewriting: Rewriting, checkpoint: Checkpoint, stats: str | Path | None
) -> Stats | None:
    """The original's statistics, once they and the model are known to be those.

    None where the recipe needs none: it moves no scales and none were given.
    """
    if rewriting.sites and rewriting.stats_sha256 is None:
        raise RecipeError(
            f"{recipe.title}: rewriting: stats_sha256 is missing, and scales at sites follow from "
            f"statistics. Take the recipe as it was written."
        )
    found = (checkpoint.index_sha256, hash_weights(checkpoint))
    if found != (rewriting.index_sha256, rewriting.weights_sha256):
        raise RecipeError(
            f"{recipe.title}: rewrites {rewriting.model} with weights_sha256 "
            f"{rewriting.weights_sha256[:8]}, and {checkpoint.folder} has {found[1][:8]}. Give "
            f"the model that was measured."
        )
    if stats is None and rewriting.rotation is not None and not rewriting.sites:
        return None
    if stats is None:
        raise StatsError(
            f"{recipe.title}: rewrites the model by scales that follow from statistics. Give the "
            f"folder that was measured with, as {option('stats')}."
        )
    opened = read_stats(stats)
    # Corpora may have been added to the folder since.
    every = (opened, *earlier_stats(opened))
    sha256 = rewriting.stats_sha256 or opened.sha256  # none was noted: no scales follow from it
    known = next((one for one in every if one.sha256 == sha256), None)
    if known is None:
        raise RecipeError(
            f"{stats}: {recipe.title} rewrites by stats_sha256 {sha256[:8]}, and "
            f"this folder has {opened.sha256[:8]}. Give the folder that was measured with."
        )
    check_same_model(opened, checkpoint, weights_sha256=rewriting.weights_sha256)
    verify_sequences(opened)
    return known


def _choices(rewriting: Rewriting, checkpoint: Checkpoint, stats: Stats) -> list[Choice]:
    sites = {site.group: site for site in find_sites(checkpoint, find_layers(checkpoint))}
    choices = []
    for group, one in rewriting.sites.items():
        if group not in sites:
            raise RewriteError(
                f"rewriting: {group}: no scale can move there." + nearest_name(group, sites)
            )
        if one.method not in METHODS:
            raise RewriteError(
                f"rewriting: {group}: unknown method {one.method!r}."
                + nearest_name(one.method, METHODS)
            )
        strength = Strength(one.alpha, one.beta)
        scale_P = scales_of(
            checkpoint,
            sites[group],
            strength,
            stats=stats,
            method=one.method,
        )
        choices.append(Choice(sites[group], "", strength, scale_P, 0.0, 0.0, one.method))
    return choices
