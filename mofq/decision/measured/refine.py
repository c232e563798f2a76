"""A recipe refined on the measured truth: small moves tried one by one, the better kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from mofq.decision.budgets import Budgets
from mofq.decision.decision import Decision, decide
from mofq.decision.exact import Solution, solve_exact
from mofq.decision.make_recipe import recipe_from_table
from mofq.decision.measured.measurement import (
    Evaluate,
    Expect,
    Measure,
    Measured,
    decide_again,
    fixed_budgets,
    is_less,
    measure_against,
    measured_by,
    paired,
    preferred_uniform,
    require_windows,
    shown,
    uniform_candidates,
    uniform_note,
    with_measured,
)
from mofq.decision.measured.swaps import promising_swaps
from mofq.decision.problem import IntArray, Problem
from mofq.decision.request import Request
from mofq.evidence.table import Table
from mofq.files.progress import Progress, Steps

#: Swaps among which those of different layers are found.
_SWAPS = 5000


@dataclass(frozen=True, slots=True, eq=False)
class Swap:
    """One or two fusion groups with another scheme, measured."""

    changes: dict[str, tuple[str, str]]  #: fusion group -> scheme before and after
    accepted: bool


@dataclass(frozen=True, slots=True, eq=False)
class Refined:
    """What measuring made of a recipe."""

    best: Measured  #: what is returned
    start: Measured
    swaps: tuple[Swap, ...]
    uniforms: dict[str, Measured]  #: schemes within the budgets
    uniform: str | None  #: the uniform scheme that is as good or better, and is `best` then


def decide_refined(
    table: Table,
    request: Request,
    *,
    evaluate: Evaluate,
    expect: Expect | None = None,
    swaps: int,
    text_sha256: str,
    progress: Progress | None = None,
) -> Decision:
    """Decide, then measure the recipe, uniform ones and promising swaps, and keep the best.

    Args:
        table: From `mofq measure`.
        request: Budgets and how to meet them.
        evaluate: The objective, of the table's model.
        expect: Is told what is probably evaluated next: as long as no swap is accepted, the
            order of them is known.
        swaps: How many to measure.
        text_sha256: Of the objective's text, for the recipe.
        progress: Called with ``"refine"``, recipes measured, and all that may be.

    Returns:
        The decision; where a uniform scheme is as good, that one, and a note says so.

    Raises:
        MofqError: As `decide`, and as the objective.
    """
    decision = decide(table, request)
    problem = decision.problem

    def expect_choices(choices: Iterable[IntArray]) -> None:
        if expect is not None:
            schemes = (problem.schemes_of(choice_F) for choice_F in choices)
            expect(recipe_from_table(table, one, made_by={}, budget={}) for one in schemes)

    refined = refine(
        problem,
        decision.budgets,
        decision.choice_F,
        measure=measured_by(table, evaluate),
        expect=expect_choices,
        swaps=swaps,
        ties=request.ties,
        progress=progress,
    )
    decision = with_measured(
        decide_again(table, request, decision, refined.best.choice_F),
        refined.best,
        text_sha256=text_sha256,
        trials=1 + len(refined.uniforms) + len(refined.swaps),
    )
    return replace(decision, notes=(*decision.notes, *_notes(request, refined)))


def refine(
    problem: Problem,
    budgets: Budgets,
    choice_F: IntArray,
    *,
    measure: Measure,
    expect: Callable[[Iterable[IntArray]], None] = lambda _: None,
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
        expect: Is told choices that are probably measured next, the next first.
        swaps: How many to measure.
        ties: Whether a uniform scheme within noise is preferred; else only a better one.
        progress: Called after each recipe, as `decide_refined` says.

    Returns:
        The best with all that was measured on the way.

    Raises:
        MofqError: The objective has one window only, which has no error bar.
    """
    budgets = fixed_budgets(problem, budgets, choice_F)
    candidates = uniform_candidates(problem, budgets, choice_F)
    step = Steps(progress, "refine", 1 + len(candidates) + swaps)

    def run(choice: IntArray, rival: Measured | None) -> Measured:
        windows = measure_against(measure(problem.schemes_of(choice)), rival)
        step()
        return Measured(choice, windows)

    expect([choice_F, *candidates.values()])
    start = run(choice_F, None)
    require_windows(start.windows)
    uniforms = {name: run(choice, start) for name, choice in candidates.items()}
    seen = {one.choice_F.tobytes() for one in (start, *uniforms.values())}
    best, tried = _try_swaps(
        problem, budgets, start, run=run, expect=expect, count=swaps, seen=seen
    )
    uniform = preferred_uniform(best, uniforms, ties=ties)
    if uniform is not None:
        best = uniforms[uniform]
    return Refined(best, start, swaps=tuple(tried), uniforms=uniforms, uniform=uniform)


def _try_swaps(
    problem: Problem,
    budgets: Budgets,
    start: Measured,
    *,
    run: Callable[[IntArray, Measured | None], Measured],
    expect: Callable[[Iterable[IntArray]], None],
    count: int,
    seen: set[bytes],
) -> tuple[Measured, list[Swap]]:
    best, swaps = start, list[Swap]()
    solution = replace(solve_exact(problem, budgets), choice_F=start.choice_F)
    ranked = _ranked(problem, budgets, solution)
    while len(swaps) < count:
        unseen = [one for one in ranked if one.tobytes() not in seen][: count - len(swaps)]
        if not unseen:
            break
        swapped_F = unseen[0]
        expect(unseen)
        seen.add(swapped_F.tobytes())
        other = run(swapped_F, best)
        loss = paired(best.windows, other.windows)
        accepted = len(other.windows) == len(best.windows) and is_less(loss)
        swaps.append(Swap(_changes(problem, best.choice_F, swapped_F), accepted))
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


def _notes(request: Request, refined: Refined) -> list[str]:
    notes = []
    accepted = sum(swap.accepted for swap in refined.swaps)
    notes.append(
        f"{len(refined.swaps)} swaps measured, {accepted} accepted: "
        f"{shown(refined.start.kl)} became {shown(refined.best.kl)} nats per token."
    )
    if refined.uniform is not None:
        notes.append(uniform_note(refined.uniform, refined.uniforms[refined.uniform]))
    for name, one in refined.uniforms.items():
        if name != refined.uniform:
            loss = paired(refined.best.windows, one.windows)
            notes.append(f"{name} for every layer measures {shown(loss, signed=True)} against it.")
    limit = request.budgets.max_kl
    if limit is not None and refined.best.kl.value > limit:
        notes.append(
            f"measured, it exceeds the budget of {limit:.4g} nats per token; search again with a "
            f"smaller one."
        )
    return notes
