"""The two published rules: INT or FP by the lower error, and finer scales where they gain most."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mofq.decision.budgets import Budgets, Constraint, all_constraints, keeps_all, offered
from mofq.decision.exact import Solution
from mofq.decision.problem import BoolArray, FloatArray, IntArray, Problem
from mofq.exceptions import BudgetError, option
from mofq.model.kv_schemes import CachedTensor, is_cache_scheme, parse_cache_scheme
from mofq.numbers.schemes import TensorScheme, parse_scheme

#: Bits and granularity of the weights, and of the activations; or of keys, and of values.
_Width = tuple[int, str, int, str]


def solve_greedy(problem: Problem, budgets: Budgets) -> Solution:
    """MoFQ's choice, and finer scales where they gain most.

    1. *Format.* Schemes of equal width (bits and granularity of the weights, and of the
       activations) compete: each fusion group takes the one of lower error, so a
       layer's weights and activations share one format. Every width that the
       space offers is tried; of those that keep the budgets the one of least total
       error is taken. A group that has no scheme of the width takes one of the
       same bits, or stays unquantized, or takes its best. The unquantized scheme
       is no width of its own unless there is no other. Where the KV cache is decided too,
       so are its formats, of equal bits and granularity of keys and of values, and each of
       their widths is tried beside each of the layers'; as it is, is one of them.
    2. *Granularity*, only under ``max_finer``. Step 1 then chooses among ``base``
       schemes alone. The groups are ranked by what their best finer scheme
       removes from the error, per layer, and take it in this order where every
       budget is still kept; `finer_is_offered` applies.

    Args:
        problem: What may be chosen; the unit of the table is the error that both rules use.
        budgets: Any number at once.

    Returns:
        The choice; without bound and prices.

    Raises:
        BudgetError: No width keeps the budgets.

    Source: 1: arXiv:2305.12356, section 4 (tensor MSE or output MSE, layer by layer).
    2: arXiv:2408.15301 (finer granularity for the few layers that need it).
    """
    constraints = all_constraints(problem, budgets)
    allowed_P = offered(problem, budgets)
    error_P = problem.mean_over_corpora(problem.error_PC)
    coarse_P = _coarse(problem, allowed_P) if budgets.max_finer is not None else allowed_P
    choice_F = _best_width(problem, constraints, error_P, coarse_P)
    if budgets.max_finer is not None:
        choice_F = _refine(problem, constraints, error_P, allowed_P=allowed_P, choice_F=choice_F)
    return Solution(choice_F)


def _coarse(problem: Problem, allowed_P: BoolArray) -> BoolArray:
    """Base schemes, and everything where a group has none."""
    has_base_F = np.zeros(len(problem.groups), dtype=np.bool_)
    has_base_F[problem.group_P[allowed_P & problem.is_base_P]] = True
    return np.asarray(allowed_P & (problem.is_base_P | ~has_base_F[problem.group_P]))


@lru_cache(maxsize=4096)
def _width(scheme_name: str) -> _Width:
    if is_cache_scheme(scheme_name):
        keys, values = parse_cache_scheme(scheme_name).parts.values()
        return (*_cached_width(keys), *_cached_width(values))
    scheme = parse_scheme(scheme_name)
    return (*_operand_width(scheme.weight), *_operand_width(scheme.activation))


def _cached_width(part: CachedTensor | None) -> tuple[int, str]:
    if part is None:
        return (16, "")
    return (part.scheme.element.bits, f"{part.scheme.granularity.name}{part.by_head:+d}")


def _operand_width(operand: TensorScheme | None) -> tuple[int, str]:
    return (16, "") if operand is None else (operand.element.bits, operand.granularity.name)


def _best_width(
    problem: Problem, constraints: Sequence[Constraint], error_P: FloatArray, pool_P: BoolArray
) -> IntArray:
    choices = [
        _choice_of_width(problem, width, cached, error_P, pool_P & set_P)
        for set_P in problem.sets
        for width in _layer_widths(problem, pool_P & set_P)
        for cached in _cache_widths(problem, pool_P & set_P)
    ]
    fitting = [one for one in choices if keeps_all(constraints, one)]
    if not fitting:
        raise _too_small(problem, constraints, choices)
    return min(fitting, key=lambda one: (float(error_P[one].sum()), problem.size_of(one)))


def _too_small(
    problem: Problem, constraints: Sequence[Constraint], choices: Sequence[IntArray]
) -> BudgetError:
    alone = (
        constraint
        for constraint in constraints
        if min(map(constraint.used, choices)) > constraint.limit
    )
    broken = next(alone, None)
    least = min(choices, key=problem.size_of if broken is None else broken.used)
    if broken is None:
        broken = next(constraint for constraint in constraints if not constraint.holds(least))
    return BudgetError(
        f"{broken.option}: asked for {broken.shown(broken.limit)}; the smallest choice of one "
        f"width, which is what greedy chooses, has {broken.shown(broken.used(least))}. "
        f"Raise the budget, or use {option('solver', 'exact')}."
    )


def _layer_widths(problem: Problem, pool_P: BoolArray) -> list[_Width]:
    names = _names(problem, pool_P, cached=False)
    widths = dict.fromkeys(_width(name) for name in names)
    return [width for width in widths if width != _width("bf16")] or list(widths)


def _cache_widths(problem: Problem, pool_P: BoolArray) -> list[_Width | None]:
    """Those of the cache's formats; None alone where it is not decided."""
    names = _names(problem, pool_P, cached=True)
    return list(dict.fromkeys(_width(name) for name in names)) or [None]


def _names(problem: Problem, pool_P: BoolArray, *, cached: bool) -> dict[str, None]:
    return {
        name: None
        for name, group, ok in zip(problem.schemes, problem.group_P, pool_P, strict=True)
        if ok and (problem.groups[group].cached > 0) == cached
    }


def _choice_of_width(
    problem: Problem,
    layer_width: _Width,
    cache_width: _Width | None,
    error_P: FloatArray,
    pool_P: BoolArray,
) -> IntArray:
    choice = []
    for group in range(len(problem.groups)):
        width = cache_width if problem.groups[group].cached else layer_width
        assert width is not None
        options = [p for p in problem.options_of(group) if pool_P[p]]
        of_width = {p: _width(problem.schemes[p]) for p in options}
        same = [p for p in options if of_width[p] == width]
        alike = [p for p in options if of_width[p][::2] == width[::2]]
        plain = [p for p in options if problem.schemes[p] == "bf16"]
        # Options are in order of simplicity, so equal errors go to the simpler.
        choice.append(min(same or alike or plain or options, key=lambda p: error_P[p]))
    return np.array(choice, dtype=np.int64)


def _refine(
    problem: Problem,
    constraints: Sequence[Constraint],
    error_P: FloatArray,
    *,
    allowed_P: BoolArray,
    choice_F: IntArray,
) -> IntArray:
    """Take the best finer scheme of each group, the largest gain per layer first."""
    gains = []
    for group, chosen in enumerate(choice_F.tolist()):
        finer = [p for p in problem.options_of(group) if allowed_P[p] and not problem.is_base_P[p]]
        if finer and not problem.groups[group].cached:
            best = min(finer, key=lambda p: error_P[p])
            gain = float(error_P[chosen] - error_P[best]) / len(problem.groups[group].layers)
            gains.append((gain, group, best))
    refined_F = choice_F.copy()
    for gain, group, best in sorted(gains, key=lambda one: (-one[0], one[1])):
        if gain <= 0:
            break
        trial_F = refined_F.copy()
        trial_F[group] = best
        if keeps_all(constraints, trial_F):
            refined_F = trial_F
    return refined_F
