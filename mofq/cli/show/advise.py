"""What `mofq advise` shows: where to start, why, and with which commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mofq.cli.show.terminal import print_table, say

if TYPE_CHECKING:
    from mofq.api import AdviseResult


def show_advice(result: AdviseResult) -> None:
    """Space, budget and engines; the rules with their sources; the commands."""
    advice = result.advice
    rows = [
        ["search space", advice.space],
        ["budget", " ".join(advice.budget)],
        ["engines", ", ".join(advice.engines) or "none that mofq has rules for"],
    ]
    print_table(f"{result.deployment} serving on {result.tp} × {result.device}", ["", ""], rows)
    for number, one in enumerate(advice.rules, start=1):
        say(f"{number}. {one.says} [{one.source}]")
    say("Start with:")
    for command in result.commands:
        say(f"  {command}")
