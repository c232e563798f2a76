"""What may be chosen along a frontier: options of `mofq frontier`, `explore` and `plot`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mofq.cli.search_options import check_cache_formats, parse_formats

if TYPE_CHECKING:
    from mofq.decision import Request


@dataclass(frozen=True, slots=True)
class CurveOptions:
    """As in `mofq search`, of which every point of the curve is one."""

    unit: str | None = None
    engine: str | None = None
    space: str | None = None
    max_kv_bits: float | None = None
    kv_tokens: int = 0
    kv_formats: tuple[str, ...] = ()

    @property
    def decides_cache(self) -> bool:
        """Whether the format of the KV cache is decided with the layers."""
        return self.max_kv_bits is not None or self.kv_tokens > 0


def curve_request(options: CurveOptions) -> Request:
    """What is asked of every point of the curve.

    Raises:
        MofqError: Formats of the cache are named, and no budget.
    """
    from mofq.decision import Budgets, Request

    check_cache_formats(options.kv_formats, options.decides_cache)
    return Request(
        Budgets(max_kv_bits=options.max_kv_bits),
        unit=options.unit,
        engine=options.engine,
        space=options.space,
        ties=False,
        kv_cache=options.decides_cache,
        kv_tokens=options.kv_tokens,
        kv_formats=parse_formats(options.kv_formats),
    )
