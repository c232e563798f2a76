"""How far predictions are from what recipes measure: the model error that mofq ships.

    python scripts/bench/interval_fit.py WORK [WORK ...] [--write]

From folders of ``interval.py``. Of each model, prints how its recipes are predicted with the error
model of the *other* models, and how with that of all. ``--write`` writes the latter to
``mofq/decision/model_error.json``.

Measured KL over the expansion is ``1 + curvature x expansion``, up to noise that is normal in the
logarithm: of the sampled sequences, of the windows that were measured on, of each recipe (growing
with its KL), and of each pair of texts, which all recipes of a run share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
from scipy.optimize import minimize

from mofq.decision import model_error as shipped
from mofq.decision import prediction
from mofq.decision.model_error import ModelError
from scripts.bench.interval import Compared, print_scores
from scripts.shared.command import print_markdown, script_parser

_FILE = Path(shipped.__file__).with_suffix(".json")
_COMMAND = "scripts/bench/interval.py, scripts/bench/interval_fit.py"
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

    @property
    def title(self) -> str:
        """The model and its texts."""
        return f"{self.model}, {Path(self.calibration).name} to {Path(self.text).name}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, compare with what was left out, print and perhaps write."""
    parser = script_parser(__doc__)
    parser.add_argument("works", nargs="+", type=Path, help="folders of interval.py")
    parser.add_argument("--write", action="store_true", help="write what mofq ships")
    options = parser.parse_args(arguments)
    runs = [_read(work / "interval.json") for work in options.works]
    by_model: dict[str, list[Run]] = {}
    for run in runs:
        by_model.setdefault(run.model, []).append(run)
    fits = {"all": fitted(runs)}
    for model in by_model if len(by_model) > 1 else ():
        others = [run for run in runs if run.model != model]
        fits[f"all but {model}"] = fitted(others)
        with _with(fits[f"all but {model}"]):
            print(f"{model}, with the error model of the others:\n")
            print_scores([(run.title, run.recipes) for run in by_model[model]])
    with _with(fits["all"]):
        print("With the error model of all:\n")
        print_scores([(run.title, run.recipes) for run in runs])
    _print_fits(fits)
    if options.write:
        content = json.dumps(asdict(fits["all"]), indent=1)
        _FILE.write_text(content + "\n", encoding="utf-8")


def _read(path: Path) -> Run:
    content = json.loads(path.read_text("utf-8"))
    recipes = tuple(Compared(**one) for one in content.pop("recipes"))
    return Run(**content, recipes=recipes)


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
        models=tuple(run.title for run in runs),
        recipes=sum(len(run.recipes) for run in runs),
        curvature=float(f"{max(curvature, 0.0):.3g}"),
        spread=float(f"{math.hypot(math.exp(text), math.exp(recipe)):.3g}"),
        growth=float(f"{math.exp(growth):.3g}"),
        largest=_LARGEST,
    )


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


@contextmanager
def _with(model: ModelError) -> Iterator[None]:
    """Predictions as this error model has them."""
    with patch.object(prediction, "model_error", lambda: model):
        yield


def _print_fits(fits: Mapping[str, ModelError]) -> None:
    rows = [
        [name, str(one.recipes), f"{one.curvature:.3f}", f"{one.spread:.3f}", f"{one.growth:.3f}"]
        for name, one in fits.items()
    ]
    print_markdown(("models", "recipes", "curvature [1/nats]", "spread", "growth [1/nats]"), rows)


if __name__ == "__main__":
    main()
