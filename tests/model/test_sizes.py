from __future__ import annotations

import contextlib

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.mxfp6.base import MXFP6PackedCompressor
from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given
from hypothesis import strategies as st

from mofq.exceptions import BudgetError, CheckpointError
from mofq.model.layers import FusionGroup, LinearLayer
from mofq.model.sizes import (
    bits_per_weight,
    counted_bytes,
    group_bytes,
    layer_bytes,
    parse_size,
    weights_of,
)
from mofq.numbers.schemes import parse_scheme


def layer_of(
    out_features: int, in_features: int, *, dtype: str = "BF16", name: str = "proj"
) -> LinearLayer:
    return LinearLayer(
        name=name,
        tensor=f"{name}.weight",
        out_features=out_features,
        in_features=in_features,
        dtype=dtype,
        transposed=False,
        expert=None,
        row_start=0,
        decoder_layer=0,
        module=name,
        shares_scale=name,
    )


@pytest.mark.parametrize(
    ("scheme", "size"),
    [
        # 48 rows of 96 weights: 4608 of them. Terms: codes + scales + zero points + shape.
        ("bf16", 4608 * 2),
        ("bf16+int8.token", 4608 * 2),
        ("bf16+int8.tensor", 4608 * 2 + 4),
        ("int8.channel+int8.token", 4608 + 48 * 2),
        ("int8.channel+int8.tensor", 4608 + 48 * 2 + 4),
        # Zero points of blocks are not packed.
        ("int4.block16.asym", 2304 + 3 * 6 * 2 + 3 * 6 + 16),
        ("int8.channel.asym+int8.token", 4608 + 48 * 2 + 48),
        ("int8.channel.s-f32+int8.token", 4608 + 48 * 4),
        ("int8.tensor+int8.token", 4608 + 2),
        ("int8.g32+int8.token", 4608 + 48 * 3 * 2),
        ("int8.channel", 4608 + 48 * 2 + 16),
        ("int8.g32", 4608 + 48 * 3 * 2 + 16),
        ("int4.g32", 2304 + 48 * 3 * 2 + 16),
        # Codes in 32-bit words, half a bit for each pair's scale, 6 shared exponents a row.
        ("mx9", 4608 + 48 * 6 + 48 * 6 + 16),
        ("mx6+mx9", 2880 + 48 * 6 + 48 * 6 + 16),
        ("mx4", 1728 + 48 * 6 + 48 * 6 + 16),
        ("mxint8", 4608 + 48 * 3 + 16),
        ("nvfp4@fouroversix", 2304 + 48 * 6 + 4),
        ("int8.channel+int8.token.out6", 4608 + 48 * 2),
        ("int8.channel+int8.peg8", 4608 + 48 * 2),
        ("int4.g32@fullrange", 2304 + 48 * 3 * 2 + 16),
        ("int4.g32@mse~gptq", 2304 + 48 * 3 * 2 + 16),
        ("int4.g32.s-e8m0", 2304 + 48 * 3 + 16),
        ("int4.g32+int8.token", 2304 + 48 * 3 * 2 + 16),
        # 48 zero points of 4 bits are 6 words a column, in 3 columns.
        ("int4.g32.asym", 2304 + 48 * 3 * 2 + 3 * 24 + 16),
        ("int3.channel", 1728 + 48 * 2 + 16),
        ("int5.channel", 2880 + 48 * 2 + 16),
        ("int2.g16", 1152 + 48 * 6 * 2 + 16),
        ("fp8_e4m3.channel", 4608 + 48 * 2),
        ("fp8_e4m3.unscaled", 4608),
        ("fp8_e4m3.tensor+fp8_e4m3.tensor", 4608 + 2 + 4),
        ("fp8_e4m3.block16+fp8_e4m3.g32", 4608 + 3 * 6 * 2),
        ("fp8_e4m3.block48x32", 4608 + 3 * 2),
        ("fp6_e2m3.channel", 3456 + 48 * 2),
        ("mxfp6_e3m2", 3456 + 48 * 3),
        ("fp4_e2m1.channel", 2304 + 48 * 2),
        ("nf4.g32.s-f32", 2304 + 48 * 3 * 4),
        ("nvfp4", 2304 + 48 * 6 + 4),
        ("nvfp4+nvfp4", 2304 + 48 * 6 + 4 + 4),
        ("mxfp4", 2304 + 48 * 3),
        ("mxfp8+mxfp8", 4608 + 48 * 3),
    ],
)
def test_bytes_of_a_48_by_96_layer(scheme: str, size: int) -> None:
    assert layer_bytes(layer_of(48, 96), parse_scheme(scheme)) == size


@pytest.mark.parametrize(
    ("scheme", "size"),
    [
        # 3 rows of 7 weights: padding shows.
        ("int4.channel", 3 * 4 + 3 * 2 + 16),
        ("int5.channel", 3 * 8 + 3 * 2 + 16),
        ("int8.channel", 3 * 8 + 3 * 2 + 16),
        ("int8.channel+int8.token", 3 * 7 + 3 * 2),
        ("int4.channel.asym", 3 * 4 + 3 * 2 + 4 + 16),
        ("fp4_e2m1.channel", 3 * 4 + 3 * 2),
        ("fp6_e3m2.channel", 3 * 6 + 3 * 2),
        ("nf4.channel", 3 * 4 + 3 * 2),
    ],
)
def test_every_row_is_padded_to_its_word(scheme: str, size: int) -> None:
    assert layer_bytes(layer_of(3, 7), parse_scheme(scheme)) == size


@pytest.mark.parametrize(
    ("dtype", "size"), [("F32", 24), ("F16", 12), ("BF16", 12), ("F8_E4M3", 12), ("F8_E5M2", 12)]
)
def test_an_unquantized_layer_keeps_the_width_of_its_source_and_fp8_becomes_bf16(
    dtype: str, size: int
) -> None:
    assert layer_bytes(layer_of(2, 3, dtype=dtype), parse_scheme("bf16")) == size


def test_an_unknown_dtype_is_an_error_that_names_the_layer() -> None:
    with pytest.raises(CheckpointError, match=r"proj: unknown dtype 'BF61'.*'BF16'"):
        layer_bytes(layer_of(2, 3, dtype="BF61"), parse_scheme("bf16"))


def stored_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def ones(rows: int, columns: int, **extra: torch.Tensor) -> dict[str, torch.Tensor]:
    scale_OG = torch.ones(rows, columns, dtype=torch.bfloat16)
    return {"weight": torch.zeros(40, 96), "weight_scale": scale_OG, **extra}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_integers_have_the_bytes_that_compressed_tensors_stores(
    bits: int, group_size: int | None, symmetric: bool
) -> None:
    columns = 1 if group_size is None else 3
    arguments = QuantizationArgs(
        num_bits=bits,
        strategy="channel" if group_size is None else "group",
        group_size=group_size,
        symmetric=symmetric,
    )
    zero_point_OG = torch.zeros(40, columns, dtype=torch.int8)
    stored = PackedQuantizationCompressor.compress(
        ones(40, columns, weight_zero_point=zero_point_OG),
        QuantizationScheme(targets=["Linear"], weights=arguments),
    )
    granularity = "channel" if group_size is None else f"g{group_size}"
    scheme = parse_scheme(f"int{bits}.{granularity}" + ("" if symmetric else ".asym"))
    assert layer_bytes(layer_of(40, 96), scheme) == stored_bytes(stored)


@pytest.mark.parametrize(
    ("scheme", "compressor", "arguments", "scales"),
    [
        ("int8.channel+int8.token", NaiveQuantizationCompressor, {"num_bits": 8}, (40, 1)),
        (
            "fp8_e4m3.channel",
            NaiveQuantizationCompressor,
            {"num_bits": 8, "type": "float"},
            (40, 1),
        ),
    ],
)
def test_eight_bit_codes_have_the_bytes_that_compressed_tensors_stores(
    scheme: str, compressor: type, arguments: dict[str, object], scales: tuple[int, int]
) -> None:
    weights = QuantizationArgs(strategy="channel", **arguments)
    stored = compressor.compress(
        ones(*scales), QuantizationScheme(targets=["Linear"], weights=weights)
    )
    assert layer_bytes(layer_of(40, 96), parse_scheme(scheme)) == stored_bytes(stored)


@pytest.mark.parametrize(
    ("scheme", "compressor", "group_size", "bits"),
    [
        ("mxfp4", MXFP4PackedCompressor, 32, 4),
        ("mxfp6_e2m3", MXFP6PackedCompressor, 32, 6),
        ("mxfp8", MXFP8QuantizationCompressor, 32, 8),
        ("nvfp4", NVFP4PackedCompressor, 16, 4),
    ],
)
def test_block_scaled_formats_have_the_bytes_that_compressed_tensors_stores(
    scheme: str, compressor: type, group_size: int, bits: int
) -> None:
    is_nvfp4 = scheme == "nvfp4"
    weights = QuantizationArgs(
        num_bits=bits,
        type="float",
        strategy="tensor_group" if is_nvfp4 else "group",
        group_size=group_size,
        scale_dtype=torch.float8_e4m3fn if is_nvfp4 else torch.uint8,
    )
    extra = {"weight_global_scale": torch.ones(1)} if is_nvfp4 else {}
    stored = compressor.compress(
        ones(40, 96 // group_size, **extra), QuantizationScheme(targets=["Linear"], weights=weights)
    )
    assert layer_bytes(layer_of(40, 96), parse_scheme(scheme)) == stored_bytes(stored)


def test_a_group_costs_what_its_layers_cost() -> None:
    layers = (layer_of(64, 32, name="q"), layer_of(16, 32, name="k"))
    group, scheme = FusionGroup("qk", layers), parse_scheme("nvfp4")
    assert group_bytes(group, scheme) == sum(layer_bytes(layer, scheme) for layer in layers)
    assert weights_of([group, group]) == 2 * 80 * 32


def test_bits_per_weight_count_codes_scales_and_padding_and_no_shape() -> None:
    # INT4 in groups of 32 under bf16 scales is known as 4.5 bits; the shape is 16 bytes more.
    layer, scheme = layer_of(1024, 1024), parse_scheme("int4.g32")
    group = FusionGroup("q", (layer,))
    assert bits_per_weight(counted_bytes(group, scheme), layer.weights) == 4.5
    assert group_bytes(group, scheme) == counted_bytes(group, scheme) + 16
    for name in ("int8.channel+int8.token", "fp8_e4m3.channel", "nvfp4", "bf16"):
        assert counted_bytes(group, parse_scheme(name)) == group_bytes(group, parse_scheme(name))


def test_bits_of_no_weights_are_an_error() -> None:
    with pytest.raises(BudgetError, match="no linear layers"):
        bits_per_weight(0, 0)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (5, 5),
        ("5000000000", 5 * 10**9),
        ("5GB", 5 * 10**9),
        ("5 gb", 5 * 10**9),
        ("4.5GiB", 9 * 2**29),
        ("0.1kB", 100),
        ("300MB", 3 * 10**8),
        ("1.5B", 1),
        ("2TiB", 2**41),
        ("0.3MB", 300_000),
    ],
)
def test_a_size_is_parsed_exactly_and_rounded_down(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5GX", "-5GB", "1e9", "5 G B", "1.2.3GB", "∞", "٣GB"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(BudgetError):
        parse_size(text)


def test_an_unknown_unit_gets_a_suggestion() -> None:
    with pytest.raises(BudgetError, match="Did you mean 'GiB'"):
        parse_size("5GiBs")


def test_a_part_of_a_byte_lacks_its_unit() -> None:
    with pytest.raises(BudgetError, match=r"Write e.g. 4.5GB or 4.5GiB"):
        parse_size("4.5")


@given(st.text(max_size=30))
def test_no_text_breaks_the_parser_of_sizes(text: str) -> None:
    with contextlib.suppress(BudgetError):
        assert parse_size(text) >= 0


@given(st.integers(1, 300), st.integers(1, 300), st.integers(2, 8))
def test_packed_rows_hold_every_bit_and_less_than_a_word_more(
    rows: int, columns: int, bits: int
) -> None:
    size = layer_bytes(layer_of(rows, columns), parse_scheme(f"int{bits}.channel"))
    row_bits, rest = divmod((size - 16 - 2 * rows) * 8, rows)
    assert rest == 0
    assert columns * bits <= row_bits < columns * bits + 32
