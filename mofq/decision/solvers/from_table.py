"""A problem from the rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from mofq.decision.solvers.kv_cache import CacheRequest, cache_groups
from mofq.decision.solvers.problem import (
    KL_UNIT,
    Objective,
    Option,
    Problem,
    ProblemGroup,
    build_problem,
)
from mofq.decision.solvers.rows import complete, option_of
from mofq.evidence.table import UNITS, Row, Table, TableGroup, TableSpace
from mofq.exceptions import TableError, nearest_name

_UNQUANTIZED = "bf16"
#: ``‖ΔW‖²/‖W‖²`` of a fusion group, which the table keeps as ``sqnr_db`` beside every error:
#: MoFQ's tensor error (arXiv:2305.12356), of the weights alone.
TENSOR_MSE = "tensor_mse"
#: The most telling first.
_PREFERRED_UNITS = (KL_UNIT, "output_mse", "relative_weight_error")

#: Whether a fusion group may have a scheme: what an engine adds.
Legal = Callable[[TableGroup, str], bool]


def problem_from_table(
    table: Table,
    *,
    unit: str | None = None,
    corpora: Sequence[str] | None = None,
    objective: Objective = "mean",
    space: str | None = None,
    is_legal: Legal | None = None,
    caches: CacheRequest | None = None,
) -> Problem:
    """What a table offers, as a problem for the solvers.

    Args:
        table: With rows of every fusion group.
        unit: Of the errors; by default nats where every group has them, else the output
            error, else the relative weight error. Or ``tensor_mse``.
        corpora: Names; by default all that have rows in the unit.
        objective: What several corpora add up to.
        space: Only the schemes, base and min_gain of this search space; by default those of
            all spaces of the table together, with the largest min_gain.
        is_legal: Which schemes a fusion group may have; by default all that are measured.
        caches: How the format of the KV cache is decided too; by default it is not.

    Returns:
        The problem; within each group the simplest scheme first.

    Raises:
        TableError: The unit, corpus or space is not in the table, or a group has no row.
    """
    unit = _unit(table, unit)
    names = _corpora(table, _unit_of_rows(table, unit), corpora)
    spaces = _spaces(table, space)
    schemes = {name for one in spaces for name in one.schemes} | {_UNQUANTIZED}
    groups = _layer_groups(table, unit, names, schemes if spaces else None, is_legal)
    if caches is not None:
        groups += cache_groups(
            table, unit, names, schemes=schemes if spaces else None, asked=caches
        )
    return build_problem(
        groups,
        unit=unit,
        corpora=tuple(names),
        objective=objective,
        base=tuple(dict.fromkeys(name for one in spaces for name in one.base)),
        other_bytes=table.header.other_bytes,
        min_gain=max((one.min_gain for one in spaces), default=10.0),
        kv_tokens=0 if caches is None else caches.tokens,
        one_format=caches is not None and caches.one_format,
    )


def _unit_of_rows(table: Table, unit: str) -> str:
    return _unit(table, None) if unit == TENSOR_MSE else unit


def _layer_groups(
    table: Table,
    unit: str,
    corpora: Sequence[str | None],
    schemes: Collection[str] | None,
    is_legal: Legal | None,
) -> list[tuple[ProblemGroup, list[Option]]]:
    """Each fusion group with its options; ``schemes`` None: all that were measured."""
    of_rows = _unit_of_rows(table, unit)
    by_corpus = [table.rows_of(of_rows, name) for name in corpora]
    to_option = _tensor_option if unit == TENSOR_MSE else option_of
    groups = []
    for group in table.header.groups:
        rows = complete(group.name, of_rows, corpora, [found[group.name] for found in by_corpus])
        legal = [
            one
            for one in rows
            if (schemes is None or one[0].scheme in schemes)
            and (is_legal is None or is_legal(group, one[0].scheme))
        ]
        _require_one(group.name, legal, rows)
        offered = [one[0].scheme for one in legal]
        groups.append((_group(group, offered), list(map(to_option, legal))))
    return groups


def _require_one(group: str, legal: Sequence[Sequence[Row]], rows: Sequence[Sequence[Row]]) -> None:
    if not legal:
        raise TableError(
            f"{group}: none of its measured schemes may be chosen"
            + f" ({', '.join(row[0].scheme for row in rows)}). Measure a space that offers one."
        )


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


def _corpora(table: Table, unit: str, corpora: Sequence[str] | None) -> list[str | None]:
    known = [corpus for one, corpus in table.measures if one == unit]
    named = [name for name in known if name is not None]
    if corpora is None:
        return list(named or known or [None])
    for name in corpora:
        if name not in named:
            raise TableError(
                f"no rows in {unit} are of the corpus {name!r}."
                + (nearest_name(name, named) if named else " This unit rests on no corpus.")
            )
    return list(dict.fromkeys(corpora))


def _spaces(table: Table, name: str | None) -> Sequence[TableSpace]:
    if name is None:
        return table.spaces
    found = [one for one in table.spaces if one.name == name]
    if not found:
        names = [one.name for one in table.spaces]
        raise TableError(f"the search space {name!r} was not measured." + nearest_name(name, names))
    return found[-1:]


def _group(group: TableGroup, schemes: Collection[str]) -> ProblemGroup:
    return ProblemGroup(
        name=group.name,
        layers=tuple(layer.name for layer in group.layers),
        weights=group.weights,
        counted=any(name != _UNQUANTIZED for name in schemes),
    )


def _tensor_option(rows: Sequence[Row]) -> Option:
    error = 0.0 if rows[0].sqnr_db is None else 10 ** (-rows[0].sqnr_db / 10)
    return Option(rows[0].scheme, bytes=rows[0].bytes, errors=(error,) * len(rows))
