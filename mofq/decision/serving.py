"""What serving engines make of a table: what they refuse, and which of them serve a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mofq.decision.recipe import Recipe
from mofq.decision.request import Request
from mofq.engines import ENGINES, cache_legality, find_engine, legality, model_problem
from mofq.evidence.refusals import Refused, count_refusals
from mofq.evidence.table import Table
from mofq.numbers.schemes import parse_scheme


def refusals_by(engine: str, table: Table) -> Callable[[str, str], str | None]:
    """What an engine can serve of a table's fusion groups and caches, as a function.

    Args:
        engine: A name of ``mofq.engines``.
        table: Whose groups and caches are asked about.

    Returns:
        A function of the name of a group, or cache, and a scheme that gives None where the
        engine serves it as it was measured, else the reason.

    Raises:
        EngineError: No engine has that name.
    """
    check_cache = cache_legality(engine)
    model_type = table.header.model.model_type
    check = legality(engine, model_type)
    unloadable = model_problem(find_engine(engine), model_type, table.header.groups)
    groups = {group.name: group for group in table.header.groups}
    caches = {cache.name: cache for cache in table.caches}

    def refuses(name: str, scheme: str) -> str | None:
        if unloadable is not None:
            return unloadable
        if name in caches:
            return check_cache(scheme, caches[name])
        return check(parse_scheme(scheme), groups[name])

    return refuses


def serving_engines(table: Table, recipe: Recipe) -> tuple[str, ...]:
    """The engines that serve a recipe as it was measured, on one device each.

    An engine keeps the cache in one format, and leaves single layers as they are.

    Args:
        table: That the recipe was decided from.
        recipe: Of it.

    Returns:
        Names of ``mofq.engines``, in its order.
    """
    measured = {cache.name for cache in table.caches}
    cached = [one for one in recipe.kv_cache if one.name in measured]
    if len({one.scheme for one in cached} - {"bf16"}) > 1:
        return ()
    chosen = [(group.name, group.scheme) for group in recipe.groups]
    chosen += [(one.name, one.scheme) for one in cached]

    def serves(engine: str) -> bool:
        refuses = refusals_by(engine, table)
        return all(refuses(*one) is None for one in chosen)

    return tuple(engine for engine in ENGINES if serves(engine))


def engine_refusals(table: Table, request: Request) -> tuple[Refused, ...]:
    """What an engine cannot serve as it was measured, of what a search asks for.

    Args:
        table: From `mofq measure`.
        request: Its engine, None refuses nothing; its search space; its formats of the cache,
            where the cache is decided.

    Returns:
        As `count_refusals`, in the table's order.

    Raises:
        EngineError: No engine has that name.
    """
    if request.engine is None:
        return ()
    refuses = refusals_by(request.engine, table)
    caches = {cache.name for cache in table.caches}
    asked = {name for one in table.spaces if one.name == request.space for name in one.schemes}

    def refused() -> Iterator[tuple[str, str, str]]:
        for scheme, group in dict.fromkeys((row.scheme, row.group) for row in table.rows):
            if request.space is not None and scheme not in asked:
                continue
            if group in caches and not _asks_for(request, scheme):
                continue
            if reason := refuses(group, scheme):
                yield group, scheme, reason

    return count_refusals(refused())


def _asks_for(request: Request, scheme: str) -> bool:
    """Whether a request may choose a format of the cache."""
    return request.kv_cache and (not request.kv_formats or scheme in request.kv_formats)
