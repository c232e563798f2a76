"""Schemes of the KV cache: how an attention layer's keys and values are kept, and their bits.

``kv:KEYS`` or ``kv:KEYS/VALUES``, each ``bf16`` or ``element.granularity[.asym][.s-SCALE]`` as
the inputs of a layer are written, with two more granularities for the heads:

``unscaled``, ``tensor``, ``head``
    Static: no scale, one for all keys of the layer, one for each head, from calibration.
``token``, ``token_head``, ``gK``
    Dynamic: one scale for each token, for each head of a token, for K channels of a head.
    They are kept in the cache beside the codes, in float32 unless the name says otherwise.

Some formats are what a kernel of vLLM makes of them, with rules of its own
(``mofq.numbers.quantize.cache_kernels``):

``int8.token_head``, ``fp8_e4m3.token_head``
    As the names say.
``int4.token_head.asym.rht``
    Each head is rotated first (a randomized Hadamard transform); the zero point is kept in the
    last bits of the float32 scale and takes no bits of its own.
``nvfp4.unscaled``, ``nvfp4.unscaled@fouroversix``
    NVFP4 without the static scale of the tensor that ``nvfp4`` has above those of 16 channels.

The scheme that leaves the cache as it is, is ``bf16``, as for layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from mofq.exceptions import SchemeError
from mofq.model.layers import PARTS, CacheLayer
from mofq.numbers.formats import CacheKernel
from mofq.numbers.schemes import TensorScheme, parse_scheme

PREFIX = "kv:"
#: Granularities of one head -> what a scheme of inputs calls them.
_OF_HEADS = {"head": "tensor", "token_head": "token"}
#: Formats that a kernel defines -> the kernel, and what the grammar of inputs has nearest to it.
_OF_KERNELS: dict[str, tuple[CacheKernel, str]] = {
    "int8.token_head": ("token_head", "int8.token"),
    "fp8_e4m3.token_head": ("token_head", "fp8_e4m3.token"),
    "int4.token_head.asym.rht": ("rotated", "int4.token.asym"),
    "nvfp4.unscaled": ("nvfp4", "nvfp4"),
    "nvfp4.unscaled@fouroversix": ("nvfp4_fouroversix", "nvfp4@fouroversix"),
}
_GRANULARITY = re.compile(r"unscaled|tensor|head|token|token_head|g[1-9]\d*")
#: Of a number that is not quantized, whatever the checkpoint's dtype: what engines cache [bits].
_UNQUANTIZED_BITS = 16
#: A stored static scale, float32 [bytes].
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class CachedTensor:
    """How the keys, or the values, of a layer are kept."""

    name: str
    scheme: TensorScheme  #: of one row: all heads of a token, or one of them
    by_head: bool  #: each head is quantized by itself
    kernel: CacheKernel | None = None  #: whose rules hold in the place of the scheme's

    @property
    def is_static(self) -> bool:
        """Whether a scale comes from calibration."""
        return self.kernel is None and self.scheme.needs_tensor_amax

    @property
    def columns_multiple(self) -> int:
        """What the number of channels of a head must be a multiple of."""
        return 2 if self.kernel == "rotated" else self.scheme.columns_multiple

    @property
    def zero_point_bits(self) -> int:
        """Of each scale, beside it."""
        return 0 if self.scheme.symmetric or self.kernel else self.scheme.element.bits


@dataclass(frozen=True, slots=True)
class CacheScheme:
    """One choice for an attention layer's cache. The name is the identity."""

    name: str
    parts: Mapping[str, CachedTensor | None]  #: of `PARTS`; None: as it is

    @property
    def is_unquantized(self) -> bool:
        """Whether the cache is left as it is."""
        return not any(self.parts.values())


def is_cache_scheme(name: str) -> bool:
    """Whether a name is of a scheme of the cache, other than ``bf16``."""
    return name.startswith(PREFIX)


@lru_cache(maxsize=1024)
def parse_cache_scheme(name: str) -> CacheScheme:
    """Parse the name of a cache's scheme.

    Args:
        name: As the grammar at the top of this module says; ``kv:`` may be left out.

    Returns:
        The scheme, under its canonical name.

    Raises:
        SchemeError: The name does not follow the grammar.
    """
    keys, slash, values = name.removeprefix(PREFIX).partition("/")
    texts = (keys, values if slash else keys)
    parts = dict(zip(PARTS, (_parse_part(name, text) for text in texts), strict=True))
    names = ["bf16" if part is None else part.name for part in parts.values()]
    if parts[PARTS[0]] is None and parts[PARTS[1]] is None:
        return CacheScheme("bf16", parts)
    canonical = names[0] if names[0] == names[1] else "/".join(names)
    return CacheScheme(PREFIX + canonical, parts)


def _parse_part(name: str, text: str) -> CachedTensor | None:
    if text == "bf16":
        return None
    if text in _OF_KERNELS:
        kernel, plain = _OF_KERNELS[text]
        scheme = parse_scheme(f"bf16+{plain}").activation
        assert scheme is not None
        return CachedTensor(text, scheme, by_head=True, kernel=kernel)
    if text.partition("@")[0].endswith((".rht", "nvfp4.unscaled")):
        raise SchemeError(
            f"KV cache scheme {name!r}: '.rht' and 'nvfp4.unscaled' are parts of one format each. "
            f"Write 'int4.token_head.asym.rht', 'nvfp4.unscaled' or 'nvfp4.unscaled@fouroversix'."
        )
    element, dot, rest = text.partition(".")
    granularity, more, options = rest.partition(".")
    if dot and not _GRANULARITY.fullmatch(granularity):
        raise SchemeError(
            f"KV cache scheme {name!r}: unknown granularity {granularity!r}. Known: unscaled, "
            f"tensor, head (static); token, token_head, gK (dynamic)."
        )
    plain = element + dot + _OF_HEADS.get(granularity, granularity) + more + options
    try:
        scheme = parse_scheme(f"bf16+{plain}").activation
    except SchemeError as problem:
        reason = str(problem).partition(": ")[2] or str(problem)
        raise SchemeError(f"KV cache scheme {name!r}: {reason}") from problem
    assert scheme is not None
    if scheme.outliers:
        raise SchemeError(f"KV cache scheme {name!r}: a cache has no outlier columns; drop '.out'.")
    canonical = parse_scheme(f"bf16+{plain}").name.removeprefix("bf16+")
    by_head = granularity in _OF_HEADS
    if by_head:
        first, _, tail = canonical.partition(f".{_OF_HEADS[granularity]}")
        canonical = f"{first}.{granularity}{tail}"
    return CachedTensor(canonical, scheme, by_head)


def cache_rejection(scheme: CacheScheme, cache: CacheLayer) -> str | None:
    """Why the shape of a layer's cache does not take a scheme; None where it does."""
    for part in scheme.parts.values():
        columns = 1 if part is None else part.columns_multiple
        if cache.head_size % columns:
            return (
                f"{cache.name}: {scheme.name} needs heads of a multiple of {columns} channels, "
                f"found {cache.head_size}"
            )
    return None


def cache_bits(scheme: CacheScheme, cache: CacheLayer) -> int:
    """What one token takes in the cache of a layer: codes and dynamic scales [bits].

    Args:
        scheme: That fits the cache.
        cache: Its shape.
    """
    return sum(_part_bits(part, cache) for part in scheme.parts.values())


def _part_bits(part: CachedTensor | None, cache: CacheLayer) -> int:
    if part is None:
        return _UNQUANTIZED_BITS * cache.channels
    scheme, bits = part.scheme, part.scheme.element.bits * cache.channels
    if scheme.granularity.kind not in ("token", "group"):
        return bits
    columns = scheme.granularity.columns or (cache.head_size if part.by_head else cache.channels)
    scales = cache.channels // columns
    bits += scales * (scheme.scale.bits + part.zero_point_bits)
    if scheme.scale.shared_bits:
        bits += cache.channels // scheme.scale.shared_columns * scheme.scale.shared_bits
    return bits


def cache_scale_bytes(scheme: CacheScheme, cache: CacheLayer) -> int:
    """What a checkpoint holds of a cache: its static scales [bytes]."""
    return _SCALE_BYTES * len(static_keys(scheme, cache))


def static_keys(scheme: CacheScheme, cache: CacheLayer) -> tuple[str, ...]:
    """Whose largest magnitudes a scheme needs from calibration.

    Returns:
        ``"k"`` and ``"v"``; where a scale is that of a head, ``"k.0"``, ``"k.1"`` and so on.
    """
    keys = []
    for name, part in scheme.parts.items():
        if part is not None and part.is_static:
            heads = range(cache.kv_heads) if part.by_head else ()
            keys += [f"{name}.{head}" for head in heads] or [name]
    return tuple(keys)


def part_amax(part: str, amax: Mapping[str, float]) -> tuple[float, ...]:
    """The largest magnitudes of keys, or of values, in the order of heads.

    Args:
        part: One of `PARTS`.
        amax: With the keys of `static_keys`.
    """
    found = {key: value for key, value in amax.items() if key.partition(".")[0] == part}
    return tuple(found[key] for key in sorted(found, key=lambda key: (len(key), key)))
