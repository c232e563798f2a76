"""What is kept between layers, written by a process that is killed within a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from mofq.files.documents import PART
from mofq.model.streaming import records


@contextmanager
def stopped_at(place: str | int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stop whatever writes files of tensors, as a kill within one of them does.

    Args:
        place: The end of its path, or how many are written with it.
        monkeypatch: Of the test.
    """
    written, numbers = records._written, count(1)

    def stop(path: Path) -> Any:
        number = next(numbers)
        if number == place or str(path).endswith(f"/{place}"):
            path.with_name(path.name + PART).write_bytes(b"\x10")
            raise KeyboardInterrupt
        return written(path)

    with monkeypatch.context() as patch:
        patch.setattr(records, "_written", stop)
        with pytest.raises(KeyboardInterrupt):
            yield
