"""Budgets as linear constraints over the options."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from mofq.decision.problem import KL_UNIT, BoolArray, FloatArray, IntArray, Problem
from mofq.exceptions import BudgetError, option


@dataclass(frozen=True, slots=True, eq=False)
class LinearBudget:
    """Any cost that adds up over fusion groups, e.g. seconds: ``constant + sum <= limit``."""

    name: str  #: as messages call it, e.g. ``"max_time"``
    unit: str  #: e.g. ``"seconds"``
    cost_P: FloatArray  #: of each option of the problem
    limit: float
    constant: float = 0.0  #: what no choice changes


@dataclass(frozen=True, slots=True)
class Budgets:
    """What a recipe must not exceed; None where there is no limit."""

    max_bits: float | None = None  #: true bits per weight over all groups [bits]
    max_bytes: int | None = None  #: all tensors of the checkpoint [bytes]
    max_kl: float | None = None  #: of the end of the predicted interval [nats per token]
    max_finer: float | None = None  #: share of the layers whose scheme is not a base scheme
    linear: tuple[LinearBudget, ...] = ()
    max_kv_bits: float | None = None  #: true bits per cached number [bits]
    #: True bits of the weights that a token reads, over their number [bits]; a linear budget of
    #: the table that is decided on, see `mofq.decision.expert_visits`.
    max_active_bits: float | None = None

    @property
    def any_given(self) -> bool:
        """Whether anything is limited."""
        return self != Budgets()

    @property
    def minimises_bytes(self) -> bool:
        """Whether accuracy is the budget and size the objective."""
        return self.max_kl is not None and self.max_bits is None and self.max_bytes is None


@dataclass(frozen=True, slots=True, eq=False)
class Constraint:
    """``sum of cost_P over the choice <= limit``; exact where both are integers."""

    name: str
    cost_P: IntArray | FloatArray
    limit: int | float
    shown: Callable[[int | float], str]  #: a value of the constraint, in the words of the budget

    @property
    def option(self) -> str:
        """The option that asked for it, as messages name it."""
        return option_of(self.name)

    def used(self, choice_F: IntArray) -> int | float:
        """The left-hand side: a sum of integers, or a correctly rounded sum of floats."""
        values = self.cost_P[choice_F]
        return int(values.sum()) if self.cost_P.dtype == np.int64 else math.fsum(values)

    def holds(self, choice_F: IntArray) -> bool:
        """Whether the choice is within the limit, without tolerance."""
        return self.used(choice_F) <= self.limit


def option_of(name: str) -> str:
    """The option that asks for a budget, as messages name it."""
    return option("max_size" if name == "max_bytes" else name)


def keeps_all(constraints: Sequence[Constraint], choice_F: IntArray) -> bool:
    """Whether a choice is within every limit, without tolerance."""
    return all(constraint.holds(choice_F) for constraint in constraints)


def budget_constraints(problem: Problem, budgets: Budgets) -> tuple[Constraint, ...]:
    """The constraints of all budgets but ``max_kl``; see `all_constraints`.

    Raises:
        BudgetError: A budget is not a number that can be met, or asks for what the
            problem does not have.
    """
    _check_numbers(budgets)
    constraints = []
    if budgets.max_bits is not None:
        weights = problem.weights
        constraints.append(
            Constraint(
                "max_bits",
                problem.layer_bytes_P,
                limit=_most(budgets.max_bits, 8, weights),
                shown=lambda used: f"{_up(8 * used / weights)} bits per weight",
            )
        )
    if budgets.max_bytes is not None:
        other = problem.other_bytes
        constraints.append(
            Constraint(
                "max_bytes",
                problem.size_P,
                limit=int(budgets.max_bytes) - other,
                shown=lambda used: f"{int(used) + other:,} bytes",
            )
        )
    if budgets.max_kv_bits is not None:
        constraints.append(_cache_constraint(problem, budgets.max_kv_bits))
    if budgets.max_finer is not None:
        constraints.append(_finer_constraint(problem, budgets.max_finer))
    for one in budgets.linear:
        constraints.append(_linear_constraint(problem, one))
    return tuple(constraints)


def all_constraints(problem: Problem, budgets: Budgets) -> tuple[Constraint, ...]:
    """The constraints of all budgets, ``max_kl`` option by option (`max_kl_constraints`).

    Raises:
        BudgetError: As `budget_constraints`, or errors are not in nats.
    """
    constraints = budget_constraints(problem, budgets)
    if budgets.max_kl is None:
        return constraints
    return constraints + max_kl_constraints(problem, budgets.max_kl)


def _check_numbers(budgets: Budgets) -> None:
    for name in (
        "max_bits",
        "max_bytes",
        "max_kl",
        "max_finer",
        "max_kv_bits",
        "max_active_bits",
    ):
        value = getattr(budgets, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise BudgetError(f"{option_of(name)}: must be a number of at least 0, found {value}.")
    if budgets.max_finer is not None and budgets.max_finer > 1:
        raise BudgetError(
            f"{option('max_finer')}: is a share of the layers, at most 1; found "
            f"{budgets.max_finer}."
        )


def _cache_constraint(problem: Problem, max_kv_bits: float) -> Constraint:
    cached = problem.cached
    if not cached:
        raise BudgetError(
            f"{option('max_kv_bits')}: the table has no formats of the KV cache. Measure a search "
            f"space with the key `kv_cache`, on stats of `mofq calibrate --kv-cache`."
        )
    return Constraint(
        "max_kv_bits",
        problem.cache_bits_P,
        limit=_most(max_kv_bits, 1, cached),
        shown=lambda used: f"{_up(used / cached)} bits per cached number",
    )


def _most(limit: float, times: int, over: int) -> int:
    """The largest n whose ``times * n / over``, as it is reported, does not exceed a limit.

    Exact arithmetic would refuse 3 of 100 layers to a limit of 0.03, whose
    binary number is smaller than 3/100 by nothing that anybody wrote.
    """
    n = math.floor(Fraction(limit) * over / times)
    return n + 1 if times * (n + 1) / over <= limit else n


def _up(value: float) -> str:
    """Four decimals, rounded up: a budget of what is shown can be met."""
    return f"{math.ceil(Fraction(value) * 10_000) / 10_000:.4f}".rstrip("0").rstrip(".")


def _meetable(used: float, constant: float) -> str:
    """Their sum in six digits, rounded up where needed: a budget of what is shown can be met."""
    total = used + constant
    shown = f"{total:.6g}"
    if float(shown) - constant < used * (1 + 1e-12):  # the last bits of a sum
        shown = f"{total + 10.0 ** (math.floor(math.log10(abs(total))) - 5):.6g}"
    return shown


def _linear_constraint(problem: Problem, budget: LinearBudget) -> Constraint:
    cost_P = np.asarray(budget.cost_P, dtype=np.float64)
    if cost_P.shape != problem.bytes_P.shape or not np.isfinite(cost_P).all():
        raise BudgetError(
            f"{option_of(budget.name)}: needs a finite cost for each of {len(problem.schemes)} "
            f"options, found an array of shape {cost_P.shape}."
        )
    limit = budget.limit - budget.constant

    def shown(used: int | float) -> str:
        digits = f"{budget.limit:.6g}" if used == limit else _meetable(used, budget.constant)
        return f"{digits} {budget.unit}"

    return Constraint(budget.name, cost_P, limit=limit, shown=shown)


def layers_P(problem: Problem) -> IntArray:
    """Layers that each option decides, counted singly; 0 where the space offers nothing."""
    counts = [len(group.layers) if group.counted else 0 for group in problem.groups]
    return np.array(counts, dtype=np.int64)[problem.group_P]


def finer_layers_P(problem: Problem) -> IntArray:
    """Layers that each option makes finer than ``base``."""
    return np.where(problem.is_base_P, 0, layers_P(problem))


def _finer_constraint(problem: Problem, max_finer: float) -> Constraint:
    if not problem.is_base_P.any():
        raise BudgetError(
            f"{option('max_finer')}: the search space names no `base` schemes, so that nothing is "
            f"finer. Add the key `base`, or drop the budget."
        )
    total = sum(len(group.layers) for group in problem.groups if group.counted) or 1
    return Constraint(
        "max_finer",
        finer_layers_P(problem),
        limit=_most(max_finer, 1, total),
        shown=lambda used: f"{_up(used / total)} ({int(used)} of {total} layers)",
    )


def finer_is_offered(problem: Problem) -> BoolArray:
    """Which options remain under a budget of finer layers.

    A finer scheme stays only where the error that it removes, per layer, is at least
    ``problem.min_gain`` times what it removes in the median layer, of those layers where
    it makes a difference. What it removes is the difference to the best base scheme of the
    same group. A group without any base scheme keeps all.

    Args:
        problem: With base schemes.

    Returns:
        [P]: base schemes, and the finer ones that stay.
    """
    error_P = problem.cost_PK.max(axis=1)
    best_F = np.full(len(problem.groups), np.inf)
    np.minimum.at(best_F, problem.group_P[problem.is_base_P], error_P[problem.is_base_P])
    has_base_P = np.isfinite(best_F)[problem.group_P]
    count_P = np.array([len(group.layers) for group in problem.groups])[problem.group_P]
    gain_P = np.where(has_base_P, (best_F[problem.group_P] - error_P) / count_P, 0.0)
    keep_P = problem.is_base_P | ~has_base_P
    schemes = np.array(problem.schemes)
    for scheme in dict.fromkeys(problem.schemes):
        finer = np.flatnonzero((schemes == scheme) & ~keep_P)
        if len(finer):
            # Groups as long as a layer's inputs are its channels: nothing to compare with.
            differ = finer[gain_P[finer] != 0]
            median = _weighted_median(gain_P[differ], count_P[differ]) if len(differ) else 0.0
            enough = gain_P[finer] >= max(problem.min_gain * median, 0.0)
            keep_P[finer[enough & (gain_P[finer] > 0)]] = True
    return np.asarray(keep_P)


def _weighted_median(values: FloatArray, weights: IntArray) -> float:
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(below, below[-1] / 2)])


def offered(problem: Problem, budgets: Budgets) -> BoolArray:
    """The options that a solver may choose under these budgets, [P]."""
    if budgets.max_finer is None:
        return np.ones(len(problem.schemes), dtype=np.bool_)
    _finer_constraint(problem, budgets.max_finer)
    return finer_is_offered(problem)


def check_kl_unit(problem: Problem) -> None:
    """Refuse a budget in nats where errors are in another unit, or without error bars.

    Raises:
        BudgetError: As said.
    """
    if problem.unit != KL_UNIT:
        raise BudgetError(
            f"{option('max_kl')}: errors are in {problem.unit}, which says nothing about nats. Run "
            f"`mofq calibrate`, then `mofq measure --stats`, or set a budget in bits or bytes."
        )
    if problem.stderr_PC is None or not np.isfinite(problem.stderr_PC).all():
        raise BudgetError(
            f"{option('max_kl')}: rows have no standard errors, and the budget is on the predicted "
            f"KL plus two of them. Calibrate with at least two samples, and measure again."
        )


def max_kl_constraints(problem: Problem, max_kl: float) -> tuple[Constraint, ...]:
    """``max_kl`` where no samples are kept: error plus two standard errors, option by option.

    Errors of different groups share their samples, so standard errors add up at
    worst; the constraint is on the safe side.
    """
    check_kl_unit(problem)
    assert problem.stderr_PC is not None
    upper_PK = problem.by_objective(problem.error_PC + 2 * problem.stderr_PC)
    return tuple(
        Constraint("max_kl", upper_P, max_kl, shown=lambda used: f"{used:.4g} nats per token")
        for upper_P in upper_PK.T
    )
