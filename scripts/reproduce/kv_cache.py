"""The format of the KV cache in nats: uniform formats and mixtures, predicted and measured.

    python scripts/reproduce/kv_cache.py MODEL --table TABLE --text FILE --work FOLDER

TABLE is of a search space with the key ``kv_cache`` (``w8a8_kv``), on stats of `mofq calibrate
--kv-cache`. Linear layers stay as they are, so that what is measured is the cache alone. Every
uniform format of the table, and the exact mixture under some budgets of bits per cached number:
all that the table offers, one format for keys and values, and what vLLM holds on Hopper.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mofq.decision import Budgets, Request, decide
from mofq.decision.make_recipe import recipe_from_table
from mofq.decision.recipe import Recipe, RecipeCache, recipe_text
from mofq.delivery.backends import apply_recipe
from mofq.evidence.table import Table, read_table
from mofq.model.kv_schemes import cache_bits
from mofq.model.layers import CacheLayer
from mofq.numbers.quantize import fake_quantize_activation
from mofq.numbers.schemes import parse_scheme
from scripts.shared.command import print_markdown, with_error
from scripts.shared.reproduction import Measured, Version, arguments, measure_versions, reference_of

QUERIES = "queries alone in FP8"
BUDGETS = (5.0, 6.0, 7.0, 8.0)
ENGINE = "vllm-hopper"
ENGINE_BUDGETS = (8.0, 10.0, 12.0)


def uniform_recipes(table: Table) -> dict[str, tuple[Recipe, float]]:
    """Label -> recipe and predicted KL, of each format for all layers."""
    errors: dict[str, float] = {}
    for row in table.rows:
        if row.scheme.startswith("kv:"):
            errors[row.scheme] = errors.get(row.scheme, 0.0) + row.error
    corpora = len(table.header.stats.corpora) if table.header.stats else 1
    return {
        f"`{name}`": (cached(table, {one.name: name for one in table.caches}), error / corpora)
        for name, error in errors.items()
    }


def cached(table: Table, caches: dict[str, str]) -> Recipe:
    """Linear layers as they are."""
    schemes = {group.name: "bf16" for group in table.header.groups} | caches
    return recipe_from_table(table, schemes, made_by={}, budget={})


def searched_recipes(table: Table) -> dict[str, tuple[Recipe, float]]:
    """Label -> recipe and predicted KL, of each mixture."""
    single = tuple(dict.fromkeys(r.scheme for r in table.rows if "/" not in r.scheme))
    asked = {
        **{f"search, {bits:g} bits": Request(_bits(bits), kv_cache=True) for bits in BUDGETS},
        **{
            f"search, {bits:g} bits, keys as values": Request(
                _bits(bits), kv_cache=True, kv_formats=single
            )
            for bits in BUDGETS
        },
        **{
            f"search, {bits:g} bits, {ENGINE}": Request(_bits(bits), kv_cache=True, engine=ENGINE)
            for bits in ENGINE_BUDGETS
        },
    }
    found = {}
    for label, request in asked.items():
        recipe = decide(table, request).recipe
        chosen = {one.name: one.scheme for one in recipe.kv_cache}
        found[label] = cached(table, chosen), recipe.kl_nats_per_token or 0.0
    return found


def _bits(bits: float) -> Budgets:
    return Budgets(max_kv_bits=bits)


def apply(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """Emulate the recipe."""
    applied: PreTrainedModel = apply_recipe(model, recipe)
    return applied


def bits_per_number(recipe_caches: Sequence[RecipeCache], caches: Sequence[CacheLayer]) -> float:
    """True bits of a cached number, over all layers of a model."""
    chosen = {cache.name: cache.parsed for cache in recipe_caches}
    bits = sum(cache_bits(chosen[cache.name], cache) for cache in caches)
    return bits / sum(cache.numbers for cache in caches)


def round_queries(model: PreTrainedModel) -> PreTrainedModel:
    """FP8 queries, scale 1: what vLLM on GPUs adds to an FP8 cache under static scales."""
    scheme = parse_scheme("bf16+fp8_e4m3.unscaled").activation
    assert scheme is not None

    def attention(
        module: nn.Module, query: Tensor, *more: object, **named: object
    ) -> tuple[Tensor, Tensor | None]:
        return sdpa_attention_forward(
            module, fake_quantize_activation(query, scheme), *more, **named
        )

    AttentionInterface.register("rounded_queries", attention)
    model.set_attn_implementation("rounded_queries")
    return model


def main(given: Sequence[str] | None = None) -> None:
    """One table."""
    options = arguments(
        __doc__,
        given,
        ("--table", "of a space with kv_cache"),
        ("--text", "held-out text"),
        optional=(("--only", "a regular expression of what the rows are called"),),
    )
    table = read_table(Path(options.table))
    recipes = {
        label: one
        for label, one in (uniform_recipes(table) | searched_recipes(table)).items()
        if re.search(options.only or "", label)
    }
    bits = {
        label: bits_per_number(recipe.kv_cache, table.caches) if recipe.kv_cache else 16.0
        for label, (recipe, _) in recipes.items()
    }
    versions = {
        label: Version(recipe_text(recipe), bits[label], partial(apply, recipe=recipe))
        for label, (recipe, _) in recipes.items()
    }
    if re.search(options.only or "", QUERIES):
        versions[QUERIES] = Version("queries", 16.0, round_queries)
    done = measure_versions(reference_of(options), versions)
    print_results(recipes, bits, done)


def print_results(
    recipes: Mapping[str, tuple[Recipe, float]],
    bits: Mapping[str, float],
    done: Mapping[str, Measured],
) -> None:
    """One row for each recipe, and what rounded queries do."""
    columns = ["KV cache", "bits", "KL predicted", "KL measured [nats/token]"]
    rows = []
    for label, one in done.items():
        predicted = f"{recipes[label][1]:.5f}" if label in recipes else "–"
        measured = with_error(one.kl, one.kl_stderr, digits=5)
        rows.append([label, f"{bits.get(label, 16.0):.2f}", predicted, measured])
    print_markdown(columns, rows)


if __name__ == "__main__":
    main()
