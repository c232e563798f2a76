from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_table import header, nats_row, weight_row, write

from mofq.evidence.table import Row, open_table, read_table
from mofq.exceptions import TableError


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (weight_row(error=math.nan), "cannot be written: Out of range float"),
        (weight_row(error=math.inf), "cannot be written: Out of range float"),
        (weight_row(sqnr_db=math.inf), "cannot be written: Out of range float"),
        (weight_row(error=-1e-9), "error: must be at least 0, found -1e-09"),
        (weight_row(stderr=-1.0), "stderr: must be at least 0, found -1.0"),
        (weight_row(bytes=-1), "bytes: must be at least 0, found -1"),
        (weight_row(group="layers.0.attn.p"), r"no fusion group.*Did you mean 'layers.0.attn"),
        (weight_row(scheme="int9.channel"), r"unknown element format 'int9'"),
        (weight_row(scheme="fp4_e2m1.g16.s-e4m3"), "is written 'nvfp4'"),
        (weight_row(corpus="wikki"), "no corpus 'wikki'. Did you mean 'wiki'"),
        (
            weight_row(sample_errors=(1e-4,)),
            "sample_errors are in nats, and the row in relative_weight_error",
        ),
        (weight_row(static_amax={"k": 1.0}), "static_amax names 'k'"),
        (weight_row(static_amax={"o": math.nan}), "cannot be written: Out of range float"),
        (dataclasses.replace(nats_row(), error=0.2), "sample_errors have the mean 0.5"),
        (
            dataclasses.replace(nats_row(), sample_errors=(-0.5, 1.5)),
            r"sample_errors\[0\]: must be at least 0, found -0.5",
        ),
        (dataclasses.replace(nats_row(), sample_errors=(1e39, 0.0)), "too large to pack"),
        (dataclasses.replace(nats_row(), sample_errors=()), "sample_errors: .* at least 1 item"),
        (
            dataclasses.replace(nats_row(), sample_errors=(0.5, math.nan)),
            r"sample_errors\[1\]: must be a finite number, found nan",
        ),
    ],
)
def test_a_row_that_cannot_be_is_refused(tmp_path: Path, row: Row, message: str) -> None:
    path = tmp_path / "table.jsonl"
    with open_table(path, header()) as writer, pytest.raises(TableError, match=message):
        writer.add_group([row])
    assert read_table(path).rows == ()


@pytest.mark.parametrize("samples", [(0.5,), (0.5,) * 3])
def test_rows_of_one_corpus_rest_on_the_same_samples(
    tmp_path: Path, samples: tuple[float, ...]
) -> None:
    other = dataclasses.replace(nats_row("layers.0.attn.qk"), sample_errors=samples)
    with pytest.raises(TableError, match=r"has \d \w+ where earlier lines of corpus 'wiki' have 2"):
        write(tmp_path / "table.jsonl", nats_row(), other)


def test_nats_need_statistics(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="needs statistics, and the header has none"):
        write(tmp_path / "t.jsonl", weight_row(unit="output_mse"), stats=None)


def edited(path: Path, number: int, **changes: Any) -> None:
    """Change keys of a line; None removes one."""
    lines = path.read_text().splitlines()
    value = {**json.loads(lines[number]), **changes}
    lines[number] = json.dumps({key: item for key, item in value.items() if item is not ...})
    path.write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (0, {"version": 2}, "has version 2, and this mofq reads version 1"),
        (0, {"model": {"name": "x", "index_sha265": "a" * 64}}, "Did you mean 'index_sha256'"),
        (0, {"groups": []}, "groups: .* at least 1 item"),
        (0, {"unquantized": ["lm_head", "lm_head"]}, "'lm_head' stands twice"),
        (0, {"unquantized": ["q"]}, "the layer 'q' stands twice in the header"),
        (1, {"kind": "rwo"}, "unknown kind of line 'rwo'. Did you mean 'row'"),
        (1, {"eror": 1.0}, "unknown key 'eror'. Did you mean 'error'"),
        (1, {"error": ...}, "the key 'error' is missing"),
        (1, {"error": "1"}, "error: must be a number, found '1'"),
        (1, {"error": math.nan}, "NaN is not a number"),
        (0, {"version": True}, "has version True, and this mofq reads version 1"),
        (1, {"bytes": 1.5}, "bytes: must be an integer, found 1.5"),
        (1, {"bytes": 2**70}, "bytes: must be at most"),
        (1, {"bytes": True}, "bytes: must be an integer, found True"),
        (1, {"unit": "kl"}, "unit: must be 'relative_weight_error', .*found 'kl'"),
        (1, {"unit": "output_mse ", "corpus": "wiki"}, "Did you mean 'output_mse'"),
        (2, {"sample_errors": "AAA"}, "sample_errors: not base64 of float32"),
        (2, {"sample_errors": "AAAA"}, "sample_errors: not base64 of float32"),
        (2, {"sample_errors": "ÄÄÄÄ"}, "sample_errors: not base64 of float32"),
        (2, {"sample_errors": "AADAfwAAgD8="}, r"sample_errors\[0\]: must be a finite number"),
    ],
)
def test_an_edited_line_is_refused_by_name(
    tmp_path: Path, number: int, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "table.jsonl"
    write(path, weight_row(), nats_row())
    edited(path, number, **changes)
    with pytest.raises(TableError, match=message):
        read_table(path)


def test_a_repeated_key_or_a_second_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    write(path, weight_row())
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first + second.replace('"error"', '"bytes":1,"error"'))
    with pytest.raises(TableError, match="the key 'bytes' stands twice"):
        read_table(path)
    path.write_text(first + second + first)
    with pytest.raises(TableError, match="line 3: a second header"):
        read_table(path)


def test_repeated_rows_are_accepted_only_where_they_agree(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    write(path, weight_row())
    first, second = path.read_text().splitlines(keepends=True)
    path.write_text(first + second + second)
    assert read_table(path).rows == (weight_row(),)
    path.write_text(first + second + second.replace("0.0001", "0.0002"))
    with pytest.raises(TableError, match=r"line 3: .* stands twice with different numbers"):
        read_table(path)


@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_damage_breaks_the_reader(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "table.jsonl"
    path.unlink(missing_ok=True)
    write(path, weight_row(), nats_row())
    text = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text) - 1))
        text[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(text)
    with contextlib.suppress(TableError):
        read_table(path)


def test_the_folder_of_a_table_names_the_table(tmp_path: Path) -> None:
    (tmp_path / "table.jsonl").write_text("")
    with pytest.raises(TableError, match=r"Give .*table\.jsonl"):
        read_table(tmp_path)
    (tmp_path / "table.jsonl").unlink()
    with pytest.raises(TableError, match="`mofq measure` writes a table"):
        read_table(tmp_path)
