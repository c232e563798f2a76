"""The two calls into SciPy's HiGHS: a linear relaxation, and a small integer program."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mofq.solvers.problem import FloatArray, IntArray

#: Scaled so that HiGHS's absolute tolerance of 1e-6 is 1e-12 of the largest coefficient.
_LARGEST = 1e6


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


def _one_per_group(group_P: IntArray, columns: int) -> Any:
    """``sum over the options of a group = 1`` as a sparse matrix of so many columns."""
    from scipy import sparse

    count = len(group_P)
    _, number_P = np.unique(group_P, return_inverse=True)
    shape = (int(number_P.max()) + 1, columns)
    return sparse.csr_array((np.ones(count), (number_P, np.arange(count))), shape=shape)


def _scaled(cost_PK: FloatArray) -> tuple[FloatArray, float]:
    largest = float(np.abs(cost_PK).max(initial=0.0))
    return (cost_PK / largest, largest) if largest > 0 else (cost_PK, 1.0)


def _row_scales(row_PR: FloatArray) -> FloatArray:
    """What to divide each row by; small integers stay integers, a whole unit apart."""
    largest_R = row_PR.max(axis=0, initial=0.0)
    whole_R = (row_PR == np.rint(row_PR)).all(axis=0) & (largest_R <= _LARGEST)
    return np.where(whole_R | (largest_R == 0), 1.0, largest_R / _LARGEST)


def relax(
    cost_PK: FloatArray,
    cost_K: FloatArray,
    row_PR: FloatArray,
    limit_R: FloatArray,
    group_P: IntArray,
) -> tuple[FloatArray, FloatArray] | None:
    """Dual prices of the linear relaxation.

    Minimise the largest over K of ``cost_K + sum of cost_PK``, one option (or a
    mixture) in each group, under ``sum of row_PR <= limit_R``.

    Returns:
        A weight >= 0 for each K (they add up to 1), and a price >= 0 for each row [cost
        per unit]; any such numbers give a valid bound. None: infeasible.
    """
    from scipy.optimize import linprog

    options, columns = cost_PK.shape
    scaled_PK, scale = _scaled(cost_PK)
    largest_R = row_PR.max(axis=0, initial=0.0)
    row_scale_R = np.where(largest_R > 0, largest_R, 1.0)
    rows, limits = [(row_PR / row_scale_R).T], [limit_R / row_scale_R]
    objective = scaled_PK[:, 0]
    if columns > 1:
        objective = np.append(np.zeros(options), 1.0)
        rows = [np.pad(rows[0], ((0, 0), (0, 1)))]
        rows.append(np.column_stack([scaled_PK.T, -np.ones(columns)]))
        limits.append(-cost_K / scale)
    bounds = [(0.0, None)] * options + [(None, None)] * (len(objective) - options)
    equal = _one_per_group(group_P, len(objective))
    with _silent():
        found = linprog(
            objective,
            A_ub=np.concatenate(rows),
            b_ub=np.concatenate(limits),
            A_eq=equal,
            b_eq=np.ones(equal.shape[0]),
            bounds=bounds,
            method="highs-ds",
        )
    if found.status == 2:
        return None
    weight_K = np.full(columns, 1 / columns)
    if not found.success:  # zero prices bound too, though badly
        return weight_K, np.zeros(len(limit_R))
    price = np.maximum(-np.asarray(found.ineqlin.marginals, dtype=np.float64), 0.0)
    if columns > 1 and price[len(limit_R) :].sum() > 0:
        weight_K = price[len(limit_R) :] / price[len(limit_R) :].sum()
    return weight_K, price[: len(limit_R)] * scale / row_scale_R


def solve_integer(
    cost_PK: FloatArray,
    cost_K: FloatArray,
    row_PR: FloatArray,
    limit_R: FloatArray,
    group_P: IntArray,
    cuts: list[IntArray],
) -> IntArray | None:
    """The same problem with whole options, to optimality.

    Args:
        cost_PK: Of each option.
        cost_K: Constant part.
        row_PR: Constraint coefficients, >= 0.
        limit_R: Their limits.
        group_P: Ascending.
        cuts: Pairs of a set of options and the number of them that may be chosen
            together, as one array ``[number, option, option, ...]``.

    Returns:
        The chosen option of each group, ascending; None: infeasible. HiGHS keeps the rows
        to a tolerance only: the caller checks.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    options, columns = cost_PK.shape
    scaled_PK, scale = _scaled(cost_PK)
    variables = options + (columns > 1)
    equal = _one_per_group(group_P, variables)
    constraints = [LinearConstraint(equal, 1, 1)]
    row_scale_R = _row_scales(row_PR)
    rows = np.zeros((len(limit_R) + len(cuts), variables))
    rows[: len(limit_R), :options] = (row_PR / row_scale_R).T
    limits = np.append(limit_R / row_scale_R, [float(cut[0]) for cut in cuts])
    for row, cut in zip(rows[len(limit_R) :], cuts, strict=True):
        row[cut[1:]] = 1
    if len(rows):
        constraints.append(LinearConstraint(rows, -np.inf, limits))
    objective = scaled_PK[:, 0] * _LARGEST
    upper = np.ones(variables)
    lower = np.zeros(variables)
    if columns > 1:
        objective = np.append(np.zeros(options), _LARGEST)
        lower[-1], upper[-1] = -np.inf, np.inf
        epigraph = np.column_stack([scaled_PK.T, -np.ones(columns)])
        constraints.append(LinearConstraint(epigraph, -np.inf, -cost_K / scale))
    with _silent():
        found = milp(
            objective,
            integrality=np.append(np.ones(options), np.zeros(variables - options)),
            bounds=Bounds(lower, upper),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
    if found.x is None:
        return None
    x_P = np.asarray(found.x[:options])
    order = np.lexsort((-x_P, group_P))
    first = np.flatnonzero(np.diff(group_P[order], prepend=-1))
    return np.asarray(order[first])
