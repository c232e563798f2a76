"""What a recipe is predicted to cost, with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mofq.decision.flip_costs import flip_costs, flip_stderr, with_flips
from mofq.decision.model_error import ModelError, model_error, row_error
from mofq.decision.problem import (
    KL_UNIT,
    FloatArray,
    IntArray,
    Problem,
    with_samples,
)
from mofq.evidence.standard_error import standard_error

#: Fewer samples than this in each half, and a choice made on one says nothing.
_LEAST_IN_HALF = 2

#: A 95 % interval reaches so many standard errors to both sides.
INTERVAL_STDERRS = 2.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its standard error, in the problem's unit (nats per token)."""

    value: float
    stderr: float | None  #: None: not known
    #: Whether it is of the very samples that a recipe was chosen on, and flatters that.
    is_in_sample: bool = False

    @property
    def upper(self) -> float:
        """Two standard errors above, an end of the 95 % interval: budgets are held against it."""
        return math.inf if self.stderr is None else self.value + INTERVAL_STDERRS * self.stderr

    @property
    def lower(self) -> float:
        """The other end of the 95 % interval; a KL is not below 0."""
        return 0.0 if self.stderr is None else max(0.0, self.value - INTERVAL_STDERRS * self.stderr)

    @property
    def is_out_of_range(self) -> bool:
        """Whether it is larger than any that was compared with measurements."""
        return self.value > model_error().largest


def estimate(values: Sequence[float] | FloatArray) -> Estimate:
    """Mean of some values, and its standard error."""
    return Estimate(math.fsum(values) / len(values), standard_error(np.asarray(values)))


def stated(problem: Problem, expansion: Estimate) -> Estimate:
    """What is said of a recipe whose errors amount to something by the second-order expansion.

    Args:
        problem: That the recipe is of.
        expansion: The sum of its errors, with the standard error of the sampling of sequences.

    Returns:
        In nats, the KL that recipes of such a sum measure on other text of the kind, by the error
        model of their kind (`mofq.decision.model_error`). In other units the same.
    """
    return expansion if problem.unit != KL_UNIT else with_model_error(expansion, error_of(problem))


def error_of(problem: Problem) -> ModelError:
    """What predictions of its recipes are off by."""
    return model_error(has_flips=problem.flip_FC is not None)


def with_model_error(expansion: Estimate, model: ModelError) -> Estimate:
    """An expansion in nats, corrected; its standard error and the model's add in quadrature."""
    value = model.corrected(expansion.value)
    if expansion.stderr is None:
        return replace(expansion, value=value)
    sampling = model.slope(expansion.value) * expansion.stderr
    return replace(expansion, value=value, stderr=math.hypot(sampling, model.stderr(value)))


def predict_row(problem: Problem, option: int) -> Estimate:
    """The error of one option by itself, all other groups left as they are.

    Args:
        problem: What might be chosen.
        option: Of a fusion group or a cache.

    Returns:
        In nats, its term of the sum over groups, of tokens that stay with their experts; the
        standard error is of the samples and of what rows measure by themselves
        (`mofq.decision.model_error.row_error`). In other units of the samples alone.
    """
    value, stderr = float(problem.cost_PK[option].max()), math.inf
    if problem.stderr_PC is not None:
        stderr_C, worst = problem.stderr_PC[option], int(problem.error_PC[option].argmax())
        is_mean = problem.objective == "mean"
        stderr = float(problem.stderr_of_mean(stderr_C) if is_mean else stderr_C[worst])
    row = Estimate(value, stderr if math.isfinite(stderr) else None)
    return row if problem.unit != KL_UNIT else with_model_error(row, row_error())


def predict(problem: Problem, choice_F: IntArray) -> Estimate:
    """The error of a recipe on the samples of the table.

    Args:
        problem: Errors, and samples where the table has them.
        choice_F: One option of each fusion group.

    Returns:
        The sum of the errors of its choices, and what they do together; its standard error is
        that of the sums of each sample, since all groups share their samples, with that of what
        changes of experts cost. A recipe that was
        chosen on these very samples looks better here than it is; `predict_chosen` corrects that.
    """
    if problem.sample_errors is None:
        return Estimate(problem.error_of(choice_F), stderr=None)
    found = _combine(problem, sample_sums(problem, choice_F))
    return with_flip_noise(problem, found, flip_costs(problem, choice_F))


def predict_given(problem: Problem, choice_F: IntArray) -> Estimate:
    """What is said of a recipe that was not chosen on the samples, as a uniform one.

    Returns:
        As `stated` says it, of what `predict` finds.
    """
    return stated(problem, predict(problem, choice_F))


def with_flip_noise(problem: Problem, estimate: Estimate, cost_C: FloatArray) -> Estimate:
    """An estimate whose standard error has that of what changes of experts cost too.

    Args:
        problem: That it is of.
        estimate: Of a recipe, or of a difference of two.
        cost_C: What changes of experts cost it, or the difference.
    """
    if estimate.stderr is None:
        return estimate
    return replace(estimate, stderr=math.hypot(estimate.stderr, flip_stderr(problem, cost_C)))


def error_together(problem: Problem, choice_F: IntArray) -> float:
    """The objective's value for a recipe, with what its groups do together.

    Args:
        problem: What might be chosen.
        choice_F: One option of each fusion group.

    Returns:
        Of the mean over corpora, or of the worst of them, in the problem's unit.
    """
    if not problem.acts_together or problem.sample_errors is None:
        return problem.error_of(choice_F)
    mean_C = errors_by_corpus(problem, choice_F)
    if problem.objective == "worst-corpus":
        return max(mean_C)
    weight_C = problem.corpus_weights
    return math.fsum(w * e for w, e in zip(weight_C, mean_C, strict=True)) / math.fsum(weight_C)


def errors_by_corpus(problem: Problem, choice_F: IntArray) -> list[float]:
    """What a recipe costs on each corpus by itself, on the samples of the table.

    Args:
        problem: What might be chosen.
        choice_F: One option of each fusion group.
    """
    if not problem.acts_together or problem.sample_errors is None:
        return [math.fsum(column) for column in problem.error_PC[choice_F].T]
    return [math.fsum(sums) / len(sums) for sums in sample_sums(problem, choice_F)]


def crossfit(
    problem: Problem,
    choose: Callable[[Problem], IntArray],
    *,
    instead: tuple[IntArray, IntArray] | None = None,
) -> Estimate | None:
    """The error of a recipe that is chosen as ``choose`` does, without the optimism of choosing.

    The samples are cut into a first and a second half (neighbours are alike, and stay
    together); a recipe is chosen on one half and predicted on the other, and the
    reverse. An optimum over noisy estimates is partly the luck of its samples,
    which the other half does not share.

    Args:
        problem: With sample errors.
        choose: From a problem with half of the samples to one option of each group,
            under the budgets of the recipe.
        instead: What is chosen on all samples, and another choice whose error is wanted: what
            it costs more, sample by sample, is added.

    Returns:
        The prediction; None where there are no samples, or fewer than four.
    """
    if not is_crossfitted(problem):
        return None
    assert problem.sample_errors is not None
    counts = [e_PN.shape[1] for e_PN in problem.sample_errors]
    halves = [[np.arange(n // 2) for n in counts], [np.arange(n // 2, n) for n in counts]]
    folds = []
    for half, other in (halves[::-1], halves):
        part, choice_F = with_samples(problem, other), choose(with_samples(problem, half))
        sums = sample_sums(part, choice_F)
        if instead is not None:
            before, after = (sample_sums(part, each_F) for each_F in instead)
            more = zip(sums, before, after, strict=True)
            sums = [one + (b - a) for one, a, b in more]
        folds.append(sums)
    return _combine(problem, [np.concatenate(pair) for pair in zip(*folds, strict=True)])


def is_crossfitted(problem: Problem) -> bool:
    """Whether there are samples enough for `crossfit`."""
    errors = problem.sample_errors
    return errors is not None and min(e.shape[1] for e in errors) >= 2 * _LEAST_IN_HALF


def paired_loss(problem: Problem, choice_F: IntArray, other_F: IntArray) -> Estimate:
    """How much more a second recipe costs than a first, sample by sample.

    Args:
        problem: With sample errors.
        choice_F: The first.
        other_F: The second; its groups that choose the same cancel.

    Returns:
        The mean of the differences, positive where the second is worse.
    """
    sums = (sample_sums(problem, each_F) for each_F in (choice_F, other_F))
    found = _combine(problem, [after - before for before, after in zip(*sums, strict=True)])
    if len(choice_F) < len(problem.groups):
        return found
    more_C = flip_costs(problem, other_F) - flip_costs(problem, choice_F)
    return with_flip_noise(problem, found, more_C)


def sample_sums(problem: Problem, choice_F: IntArray) -> list[FloatArray]:
    """What some options cost in every sample, [N] for each corpus.

    Args:
        problem: With sample errors.
        choice_F: One option of each fusion group, or of some.
    """
    assert problem.sample_errors is not None
    sums = [e_PN[choice_F].sum(axis=0) for e_PN in problem.sample_errors]
    if problem.answers is not None:
        pairs = zip(sums, problem.answers, strict=True)
        sums = [errors_N + answers.products(choice_F) for errors_N, answers in pairs]
    # Of single options it is not known what they cost beside others.
    is_recipe = len(choice_F) == len(problem.groups)
    return with_flips(problem, choice_F, sums) if is_recipe else sums


def _combine(problem: Problem, samples: Sequence[FloatArray]) -> Estimate:
    """Over corpora: their weighted mean, or the one with the largest upper end."""
    each = [estimate(values_N) for values_N in samples]
    if problem.objective == "worst-corpus":
        return max(each, key=lambda one: (one.upper, one.value))
    weighted = [
        (weight, one) for weight, one in zip(problem.corpus_weights, each, strict=True) if weight
    ]
    total = math.fsum(weight for weight, _ in weighted)
    stderrs = [weight * one.stderr for weight, one in weighted if one.stderr is not None]
    stderr = math.hypot(*stderrs) / total if len(stderrs) == len(weighted) else None
    return Estimate(math.fsum(weight * one.value for weight, one in weighted) / total, stderr)
