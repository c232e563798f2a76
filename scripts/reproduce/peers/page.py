"""Writes the table of a model into a page of the documentation."""

from __future__ import annotations

from pathlib import Path

from mofq.exceptions import MofqError
from mofq.files.documents import write_beside_and_rename
from scripts.reproduce.peers.entries import COLUMNS, ENTRIES, Entry
from scripts.reproduce.peers.results import Result, Setting, read_result, result_name
from scripts.shared.command import markdown_table, with_error

_HEADS = (
    *("at", "made by", "true bits", "KL [nats/token]", "perplexity", "top-1", "processor time"),
    "entry",
)


def write_table(page: Path, setting: Setting, folder: Path) -> None:
    """Put the table of a model between its two comments on the page.

    Args:
        page: With ``<!-- table: MODEL -->`` and, behind it, ``<!-- end of table -->``.
        setting: Of the results.
        folder: Of the model's results.

    Raises:
        MofqError: The page has no such comments, or the folder no result of this setting.
    """
    name = Path(setting.model).name
    results = {entry: read_result(folder / result_name(entry, setting)) for entry in ENTRIES}
    done = {entry: result for entry, result in results.items() if result is not None}
    left = [entry for entry in ENTRIES if entry not in done]
    lines = [*table_lines(done), *_original(done), *_left(left)]
    begin, end = f"<!-- table: {name} -->", "<!-- end of table -->"
    before, _, rest = page.read_text("utf-8").partition(begin)
    old, found, after = rest.partition(end)
    if not found or "<!-- table:" in old:
        raise MofqError(
            f"{page}: needed {begin!r} with {end!r} behind it, and found none. Write both where "
            "the table of this model should stand."
        )
    if not done:
        raise MofqError(
            f"{folder}: has no result of this model, these texts and these sizes. Run an entry of "
            "them first (--only NAME), or give those that the results are of."
        )
    text = "\n".join(["", "", *lines, "", ""])
    write_beside_and_rename(page, before + begin + text + end + after)


def table_lines(done: dict[Entry, Result]) -> list[str]:
    """The table: columns in their order, in each the least KL first, which is bold."""
    rows = []
    for column in COLUMNS:
        here = [(entry, result) for entry, result in done.items() if entry.column == column]
        here.sort(key=lambda one: one[1].kl_nats_per_token)
        for place, (entry, result) in enumerate(here):
            kl = with_error(result.kl_nats_per_token, result.kl_stderr, digits=5)
            rows.append(
                [
                    column,
                    entry.title,
                    f"{result.bits_per_weight:.3f}",
                    f"**{kl}**" if place == 0 and len(here) > 1 else kl,
                    f"{result.perplexity:.2f}",
                    f"{100 * result.top1_agreement:.1f} %",
                    _seconds(result.processor_seconds),
                    f"`{entry.name}`",
                ]
            )
    return markdown_table(_HEADS, rows)


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:,.0f} s"


def _original(done: dict[Entry, Result]) -> list[str]:
    for result in done.values():
        return ["", f"Perplexity of the original: {result.perplexity_original:.2f}."]
    return []


def _left(left: list[Entry]) -> list[str]:
    if not left:
        return []
    names = ", ".join(f"`{entry.name}`" for entry in left)
    return ["", f"Not run here (`--only NAME` runs one): {names}."]
