"""Tables for the tests of the explorer: small ones with everything in them, and a large one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mofq.evidence.table import (
    Extent,
    Profile,
    Rejection,
    Row,
    TableGroup,
    TableHeader,
    TableLayer,
    TableModel,
    TableSpace,
    TableStats,
    TableWriter,
    bin_width,
    open_table,
)
from mofq.model.kv_schemes import cache_scale_bytes, parse_cache_scheme, static_keys
from mofq.model.layers import CacheLayer
from mofq.numbers.numerics import NUMERICS

#: Scheme -> bits per weight, and how much error it makes.
SCHEMES = {
    "int4.g128": (4.125, 1.0),
    "int4.g32": (4.5, 0.6),
    "fp4_e2m1.g32": (4.5, 0.55),
    "int8.channel": (8.02, 0.01),
    "fp8_e4m3.tensor+fp8_e4m3.tensor": (8.0, 0.02),
    "bf16": (16.0, 0.0),
}
STATIC = "fp8_e4m3.tensor+fp8_e4m3.tensor"
GROUPS = {
    "attn.qkv": (("self_attn.q_proj", 1), ("self_attn.k_proj", 1), ("self_attn.v_proj", 1)),
    "attn.o": (("self_attn.o_proj", 2),),
    "mlp.gate_up": (("mlp.gate_proj", 4), ("mlp.up_proj", 4)),
    "mlp.down": (("mlp.down_proj", 4),),
}


def write_explore_table(
    path: Path,
    *,
    decoder_layers: int = 3,
    corpora: tuple[str, ...] = ("en",),
    schemes: dict[str, tuple[float, float]] = SCHEMES,
    prefix: str = "model.",
    model: str = "Tiny/model",
    samples: int = 4,
    size: int = 256,
    caches: bool = False,
) -> Path:
    """A table of a llama-shaped model; errors and their samples are drawn with a fixed seed."""
    groups = tuple(_groups(decoder_layers, prefix, size))
    header = TableHeader(
        mofq="0.1.0",
        model=TableModel(model, "a" * 64),
        stats=TableStats("b" * 64, 0, dict.fromkeys(corpora, "c" * 64), samples, 4),
        groups=groups,
        unquantized=("lm_head",),
        other_bytes=1_000_000,
        numerics=NUMERICS,
    )
    rng = np.random.default_rng(0)
    with open_table(path, header) as table:
        names = (*schemes, *(CACHE_FORMATS if caches else ()))
        table.add_space(TableSpace("test", "d" * 64, names, ("int4.g128",), 0.0, None, "0.1.0"))
        for group in groups:
            rows = [
                _row(group, scheme, corpus, schemes[scheme], rng, samples)
                for corpus in corpora
                for scheme in schemes
            ]
            refused = Rejection(group.name, "int4.g512", "256 is not divisible by 512")
            profiles = [_profile(group, corpora, module) for module in modules_of(group)]
            table.add_group(rows, [refused], profiles=profiles)
        if caches:
            layers = [_cache(number, prefix, size) for number in range(decoder_layers)]
            _add_caches(table, layers, corpora, rng, samples)
    return path


#: Format of the cache -> how much error it makes. `bf16` is offered too.
CACHE_FORMATS = {
    "kv:fp8_e4m3.tensor": 0.1,
    "kv:int8.token_head": 0.01,
    "kv:int4.token_head.s-bf16": 1.0,
    "kv:int8.token_head.s-bf16/int4.token_head.s-bf16": 0.3,
}


def _cache(number: int, prefix: str, size: int) -> CacheLayer:
    name = f"layers.{number}.attn.kv_cache"
    return CacheLayer(name, f"{prefix}layers.{number}.self_attn", size // 64, 64, number)


def _add_caches(
    table: TableWriter,
    caches: list[CacheLayer],
    corpora: tuple[str, ...],
    rng: np.random.Generator,
    samples: int,
) -> None:
    table.add_caches(caches)
    for cache in caches:
        table.add_group(_cache_rows(cache, corpora, rng, samples), [])


def _cache_rows(
    cache: CacheLayer, corpora: tuple[str, ...], rng: np.random.Generator, samples: int
) -> list[Row]:
    rows = []
    for corpus in corpora:
        for name, share in {"bf16": 0.0, **CACHE_FORMATS}.items():
            scheme = parse_cache_scheme(name)
            static = dict.fromkeys(static_keys(scheme, cache), 1.5) or None
            typical = 1e-2 * share * rng.lognormal(sigma=1.0)
            size = cache_scale_bytes(scheme, cache)
            rows.append(_drawn(cache.name, name, corpus, typical, rng, samples, size, static))
    return rows


#: The input channel that stands out as a wall, in the attention of the first decoder layer.
WALL = 40
WALL_HEIGHT = 50.0


def modules_of(group: TableGroup) -> list[str]:
    """The kinds of layers of a group."""
    return list(dict.fromkeys(layer.module for layer in group.layers))


def _profile(group: TableGroup, corpora: tuple[str, ...], module: str) -> Profile:
    layer = next(layer for layer in group.layers if layer.module == module)
    rng = np.random.default_rng(layer.decoder_layer)
    has_wall = group.name == "layers.0.attn.qkv"

    def extent(height: float, whole: str) -> Extent:
        channels, width = layer.in_features, bin_width(layer.in_features)
        rms = np.float32(0.02 * rng.lognormal(sigma=0.1, size=-(-channels // width)))
        rms[WALL // width] *= height
        crest = {"g16": 2.1, "g32": 2.4, "g128": 3.0, whole: 3.9}
        return Extent(tuple(map(float, 4 * rms)), tuple(map(float, rms)), crest)

    return Profile(
        group.name,
        module,
        layer.in_features,
        weight=extent(WALL_HEIGHT if has_wall else 1.0, "channel"),
        inputs={corpus: extent(1.0, "token") for corpus in corpora},
    )


def _groups(decoder_layers: int, prefix: str, size: int) -> Iterator[TableGroup]:
    for number in range(decoder_layers):
        for name, layers in GROUPS.items():
            yield TableGroup(
                f"layers.{number}.{name}",
                tuple(
                    TableLayer(
                        f"{prefix}layers.{number}.{module}",
                        out_features=factor * size,
                        in_features=size,
                        dtype="BF16",
                        decoder_layer=number,
                        module=module.split(".")[1],
                    )
                    for module, factor in layers
                ),
                source_bytes=2 * size * size * sum(factor for _, factor in layers),
            )


def _row(
    group: TableGroup,
    scheme: str,
    corpus: str,
    figures: tuple[float, float],
    rng: np.random.Generator,
    samples: int,
) -> Row:
    bits, scale = figures
    typical = scale * 1e-3 * rng.lognormal(sigma=1.0)
    static = {layer.name: 1 / 3 for layer in group.layers} if scheme == STATIC else None
    size = int(bits * group.weights / 8)
    return _drawn(group.name, scheme, corpus, typical, rng, samples, size, static)


def _drawn(
    group: str,
    scheme: str,
    corpus: str,
    typical: float,
    rng: np.random.Generator,
    samples: int,
    size: int,
    static: dict[str, float] | None,
) -> Row:
    # What is read back from float32 is what the error has to be the mean of.
    drawn = np.float32(typical * rng.lognormal(sigma=0.3, size=samples))
    return Row(
        group,
        scheme,
        "kl_nats_per_token",
        corpus,
        error=float(drawn.astype(np.float64).mean()),
        stderr=float(drawn.astype(np.float64).std(ddof=1) / samples**0.5),
        bytes=size,
        sqnr_db=None,
        sample_errors=tuple(map(float, drawn)),
        static_amax=static,
    )


#: As many schemes as the largest search space of a 70B model would offer.
TWENTY_SCHEMES = {
    **{f"int{b}.g{g}": (b + 16 / g, 4.0 ** (4 - b)) for b in (4, 5, 6) for g in (128, 64, 32)},
    **{f"int{b}.channel": (b + 0.01, 2 * 4.0 ** (4 - b)) for b in (4, 5, 6, 8)},
    **{f"fp4_e2m1.g{g}": (4 + 16 / g, 0.8 * (g / 128) ** 0.3) for g in (128, 64, 32, 16)},
    "nvfp4": (4.5, 0.4),
    "fp8_e4m3.channel": (8.01, 0.008),
    "bf16": (16.0, 0.0),
}
