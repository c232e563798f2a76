"""The decision as arrays: what each fusion group may get, what it costs, what it saves.

Array suffixes: P options (all fusion groups one after another), F fusion
groups, C corpora, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mofq.decision.simplicity import simplicity
from mofq.decision.size_answers import SizeAnswers, size_answers
from mofq.evidence.standard_error import standard_errors
from mofq.exceptions import TableError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

#: Over several corpora, the weighted mean of their errors or the largest.
Objective = Literal["mean", "worst-corpus"]
KL_UNIT = "kl_nats_per_token"


@dataclass(frozen=True, slots=True)
class ProblemGroup:
    """A fusion group: one decision."""

    name: str
    layers: tuple[str, ...]
    weights: int  #: of all layers
    counted: bool = True  #: in the share of finer layers; not where the space offers nothing
    cached: int = 0  #: numbers for each token, where the decision is on a KV cache


@dataclass(frozen=True, slots=True)
class Option:
    """What a fusion group may get. Every tuple has one entry for each corpus."""

    scheme: str
    bytes: int  #: in a file
    errors: tuple[float, ...]  #: in the problem's unit
    stderrs: tuple[float, ...] | None = None
    sample_errors: tuple[Sequence[float], ...] | None = None  #: their mean is the error
    cache_bits: int = 0  #: of one token in the KV cache; 0 where the decision is on layers
    #: To the change of size of the weights, of each sample; None: the size does not change.
    answers: tuple[Sequence[Sequence[float]] | None, ...] | None = None
    shape_bytes: int = 0  #: of ``bytes``, what bits per weight do not count


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """All options of all fusion groups; within a group the simplest first."""

    unit: str
    corpora: tuple[str | None, ...]
    corpus_weights: tuple[float, ...]  #: what each counts in the mean; not all zero
    objective: Objective
    groups: tuple[ProblemGroup, ...]
    start_F: IntArray  #: first option of each group, and the number of options at the end
    group_P: IntArray  #: the group of each option
    schemes: tuple[str, ...]
    bytes_P: IntArray  #: in a file
    shape_bytes_P: IntArray  #: of these, what bits per weight do not count
    error_PC: FloatArray
    stderr_PC: FloatArray | None  #: None: the unit has no error bars
    sample_errors: tuple[FloatArray, ...] | None  #: of each corpus [P, N]; None: not kept
    is_base_P: BoolArray  #: of layers; formats of a KV cache are neither base nor finer
    other_bytes: int  #: tensors of the checkpoint that are in no group
    min_gain: float
    cache_bits_P: IntArray  #: of one token in the KV cache
    size_P: IntArray  #: what a budget of size counts: ``bytes_P``, and the cache of ``kv_tokens``
    kv_tokens: int  #: of context, whose cache counts as size
    #: The format of the cache that an option is, numbered, where a recipe may have one alone;
    #: -1: it goes with any. None: all options go together.
    format_P: IntArray | None
    #: Of each corpus, to changes of size; None: not known, or no size changes.
    answers: tuple[SizeAnswers, ...] | None
    #: What a nat of each group costs by changes of experts, squared over nats [nats per token];
    #: see `mofq.decision.flip_costs`. None: no mixture, or nothing is known of its routers.
    flip_FC: FloatArray | None = None
    #: The standard error of what changes of experts cost, as a share of it.
    flip_stderr_C: tuple[float, ...] | None = None  #: None: not known

    def __post_init__(self) -> None:
        """No solver has to ask whether there is a recipe at all."""
        if not self.sets:
            raise TableError(
                "No format of the KV cache is offered for all layers, not even bf16, and engines "
                "hold one. Fix fewer layers to formats, or measure a space that offers one for all."
            )

    @property
    def acts_together(self) -> bool:
        """Whether groups may cost something together beside the sum of their errors."""
        return self.answers is not None or self.flip_FC is not None

    @property
    def cached(self) -> int:
        """Numbers that are cached for each token, where their format is decided too."""
        return sum(group.cached for group in self.groups)

    @property
    def layer_bytes_P(self) -> IntArray:
        """Bytes of options on layers alone, which bits per weight count."""
        cached_F = np.array([group.cached > 0 for group in self.groups])
        return np.where(cached_F[self.group_P], 0, self.bytes_P - self.shape_bytes_P)

    @property
    def axis_P(self) -> IntArray:
        """The size that a frontier has as its axis.

        All that a budget of size counts where a context's cache is part of it, else the
        bytes of the layers.
        """
        return self.size_P if self.kv_tokens else self.layer_bytes_P

    @property
    def sets(self) -> tuple[BoolArray, ...]:
        """The options that go together, [P] each; every recipe is of one of these sets.

        Each has options of every group.
        """
        if self.format_P is None:
            return (np.ones(len(self.schemes), dtype=np.bool_),)
        numbers = range(max(1, int(self.format_P.max()) + 1))
        together = (np.asarray((self.format_P == n) | (self.format_P < 0)) for n in numbers)
        return tuple(set_P for set_P in together if self.offers_all(set_P))

    def offers_all(self, allowed_P: BoolArray) -> bool:
        """Whether options are left to every group."""
        count_F = np.bincount(self.group_P[allowed_P], minlength=len(self.groups))
        return bool(count_F.all())

    def goes_together(self, choice_F: IntArray) -> bool:
        """Whether a choice is of one set."""
        if self.format_P is None:
            return True
        formats = self.format_P[choice_F]
        return len(np.unique(formats[formats >= 0])) <= 1

    def beside(self, choice_F: IntArray) -> BoolArray:
        """The options that may take another's place in a choice by themselves, [P]."""
        if self.format_P is None:
            return np.ones(len(self.schemes), dtype=np.bool_)
        number = int(self.format_P[choice_F].max())
        return np.asarray((self.format_P < 0) | (number < 0) | (self.format_P == number))

    @property
    def weights(self) -> int:
        """Number of weights of all groups."""
        return sum(group.weights for group in self.groups)

    def mean_over_corpora(self, values_C: FloatArray) -> FloatArray:
        """The weighted mean of what is known for each corpus, the last axis."""
        weight_C = np.array(self.corpus_weights)
        return np.asarray((values_C * weight_C).sum(axis=-1) / weight_C.sum())

    def stderr_of_mean(self, stderr_C: FloatArray) -> FloatArray:
        """The standard error of `mean_over_corpora`: corpora share no sample."""
        weight_C = np.array(self.corpus_weights)
        return np.asarray(np.sqrt(np.square(stderr_C * weight_C).sum(axis=-1)) / weight_C.sum())

    def by_objective(self, values_PC: FloatArray) -> FloatArray:
        """Their mean over corpora, one column; under ``worst-corpus`` one for each corpus."""
        if self.objective == "worst-corpus":
            return values_PC
        return self.mean_over_corpora(values_PC)[:, None]

    @property
    def cost_PK(self) -> FloatArray:
        """What is minimised: the largest of the sums of the columns."""
        return self.by_objective(self.error_PC)

    def options_of(self, group: int) -> range:
        """The options of a fusion group."""
        return range(int(self.start_F[group]), int(self.start_F[group + 1]))

    @property
    def schemes_by_group(self) -> dict[str, tuple[str, ...]]:
        """Fusion group, or cache -> every scheme that it may have."""
        ends = zip(self.groups, self.start_F[:-1], self.start_F[1:], strict=True)
        return {group.name: self.schemes[start:stop] for group, start, stop in ends}

    def error_of(self, choice_F: IntArray) -> float:
        """The sum of the errors of one option in each group, in ``unit``: what solvers minimise.

        Without what the groups do together, which `mofq.decision.prediction` adds.
        """
        return max(math.fsum(column) for column in self.cost_PK[choice_F].T)

    def bytes_of(self, choice_F: IntArray) -> int:
        """The bytes of one option in each group, without ``other_bytes``."""
        return int(self.bytes_P[choice_F].sum())

    def size_of(self, choice_F: IntArray) -> int:
        """What a budget of size counts of one option in each group, without ``other_bytes``."""
        return int(self.size_P[choice_F].sum())

    def axis_of(self, choice_F: IntArray) -> int:
        """Where one option in each group stands on the axis of a frontier [bytes]."""
        return int(self.axis_P[choice_F].sum())

    def schemes_of(self, choice_F: IntArray) -> dict[str, str]:
        """Fusion group -> scheme."""
        return {group.name: self.schemes[p] for group, p in zip(self.groups, choice_F, strict=True)}

    def choice_of(self, schemes: Mapping[str, str]) -> IntArray:
        """The inverse of `schemes_of`; a KV cache that is not named stays as it is.

        Raises:
            TableError: A group is missing, or has no such option.
        """
        choice = []
        for number, group in enumerate(self.groups):
            wanted = schemes.get(group.name, "bf16" if group.cached else None)
            found = [p for p in self.options_of(number) if self.schemes[p] == wanted]
            if not found:
                offered = ", ".join(self.schemes[p] for p in self.options_of(number))
                raise TableError(
                    f"{group.name}: the table has no error for {wanted!r} here; it has {offered}."
                )
            choice.append(found[0])
        return np.array(choice, dtype=np.int64)


def build_problem(
    groups: Sequence[tuple[ProblemGroup, Sequence[Option]]],
    *,
    unit: str = KL_UNIT,
    corpora: tuple[str | None, ...] = (None,),
    corpus_weights: tuple[float, ...] | None = None,
    objective: Objective = "mean",
    base: Sequence[str] = (),
    other_bytes: int = 0,
    min_gain: float = 10.0,
    kv_tokens: int = 0,
    one_format: bool = False,
    flip_FC: FloatArray | None = None,
    flip_stderr_C: tuple[float, ...] | None = None,
) -> Problem:
    """Arrays from options.

    Args:
        groups: Each fusion group with what it may get, at least one option.
        unit: Of the errors.
        corpora: Names, in the order of each option's tuples.
        corpus_weights: What each corpus counts in the mean; None: all the same.
        objective: What several corpora add up to.
        base: Schemes that are not finer.
        other_bytes: Tensors of the checkpoint that are in no group.
        min_gain: See `finer_is_offered`.
        kv_tokens: Of context, whose cache counts as size.
        one_format: Whether a recipe may have one quantized format of the cache alone.
        flip_FC: Rates of what changes of experts cost.
        flip_stderr_C: The standard error of that, as a share of it.

    Raises:
        TableError: A group has no option, or an option not one error for each corpus; or no
            format of the cache, where there may be one, is offered to all groups.
    """
    ordered, starts = _ordered(groups, base, corpora=len(corpora))
    bytes_P = np.array([one.bytes for one in ordered], dtype=np.int64)
    cache_bits_P = np.array([one.cache_bits for one in ordered], dtype=np.int64)
    group_P = np.repeat(np.arange(len(groups)), np.diff(starts))
    return Problem(
        unit=unit,
        corpora=corpora,
        corpus_weights=corpus_weights or (1.0,) * len(corpora),
        objective=objective,
        groups=tuple(group for group, _ in groups),
        start_F=np.array(starts, dtype=np.int64),
        group_P=group_P,
        schemes=tuple(one.scheme for one in ordered),
        bytes_P=bytes_P,
        shape_bytes_P=np.array([one.shape_bytes for one in ordered], dtype=np.int64),
        error_PC=np.array([one.errors for one in ordered], dtype=np.float64),
        stderr_PC=_stderrs(ordered),
        sample_errors=_sample_errors(ordered),
        is_base_P=_is_base(groups, ordered, group_P, base),
        other_bytes=other_bytes,
        min_gain=min_gain,
        cache_bits_P=cache_bits_P,
        size_P=bytes_P + -(-kv_tokens * cache_bits_P // 8),
        kv_tokens=kv_tokens,
        format_P=_formats(groups, ordered, starts) if one_format else None,
        answers=_answers(ordered),
        flip_FC=flip_FC,
        flip_stderr_C=flip_stderr_C,
    )


def _is_base(
    groups: Sequence[tuple[ProblemGroup, Sequence[Option]]],
    ordered: Sequence[Option],
    group_P: IntArray,
    base: Sequence[str],
) -> BoolArray:
    """Base schemes; a bf16 base is one of layers, and not of a cache that is left as it is."""
    is_cached_F = np.array([group.cached > 0 for group, _ in groups], dtype=np.bool_)
    is_base_P = np.array([one.scheme in base for one in ordered], dtype=np.bool_)
    return is_base_P & ~is_cached_F[group_P]


def _formats(
    groups: Sequence[tuple[ProblemGroup, Sequence[Option]]],
    ordered: Sequence[Option],
    starts: Sequence[int],
) -> IntArray | None:
    """The quantized formats of caches, numbered; None where there are fewer than two."""
    numbers: dict[str, int] = {}
    format_P = np.full(len(ordered), -1, dtype=np.int64)
    for (group, _), (start, stop) in zip(groups, pairwise(starts), strict=True):
        for p in range(start, stop):
            if group.cached and ordered[p].scheme != "bf16":
                format_P[p] = numbers.setdefault(ordered[p].scheme, len(numbers))
    return format_P if len(numbers) > 1 else None


def _ordered(
    groups: Sequence[tuple[ProblemGroup, Sequence[Option]]], base: Sequence[str], *, corpora: int
) -> tuple[list[Option], list[int]]:
    """All options, within a group the simplest first; where each group begins, and the end."""
    ordered: list[Option] = []
    starts = [0]
    for group, options in groups:
        wrong = next((one for one in options if len(one.errors) != corpora), None)
        if not options or wrong is not None:
            found = "no row" if wrong is None else f"{len(wrong.errors)} errors for {wrong.scheme}"
            raise TableError(
                f"{group.name}: needs a row for each of {corpora} corpora, has {found}."
            )
        ordered += sorted(options, key=lambda one: simplicity(one.scheme, base=one.scheme in base))
        starts.append(len(ordered))
    return ordered, starts


def _stderrs(options: Sequence[Option]) -> FloatArray | None:
    """Error bars, all or none; an exact option (error 0) needs none."""
    if any(one.stderrs is None and any(one.errors) for one in options):
        return None
    zeros = (0.0,) * len(options[0].errors)
    return np.array([one.stderrs or zeros for one in options], dtype=np.float64)


def _sample_errors(options: Sequence[Option]) -> tuple[FloatArray, ...] | None:
    """Arrays [P, N] of each corpus, all or none; an exact option (error 0) has zeros."""
    known = next((one.sample_errors for one in options if one.sample_errors is not None), None)
    if known is None or any(one.sample_errors is None and any(one.errors) for one in options):
        return None
    zeros = [np.zeros(len(of_corpus)) for of_corpus in known]
    return tuple(
        np.array([(one.sample_errors or zeros)[c] for one in options], dtype=np.float64)
        for c in range(len(known))
    )


def _answers(options: Sequence[Option]) -> tuple[SizeAnswers, ...] | None:
    """Of each corpus, of all or none."""
    corpora = len(options[0].errors)
    known = [one.answers or (None,) * corpora for one in options]
    found = [size_answers([one[c] for one in known]) for c in range(corpora)]
    samples = next((one.sample_errors for one in options if one.sample_errors is not None), None)
    if samples is None or not any(found):
        return None
    # Of a corpus whose rows have none, no size changes.
    return tuple(
        one or SizeAnswers(np.zeros((len(options), len(of))), np.arange(len(of)))
        for one, of in zip(found, samples, strict=True)
    )


def with_samples(problem: Problem, samples: Sequence[IntArray]) -> Problem:
    """The problem as it would be had only some samples been taken.

    Args:
        problem: With sample errors.
        samples: For each corpus, which of its samples.

    Returns:
        Errors and error bars from these samples alone.
    """
    assert problem.sample_errors is not None
    kept = tuple(e_PN[:, n] for e_PN, n in zip(problem.sample_errors, samples, strict=True))
    return replace(
        problem,
        sample_errors=kept,
        error_PC=np.stack([one.mean(axis=1) for one in kept], axis=1),
        stderr_PC=np.stack([standard_errors(one) for one in kept], axis=1),
        answers=None
        if problem.answers is None
        else tuple(one.of_samples(n) for one, n in zip(problem.answers, samples, strict=True)),
    )


def with_corpus(problem: Problem, corpus: int) -> Problem:
    """The problem as it would be if only one corpus counted, of which the index is given.

    Without error bars.
    """
    one = slice(corpus, corpus + 1)
    samples, answers, flips = problem.sample_errors, problem.answers, problem.flip_FC
    return replace(
        problem,
        corpora=problem.corpora[one],
        corpus_weights=(1.0,),
        error_PC=problem.error_PC[:, [corpus]],
        stderr_PC=None,
        sample_errors=None if samples is None else samples[one],
        answers=None if answers is None else answers[one],
        flip_FC=None if flips is None else flips[:, one],
        flip_stderr_C=problem.flip_stderr_C and problem.flip_stderr_C[one],
    )


@dataclass(frozen=True, slots=True)
class Usage:
    """Sizes and shares of a recipe."""

    bytes: int  #: of all groups
    checkpoint_bytes: int  #: with shapes, and the tensors that are in no group
    bits_per_weight: float  #: over all groups
    finer_layers: tuple[str, ...]  #: whose scheme is not a base scheme, of those that have an offer
    finer_fraction: float  #: of the layers that have an offer
    finer_weight_fraction: float  #: of their weights
    kv_bits: float | None  #: per cached number; None: the format of the cache is not decided
    kv_bytes_per_token: float | None  #: of all layers


def usage(problem: Problem, choice_F: IntArray) -> Usage:
    """Sizes and shares of one option in each fusion group.

    Without base schemes no layer counts as finer.
    """
    size = int(problem.layer_bytes_P[choice_F].sum())
    pairs = list(zip(problem.groups, choice_F, strict=True))
    counted = [group for group, _ in pairs if group.counted]
    has_base = bool(problem.is_base_P.any())
    finer = [g for g, p in pairs if has_base and g.counted and not problem.is_base_P[p]]
    layers = tuple(name for group in finer for name in group.layers)
    all_layers = sum(len(group.layers) for group in counted)
    all_weights = sum(group.weights for group in counted)
    cached, cache_bits = problem.cached, int(problem.cache_bits_P[choice_F].sum())
    return Usage(
        bytes=size,
        checkpoint_bytes=problem.bytes_of(choice_F) + problem.other_bytes,
        bits_per_weight=8 * size / problem.weights,
        finer_layers=layers,
        finer_fraction=len(layers) / all_layers if all_layers else 0.0,
        finer_weight_fraction=sum(g.weights for g in finer) / all_weights if all_weights else 0.0,
        kv_bits=cache_bits / cached if cached else None,
        kv_bytes_per_token=cache_bits / 8 if cached else None,
    )


def option_bits(problem: Problem, option: int) -> float:
    """True bits of an option, per weight or per cached number."""
    group = problem.groups[int(problem.group_P[option])]
    if group.cached:
        return int(problem.cache_bits_P[option]) / group.cached
    return 8 * int(problem.bytes_P[option] - problem.shape_bytes_P[option]) / group.weights
