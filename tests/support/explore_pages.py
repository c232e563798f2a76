"""What a page holds, for the tests of the explorer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from mofq.decision.recipe import RecipeCache, RecipeGroup, parse_recipe, recipe_text
from mofq.evidence.table import Table
from mofq.explore.drawing import read_drawing
from mofq.explore.page_data import page_data


def data_of(table: Table, path: Path, **beside: Any) -> dict[str, Any]:
    """The data of a page of a table; ``beside`` as for `read_drawing`."""
    return page_data(read_drawing(table, **beside), path)


def recipe_texts(data: dict[str, Any]) -> Iterator[str]:
    """The recipe of every point of a page, from what its script has, by mofq's own writer."""
    for point in data["points"]:
        header = data["recipe"]["header"] + point["header"]
        recipe = parse_recipe(f"{header}groups: {{}}\n{data['recipe']['footer']}")
        groups, caches = [], []
        for group, place in zip(data["groups"], point["choice"], strict=True):
            scheme, *_ = option = group["options"][place]
            name = data["schemes"][scheme]["name"]
            amax = {k: float(v) for k, v in option[5].items()} if len(option) > 5 else None
            if group["cached"]:
                caches.append(RecipeCache(group["name"], name, amax))
            else:
                layers = tuple(layer for layer, *_ in group["layers"])
                groups.append(RecipeGroup(group["name"], name, layers, amax))
        if all(cache.parsed.is_unquantized for cache in caches):
            caches = []
        decided = replace(recipe, groups=tuple(groups), kv_cache=tuple(caches))
        yield header + "groups:" + recipe_text(decided).partition("\ngroups:")[2]
