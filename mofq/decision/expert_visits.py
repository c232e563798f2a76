"""What a token reads of a mixture of experts: weights by the share of tokens that come to them.

A decision's bytes are read by the tokens that visit its layers: all of a dense layer's by every
token, an expert's by the share that the router sends there. Which share that is, calibration saw.
Bits per *active* weight are the bits that a token reads over the number of weights that it meets,
and what a forward pass of few tokens takes its time for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mofq.decision.budgets import LinearBudget
from mofq.decision.problem import FloatArray, IntArray, Problem
from mofq.engines.groups import is_experts
from mofq.evidence.table import Table
from mofq.exceptions import BudgetError, Remark, option

#: Below so many tokens of the kept sequences, what is known of an expert is little.
FEW_VISITS = 32


@dataclass(frozen=True, slots=True, eq=False)
class ActiveWeights:
    """What a token meets of each fusion group of a problem."""

    share_F: FloatArray  #: of the group's weights, averaged over them; 1 of a dense layer
    weights: float  #: in all groups of linear layers

    def bits(self, problem: Problem, choice_F: IntArray) -> float:
        """Bits per active weight of a choice."""
        return 8 * self.bytes(problem, choice_F) / self.weights

    def bytes(self, problem: Problem, choice_F: IntArray) -> float:
        """Bytes of linear layers that a token reads, on average."""
        return math.fsum(problem.layer_bytes_P[choice_F] * self.share_F)


def active_weights(table: Table, problem: Problem) -> ActiveWeights | None:
    """What a token meets, by the visits that calibration saw.

    Args:
        table: Of the problem.
        problem: Whose corpora count as they do in its errors.

    Returns:
        None where the table has experts and does not know of visits to them.
    """
    shares = _shares(table, problem)
    experts = {group.name for group in table.header.groups if is_experts(group)}
    if not experts <= shares.keys():
        return None
    share_F = np.array([shares.get(group.name, 1.0) for group in problem.groups])
    weight_F = np.array([group.weights for group in problem.groups], dtype=np.float64)
    return ActiveWeights(share_F, math.fsum(weight_F * share_F))


def active_budget(table: Table, problem: Problem, max_active_bits: float) -> LinearBudget:
    """A limit on the bits per active weight, as a cost of each option.

    Raises:
        BudgetError: The table does not know how many tokens come to its experts.
    """
    active = active_weights(table, problem)
    if active is None:
        raise BudgetError(
            f"{option('max_active_bits')}: how many tokens come to each expert is not in the "
            f"table. Run the same `mofq measure` again; a table without {option('stats')} cannot "
            f"know it, measure with them into a new one."
        )
    return LinearBudget(
        "max_active_bits",
        "bits per active weight",
        cost_P=8 * problem.layer_bytes_P * active.share_F[problem.group_P] / active.weights,
        limit=max_active_bits,
    )


def rare_experts(table: Table) -> list[Remark]:
    """Sentences on the experts that few tokens of a corpus came to."""
    found: dict[str, list[tuple[str, int]]] = {}
    for one in table.visits:
        few = [(name, count) for name, count in one.layers.items() if count < FEW_VISITS]
        found.setdefault(one.corpus, []).extend(few)
    return [
        Remark(
            f"corpus {corpus}: fewer than {FEW_VISITS} of the kept tokens came to {len(few)} "
            f"layers of experts, e.g. {min(few, key=lambda each: each[1])[0]}; little is known of "
            f"them. Longer text, or a larger {option('keep')}, reaches more."
        )
        for corpus, few in found.items()
        if few
    ]


def _shares(table: Table, problem: Problem) -> dict[str, float]:
    """Group of experts -> the share of tokens that come to a weight of it, over corpora."""
    weight_of = dict(zip(problem.corpora, problem.corpus_weights, strict=True))
    if set(weight_of) == {None}:  # the errors rest on no corpus
        weight_of = {one.corpus: 1.0 for one in table.visits}
    groups = {group.name: group for group in table.header.groups}
    sums: dict[str, tuple[float, float]] = {}
    for one in table.visits:
        group, weight = groups[one.group], weight_of.get(one.corpus, 0.0)
        visited = sum(layer.weights * one.layers[layer.name] for layer in group.layers)
        share = visited / group.weights / one.tokens
        before, total = sums.get(one.group, (0.0, 0.0))
        sums[one.group] = before + weight * share, total + weight
    return {name: value / total for name, (value, total) in sums.items() if total}
