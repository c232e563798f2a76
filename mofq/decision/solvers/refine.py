"""A recipe refined on the measured truth: small moves tried one by one, the better kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mofq.decision.solvers.budgets import Budgets, budget_rows, offered
from mofq.decision.solvers.exact import Solution, solve_exact
from mofq.decision.solvers.prediction import Estimate, paired_loss
from mofq.decision.solvers.problem import KL_UNIT, IntArray, Problem, standard_error
from mofq.decision.solvers.swaps import promising_swaps
from mofq.decision.solvers.ties import RECIPE_STDERRS, TIE_STDERRS
from mofq.exceptions import MofqError

#: From fusion group -> scheme to the KL of one window after another [nats per token].
Measure = Callable[[Mapping[str, str]], Iterator[float]]
#: Called with recipes measured, and all that may be.
Progress = Callable[[int, int], None]

#: A uniform scheme predicted so many times worse than the recipe is not measured.
_HOPELESS = 1.5
#: After so many windows a recipe that is worse by so many standard errors is given up.
_LEAST_WINDOWS, _GIVE_UP_STDERRS = 4, 3.0
#: Swaps among which those of different layers are found.
_SWAPS = 5000


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A recipe and its measured KL."""

    choice_F: IntArray
    windows: tuple[float, ...]  #: [nats per token]; fewer than all where it was given up

    @property
    def kl(self) -> Estimate:
        """Mean over windows."""
        return estimate(self.windows)


@dataclass(frozen=True, slots=True, eq=False)
class Swap:
    """One or two fusion groups with another scheme, measured."""

    changes: dict[str, tuple[str, str]]  #: fusion group -> scheme before and after
    predicted: Estimate  #: loss, in the problem's unit
    measured: Estimate  #: loss against the best recipe until then, window by window
    windows: int  #: that it was measured on
    accepted: bool


@dataclass(frozen=True, slots=True, eq=False)
class Refined:
    """What measuring made of a recipe."""

    best: Measured  #: what is returned
    start: Measured
    swaps: tuple[Swap, ...]
    uniforms: dict[str, Measured]  #: schemes within the budgets
    uniform: str | None  #: the uniform scheme that is as good or better, and is `best` then


def refine(
    problem: Problem,
    budgets: Budgets,
    choice_F: IntArray,
    *,
    measure: Measure,
    swaps: int,
    ties: bool = True,
    progress: Progress | None = None,
) -> Refined:
    """Measure a recipe, uniform ones, and its most promising swaps; keep the best.

    A swap is accepted where its measured loss, paired window by window, is below zero by
    more than two standard errors; the next swaps start from there. A uniform scheme
    within the budgets is returned instead where the result is not better than it by more
    than one standard error.

    Args:
        problem: What may be chosen.
        budgets: That the choice keeps, and all that is measured will. Where size was
            minimised (``max_kl`` alone) no recipe may be larger than the choice.
        choice_F: One option of each group, of a solver.
        measure: The objective.
        swaps: How many to measure.
        ties: Whether a uniform scheme within noise is preferred; else only a better one.
        progress: Called after each recipe.

    Returns:
        The best with all that was measured on the way.

    Raises:
        MofqError: The objective has one window only, which has no error bar.
    """
    budgets = fixed_budgets(problem, budgets, choice_F)
    candidates = uniform_candidates(problem, budgets, choice_F)
    total, done = 1 + len(candidates) + swaps, 0

    def run(choice: IntArray, rival: Measured | None) -> Measured:
        nonlocal done
        windows = measure_against(measure(problem.schemes_of(choice)), rival)
        done += 1
        if progress is not None:
            progress(done, total)
        return Measured(choice, windows)

    start = run(choice_F, None)
    require_windows(start.windows)
    uniforms = {name: run(choice, start) for name, choice in candidates.items()}
    seen = {one.choice_F.tobytes() for one in (start, *uniforms.values())}
    best, tried = _try_swaps(problem, budgets, start, run=run, count=swaps, seen=seen)
    uniform = preferred_uniform(best, uniforms, ties=ties)
    if uniform is not None:
        best = uniforms[uniform]
    return Refined(best, start, swaps=tuple(tried), uniforms=uniforms, uniform=uniform)


def fixed_budgets(problem: Problem, budgets: Budgets, choice_F: IntArray) -> Budgets:
    """Budgets without ``max_kl``: nothing larger than the choice where size was minimised."""
    if budgets.minimises_bytes:
        most = problem.size_of(choice_F) + problem.other_bytes
        return replace(budgets, max_kl=None, max_bytes=most)
    return replace(budgets, max_kl=None)


def uniform_candidates(
    problem: Problem, budgets: Budgets, choice_F: IntArray
) -> dict[str, IntArray]:
    """Uniform schemes within the budgets that may be as good as a choice, best first.

    Returns:
        Scheme -> one option of each group; a group with a single option keeps that. In nats,
        those whose error is predicted to be half as much again as the choice's are left out,
        but for the best.
    """
    rows, allowed_P = budget_rows(problem, budgets), offered(problem, budgets)
    found = {}
    for name in dict.fromkeys(problem.schemes):
        uniform_F = _uniform(problem, name, choice_F)
        if (
            uniform_F is not None
            and (uniform_F != choice_F).any()
            and allowed_P[uniform_F].all()
            and all(row.holds(uniform_F) for row in rows)
        ):
            found[name] = uniform_F
    ranked = dict(sorted(found.items(), key=lambda item: problem.error_of(item[1])))
    if problem.unit != KL_UNIT:
        return ranked
    limit = _HOPELESS * problem.error_of(choice_F)
    return {
        name: uniform_F
        for n, (name, uniform_F) in enumerate(ranked.items())
        if n == 0 or problem.error_of(uniform_F) <= limit
    }


def _uniform(problem: Problem, scheme: str, choice_F: IntArray) -> IntArray | None:
    """One scheme for every layer; the KV cache as a choice has it."""
    choice = []
    for group in range(len(problem.groups)):
        options = problem.options_of(group)
        if problem.groups[group].cached:
            choice.append(int(choice_F[group]))
            continue
        same = [p for p in options if problem.schemes[p] == scheme]
        if not same and len(options) > 1:
            return None
        choice.append(same[0] if same else options[0])
    return np.array(choice, dtype=np.int64)


def _try_swaps(
    problem: Problem,
    budgets: Budgets,
    start: Measured,
    *,
    run: Callable[[IntArray, Measured | None], Measured],
    count: int,
    seen: set[bytes],
) -> tuple[Measured, list[Swap]]:
    best, swaps = start, list[Swap]()
    solution = replace(solve_exact(problem, budgets), choice_F=start.choice_F)
    ranked = _ranked(problem, budgets, solution)
    while len(swaps) < count:
        swapped_F = next((one for one in ranked if one.tobytes() not in seen), None)
        if swapped_F is None:
            break
        seen.add(swapped_F.tobytes())
        other = run(swapped_F, best)
        loss = paired(best.windows, other.windows)
        accepted = len(other.windows) == len(best.windows) and is_less(loss, TIE_STDERRS)
        swaps.append(
            Swap(
                _changes(problem, best.choice_F, swapped_F),
                _predicted(problem, best.choice_F, swapped_F),
                measured=loss,
                windows=len(other.windows),
                accepted=accepted,
            )
        )
        if accepted:
            best = other
            ranked = _ranked(problem, budgets, replace(solution, choice_F=swapped_F))
    return best, swaps


def _ranked(problem: Problem, budgets: Budgets, solution: Solution) -> list[IntArray]:
    """Promising swaps; those that share an option with a more promising one come last.

    Otherwise one large change beside many partners of no consequence takes all places.
    """
    first, later = list[IntArray](), list[IntArray]()
    used: set[int] = set()
    for swapped_F in promising_swaps(problem, budgets, solution, _SWAPS):
        options = set(swapped_F[swapped_F != solution.choice_F].tolist())
        (later if used & options else first).append(swapped_F)
        used |= options
    return first + later


def _changes(problem: Problem, choice_F: IntArray, other_F: IntArray) -> dict[str, tuple[str, str]]:
    before, after = problem.schemes_of(choice_F), problem.schemes_of(other_F)
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def _predicted(problem: Problem, choice_F: IntArray, other_F: IntArray) -> Estimate:
    if problem.sample_errors is not None:
        return paired_loss(problem, choice_F, other_F)
    return Estimate(problem.error_of(other_F) - problem.error_of(choice_F), stderr=None)


def preferred_uniform(
    best: Measured, uniforms: Mapping[str, Measured], *, ties: bool
) -> str | None:
    """The best uniform scheme that a recipe does not beat; None: it beats them all.

    Args:
        best: The recipe.
        uniforms: Scheme -> its measurement; one that was given up is beaten.
        ties: Whether within one standard error counts as not beaten.
    """
    ranked = sorted(
        (one.kl.value, name)
        for name, one in uniforms.items()
        if len(one.windows) == len(best.windows)
    )
    for _, name in ranked[:1]:
        loss = paired(best.windows, uniforms[name].windows)
        noise = RECIPE_STDERRS * (loss.stderr or 0.0) if ties else 0.0
        if loss.value <= noise:
            return name
    return None


def measure_against(windows: Iterator[float], rival: Measured | None) -> tuple[float, ...]:
    """Take windows until all are there, or the recipe is clearly worse than a rival."""
    taken: list[float] = []
    for value in windows:
        taken.append(value)
        if rival is not None and len(taken) >= _LEAST_WINDOWS:
            loss = paired(rival.windows, taken)
            if loss.value > _GIVE_UP_STDERRS * (loss.stderr or 0.0):
                break
    return tuple(taken)


def require_windows(windows: Sequence[float]) -> None:
    """Refuse an objective without error bars.

    Raises:
        MofqError: There are fewer than two windows.
    """
    if len(windows) < 2:
        raise MofqError(
            "a measured search compares recipes window by window and needs at least 2 windows, "
            f"found {len(windows)}. Give more --tokens, or a shorter --sequence-length."
        )


def paired(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """By how much a second recipe exceeds a first on the windows that both have."""
    return estimate([b - a for a, b in zip(first, second, strict=False)])


def is_less(loss: Estimate, stderrs: float) -> bool:
    """Whether a difference is below zero by more than its noise."""
    return loss.stderr is not None and loss.value < -stderrs * loss.stderr


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error."""
    stderr = float(standard_error(np.array(values)))
    mean = math.fsum(values) / len(values)
    return Estimate(mean, stderr if math.isfinite(stderr) else None)
