"""The trade-off of accuracy and size as a page to click through, and as figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mofq.api.frontier import frontier_request
from mofq.api.inputs import open_table
from mofq.api.options import (
    Choices,
    Option,
    Recipes,
    TableFile,
    Tell,
    Validations,
    documented,
    silent,
)
from mofq.api.preconditions import check_output
from mofq.files.progress import Progress

if TYPE_CHECKING:
    from mofq.explore.drawing import Drawing


@dataclass(frozen=True, slots=True)
class ExploreResult:
    """A page."""

    output: Path
    recipes: int  #: of the frontier
    bytes: int  #: of the page
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """What was written, for machines."""
        return {
            "page": str(self.output),
            "bytes": self.bytes,
            "recipes": self.recipes,
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True, slots=True)
class PlotResult:
    """A figure."""

    output: Path
    kind: str
    source: Path  #: the table
    bytes: int  #: of the figure
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """What was written, for machines."""
        return {
            "figure": str(self.output),
            "kind": self.kind,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 2),
        }


@documented
def explore(
    table: TableFile,
    recipes: Recipes = (),
    *,
    validations: Validations = (),
    choices: Choices = Choices(),
    output: Annotated[str | Path, Option("The page.", short="-o")] = "explorer.html",
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> ExploreResult:
    """The accuracy-budget trade-off as one HTML page.

    Returns:
        Where the page is, and how many recipes it holds.

    Raises:
        MofqError: An input is not valid.
    """
    from mofq.explore.html_page import write_page
    from mofq.explore.page_data import page_data

    start = monotonic()
    path = Path(output)
    drawing = _read_drawing(path, table, recipes, validations, choices, tell or silent)
    data = page_data(drawing, Path(table), progress=progress)
    size = write_page(data, path)
    return ExploreResult(path, len(data["points"]), size, monotonic() - start)


@documented
def plot(
    table: TableFile,
    output: Annotated[str | Path, Option("A .png, .svg or .pdf.", short="-o")],
    *,
    kind: Annotated[
        Literal["frontier", "map", "sensitivity", "prediction", "weights"],
        Option("frontier, map, sensitivity, prediction or weights."),
    ],
    recipes: Recipes = (),
    validations: Validations = (),
    choices: Choices = Choices(),
    tell: Tell | None = None,
) -> PlotResult:
    """A figure of a table, for papers and READMEs.

    Returns:
        Where the figure is.

    Raises:
        MofqError: An input is not valid.
    """
    from mofq.explore.figures import draw_figure, undrawn_predictions

    start = monotonic()
    tell = tell or silent
    path = Path(output)
    drawing = _read_drawing(path, table, recipes, validations, choices, tell)
    draw_figure(kind, drawing, path=path)
    if kind == "prediction":
        for line in undrawn_predictions(drawing):
            tell(line)
    return PlotResult(path, kind, Path(table), path.stat().st_size, monotonic() - start)


def _read_drawing(
    output: Path,
    table: str | Path,
    recipes: Sequence[str | Path],
    validations: Sequence[str | Path],
    choices: Choices,
    tell: Tell,
) -> Drawing:
    """Read what is drawn, once it is known that the output takes the place of none of it."""
    from mofq.explore.drawing import read_drawing

    check_output(output, files=[table, *recipes, *validations])
    return read_drawing(
        open_table(table, tell),
        recipes=tuple(map(Path, recipes)),
        validations=tuple(map(Path, validations)),
        request=frontier_request(choices),
    )
