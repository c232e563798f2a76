"""How many tokens came to each expert, from the samples to the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calibrated import calibrate_folder, read_sequence, some_tokens, space_of
from conftest import TinyCheckpoint

from mofq.evidence.calibration.stats import Stats
from mofq.evidence.measure.expert_visits import expert_visits
from mofq.evidence.measure.fill_table import measure
from mofq.evidence.table import Table, read_table
from mofq.exceptions import TableError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers

TOKENS = some_tokens(3, 16)
ACTIVE = 2  # of a tiny Mixtral's four experts


@pytest.fixture(scope="module")
def stats(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    folder = tmp_path_factory.mktemp("visits")
    return calibrate_folder(tiny("mixtral"), folder, {"a": TOKENS}, kept=2)


def table_of(model: Path, path: Path, stats: Stats | None) -> Table:
    checkpoint = open_checkpoint(str(model))
    space = space_of("int4.g32")
    measure(checkpoint, find_layers(checkpoint), space, table_path=path, stats=stats)
    return read_table(path)


def test_visits_are_the_tokens_of_the_kept_sequences(stats: Stats) -> None:
    found = expert_visits(stats)["a"]
    samples = [read_sequence(stats, index) for index in range(2)]
    for name, count in found.items():
        assert count == sum(len(one.get(f"tokens/{name}", ())) for one in samples), name
    first = [count for name, count in found.items() if name.endswith("w1") and ".0." in name]
    gates = [count for name, count in found.items() if "layers.0." in name and name[-2:] == "w1"]
    assert sum(gates) == ACTIVE * 2 * TOKENS.shape[1]
    assert first


def test_a_dense_model_has_no_visits(tiny_llama: Path, tmp_path: Path) -> None:
    stats = calibrate_folder(tiny_llama, tmp_path / "stats", {"a": TOKENS})
    assert expert_visits(stats) == {"a": {}}
    assert table_of(tiny_llama, tmp_path / "table.jsonl", stats).visits == ()


def test_a_table_has_the_visits_to_each_group_of_experts(
    tiny: TinyCheckpoint, stats: Stats, tmp_path: Path
) -> None:
    table = table_of(tiny("mixtral"), tmp_path / "table.jsonl", stats)
    assert [one.group for one in table.visits] == ["layers.0.moe.experts", "layers.1.moe.experts"]
    for one in table.visits:
        assert one.tokens == 2 * TOKENS.shape[1]
        assert sum(one.layers.values()) == 3 * ACTIVE * one.tokens


def test_measuring_again_adds_visits_to_a_table_of_before_they_were_noted(
    tiny: TinyCheckpoint, stats: Stats, tmp_path: Path
) -> None:
    path = tmp_path / "table.jsonl"
    whole = table_of(tiny("mixtral"), path, stats)
    lines = [line for line in path.read_text().splitlines() if '"kind":"visits"' not in line]
    path.write_text("\n".join(lines) + "\n")
    assert read_table(path).visits == ()
    again = table_of(tiny("mixtral"), path, stats)
    assert again.visits == whole.visits
    assert again.rows == whole.rows


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda one: one.update(group="nothing"), "no fusion group 'nothing'"),
        (lambda one: one.update(corpus="b"), "no corpus 'b'"),
        (lambda one: one["layers"].popitem(), "each layer of layers.0.moe.experts once"),
        (lambda one: one.update(tokens=1), "more than the 1 tokens"),
    ],
)
def test_visits_that_cannot_be_are_refused(
    change: object, reason: str, tiny: TinyCheckpoint, stats: Stats, tmp_path: Path
) -> None:
    path = tmp_path / "table.jsonl"
    table_of(tiny("mixtral"), path, stats)
    lines = path.read_text().splitlines()
    number = next(n for n, line in enumerate(lines) if '"kind":"visits"' in line)
    visits = json.loads(lines[number])
    change(visits)  # type: ignore[operator]
    path.write_text("\n".join([*lines[:number], json.dumps(visits)]) + "\n")
    with pytest.raises(TableError, match=reason):
        read_table(path)
