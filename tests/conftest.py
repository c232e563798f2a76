"""Fixtures that several tests share."""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command_line import DEMO, Measured, ok
from families import write_family

if TYPE_CHECKING:
    from exported import Stored

#: Writes a variant of a tiny checkpoint once per session: ``tiny("llama", shard_size="100KB")``.
TinyCheckpoint = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of minutes begin first, so that no process waits for another's at the end."""
    items.sort(key=lambda item: all("first" not in m.kwargs for m in item.iter_markers("long")))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """Tiny checkpoints of every family, made when first asked for. Not to be changed in place."""
    made: dict[str, Path] = {}

    def get(name: str, **options: Any) -> Path:
        key = repr((name, sorted(options.items(), key=lambda item: item[0])))
        if key not in made:
            made[key] = write_family(name, tmp_path_factory.mktemp(name) / name, **options)
        return made[key]

    return get


@pytest.fixture
def tiny_llama(tiny: TinyCheckpoint) -> Path:
    """The plainest of the tiny checkpoints: bf16, one file, untied."""
    return tiny("llama")


@pytest.fixture(scope="session")
def stored(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The plainest tiny checkpoint, exported under one scheme when first asked for.

    Not to be changed in place.
    """
    from exported import store

    made: dict[str, Stored] = {}

    def get(scheme: str) -> Stored:
        if scheme not in made:
            made[scheme] = store(tiny("llama"), scheme, tmp_path_factory.mktemp("stored") / "out")
        return made[scheme]

    return get


#: Small enough to be measured in a second, wide enough to choose from.
SPACE = """
version: 1
description: for the tests
schemes: [int4.g64, "int4.g32@mse", fp4_e2m1.g32, int8.channel]
base: [int4.g64]
min_gain: 1
"""


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """One small run of the commands up to a recipe. Not to be changed in place."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "space.yaml").write_text(SPACE)
    stats, table, recipe = folder / "stats", folder / "table.jsonl", folder / "recipe.yaml"
    calibrate = ("--corpus", "en=demo-en-calibration", "--sequences", "4")
    ok("calibrate", DEMO, *calibrate, "--sequence-length", "64", "-o", stats)
    ok("measure", DEMO, "--space", folder / "space.yaml", "--stats", stats, "-o", table)
    ok("search", table, "--max-bits", "5", "-o", recipe)
    return Measured(folder, stats, table, recipe)
