"""Scheme names: what parses, what is refused, and the one name of each scheme."""

from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mofq.exceptions import SchemeError
from mofq.numbers.formats import (
    ELEMENT_FORMATS,
    SCALE_FORMATS,
    CodebookFormat,
    FloatFormat,
    IntFormat,
)
from mofq.numbers.schemes import ALIASES, OTHER_NAMES, Granularity, parse_scheme


def test_a_name_composes_all_axes() -> None:
    scheme = parse_scheme("int4.block32x64.s-e4m3@mse~gptq+fp8_e4m3.g128.s-e8m0")
    weight, activation = scheme.weight, scheme.activation
    assert weight is not None
    assert weight.element is ELEMENT_FORMATS["int4"]
    assert weight.granularity == Granularity("block", 32, 64)
    assert weight.symmetric
    assert weight.scale is SCALE_FORMATS["e4m3"]
    assert (weight.scale_rule, weight.rounding) == ("mse", "gptq")
    assert activation is not None
    assert activation.element is ELEMENT_FORMATS["fp8_e4m3"]
    assert activation.granularity == Granularity("group", 1, 128)
    assert activation.scale is SCALE_FORMATS["e8m0"]


def test_defaults_are_symmetric_absmax_nearest_with_bf16_weight_and_f32_activation_scales() -> None:
    scheme = parse_scheme("int8.channel+int8.token")
    assert scheme.weight is not None
    assert scheme.activation is not None
    assert scheme.weight.symmetric
    assert (scheme.weight.scale_rule, scheme.weight.rounding) == ("absmax", "nearest")
    assert (scheme.weight.scale.name, scheme.activation.scale.name) == ("bf16", "f32")
    assert scheme.weight.granularity == Granularity("channel", 1, 0)
    assert scheme.activation.granularity == Granularity("token", 1, 0)


def test_bf16_quantizes_nothing_and_may_stand_before_activations() -> None:
    assert parse_scheme("bf16").is_unquantized
    scheme = parse_scheme("bf16+int8.token")
    assert scheme.weight is None
    assert scheme.activation is not None
    assert not scheme.is_unquantized


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("int4.g32.s-bf16@absmax", "int4.g32"),
        ("int8.channel+int8.token.s-f32", "int8.channel+int8.token"),
        ("int8.channel.s-f32", "int8.channel.s-f32"),
        ("fp8_e4m3.block128x128", "fp8_e4m3.block128"),
        ("fp8_e4m3.block1x64", "fp8_e4m3.block1x64"),
        ("fp4_e2m1.g16.s-e4m3", "nvfp4"),
        ("fp4_e2m1.g32.s-e8m0@mse", "mxfp4@mse"),
        ("fp4_e2m1.g16.s-e4m3+fp4_e2m1.g16.s-e4m3", "nvfp4+nvfp4"),
        ("int4.g128.s-f32.asym", "int4.g128.asym.s-f32"),
        ("int4.g128~gptq", "int4.g128~gptq"),
        ("int8.g2.s-micro16+mx6", "mx9+mx6"),
        ("int8.g32.s-e8m0", "mxint8"),
        ("fp4_e2m1.g16.s-e4m3@fouroversix", "nvfp4@fouroversix"),
        ("nvfp4+nvfp4@fouroversix", "nvfp4+nvfp4@fouroversix"),
        ("int8.channel+int8.token.out6.asym.s-f32", "int8.channel+int8.token.asym.out6"),
        ("int8.tensor+int8.peg8.s-f32", "int8.tensor+int8.peg8"),
        ("int4.g128@mse~gptq", "int4.g128@mse~gptq"),
        ("fp4_e2m1.g16.s-e4m3@nats~descent", "nvfp4@nats~descent"),
    ],
)
def test_every_scheme_has_one_name(written: str, canonical: str) -> None:
    assert parse_scheme(written).name == canonical
    assert parse_scheme(canonical) == parse_scheme(written)


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_what_others_call_a_scheme_is_no_name_of_it_here(name: str) -> None:
    assert parse_scheme(OTHER_NAMES[name]).name == OTHER_NAMES[name]
    with pytest.raises(SchemeError, match=re.escape(f"written {OTHER_NAMES[name]!r}")):
        parse_scheme(name.upper())


@pytest.mark.parametrize(("alias", "expansion"), ALIASES.items())
def test_an_alias_and_its_expansion_are_the_same_scheme(alias: str, expansion: str) -> None:
    assert parse_scheme(alias) == parse_scheme(expansion)
    assert parse_scheme(alias).name == alias


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("int9.channel", "unknown element format 'int9'"),
        ("fp8_e4m4.channel", "Did you mean 'fp8_e4m3'"),
        ("fp8.channel", "Did you mean one of 'fp8_e4m3', 'fp8_e5m2'?"),
        ("W4A16", "Here it is written 'int4.g128'."),
        ("FP8-Dynamic", "Here it is written 'fp8_e4m3.channel"),
        ("int4", "'int4' has no granularity"),
        ("int4.", "unknown granularity ''"),
        ("int4.g0", "unknown granularity 'g0'"),
        ("int4.g-32", "unknown granularity 'g-32'"),
        ("int4.G32", "unknown granularity 'G32'"),
        ("int4.g32.assym", "Did you mean 'asym'"),
        ("int4.g32.asym.asym", "stands twice"),
        ("int4.g32.s-f32.s-bf16", "stands twice"),
        ("int4.g32.s-f23", "unknown scale format 'f23'"),
        ("int4.g32@", "needs a scale rule"),
        ("int4.g32@msee", "Did you mean 'mse'"),
        ("int4.g32~", "only 'gptq' and 'descent' follow"),
        ("int4.g32~awq", "only 'gptq' and 'descent' follow"),
        ("int4.token", "weights cannot be quantized per token"),
        ("int8.channel+", "nothing follows the '+'"),
        ("int8.channel+int8.channel", "activations have granularity 'channel'"),
        ("int8.channel+int8.block32", "activations have granularity 'block32'"),
        ("int8.channel+int8.token@mse", "drop '@' and '~' after the '+'"),
        ("int8.channel+int8.token~gptq", "drop '@' and '~' after the '+'"),
        ("int8.channel.out6", "write '+int8.token.outN'"),
        ("int8.peg8", "nor by the range of inputs"),
        ("int8.channel+int8.peg8.s-e8m0", "share plain scales"),
        ("int8.channel+nvfp4.peg8", "unknown element format 'nvfp4'"),
        ("int8.channel+int8.g32.out6", "write '+int8.token.outN'"),
        ("int8.channel+int8.token.out0", "'out0' is not an option"),
        ("int8.channel+int8.token.out9999999999", "is not an option"),
        ("int8.channel+int8.token.out6.out7", "'out7' is not an option"),
        ("int8.g16.s-micro16", "write '.g2.s-micro16' without"),
        ("mx9@mse", "write '.g2.s-micro16' without"),
        ("mx9~gptq", "write '.g2.s-micro16' without"),
        ("mxfp4@fouroversix", "write 'nvfp4@fouroversix'"),
        ("fp4_e2m1.g32.asym", "only integer formats have a zero point"),
        ("int4.g32.asym@fullrange", "asymmetric codes use the full range already"),
        ("fp4_e2m1.g32@fullrange", "for integer formats only"),
        ("int4.g32.s-e8m0@fullrange", "no sign"),
        ("int4.g32.asym.s-e8m0", "only bf16 and f32 scales go with a zero point"),
        ("int4.g32.asym.s-e4m3", "only bf16 and f32 scales go with a zero point"),
        ("int4.tensor@mse", "before the first row is read"),
        ("int8.channel+int8.tensor.asym", "before the first row is read"),
        ("int8.unscaled", "only floating-point formats can go unscaled"),
        ("nf4.unscaled", "only floating-point formats can go unscaled"),
        ("fp8_e4m3.unscaled@mse", "no scale rule"),
        ("fp8_e4m3.unscaled.s-e4m3", "no scale format"),
        ("", "unknown element format ''"),
    ],
)
def test_a_wrong_name_says_what_is_wrong_and_quotes_itself(name: str, message: str) -> None:
    with pytest.raises(SchemeError) as caught:
        parse_scheme(name)
    assert message in str(caught.value)
    assert repr(name) in str(caught.value)


def test_only_tensor_and_two_level_scales_need_the_amax_of_the_whole_tensor() -> None:
    needs = {
        "int8.tensor": True,
        "nvfp4": True,
        "int4.g32.s-e4m3": True,
        "int8.channel": False,
        "int4.block32": False,
        "mxfp4": False,
        "fp8_e4m3.unscaled": False,
    }
    for name, expected in needs.items():
        weight = parse_scheme(name).weight
        assert weight is not None
        assert weight.needs_tensor_amax is expected, name


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz0123456789._@~+-", max_size=30))
def test_any_text_parses_or_is_a_scheme_error(text: str) -> None:
    try:
        scheme = parse_scheme(text)
    except SchemeError:
        return
    assert parse_scheme(scheme.name) == scheme


def test_every_name_that_the_grammar_composes_is_a_fixed_point_or_is_refused() -> None:
    granularities = ("unscaled", "tensor", "channel", "g32", "block16", "block16x32")
    options = ("", ".asym", ".s-f32", ".s-e8m0", ".s-e8m0ceil", ".s-e4m3", ".asym.s-f32")
    rules = ("", "@fullrange", "@mse", "@nats")
    names = set()
    for element, granularity, option, rule in product(
        ELEMENT_FORMATS, granularities, options, rules
    ):
        try:
            scheme = parse_scheme(f"{element}.{granularity}{option}{rule}")
        except SchemeError:
            continue
        assert parse_scheme(scheme.name) == scheme
        names.add(scheme.name)
    # Per integer: 5 with one scale for the tensor; else 4 granularities of 3 signed scales under
    # 4 rules, 2 unsigned under 3 and 2 asymmetric under 3. Per float: 5, 4 of 5 scales under 3
    # rules, and unscaled; the codebook has no unscaled one.
    of_kind = {
        IntFormat: 5 + 4 * (12 + 6 + 6),
        FloatFormat: 5 + 4 * 15 + 1,
        CodebookFormat: 5 + 4 * 15,
    }
    assert len(names) == sum(of_kind[type(element)] for element in ELEMENT_FORMATS.values())
