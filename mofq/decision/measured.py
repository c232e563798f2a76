"""From a table, budgets and the model itself to a recipe: what measuring adds to `decide`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mofq.decision.choice import Decision, decide
from mofq.decision.recipe import Recipe
from mofq.decision.request import Request, request_problem
from mofq.decision.result import Figures, predicted_figures, recipe_from_table, size_figures
from mofq.decision.solvers import KL_UNIT, Estimate, Problem, predict, usage
from mofq.decision.solvers.refine import Measure, Measured, Progress, Refined, paired, refine
from mofq.decision.timing import request_budgets, time_figures
from mofq.evidence.table import Table

#: From a recipe to the KL of one window after another [nats per token].
Evaluate = Callable[[Recipe], Iterator[float]]


@dataclass(frozen=True, slots=True)
class MeasuredDecision:
    """A decision and the measurements that it rests on."""

    decision: Decision
    kl: Estimate  #: measured [nats per token]
    start_kl: Estimate  #: of the solver's recipe, before anything was changed
    refined: Refined


def decide_refined(
    table: Table,
    request: Request,
    *,
    evaluate: Evaluate,
    swaps: int,
    text_sha256: str,
    progress: Progress | None = None,
) -> MeasuredDecision:
    """Decide, then measure the recipe, uniform ones and promising swaps, and keep the best.

    Args:
        table: From `mofq measure`.
        request: Budgets and how to meet them.
        evaluate: The objective, of the table's model.
        swaps: How many to measure.
        text_sha256: Of the objective's text, for the recipe.
        progress: Called with recipes measured, and all that may be.

    Returns:
        The decision; where a uniform scheme is as good, that one, and a note says so.

    Raises:
        MofqError: As `decide`, and as the objective.
    """
    decision = decide(table, request)
    problem = request_problem(table, request)
    refined = refine(
        problem,
        request_budgets(table, problem, request),
        recipe_choice(problem, decision.recipe),
        measure=measured_by(table, evaluate),
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
    decision = replace(decision, notes=(*decision.notes, *_notes(request, refined)))
    return MeasuredDecision(decision, refined.best.kl, start_kl=refined.start.kl, refined=refined)


def measured_by(table: Table, evaluate: Evaluate) -> Measure:
    """The objective of the solvers, which know schemes of fusion groups, and not recipes."""

    def measure(schemes: Mapping[str, str]) -> Iterator[float]:
        return evaluate(recipe_from_table(table, schemes, made_by={}, budget={}, result={}))

    return measure


def recipe_choice(problem: Problem, recipe: Recipe) -> np.ndarray:
    """One option of each group, as a recipe has it."""
    return problem.choice_of(recipe_schemes(problem, recipe))


def recipe_schemes(problem: Problem, recipe: Recipe) -> dict[str, str]:
    """Group or cache -> scheme; a cache that a recipe does not speak of stays as it is."""
    schemes = {group.name: "bf16" for group in problem.groups if group.cached}
    schemes |= {group.name: group.scheme for group in recipe.groups}
    return schemes | {cache.name: cache.scheme for cache in recipe.kv_cache}


def decide_again(
    table: Table, request: Request, decision: Decision, choice_F: np.ndarray
) -> Decision:
    """The decision with another choice, its sizes, predictions and time anew."""
    problem = request_problem(table, request)
    before = decision.recipe
    if (choice_F == recipe_choice(problem, before)).all():
        return decision
    result: Figures = size_figures(problem, choice_F) | {"error": problem.error_of(choice_F)}
    if problem.unit == KL_UNIT:
        result |= predicted_figures(predict(problem, choice_F))
    result |= {key: value for key, value in before.result.items() if key.startswith("uniform_")}
    schemes = problem.schemes_of(choice_F)
    result |= time_figures(table, schemes, request)
    again = recipe_from_table(table, schemes, made_by={}, budget={}, result={})
    recipe = replace(before, groups=again.groups, kv_cache=again.kv_cache, result=result)
    return replace(decision, recipe=recipe, finer_layers=usage(problem, choice_F).finer_layers)


def with_measured(
    decision: Decision, measured: Measured, *, text_sha256: str, trials: int
) -> Decision:
    """The decision with what was measured of its recipe."""
    kl = measured.kl
    recipe = decision.recipe
    result = dict(recipe.result) | {"kl_measured": max(0.0, kl.value)}
    if kl.stderr is not None:
        result["kl_measured_stderr"] = kl.stderr
    made_by = dict(recipe.made_by) | {"text_sha256": text_sha256, "trials": trials}
    return replace(decision, recipe=replace(recipe, made_by=made_by, result=result))


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
            f"smaller --max-kl."
        )
    return notes


def uniform_note(scheme: str, uniform: Measured) -> str:
    """That a uniform scheme took the place of a mixture."""
    return (
        f"{scheme} for every layer is within the budgets and measured to be as good "
        f"({shown(uniform.kl)} nats per token): the recipe is uniform."
    )


def shown(estimate: Estimate, *, signed: bool = False) -> str:
    """``0.0412 ± 0.0031``."""
    value = f"{estimate.value:+.3g}" if signed else f"{estimate.value:.3g}"
    return value if estimate.stderr is None else f"{value} ± {estimate.stderr:.1g}"
