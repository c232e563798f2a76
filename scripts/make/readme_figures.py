"""The README figures, from one model: `python scripts/make/readme_figures.py MODEL --work FOLDER`.

Calibrates, measures the search spaces ``w8a8`` and ``w4w8_mixed``, searches, validates on a
text that nothing was chosen on, draws every kind of figure and writes the explorer's page; with
Chromium and its driver also a picture of the page. What is in the work folder already is not
made again.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from scripts.shared.command import calibrate, model_parser, mofq, parse_into_work

BITS = ("5.0", "6.0")
UNIFORM = ("int4.g32@mse", "nvfp4@mse")
#: Of the picture of the page [pixels].
WIDTH, HEIGHT = 1280, 1130


def make_tables(model: str, calibration: str, work: Path) -> dict[str, Path]:
    """Stats and the table of each search space."""
    stats = calibrate(model, [f"en={calibration}"], work / "stats")
    tables = {space: work / f"{space}.jsonl" for space in ("w8a8", "w4w8_mixed")}
    for space, table in tables.items():
        if not table.exists():
            mofq("measure", model, "--space", space, "--stats", stats, "-o", table)
    return tables


def make_recipes(model: str, tables: dict[str, Path], work: Path) -> dict[str, Path]:
    """Recipes to show: their name and file."""
    mixed = tables["w4w8_mixed"]
    asked: dict[str, list[object]] = {
        "w8a8": ["search", tables["w8a8"], "--solver", "greedy"],
        "greedy": ["search", mixed, "--solver", "greedy", "--max-bits", "5.0"],
        **{f"exact-{bits}": ["search", mixed, "--max-bits", bits] for bits in BITS},
        **{scheme: ["recipe", "uniform", model, scheme] for scheme in UNIFORM},
    }
    recipes = {name: work / f"{name}.yaml" for name in asked}
    for name, recipe in recipes.items():
        if not recipe.exists():
            mofq(*asked[name], "-o", recipe)
    return recipes


def validate(model: str, recipes: dict[str, Path], *, text: str, tokens: int) -> dict[str, Path]:
    """The validation of each recipe that stands beside the frontier of the mixed space.

    What has quantized inputs would not belong there.
    """
    outputs = {name: one.with_suffix(".json") for name, one in recipes.items() if name != "w8a8"}
    for name, output in outputs.items():
        if not output.exists():
            mofq("validate", model, recipes[name], "--text", text, "--tokens", tokens, "-o", output)
    return outputs


def draw(
    tables: dict[str, Path], recipes: dict[str, Path], *, measured: dict[str, Path], to: Path
) -> Path:
    """Every figure, and the page."""
    given = [word for path in measured.values() for word in ("--validation", path)]
    mixed, five = tables["w4w8_mixed"], recipes["exact-5.0"]
    mofq("plot", tables["w8a8"], recipes["w8a8"], "--kind", "map", "-o", to / "map.png")
    mofq("plot", mixed, *given, "--kind", "frontier", "-o", to / "frontier.png")
    mofq("plot", mixed, "--kind", "sensitivity", "-o", to / "sensitivity.png")
    mofq("plot", mixed, *given, "--kind", "prediction", "-o", to / "prediction.png")
    mofq("plot", tables["w8a8"], "--kind", "weights", "-o", to / "weights.png")
    # In the folder, so that the commands that the page shows are short.
    names = [mixed.name, five.name, recipes["greedy"].name]
    beside = [word for path in measured.values() for word in ("--validation", path.name)]
    mofq("explore", *names, *beside, "-o", "explorer.html", folder=to)
    return to / "explorer.html"


def photograph(page: Path, output: Path) -> None:
    """A picture of the page with the recipe at 5 bits and one fusion group open."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless=new", "--no-sandbox", "--hide-scrollbars", "--disable-gpu"):
        options.add_argument(flag)
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(page.resolve().as_uri())
        browser.execute_script("byId('compare').value = state.compare = 'none'; openPanel(0)")  # type: ignore[no-untyped-call]
        browser.save_screenshot(str(output))


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
    tables = make_tables(options.model, options.calibration, options.work)
    recipes = make_recipes(options.model, tables, options.work)
    measured = validate(options.model, recipes, text=options.text, tokens=options.tokens)
    page = draw(tables, recipes, measured=measured, to=options.work)
    if shutil.which("chromium") and shutil.which("chromedriver"):
        photograph(page, options.work / "explorer.png")
    for picture in options.work.glob("*.png"):
        shutil.copy(picture, options.images / picture.name)


if __name__ == "__main__":
    main()
