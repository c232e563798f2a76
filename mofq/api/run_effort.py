"""How much `mofq run` tries: rounding alone, what pays beside it, or everything.

``quick``
    The schemes of the search space.
``normal``
    Beside each scheme that rounds its fitted twin (`mofq.evidence.fitted_space`): what it costs is
    guessed, and measured where a search chooses it (`mofq.decision.guessed_rows`), first in a few
    fusion groups of each kind, until the search chooses nothing that is not measured.
    Where the best recipe rounds the inputs of most weights, the model is rewritten for them, and
    rotated (`run_evidence`). What was found is tuned (`run_delivery`).
``best``
    Every twin in every fusion group, of the model as it is and rewritten, with four times the
    samples kept.

What a run measured depends on its own request alone: rows that other requests added to the table
do not count, so that a run which is stopped, or repeated later, ends with the same recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mofq.api.options import Option

if TYPE_CHECKING:
    from mofq.decision import Decision, Request
    from mofq.evidence.spaces import SearchSpace
    from mofq.evidence.table import Table

Effort = Annotated[
    Literal["quick", "normal", "best"],
    Option(
        "quick: round to nearest; normal: also fit codes, move scales and tune what was found "
        "where that pays; best: everywhere."
    ),
]
#: Searches over measured and guessed rows, at most. Where samples are not stored, each takes a
#: calibration.
ROUNDS, ROUNDS_WITHOUT_STATS = 3, 1

#: Fusion group -> twins that are measured.
Twins = Mapping[str, frozenset[str]]
#: Measures what is asked for into the table, and returns all of it.
MeasureTwins = Callable[[Twins], "Table"]


@dataclass(frozen=True, slots=True)
class Tried:
    """Something that a run tried, and what it predicts of the best recipe with it."""

    name: str
    kl_nats_per_token: float | None  #: predicted; None: no recipe meets the budgets with it alone
    bits_per_weight: float | None
    seconds: float  #: to measure and search
    is_taken: bool = True  #: whether what was tried after it, and the recipe, are with it

    @classmethod
    def of(cls, name: str, decision: Decision | None, seconds: float) -> Tried:
        """With the best recipe; None: none meets the budgets."""
        if decision is None:
            return cls(name, None, None, seconds)
        recipe = decision.recipe
        return cls(name, recipe.kl_nats_per_token, recipe.bits_per_weight, seconds)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "name": self.name,
            "kl_nats_per_token": self.kl_nats_per_token,
            "bits_per_weight": self.bits_per_weight,
            "taken": self.is_taken,
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True, slots=True)
class Offered:
    """The search space of a run at some effort."""

    space: SearchSpace  #: that the table notes
    twins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  #: none: quick

    @classmethod
    def at(cls, effort: str, space: SearchSpace) -> Offered:
        """What is offered at an effort."""
        from mofq.evidence.fitted_space import with_fitted

        if effort == "quick":
            return cls(space)
        fitted = with_fitted(space)
        return cls(fitted.space, fitted.twins) if fitted.twins else cls(space)

    def wants(self, asked: Twins) -> Callable[[str, str], bool]:
        """Whether a fusion group is measured under a scheme, where these twins are asked for."""
        return lambda group, scheme: scheme not in self.twins or scheme in asked.get(group, ())

    def everything(self, table: Table) -> Twins:
        """Every twin in every fusion group."""
        return {group.name: frozenset(self.twins) for group in table.header.groups}


class Timed:
    """How long the stages of a run took, in their order."""

    def __init__(self) -> None:
        """Nothing has run yet."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[Callable[[], float]]:
        """Time a stage; yields what says how long it has taken so far, or took."""
        start = monotonic()
        yield lambda: self.seconds.get(stage, monotonic() - start)
        self.seconds[stage] = monotonic() - start


def fit_where_chosen(
    table: Table, request: Request, offered: Offered, *, measure: MeasureTwins, rounds: int
) -> Table:
    """Measure the twins that a search over measured and guessed rows chooses, and search again.

    Args:
        table: Of a run.
        request: Of the run.
        offered: The search space.
        measure: Measures twins.
        rounds: Searches, at most; of more than one the first is followed by pilots.

    Returns:
        The table with what was asked for, and nothing that other requests did.

    Raises:
        BudgetError: No recipe meets the budgets.
    """
    from mofq.decision import decide
    from mofq.decision.guessed_rows import pilot_groups, rows_for, with_guesses

    twins, asked = offered.twins, dict[str, frozenset[str]]()

    def chosen() -> dict[str, str]:
        """Fusion group -> twin, where a search chooses one that is not measured."""
        guessed = with_guesses(rows_for(table, twins, asked), twins, asked=asked)
        schemes = decide(guessed, request).recipe.scheme_of_group
        return {
            group: name
            for group, name in schemes.items()
            if name in twins and name not in asked.get(group, ())
        }

    if rounds > 1 and (names := frozenset(chosen().values())):
        asked = dict.fromkeys(pilot_groups(table.header.groups), names)
        table = measure(asked)
    for _ in range(rounds):
        more = chosen()
        if not more:
            break
        added = {group: asked.get(group, frozenset()) | {name} for group, name in more.items()}
        asked = {**asked, **added}
        table = measure(asked)
    return rows_for(table, twins, asked)
