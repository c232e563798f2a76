"""What an engine keeps a search from."""

from __future__ import annotations

from pathlib import Path

from command_line import mofq
from conftest import TinyCheckpoint

from mofq.decide.refused import engine_refusals
from mofq.table import read_table

SPACE = """
version: 1
description: finer groups for INT8, and what engines have in their place
schemes:
  - int8.channel+int8.token
  - int8.g32+int8.token
  - int8.g32
  - fp8_e4m3.block64+fp8_e4m3.g64
"""


def test_a_search_for_an_engine_says_what_it_may_not_take(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    space, table = tmp_path / "space.yaml", tmp_path / "table.jsonl"
    space.write_text(SPACE, encoding="utf-8")
    model = tiny("llama")
    assert mofq("measure", model, "--space", space, "-o", table).code == 0
    options = ("search", table, "--max-bits", "12", "-o", tmp_path / "recipe.yaml")
    answer = mofq(*options, "--engine", "vllm-hopper", "--json").json
    (int8, fp8) = answer["refused"]
    assert int8["schemes"] == ["int8.g32+int8.token"]
    assert int8["groups"] == 8
    assert "no kernel multiplies INT8 group weights" in int8["reason"]
    assert fp8["schemes"] == ["fp8_e4m3.block64+fp8_e4m3.g64"]
    assert not {"int8.g32+int8.token", "fp8_e4m3.block64+fp8_e4m3.g64"} & set(answer["schemes"])
    ran = mofq(*options, "--engine", "vllm-hopper")
    assert "not offered to 8 fusion groups: int8.g32+int8.token: vllm-hopper" in ran.err
    assert mofq(*options, "--json").json["refused"] == []
    assert engine_refusals(read_table(table), None) == ()
