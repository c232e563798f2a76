"""Which of two schemes is simpler: the order in which ties are broken."""

from __future__ import annotations

from typing import get_args

from mofq.model.kv_schemes import CachedTensor, is_cache_scheme, parse_cache_scheme
from mofq.numbers.formats import SCALE_FORMATS, CodebookFormat, FloatFormat, IntFormat
from mofq.numbers.schemes import ScaleRule, Scheme, TensorScheme, parse_scheme

_ELEMENT_KINDS = (IntFormat, FloatFormat, CodebookFormat)
_SCALE_RULES = get_args(ScaleRule)
_ROUNDINGS = ("nearest", "gptq", "descent")
_SCALES = tuple(SCALE_FORMATS)
_KINDS = ("unscaled", "tensor", "channel", "token", "block", "group", "peg")

Rank = tuple[int | str, ...]


def simplicity(scheme_name: str, *, base: bool = False) -> Rank:
    """Sort key of a scheme: the simpler, the smaller.

    In this order: the unquantized scheme; schemes of the search space's
    ``base``; weights rounded to nearest before GPTQ before descent; symmetric
    before asymmetric; coarse scales before fine (unscaled, tensor, channel, block,
    groups, large groups before small); integers before floating point before
    codebooks; scale formats as `SCALE_FORMATS` lists them, and scale rules as `ScaleRule`
    does; for the activations, none before quantized, and then the same order. Last, the
    name.

    Args:
        scheme_name: Any scheme name.
        base: Whether the search space lists it as ``base``.

    Raises:
        SchemeError: The name does not parse.
    """
    if is_cache_scheme(scheme_name):
        cache = parse_cache_scheme(scheme_name)
        parts = [_cached(part) for part in cache.parts.values()]
        return (1, len(set(cache.parts.values())), *parts[0], *parts[1], cache.name)
    scheme: Scheme = parse_scheme(scheme_name)
    if scheme.is_unquantized:
        return (0,)
    return (1, not base, *_operand(scheme.weight), *_operand(scheme.activation), scheme.name)


def _cached(part: CachedTensor | None) -> Rank:
    """Static before dynamic, one scale before one for each head; then as layers' inputs."""
    if part is None:
        return (0,)
    return (1, not part.is_static, part.by_head, *_operand(part.scheme))


def _operand(operand: TensorScheme | None) -> Rank:
    if operand is None:
        return (0,)
    kind = operand.granularity.kind
    element = next(
        n for n, known in enumerate(_ELEMENT_KINDS) if isinstance(operand.element, known)
    )
    return (
        1,
        _ROUNDINGS.index(operand.rounding),
        not operand.symmetric,
        _KINDS.index(kind),
        {"group": -1, "block": -1, "peg": 1}.get(kind, 0) * operand.granularity.columns,
        element,
        _SCALES.index(operand.scale.name),
        _SCALE_RULES.index(operand.scale_rule),
    )
