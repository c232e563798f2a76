"""Fits that are made before their turn: the same, in order, and no more than there is room for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mofq.evidence.fits import LayerFit
from mofq.evidence.measure import fit_ahead
from mofq.evidence.measure.fit_ahead import Asked, FitsAhead
from mofq.evidence.measure.worker_threads import Workers
from mofq.numbers.quantize.gptq import fit_bytes
from mofq.numbers.schemes import parse_scheme

GPTQ = (parse_scheme("int4.g32~gptq").quantized_weight,)


class Recorder:
    """Stands for `Fits`; notes which layers were fitted, and how."""

    def __init__(self) -> None:
        self.made: list[tuple[str, bool]] = []
        self._lock = Lock()

    def of(
        self,
        layer: Any,
        weights: Iterable[object],
        *,
        part: str = "all",
        run_all: Callable[..., None] | None = None,
    ) -> LayerFit:
        with self._lock:
            self.made.append((layer.name, run_all is not None))
        return LayerFit(importance_I=torch.tensor(float(layer.in_features)))


@pytest.fixture
def workers() -> Iterator[Workers]:
    with ThreadPoolExecutor(2) as executor:
        yield Workers(executor, 2)


def layers(*widths: int) -> list[Any]:
    return [SimpleNamespace(name=f"layer{n}", in_features=width) for n, width in enumerate(widths)]


def test_fits_are_given_in_order_and_as_many_are_made_ahead_as_there_are_threads(
    workers: Workers,
) -> None:
    asked, made = layers(64, 32, 96, 64, 64), Recorder()
    ahead = FitsAhead(
        made,  # type: ignore[arg-type]
        [Asked(layer, GPTQ, "all") for layer in asked],
        workers=workers,
    )
    for number, layer in enumerate(asked):
        found = ahead.of(layer, GPTQ, part="all").importance_I
        assert found is not None
        assert float(found) == layer.in_features
        assert len(made.made) <= number + 2
    assert sorted(made.made) == [(layer.name, False) for layer in asked]


def test_what_is_too_wide_for_one_each_is_made_by_all_threads_in_its_turn(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, made = layers(64, 512, 64), Recorder()
    monkeypatch.setattr(fit_ahead, "_FIT_BYTES", 2 * fit_bytes(512) - 1)
    ahead = FitsAhead(
        made,  # type: ignore[arg-type]
        [Asked(layer, GPTQ, "all") for layer in asked],
        workers=workers,
    )
    for layer in asked:
        ahead.of(layer, GPTQ, part="all")
    assert sorted(made.made) == [("layer0", False), ("layer1", True), ("layer2", False)]


def test_no_fit_begins_after_the_end(workers: Workers) -> None:
    asked, made = layers(*[64] * 9), Recorder()
    ahead = FitsAhead(
        made,  # type: ignore[arg-type]
        [Asked(layer, GPTQ, "all") for layer in asked],
        workers=workers,
    )
    ahead.of(asked[0], GPTQ, part="all")
    ahead.close()
    assert len(made.made) <= 3
