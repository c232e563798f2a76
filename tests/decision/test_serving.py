"""What an engine keeps a search from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from command_line import mofq
from conftest import TinyCheckpoint
from explore_tables import write_explore_table

from mofq.decision import Budgets, Request
from mofq.decision.serving import engine_refusals
from mofq.evidence.table import read_table

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
    assert engine_refusals(read_table(table), Request(Budgets())) == ()


def test_what_another_search_space_offers_is_not_called_refused(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    table, model = tmp_path / "table.jsonl", tiny("llama")
    spaces = {
        "five": "[int5.channel, fp6_e2m3.channel, fp6_e3m2.channel]",
        "eight": "[int8.channel]",
    }
    for name, schemes in spaces.items():
        space = tmp_path / f"{name}.yaml"
        space.write_text(f"version: 1\nschemes: {schemes}\n", encoding="utf-8")
        assert mofq("measure", model, "--space", space, "-o", table).code == 0
    content = read_table(table)

    def of(space: str) -> Request:
        return Request(Budgets(), engine="sglang-hopper", space=space)

    assert engine_refusals(content, of("eight")) == ()
    int5, fp6 = engine_refusals(content, of("five"))
    assert int5.schemes == ("int5.channel",)
    assert fp6.schemes == ("fp6_e2m3.channel", "fp6_e3m2.channel")
    assert fp6.reason.endswith("has no kernel for linear layers in these formats")
    assert int5.groups == fp6.groups == 8


def test_formats_of_the_cache_are_called_refused_where_they_were_asked_for(tmp_path: Path) -> None:
    content = read_table(write_explore_table(tmp_path / "table.jsonl", caches=True))

    def refused(**keys: Any) -> set[str]:
        request = Request(Budgets(), engine="vllm-hopper", **keys)
        found = engine_refusals(content, request)
        return {name for one in found for name in one.schemes if name.startswith("kv:")}

    four, both = "kv:int4.token_head.s-bf16", "kv:int8.token_head.s-bf16/int4.token_head.s-bf16"
    assert refused() == set()
    assert refused(kv_cache=True) == {four, both}
    assert refused(kv_cache=True, kv_formats=("kv:int8.token_head", four)) == {four}
    assert refused(kv_cache=True, space="test") == {four, both}
