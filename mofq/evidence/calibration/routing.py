"""What it would cost if tokens of a mixture changed their experts, and which errors make them.

A router sends a token to the K experts with the largest scores. The *margin* is the score of the
last of them less that of the first that is left out. An error that comes before the router moves
the margin; where it falls below zero the token changes an expert, which no gradient knows of. With
a margin ``m``, an error of it with standard deviation ``s`` and a cost ``c`` of the exchange, the
expected cost is ``c P(error > m)``, summed over tokens and routers. Of tokens with small margins,
whose density is ``d``, that is ``s c d / sqrt(2 pi)``: it grows as ``s`` and not as its square.

Two numbers of each sequence that is run follow, and one for each layer:

``cost``
    ``A = sum c d / T``. The cost of an exchange is ``(g . D)^2 / 2``: ``D`` is the output of the
    expert that would come in less that of the one that would go, times the weight that the router
    gives the latter, and ``g`` the gradient of the scores at the output of the experts. Where a
    router chooses by other scores than it returns, ``D`` is what the experts give with one of its
    choices exchanged, less what they give (`mofq.evidence.calibration.router_choices`).
``gains``
    ``|| sum_t h_t x_t^T ||^2`` of each layer, as its gain in nats is, with ``h`` the gradient of
    ``sum +- sqrt(c d) m`` over all tokens and routers, with random signs: what noise of one size
    in every weight does to the margins that cost something. The ratio to the gain in nats says
    what variance ``V`` of such margins comes with each nat that is predicted of the layer.

By Cauchy's inequality the sum over tokens is at most ``sqrt(A V / 2 pi)``, and close to it where
margins are moved alike.

Source: the projected cost is the expansion of the divergence of `mofq.evidence.measure.score`;
random signs are those of `mofq.evidence.calibration.calibrate.sample_scores`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from mofq.evidence.calibration.capture import Captured
from mofq.evidence.calibration.gains import lookup_gain, numbers_of, weight_gain
from mofq.evidence.calibration.sequence_file import sequence_written
from mofq.exceptions import StatsError
from mofq.files.documents import load_json
from mofq.files.validated import NotNegative, Text, only_these_keys, validate

_MAX_BYTES = 64_000_000


@only_these_keys
@dataclass(frozen=True, slots=True)
class Routing:
    """Of one sequence: what exchanges of experts would cost, and what moves the margins."""

    cost: NotNegative  #: nats per token, for each unit of score
    gains: dict[Text, NotNegative]  #: layer -> gain; layers behind the last router have none


_ROUTING = TypeAdapter(Routing)


def run_margins(captured: Captured, *, seed: int) -> Routing:
    """Run the margins backward behind the scores, whose graph is still there.

    Args:
        captured: After the backward passes of the scores; its gradients stay theirs.
        seed: Of the random signs.
    """
    assert captured.routers is not None
    objective, costs = captured.routers.objective(seed=seed), captured.routers.costs
    gains = {} if objective is None else margin_gains(captured, objective.backward)
    return join_routers(costs, gains)


def margin_gains(captured: Captured, run: Callable[[], None]) -> dict[str, float]:
    """What moves the margins: layer -> gain, of those that a backward pass from margins reaches.

    Args:
        captured: After the backward passes of the scores; its gradients stay theirs.
        run: The backward pass.
    """
    of_scores = captured.grads, captured.input_gains
    captured.grads, captured.input_gains = {}, {}
    of_margins = {name: one.set_aside() for name, one in captured.looked_up.items()}
    run()
    found = {name: weight_gain(captured, name, grad) for name, (grad,) in captured.grads.items()}
    for name, restore in of_margins.items():
        for grad_TI in restore():
            found[name] = lookup_gain(captured, name, grad_TI)
    captured.grads, captured.input_gains = of_scores
    return dict(zip(found, numbers_of(list(found.values())), strict=True))


def join_routers(costs: Iterable[float], gains: Mapping[str, float]) -> Routing:
    """The routing of a sequence from what all of its routers cost, and what moves their margins."""
    cost = math.fsum(costs)
    return Routing(cost, dict(gains) if cost > 0 else {})


def routing_path(folder: Path, corpus: str, index: int) -> Path:
    """Where a sequence's routing is kept."""
    return folder / corpus / f"routing-{index:05d}.json"


def write_routing(path: Path, routing: Routing) -> None:
    """Write it beside its final name, then rename it.

    Raises:
        StatsError: A number is not finite, or the file cannot be written.
    """
    gains = {name: routing.gains[name] for name in sorted(routing.gains)}
    values = {"cost": routing.cost, "gains": gains}
    try:
        text = json.dumps(values, allow_nan=False)
    except ValueError:
        raise StatsError(
            f"{path}: what exchanges of experts cost is not finite. Look for broken weights."
        ) from None
    with sequence_written(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_routing(path: Path) -> Routing:
    """Read a sequence's routing.

    Raises:
        StatsError: The file is missing, damaged, or holds a number that is not finite.
    """
    content = load_json(path, StatsError, _MAX_BYTES)
    return validate(_ROUTING, content, str(path), StatsError)


def flip_rate(routing: Sequence[Routing], nats: Sequence[float], layers: Iterable[str]) -> float:
    """What a layer's or group's predicted KL makes of changes of experts: their square over it.

    A recipe whose groups ``g`` are predicted to cost ``KL_g`` costs ``sqrt(sum rate_g KL_g)``
    more by tokens that change experts.

    Args:
        routing: Of each sequence of a corpus.
        nats: The gain in nats of the same layers, of each sequence.
        layers: Of the group.

    Returns:
        Nats per token.
    """
    total = math.fsum(nats)
    names = tuple(layers)
    moved = math.fsum(one.gains.get(name, 0.0) for one in routing for name in names)
    cost = math.fsum(one.cost for one in routing) / len(routing)
    # KL is half the square of what the scores see, over T; the margins' variance a whole one.
    return cost * 2 * moved / total / (2 * math.pi) if total > 0 else 0.0


def flip_stderr(
    routing: Sequence[Routing], nats: Sequence[float], layers: Iterable[str]
) -> float | None:
    """The standard error of what changes of experts cost, as a share of it: the root of rates.

    Args:
        routing: Of each sequence of a corpus.
        nats: The gain in nats of the same layers, of each sequence.
        layers: All that errors come from.

    Returns:
        By leaving out one sequence after the other; None of fewer than two, or without a cost.

    Source: the jackknife; B. Efron, "The jackknife, the bootstrap and other resampling plans",
    1982, chapter 3.
    """
    names, count = tuple(layers), len(routing)
    whole = math.sqrt(flip_rate(routing, nats, names))
    if count < 2 or not whole:
        return None
    without = [
        math.sqrt(flip_rate([*routing[:n], *routing[n + 1 :]], [*nats[:n], *nats[n + 1 :]], names))
        for n in range(count)
    ]
    mean = math.fsum(without) / count
    return math.sqrt(math.fsum((one - mean) ** 2 for one in without) * (count - 1) / count) / whole
