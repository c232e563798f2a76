"""Recipes as parts, so that a page holds hundreds of them and puts one together when asked.

What all points of the frontier have in common is kept once; `join_recipe` says
how the parts become a file again, and the page's script does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mofq.decision.recipe import Recipe, RecipeCache, RecipeGroup, cache_lines, recipe_text
from mofq.evidence.table import Table

_UNQUANTIZED = "bf16"
#: A recipe's text: what stands before the groups, the lines of each group, what follows.
_Cut = tuple[list[str], list[list[str]], list[str]]


def recipe_parts(
    table: Table, recipes: Sequence[Recipe], *, options: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """The parts of many recipes of one table.

    Args:
        table: With the static activation maxima of its options.
        recipes: At least one; they differ in budget, result and schemes only.
        options: For each fusion group, and then each cache, the schemes that it may get.

    Returns:
        ``top``: the first lines of all; ``heads``: the other lines before the groups, of
        each recipe; ``groups``: for each the lines of its ``name`` and ``layers``, the line
        of each option in ``schemes``, and in ``amax`` what some options add; ``tail``;
        ``caches``: the same of each cache, and ``cache_head`` before them, where a recipe
        quantizes any of them.
    """
    cuts = [_cut(recipe_text(recipe)) for recipe in recipes]
    heads = [head for head, _, _ in cuts]
    common = 0
    while len({tuple(head[: common + 1]) for head in heads}) == 1 and common < len(heads[0]):
        common += 1
    return {
        "top": "\n".join(heads[0][:common]) + "\n",
        "heads": ["\n".join(head[common:]) + "\n" for head in heads],
        "groups": _group_parts(table, recipes[0], options[: len(recipes[0].groups)]),
        "tail": "\n".join(cuts[0][2]),
        **_cache_parts(table, options[len(recipes[0].groups) :]),
    }


def _cache_parts(table: Table, options: Sequence[Sequence[str]]) -> dict[str, Any]:
    amax = {(row.group, row.scheme): row.static_amax for row in table.rows if row.static_amax}
    head, parts = "", []
    for cache, schemes in zip(table.caches, options, strict=False):
        part: dict[str, Any] = {"name": "", "schemes": [], "amax": {}}
        for option, scheme in enumerate(schemes):
            one = RecipeCache(cache.name, scheme, amax.get((cache.name, scheme)))
            head, part["name"], line, *more = cache_lines([one])
            part["schemes"].append(line)
            if more:
                part["amax"][str(option)] = "\n".join(more) + "\n"
        part["plain"] = schemes.index(_UNQUANTIZED)
        parts.append(part)
    return {"cache_head": head, "caches": parts}


def join_recipe(parts: dict[str, Any], point: int, *, choice: Sequence[int]) -> str:
    """The text of a recipe from its parts.

    Args:
        parts: From `recipe_parts`.
        point: Which of the recipes.
        choice: For each fusion group, and then each cache, the index of its option.
    """
    text = parts["top"] + parts["heads"][point]
    count = len(parts["groups"])
    for group, option in zip(parts["groups"], choice[:count], strict=True):
        text += f"{group['name']}\n{group['schemes'][option]}\n{group['layers']}\n"
        text += group["amax"].get(str(option), "")
    text += parts["tail"]
    cached = list(zip(parts["caches"], choice[count:], strict=True))
    if any(option != cache["plain"] for cache, option in cached):
        text += f"{parts['cache_head']}\n"
        for cache, option in cached:
            text += f"{cache['name']}\n{cache['schemes'][option]}\n"
            text += cache["amax"].get(str(option), "")
    return str(text)


def _group_parts(
    table: Table, recipe: Recipe, options: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    amax = {(row.group, row.scheme): row.static_amax for row in table.rows if row.static_amax}
    parts: list[dict[str, Any]] = [
        {"name": "", "layers": "", "schemes": [], "amax": {}} for _ in recipe.groups
    ]
    for option in range(max(map(len, options))):
        groups = []
        for group, schemes in zip(recipe.groups, options, strict=True):
            scheme = schemes[min(option, len(schemes) - 1)]
            static = amax.get((group.name, scheme))
            groups.append(RecipeGroup(group.name, scheme, group.layers, static_amax=static))
        _, blocks, _ = _cut(recipe_text(replace(recipe, groups=tuple(groups))))
        for part, block, schemes in zip(parts, blocks, options, strict=True):
            if option < len(schemes):
                part["name"], part["layers"] = block[0], block[2]
                part["schemes"].append(block[1])
                if block[3:]:
                    part["amax"][str(option)] = "\n".join(block[3:]) + "\n"
    return parts


def _cut(text: str) -> _Cut:
    lines = text.split("\n")
    start = next(n for n, line in enumerate(lines) if line.startswith("groups:")) + 1
    stop = next(n for n, line in enumerate(lines) if line.startswith("unquantized:"))
    blocks: list[list[str]] = []
    for line in lines[start:stop]:
        if line.startswith("   "):
            blocks[-1].append(line)
        else:
            blocks.append([line])
    return lines[:start], blocks, [lines[stop], ""]
