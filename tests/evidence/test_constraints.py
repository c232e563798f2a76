"""Which layers a selector names, and which schemes constraints take from a fusion group."""

from __future__ import annotations

import pytest

from mofq.cli.flags import flag_of
from mofq.evidence.constraints import (
    ConstraintKind,
    LayerConstraint,
    barred_schemes,
    check_selector,
    constraints_by_group,
    parse_constraint,
    select,
)
from mofq.exceptions import SearchSpaceError
from mofq.model.layers import FusionGroup, LinearLayer, layers_of
from mofq.model.sizes import group_bytes
from mofq.numbers.schemes import parse_scheme


def layer(number: int, module: str, rows: int = 256) -> LinearLayer:
    name = f"model.layers.{number}.{module}"
    word = module.rsplit(".", 1)[-1]
    return LinearLayer(name, f"{name}.weight", rows, 256, "BF16", word, word, decoder_layer=number)


def decoder_layer(number: int) -> list[FusionGroup]:
    q, k = layer(number, "self_attn.q_proj"), layer(number, "self_attn.k_proj", 64)
    return [
        FusionGroup(f"layers.{number}.attn.qk", (q, k)),
        FusionGroup(f"layers.{number}.mlp.down", (layer(number, "mlp.down_proj"),)),
    ]


GROUPS = [group for number in range(11) for group in decoder_layer(number)]
QK, DOWN = GROUPS[:2]
SCHEMES = ("int4.g32", "int8.channel", "int8.g128", "fp8_e4m3.tensor", "bf16")


def constraint(kind: ConstraintKind, layers: str, value: str) -> LayerConstraint:
    return parse_constraint(kind, layers, value, where="here")


def left(*constraints: LayerConstraint, group: FusionGroup = DOWN) -> set[str]:
    sizes = {name: group_bytes(group, parse_scheme(name)) for name in SCHEMES}
    return set(SCHEMES) - barred_schemes(constraints, group, sizes).keys()


@pytest.mark.parametrize(
    ("selector", "groups", "layers"),
    [
        ("*.down_proj", 11, 11),
        ("model.layers.1.*", 2, 3),  # and not those of layer 10
        ("*.k_proj", 11, 11),
        ("layers.10.attn.qk", 1, 2),
        ("attn.*", 11, 22),
        ("mlp.down", 11, 11),
        ("first:2", 4, 6),
        ("last:1", 2, 3),
        ("first:11", 22, 33),
        ("*", 22, 33),
    ],
)
def test_a_selector_names_layers_by_name_kind_or_position(
    selector: str, groups: int, layers: int
) -> None:
    found = check_selector(selector, GROUPS, what="it")
    assert (found.groups, found.layers) == (groups, layers)
    assert sum(len(one) for one in select(selector, GROUPS).values()) == layers


def test_positions_are_those_of_the_decoder_layers() -> None:
    assert list(select("last:2", GROUPS)) == [
        "layers.9.attn.qk",
        "layers.9.mlp.down",
        "layers.10.attn.qk",
        "layers.10.mlp.down",
    ]
    assert select("*.k_proj", [QK]) == {"layers.0.attn.qk": ("model.layers.0.self_attn.k_proj",)}


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("*.layer.0.*", r"matches no layer\. .*nearest names are 'model\.layers\.0\."),
        ("re:.*down_proj", r"regular expressions are not known.*down_proj'"),
        ("model.layers.0", r"Did you mean 'model\.layers\.0\.\*'\?"),
        ("q_proj", r"has to match a whole name.*q_proj'"),
        ("attn", r"nearest names are .*'attn\.qk'"),
        ("first:12", r"The model has 11 decoder layers\."),
        ("last:0", r"The model has 11 decoder layers\."),
    ],
)
def test_a_selector_that_names_nothing_is_refused_with_the_nearest(
    selector: str, message: str
) -> None:
    with pytest.raises(SearchSpaceError, match=message) as caught:
        check_selector(selector, GROUPS, what=f"exclude {selector}")
    assert str(caught.value).startswith(f"exclude {selector} matches no layer.")
    with pytest.raises(SearchSpaceError, match="matches no layer"):
        constraints_by_group([constraint("fixed", selector, "bf16")], GROUPS)


def test_layers_that_are_never_quantized_may_be_named_where_that_is_said() -> None:
    found = check_selector("lm_head", GROUPS, what="it", unquantized=["lm_head"])
    assert (found.layers, found.groups) == (1, 0)
    assert found.remark == "it: 1 layer in 0 fusion groups."


@pytest.mark.parametrize(
    ("kind", "value", "schemes"),
    [
        ("fixed", "int8.channel", {"int8.channel"}),
        ("fixed", "bf16, int4.g32", {"int4.g32", "bf16"}),
        # int8.channel has 8 + 16/256 bits, int8.g128 8 + 16/128, both and the shape in 16 bytes;
        # fp8_e4m3.tensor 8 + 16/65536.
        ("at_least", "8", {"int8.channel", "int8.g128", "fp8_e4m3.tensor", "bf16"}),
        ("at_least", "8.1", {"int8.g128", "bf16"}),
        ("at_most", "8", {"int4.g32"}),
        ("at_most", "8.1", {"int4.g32", "int8.channel", "fp8_e4m3.tensor"}),
        ("at_least", "g128", {"int4.g32", "int8.g128", "bf16"}),
        ("at_least", "g64", {"int4.g32", "bf16"}),
        ("at_least", "channel", {"int4.g32", "int8.channel", "int8.g128", "bf16"}),
        ("at_most", "channel", {"int8.channel", "fp8_e4m3.tensor"}),
        ("at_most", "g128", {"int8.channel", "int8.g128", "fp8_e4m3.tensor"}),
        ("at_least", "block128", {"int4.g32", "int8.channel", "int8.g128", "bf16"}),
    ],
)
def test_a_constraint_leaves_the_schemes_that_keep_it(
    kind: ConstraintKind, value: str, schemes: set[str]
) -> None:
    assert left(constraint(kind, "*", value)) == schemes


def test_a_granularity_holds_for_every_layer_of_a_fusion_group() -> None:
    # One scale for the tensor is one for 65,536 weights of q, and for 16,384 of k.
    assert "fp8_e4m3.tensor" not in left(constraint("at_least", "*", "block200"), group=QK)
    assert "fp8_e4m3.tensor" in left(constraint("at_least", "*", "block256"), group=QK)


def test_several_constraints_hold_together() -> None:
    some = [constraint("at_least", "*", "8"), constraint("at_most", "*.down_proj", "8.1")]
    assert left(*some) == {"int8.channel", "fp8_e4m3.tensor"}


def test_constraints_that_leave_nothing_are_named_and_no_others() -> None:
    four, eight = constraint("at_most", "mlp.*", "5"), constraint("at_least", "first:1", "8")
    with pytest.raises(SearchSpaceError) as caught:
        left(constraint("at_least", "*", "4"), eight, four)
    message = str(caught.value)
    assert message.startswith(
        "`at_least first:1=8` and `at_most mlp.*=5` contradict each other: together they leave no "
        "scheme to layers.0.mlp.down, which could have int4.g32 (4.50195 bits), "
    )
    assert "*=4" not in message
    with pytest.raises(SearchSpaceError, match=r"^`fixed \*=int2.g32` leaves no scheme to layers"):
        left(eight, constraint("fixed", "*", "int2.g32"))


def test_what_an_option_asks_for_is_named_by_it_and_what_a_space_says_by_its_key() -> None:
    of_space, asked = constraint("at_most", "*", "5"), constraint("at_least", "first:1", "8")
    sizes = {name: group_bytes(GROUPS[0], parse_scheme(name)) for name in ("int4.g32", "bf16")}
    with pytest.raises(SearchSpaceError) as caught:
        barred_schemes([of_space, asked], GROUPS[0], sizes, asked=[asked])
    assert caught.value.spelled(flag_of).startswith(
        "`at_most *=5` and `--at-least first:1=8` contradict each other: "
    )
    barred = barred_schemes([asked], GROUPS[0], sizes, asked=[asked])
    assert barred == {"int4.g32": "at_least first:1=8"}  # as Python names it
    assert barred["int4.g32"].spelled(flag_of) == "--at-least first:1=8"


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("fixed", "int9.g32", r"here: scheme 'int9.g32': .*Did you mean 'int8'"),
        ("fixed", "", r"here: write LAYERS=VALUE, e\.g\. '\*\.down_proj=bf16'"),
        ("at_least", " ", r"here: write LAYERS=VALUE, e\.g\. '\*\.down_proj=8'"),
        ("at_least", "many", r"here: bits per weight, or a granularity: .*'many'"),
        ("at_most", "token", r"no weights have the granularity 'token'"),
        ("at_most", "nan", r"must be a number of bits per weight, found nan"),
        ("at_most", "-1", r"must be a number of bits per weight, found -1"),
    ],
)
def test_a_value_that_means_nothing_is_refused(
    kind: ConstraintKind, value: str, message: str
) -> None:
    with pytest.raises(SearchSpaceError, match=message):
        constraint(kind, "*", value)


def test_equal_constraints_have_one_form() -> None:
    assert constraint("at_least", "*", "8.0") == constraint("at_least", "*", "8")
    assert str(constraint("fixed", "*", "fp4_e2m1.g16.s-e4m3, bf16")) == "fixed *=nvfp4,bf16"
    assert len(list(layers_of(GROUPS))) == 33
