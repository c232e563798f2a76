"""The frontier of a table: accuracy against size."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

from mofq.api.inputs import open_table
from mofq.api.options import AnyTable, Choices, Method, Option, Tell, documented, silent
from mofq.api.request import make_request

if TYPE_CHECKING:
    from mofq.decision import Frontier, Problem, Request


#: Points that are predicted where all are asked for: each takes two searches.
MOST_PREDICTED = 240


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """A recipe that no other one beats in size and in error at once."""

    bits_per_weight: float  #: true bits, over all fusion groups
    bytes: int  #: of the fusion groups
    checkpoint_bytes: int  #: of all tensors
    error: float  #: of all fusion groups, in the unit of the frontier
    #: No recipe of this size has a smaller error; None where changes of size of several groups act
    #: together (`mofq.decision.size_answers`): the error is no sum there.
    bound: float | None
    #: Predicted, as a recipe of it says; None: not in nats, or one of very many points.
    kl_nats_per_token: float | None
    kl_stderr: float | None
    kl_low: float | None = None  #: of the 95 % interval of the prediction
    kl_high: float | None = None
    #: The prediction is larger than any that was compared with measurements.
    is_out_of_range: bool = False
    kv_bits: float | None = None  #: per cached number; None: the cache is not decided
    kv_bytes_per_token: float | None = None
    kv_cache: dict[str, int] | None = None  #: format -> layers
    size_bytes: int | None = None  #: with the cache of the context; None: no context was named

    def to_json(self) -> dict[str, Any]:
        """What is known of the point, for machines."""
        cache = ("kv_bits", "kv_bytes_per_token", "kv_cache", "size_bytes")
        content = {name: getattr(self, name) for name in self.__slots__}
        return {k: v for k, v in content.items() if v is not None or k not in cache}


@dataclass(frozen=True, slots=True)
class FrontierResult:
    """The recipes that no other one beats, smallest first."""

    source: str  #: of the table, as it was given
    request: Request
    problem: Problem
    frontier: Frontier
    seconds: float

    def __len__(self) -> int:
        return len(self.frontier.bytes_K)

    @property
    def points(self) -> tuple[FrontierPoint, ...]:
        """All of them; of more than `MOST_PREDICTED`, so many have a prediction."""
        from mofq.explore.frontier_recipes import spaced_points

        predicted = set(spaced_points(self.frontier, MOST_PREDICTED).tolist())
        return tuple(self.point(k, is_predicted=k in predicted) for k in range(len(self)))

    def point(self, k: int, *, is_predicted: bool = True) -> FrontierPoint:
        """One of them, counted from the smallest."""
        from mofq.decision import KL_UNIT, predict_chosen, usage

        problem, choice_F = self.problem, self.frontier.choice_KF[k]
        used = usage(problem, choice_F)
        error, bound = float(self.frontier.error_K[k]), float(self.frontier.bound_K[k])
        kl = None
        if is_predicted and problem.unit == KL_UNIT:
            kl = predict_chosen(problem, self.request.budgets, choice_F, is_optimum=error == bound)
        formats: dict[str, int] | None = None
        if problem.cached:
            schemes = problem.schemes_of(choice_F)
            formats = dict(Counter(schemes[one.name] for one in problem.groups if one.cached))
        context = problem.size_of(choice_F) + problem.other_bytes if problem.kv_tokens else None
        return FrontierPoint(
            bits_per_weight=used.bits_per_weight,
            bytes=used.bytes,
            checkpoint_bytes=used.checkpoint_bytes,
            error=error,
            bound=None if math.isnan(bound) else bound,
            kl_nats_per_token=None if kl is None else kl.value,
            kl_stderr=None if kl is None else kl.stderr,
            kl_low=None if kl is None or kl.stderr is None else kl.lower,
            kl_high=None if kl is None or kl.stderr is None else kl.upper,
            is_out_of_range=kl is not None and kl.is_out_of_range,
            kv_bits=used.kv_bits,
            kv_bytes_per_token=used.kv_bytes_per_token,
            kv_cache=formats,
            size_bytes=context,
        )

    def to_json(self) -> dict[str, Any]:
        """Every point, for machines."""
        return {
            "unit": self.problem.unit,
            "axis": "size_bytes" if self.problem.kv_tokens else "bits_per_weight",
            "gap": self.frontier.gap,
            "points": [point.to_json() for point in self.points],
            "seconds": round(self.seconds, 3),
        }


def frontier_request(choices: Choices) -> Request:
    """What is asked of every point of a frontier."""
    return make_request(choices, method=Method(ties="off"))


@documented
def frontier(
    table: AnyTable,
    *,
    choices: Choices = Choices(),
    polish: Annotated[
        int | None, Option("Solve exactly at this many sizes between the points too.", least=0)
    ] = None,
    tell: Tell | None = None,
) -> FrontierResult:
    """The frontier of accuracy against size.

    Returns:
        Every recipe that no other one beats in size and error at once.

    Raises:
        MofqError: An input is not valid.
    """
    from mofq.decision import request_problem, solve_frontier

    request = frontier_request(choices)
    problem = request_problem(open_table(table, tell or silent), request)
    start = monotonic()
    found = solve_frontier(problem, request.budgets, sizes=polish)
    source = str(table) if isinstance(table, str | Path) else "TABLE"
    return FrontierResult(source, request, problem, found, monotonic() - start)
