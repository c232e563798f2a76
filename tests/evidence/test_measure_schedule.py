"""Blocks are read ahead of their use, in order and within bounds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial, reduce
from operator import add
from typing import Any

import pytest
import torch
from number_cases import trained_like_weight
from torch import Tensor

from mofq.evidence.measure import layer_inputs as prepared
from mofq.evidence.measure import schedule
from mofq.evidence.measure.layer_inputs import PreparedLayer, prepare_layer
from mofq.evidence.measure.schedule import score_layers
from mofq.evidence.measure.score import BlockSums, score_rows
from mofq.exceptions import CheckpointError
from mofq.numbers.schemes import parse_scheme

WEIGHT = trained_like_weight(80, 64).bfloat16()


def layer_of(read_rows: prepared.RowReader) -> PreparedLayer:
    return prepare_layer(read_rows, (80, 64), [parse_scheme("int4.g32")], samples={})


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 rows, three of which may be held."""
    monkeypatch.setattr(prepared, "_SUMS_BLOCK_ELEMENTS", 16 * 64)
    monkeypatch.setattr(prepared, "_BLOCK_ROWS", 16)
    monkeypatch.setattr(schedule, "_AHEAD_BYTES", 3 * 16 * 64 * 2)


def test_rows_are_read_in_order_and_only_so_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    scored: list[int] = []
    ahead: list[int] = []

    def read_rows(number: int, start: int, stop: int) -> Tensor:
        read.append((number, start))
        ahead.append(len(read) - len(scored))
        return WEIGHT[start:stop]

    def slow(layer: PreparedLayer, rows_RI: Tensor, *, start: int) -> BlockSums:
        time.sleep(0.005)
        sums = score_rows(layer, rows_RI, start=start)
        scored.append(start)
        return sums

    monkeypatch.setattr(schedule, "score_rows", slow)
    layers = [layer_of(partial(read_rows, i)) for i in range(4)]
    assert len(list(score_layers(layers))) == 4
    assert read == [(i, start) for i in range(4) for start in range(0, 80, 16)]
    # Three held, one under way, and one on each thread that is scored and not yet given back.
    assert 2 <= max(ahead) <= 4 + torch.get_num_threads()


def test_small_layers_share_a_task_and_are_scored_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []

    def rows(number: int, start: int, stop: int) -> Tensor:
        return trained_like_weight(80, 64, seed=number)[start:stop].bfloat16()

    def counted(blocks: Sequence[tuple[PreparedLayer, int, int]], *more: Any) -> None:
        taken.append(len(blocks))
        score(blocks, *more)

    score = schedule._score
    monkeypatch.setattr(schedule, "_score", counted)
    several = [layer_of(partial(rows, i)) for i in range(3)]  # of five blocks each
    monkeypatch.setattr(prepared, "_SUMS_BLOCK_ELEMENTS", 80 * 64)
    small = [layer_of(partial(rows, i)) for i in range(3, 10)]
    monkeypatch.setattr(schedule, "_BATCH_ELEMENTS", 3 * 80 * 64)
    layers = [*several[:1], *small[:5], *several[1:], *small[5:]]
    together = list(score_layers(layers))
    assert sorted(taken) == [1] * 15 + [2, 2, 3]
    for layer, found in zip(layers, together, strict=True):
        [alone] = score_layers([layer])
        assert torch.equal(found.error_energy_S, alone.error_energy_S)
        assert found.weight_energy == alone.weight_energy


def test_sums_that_come_in_out_of_order_are_added_in_the_order_of_the_rows() -> None:
    first, second = layer_of(lambda *_: WEIGHT), layer_of(lambda *_: WEIGHT)
    blocks = [(layer, *rows) for layer in (first, second) for rows in layer.blocks]
    sums = {
        (id(layer), start): score_rows(layer, WEIGHT[start:stop] * (start + 1), start=start)
        for layer, start, stop in blocks
    }
    expected = reduce(add, [sums[id(first), start] for start, _ in first.blocks])
    in_order = schedule._InOrder(blocks)
    for number in (9, 1, 0, 3, 7, 2, 8, 4, 5, 6):
        layer, start, _ = blocks[number]
        in_order.add(layer, start, sums[id(layer), start])
    assert torch.equal(in_order.total(first).error_WI, expected.error_WI)
    assert torch.equal(in_order.total(second).extent.square_I, expected.extent.square_I)


def test_what_cannot_be_read_ends_the_run_and_leaves_no_thread_waiting() -> None:
    def read_rows(start: int, stop: int) -> Tensor:
        if start == 32:
            raise CheckpointError("it ends here")
        return WEIGHT[start:stop]

    layers = [layer_of(read_rows) for _ in range(4)]
    with pytest.raises(CheckpointError, match="it ends here"):
        list(score_layers(layers))


def test_a_run_that_is_left_early_reads_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def read_rows(start: int, stop: int) -> Tensor:
        read.append(start)
        return WEIGHT[start:stop]

    scores = score_layers([layer_of(read_rows) for _ in range(9)])
    next(scores)
    scores.close()
    count = len(read)
    time.sleep(0.02)
    assert len(read) == count < 9 * 5
