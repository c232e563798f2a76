"""The fitted twins of a search space."""

from __future__ import annotations

from mofq.evidence.fitted_space import fitted_twin, with_fitted
from mofq.evidence.spaces import parse_search_space
from mofq.numbers.schemes import parse_scheme

TEXT = """version: 1
schemes: [int8.channel+int8.token, "int4.g[128,64]@mse", int4.g64@fullrange, int6.g64@nats~descent]
base: [int8.channel+int8.token]
"""


def test_each_scheme_that_rounds_gets_a_twin_of_the_same_format_and_activations() -> None:
    space = parse_search_space(TEXT, name="some", where="s")
    found = with_fitted(space)
    assert found.twins == {
        "int8.channel@nats~descent+int8.token": ("int8.channel+int8.token",),
        "int4.g128@nats~descent": ("int4.g128@mse",),
        "int4.g64@nats~descent": ("int4.g64@mse", "int4.g64@fullrange"),
    }
    assert [one.text for one in found.space.candidates[len(space.candidates) :]] == [
        "int8.channel@nats~descent+int8.token",
        "int4.g[128,64]@nats~descent",
        "int4.g64@nats~descent",
    ]
    assert found.space.candidates[: len(space.candidates)] == space.candidates


def test_a_space_with_twins_has_a_name_and_hash_of_its_own_and_twins_of_base_are_base() -> None:
    space = parse_search_space(TEXT, name="some", where="s")
    found = with_fitted(space).space
    assert found.name == "some+fitted"
    assert found.sha256 != space.sha256
    assert found.base == ("int8.channel+int8.token", "int8.channel@nats~descent+int8.token")


def test_what_is_fitted_or_left_as_it_is_has_no_twin() -> None:
    assert fitted_twin(parse_scheme("bf16")) is None
    assert fitted_twin(parse_scheme("int4.g32@nats")) is None
    alone = parse_search_space("version: 1\nschemes: [int4.g32@nats~descent]", name="s", where="s")
    assert with_fitted(alone).twins == {}
