"""From the routing of a calibration to what each fusion group's errors make of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mofq.evidence.calibration.gains import read_gains
from mofq.evidence.calibration.routing import flip_rate, read_routing
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
        rates = {}
        for name, layers in members.items():
            nats = [sum(sum(one[layer].weight) for layer in layers) for one in gains]
            draws = stats.plan.draws
            rates[name] = flip_rate(routing, [value / draws for value in nats], layers)
        yield Flips(corpus.name, rates)
