"""How far the second-order expansion is from what recipes measure.

The expansion (`mofq.decision.prediction`) says what small errors cost. Larger ones cost more than
it says, by about a share that grows with them, and recipes scatter around that by more than the
sampling of sequences explains. Both were estimated from recipes of several models that were
measured, and are shipped as data: ``model_error.json``, which ``scripts/bench/interval_fit.py``
writes. What tokens that change their experts cost (`mofq.decision.flip_costs`) is known less well
than the rest, so recipes of mixtures have an error model of their own.

A single row of the table, one fusion group or cache under one scheme, is known less well than a
recipe, whose groups are off in different directions. Its error model is of rows that were measured
by themselves; it widens them and corrects nothing.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class ModelError:
    """What a prediction by the expansion is off by, from measured recipes."""

    source: str  #: the command that wrote it
    models: tuple[str, ...]  #: that recipes were measured of, with their texts
    recipes: int  #: that it rests on
    #: Of the factor ``1 + curvature x`` from an expansion of ``x`` to what is measured [1/nats].
    curvature: float
    spread: float  #: standard deviation of measured over predicted, of small errors
    #: What the spread grows by with the corrected prediction, in quadrature [1/nats].
    growth: float
    #: Predictions above are out of the range that recipes were measured in [nats per token].
    largest: float

    def corrected(self, expansion: float) -> float:
        """What an expansion amounts to [nats per token]; rises with it.

        Beyond the range the factor stays what it is at its end.
        """
        return expansion * (1 + self.curvature * min(max(expansion, 0.0), self._end))

    def slope(self, expansion: float) -> float:
        """The derivative of `corrected`."""
        inside = min(max(expansion, 0.0), self._end)
        return 1 + self.curvature * inside * (2 if inside == expansion else 1)

    def stderr(self, value: float) -> float:
        """The standard deviation of what is measured, of a corrected prediction."""
        return value * math.hypot(self.spread, self.growth * min(value, self.largest))

    @property
    def _end(self) -> float:
        """The expansion that is corrected to the largest in range."""
        if not self.curvature:
            return self.largest
        return (math.sqrt(1 + 4 * self.curvature * self.largest) - 1) / (2 * self.curvature)


@cache
def model_error(*, has_flips: bool = False) -> ModelError:
    """What is shipped.

    Args:
        has_flips: Of predictions with what changes of experts cost.
    """
    return _shipped("mixture" if has_flips else "dense")


@cache
def row_error() -> ModelError:
    """What is shipped of single rows, whose ``recipes`` are rows that were measured."""
    return _shipped("row")


def _shipped(kind: str) -> ModelError:
    text = files("mofq.decision").joinpath("model_error.json").read_text("utf-8")
    content = json.loads(text)[kind]
    return ModelError(**{**content, "models": tuple(content["models"])})
