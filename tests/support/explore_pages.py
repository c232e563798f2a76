"""What a page holds, for the tests of the explorer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mofq.evidence.table import Table
from mofq.explore.drawing import read_drawing
from mofq.explore.page_data import page_data


def data_of(table: Table, path: Path, **beside: Any) -> dict[str, Any]:
    """The data of a page of a table; ``beside`` as for `read_drawing`."""
    return page_data(read_drawing(table, **beside), path)


def recipe_texts(data: dict[str, Any]) -> Iterator[str]:
    """The recipe of every point of a page, of the lines that its script joins."""
    shared = data["recipe"]
    for point in data["points"]:
        groups, caches = [], [shared["caches"]]
        for group, place in zip(data["groups"], point["choice"], strict=True):
            (before, behind), (scheme, *_) = group["lines"], (option := group["options"][place])
            entry = before + data["schemes"][scheme]["line"] + behind + "".join(option[5:])
            (caches if group["cached"] else groups).append(entry)
        text = [point["header"], *groups, shared["unquantized"]]
        yield "".join(text + caches if point["has_caches"] else text)
