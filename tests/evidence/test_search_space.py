from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mofq.engines import legality
from mofq.evidence.spaces import (
    SearchSpace,
    find_search_spaces,
    load_search_space,
    offer_schemes,
    parse_search_space,
    selected_layers,
    shape_rejection,
    statistics_rejection,
)
from mofq.exceptions import SearchSpaceError
from mofq.model.layers import FusionGroup, LinearLayer, ModelLayers
from mofq.numbers.formats import IntFormat
from mofq.numbers.schemes import Scheme, parse_scheme


def layer(name: str, out_features: int, in_features: int) -> LinearLayer:
    return LinearLayer(
        name=name,
        tensor=f"{name}.weight",
        out_features=out_features,
        in_features=in_features,
        dtype="BF16",
        transposed=False,
        expert=None,
        row_start=0,
        decoder_layer=0,
        module=name,
        shares_scale=name,
    )


def space(text: str) -> SearchSpace:
    return parse_search_space(f"version: 1\n{text}", name="mine", where="mine.yaml")


def names(schemes: tuple[Scheme, ...]) -> list[str]:
    return [scheme.name for scheme in schemes]


# SmolLM2's widths: 128 does not divide 576.
QKV = FusionGroup(
    "layers.0.attn.qkv", (layer("l.0.q_proj", 576, 576), layer("l.0.k_proj", 192, 576))
)
DOWN = FusionGroup("layers.0.mlp.down", (layer("l.0.down_proj", 576, 1536),))


@pytest.mark.parametrize(
    "name",
    [
        "w8a8",
        "w8a8_finer",
        "w4a16",
        "w4w8_mixed",
        "blackwell_fp4",
        "w4a4",
        "w4a8",
        "llama3_70b_w8a8",
        "serving",
    ],
)
def test_every_shipped_space_loads_and_says_what_it_is_for(name: str) -> None:
    found = load_search_space(name)
    assert find_search_spaces()[name].read_text().startswith("# ")
    assert found.name == name
    assert len(found.description) > 20
    assert len(found.schemes) >= 3


@pytest.mark.parametrize("name", sorted(find_search_spaces()))
@pytest.mark.parametrize("has_stats", [True, False])
def test_every_shipped_space_offers_something_to_every_shape(name: str, has_stats: bool) -> None:
    odd = FusionGroup("odd", (layer("odd", 7, 11),))
    for offer in offer_schemes(load_search_space(name), [QKV, DOWN, odd], has_stats=has_stats):
        assert offer.schemes
        assert not set(names(offer.schemes)) & set(offer.rejected)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("w8a8_finer", ("int8.channel+int8.token",)),
        ("llama3_70b_w8a8", ("int8.channel+int8.token",)),
        ("w8a8", ("int8.channel+int8.token", "fp8_e4m3.channel+fp8_e4m3.token")),
        ("w4w8_mixed", ()),
    ],
)
def test_base_schemes_are_those_that_count_as_plain(name: str, base: tuple[str, ...]) -> None:
    assert load_search_space(name).base == base


def test_the_mixed_space_has_integers_and_floats_of_4_5_6_and_8_bits() -> None:
    weights = [scheme.weight for scheme in load_search_space("w4w8_mixed").schemes if scheme.weight]
    elements = {weight.element.name for weight in weights}
    assert {"int4", "int5", "int6", "int8", "fp4_e2m1", "fp6_e2m3", "fp8_e4m3"} <= elements
    assert {weight.scale_rule for weight in weights} == {"absmax", "fullrange", "mse"}
    assert all(weight.symmetric for weight in weights)


def integer_bits(schemes: tuple[Scheme, ...]) -> set[int]:
    """Of weight-only integers."""
    elements = {one.weight.element for one in schemes if one.weight and one.activation is None}
    return {element.bits for element in elements if isinstance(element, IntFormat)}


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("serving", {4, 5, 6, 7, 8}),
        ("serving_fitted", {4, 5, 6, 7, 8}),
        ("serving_descent", {4, 5, 6, 7, 8}),
        ("serving_low_bits", {2, 3, 4, 5, 6, 7, 8}),
    ],
)
def test_what_engines_serve_in_2_or_3_bits_is_in_a_space_of_its_own(
    name: str, bits: set[int]
) -> None:
    found = load_search_space(name)
    assert integer_bits(found.schemes) == bits
    for gpu in ("vllm-ampere", "vllm-ada", "vllm-hopper", "vllm-blackwell"):
        for offer in offer_schemes(found, [QKV, DOWN], legality=legality(gpu), has_stats=True):
            assert integer_bits(offer.schemes) == bits
    for other in ("vllm-cpu", "sglang-hopper", "transformers"):
        for offer in offer_schemes(found, [QKV, DOWN], legality=legality(other), has_stats=True):
            assert integer_bits(offer.schemes) <= {4, 8}


def test_the_space_of_low_bits_has_all_of_the_fitted_one() -> None:
    fitted, low = load_search_space("serving_fitted"), load_search_space("serving_low_bits")
    added = set(low.schemes) - set(fitted.schemes)
    assert integer_bits(tuple(added)) == {2, 3}
    assert [one for one in low.schemes if one not in added] == list(fitted.schemes)


def test_the_space_of_descent_has_it_wherever_the_fitted_one_has_gptq() -> None:
    fitted, descent = load_search_space("serving_fitted"), load_search_space("serving_descent")
    assert names(descent.schemes) == [
        one.replace("~gptq", "~descent") for one in names(fitted.schemes)
    ]
    assert any("~descent" in one for one in names(descent.schemes))


def test_a_space_is_loaded_from_a_path_too(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("version: 1\nschemes: [int8.channel]\nmin_gain: 2\nexclude: ['*.o_proj']\n")
    found = load_search_space(str(path))
    assert (found.name, found.min_gain, found.exclude) == ("small", 2.0, ("*.o_proj",))
    assert names(found.schemes) == ["int8.channel", "bf16"]


def test_bf16_is_offered_unless_the_space_says_no() -> None:
    assert names(space("schemes: [int8.channel]").schemes) == ["int8.channel", "bf16"]
    assert names(space("schemes: [bf16, int8.channel]").schemes) == ["bf16", "int8.channel"]
    without = space("schemes: [int8.channel]\noffer_unquantized: false")
    assert names(without.schemes) == ["int8.channel"]
    with pytest.raises(SearchSpaceError, match="offer_unquantized is false, and yet"):
        space("schemes: [bf16]\noffer_unquantized: false")


def test_a_scheme_listed_in_two_spellings_is_offered_once() -> None:
    assert names(space("schemes: [nvfp4, fp4_e2m1.g16.s-e4m3]").schemes) == ["nvfp4", "bf16"]


def test_the_first_group_size_that_divides_every_layer_is_offered() -> None:
    found = space("schemes: ['int8.g[128,64,32]+int8.token']\nbase: ['int8.g[128,64]+int8.token']")
    qkv, down = offer_schemes(found, [QKV, DOWN])
    assert names(qkv.schemes) == ["int8.g64+int8.token", "bf16"]
    assert qkv.rejected == {
        "int8.g128+int8.token": (
            "l.0.q_proj: g128 of the weights needs in_features divisible by 128, got 576"
        )
    }
    assert names(down.schemes) == ["int8.g128+int8.token", "bf16"]
    assert down.rejected == {}
    assert found.base == ("int8.g128+int8.token", "int8.g64+int8.token")


def test_a_size_that_no_layer_of_the_group_may_lack() -> None:
    mixed = FusionGroup("experts", (layer("a", 64, 128), layer("b", 128, 96)))
    (offer,) = offer_schemes(space("schemes: ['int4.g[128,64,32]']"), [mixed])
    assert names(offer.schemes) == ["int4.g32", "bf16"]
    assert offer.rejected["int4.g128"].startswith("b: ")


def test_what_the_engine_refuses_falls_to_the_next_size_with_its_reason() -> None:
    def legality(scheme: Scheme, group: FusionGroup) -> str | None:
        return "no kernel for g64" if scheme.name == "int4.g64" else None

    (offer,) = offer_schemes(space("schemes: ['int4.g[128,64,32]']"), [QKV], legality=legality)
    assert names(offer.schemes) == ["int4.g32", "bf16"]
    assert offer.rejected["int4.g64"] == "no kernel for g64"


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ("int4.g128", "proj: g128 of the weights needs in_features divisible by 128, got 96"),
        ("int8.channel+int8.g64", "proj: g64 of the activations needs in_features divisible by 64"),
        ("fp8_e4m3.block32", "proj: block32 of the weights needs out_features divisible by 32"),
        ("fp8_e4m3.block40x64", "proj: block40x64 of the weights needs in_features divisible by"),
        ("fp8_e4m3.block40x32", None),
        ("int4.g32", None),
        ("int8.channel+int8.token", None),
        ("fp8_e4m3.tensor", None),
        ("bf16", None),
    ],
)
def test_a_shape_is_refused_with_the_layer_the_need_and_the_number(
    scheme: str, reason: str | None
) -> None:
    found = shape_rejection(parse_scheme(scheme), layer("proj", 40, 96))
    assert found is None if reason is None else found is not None and found.startswith(reason)


@pytest.mark.parametrize(
    ("scheme", "needs_statistics"),
    [
        ("int8.channel+int8.tensor", True),
        ("nvfp4+nvfp4", True),
        ("int4.g32@nats", True),
        ("int4.g32~gptq", True),
        ("int4.g32@mse", False),
        ("int8.channel+int8.token", False),
        ("mxfp4+mxfp4", False),
        ("nvfp4", False),
    ],
)
def test_some_schemes_wait_for_statistics(scheme: str, needs_statistics: bool) -> None:
    assert (statistics_rejection(parse_scheme(scheme)) is not None) == needs_statistics
    found = space(f"schemes: ['{scheme}']")
    for has_stats in (False, True):
        (offer,) = offer_schemes(found, [DOWN], has_stats=has_stats)
        is_offered = scheme in names(offer.schemes)
        assert is_offered == (has_stats or not needs_statistics)
        assert is_offered or "mofq calibrate" in offer.rejected[scheme]


def test_an_excluded_layer_keeps_its_whole_fusion_group_as_it_is() -> None:
    found = space("schemes: [int8.channel]\nexclude: ['*.k_proj']\noffer_unquantized: false")
    qkv, down = offer_schemes(found, [QKV, DOWN])
    assert names(qkv.schemes) == ["bf16"]
    assert qkv.rejected == {"int8.channel": "l.0.k_proj: excluded by '*.k_proj'"}
    assert names(down.schemes) == ["int8.channel"]


def test_a_space_says_which_layers_its_selectors_name() -> None:
    found = space(
        "schemes: [int8.channel]\nexclude: [lm_head, '*.down_proj']\nfixed: {attn.qkv: bf16}"
    )
    model = ModelLayers("llama", (QKV, DOWN), (), tied_lm_head=True, other_bytes=0)
    assert [(one.layers, one.groups) for one in selected_layers(found, model)] == [
        (1, 0),
        (1, 1),
        (2, 1),
    ]
    for text in ("exclude: ['*.gate_proj']", "at_most: {'*.gate_proj': 8}"):
        wrong = space(f"schemes: [int8.channel]\n{text}")
        with pytest.raises(SearchSpaceError, match=r"search space mine: .*matches no layer"):
            selected_layers(wrong, model)


def test_constraints_are_on_what_is_chosen_and_not_on_what_is_measured() -> None:
    found = space(
        "schemes: [int8.channel, int4.g32]\n"
        "fixed: {'*.down_proj': [int8.channel, bf16]}\n"
        "at_least: {'attn.*': 4.5, '*': channel}\n"
        "at_most: {mlp.down: 15}"
    )
    assert [str(one) for one in found.constraints] == [
        "fixed *.down_proj=int8.channel,bf16",
        "at_least attn.*=4.5",
        "at_least *=channel",
        "at_most mlp.down=15",
    ]
    qkv, down = offer_schemes(found, [QKV, DOWN])
    assert names(down.schemes) == names(qkv.choices) == ["int8.channel", "int4.g32", "bf16"]
    assert names(down.choices) == ["int8.channel"]
    assert down.barred == {
        "int4.g32": "fixed *.down_proj=int8.channel,bf16",
        "bf16": "at_most mlp.down=15",
    }


def test_a_constraint_on_an_excluded_layer_that_it_cannot_keep_is_refused() -> None:
    found = space("schemes: [int8.channel]\nexclude: ['*.k_proj']\nat_most: {'*': 9}")
    with pytest.raises(
        SearchSpaceError, match=r"`at_most \*=9` leaves no .*bf16 \(16 bits\) \(l\.0\.k_proj: excl"
    ):
        offer_schemes(found, [QKV, DOWN])


def test_a_group_that_nothing_fits_is_an_error_with_the_reasons() -> None:
    found = space("schemes: [int8.g128]\noffer_unquantized: false")
    with pytest.raises(SearchSpaceError, match=r"no scheme fits layers\.0\.attn\.qkv .*got 576"):
        offer_schemes(found, [QKV])


def test_the_hash_changes_with_what_changes_a_number_and_not_with_words() -> None:
    plain = space("schemes: [int8.channel, int4.g32]")
    assert (
        space("description: other\nschemes: [int8.channel, int4.g32] # why").sha256 == plain.sha256
    )
    for change in (
        "schemes: [int4.g32, int8.channel]",
        "schemes: [int8.channel]",
        "schemes: [int8.channel, int4.g32]\nbase: [int8.channel]",
        "schemes: [int8.channel, int4.g32]\nmin_gain: 9",
        "schemes: [int8.channel, int4.g32]\nexclude: [x]",
        "schemes: [int8.channel, int4.g32]\nfixed: {x: bf16}",
        "schemes: [int8.channel, int4.g32]\nat_least: {x: 8}",
        "schemes: [int8.channel, int4.g32]\noffer_unquantized: false",
    ):
        assert space(change).sha256 != plain.sha256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scheems: [int8.channel]", "unknown key 'scheems'. Did you mean 'schemes'"),
        ("schemes: [int8.channel]\nmin_gian: 3", "unknown key 'min_gian'. Did you mean 'min_gain'"),
        ("schemes: [int8.chanel]", "schemes: .*unknown granularity 'chanel'"),
        ("schemes: [itn8.channel]", "Did you mean 'int8'"),
        ("schemes: []", "schemes: must have at least 1 item, found \\[\\]"),
        ("schemes: int8.channel", "schemes: must be a list, found 'int8.channel'"),
        ("schemes: [int8.channel, int8.channel]", "'int8.channel' stands twice"),
        ("schemes: [8]", r"schemes\[0\]: must be text, found 8"),
        ("schemes: [int8.channel]\nmin_gain: -1", "min_gain: must be at least 0, found -1"),
        ("schemes: [int8.channel]\nmin_gain: .inf", "min_gain: must be a number, found '.inf'"),
        ("schemes: [int8.channel]\nmin_gain: 1e999", "min_gain: must be a finite number"),
        ("schemes: [int8.channel]\nbase: [int8.tensor]", "Did you mean 'int8.channel'"),
        ("schemes: [int8.channel]\nfixed: {'*': int8.tensor}", r"fixed: \*: .*'int8.channel'"),
        ("schemes: [int8.channel]\nfixed: {'*': 8}", r"fixed: \*: must be a list, found 8"),
        ("schemes: [int8.channel]\nfixed: ['*']", "fixed: must be a mapping"),
        ("schemes: [int8.channel]\nat_least: {'*': true}", r"at_least: \*: must be text, found"),
        ("schemes: [int8.channel]\nat_most: {'*': -1}", r"at_most: \*: must be a number of bits"),
        ("schemes: [int8.channel]\nat_most: {'*': eight}", r"at_most: \*: .*granularity 'eight'"),
        ("schemes: [int8.channel]\nschemes: [int4.g32]", "line 3: the key 'schemes' stands twice"),
        ("schemes: ['int8.g[64,x]']", "a bracket holds group sizes"),
        ("schemes: ['int8.g[]']", "a bracket holds group sizes"),
        ("schemes: ['int8.g[0]']", "a bracket holds group sizes"),
        ("schemes: ['int8.g[64,64]']", "lists a group size twice"),
        ("schemes: ['int8.g[64]+int8.g[64]']", "more than one bracket"),
        ("schemes: ['int8.g[64']", "more than one bracket"),
        ("schemes: &a [int8.channel]", "line 2: anchors and aliases are not accepted"),
        ("schemes: [int8.channel]\nexclude: [*.o_proj]", "line 3: .*Quote a text that only begins"),
        ("schemes: !!python/object:os.system [x]", "the tag .* is not accepted"),
        ("schemes: [int8.channel]\n---\nversion: 1", "more than one YAML document"),
        ("schemes: [int8.channel", "is not valid YAML"),
        ("schemes: [" * 50, "nests deeper than"),
        ("? [a]\n: b", "a key must be a plain word"),
    ],
)
def test_a_bad_space_is_refused_with_file_key_and_remedy(text: str, message: str) -> None:
    with pytest.raises(SearchSpaceError, match=message) as caught:
        space(text)
    assert str(caught.value).startswith("mine.yaml")


@pytest.mark.parametrize("text", ["", "version: 1", "- a", "42", "version: 2\nschemes: [bf16]"])
def test_what_is_not_a_space_of_version_1_is_refused(text: str) -> None:
    with pytest.raises(SearchSpaceError, match=r"^x\.yaml"):
        parse_search_space(text, name="x", where="x.yaml")


def test_an_unknown_space_gets_the_nearest_name() -> None:
    with pytest.raises(SearchSpaceError, match=r"w8a8_fine: .*Did you mean 'w8a8_finer'"):
        load_search_space("w8a8_fine")


def test_a_file_that_is_too_large_or_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_text("# " + "x" * 200_000)
    with pytest.raises(SearchSpaceError, match="larger than 100000 bytes"):
        load_search_space(path)
    path.write_bytes(b"version: 1\nschemes: [\xff]")
    with pytest.raises(SearchSpaceError, match="not UTF-8"):
        load_search_space(path)
    with pytest.raises(SearchSpaceError, match="cannot be read: Is a directory"):
        load_search_space(tmp_path)


_WORDS = [
    "version",
    "schemes",
    "base",
    ": ",
    "- ",
    "\n",
    "  ",
    "1",
    "int4.g[64,32]",
    "[",
    "]",
    "&a ",
]
_WORDS += [
    "*a",
    "{",
    "}",
    "'",
    "int8.channel",
    "exclude",
    "!!int ",
    ", ",
    "\x00",
    "é",
    "min_gain",
    "|",
]


@given(st.lists(st.sampled_from(_WORDS), max_size=30).map("".join) | st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_no_text_breaks_the_parser(text: str) -> None:
    with contextlib.suppress(SearchSpaceError):
        space(text)
    with contextlib.suppress(SearchSpaceError):
        parse_search_space(text, name="x", where="x.yaml")
