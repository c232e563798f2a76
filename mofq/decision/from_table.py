"""From a table and a request to a problem: the rows that may be chosen, as options of groups."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from mofq.decision.offered_schemes import Legal, Offers, engine_legality, spaces_of
from mofq.decision.problem import (
    KL_UNIT,
    FloatArray,
    Option,
    Problem,
    ProblemGroup,
    build_problem,
)
from mofq.decision.request import Request, weights_in_order
from mofq.engines import cache_legality
from mofq.evidence.constraints import UNQUANTIZED
from mofq.evidence.table import UNITS, Row, Table, TableGroup
from mofq.exceptions import TableError, nearest_name, option
from mofq.model.kv_schemes import cache_bits, parse_cache_scheme
from mofq.model.layers import CacheLayer
from mofq.model.sizes import shape_bytes
from mofq.numbers.schemes import parse_scheme

#: ``‖ΔW‖²/‖W‖²`` of a fusion group, which the table keeps as ``sqnr_db`` beside every error:
#: MoFQ's tensor error (arXiv:2305.12356), of the weights alone.
TENSOR_MSE = "tensor_mse"
#: The most telling first.
_PREFERRED_UNITS = (KL_UNIT, "output_mse", "relative_weight_error")


def request_problem(
    table: Table,
    request: Request | None = None,
    *,
    is_legal: Legal | None = None,
    is_constrained: bool = True,
    has_all_rows: bool = False,
) -> Problem:
    """What a table offers, as a problem for the solvers.

    Args:
        table: With rows of every fusion group.
        request: By default all that was measured. Its unit is nats, unless it names one, where
            every group has them, else the output error, else the relative weight error; it may be
            ``tensor_mse``. Its search space: only what this offers to each fusion group, its base
            and its min_gain; by default what any space of the table offers, with the largest
            min_gain. Its constraints stand beside those of the space.
        is_legal: Which schemes a fusion group may have; by default those that the engine serves.
        is_constrained: Whether constraints count, those of the space included.
        has_all_rows: Whether a group may have all that is measured, whatever engine, constraints
            and spaces say: to price recipes that other requests decided.

    Returns:
        The problem; within each group the simplest scheme first.

    Raises:
        EngineError: There is no such engine, or it does not load the table's model.
        TableError: The unit or space is not in the table, or a group has no row; the weights
            are not of the table's corpora; or the cache is asked for, and the table has no
            formats of it in nats.
        SearchSpaceError: A constraint names no layer, or some leave a group no scheme.
    """
    request = request or Request()
    if has_all_rows:
        request = replace(request, engine=None, constraints=(), kv_formats=None)
    is_legal = is_legal or engine_legality(request.engine, table.header)
    unit = _unit(table, request.unit)
    unit_of_rows = _unit(table, None) if unit == TENSOR_MSE else unit
    names = _corpora(table, unit_of_rows)
    spaces = spaces_of(table, request.space)
    offers = Offers(
        table,
        () if has_all_rows else spaces,
        is_legal=is_legal,
        constraints=request.constraints,
        is_constrained=is_constrained,
    )
    if request.kv_cache:
        _check_caches(table, unit)
    by_corpus = [table.rows_of(unit_of_rows, name) for name in names]
    rows_of = partial(_complete, unit_of_rows, names, by_corpus)

    groups = []
    for group in table.header.groups:
        rows = rows_of(group.name)
        offer = offers.of(group, {one[0].scheme: one[0].bytes for one in rows})
        offered = [one for one in rows if one[0].scheme in offer.schemes]
        groups.append(_layer_group(group, unit, offered, rows))
    if request.kv_cache:
        formats = {name for one in spaces for name in one.schemes} | {UNQUANTIZED}
        may_have = _cache_legality(request, formats if spaces and not has_all_rows else None)
        for cache in table.caches:
            legal = [one for one in rows_of(cache.name) if may_have(one[0].scheme, cache)]
            groups.append(_cache_group(cache, legal))
    return build_problem(
        groups,
        unit=unit,
        corpora=tuple(names),
        corpus_weights=_corpus_weights(request.corpus_weights, names, unit),
        objective=request.objective,
        base=tuple(dict.fromkeys(name for one in spaces for name in one.base)),
        other_bytes=table.header.other_bytes,
        min_gain=max((one.min_gain for one in spaces), default=10.0),
        kv_tokens=request.kv_tokens if request.kv_cache else 0,
        # An engine keeps one format for the whole model, and leaves single layers as they are.
        one_format=request.kv_cache and request.engine is not None,
        flip_FC=_flips(table, [group for group, _ in groups], names) if unit == KL_UNIT else None,
        flip_stderr_C=_flip_stderrs(table, names) if unit == KL_UNIT else None,
    )


def _cache_legality(
    request: Request, offered: Container[str] | None
) -> Callable[[str, CacheLayer], bool]:
    """Whether a layer's cache may have a format, of those that spaces offer; None: of all."""
    refuses = None if request.engine is None else cache_legality(request.engine)

    def may_have(scheme: str, cache: CacheLayer) -> bool:
        asked = request.kv_formats
        if asked is not None and scheme != UNQUANTIZED and scheme not in asked:
            return False
        if offered is not None and scheme not in offered:
            return False
        return refuses is None or refuses(scheme, cache) is None

    return may_have


def _flips(
    table: Table, groups: Sequence[ProblemGroup], corpora: Sequence[str | None]
) -> FloatArray | None:
    """What each group's errors cost by changes of experts, [F, C]; None: nothing is known of it."""
    rates = {one.corpus: one.rates for one in table.flips}
    if not rates:
        return None
    return np.array([[rates.get(c or "", {}).get(g.name, 0.0) for c in corpora] for g in groups])


def _flip_stderrs(table: Table, corpora: Sequence[str | None]) -> tuple[float, ...] | None:
    """The standard error of what changes of experts cost, as a share of it, of each corpus."""
    known = {one.corpus: one.stderr or 0.0 for one in table.flips}
    return tuple(known.get(c or "", 0.0) for c in corpora) if known else None


def _unit(table: Table, unit: str | None) -> str:
    if unit is not None:
        known = (*UNITS, TENSOR_MSE)
        if unit not in known:
            raise TableError(f"no errors are in {unit!r}." + nearest_name(unit, known))
        return unit
    groups = {group.name for group in table.header.groups}
    for one in _PREFERRED_UNITS:
        if {row.group for row in table.rows if row.unit == one} >= groups:
            return one
    measured = {row.group for row in table.rows} & groups
    missing = next(group.name for group in table.header.groups if group.name not in measured)
    raise TableError(
        f"The table has no row of {missing} ({len(measured)} of {len(groups)} fusion groups are "
        f"measured). Run the same `mofq measure` again; it resumes."
    )


def _corpora(table: Table, unit: str) -> list[str | None]:
    """All that have rows in a unit; None where it rests on no corpus."""
    known = [corpus for one, corpus in table.measures if one == unit]
    return [name for name in known if name is not None] or known or [None]


def _corpus_weights(
    weights: Mapping[str, float] | None, names: Sequence[str | None], unit: str
) -> tuple[float, ...] | None:
    if weights is None:
        return None
    corpora = [name for name in names if name is not None]
    if not corpora:
        raise TableError(
            f"{option('corpus_weights')}: errors are in {unit}, which rests on no corpus. Run "
            f"`mofq calibrate`, then `mofq measure --stats`, or leave the weights out."
        )
    return weights_in_order(weights, corpora)


def _check_caches(table: Table, unit: str) -> None:
    if not table.caches:
        raise TableError(
            "the format of the KV cache is decided in nats, on rows of it, and the table has none. "
            "Measure a search space with the key `kv_cache`, on stats of `mofq calibrate "
            "--kv-cache`."
        )
    if unit != KL_UNIT:
        raise TableError(
            f"the format of the KV cache is decided in nats, and errors are in {unit}: leave "
            f"{option('unit')} out."
        )


def _complete(
    unit: str,
    corpora: Sequence[str | None],
    by_corpus: Sequence[Mapping[str, Sequence[Row]]],
    name: str,
) -> list[list[Row]]:
    """For each scheme of a fusion group, or cache, its row of every corpus."""
    by_scheme: dict[str, list[Row]] = {}
    for found in by_corpus:
        for row in found[name]:
            by_scheme.setdefault(row.scheme, []).append(row)
    again = "Run the same `mofq measure` again."
    if not by_scheme:
        raise TableError(f"{name}: has no row in {unit}. {again}")
    for scheme, rows in by_scheme.items():
        if len(rows) < len(corpora):
            missing = {str(one) for one in corpora} - {str(row.corpus) for row in rows}
            raise TableError(
                f"{name}: {scheme} has no row of the corpus {min(missing)!r}, and the others "
                f"have. {again}"
            )
    return list(by_scheme.values())


def _layer_group(
    group: TableGroup, unit: str, legal: Sequence[list[Row]], rows: Sequence[list[Row]]
) -> tuple[ProblemGroup, list[Option]]:
    """A fusion group with its options, of all rows those that it may have."""
    if not legal:
        raise TableError(
            f"{group.name}: none of its measured schemes may be chosen"
            f" ({', '.join(one[0].scheme for one in rows)}). Measure a space that offers one."
        )
    to_option = _tensor_option if unit == TENSOR_MSE else _option
    problem_group = ProblemGroup(
        name=group.name,
        layers=group.layer_names,
        weights=group.weights,
        counted=any(one[0].scheme != UNQUANTIZED for one in legal),
    )
    options = map(to_option, legal)
    return problem_group, [
        replace(one, shape_bytes=shape_bytes(parse_scheme(one.scheme), len(group.layers)))
        for one in options
    ]


def _cache_group(
    cache: CacheLayer, legal: Sequence[list[Row]]
) -> tuple[ProblemGroup, list[Option]]:
    """An attention layer's cache as a group with its options."""
    options = [
        replace(_option(one), cache_bits=cache_bits(parse_cache_scheme(one[0].scheme), cache))
        for one in legal
    ]
    group = ProblemGroup(cache.name, (cache.name,), weights=0, counted=False, cached=cache.numbers)
    return group, options


def _option(rows: Sequence[Row]) -> Option:
    """The option of one scheme, from its row of every corpus."""
    stderrs = [row.stderr for row in rows if row.stderr is not None]
    samples = [row.sample_errors for row in rows if row.sample_errors is not None]
    return Option(
        rows[0].scheme,
        bytes=rows[0].bytes,
        errors=tuple(row.error for row in rows),
        stderrs=tuple(stderrs) if len(stderrs) == len(rows) else None,
        sample_errors=tuple(samples) if len(samples) == len(rows) else None,
        answers=tuple(row.answers for row in rows),
    )


def _tensor_option(rows: Sequence[Row]) -> Option:
    error = 0.0 if rows[0].sqnr_db is None else 10 ** (-rows[0].sqnr_db / 10)
    return Option(rows[0].scheme, bytes=rows[0].bytes, errors=(error,) * len(rows))
