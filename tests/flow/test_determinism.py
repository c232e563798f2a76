"""The same inputs and seed give the same bytes, on one thread and on two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from command_line import DEMO, Measured, ok, tree
from safetensors.torch import load_file

SHORT = ("--corpus", "en=demo-en-calibration", "--sequences", "4", "--sequence-length", "64")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2])
def test_table_and_recipe_have_the_same_bytes_on_any_number_of_threads(
    count: int, measured: Measured, tmp_path: Path
) -> None:
    table, recipe = tmp_path / "table.jsonl", tmp_path / "recipe.yaml"
    space = measured.folder / "space.yaml"
    with threads(count):
        ok("measure", DEMO, "--space", space, "--stats", measured.stats, "-o", table)
        ok("search", table, "--max-bits", "5", "-o", recipe)
    assert table.read_bytes() == measured.table.read_bytes()
    assert recipe.read_bytes() == measured.recipe.read_bytes()


@pytest.mark.long
def test_calibrate_gives_the_same_bytes_on_as_many_threads_and_else_the_same_numbers(
    tmp_path: Path,
) -> None:
    for name, count in (("one", 1), ("again", 1), ("two", 2), ("two again", 2)):
        with threads(count):
            ok("calibrate", DEMO, *SHORT, "-o", tmp_path / name)
    assert tree(tmp_path / "one") == tree(tmp_path / "again")
    assert tree(tmp_path / "two") == tree(tmp_path / "two again")
    for path in (tmp_path / "one" / "en").glob("*.safetensors"):
        ours, theirs = load_file(path), load_file(tmp_path / "two" / "en" / path.name)
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            if value.dtype == torch.int64:
                assert torch.equal(value, theirs[key])
                continue
            # Sums in another order, at most one step of bfloat16 apart after rounding; gradients
            # cancel, so that their roundings are those of the largest among them.
            largest = value.double().abs().amax()
            difference = (value.double() - theirs[key].double()).abs().amax()
            assert difference <= 2.0**-8 * largest, key
            typical = (value.double() - theirs[key].double()).abs().mean()
            assert typical <= 1e-4 * value.double().abs().mean(), key
