"""The flow from Python, for notebooks and scripts: what the commands do, with the same checks.

Every function reads finished files and writes new ones, as the command of its name does, and
returns what was written as a typed value. Nothing is printed on stdout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mofq.cli.calibrate import CalibrateOptions, run_calibrate
from mofq.cli.export import export_recipe, recipe_engine
from mofq.cli.measure import Where, run_measure
from mofq.decision import (
    Budgets,
    Frontier,
    Problem,
    Request,
    decide,
    predict,
    request_problem,
    solve_frontier,
    usage,
)
from mofq.decision.recipe import Recipe, load_recipe, write_recipe
from mofq.evidence.table import Table, read_table

if TYPE_CHECKING:
    from mofq.delivery.export.compressed_tensors import Export
    from mofq.delivery.validation import Validation

__all__ = ["calibrate", "curve", "export", "measure", "search", "validate"]


def calibrate(
    model: str | Path,
    corpora: Mapping[str, str],
    output: str | Path,
    *,
    sequences: int | None = None,
    sequence_length: int = 512,
    device: str = "cpu",
) -> Path:
    """Run the model once over some text and keep what scoring needs; `mofq calibrate`.

    Args:
        model: A Hugging Face folder, or a hub id.
        corpora: Name -> file, hub data set or bundled text.
        output: The stats folder. One that is complete already is kept.
        sequences: Of each corpus; None: 32, or as many as a text holds.
        sequence_length: Tokens of each.
        device: Where the arithmetic runs.

    Returns:
        The folder.

    Raises:
        MofqError: An input is not valid; the message says which and what to do.
    """
    run_calibrate(
        CalibrateOptions(
            model=str(model),
            corpora=tuple(f"{name}={source}" for name, source in corpora.items()),
            output=Path(output),
            sequences=sequences,
            sequence_length=sequence_length,
            device=device,
        )
    )
    return Path(output)


def measure(
    model: str | Path,
    space: str | Path,
    output: str | Path,
    *,
    stats: str | Path | None = None,
    engine: str | None = None,
    device: str = "cpu",
) -> Table:
    """Measure every scheme of a search space; `mofq measure`.

    Args:
        model: A Hugging Face folder, or a hub id.
        space: A name of `mofq spaces`, or a file.
        output: The table, ``table.jsonl``; rows that it has already are kept.
        stats: From `calibrate`; None: errors are relative weight errors.
        engine: A serving engine, ``"vllm-hopper"`` or ``"vllm-hopper:tp=4"``.
        device: Where the arithmetic runs.

    Returns:
        The table.

    Raises:
        MofqError: An input is not valid; the message says which and what to do.
    """
    run_measure(
        str(model),
        space=str(space),
        output=Path(output),
        stats=None if stats is None else Path(stats),
        engine=engine,
        where=Where(device),
    )
    return read_table(Path(output))


def search(
    table: Table | str | Path,
    *,
    max_bits: float | None = None,
    max_bytes: int | None = None,
    max_kl: float | None = None,
    engine: str | None = None,
    space: str | None = None,
    unit: str | None = None,
    solver: str = "exact",
    output: str | Path | None = None,
) -> Recipe:
    """Choose one scheme for each fusion group under budgets; `mofq search`. Needs no torch.

    Args:
        table: From `measure`, or its file.
        max_bits: True bits per weight, at most.
        max_bytes: Of all tensors of the checkpoint, at most.
        max_kl: Predicted nats per token plus two standard errors, at most.
        engine: Take only what this engine serves.
        space: Take only schemes of this search space; None: all that were measured.
        unit: Of the errors; None: nats where the table has them.
        solver: ``"exact"`` or ``"greedy"``.
        output: Write the recipe here.

    Returns:
        The recipe.

    Raises:
        MofqError: No recipe meets the budgets, or an input is not valid.
    """
    opened = table if isinstance(table, Table) else read_table(Path(table))
    bits, kl = (None if limit is None else float(limit) for limit in (max_bits, max_kl))
    budgets = Budgets(max_bits=bits, max_bytes=max_bytes, max_kl=kl)
    request = Request(budgets, solver=solver, unit=unit, space=space, engine=engine)
    recipe = decide(opened, request).recipe
    if output is not None:
        write_recipe(recipe, Path(output))
    return recipe


def curve(
    table: Table | str | Path,
    *,
    engine: str | None = None,
    space: str | None = None,
    unit: str | None = None,
) -> Curve:
    """Accuracy against size, every recipe that no other one beats; `mofq frontier`.

    Args:
        table: From `measure`, or its file.
        engine: Take only what this engine serves.
        space: Take only schemes of this search space.
        unit: Of the errors; None: nats where the table has them.

    Returns:
        The points, smallest first.

    Raises:
        MofqError: An input is not valid.
    """
    opened = table if isinstance(table, Table) else read_table(Path(table))
    return accuracy_curve(opened, Request(Budgets(), unit=unit, space=space, engine=engine))


def validate(
    model: str | Path,
    recipe: Recipe | str | Path,
    text: str,
    *,
    tokens: int = 8192,
    sequence_length: int = 512,
    stats: str | Path | None = None,
    device: str = "cpu",
) -> Validation:
    """Prove that a recipe is applied, and measure what it does; `mofq validate`.

    Args:
        model: The original, a folder or a hub id.
        recipe: A recipe, its file, or a compressed-tensors folder.
        text: A file, hub data set or bundled text; not what was calibrated on.
        tokens: How many to use, at most.
        sequence_length: Tokens of a window.
        stats: Needed where schemes are fitted (``@nats``, ``~gptq``).
        device: Where the arithmetic runs.

    Returns:
        KL, perplexity and agreement beside the prediction, and whether it is enforced.

    Raises:
        MofqError: An input is not valid.
    """
    from mofq.delivery.validation import validate as validate_one
    from mofq.evidence.corpora import load_text

    return validate_one(
        str(model),
        recipe,
        load_text(text),
        tokens=tokens,
        sequence_length=sequence_length,
        stats=stats,
        device=device,
    )


def export(
    model: str | Path,
    recipe: Recipe | str | Path,
    output: str | Path,
    *,
    engine: str | None = None,
    stats: str | Path | None = None,
) -> Export:
    """Write a compressed-tensors checkpoint; `mofq export --to compressed-tensors`.

    Args:
        model: The original, a folder or a hub id.
        recipe: A recipe, or its file.
        output: A folder that does not exist yet, or is empty.
        engine: Refuse what it cannot serve; None: the engine that the recipe was searched for.
        stats: Needed where schemes are fitted (``@nats``, ``~gptq``).

    Returns:
        Folder, sizes, and the command that serves it.

    Raises:
        MofqError: A scheme cannot be served, the folder is in the way, or an input is not valid.
    """
    to = "compressed-tensors"
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe))
    return export_recipe(
        str(model),
        loaded,
        to=to,
        output=Path(output),
        engine=engine or recipe_engine(loaded, to),
        stats=None if stats is None else Path(stats),
    )


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A recipe that no other one beats in size and in error at once."""

    bits_per_weight: float  #: true bits, over all fusion groups
    bytes: int  #: of the fusion groups
    checkpoint_bytes: int  #: of all tensors
    error: float  #: predicted, in the unit of the curve
    stderr: float | None  #: where the table has samples
    bound: float  #: no recipe of this size has a smaller error


@dataclass(frozen=True, slots=True)
class Curve:
    """The points from the smallest recipe to the best one."""

    unit: str
    gap: float  #: largest relative distance of an error to its bound
    points: tuple[CurvePoint, ...]


def accuracy_curve(table: Table, request: Request, *, sizes: int | None = None) -> Curve:
    """Every non-dominated recipe.

    Args:
        table: From `mofq measure`.
        request: What may be chosen: unit, engine and space are looked at, and no budget.
        sizes: Solve exactly at this many sizes between the points of the hull too.

    Returns:
        Smallest first.

    Raises:
        EngineError: No engine has that name.
        TableError: The table has no such unit or space, or a group has no scheme left.
    """
    problem = request_problem(table, request)
    frontier = solve_frontier(problem, sizes=sizes)
    points = tuple(_point(problem, frontier, k) for k in range(len(frontier.bytes_K)))
    return Curve(problem.unit, frontier.gap, points)


def _point(problem: Problem, frontier: Frontier, k: int) -> CurvePoint:
    choice_F = frontier.choice_KF[k]
    used = usage(problem, choice_F)
    stderr = None
    if problem.sample_errors is not None:
        stderr = predict(problem, choice_F).stderr
    return CurvePoint(
        bits_per_weight=used.bits_per_weight,
        bytes=used.bytes,
        checkpoint_bytes=used.checkpoint_bytes,
        error=float(frontier.error_K[k]),
        stderr=stderr,
        bound=float(frontier.bound_K[k]),
    )
