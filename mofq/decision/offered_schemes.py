"""What the fusion groups of a table may have: what its search spaces offer and constraints leave.

A table holds the rows of all search spaces that were ever measured into it. Which of them count is
decided here, by the spaces that a request asks for and not by what happens to be there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mofq.decision.request import Request
from mofq.decision.serving import refusals_by
from mofq.engines import find_engine, legality, model_problem
from mofq.evidence.constraints import (
    EXCLUDED,
    UNQUANTIZED,
    LayerConstraint,
    barred_schemes,
    constraints_by_group,
    excluded_groups,
    kept_schemes,
)
from mofq.evidence.table import Table, TableGroup, TableHeader, TableSpace
from mofq.exceptions import EngineError, TableError, nearest_name, option
from mofq.model.sizes import shape_bytes
from mofq.numbers.schemes import parse_scheme

#: Whether a fusion group may have a scheme: what an engine adds.
Legal = Callable[[TableGroup, str], bool]


@dataclass(frozen=True, slots=True)
class GroupOffer:
    """What one fusion group may have of what is measured."""

    schemes: tuple[str, ...]
    refused: Mapping[str, str]  #: scheme -> why a search space or a constraint takes it away


def spaces_of(table: Table, name: str | None) -> tuple[TableSpace, ...]:
    """The search spaces that a request asks for, each once: the last line of each definition.

    A definition that has all of an earlier one and more schemes takes its place.

    Args:
        table: From `mofq measure`.
        name: Of one; None: all.

    Raises:
        TableError: The table has no such space, or two under this name, or a version measured it
            that did not note what it excludes, and other spaces may have measured just that.
    """
    last: dict[tuple[str, str], TableSpace] = {}
    for one in table.spaces:
        last = {key: other for key, other in last.items() if not one.extends(other)}
        last[one.name, one.sha256] = one
    if name is None:
        return tuple(last.values())
    found = [one for one in last.values() if one.name == name]
    if not found:
        names = [one.name for one in last.values()]
        raise TableError(f"the search space {name!r} was not measured." + nearest_name(name, names))
    if len(found) > 1:
        raise TableError(
            f"the table has {len(found)} definitions of the search space {name!r}. Give the file "
            f"of the one that you mean another name, `mofq measure` it into this table, which "
            f"takes no time for rows that are there, and search with that name."
        )
    has_exclusions = any(EXCLUDED in one.reason for one in table.rejections)
    if found[0].exclude is None and len(last) > 1 and has_exclusions:
        raise TableError(
            f"the table does not say which layers the search space {name!r} excludes, and other "
            f"spaces may have measured them: an earlier mofq wrote it. Run the same "
            f"`mofq measure --space` once more, which notes it."
        )
    return tuple(found)


def asked_constraints(table: Table, request: Request) -> tuple[LayerConstraint, ...]:
    """The constraints of a request, and before them those of the search spaces it asks for."""
    spaces = spaces_of(table, request.space)
    of_spaces = (one for space in spaces for one in space.constraints)
    return tuple(dict.fromkeys([*of_spaces, *request.constraints]))


class Offers:
    """What each fusion group of a table may have."""

    def __init__(
        self,
        table: Table,
        spaces: Sequence[TableSpace],
        *,
        is_legal: Legal | None = None,
        constraints: Sequence[LayerConstraint] = (),
        is_constrained: bool = True,
    ) -> None:
        """Look up which groups the selectors name.

        Args:
            table: From `mofq measure`.
            spaces: That are asked for; none offer all that was measured.
            is_legal: What an engine adds.
            constraints: Of the request.
            is_constrained: Whether constraints count, those of the spaces included.

        Raises:
            SearchSpaceError: A constraint names no layer.
        """
        groups = table.header.groups
        self._is_legal = is_legal
        self._spaces = spaces
        asked = constraints if is_constrained else ()
        self._asked = constraints_by_group(asked, groups, asked=asked)
        self._of_space = [
            constraints_by_group(one.constraints if is_constrained else (), groups)
            for one in spaces
        ]
        self._excluded = [excluded_groups(one.exclude or (), groups) for one in spaces]
        self._kept = {name: names for one in table.spaces for name, names in one.stored}

    def of(self, group: TableGroup, sizes: Mapping[str, int]) -> GroupOffer:
        """What a fusion group may have.

        Args:
            group: Of the table.
            sizes: Scheme with a row -> bytes [bytes].

        Raises:
            SearchSpaceError: Constraints leave nothing of what the spaces offer.
        """
        legal = [one for one in sizes if self._is_legal is None or self._is_legal(group, one)]
        asked = self._asked.get(group.name, ())
        if not self._spaces:
            return self._constrained(group, sizes, legal, asked, None, asked)
        is_one = len(self._spaces) == 1
        schemes: set[str] = set()
        refused: dict[str, str] = {}
        for space, of_space, excluded in zip(
            self._spaces, self._of_space, self._excluded, strict=True
        ):
            why = excluded.get(group.name)
            offered = _offered(space, legal, is_excluded=why is not None)
            # Together, so that a message names what contradicts what.
            constraints = (*of_space.get(group.name, ()), *(asked if is_one else ()))
            one = self._constrained(group, sizes, offered, constraints, why, asked)
            apart = why or f"not offered by the search space {space.name}"
            refused |= dict.fromkeys((name for name in legal if name not in offered), apart)
            refused |= one.refused
            schemes |= set(one.schemes)
        kept = [name for name in legal if name in schemes]
        left = self._constrained(group, sizes, kept, () if is_one else asked, None, asked)
        refused = {name: why for name, why in refused.items() if name not in schemes}
        return GroupOffer(left.schemes, refused | dict(left.refused))

    def _constrained(
        self,
        group: TableGroup,
        sizes: Mapping[str, int],
        offered: Sequence[str],
        constraints: Sequence[LayerConstraint],
        because: str | None,
        asked: Sequence[LayerConstraint],
    ) -> GroupOffer:
        """What constraints leave; nothing where nothing is offered."""
        if not offered:
            return GroupOffer((), {})
        shapes = {name: shape_bytes(parse_scheme(name), len(group.layers)) for name in offered}
        could = {name: sizes[name] - shapes[name] for name in offered}  # what bits count
        kept = kept_schemes(group, self._kept, group.source_bytes)
        barred = barred_schemes(constraints, group, could, asked=asked, because=because, kept=kept)
        return GroupOffer(tuple(name for name in offered if name not in barred), barred)


def _offered(space: TableSpace, legal: Sequence[str], *, is_excluded: bool) -> list[str]:
    """The schemes that a space offers of those that a group has rows of and an engine serves."""
    if is_excluded:
        return [name for name in legal if name == UNQUANTIZED]
    if space.candidates is None:  # of an earlier version, which noted no more than this
        return [name for name in legal if name in (*space.schemes, UNQUANTIZED)]
    firsts = {next((name for name in some if name in legal), None) for some in space.candidates}
    return [name for name in legal if name in firsts]


def engine_legality(engine: str | None, header: TableHeader) -> Legal | None:
    """Which schemes an engine lets a fusion group have; None: no engine was named.

    Raises:
        EngineError: No engine has that name, or it does not load the table's model.
    """
    if engine is None:
        return None
    model_type = header.model.model_type
    if problem := model_problem(find_engine(engine), model_type, header.groups):
        raise EngineError(f"{problem}. Leave {option('engine')} out, or name another.")
    refuses = legality(engine, model_type)
    return lambda group, scheme: refuses(parse_scheme(scheme), group) is None


def refused_schemes(table: Table, request: Request) -> dict[str, dict[str, str]]:
    """Fusion group, or cache -> scheme that it may not have -> why: space, constraint, engine."""
    refused: dict[str, dict[str, str]] = {}
    of_others = _reasons_of_other_engines(table, request.engine)
    for one in table.rejections:
        if not one.reason.startswith(of_others):
            refused.setdefault(one.group, {})[one.scheme] = one.reason
    sizes: dict[str, dict[str, int]] = {}
    for row in table.rows:
        sizes.setdefault(row.group, {})[row.scheme] = row.bytes
    offers = Offers(
        table,
        spaces_of(table, request.space),
        is_legal=engine_legality(request.engine, table.header),
        constraints=request.constraints,
    )
    for group in table.header.groups:
        found = refused.setdefault(group.name, {})
        offer = offers.of(group, sizes.get(group.name, {}))
        for name in offer.schemes:  # that another space excluded
            found.pop(name, None)
        found |= offer.refused
    if request.engine is not None:
        refuses = refusals_by(request.engine, table)
        for name, measured in sizes.items():
            for scheme in sorted(measured):
                if (reason := refuses(name, scheme)) is not None:
                    refused.setdefault(name, {})[scheme] = reason
    return refused


def _reasons_of_other_engines(table: Table, engine: str | None) -> tuple[str, ...]:
    """How reasons begin that are no longer any: of other engines, where this one was measured too.

    They all begin with the engine's title, its name and version.
    """
    measured = {one.engine for one in table.spaces if one.engine is not None}
    if engine not in measured:
        return ()
    named = {one: one.partition(":")[0].partition("@")[0] for one in measured}
    return tuple(f"{name} " for name in sorted({*named.values()} - {named[engine]}))
