"""From the routing of a calibration to what each fusion group's errors make of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

from mofq.evidence.calibration.gains import Gains, read_gains
from mofq.evidence.calibration.routing import flip_rate, flip_stderr, read_routing
from mofq.evidence.calibration.stats import Stats
from mofq.evidence.table import Flips
from mofq.model.layers import PARTS, CacheLayer, FusionGroup


def corpus_flips(
    stats: Stats, groups: Iterable[FusionGroup], *, caches: Iterable[CacheLayer] = ()
) -> Iterator[Flips]:
    """What errors cost by changes of experts, on each corpus of which that is known.

    Args:
        stats: An open stats folder.
        groups: Of the model.
        caches: Whose formats are decided too.

    Raises:
        StatsError: A file of the statistics is missing or damaged.
    """
    members = {group.name: [layer.name for layer in group.layers] for group in groups}
    members |= {cache.name: [cache.part(part) for part in PARTS] for cache in caches}
    for corpus in stats.plan.corpora:
        routing = [read_routing(path) for path in stats.routing_files(corpus.name)]
        if not any(one.cost for one in routing):
            continue
        gains = [read_gains(path) for path in stats.gains_files(corpus.name)]
        nats_of = partial(_nats, gains, draws=stats.plan.draws)
        rates = {
            name: flip_rate(routing, nats_of(layers), layers) for name, layers in members.items()
        }
        every = [layer for layers in members.values() for layer in layers]
        yield Flips(corpus.name, rates, flip_stderr(routing, nats_of(every), every))


def _nats(
    gains: Sequence[Mapping[str, Gains]], layers: Iterable[str], *, draws: int
) -> list[float]:
    """The gain in nats of some layers in each sequence."""
    names = tuple(layers)
    return [sum(sum(one[layer].weight) for layer in names) / draws for one in gains]
