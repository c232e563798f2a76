"""What a recipe costs because tokens of a mixture change their experts.

An error before a router moves its scores, and a token whose scores are nearly equal goes to another
expert. How many do grows with the size of the error, where everything else grows with its square:
beside the sum over groups a recipe costs

    sqrt(sum_g rate_g KL_g),

with rates that calibration found (`mofq.evidence.calibration.routing`). Where errors are small this
is most of what a mixture loses (docs/sensitivity.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mofq.decision.problem import FloatArray, IntArray, Problem


def flip_costs(problem: Problem, choice_F: IntArray) -> FloatArray:
    """What changes of experts cost on each corpus, [C] nats per token.

    Args:
        problem: What might be chosen.
        choice_F: One option of each fusion group.
    """
    if problem.flip_FC is None:
        return np.zeros(len(problem.corpora))
    return np.asarray(np.sqrt((problem.flip_FC * problem.error_PC[choice_F]).sum(axis=0)))


def flip_cost(problem: Problem, choice_F: IntArray) -> float | None:
    """What changes of experts cost by the objective over corpora; None: nothing is known of it."""
    if problem.flip_FC is None:
        return None
    cost_C = flip_costs(problem, choice_F)
    if problem.objective == "worst-corpus":
        return float(cost_C.max())
    return float(problem.mean_over_corpora(cost_C))


def flip_stderr(problem: Problem, cost_C: FloatArray) -> float:
    """The standard error of what changes of experts cost, over corpora by the objective.

    Args:
        problem: What might be chosen.
        cost_C: From `flip_costs`, or a difference of two.
    """
    if problem.flip_stderr_C is None:
        return 0.0
    stderr_C = np.abs(cost_C) * np.array(problem.flip_stderr_C)
    if problem.objective == "worst-corpus":
        return float(stderr_C.max())
    return float(problem.stderr_of_mean(stderr_C))


def with_flips(
    problem: Problem, choice_F: IntArray, sums: Sequence[FloatArray]
) -> list[FloatArray]:
    """What a recipe costs in every sample, changes of experts among it.

    Args:
        problem: What might be chosen.
        choice_F: One option of each fusion group.
        sums: Of each corpus [N], without them.

    Returns:
        Their means are greater by `flip_costs`; a sample differs from the mean by what the root
        makes of its difference.
    """
    found = []
    for errors_N, flips in zip(sums, flip_costs(problem, choice_F).tolist(), strict=True):
        mean = float(errors_N.mean())
        slope = flips / (2 * mean) if mean > 0 else 0.0
        found.append(errors_N + flips + slope * (errors_N - mean))
    return found


def flip_shares(problem: Problem, choice_F: IntArray) -> FloatArray:
    """Each option's share of what changes of experts cost around a choice, [P, C].

    The root is linear in an option's error while the others stay; it is concave, so that a sum of
    shares is nowhere below it, and equal at the choice.

    Args:
        problem: With rates.
        choice_F: One option of each fusion group.
    """
    assert problem.flip_FC is not None
    cost_C = flip_costs(problem, choice_F)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope_FC = np.where(cost_C > 0, problem.flip_FC / (2 * cost_C), 0.0)
    constant_C = cost_C / (2 * len(problem.groups))
    return np.asarray(slope_FC[problem.group_P] * problem.error_PC + constant_C)
