"""A recipe's schemes on one line."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from typing import TYPE_CHECKING

from mofq.cli.show.terminal import say

if TYPE_CHECKING:
    from mofq.decision.recipe import Recipe

#: Columns of a line that goes to a file or a pipe.
_COLUMNS = 120
_BLOCKS = 20


def print_histogram(recipe: Recipe) -> None:
    """How many fusion groups have which scheme, the most frequent first, on one line."""
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else _COLUMNS
    say(histogram(Counter(group.scheme for group in recipe.groups), columns=columns))
    if recipe.kv_cache:
        schemes = Counter(cache.scheme for cache in recipe.kv_cache)
        say(histogram(schemes, columns=columns, of="KV cache"))


def histogram(schemes: Counter[str], *, columns: int, of: str = "fusion groups") -> str:
    """The line, no wider than the terminal as long as one scheme fits.

    Args:
        schemes: How many fusion groups have which.
        columns: Of the terminal. Schemes that do not fit are counted together.
        of: What has the schemes.
    """
    total, ranked = sum(schemes.values()), schemes.most_common()
    parts = [
        f"{name} {'█' * max(1, round(_BLOCKS * count / total))} {count}" for name, count in ranked
    ]
    for shown in range(len(parts), 0, -1):
        rest = ranked[shown:]
        others = [f"{len(rest)} more {sum(count for _, count in rest)}"] if rest else []
        line = f"{of}: " + "  ".join([*parts[:shown], *others])
        if len(line) <= columns:
            return line
    return line
