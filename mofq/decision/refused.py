"""What a serving engine keeps a search from, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from mofq.decision.recipe import Recipe
from mofq.decision.request import Request, fusion_group
from mofq.engines import ENGINES, cache_legality, format_name, legality
from mofq.evidence.table import Table
from mofq.numbers.schemes import parse_scheme


@dataclass(frozen=True, slots=True)
class Refused:
    """Schemes that were measured and are not offered, for one reason."""

    schemes: tuple[str, ...]
    groups: int  #: fusion groups, or layers' caches, that have rows of any of them
    reason: str


def serving_engines(table: Table, recipe: Recipe) -> tuple[str, ...]:
    """The engines that serve a recipe as it was measured, on one device each.

    An engine keeps the cache in one format, and leaves single layers as they are.

    Args:
        table: That the recipe was decided from.
        recipe: Of it.

    Returns:
        Names of ``mofq.engines``, in its order.
    """
    groups = {group.name: fusion_group(group) for group in table.header.groups}
    chosen = [(parse_scheme(one.scheme), groups[one.name]) for one in recipe.groups]
    caches = {cache.name: cache for cache in table.caches}
    cached = [(one.scheme, caches[one.name]) for one in recipe.kv_cache if one.name in caches]
    if len({scheme for scheme, _ in cached} - {"bf16"}) > 1:
        return ()

    def serves(engine: str) -> bool:
        check, check_cache = legality(engine), cache_legality(engine)
        return all(check(*one) is None for one in chosen) and all(
            check_cache(*one) is None for one in cached
        )

    return tuple(engine for engine in ENGINES if serves(engine))


def engine_refusals(table: Table, request: Request) -> tuple[Refused, ...]:
    """What an engine cannot serve as it was measured, of what a search asks for.

    Args:
        table: From `mofq measure`.
        request: Its engine, None refuses nothing; its search space; its formats of the cache,
            where the cache is decided.

    Returns:
        One entry for each reason, in the table's order.

    Raises:
        EngineError: No engine has that name.
    """
    if request.engine is None:
        return ()
    check = legality(request.engine)
    check_cache = cache_legality(request.engine)
    groups = {group.name: fusion_group(group) for group in table.header.groups}
    caches = {cache.name: cache for cache in table.caches}
    schemes: dict[str, dict[str, None]] = {}
    where: dict[str, set[str]] = {}
    asked = {name for one in table.spaces if one.name == request.space for name in one.schemes}
    for name, group in dict.fromkeys((row.scheme, row.group) for row in table.rows):
        if request.space is not None and name not in asked:
            continue
        if group in caches:
            is_asked = request.kv_cache and name in (request.kv_formats or (name,))
            reason = check_cache(name, caches[group]) if is_asked else None
        else:
            scheme = parse_scheme(name)
            reason = check(scheme, groups[group])
            reason = reason and reason.replace(f" in {format_name(scheme)}", " in these formats")
        if reason:
            schemes.setdefault(reason, {})[name] = None
            where.setdefault(reason, set()).add(group)
    return tuple(
        Refused(tuple(names), len(where[reason]), reason) for reason, names in schemes.items()
    )
