"""``mofq spaces``, ``formats``, ``engines``, ``diff`` and ``recipe uniform``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from mofq.checkpoint.headers import open_checkpoint
from mofq.cli.terminal import note, print_json, print_table
from mofq.engines import ENGINES
from mofq.formats import ELEMENT_FORMATS, SCALE_FORMATS
from mofq.layers import find_layers
from mofq.recipe import load_recipe, write_recipe
from mofq.schemes import ALIASES
from mofq.search_space import find_search_spaces, load_search_space


def run_spaces(*, as_json: bool) -> None:
    """The search spaces that come with mofq."""
    spaces = {name: load_search_space(name) for name in find_search_spaces()}
    if as_json:
        print_json(
            {
                name: {"description": s.description, "schemes": [one.name for one in s.schemes]}
                for name, s in spaces.items()
            }
        )
        return
    rows = [[name, str(len(s.candidates)), s.description] for name, s in spaces.items()]
    print_table("search spaces", ["name", "choices", "for"], rows)


def run_formats(*, as_json: bool) -> None:
    """Element formats, scale formats and the names of published combinations."""
    if as_json:
        print_json(
            {
                "elements": {name: asdict(one) for name, one in ELEMENT_FORMATS.items()},
                "scales": {name: asdict(one) for name, one in SCALE_FORMATS.items()},
                "aliases": ALIASES,
            }
        )
        return
    elements = [
        [name, str(one.bits), f"{one.max:g}", one.source] for name, one in ELEMENT_FORMATS.items()
    ]
    print_table("element formats", ["name", "bits", "largest", "source"], elements)
    scales = [
        [name, str(one.bits), str(one.global_scale_bits or "–"), one.source]
        for name, one in SCALE_FORMATS.items()
    ]
    print_table("scale formats", ["name", "bits", "global scale bits", "source"], scales)
    print_table("names", ["name", "stands for"], [[a, b] for a, b in ALIASES.items()])


def run_engines(*, as_json: bool) -> None:
    """Serving engines, what they serve, and where that is known from."""
    if as_json:
        print_json({name: asdict(engine) for name, engine in ENGINES.items()})
        return
    for name, engine in ENGINES.items():
        capability = engine.capability
        where = (
            "" if capability is None else f", compute capability {capability[0]}.{capability[1]}"
        )
        rows = [
            [rule.schemes, rule.kernel or f"refused: {rule.refused}", rule.source]
            for rule in engine.applicable_rules
        ]
        title = f"{name} {engine.version}{where}, reads {engine.reads}"
        print_table(title, ["schemes", "kernel", "source"], rows)


def run_diff(first: Path, second: Path, *, as_json: bool) -> None:
    """Fusion groups that differ between two recipes."""
    a, b = load_recipe(first), load_recipe(second)
    ours = {group.name: group.scheme for group in a.groups}
    theirs = {group.name: group.scheme for group in b.groups}
    changed = {
        name: [ours.get(name), theirs.get(name)]
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    }
    summary = {
        key: [getattr(a, key), getattr(b, key)] for key in ("bits_per_weight", "kl_nats_per_token")
    }
    if as_json:
        print_json({"changed": changed, **summary})
        return
    rows = [[name, str(x or "–"), str(y or "–")] for name, (x, y) in changed.items()]
    rows += [[key, f"{x}", f"{y}"] for key, (x, y) in summary.items()]
    print_table(f"{len(changed)} fusion groups differ", ["", first.name, second.name], rows)


def run_uniform(model: str, scheme: str, output: Path, *, as_json: bool) -> None:
    """Write a recipe of one scheme for every linear layer."""
    from mofq.decide import uniform_recipe

    checkpoint = open_checkpoint(model)
    recipe = uniform_recipe(checkpoint, find_layers(checkpoint), scheme)
    write_recipe(recipe, output)
    if as_json:
        print_json({"recipe": str(output), **recipe.result})
    else:
        note(f"{output}: {recipe.bits_per_weight:.4f} bits per weight.")
