"""What fitted codes would cost where they were not measured: guessed from those that were.

A fitted scheme takes about eight times as long to measure as one that rounds, and most fusion
groups would not choose it. How much fitting saves depends on the format and the kind of layer far
more than on the decoder layer. So twins are measured in a few fusion groups of each kind, guessed
in the others, and a search over measured and guessed rows says where the next measurement pays.

A guess is the rounded scheme's row times the median ratio that was measured of that twin in groups
of its kind, before any is measured the usual ratio of its number of bits. Where other twins of the
group are measured, the ratio is larger or smaller by as much as theirs are: groups differ, and a
group's twins are alike. No recipe rests on a guess: what is chosen is measured, and chosen again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import geometric_mean, median

from mofq.decision.problem import KL_UNIT
from mofq.evidence.table import Row, Table, TableGroup
from mofq.numbers.schemes import parse_scheme

#: An error that fitting removes altogether is taken for so small a share of it.
_LEAST_RATIO = 1e-3
#: Of how many fusion groups of a kind one is a pilot, and how many are at most.
_GROUPS_OF_A_PILOT, _MOST_PILOTS = 8, 3
#: Bits of a twin's codes -> the usual ratio; of more bits than these it is 1.
_USUAL = {2: 0.3, 3: 0.3, 4: 0.35, 5: 0.45, 6: 0.6, 7: 0.75, 8: 0.85}

#: Twin -> the schemes that it may take the place of.
Twins = Mapping[str, Sequence[str]]
#: Fusion group -> twins.
Asked = Mapping[str, Iterable[str]]


def pilot_groups(groups: Sequence[TableGroup]) -> tuple[str, ...]:
    """A few fusion groups of each kind, spread over the decoder layers, in their order."""
    by_kind: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for group in groups:
        by_kind[_kind(group)].append(group.name)
    chosen: set[str] = set()
    for names in by_kind.values():
        count = min(_MOST_PILOTS, -(-len(names) // _GROUPS_OF_A_PILOT))
        chosen |= {names[(2 * n + 1) * len(names) // (2 * count)] for n in range(count)}
    return tuple(group.name for group in groups if group.name in chosen)


def _kind(group: TableGroup) -> tuple[object, ...]:
    """What fusion groups have alike that fitting does alike."""
    return tuple(sorted({(one.module, one.in_features) for one in group.layers}))


def rows_for(table: Table, twins: Twins, asked: Asked) -> Table:
    """A table without the twins' rows but those that were asked for, whoever measured others."""
    has = {group: set(names) for group, names in asked.items()}
    rows = [
        row for row in table.rows if row.scheme not in twins or row.scheme in has.get(row.group, ())
    ]
    return replace(table, rows=tuple(rows))


def with_guesses(table: Table, twins: Twins, *, asked: Asked) -> Table:
    """Add a guessed row of each twin that was not asked for yet.

    Args:
        table: In nats; with the rows of some twins.
        twins: Fitted schemes.
        asked: Those that were measured, or could not be: of them nothing is guessed.

    Returns:
        The table with the guesses.
    """
    rows = _nats(table)
    ratio_of = _ratios(table, twins, rows)
    guessed: list[Row] = []
    for group in table.header.groups:
        done = set(asked.get(group.name, ()))
        for twin, rounded in twins.items():
            by_corpus = _best(rows[group.name], rounded)
            if twin in done or by_corpus is None:
                continue
            guessed += [_times(row, ratio_of(twin, group), twin) for row in by_corpus]
    return replace(table, rows=(*table.rows, *guessed))


#: Scheme -> its row of each corpus, of one fusion group.
_Rows = Mapping[str, Sequence[Row]]


def _nats(table: Table) -> dict[str, dict[str, list[Row]]]:
    found: dict[str, dict[str, list[Row]]] = {one.name: {} for one in table.header.groups}
    for row in table.rows:
        if row.unit == KL_UNIT and row.group in found:
            found[row.group].setdefault(row.scheme, []).append(row)
    return found


def _best(rows: _Rows, rounded: Sequence[str]) -> Sequence[Row] | None:
    """The rows of the best of the schemes that a twin may take the place of."""
    measured = [rows[name] for name in rounded if name in rows]
    return min(measured, key=_error, default=None)


def _error(rows: Sequence[Row]) -> float:
    return sum(row.error for row in rows)


def _ratios(
    table: Table, twins: Twins, rows: Mapping[str, _Rows]
) -> Callable[[str, TableGroup], float]:
    """What fitting does to the error of a group, by twin and fusion group."""
    by_group: dict[str, dict[str, float]] = {}
    found: dict[object, list[float]] = defaultdict(list)
    for group in table.header.groups:
        for twin, rounded in twins.items():
            of_twin, best = rows[group.name].get(twin), _best(rows[group.name], rounded)
            if of_twin is None or best is None or not _error(best) > 0:
                continue
            ratio = max(_error(of_twin) / _error(best), _LEAST_RATIO)
            by_group.setdefault(group.name, {})[twin] = ratio
            found[twin, _kind(group)].append(ratio)
            found[twin].append(ratio)

    def usual(twin: str, group: TableGroup) -> float:
        """Of groups of its kind, else of all, else of its bits."""
        some = found.get((twin, _kind(group))) or found.get(twin)
        if not some:
            return _USUAL.get(parse_scheme(twin).quantized_weight.element.bits, 1.0)
        return median(some)

    def ratio_of(twin: str, group: TableGroup) -> float:
        known = by_group.get(group.name, {})
        return usual(twin, group) * geometric_mean(
            [1.0, *(ratio / usual(one, group) for one, ratio in known.items())][bool(known) :]
        )

    return ratio_of


def _times(row: Row, ratio: float, twin: str) -> Row:
    """A row as that of a twin with so many times the error; its samples alike."""
    samples, answers, root = row.sample_errors, row.answers, math.sqrt(ratio)
    return replace(
        row,
        scheme=twin,
        error=ratio * row.error,
        stderr=None if row.stderr is None else ratio * row.stderr,
        sample_errors=None if samples is None else tuple(ratio * one for one in samples),
        answers=None if answers is None else tuple(tuple(root * a for a in one) for one in answers),
    )
