"""The KV cache through the whole flow, on the bundled model."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import DEMO, ok, refused
from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy
from optuna.study import load_study
from safetensors.torch import load_file, save_file

from mofq.decision import Budgets, Request, choose, request_problem
from mofq.decision.make_recipe import recipe_from_table
from mofq.decision.recipe import (
    Recipe,
    RecipeCache,
    check_recipe,
    load_recipe,
    parse_recipe,
    recipe_text,
    write_recipe,
)
from mofq.delivery.export.compressed_tensors import check_compressed_tensors
from mofq.delivery.export.compressed_tensors.recipe_from_folder import (
    recipe_from_compressed_tensors,
)
from mofq.delivery.validation import find_deviations
from mofq.delivery.validation.measured_kl import MeasuredKl
from mofq.evidence.calibration.stats import read_stats
from mofq.evidence.corpora import load_text
from mofq.evidence.measure.kv_cache import cache_rows
from mofq.evidence.measure.samples import SampleReader
from mofq.evidence.table import Table, read_table
from mofq.exceptions import EnforcementError, RecipeError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.kv_schemes import cache_bits, parse_cache_scheme
from mofq.model.layers import find_layers
from mofq.model.loading import load_model
from scripts.reproduce.kv_cache import bits_per_number, searched_recipes, uniform_recipes

FORMATS = (
    *("kv:fp8_e4m3.tensor", "kv:fp8_e4m3.head", "kv:int8.head", "kv:int8.token_head"),
    *("kv:int4.token_head.s-bf16", "kv:int6.token_head.s-bf16/int4.token_head.s-bf16"),
)
SPACE = f"""\
version: 1
schemes: [int8.channel+int8.token]
kv_cache: ["{'", "'.join(FORMATS)}"]
"""


@dataclass(frozen=True)
class Flow:
    folder: Path
    stats: Path
    table: Path

    @property
    def content(self) -> Table:
        return read_table(self.table)


@pytest.fixture(scope="session")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    folder = tmp_path_factory.mktemp("cached")
    (folder / "space.yaml").write_text(SPACE)
    calibrate = ("--corpus", "en=demo-en-calibration", "--sequences", "12", "--keep", "6")
    ok(
        "calibrate",
        DEMO,
        *calibrate,
        "--sequence-length",
        "256",
        "--kv-cache",
        "-o",
        folder / "stats",
    )
    measured = ("--space", folder / "space.yaml", "--stats", folder / "stats")
    ok("measure", DEMO, *measured, "-o", folder / "table.jsonl")
    return Flow(folder, folder / "stats", folder / "table.jsonl")


def cached(
    table: Table, scheme: str, *, left: tuple[int, ...] = (), layers: str = "bf16"
) -> Recipe:
    """One format for every layer's cache but some."""
    schemes = {group.name: layers for group in table.header.groups}
    for cache in table.caches:
        schemes[cache.name] = "bf16" if cache.decoder_layer in left else scheme
    return recipe_from_table(table, schemes, made_by={}, budget={})


@pytest.mark.long
def test_what_keys_and_values_cost_adds_up(flow: Flow) -> None:
    (cache, *_) = find_layers(open_checkpoint(DEMO)).caches
    names = ("int8.token/int4.token", "int8.token/bf16", "bf16/int4.token")
    with SampleReader(read_stats(flow.stats)) as reader:
        rows = cache_rows(reader, ["en"], cache, [parse_cache_scheme(name) for name in names])
    both, keys, values = (np.array(row.sample_errors) for row in rows)
    assert ((values > keys) & (keys > 0)).all()
    np.testing.assert_allclose(both, keys + values, rtol=1e-5)


@pytest.mark.parametrize("scheme", ["kv:fp8_e4m3.tensor", "kv:int8.token_head", FORMATS[-2]])
def test_the_cost_of_a_format_is_predicted(flow: Flow, scheme: str) -> None:
    table = flow.content
    predicted = sum(row.error for row in table.rows if row.scheme == scheme)
    write_recipe(cached(table, scheme), flow.folder / "one.yaml")
    ran = ok(
        *("validate", DEMO, flow.folder / "one.yaml", "--text", "demo-en", "--tokens", "2048"),
        *("--sequence-length", "256", "--json"),
    )
    found = json.loads(ran.out)
    assert found["enforced"] is True
    assert found["kl_nats_per_token"] == pytest.approx(predicted, rel=0.3)


@pytest.mark.long
@pytest.mark.parametrize(
    "scheme", ["kv:int4.token_head.asym.rht", "kv:nvfp4.unscaled", "kv:nvfp4.unscaled@fouroversix"]
)
def test_the_cost_of_a_kernels_format_is_predicted(flow: Flow, scheme: str) -> None:
    caches = find_layers(open_checkpoint(DEMO)).caches
    with SampleReader(read_stats(flow.stats)) as reader:
        rows = [cache_rows(reader, ["en"], one, [parse_cache_scheme(scheme)])[0] for one in caches]
    write_recipe(kept_in(flow.content, scheme), flow.folder / "one.yaml")
    ran = ok(
        *("validate", DEMO, flow.folder / "one.yaml", "--text", "demo-en", "--tokens", "2048"),
        *("--sequence-length", "256", "--json"),
    )
    found = json.loads(ran.out)
    assert found["enforced"] is True
    assert found["kl_nats_per_token"] == pytest.approx(sum(row.error for row in rows), rel=0.3)


def kept_in(table: Table, scheme: str, *, left: tuple[int, ...] = ()) -> Recipe:
    """As `cached`, in a format without static scales that the table need not have."""
    recipe = cached(table, "kv:int8.token_head", left=left)
    caches = [
        one if one.scheme == "bf16" else replace(one, scheme=scheme) for one in recipe.kv_cache
    ]
    return replace(recipe, kv_cache=tuple(caches))


def test_a_searched_mixture_measures_better_than_a_uniform_format_of_more_bits(flow: Flow) -> None:
    table = flow.content
    uniform, predicted = uniform_recipes(table)["`kv:fp8_e4m3.tensor`"]
    recipes = {"uniform": uniform, "search": searched_recipes(table)["search, 7 bits"][0]}
    assert bits_per_number(recipes["search"].kv_cache, table.caches) <= 7
    measured = {}
    text = load_text("demo-en")
    with MeasuredKl(str(DEMO), text, tokens=1024, sequence_length=256) as objective:
        for label, recipe in recipes.items():
            windows = list(objective.evaluate(recipe))
            measured[label] = sum(windows) / len(windows)
    assert measured["search"] < 0.7 * measured["uniform"]
    assert measured["uniform"] == pytest.approx(predicted, rel=0.4)


def test_rows_are_in_nats_with_samples_and_the_bytes_of_static_scales(flow: Flow) -> None:
    table = flow.content
    assert [cache.name for cache in table.caches] == [f"layers.{n}.attn.kv_cache" for n in range(6)]
    rows = [row for row in table.rows if row.group == "layers.3.attn.kv_cache"]
    assert {row.scheme for row in rows} == {*FORMATS, "bf16"}
    assert {row.unit for row in rows} == {"kl_nats_per_token"}
    by_scheme = {row.scheme: row for row in rows}
    assert by_scheme["bf16"].error == 0
    # One float32 for keys and one for values; or one for each of 2 heads; or none.
    assert [by_scheme[name].bytes for name in FORMATS[:4]] == [8, 16, 16, 0]
    assert all(len(row.sample_errors or ()) == 6 for row in rows)
    tensor, head = by_scheme[FORMATS[0]].static_amax, by_scheme[FORMATS[1]].static_amax
    assert tensor is not None
    assert head is not None
    assert tensor["k"] == max(head["k.0"], head["k.1"])


def test_a_second_run_of_measure_adds_nothing(flow: Flow) -> None:
    before = flow.table.read_bytes()
    ok(
        "measure",
        DEMO,
        "--space",
        flow.folder / "space.yaml",
        "--stats",
        flow.stats,
        "-o",
        flow.table,
    )
    assert flow.table.read_bytes() == before


@pytest.mark.parametrize("max_kv_bits", [4.5, 5.0, 6.1, 8.0, 11.0, 16.0])
def test_bits_of_the_cache_are_never_overshot(flow: Flow, max_kv_bits: float) -> None:
    problem = request_problem(flow.content, Request(kv_cache=True))
    budgets = Budgets(max_bits=9.0, max_kv_bits=max_kv_bits)
    choice_F = choose(problem, budgets, ties=False).choice_F
    schemes = problem.schemes_of(choice_F)
    caches = flow.content.caches
    bits = sum(cache_bits(parse_cache_scheme(schemes[cache.name]), cache) for cache in caches)
    assert bits <= max_kv_bits * sum(cache.numbers for cache in caches)


def test_the_best_mixture_under_bits_is_that_of_all_mixtures(flow: Flow) -> None:
    table = flow.content
    problem = request_problem(table, Request(kv_cache=True))
    chosen = choose(problem, Budgets(max_kv_bits=7.0), ties=False).choice_F
    groups = [number for number, group in enumerate(problem.groups) if group.cached]
    error_P, bits_P = problem.cost_PK[:, 0], problem.cache_bits_P
    best = min(
        sum(error_P[p] for p in options)
        for options in product(*(problem.options_of(number) for number in groups))
        if sum(bits_P[p] for p in options) <= 7.0 * problem.cached
    )
    assert error_P[chosen].sum() == pytest.approx(best)


def test_a_size_counts_the_cache_of_a_context(flow: Flow) -> None:
    table, tokens = flow.content, 8192
    problem = request_problem(table, Request(kv_cache=True, kv_tokens=tokens))
    limit = 6_000_000
    choice_F = choose(problem, Budgets(max_bytes=limit), ties=False).choice_F
    bits = int(problem.cache_bits_P[choice_F].sum())
    used = problem.bytes_of(choice_F) + problem.other_bytes + tokens * bits / 8
    assert 0.97 * limit < used <= limit
    # Both gave way: all that is left alone would be 2.8 MB of weights and 12.6 MB of cache.
    assert (np.diff(problem.bytes_P[choice_F]) != 0).any()
    assert bits < 16 * problem.cached


def test_a_recipe_keeps_its_cache_and_is_checked(flow: Flow) -> None:
    layers = find_layers(open_checkpoint(str(DEMO)))
    recipe = cached(flow.content, "kv:int8.head", left=(2,))
    assert parse_recipe(recipe_text(recipe)) == recipe
    check_recipe(recipe, layers)
    first, *others = recipe.kv_cache
    for caches, words in (
        (tuple(others), "'layers.0.attn.kv_cache' is missing"),
        ((replace(first, name="layers.9.attn.kv_cache"), *others), "no attention layer"),
        ((replace(first, scheme="kv:int4.g64", static_amax=None), *others), "multiple of 64"),
        ((replace(first, static_amax={"k": 1.0}), *others), "exactly k.0, k.1, v.0, v.1"),
    ):
        with pytest.raises(RecipeError, match=words):
            check_recipe(replace(recipe, kv_cache=caches), layers)


def test_a_cache_that_is_not_the_recipes_is_found(flow: Flow) -> None:
    checkpoint = open_checkpoint(str(DEMO))
    recipe = cached(flow.content, "kv:fp8_e4m3.tensor")
    from mofq.delivery.backends import apply_recipe

    model = apply_recipe(load_model(checkpoint.folder), recipe, checkpoint=checkpoint)
    assert find_deviations(model, recipe, checkpoint=checkpoint) == ()
    first = recipe.kv_cache[0]
    other = replace(first, static_amax={"k": 1.0, "v": 1.0})
    for wrong in (other, RecipeCache(first.name, "bf16"), replace(first, scheme="kv:int8.tensor")):
        changed = replace(recipe, kv_cache=(wrong, *recipe.kv_cache[1:]))
        (deviation,) = find_deviations(model, changed, checkpoint=checkpoint)
        assert deviation.layer == "layers.0.attn.kv_cache"


@pytest.mark.parametrize("scheme", ["kv:fp8_e4m3.tensor", "kv:fp8_e4m3.head"])
def test_an_export_is_what_its_consumer_reads(flow: Flow, scheme: str, tmp_path: Path) -> None:
    recipe = cached(flow.content, scheme, left=(4,), layers="int8.channel+int8.token")
    write_recipe(recipe, tmp_path / "recipe.yaml")
    out = tmp_path / "out"
    ran = ok("export", DEMO, tmp_path / "recipe.yaml", "--to", "compressed-tensors", "-o", out)
    assert "--kv-cache-dtype-skip-layers 4" in ran.out
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    arguments = QuantizationConfig.model_validate(config).kv_cache_scheme
    assert arguments is not None
    assert (arguments.num_bits, arguments.type, arguments.symmetric) == (8, "float", True)
    by_head = scheme.endswith("head")
    assert arguments.strategy == (
        QuantizationStrategy.ATTN_HEAD if by_head else QuantizationStrategy.TENSOR
    )
    scales = {k: v for k, v in load_file(out / "model.safetensors").items() if "_scale" in k[-8:]}
    scales = {k: v for k, v in scales.items() if k.endswith((".k_scale", ".v_scale"))}
    assert len(scales) == 10
    amax = recipe.kv_cache[1].static_amax
    assert amax is not None
    found = scales["model.layers.1.self_attn.v_scale"]
    wanted = [value for key, value in amax.items() if key[0] == "v"]
    assert found.shape == ((2, 1, 1) if by_head else (1,))
    assert found.flatten().tolist() == pytest.approx([one / 448 for one in wanted], rel=1e-6)
    assert f"attention layers: `{scheme}` in 5, `bf16` in 1" in (out / "README.md").read_text()
    check_compressed_tensors(open_checkpoint(str(DEMO)), recipe, out)
    back = {one.name: one for one in recipe_from_compressed_tensors(out).kv_cache}
    assert back["layers.1.attn.kv_cache"].scheme == scheme
    assert back["layers.1.attn.kv_cache"].static_amax == pytest.approx(amax, rel=1e-6)
    _halve_a_scale(out / "model.safetensors")
    with pytest.raises(EnforcementError, match="KV cache"):
        check_compressed_tensors(open_checkpoint(str(DEMO)), recipe, out)


def _halve_a_scale(file: Path) -> None:
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.k_scale"] = tensors["model.layers.0.self_attn.k_scale"] / 2
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("scheme", "engine", "words"),
    [
        ("kv:int8.head", (), "emulated only"),
        ("kv:fp8_e4m3.tensor", ("--engine", "vllm-cpu"), "towards zero"),
        ("kv:fp8_e4m3.head", ("--engine", "vllm-ada"), "takes scales of heads"),
        ("kv:fp8_e4m3.tensor", ("--engine", "sglang-hopper"), "knows no way"),
    ],
)
def test_what_no_engine_holds_is_refused_before_anything_is_written(
    flow: Flow, scheme: str, engine: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    write_recipe(cached(flow.content, scheme), tmp_path / "recipe.yaml")
    export = ("export", DEMO, tmp_path / "recipe.yaml", "--to", "compressed-tensors", *engine)
    assert words in refused(*export, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_tool_would_not_say_it(flow: Flow, tmp_path: Path) -> None:
    write_recipe(cached(flow.content, "kv:fp8_e4m3.tensor"), tmp_path / "recipe.yaml")
    export = ("export", DEMO, tmp_path / "recipe.yaml", "--to", "llm-compressor")
    assert "says nothing of the KV cache" in refused(*export, "-o", tmp_path / "out.yaml")


def test_two_formats_in_one_model_are_refused(flow: Flow, tmp_path: Path) -> None:
    table = flow.content
    recipe = cached(table, "kv:fp8_e4m3.tensor")
    others = cached(table, "kv:fp8_e4m3.head").kv_cache[1:]
    write_recipe(replace(recipe, kv_cache=(recipe.kv_cache[0], *others)), tmp_path / "recipe.yaml")
    export = ("export", DEMO, tmp_path / "recipe.yaml", "--to", "compressed-tensors")
    assert "one format of the cache" in refused(*export, "-o", tmp_path / "out")


@pytest.mark.parametrize(
    ("scheme", "engine", "flag"),
    [
        ("kv:int8.token_head", ("--engine", "vllm-hopper"), "int8_per_token_head"),
        ("kv:int4.token_head.asym.rht", ("--engine", "vllm-ampere"), "int4_per_token_head"),
        ("kv:nvfp4.unscaled", (), "nvfp4"),
        ("kv:nvfp4.unscaled@fouroversix", (), "nvfp4_4over6"),
    ],
)
def test_a_format_without_scales_in_the_checkpoint_is_asked_for_by_a_flag(
    flow: Flow, scheme: str, engine: tuple[str, ...], flag: str, tmp_path: Path
) -> None:
    write_recipe(kept_in(flow.content, scheme, left=(0, 5)), tmp_path / "recipe.yaml")
    export = ("export", DEMO, tmp_path / "recipe.yaml", "--to", "compressed-tensors")
    ran = ok(*export, *engine, "-o", tmp_path / "out")
    assert f"--kv-cache-dtype {flag} --kv-cache-dtype-skip-layers 0 5" in ran.out
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_search_for_an_engine_takes_one_format_that_it_holds(flow: Flow, tmp_path: Path) -> None:
    search = ("search", flow.table, "--max-kv-bits", "9.5", "--engine", "vllm-hopper")
    ran = ok(*search, "-o", tmp_path / "recipe.yaml", "--json")
    found = json.loads(ran.out)
    names = {one.scheme for one in load_recipe(tmp_path / "recipe.yaml").kv_cache} - {"bf16"}
    assert names == {"kv:int8.token_head"}  # of the three that it holds the most exact one
    assert found["kv_bits"] <= 9.5
    assert any("kv:int8.head" in one["schemes"] for one in found["refused"])


def test_what_a_search_says_of_the_cache(flow: Flow, tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    ran = ok(
        "search",
        flow.table,
        "--max-kv-bits",
        "6",
        "-o",
        first,
        "--explain",
        "layers.3.attn.kv_cache",
    )
    assert "KV cache, bits per number" in ran.out
    assert "KV cache: kv:" in ran.out
    assert "◀ chosen" in ran.out
    assert load_recipe(first).budget["kv_bits"] == 6
    ok("search", flow.table, "--max-kv-bits", "16", "-o", second)
    assert load_recipe(second).kv_cache == ()  # left as it is
    ran = ok("diff", first, second, "--table", flow.table)
    assert "layers.3.attn.kv_cache" in ran.out


@pytest.mark.long
@pytest.mark.parametrize("front", [(), ("--multi-objective",)])
def test_a_study_measures_caches_as_parameters(
    flow: Flow, tmp_path: Path, front: tuple[str, ...]
) -> None:
    budget = ("--max-size", "4MB", "--kv-tokens", "4096", "--solver", "optuna", *front)
    small = ("--tokens", "128", "--sequence-length", "64", "--trials", "8")
    measured = ("--model", DEMO, "--text", "demo-en-calibration", *small)
    out = tmp_path / "recipe.yaml"
    found = json.loads(ok("search", flow.table, *budget, *measured, "-o", out, "--json").out)
    assert found["checkpoint_bytes"] + 4096 * found["kv_bytes_per_token"] <= 4_000_000
    assert found["kl_measured"] > 0
    study = load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'recipe.optuna.db'}")
    trials = study.get_trials()
    assert len(trials) == 8
    assert all("layers.3.attn.kv_cache" in trial.params for trial in trials)
    assert load_recipe(out).kv_cache


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--max-kv-bits", "4"), "the smallest possible is 4.5 bits per cached number"),
        (("--kv-tokens", "100"), "give --max-size or --max-kl"),
        (("--kv-cache", "int8.head"), "give --max-kv-bits"),
        (("--max-kv-bits", "8", "--unit", "output_mse"), "leave --unit out"),
    ],
)
def test_what_a_search_cannot_do_with_the_cache(
    flow: Flow, options: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    assert words in refused("search", flow.table, *options, "-o", tmp_path / "recipe.yaml")


def test_stats_without_the_cache_are_refused_with_what_to_do(flow: Flow, tmp_path: Path) -> None:
    corpus = ("--corpus", "en=demo-en-calibration", "--sequences", "4", "--sequence-length", "64")
    ok("calibrate", DEMO, *corpus, "-o", tmp_path / "stats")
    measure = ("measure", DEMO, "--space", flow.folder / "space.yaml", "-o", tmp_path / "t.jsonl")
    assert "calibrate --kv-cache" in refused(*measure, "--stats", tmp_path / "stats")
    assert "calibrate --kv-cache" in refused(*measure)
    again = refused("calibrate", DEMO, *corpus, "--kv-cache", "-o", tmp_path / "stats")
    assert "KV cache not kept, asked for kept" in again


def test_emulation_in_bfloat16_rounds_what_is_cached(flow: Flow) -> None:
    from mofq.delivery.backends import apply_recipe

    checkpoint = open_checkpoint(str(DEMO))
    model = load_model(checkpoint.folder, dtype="bfloat16")
    token_1T = torch.arange(20)[None]
    with torch.no_grad():
        plain = model(token_1T).logits
        apply_recipe(model, cached(flow.content, FORMATS[4]), checkpoint=checkpoint)
        assert not torch.equal(model(token_1T).logits, plain)
