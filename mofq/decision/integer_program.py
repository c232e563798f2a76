"""The optimum of a core by a mixed-integer program, kept exact.

HiGHS keeps constraints to a tolerance. A choice that breaks one in exact arithmetic is excluded
by a cut, and the program is solved again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mofq.decision.budgets import Constraint
from mofq.decision.problem import FloatArray, IntArray
from mofq.decision.relaxation import Core, LinearProgram, Prices, linear_program, row_scales, silent

#: Scaled so that HiGHS's absolute tolerance of 1e-6 is 1e-12 of the largest coefficient.
_LARGEST = 1e6
_CORE = 100  #: options beside the best of each group, to begin with


def search_program(
    core: Core, prices: Prices, cost_PK: FloatArray, constraints: Sequence[Constraint]
) -> IntArray | None:
    """Solve growing parts of the core until one is proven to hold the optimum.

    Args:
        core: The options.
        prices: Their reduced costs.
        cost_PK: Of the problem's options: the largest column sum is minimised.
        constraints: Of the problem, checked without tolerance.

    Returns:
        The best option of each group; None: no choice keeps all constraints.
    """
    ascending = np.sort(prices.reduced_P)
    count = min(len(core.start_F) + _CORE, len(ascending))
    while True:
        part = core.part(prices.reduced_P <= ascending[count - 1])
        choice_F = _solve_exactly(part, constraints)
        if choice_F is None:
            if len(part.option_P) == len(ascending):
                return None
            count = min(4 * count, len(ascending))
            continue
        # An option that costs more than this beyond the bound is in no better solution.
        gap = max(math.fsum(column) for column in cost_PK[choice_F].T) - prices.bound
        count = int(np.searchsorted(ascending, gap, side="right"))
        if count <= len(part.option_P):
            return choice_F


def _solve_exactly(core: Core, constraints: Sequence[Constraint]) -> IntArray | None:
    """The optimum over the options of a core, constraints checked without tolerance."""
    program = linear_program(core, _whole_scales(core), _LARGEST)
    cuts: list[tuple[FloatArray, int]] = []
    while True:
        chosen = _solve(core, program, cuts)
        if chosen is None:
            return None
        choice_F: IntArray = core.option_P[chosen]
        broken = next((one for one in constraints if not one.holds(choice_F)), None)
        if broken is None:
            return choice_F
        cost_P = broken.cost_P[core.option_P]
        # In each group the options that cost at least as much as the chosen one: a choice of
        # these in every group is over the limit too.
        is_heavy_P = cost_P >= cost_P[chosen][core.group_P]
        cut_V = np.pad(is_heavy_P.astype(np.float64), (0, len(program.objective_V) - len(cost_P)))
        cuts.append((cut_V, len(chosen) - 1))


def _solve(
    core: Core, program: LinearProgram, cuts: Sequence[tuple[FloatArray, int]]
) -> IntArray | None:
    """One option of each group, to optimality within HiGHS's tolerance; None: infeasible.

    Of the options of a cut at most so many are chosen together.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    variables, options = len(program.objective_V), len(core.group_P)
    is_option_V = np.arange(variables) < options
    linear = [LinearConstraint(program.one_FV, 1, 1)]
    if len(program.limit_R):
        linear.append(LinearConstraint(program.row_RV, -np.inf, program.limit_R))
    linear += [LinearConstraint(cut_V, -np.inf, most) for cut_V, most in cuts]
    with silent():
        found = milp(
            program.objective_V,
            integrality=is_option_V.astype(np.int64),
            bounds=Bounds(program.lower_V, np.where(is_option_V, 1.0, np.inf)),
            constraints=linear,
            options={"mip_rel_gap": 0.0},
        )
    if found.x is None:
        return None
    order = np.lexsort((-np.asarray(found.x[:options]), core.group_P))
    return np.asarray(order[core.start_F])


def _whole_scales(core: Core) -> FloatArray:
    """What to divide each constraint by; small integers stay integers, a whole unit apart."""
    largest_R = core.row_PR.max(axis=0, initial=0.0)
    whole_R = (core.row_PR == np.rint(core.row_PR)).all(axis=0) & (largest_R <= _LARGEST)
    return np.where(whole_R, 1.0, row_scales(core, _LARGEST))
