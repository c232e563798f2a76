"""The recipes of the frontier that a page offers, each as `mofq search` writes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mofq.decision import Budgets, Frontier, Problem, decide, solve_frontier
from mofq.decision.frontier import sized
from mofq.decision.prediction import error_together
from mofq.decision.problem import FloatArray, IntArray, with_corpus
from mofq.decision.recipe import Recipe
from mofq.decision.request import request_flags
from mofq.explore.drawing import Drawing
from mofq.files.progress import Progress, told

#: As many points as a slider can tell apart, and deciding them takes seconds.
MOST_POINTS = 160


@dataclass(frozen=True, slots=True, eq=False)
class FrontierRecipe:
    """One point of the frontier."""

    recipe: Recipe
    choice_F: IntArray  #: its option of each fusion group, and each cache
    flags: str  #: of `mofq search`, which find it: its own size as the budget


def frontier_recipes(
    drawing: Drawing, *, most: int = MOST_POINTS, progress: Progress | None = None
) -> list[FrontierRecipe]:
    """Recipes from the smallest to the best, decided as ``mofq search --ties off`` does.

    Args:
        drawing: Its request says what may be chosen; the rule for ties does not count, and of
            the budgets that on the cache alone.
        most: Keep at most so many points; see `spaced_points`.
        progress: Called after each point with ``"frontier"``, points done, and all of them.

    Returns:
        Recipes in the order of their size, each different from the one before.
    """
    problem, others = drawing.problem, drawing.other_budgets
    frontier = solve_frontier(problem, others)
    found: list[FrontierRecipe] = []
    points = spaced_points(frontier, most)
    for k in told(points, progress, "frontier", total=len(points)):
        budgets, flags = _budget(problem, others, int(frontier.bytes_K[k]))
        request = replace(drawing.request, budgets=budgets, ties=False)
        recipe = decide(drawing.table, request, problem=problem).recipe
        choice_F = problem.choice_of(recipe.scheme_of_group)
        if not found or (choice_F != found[-1].choice_F).any():
            flags += f" --ties off{request_flags(drawing.request)}"
            found.append(FrontierRecipe(recipe, choice_F, flags))
    return found


def _budget(problem: Problem, others: Budgets, size: int) -> tuple[Budgets, str]:
    """A size on the frontier's axis as a budget, and as `mofq search` takes it."""
    if problem.kv_tokens:
        budgets = sized(problem, others, size)
        return budgets, f"--max-size {budgets.max_bytes}"
    # The digits of repr are enough to give the very same number back.
    max_bits = 8 * size / problem.weights
    return replace(others, max_bits=max_bits), f"--max-bits {max_bits!r}"


def spaced_points(frontier: Frontier, most: int) -> IntArray:
    """Indices of at most so many points, both ends among them.

    Half of them are evenly spaced along the frontier as it is drawn, with the logarithm of
    the error, so that no part of it is coarse. The other half are even in the steps of the
    frontier, which are many where there is most to decide.
    """
    count = len(frontier.bytes_K)
    if count <= most:
        return np.arange(count)
    error_K = np.maximum(frontier.error_K, frontier.error_K[frontier.error_K > 0].min())
    steps = np.hypot(_steps(frontier.bytes_K.astype(np.float64)), _steps(np.log(error_K)))
    along_K = np.concatenate([[0.0], np.cumsum(steps)])
    wanted = np.linspace(0, along_K[-1], most // 2)
    drawn = np.abs(along_K[None, :] - wanted[:, None]).argmin(axis=1)
    stepped = np.linspace(0, count - 1, most // 2).round().astype(np.int64)
    return np.union1d(drawn, stepped)


def _steps(values_K: FloatArray) -> FloatArray:
    """Between neighbours, as shares of the whole range."""
    spread = float(np.ptp(values_K))
    return np.asarray(np.diff(values_K) / (spread or 1.0))


def best_for_corpus(
    problem: Problem, budgets: Budgets, corpus: int, *, choices: Sequence[IntArray]
) -> list[IntArray]:
    """What could be chosen instead of each choice if only one corpus counted.

    Args:
        problem: Of several corpora.
        budgets: Of all of them, ``max_kv_bits`` alone.
        corpus: The index of the one that counts.
        choices: An option of each fusion group, [fusion groups].

    Returns:
        For each choice the last point of the corpus's own frontier that is no larger; the
        choice itself where that one, which lies between two points, is better.
    """
    alone = with_corpus(problem, corpus)
    frontier = solve_frontier(alone, budgets)
    best = []
    for choice_F in choices:
        k = frontier.at(problem.axis_of(choice_F))
        is_better = k is not None and frontier.error_K[k] < error_together(alone, choice_F)
        best.append(frontier.choice_KF[k] if is_better else choice_F)
    return best
