"""Recipes measured on the model itself: window by window, compared in pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mofq.decision.budgets import Budgets, budget_constraints, keeps_all, offered
from mofq.decision.choice import predict_chosen
from mofq.decision.decision import Decision, notes_of_prediction
from mofq.decision.make_recipe import decided_result, recipe_from_table
from mofq.decision.prediction import Estimate, estimate, predict_given
from mofq.decision.problem import KL_UNIT, IntArray, Problem
from mofq.decision.recipe import Recipe
from mofq.decision.request import Request
from mofq.decision.ties import RECIPE_STDERRS, TIE_STDERRS
from mofq.decision.uniform import best_uniform, uniform_choice
from mofq.evidence.table import Table
from mofq.exceptions import MofqError, option

#: From a recipe to the KL of one window after another [nats per token].
Evaluate = Callable[[Recipe], Iterator[float]]
#: Is told which recipes are probably evaluated next.
Expect = Callable[[Iterable[Recipe]], None]
#: From fusion group -> scheme to the same.
Measure = Callable[[Mapping[str, str]], Iterator[float]]

#: A uniform scheme predicted so many times worse than the recipe is not measured.
_HOPELESS = 1.5
#: After so many windows a recipe that is worse by so many standard errors is given up.
_LEAST_WINDOWS, _GIVE_UP_STDERRS = 4, 3.0


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A recipe and its measured KL."""

    choice_F: IntArray
    windows: tuple[float, ...]  #: [nats per token]; fewer than all where it was given up

    @property
    def kl(self) -> Estimate:
        """Mean over windows."""
        return estimate(self.windows)


def measured_by(table: Table, evaluate: Evaluate) -> Measure:
    """The objective as a function of the schemes of fusion groups."""

    def measure(schemes: Mapping[str, str]) -> Iterator[float]:
        return evaluate(recipe_from_table(table, schemes, made_by={}, budget={}))

    return measure


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
            f"found {len(windows)}. Give more {option('tokens')}, or a shorter "
            f"{option('sequence_length')}."
        )


def paired(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """By how much a second recipe exceeds a first on the windows that both have."""
    return estimate([b - a for a, b in zip(first, second, strict=False)])


def is_less(loss: Estimate) -> bool:
    """Whether a difference is below zero by more than its noise."""
    return loss.stderr is not None and loss.value < -TIE_STDERRS * loss.stderr


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
    constraints = budget_constraints(problem, budgets)
    allowed_P = offered(problem, budgets)
    found = {}
    for name in dict.fromkeys(problem.schemes):
        uniform_F = uniform_choice(problem, name, choice_F)
        if (
            uniform_F is not None
            and (uniform_F != choice_F).any()
            and allowed_P[uniform_F].all()
            and keeps_all(constraints, uniform_F)
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


def decide_again(
    table: Table, request: Request, decision: Decision, choice_F: IntArray
) -> Decision:
    """The decision with another choice, its sizes, predictions, notes and time anew."""
    if (choice_F == decision.choice_F).all():
        return decision
    problem, before = decision.problem, decision.recipe
    schemes = problem.schemes_of(choice_F)
    prediction = predict_chosen(problem, decision.budgets, choice_F)
    uniform = best_uniform(problem, choice_F)
    result = decided_result(table, request, problem, choice_F, prediction, uniform=uniform)
    again = recipe_from_table(table, schemes, made_by={}, budget={})
    recipe = replace(before, groups=again.groups, kv_cache=again.kv_cache, result=result)
    return replace(
        decision,
        recipe=recipe,
        choice_F=choice_F,
        uniform=None if uniform is None else predict_given(problem, uniform[1]),
        notes=notes_of_prediction(table, problem, choice_F, prediction=prediction),
    )


def with_measured(
    decision: Decision, measured: Measured, *, text_sha256: str, trials: int
) -> Decision:
    """The decision with what was measured of its recipe."""
    kl = measured.kl
    recipe = decision.recipe
    result = replace(recipe.result, kl_measured=max(0.0, kl.value), kl_measured_stderr=kl.stderr)
    made_by = dict(recipe.made_by) | {"text_sha256": text_sha256, "trials": trials}
    return replace(decision, recipe=replace(recipe, made_by=made_by, result=result))


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
