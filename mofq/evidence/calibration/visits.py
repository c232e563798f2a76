"""How many of the tokens that calibration kept came to each expert."""

from __future__ import annotations

from collections import Counter

from mofq.evidence.calibration.stats import Stats, open_sequences


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
