"""The two calls into SciPy's HiGHS: a linear relaxation, and a small integer program."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from mofq.decision.solvers.problem import FloatArray, IntArray

#: Scaled so that HiGHS's absolute tolerance of 1e-6 is 1e-12 of the largest coefficient.
_LARGEST = 1e6
#: A row that is nowhere larger is left as it is: dividing by it would overflow. The program then
#: takes it for nothing, and whoever asked checks it.
_NOTHING = 1e-200


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS writes a debugging line to file descriptor 1, which `--json` needs for itself."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no standard output to keep clean
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """Minimise the largest over K of ``cost_K + sum of cost_PK``, ``sum of row_PR <= limit_R``.

    The sums are over one option of each group, or a mixture where the problem is relaxed.
    """

    cost_PK: FloatArray
    cost_K: FloatArray
    row_PR: FloatArray  #: >= 0
    limit_R: FloatArray
    group_P: IntArray  #: ascending


@dataclass(frozen=True, slots=True, eq=False)
class _Program:
    """Scaled, and the largest of several costs as a variable that none of them exceeds."""

    objective_V: FloatArray  #: of the options, then of the largest cost if there are several
    row_RV: FloatArray  #: the constraints, then the costs if there are several
    limit_R: FloatArray
    one_FV: Any  #: sparse: the options of each group
    lower_V: FloatArray
    cost_scale: float


def _program(choices: Choices, row_scale_R: FloatArray, largest: float) -> _Program:
    """The arrays of a linear program; costs are scaled so that the largest is ``largest``."""
    from scipy import sparse

    options, columns = choices.cost_PK.shape
    scale = (float(np.abs(choices.cost_PK).max(initial=0.0)) or 1.0) / largest
    row_RV = (choices.row_PR / row_scale_R).T
    limit_R = choices.limit_R / row_scale_R
    objective_V = choices.cost_PK[:, 0] / scale
    lower_V = np.zeros(options)
    if columns > 1:
        objective_V = np.append(np.zeros(options), 1.0)
        lower_V = np.append(lower_V, -np.inf)
        cost_KV = np.column_stack([choices.cost_PK.T / scale, -np.ones(columns)])
        row_RV = np.concatenate([np.pad(row_RV, ((0, 0), (0, 1))), cost_KV])
        limit_R = np.concatenate([limit_R, -choices.cost_K / scale])
    _, number_P = np.unique(choices.group_P, return_inverse=True)
    shape = (int(number_P.max()) + 1, len(objective_V))
    one_FV = sparse.csr_array((np.ones(options), (number_P, np.arange(options))), shape=shape)
    return _Program(objective_V, row_RV, limit_R, one_FV=one_FV, lower_V=lower_V, cost_scale=scale)


def relax(choices: Choices) -> tuple[FloatArray, FloatArray] | None:
    """Dual prices of the linear relaxation.

    Returns:
        A weight >= 0 for each K (they add up to 1), and a price >= 0 for each row [cost
        per unit]; any such numbers give a valid bound. None: infeasible.
    """
    from scipy.optimize import linprog

    rows, columns = len(choices.limit_R), choices.cost_PK.shape[1]
    largest_R = choices.row_PR.max(axis=0, initial=0.0)
    scale_R = np.where(largest_R > _NOTHING, largest_R, 1.0)
    program = _program(choices, scale_R, 1.0)
    with _silent():
        found = linprog(
            program.objective_V,
            A_ub=program.row_RV,
            b_ub=program.limit_R,
            A_eq=program.one_FV,
            b_eq=np.ones(program.one_FV.shape[0]),
            bounds=[(low, None) for low in program.lower_V.tolist()],
            method="highs-ds",
        )
    if found.status == 2:
        return None
    weight_K = np.full(columns, 1 / columns)
    if not found.success:  # zero prices bound too, though badly
        return weight_K, np.zeros(rows)
    price = np.maximum(-np.asarray(found.ineqlin.marginals, dtype=np.float64), 0.0)
    if price[rows:].sum() > 0:
        weight_K = price[rows:] / price[rows:].sum()
    return weight_K, price[:rows] * program.cost_scale / scale_R


def solve_integer(choices: Choices, cuts: list[IntArray]) -> IntArray | None:
    """Whole options, to optimality.

    Args:
        choices: The problem.
        cuts: Sets of options of which only so many may be chosen together, each as an
            array ``[number, option, option, ...]``.

    Returns:
        The chosen option of each group, ascending; None: infeasible. HiGHS keeps the rows
        to a tolerance only: the caller checks.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    program = _program(choices, _row_scales(choices.row_PR), _LARGEST)
    variables, options = len(program.objective_V), len(choices.group_P)
    is_option_V = np.arange(variables) < options
    constraints = [LinearConstraint(program.one_FV, 1, 1)]
    if len(program.limit_R):
        constraints.append(LinearConstraint(program.row_RV, -np.inf, program.limit_R))
    for cut in cuts:
        row_V = np.isin(np.arange(variables), cut[1:]).astype(np.float64)
        constraints.append(LinearConstraint(row_V, -np.inf, int(cut[0])))
    with _silent():
        found = milp(
            program.objective_V,
            integrality=is_option_V.astype(np.int64),
            bounds=Bounds(program.lower_V, np.where(is_option_V, 1.0, np.inf)),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
    if found.x is None:
        return None
    x_P = np.asarray(found.x[:options])
    order = np.lexsort((-x_P, choices.group_P))
    first = np.flatnonzero(np.diff(choices.group_P[order], prepend=-1))
    return np.asarray(order[first])


def _row_scales(row_PR: FloatArray) -> FloatArray:
    """What to divide each row by; small integers stay integers, a whole unit apart."""
    largest_R = row_PR.max(axis=0, initial=0.0)
    whole_R = (row_PR == np.rint(row_PR)).all(axis=0) & (largest_R <= _LARGEST)
    return np.where(whole_R | (largest_R <= _NOTHING), 1.0, largest_R / _LARGEST)
