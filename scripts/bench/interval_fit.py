"""How far predictions are from what recipes measure: the model error that mofq ships.

    python scripts/bench/interval_fit.py [WORK ...] [--rows WORK ...] [--write]

From folders of ``interval.py``. Dense models and mixtures have an error model each. Of each model
(of an only one each pair of texts) prints how its recipes are predicted with the error model of
the *others* of its kind, and how with that of all; of mixtures also with that of dense models.
With ``--rows``, from folders that measured single rows of dense models, prints how many of them lie
inside of the interval of a row, which corrects nothing and grows as that of dense recipes.
``--write`` writes what was fitted to ``mofq/decision/model_error.json``; the rest of it stays.

Measured KL over the expansion is ``1 + curvature x expansion``, up to noise that is normal in the
logarithm: of the sampled sequences, of the windows that were measured on, of each recipe (growing
with its KL), and of each run, whose texts and whose draws of calibration all its recipes share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
from scipy.optimize import minimize, minimize_scalar

from mofq.decision import model_error as shipped
from mofq.decision.model_error import ModelError, model_error
from scripts.bench import interval
from scripts.bench.interval import Compared, print_scores
from scripts.shared.command import print_markdown, script_parser

_FILE = Path(shipped.__file__).with_suffix(".json")
_COMMAND = "scripts/bench/interval.py, scripts/bench/interval_fit.py"
_SHIPPED = ("dense", "mixture", "row")
#: Predictions above are said to be out of range [nats per token].
_LARGEST = 0.25
_START = (0.5, math.log(0.05), math.log(0.03), math.log(0.5))


@dataclass(frozen=True, slots=True)
class Run:
    """Recipes of one model, calibrated on one text and measured on another."""

    model: str
    calibration: str
    text: str
    tokens: int
    recipes: tuple[Compared, ...]
    rows: tuple[Compared, ...] = ()

    @property
    def title(self) -> str:
        """The model and its texts."""
        return f"{self.model}, {Path(self.calibration).name} to {Path(self.text).name}"

    @property
    def has_flips(self) -> bool:
        """Whether it is of a mixture whose changes of experts are predicted."""
        return self.recipes[0].has_flips


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, compare with what was left out, print and perhaps write."""
    parser = script_parser(__doc__)
    parser.add_argument("works", nargs="*", type=Path, help="folders of interval.py")
    parser.add_argument("--rows", nargs="*", type=Path, default=[], help="such with single rows")
    parser.add_argument("--write", action="store_true", help="write what mofq ships")
    options = parser.parse_args(arguments)
    runs = [_read(work / "interval.json") for work in options.works]
    fits: dict[str, ModelError] = {}
    for kind in ("dense", "mixture"):
        own = [run for run in runs if run.has_flips == (kind == "mixture")]
        if own:
            fits |= _compare(kind, own, fits.get("dense"))
    if options.rows:
        measured = [_read(work / "interval.json") for work in options.rows]
        fits["row"] = fitted_rows(measured, growth=fits.get("dense", model_error()).growth)
        _print_rows(measured, fits["row"])
    _print_fits(fits)
    if options.write:
        content = json.loads(_FILE.read_text("utf-8"))
        content |= {kind: asdict(fit) for kind, fit in fits.items() if kind in _SHIPPED}
        _FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _compare(kind: str, runs: Sequence[Run], dense: ModelError | None) -> dict[str, ModelError]:
    """Print how runs of one kind are predicted; the error models that were fitted."""
    by_part: dict[str, list[Run]] = {}
    is_one_model = len({run.model for run in runs}) == 1
    for run in runs:
        texts = sorted({Path(run.calibration).name, Path(run.text).name})
        part = f"{run.model}, {', '.join(texts)}" if is_one_model else run.model
        by_part.setdefault(part, []).append(run)
    fits = {kind: fitted(runs)}
    if kind == "mixture" and dense is not None:
        _print_with(f"{kind}, with the error model of dense models", dense, runs)
    for part, own in by_part.items() if len(by_part) > 1 else ():
        fits[f"{kind}, all but {part}"] = fitted([run for run in runs if run not in own])
        title = f"{part}, with the error model of the others"
        _print_with(title, fits[f"{kind}, all but {part}"], own)
    _print_with(f"{kind}, with the error model of all", fits[kind], runs)
    return fits


def _print_with(title: str, model: ModelError, runs: Sequence[Run]) -> None:
    """Scores of runs, predicted as this error model has them; draws of one calibration together."""
    by_title: dict[str, list[Compared]] = {}
    for run in runs:
        by_title.setdefault(run.title, []).extend(run.recipes)
    print(f"{title}:\n")
    with patch.object(interval, "model_error", lambda **_: model):
        print_scores(list(by_title.items()))


def _read(path: Path) -> Run:
    content = json.loads(path.read_text("utf-8"))
    recipes = tuple(Compared(**one) for one in content.pop("recipes"))
    rows = tuple(Compared(**one) for one in content.pop("rows", ()))
    return Run(**content, recipes=recipes, rows=rows)


def fitted(runs: Sequence[Run]) -> ModelError:
    """The error model under which what was measured is most likely."""
    found = minimize(
        lambda parameters: sum(_surprise(run, parameters) for run in runs),
        _START,
        method="Nelder-Mead",
        options={"maxiter": 4000, "xatol": 1e-4, "fatol": 1e-4},
    )
    curvature, text, recipe, growth = found.x
    return ModelError(
        source=_COMMAND,
        models=tuple(dict.fromkeys(run.title for run in runs)),
        recipes=len({(run.title, one.label) for run in runs for one in run.recipes}),
        curvature=float(f"{max(curvature, 0.0):.3g}"),
        spread=float(f"{math.hypot(math.exp(text), math.exp(recipe)):.3g}"),
        growth=float(f"{math.exp(growth):.3g}"),
        largest=_LARGEST,
    )


def fitted_rows(runs: Sequence[Run], *, growth: float) -> ModelError:
    """The error model of single rows, by themselves, under which they are most likely.

    Args:
        runs: With rows.
        growth: Of the spread, as that of recipes.
    """
    rows = [replace(run, recipes=run.rows) for run in runs]
    found = minimize_scalar(
        lambda spread: sum(
            _surprise(run, (0.0, -math.inf, spread, math.log(growth))) for run in rows
        ),
        bounds=(math.log(0.01), 0.0),
        method="bounded",
    )
    return ModelError(
        source=_COMMAND,
        models=tuple(dict.fromkeys(run.title for run in runs)),
        recipes=sum(len(run.rows) for run in runs),
        curvature=0.0,
        spread=float(f"{math.exp(found.x):.3g}"),
        growth=growth,
        largest=_LARGEST,
    )


def _print_rows(runs: Sequence[Run], model: ModelError) -> None:
    """How often what single rows measured is inside of the interval of a row."""
    lines = []
    with patch.object(interval, "row_error", lambda: model):
        for run in runs:
            ratio = np.array([one.expansion / one.measured for one in run.rows])
            inside = np.mean([one.is_inside_of_row for one in run.rows])
            lines.append([run.title, str(len(ratio)), f"{np.median(ratio):.3f}", f"{inside:.0%}"])
    print_markdown(("", "single rows", "median of predicted / measured", "inside"), lines)


def _surprise(run: Run, parameters: Sequence[float]) -> float:
    """Minus the logarithm of the likelihood of a run, up to a constant."""
    curvature, text, recipe, growth = parameters
    model = ModelError("", (), 0, max(curvature, 0.0), 0.0, 0.0, _LARGEST)
    value = np.array([model.corrected(one.expansion) for one in run.recipes])
    measured = np.array([one.measured for one in run.recipes])
    noise = np.array(
        [
            math.hypot(one.expansion_stderr / one.expansion, one.measured_stderr / one.measured)
            for one in run.recipes
        ]
    )
    own = noise**2 + math.exp(2 * recipe) + (math.exp(growth) * np.minimum(value, _LARGEST)) ** 2
    covariance = np.diag(own) + math.exp(2 * text)
    residual = np.log(measured / value)
    _, logarithm = np.linalg.slogdet(covariance)
    return 0.5 * float(logarithm + residual @ np.linalg.solve(covariance, residual))


def _print_fits(fits: Mapping[str, ModelError]) -> None:
    rows = [
        [name, str(one.recipes), f"{one.curvature:.3f}", f"{one.spread:.3f}", f"{one.growth:.3f}"]
        for name, one in fits.items()
    ]
    print_markdown(("models", "recipes", "curvature [1/nats]", "spread", "growth [1/nats]"), rows)


if __name__ == "__main__":
    main()
