"""``mofq spaces``, ``formats``, ``engines``, ``recipe uniform`` and ``recipe from``."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

from mofq.cli.checks import check_output
from mofq.cli.terminal import note, print_json, print_table
from mofq.decision.recipe import check_recipe, write_recipe
from mofq.engines import ENGINES
from mofq.engines.rules import readable
from mofq.evidence.spaces import find_search_spaces, load_search_space
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.numbers.formats import ELEMENT_FORMATS, SCALE_FORMATS
from mofq.numbers.schemes import ALIASES


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
            [readable(rule), rule.kernel or f"refused: {rule.refused}", rule.source]
            for rule in engine.applicable_rules
        ]
        rows += [[readable(one), one.how, one.source] for one in engine.applicable_caches]
        title = f"{name} {engine.version}{where}, reads {engine.reads}"
        print_table(title, ["schemes", "kernel", "source"], rows)
    note("Where devices share every layer, NAME:tp=4 checks what one of them holds.")


def run_uniform(
    model: str, scheme: str, output: Path, *, stats: Path | None = None, as_json: bool
) -> None:
    """Write a recipe of one scheme for every linear layer."""
    from mofq.decision import uniform_recipe

    check_output(output)
    checkpoint = open_checkpoint(model)
    sha256 = None
    if stats is not None:
        from mofq.evidence.calibration.stats import read_stats

        sha256 = read_stats(stats).sha256
    recipe = uniform_recipe(checkpoint, find_layers(checkpoint), scheme, stats_sha256=sha256)
    write_recipe(recipe, output)
    if as_json:
        print_json({"recipe": str(output), **recipe.result})
    else:
        note(f"{output}: {recipe.bits_per_weight:.4f} bits per weight.")


def run_recipe_from(folder: Path, output: Path, *, model: str | None, as_json: bool) -> None:
    """Write the recipe that a compressed-tensors checkpoint follows."""
    from mofq.delivery.export.compressed_tensors import recipe_from_compressed_tensors

    check_output(output)
    recipe = recipe_from_compressed_tensors(folder)
    if model is not None:
        checkpoint = open_checkpoint(model)
        check_recipe(recipe, find_layers(checkpoint))
        recipe = replace(recipe, model_name=checkpoint.name, index_sha256=checkpoint.index_sha256)
    write_recipe(recipe, output)
    schemes = Counter(group.scheme for group in recipe.groups)
    if as_json:
        print_json({"recipe": str(output), "fusion_groups": dict(schemes), **recipe.result})
        return
    note(f"{output}: {recipe.bits_per_weight:.4f} bits per weight.")
    rows = [[name, str(count)] for name, count in schemes.most_common()]
    print_table(f"{folder} was made of", ["scheme", "fusion groups"], rows)
