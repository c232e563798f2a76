"""From a table and a request to a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mofq.decision.budgets import Budgets, budget_constraints, keeps_all, offered
from mofq.decision.choice import Chosen, choose
from mofq.decision.expert_visits import rare_experts
from mofq.decision.from_table import request_problem
from mofq.decision.make_recipe import (
    budget_figures,
    decided_result,
    made_by_request,
    recipe_from_table,
)
from mofq.decision.model_error import model_error
from mofq.decision.offered_schemes import asked_constraints
from mofq.decision.prediction import (
    Estimate,
    is_crossfitted,
    predict,
    predict_given,
    sample_sums,
)
from mofq.decision.problem import KL_UNIT, IntArray, Problem, usage
from mofq.decision.recipe import Recipe
from mofq.decision.request import Request, without
from mofq.decision.timing import request_budgets, unquantized_seconds
from mofq.decision.uniform import best_uniform, has_uniform
from mofq.engines.groups import is_experts
from mofq.evidence.constraints import named
from mofq.evidence.table import FEW_SAMPLES, Table
from mofq.exceptions import BudgetError, Remark, option
from mofq.model.kv_schemes import is_cache_scheme
from mofq.numbers.schemes import parse_scheme

#: The share of a predicted KL from which one calibration sequence is an outlier.
_OUTLYING = 0.5
#: Rounding to fewer bits makes weights smaller, see `mofq.decision.size_answers`.
_FEW_BITS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """A recipe and what is worth knowing of how it came about."""

    recipe: Recipe
    problem: Problem  #: what might be chosen
    budgets: Budgets  #: with that of time, in costs of the problem's options
    choice_F: IntArray  #: an option of each fusion group, which the recipe has
    tied_layers: int  #: linear layers that had a simpler scheme within noise
    moved_layers: int  #: those of them that took it
    #: What the best uniform scheme of no more bytes is said to cost, as the recipe's own figure.
    uniform: Estimate | None
    notes: tuple[str, ...]  #: what the user should know
    #: Error that one more byte, layer, ms … of a budget would save; None: the solver has none.
    prices: Mapping[str, float] | None = None
    unquantized_seconds: float | None = None  #: of the time's workload, where one was named

    @property
    def finer_layers(self) -> tuple[str, ...]:
        """Linear layers whose scheme is not among the space's base."""
        return usage(self.problem, self.choice_F).finer_layers


def decide(table: Table, request: Request, *, problem: Problem | None = None) -> Decision:
    """Choose one scheme for each fusion group of a table.

    Args:
        table: From `mofq measure`.
        request: Budgets and how to meet them.
        problem: What `request_problem` makes of the two, where it is known already.

    Returns:
        The recipe, with predictions where the table is in nats.

    Raises:
        BudgetError: No recipe meets the budgets; the message names the tightest possible.
        TableError: The table is not complete, or has no rows in the unit.
        EngineError: There is no such engine.
    """
    problem = request_problem(table, request) if problem is None else problem
    budgets = request_budgets(table, problem, request)
    try:
        chosen = choose(problem, budgets, solver=request.solver, ties=request.ties)
    except BudgetError as error:
        raise BudgetError(f"{error.template}{_blamed_constraints(table, request)}") from None
    uniform = best_uniform(problem, chosen.choice_F)
    result = decided_result(
        table, request, problem, chosen.choice_F, chosen.reported, uniform=uniform
    )
    solution, ties = chosen.solution, chosen.ties
    if solution.bound is not None:
        gap = max(0.0, problem.error_of(solution.choice_F) - solution.bound)
        result = replace(result, gap=gap)
    recipe = recipe_from_table(
        table,
        problem.schemes_of(chosen.choice_F),
        made_by=made_by_request(table, problem, request),
        budget=budget_figures(request),
        result=result,
    )
    return Decision(
        recipe,
        problem,
        budgets,
        choice_F=chosen.choice_F,
        tied_layers=0 if ties is None else ties.tied_layers,
        moved_layers=0 if ties is None else ties.moved_layers,
        uniform=None if uniform is None else predict_given(problem, uniform[1]),
        notes=(
            *_notes_of_search(problem, chosen, uniform, budgets=budgets),
            *notes_of_prediction(table, problem, chosen.choice_F, prediction=chosen.reported),
        ),
        prices=solution.prices,
        unquantized_seconds=unquantized_seconds(table, request),
    )


def _blamed_constraints(table: Table, request: Request) -> str:
    """That constraints are why no recipe meets the budgets, where they are."""
    constraints = asked_constraints(table, request)
    if not constraints:
        return ""
    free = request_problem(table, request, is_constrained=False)
    budgets = request_budgets(table, free, request)
    try:
        choose(free, budgets, solver=request.solver, ties=request.ties)
    except BudgetError:
        return ""
    return without([named(one, request.constraints) for one in constraints])


def _keeps(problem: Problem, budgets: Budgets, choice_F: IntArray) -> bool:
    """Whether a choice is within every budget but that in nats."""
    constraints = budget_constraints(problem, budgets)
    is_offered = bool(offered(problem, budgets)[choice_F].all())
    return is_offered and keeps_all(constraints, choice_F)


def _notes_of_search(
    problem: Problem,
    chosen: Chosen,
    uniform: tuple[str, IntArray] | None,
    *,
    budgets: Budgets,
) -> list[str]:
    """What a user should know of how a choice came about."""
    notes = []
    if budgets == Budgets() and set(problem.schemes_of(chosen.choice_F).values()) == {"bf16"}:
        notes.append(
            "Without a budget nothing is better than leaving every layer as it is. "
            "Give a budget of bits, of size or of KL."
        )
    elif uniform is not None and (uniform[1] != chosen.choice_F).any():
        error = predict(problem, uniform[1]).value
        is_as_good = error <= predict(problem, chosen.choice_F).value
        if is_as_good and _keeps(problem, budgets, uniform[1]):
            every = "layer" if has_uniform(problem, uniform[0]) else "layer that has a choice"
            notes.append(f"{uniform[0]} for every {every} is as small and predicted as good.")
    linear = {budget.name for budget in budgets.linear}
    return notes + [
        Remark(
            f"{one.option} does not bind: {one.shown(one.used(chosen.choice_F))} of "
            f"{one.shown(one.limit)}."
        )
        for one in budget_constraints(problem, budgets)
        if one.name in linear and (chosen.solution.prices or {}).get(one.name) == 0
    ]


def notes_of_prediction(
    table: Table, problem: Problem, choice_F: IntArray, *, prediction: Estimate
) -> tuple[str, ...]:
    """What a user should know of a choice's prediction before trusting it.

    Args:
        table: That the problem is of.
        problem: What might be chosen.
        choice_F: One option of each fusion group.
        prediction: Of the choice, from `predict_chosen`.
    """
    if problem.unit != KL_UNIT:
        return ()
    notes = [
        f"{count} calibration sequences are too few for error bars that mean anything"
        f"{f' on {corpus}' if len(problem.corpora) > 1 else ''}, and to cross-fit the prediction; "
        f"calibrate with at least {FEW_SAMPLES}."
        for corpus, count in _samples(table, problem).items()
        if count < FEW_SAMPLES
    ]
    notes += _outlying_sequences(problem, choice_F)
    notes += _without_answers(problem, choice_F)
    if prediction.is_in_sample and is_crossfitted(problem):
        notes.append(
            "The prediction is not cross-fitted, since half of the calibration sequences do not "
            "offer what the budgets need: it is of the very sequences that the recipe was chosen "
            "on, and likely a few percent too low. Calibrate on more, or measure with `mofq "
            "validate`."
        )
    if prediction.is_out_of_range:
        notes.append(
            Remark(
                f"The predicted KL is out of the range in which predictions were compared with "
                f"measurements, {model_error().largest:g} nats per token: the recipe may cost much "
                f"more. Measure it with `mofq validate`, or search with {option('max_kl')}, "
                f"{option('model')} and {option('text')}, which measures."
            )
        )
    return (*notes, *_unknown_routers(table, problem), *rare_experts(table))


def _unknown_routers(table: Table, problem: Problem) -> list[str]:
    """That a mixture's changes of experts are not in the prediction, nor in its interval."""
    if not any(map(is_experts, table.header.groups)):
        return []
    known = {one.corpus for one in table.flips}
    counted = zip(problem.corpora, problem.corpus_weights, strict=True)
    unknown = [str(corpus) for corpus, weight in counted if weight and corpus not in known]
    if not unknown:
        return []
    return [
        Remark(
            f"What it costs that tokens change their experts is not known of "
            f"{', '.join(unknown)}: predictions are too low, where errors are small by several "
            f"times, and their intervals do not cover it. Run the same `mofq measure` again, which "
            f"adds it where the calibration has it; else calibrate again, and measure into a new "
            f"table. Where `mofq calibrate` says that they are not seen, measure: `mofq validate`, "
            f"or a search with {option('max_kl')}, {option('model')} and {option('text')}."
        )
    ]


def _without_answers(problem: Problem, choice_F: IntArray) -> list[str]:
    """That statistics of before are silent on what few bits do together."""
    if problem.answers is not None or problem.sample_errors is None:
        return []
    schemes = {problem.schemes[p] for p in choice_F if not is_cache_scheme(problem.schemes[p])}
    weights = (parse_scheme(name).weight for name in schemes)
    if not any(weight is not None and weight.element.bits < _FEW_BITS for weight in weights):
        return []
    return [
        "The table rests on statistics of before the answers to a change of size were kept: what "
        "layers of 2 and 3 bits do together is not in the prediction, which may be a third too "
        "low or too high. Calibrate again, and measure into a new table."
    ]


def _outlying_sequences(problem: Problem, choice_F: IntArray) -> list[str]:
    """Where one sequence makes most of what is predicted.

    Gradients can grow by orders of magnitude at a single token. The expansion of second order
    then says more for it than any error can cost.
    """
    if problem.sample_errors is None:
        return []
    errors_CN = sample_sums(problem, choice_F)
    mean_C = np.array([errors_N.mean() for errors_N in errors_CN])
    if problem.objective == "mean":
        weight_C = np.array(problem.corpus_weights) / sum(problem.corpus_weights)
    else:
        weight_C = (mean_C == mean_C.max()).astype(np.float64)
    predicted = max((weight_C * mean_C).sum(), np.finfo(np.float64).tiny)
    notes = []
    for corpus, weight, errors_N in zip(problem.corpora, weight_C, errors_CN, strict=True):
        share = weight * errors_N.max() / len(errors_N) / predicted
        if len(errors_N) >= FEW_SAMPLES and share > _OUTLYING:
            where = f" of {corpus}" if len(problem.corpora) > 1 else ""
            notes.append(
                f"One of {len(errors_N)} calibration sequences{where} makes {100 * share:.0f} % of "
                f"the predicted KL, which is then likely too high. Calibrate on more sequences, "
                f"and measure with `mofq validate`."
            )
    return notes


def _samples(table: Table, problem: Problem) -> dict[str | None, int]:
    """How many samples the errors in nats of each corpus that counts rest on."""
    stats, weights = table.header.stats, problem.corpus_weights
    if problem.sample_errors is not None:
        each = zip(problem.corpora, weights, problem.sample_errors, strict=True)
        return {corpus: e_PN.shape[1] for corpus, weight, e_PN in each if weight}
    if stats is None:
        return {}
    each_corpus = zip(problem.corpora, weights, strict=True)
    return {corpus: stats.samples for corpus, weight in each_corpus if weight}
