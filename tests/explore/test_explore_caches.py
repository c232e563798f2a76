"""The KV cache on the explorer page and in figures, as far as it shows without a browser."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from command_line import ok
from explore_pages import data_of, recipe_texts
from explore_tables import CACHE_FORMATS, write_explore_table

from mofq.decision import Budgets, Request, decide, request_problem
from mofq.decision.recipe import load_recipe, parse_recipe, write_recipe
from mofq.evidence.table import Table, read_table
from mofq.explore.drawing import read_drawing
from mofq.explore.figures import draw_figure
from mofq.explore.page_data import map_places

TOKENS = 2000
CONTEXT = Request(Budgets(), ties=False, kv_cache=True, kv_tokens=TOKENS)
FOR_ENGINE = Request(Budgets(), ties=False, kv_cache=True, kv_tokens=TOKENS, engine="vllm-hopper")
BITS = Request(Budgets(max_kv_bits=7.0), ties=False, kv_cache=True)
FORMATS = Request(
    Budgets(max_kv_bits=9.0), ties=False, kv_cache=True, kv_formats=("kv:fp8_e4m3.tensor",)
)
PLAIN = Request(Budgets(), ties=False)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explored caches")
    return write_explore_table(folder / "table.jsonl", corpora=("en", "pt"), caches=True)


@pytest.fixture(scope="module")
def table(path: Path) -> Table:
    return read_table(path)


@pytest.mark.long
@pytest.mark.parametrize("request_", [PLAIN, BITS, FORMATS, CONTEXT, FOR_ENGINE])
def test_every_recipe_of_the_page_is_byte_for_byte_what_its_command_writes(
    path: Path, table: Table, request_: Request, tmp_path: Path
) -> None:
    data = data_of(table, path, request=request_)
    output = tmp_path / "recipe.yaml"
    for point, text in list(zip(data["points"], recipe_texts(data), strict=True))[::8]:
        command = shlex.split(point["command"])
        assert command[0] == "mofq"
        ok(*command[1:-1], output)
        assert output.read_text() == text
    recipes = [parse_recipe(text) for text in recipe_texts(data)]
    assert all(recipe.kv_cache for recipe in recipes) == (request_ in (BITS, FORMATS))
    formats = [{one.scheme for one in recipe.kv_cache} - {"bf16"} for recipe in recipes]
    if request_ is FOR_ENGINE:
        assert {len(one) for one in formats} == {0, 1}
        assert len(set().union(*formats)) > 1
    if request_ is PLAIN:
        assert not any(formats)


@pytest.mark.long
def test_a_point_stands_where_its_checkpoint_and_its_cache_say(path: Path, table: Table) -> None:
    data = data_of(table, path, request=CONTEXT)
    assert data["kv_tokens"] == TOKENS
    for point in data["points"]:
        size = point["checkpoint_bytes"] + TOKENS * point["kv_bytes_per_token"]
        assert point["at"] == size == point["size"] + data["other_bytes"]
    places = [point["at"] for point in data["points"]]
    assert places == sorted(set(places))
    plain = data_of(table, path)
    assert all(point["at"] == point["bits_per_weight"] for point in plain["points"])


@pytest.mark.long
def test_the_caches_are_groups_of_the_page_with_every_format(path: Path, table: Table) -> None:
    data = data_of(table, path)  # shown though nobody asked for them
    cached = [one for one in data["groups"] if one["cached"]]
    assert [one["name"] for one in cached] == [f"layers.{n}.attn.kv_cache" for n in range(3)]
    assert {one["module"] for one in cached} == {"attn.kv_cache"}
    assert [one["cached"] for one in cached] == [512] * 3
    schemes = [one["name"] for one in data["schemes"]]
    for group in cached:
        names = {schemes[option[0]] for option in group["options"]}
        assert names == {*CACHE_FORMATS, "bf16"}
        bits = {schemes[option[0]]: option[4] for option in group["options"]}
        assert bits["kv:fp8_e4m3.tensor"] == 8
        assert bits["kv:int8.token_head"] == 8.5
        assert bits["bf16"] == 16
        assert {option[1] for option in group["options"]} == {0}  # nothing of bits per weight
    with_context = data_of(table, path, request=CONTEXT)
    (first, *_) = [one for one in with_context["groups"] if one["cached"]]
    names = [one["name"] for one in with_context["schemes"]]
    sizes = {names[option[0]]: option[1] for option in first["options"]}
    assert sizes["kv:fp8_e4m3.tensor"] == TOKENS * 512 + 8  # two float32 scales
    assert sizes["bf16"] == TOKENS * 512 * 2


@pytest.mark.long
def test_recipes_are_compared_with_their_caches(path: Path, table: Table, tmp_path: Path) -> None:
    request = Request(Budgets(max_bits=5.0, max_kv_bits=7.0), kv_cache=True)
    recipe = decide(table, request).recipe
    write_recipe(recipe, tmp_path / "mine.yaml")
    for asked in (PLAIN, CONTEXT):
        data = data_of(table, path, recipes=[tmp_path / "mine.yaml"], request=asked)
        (mine,) = [one for one in data["references"] if one["kind"] == "recipe"]
        schemes = [data["schemes"][number]["name"] for number in mine["schemes"]]
        assert schemes[-3:] == [one.scheme for one in recipe.kv_cache]
        assert mine["kv_bits"] == recipe.result.kv_bits
        size = float(recipe.result.checkpoint_bytes or 0)
        size += TOKENS * float(recipe.result.kv_bytes_per_token or 0)
        assert mine["at"] == (recipe.bits_per_weight if asked is PLAIN else size)
    # A table that knows no cache does not predict one: what the recipe says of itself stays.
    bare = write_explore_table(tmp_path / "bare.jsonl", corpora=("en", "pt"))
    data = data_of(read_table(bare), bare, recipes=[tmp_path / "mine.yaml"])
    (mine,) = [one for one in data["references"] if one["kind"] == "recipe"]
    assert mine["value"] == recipe.kl_nats_per_token


@pytest.mark.long
def test_uniform_points_beside_a_context_are_pairs_that_none_beats(
    path: Path, table: Table
) -> None:
    data = data_of(table, path, request=CONTEXT)
    uniform = [one for one in data["references"] if one["kind"] == "uniform"]
    pairs = [one for one in uniform if ", kv:" in one["label"]]
    assert len(pairs) > 3
    assert all(one["kv_bits"] == 16 for one in uniform if one not in pairs)
    for one in pairs:
        assert not any(
            other["at"] <= one["at"] and other["value"] < one["value"] for other in uniform
        )
    greedy = [one for one in data["references"] if one["kind"] == "greedy"]
    assert greedy
    assert all(one["label"].endswith("MB") for one in greedy)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["frontier", "map", "sensitivity"])
@pytest.mark.parametrize("flags", [(), ("--kv-tokens", "2000"), ("--max-kv-bits", "8")])
def test_figures_of_a_table_with_caches_are_drawn(
    path: Path, tmp_path: Path, kind: str, flags: tuple[str, ...]
) -> None:
    recipe = tmp_path / "mine.yaml"
    ok("search", path, "--max-bits", "5", "--max-kv-bits", "7", "-o", recipe)
    assert load_recipe(recipe).kv_cache
    out = tmp_path / f"{kind}.svg"
    ok("plot", path, recipe, "--kind", kind, *flags, "-o", out)
    text = out.read_text()
    if kind == "map":
        assert "attn.kv_cache" in text
    if kind == "sensitivity":
        assert "kv:int8.token_head" in text
    if kind == "frontier" and "--kv-tokens" in flags:
        assert "checkpoint and KV cache of 2,000 tokens [MB]" in text


def test_a_map_of_recipes_that_leave_the_cache_shows_the_layers_alone(
    path: Path, table: Table, tmp_path: Path
) -> None:
    write_recipe(decide(table, Request(Budgets(max_bits=5.0))).recipe, tmp_path / "mine.yaml")
    inputs = read_drawing(table, recipes=[tmp_path / "mine.yaml"])
    draw_figure("map", inputs, path=tmp_path / "map.svg")
    assert "kv_cache" not in (tmp_path / "map.svg").read_text()
    problem = request_problem(table, CONTEXT)
    assert map_places(table, problem)[-1] == (2, "attn.kv_cache")
