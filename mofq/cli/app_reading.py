"""The commands beside the flow: what was written compared and drawn, and what mofq knows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mofq.cli.arguments import (
    Engine,
    Json,
    KvCache,
    KvTokens,
    MaxKvBits,
    Model,
    OfSpace,
    OfUnit,
    Stats,
)

reading = typer.Typer(rich_markup_mode=None)
recipe = typer.Typer(
    help="Make recipes without a search.", no_args_is_help=True, rich_markup_mode=None
)


@reading.command()
def frontier(
    table: Annotated[Path, typer.Argument(help="From `mofq measure`.")],
    unit: OfUnit = None,
    engine: Engine = None,
    space: OfSpace = None,
    max_kv_bits: MaxKvBits = None,
    kv_tokens: KvTokens = 0,
    kv_cache: KvCache = None,
    polish: Annotated[
        int | None, typer.Option(help="Solve exactly at this many sizes between the points too.")
    ] = None,
    json: Json = False,
) -> None:
    """The whole curve of accuracy against size."""
    from mofq.cli.curve import CurveOptions
    from mofq.cli.frontier import run_frontier

    options = CurveOptions(
        unit=unit,
        engine=engine,
        space=space,
        max_kv_bits=max_kv_bits,
        kv_tokens=kv_tokens,
        kv_formats=tuple(kv_cache or ()),
    )
    run_frontier(table, options, sizes=polish, as_json=json)


@reading.command()
def diff(
    first: Annotated[Path, typer.Argument(help="A recipe.")],
    second: Annotated[Path, typer.Argument(help="Another recipe of the same model.")],
    table: Annotated[
        Path | None, typer.Option(help="From `mofq measure`: what each change costs.")
    ] = None,
    json: Json = False,
) -> None:
    """What changed between two recipes, and what it costs."""
    from mofq.cli.diff import run_diff

    run_diff(first, second, table=table, as_json=json)


@reading.command()
def spaces(json: Json = False) -> None:
    """List the search spaces that come with mofq."""
    from mofq.cli.lists import run_spaces

    run_spaces(as_json=json)


@reading.command()
def formats(json: Json = False) -> None:
    """List element and scale formats."""
    from mofq.cli.lists import run_formats

    run_formats(as_json=json)


@reading.command()
def engines(json: Json = False) -> None:
    """List serving engines and what they serve."""
    from mofq.cli.lists import run_engines

    run_engines(as_json=json)


@reading.command()
def devices(json: Json = False) -> None:
    """List device models: what times rest on."""
    from mofq.cli.advise import run_devices

    run_devices(as_json=json)


@reading.command()
def advise(
    device_model: Annotated[str, typer.Option(help="h100 … of `mofq devices`, or a YAML file.")],
    deployment: Annotated[
        str,
        typer.Option(
            help="synchronous: one request at a time, latency; asynchronous: many at once."
        ),
    ],
    model: Annotated[
        str | None, typer.Argument(help="A model folder or hub id, for its size.")
    ] = None,
    recovery: Annotated[
        float | None, typer.Option(help="Share of the accuracy to keep, e.g. 0.99.")
    ] = None,
    tp: Annotated[int, typer.Option(help="Devices that share the model.", min=1)] = 1,
    json: Json = False,
) -> None:
    """Which space, engine and budget to start from, by published findings."""
    from mofq.cli.advise import run_advise

    run_advise(
        model,
        device_model=device_model,
        deployment=deployment,
        recovery=recovery,
        tp=tp,
        as_json=json,
    )


@reading.command()
def explore(
    table: Annotated[Path, typer.Argument(help="From `mofq measure`.")],
    recipes: Annotated[list[Path] | None, typer.Argument(help="Recipes to compare.")] = None,
    validation: Annotated[
        list[Path] | None, typer.Option(help="From `mofq validate -o`; repeatable.")
    ] = None,
    unit: OfUnit = None,
    engine: Engine = None,
    space: OfSpace = None,
    max_kv_bits: MaxKvBits = None,
    kv_tokens: KvTokens = 0,
    kv_cache: KvCache = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path(
        "explorer.html"
    ),
    json: Json = False,
) -> None:
    """The accuracy-budget trade-off as one HTML page."""
    from mofq.cli.curve import CurveOptions
    from mofq.cli.explore import DrawOptions, run_explore

    run_explore(
        DrawOptions(
            table=table,
            output=output,
            recipes=tuple(recipes or ()),
            validations=tuple(validation or ()),
            curve=CurveOptions(
                unit=unit,
                engine=engine,
                space=space,
                max_kv_bits=max_kv_bits,
                kv_tokens=kv_tokens,
                kv_formats=tuple(kv_cache or ()),
            ),
        ),
        as_json=json,
    )


@reading.command()
def plot(
    table: Annotated[Path, typer.Argument(help="From `mofq measure`.")],
    kind: Annotated[str, typer.Option(help="frontier, map, sensitivity, prediction or weights.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png, .svg or .pdf.")],
    recipes: Annotated[list[Path] | None, typer.Argument(help="For a map, or as points.")] = None,
    validation: Annotated[
        list[Path] | None, typer.Option(help="From `mofq validate -o`; repeatable.")
    ] = None,
    unit: OfUnit = None,
    engine: Engine = None,
    space: OfSpace = None,
    max_kv_bits: MaxKvBits = None,
    kv_tokens: KvTokens = 0,
    kv_cache: KvCache = None,
    json: Json = False,
) -> None:
    """A figure of a table, for papers and READMEs."""
    from mofq.cli.curve import CurveOptions
    from mofq.cli.explore import DrawOptions, run_plot

    run_plot(
        DrawOptions(
            table=table,
            output=output,
            recipes=tuple(recipes or ()),
            validations=tuple(validation or ()),
            curve=CurveOptions(
                unit=unit,
                engine=engine,
                space=space,
                max_kv_bits=max_kv_bits,
                kv_tokens=kv_tokens,
                kv_formats=tuple(kv_cache or ()),
            ),
        ),
        kind=kind,
        as_json=json,
    )


@recipe.command()
def uniform(
    model: Model,
    scheme: Annotated[str, typer.Argument(help="For every linear layer, e.g. int4.g32@mse.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe, recipe.yaml.")],
    stats: Stats = None,
    json: Json = False,
) -> None:
    """One scheme for every linear layer of a model."""
    from mofq.cli.lists import run_uniform

    run_uniform(model, scheme, output, stats=stats, as_json=json)


@recipe.command(name="from")
def from_folder(
    folder: Annotated[
        Path, typer.Argument(help="A compressed-tensors checkpoint, whoever wrote it.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The recipe, recipe.yaml.")],
    model: Annotated[
        str | None, typer.Option(help="The original; the recipe is checked to fit it.")
    ] = None,
    json: Json = False,
) -> None:
    """The schemes of a quantized checkpoint, to validate, compare or export again."""
    from mofq.cli.lists import run_recipe_from

    run_recipe_from(folder, output, model=model, as_json=json)
