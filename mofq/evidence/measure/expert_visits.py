"""How many of the tokens that calibration kept came to each expert."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mofq.evidence.calibration.stats import Stats, open_sequences
from mofq.evidence.table import Visits
from mofq.model.layers import FusionGroup, is_expert


def visits_of(stats: Stats, groups: Sequence[FusionGroup]) -> dict[str, list[Visits]]:
    """Fusion group of experts -> the visits to it, of each corpus."""
    known = expert_visits(stats)
    tokens = {
        corpus: len(stats.sequence_files(corpus)) * stats.plan.sequence_length for corpus in known
    }
    return {
        group.name: [
            Visits(
                group.name,
                corpus,
                tokens=tokens[corpus],
                # A router may send a token to one expert twice, which is read once.
                layers={la.name: min(of_corpus[la.name], tokens[corpus]) for la in group.layers},
            )
            for corpus, of_corpus in known.items()
        ]
        for group in groups
        if any(map(is_expert, group.layers))
    }


def expert_visits(stats: Stats) -> dict[str, dict[str, int]]:
    """Corpus -> layer of an expert -> tokens of the kept sequences that came to it.

    Args:
        stats: An open stats folder.

    Returns:
        An empty mapping for each corpus where the model is no mixture.

    Raises:
        StatsError: A sequence is missing or damaged.
    """
    opened, files = open_sequences(stats)
    with opened:
        found = {corpus: [file.counts() for file in of] for corpus, of in files.items()}
    return {corpus: dict(_total(counts)) for corpus, counts in found.items()}


def _total(counts: list[dict[str, int]]) -> Counter[str]:
    total = Counter(dict.fromkeys((name for one in counts for name in one), 0))
    for one in counts:
        total.update(one)
    return total
