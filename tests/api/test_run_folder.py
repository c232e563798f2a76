"""The names that results of a run have in its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mofq.api.run_folder import Asked, RunFiles

FIRST = Asked({"bits_per_weight": 5.0}, "vllm-cpu", "serving", "a" * 64, None)


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({}, []),
        ({"space_sha256": None}, []),  # of a version that did not note it
        ({"budget": {"kl_nats_per_token": 0.02}}, ["0.02nats"]),
        ({"budget": {"checkpoint_bytes": 5, "finer_fraction": 0.1}}, ["5B", "0.1finer"]),
        ({"budget": {}}, ["no-budget"]),
        ({"engine": "vllm-hopper:tp=2"}, ["5.0bits", "vllm-hopper-tp=2"]),
        ({"engine": None}, ["5.0bits", "no-engine"]),
        ({"space": "w8a8", "space_sha256": "b" * 64}, ["5.0bits", "w8a8"]),
        ({"corpus_weights": "en=3,pt=1"}, ["5.0bits", "en=3,pt=1"]),
        ({"space": "a/b", "engine": "e"}, ["5.0bits", "e", "a-b"]),
    ],
)
def test_a_request_is_named_by_what_sets_it_apart(
    changed: dict[str, object], parts: list[str]
) -> None:
    assert replace(FIRST, **changed).differences_from(FIRST) == parts  # type: ignore[arg-type]


def test_a_space_has_changed_where_its_name_is_the_same_and_its_hash_is_not() -> None:
    assert replace(FIRST, space_sha256="b" * 64).has_changed_space(FIRST)
    assert not replace(FIRST, space_sha256="b" * 64, space="w8a8").has_changed_space(FIRST)
    assert not replace(FIRST, space_sha256=None).has_changed_space(FIRST)


def test_the_first_request_has_the_plain_names() -> None:
    plain, other = RunFiles(Path("run")), RunFiles(Path("run"), "-5.0bits")
    assert (plain.recipe, plain.model) == (Path("run/recipe.yaml"), Path("run/model"))
    assert other.recipe == Path("run/recipe-5.0bits.yaml")
    assert other.validation == Path("run/validation-5.0bits.json")
    assert other.model == Path("run/model-5.0bits")
    assert other.named("torchao.json") == Path("run/torchao-5.0bits.json")
    assert plain.table == other.table
