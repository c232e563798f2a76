"""Refusals are counted by reason, in the same words wherever they are told."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import DEMO, ok

from mofq.evidence.refusals import Refused, count_refusals


def test_layers_of_one_kind_are_one_reason_and_other_figures_are_others() -> None:
    def cut(layer: int, inputs: int) -> str:
        return f"vllm 0.33.0: one of 2 devices has {inputs} of model.layers.{layer}.mlp.down_proj"

    assert count_refusals(
        [
            *((f"layers.{n}.mlp.down", "int4.g128", cut(n, 64)) for n in range(3)),
            ("layers.1.mlp.down", "int8.g128", cut(1, 64)),
            ("layers.3.mlp.down", "int8.g128", cut(3, 96)),
            ("layers.0.attn.o", "int5.g32@mse", "9.0 has no kernel in int5.g32"),
            ("layers.0.attn.o", "int6.channel", "9.0 has no kernel in int6.channel"),
            ("layers.0.attn.kv_cache", "kv:int4.head", "no engine holds kv:int4.head"),
        ]
    ) == (
        Refused(("int4.g128", "int8.g128"), 3, cut(0, 64).replace("layers.0", "layers.*")),
        Refused(("int8.g128",), 1, cut(3, 96)),
        Refused(("int5.g32@mse", "int6.channel"), 1, "9.0 has no kernel in these formats"),
        Refused(("kv:int4.head",), 1, "no engine holds kv:int4.head"),
    )


@pytest.mark.long
def test_inspecting_and_measuring_give_one_reason(tmp_path: Path) -> None:
    space, table = tmp_path / "space.yaml", tmp_path / "table.jsonl"
    space.write_text("version: 1\nschemes: [int8.g128, fp6_e2m3.channel, fp6_e2m3.g32]\n")
    asked = ("--space", space, "--engine", "vllm-hopper:tp=2")
    inspected = " ".join(ok("inspect", DEMO, *asked).out.split())
    lines = [
        line.partition("not offered to ")[2]
        for line in ok("measure", DEMO, *asked, "-o", table).err.splitlines()
        if "not offered" in line
    ]
    assert len(lines) == 3  # o and down, whose devices' parts differ, and a format without kernel
    for line in lines:
        groups, _, rest = line.partition(" fusion groups: ")
        schemes, _, reason = rest.partition(": ")
        assert f"{schemes} {groups} {reason}"[:60] in inspected
    again = ok("measure", DEMO, *asked, "-o", table).err
    assert "everything was there already" in again
    assert "3 schemes are not offered to every fusion group: `mofq inspect`" in again
    assert "not offered to 2" not in again


@pytest.mark.long
def test_a_run_tells_its_own_refusals_and_not_those_of_other_engines(tmp_path: Path) -> None:
    space, table = tmp_path / "space.yaml", tmp_path / "table.jsonl"
    space.write_text("version: 1\nschemes: [int8.channel, int4.g128]\n")
    for engine, refused in (("vllm-cpu", ["int8.channel"]), ("vllm-hopper", [])):
        asked = ("--space", space, "--engine", engine, "-o", table)
        content = ok("measure", DEMO, *asked, "--json").json
        assert [one["schemes"] for one in content["refused"]] == [[name] for name in refused]
        assert ok("measure", DEMO, *asked).err.count("1 scheme is not offered") == len(refused)
