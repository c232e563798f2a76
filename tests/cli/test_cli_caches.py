"""The KV cache as a decision of every command that decides, on a small table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import ok, refused
from explore_tables import CACHE_FORMATS, write_explore_table

from mofq.decision import recipe_from_table
from mofq.decision.recipe import load_recipe
from mofq.decision.serving import serving_engines
from mofq.evidence.table import read_table

TOKENS = 2000


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches")
    return write_explore_table(folder / "table.jsonl", corpora=("en", "pt"), caches=True)


def said(*command: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ok(*command, "--json").out)
    return found


@pytest.mark.parametrize("engine", [(), ("--engine", "vllm-hopper")])
def test_a_point_of_the_frontier_is_what_a_search_of_its_size_finds(
    table: Path, tmp_path: Path, engine: tuple[str, ...]
) -> None:
    context = ("--kv-tokens", TOKENS, *engine)
    found = said("frontier", table, *context)
    assert found["axis"] == "size_bytes"
    points = found["points"]
    assert len({point["kv_bits"] for point in points}) > 3
    assert len({point["bits_per_weight"] for point in points}) > 3
    for point in points[::9]:
        cache = TOKENS * point["kv_bytes_per_token"]
        assert point["size_bytes"] == point["checkpoint_bytes"] + cache
        assert len(point["kv_cache"].keys() - {"bf16"}) <= (1 if engine else 4)
        size = ("--max-size", point["size_bytes"], "--ties", "off")
        one = said("search", table, *size, *context, "-o", tmp_path / "recipe.yaml")
        assert one["error"] <= point["error"]
        if not engine:
            assert one["error"] == point["error"]
            assert one["kv_bits"] == point["kv_bits"]
    ran = ok("frontier", table, *context)
    assert "and 2,000 tokens" in ran.out
    assert "--max-size SIZE" in ran.err
    assert f"--kv-tokens {TOKENS}" in ran.err


def test_caches_of_two_formats_are_served_by_no_engine(table: Path) -> None:
    content = read_table(table)
    one, other = "kv:fp8_e4m3.tensor", "kv:int8.token_head"
    for schemes, is_served in (
        (("bf16", one), True),
        (("bf16", other), True),
        ((one, other), False),
    ):
        chosen = {group.name: "bf16" for group in content.header.groups}
        chosen |= {cache.name: schemes[n % 2] for n, cache in enumerate(content.caches)}
        recipe = recipe_from_table(content, chosen, made_by={}, budget={})
        assert ("vllm-hopper" in serving_engines(content, recipe)) == is_served


def test_bits_of_the_cache_are_kept_along_a_frontier_in_bits_per_weight(
    table: Path, tmp_path: Path
) -> None:
    found = said("frontier", table, "--max-kv-bits", "7")
    assert found["axis"] == "bits_per_weight"
    kept = {point["kv_bits"] for point in found["points"]}
    assert len(kept) == 1
    assert 4.25 < kept.pop() <= 7
    point = found["points"][4]
    bits = ("--max-bits", repr(point["bits_per_weight"]), "--max-kv-bits", "7", "--ties", "off")
    one = said("search", table, *bits, "-o", tmp_path / "recipe.yaml")
    assert one["error"] == pytest.approx(point["error"], rel=1e-12)
    # Without the cache everything is as it was before there was one.
    alone = said("frontier", table)
    assert "kv_bits" not in alone["points"][0]
    assert len(alone["points"]) == len(found["points"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-kv-bits", "4"), "the smallest possible is 4.25 bits per cached number"),
        (("--kv-cache", "int8.head"), "give --max-kv-bits"),
        (("--kv-tokens", "9", "--unit", "tensor_mse"), "leave --unit out"),
    ],
)
def test_what_no_frontier_can_be_drawn_of(
    table: Path, options: tuple[str, ...], words: str
) -> None:
    assert words in refused("frontier", table, *options)


def test_a_table_without_caches_says_how_to_measure_them(tmp_path: Path) -> None:
    plain = write_explore_table(tmp_path / "table.jsonl")
    assert "calibrate --kv-cache" in refused("frontier", plain, "--kv-tokens", "9")


@pytest.mark.parametrize(
    "budget", [("--max-kv-bits", "9"), ("--max-size", "5MB", "--kv-tokens", TOKENS)]
)
def test_greedy_takes_one_width_of_the_cache_and_exact_is_not_worse(
    table: Path, tmp_path: Path, budget: tuple[object, ...]
) -> None:
    budgets = (*budget, "--max-bits", "5", "--ties", "off")
    greedy = said("search", table, *budgets, "--solver", "greedy", "-o", tmp_path / "greedy.yaml")
    exact = said("search", table, *budgets, "-o", tmp_path / "exact.yaml")
    assert len(greedy["kv_cache"]) == 1
    assert exact["error"] <= greedy["error"]
    for one in (greedy, exact):
        if "--kv-tokens" in budget:
            size = one["checkpoint_bytes"] + TOKENS * one["kv_bytes_per_token"]
            assert size <= 5_000_000
        else:
            assert one["kv_bits"] <= 9


def test_the_worst_corpus_counts_caches(table: Path, tmp_path: Path) -> None:
    budgets = ("--max-kv-bits", "8", "--max-bits", "6", "--ties", "off")
    mean = said("search", table, *budgets, "-o", tmp_path / "mean.yaml")
    worst = ("--objective", "worst-corpus", "-o", tmp_path / "worst.yaml")
    found = said("search", table, *budgets, *worst)
    assert found["error"] > mean["error"]
    assert load_recipe(tmp_path / "worst.yaml").kv_cache


def test_a_quantized_cache_is_read_faster_and_a_time_can_ask_for_it(
    table: Path, tmp_path: Path
) -> None:
    workload = ("--device-model", "h100", "--workload", "decode:batch=64,context=8192")
    out = ("-o", tmp_path / "recipe.yaml")
    whole = said("search", table, "--max-kv-bits", "16", *workload, *out)
    half = said("search", table, "--max-kv-bits", "8", *workload, *out)
    # Attention over the cache is most of the time here: 3 layers of 512 numbers of 2 bytes.
    read = 64 * 8192 * 3 * 512 * 2 / 3.35e12
    assert whole["seconds"] > read
    assert whole["seconds"] - half["seconds"] == pytest.approx(
        read * (1 - half["kv_bits"] / 16), rel=0.01
    )
    asked = f"{1e6 * (whole['seconds'] + half['seconds']) / 2:.3f}us"
    found = said("search", table, "--max-kv-bits", "16", "--max-time", asked, *workload, *out)
    assert found["seconds"] <= 1e-6 * float(asked[:-2])
    assert found["kv_bits"] < 16


def test_formats_that_an_engine_does_not_hold_beside_the_chosen_one_are_no_alternatives(
    table: Path, tmp_path: Path
) -> None:
    engine = ("--engine", "vllm-hopper", "--max-kv-bits", "8.5")
    why = ("--explain", "layers.1.attn.kv_cache", "-o", tmp_path / "recipe.yaml")
    (found,) = said("search", table, *engine, *why)["explained"]
    chosen = {one.scheme for one in load_recipe(tmp_path / "recipe.yaml").kv_cache} - {"bf16"}
    assert chosen == {"kv:int8.token_head"}
    schemes = {one["scheme"] for one in found["alternatives"]}
    assert schemes == chosen | {"bf16"}
    assert "one format of the cache for the whole model" in found["rejected"]["kv:fp8_e4m3.tensor"]


def test_a_difference_of_caches_is_counted_and_priced_beside_the_layers(
    table: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    ok("search", table, "--max-bits", "5", "--max-kv-bits", "6", "-o", first)
    ok("search", table, "--max-bits", "5", "-o", second)
    found = said("diff", first, second, "--table", table)
    recipe = load_recipe(first)
    assert found["kv_bits"] == [recipe.result.kv_bits, 16.0]
    saved = [found["groups"][one.name]["cache_bytes_per_token"] for one in recipe.kv_cache]
    assert sum(saved) == 3 * 512 * 16 / 8 - float(recipe.result.kv_bytes_per_token or 0)
    ran = ok("diff", first, second, "--table", table)
    assert "0 of 12 fusion groups differ, and 3 of 3 KV caches" in ran.out
    assert "a token" in ran.out
    assert {one.scheme for one in recipe.kv_cache} <= {*CACHE_FORMATS, "bf16"}
