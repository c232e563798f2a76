"""The format of the KV cache as decisions of a problem, beside those on layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from mofq.decision.solvers.problem import KL_UNIT, Option, ProblemGroup
from mofq.decision.solvers.rows import complete, option_of
from mofq.evidence.table import Table
from mofq.exceptions import TableError
from mofq.model.kv_schemes import cache_bits, parse_cache_scheme
from mofq.model.layers import CacheLayer


@dataclass(frozen=True, slots=True)
class CacheRequest:
    """How the format of the KV cache is decided with the layers."""

    tokens: int = 0  #: of context, whose cache counts as size
    is_legal: Callable[[str, CacheLayer], bool] | None = None  #: what an engine adds
    one_format: bool = False  #: for all layers but those that are left as they are


def cache_groups(
    table: Table,
    unit: str,
    corpora: Sequence[str | None],
    *,
    schemes: Collection[str] | None,
    asked: CacheRequest,
) -> list[tuple[ProblemGroup, list[Option]]]:
    """Each attention layer's cache as a group with its options.

    Args:
        table: From `mofq measure`.
        unit: Of the errors.
        corpora: In the order of each option's tuples.
        schemes: That the search space offers; None: all that were measured.
        asked: What is legal.

    Raises:
        TableError: The table has no formats of the cache, or errors are in another unit than
            nats, or a row is missing.
    """
    if not table.caches:
        raise TableError(
            "the format of the KV cache is decided in nats, on rows of it, and the table has none. "
            "Measure a search space with the key `kv_cache`, on stats of `mofq calibrate "
            "--kv-cache`."
        )
    if unit != KL_UNIT:
        raise TableError(
            f"the format of the KV cache is decided in nats, and errors are in {unit}: leave "
            f"--unit out."
        )
    by_corpus = [table.rows_of(unit, name) for name in corpora]
    groups = []
    for cache in table.caches:
        rows = complete(cache.name, unit, corpora, [found[cache.name] for found in by_corpus])
        options = [
            _option(option_of(one), cache)
            for one in rows
            if (schemes is None or one[0].scheme in schemes)
            and (asked.is_legal is None or asked.is_legal(one[0].scheme, cache))
        ]
        group = ProblemGroup(
            cache.name, (cache.name,), weights=0, counted=False, cached=cache.numbers
        )
        groups.append((group, options))
    return groups


def _option(option: Option, cache: CacheLayer) -> Option:
    return replace(option, cache_bits=cache_bits(parse_cache_scheme(option.scheme), cache))
