"""The commands: the function of `mofq.api` that each one calls, and what shows its result."""

from __future__ import annotations

from typing import Annotated

import typer

from mofq import __version__, api
from mofq.cli.parsing import SectionedCommand, as_command
from mofq.cli.show import catalog, files
from mofq.cli.show.advise import show_advice
from mofq.cli.show.diff import show_diff
from mofq.cli.show.frontier import show_frontier
from mofq.cli.show.inspect import show_inspection
from mofq.cli.show.run import show_run
from mofq.cli.show.search import show_search
from mofq.cli.show.validate import end_validation, show_validation

app = typer.Typer(
    name="mofq",
    help="Mixtures of number formats for language models: measure every choice in nats, "
    "decide under a budget, apply, validate, export.",
    epilog="Start with `mofq demo`. For a model of yours, all at once: `mofq run MODEL --engine "
    "vllm-hopper --max-bits 5`; step by step: inspect, calibrate, measure, search, validate, "
    "export. Each command says which comes next.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipe = typer.Typer(
    help="Make recipes without a search.", no_args_is_help=True, rich_markup_mode=None
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mofq {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Options of mofq itself."""


app.command("inspect", cls=SectionedCommand)(as_command(api.inspect, show_inspection))
app.command("calibrate", cls=SectionedCommand)(as_command(api.calibrate, files.show_calibration))
app.command("rewrite", cls=SectionedCommand)(as_command(api.rewrite, files.show_rewriting))
app.command("measure", cls=SectionedCommand)(as_command(api.measure, files.show_measurement))
app.command("search", cls=SectionedCommand)(as_command(api.search, show_search))
app.command("tune", cls=SectionedCommand)(as_command(api.tune, files.show_tuning))
app.command("validate", cls=SectionedCommand)(
    as_command(api.validate, show_validation, ending=end_validation)
)
app.command("export", cls=SectionedCommand)(as_command(api.export, files.show_export))
app.command("run", cls=SectionedCommand)(as_command(api.run, show_run))
app.command("demo", cls=SectionedCommand)(as_command(api.demo, show_run))
app.command("frontier", cls=SectionedCommand)(as_command(api.frontier, show_frontier))
app.command("diff", cls=SectionedCommand)(as_command(api.diff, show_diff))
app.command("spaces", cls=SectionedCommand)(as_command(api.spaces, catalog.show_spaces))
app.command("formats", cls=SectionedCommand)(as_command(api.formats, catalog.show_formats))
app.command("engines", cls=SectionedCommand)(as_command(api.engines, catalog.show_engines))
app.command("devices", cls=SectionedCommand)(as_command(api.devices, catalog.show_devices))
app.command("advise", cls=SectionedCommand)(as_command(api.advise, show_advice))
app.command("explore", cls=SectionedCommand)(as_command(api.explore, files.show_page))
app.command("plot", cls=SectionedCommand)(as_command(api.plot, files.show_figure))
app.add_typer(recipe, name="recipe")
recipe.command("uniform", cls=SectionedCommand)(as_command(api.uniform, files.show_uniform))
recipe.command("from", cls=SectionedCommand)(as_command(api.recipe_from, files.show_recipe_from))

#: All of them as click's, which is what runs; made once, where several commands run in a process.
command = typer.main.get_command(app)
