"""The README figures, from one model: `python scripts/make/readme_figures.py MODEL --work FOLDER`.

Calibrates, measures the search spaces ``serving`` for one engine and ``w8a8``, searches, validates
on a text that nothing was chosen on, draws every kind of figure and writes the explorer's page;
with Chromium and its driver also a picture of the page. What is in the work folder already is not
made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scripts.shared.command import calibrate, model_parser, mofq, parse_into_work
from scripts.shared.pictures import copy_small, has_browser, photograph

BITS = ("5.0", "6.0")
UNIFORM = ("int4.g32@mse",)
#: What the recipes are searched among.
SERVED = ("--engine", "vllm-hopper", "--space", "serving")
W8A8 = ("--space", "w8a8")
#: The recipe at 5 bits, with nothing beside it and one fusion group open.
ONE_GROUP = "byId('compare').value = state.compare = 'none'; openPanel(0)"


def make_table(model: str, calibration: str, work: Path) -> Path:
    """Stats, and the table with both search spaces."""
    stats = calibrate(model, [f"en={calibration}"], work / "stats")
    table = work / "serving.jsonl"
    for space in (SERVED, W8A8):  # rows that are there are not measured again
        mofq("measure", model, *space, "--stats", stats, "-o", table)
    return table


def make_recipes(model: str, table: Path, work: Path) -> dict[str, Path]:
    """Recipes to show: their name and file."""
    asked: dict[str, list[object]] = {
        "w8a8": ["search", table, *W8A8, "--solver", "greedy"],
        **{f"exact-{bits}": ["search", table, *SERVED, "--max-bits", bits] for bits in BITS},
        **{scheme: ["recipe", "uniform", model, scheme] for scheme in UNIFORM},
    }
    recipes = {name: work / f"{name}.yaml" for name in asked}
    for name, recipe in recipes.items():
        if not recipe.exists():
            mofq(*asked[name], "-o", recipe)
    return recipes


def validate(model: str, recipes: dict[str, Path], *, text: str, tokens: int) -> dict[str, Path]:
    """The validation of each recipe that stands beside the frontier of what is served."""
    outputs = {name: one.with_suffix(".json") for name, one in recipes.items() if name != "w8a8"}
    for name, output in outputs.items():
        if not output.exists():
            mofq("validate", model, recipes[name], "--text", text, "--tokens", tokens, "-o", output)
    return outputs


def draw(table: Path, recipes: dict[str, Path], *, measured: dict[str, Path], to: Path) -> Path:
    """Every figure, and the page."""
    given = [word for path in measured.values() for word in ("--validation", path)]
    mofq("plot", table, recipes["w8a8"], *W8A8, "--kind", "map", "-o", to / "map.png")
    for kind, more in (("frontier", given), ("prediction", given), ("sensitivity", [])):
        mofq("plot", table, *SERVED, *more, "--kind", kind, "-o", to / f"{kind}.png")
    mofq("plot", table, "--kind", "weights", "-o", to / "weights.png")
    # In the folder, so that the commands that the page shows are short.
    names = [table.name, *(recipes[f"exact-{bits}"].name for bits in BITS)]
    beside = [word for path in measured.values() for word in ("--validation", path.name)]
    mofq("explore", *names, *beside, *SERVED, "-o", "explorer.html", folder=to)
    return to / "explorer.html"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing and draw everything."""
    parser = model_parser(
        __doc__,
        ("--calibration", "text file"),
        ("--text", "text file that nothing was chosen on"),
    )
    parser.add_argument("--images", type=Path, default=Path("docs/images"), help="of the figures")
    options = parse_into_work(parser, arguments)
    options.images.mkdir(parents=True, exist_ok=True)
    table = make_table(options.model, options.calibration, options.work)
    recipes = make_recipes(options.model, table, options.work)
    measured = validate(options.model, recipes, text=options.text, tokens=options.tokens)
    page = draw(table, recipes, measured=measured, to=options.work)
    if has_browser():
        photograph(page, options.work / "explorer.png", script=ONE_GROUP)
    for picture in options.work.glob("*.png"):
        copy_small(picture, options.images / picture.name)


if __name__ == "__main__":
    main()
