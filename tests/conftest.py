"""Fixtures that several tests share."""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import write_family

#: Writes a variant of a tiny checkpoint once per session: ``tiny("llama", shard_size="100KB")``.
TinyCheckpoint = Callable[..., Path]


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
