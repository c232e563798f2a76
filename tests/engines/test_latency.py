"""Times by hand: a device of round numbers, layers that can be counted on a page."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from mofq.decision.request import TimeRequest
from mofq.decision.timing import recipe_seconds
from mofq.engines.devices import DEVICE_MODELS, DeviceModel, load_device_model
from mofq.engines.latency import (
    arithmetic,
    group_seconds,
    other_seconds,
    parse_seconds,
    parse_workload,
    shown_seconds,
)
from mofq.evidence.table import TableGroup, TableLayer
from mofq.exceptions import BudgetError
from mofq.numbers.schemes import parse_scheme

#: 1000 bytes and 10,000 (bf16) or 20,000 (8-bit) operations a second.
SLOW = DeviceModel("slow", 10**6, 1e3, {"bf16": 1e4, "int8": 2e4, "fp8": 2e4}, (9, 0), "test")
FAST_MEMORY = DeviceModel("fast", 10**6, 1e9, {"bf16": 1e4, "int8": 2e4}, (8, 0), "test")


def layer(name: str, out_features: int, in_features: int, module: str = "") -> TableLayer:
    return TableLayer(name, out_features, in_features, "BF16", 0, module or name)


MLP = TableGroup("layers.0.mlp.gate_up", (layer("gate", 64, 32), layer("up", 64, 32)), 8192)


@pytest.mark.parametrize(
    ("scheme", "moved_bytes"),
    [
        # 2 layers of 64 x 32 weights; 4 tokens of 32 inputs; 4 tokens of 128 outputs in bf16.
        ("bf16", 2 * 64 * 32 * 2 + 4 * 32 * 2 + 4 * 128 * 2),
        # A row of 32 INT4 codes is 16 bytes, and one bf16 scale; 16 bytes of shape.
        ("int4.g32", 2 * (64 * (16 + 2) + 16) + 4 * 32 * 2 + 4 * 128 * 2),
        # Inputs arrive as one byte each.
        ("int8.channel+int8.token", 2 * 64 * (32 + 2) + 4 * 32 * 1 + 4 * 128 * 2),
    ],
)
def test_a_small_batch_takes_what_its_bytes_take(scheme: str, moved_bytes: int) -> None:
    few_operations = DeviceModel("d", 1, 1e3, {"bf16": 1e12, "int8": 1e12}, None, "test")
    workload = parse_workload("decode:batch=4,context=1")
    seconds = group_seconds(MLP, parse_scheme(scheme), few_operations, workload)
    assert seconds == pytest.approx(moved_bytes / 1e3)


@pytest.mark.parametrize(
    ("scheme", "peak"),
    [("bf16", 1e4), ("int4.g32", 1e4), ("int8.channel+int8.token", 2e4)],
)
def test_a_long_prompt_takes_what_its_operations_take(scheme: str, peak: float) -> None:
    workload = parse_workload("prefill:batch=2,prompt=50")
    seconds = group_seconds(MLP, parse_scheme(scheme), FAST_MEMORY, workload)
    assert seconds == pytest.approx(2 * 100 * 2 * 64 * 32 / peak)


def test_tensor_parallelism_divides_the_time() -> None:
    alone = parse_workload("decode:batch=4,context=1")
    four = parse_workload("decode:batch=4,context=1,tp=4")
    scheme = parse_scheme("bf16")
    assert group_seconds(MLP, scheme, SLOW, alone) == 4 * group_seconds(MLP, scheme, SLOW, four)


@pytest.mark.parametrize(
    ("scheme", "device", "expected"),
    [
        ("int8.channel+int8.token", "a100", "int8"),
        ("fp8_e4m3.channel+fp8_e4m3.token", "a100", "bf16"),
        ("fp8_e4m3.channel+fp8_e4m3.token", "h100", "fp8"),
        ("int4.g128+fp8_e4m3.token", "h100", "fp8"),
        ("fp8_e4m3.channel", "h100", "bf16"),
        ("nvfp4+nvfp4", "b200", "fp4"),
        ("nvfp4+nvfp4", "h100", "bf16"),
        ("mxfp4+mxfp8", "b200", "fp8"),
        ("nvfp4", "b200", "bf16"),
        ("bf16", "b200", "bf16"),
    ],
)
def test_a_kernel_uses_the_arithmetic_of_its_operands(
    scheme: str, device: str, expected: str
) -> None:
    assert arithmetic(parse_scheme(scheme), DEVICE_MODELS[device]) == expected


def test_experts_are_read_as_far_as_tokens_need_them() -> None:
    experts = TableGroup(
        "layers.0.mlp.experts",
        tuple(layer(f"e{n}.down", 8, 16, "experts.down_proj") for n in range(4)),
        1024,
    )
    one = parse_workload("decode:batch=1,context=1,experts_per_token=1")
    # One token reaches 1 of 4 experts: 256 bytes of weights, 16 inputs and 8 outputs.
    seconds = group_seconds(experts, parse_scheme("bf16"), SLOW, one)
    assert seconds == pytest.approx((256 + 32 + 16) / 1e3)
    with pytest.raises(BudgetError, match="experts_per_token=2"):
        group_seconds(
            experts, parse_scheme("bf16"), SLOW, parse_workload("decode:batch=1,context=1")
        )


@pytest.mark.parametrize(
    ("gate", "up", "down"), [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")]
)
def test_gate_and_up_of_an_expert_read_their_inputs_once(gate: str, up: str, down: str) -> None:
    shapes = {gate: (16, 8), up: (16, 8), down: (8, 16)}
    experts = TableGroup(
        "layers.0.moe.experts",
        tuple(layer(f"e{n}.{w}", *shapes[w], f"experts.{w}") for n in range(2) for w in shapes),
        1,
    )
    one = parse_workload("decode:batch=1,context=1,experts_per_token=1")
    # One token reaches 1 of 2 experts: 3 matrices of 256 bytes; 8 inputs of gate and up together,
    # 16 of down; 16, 16 and 8 outputs.
    seconds = group_seconds(experts, parse_scheme("bf16"), SLOW, one)
    assert seconds == pytest.approx((3 * 256 + 2 * (8 + 16) + 2 * (16 + 16 + 8)) / 1e3)


def test_attention_and_the_lm_head_are_what_no_choice_changes() -> None:
    qkv = TableGroup(
        "layers.0.attn.qkv", (layer("q", 32, 32), layer("k", 8, 32), layer("v", 8, 32)), 1
    )
    groups = (qkv, TableGroup("layers.0.attn.o", (layer("o", 32, 32),), 1), MLP)
    fast = DeviceModel("d", 1, 1e3, {"bf16": 1e12}, None, "test")
    workload = parse_workload("decode:batch=2,context=9")
    # Each of 2 sequences: 10 tokens of 16 keys and values; 32 queries in, 32 values out.
    cache = 2 * (10 * 16 + 2 * 32) * 2
    for has_own_lm_head, head in ((False, 600), (True, 300)):
        seconds = other_seconds(
            groups, fast, workload, other_bytes=600, has_own_lm_head=has_own_lm_head
        )
        assert seconds == pytest.approx((cache + head) / 1e3)
    latent = TableGroup("layers.1.attn.latent", (layer("q_a", 8, 32), layer("kv_a", 8, 32)), 1)
    with pytest.raises(BudgetError, match=r"layers\.1\.attn\.latent: .*not known here"):
        other_seconds((*groups, latent), fast, workload, other_bytes=600, has_own_lm_head=False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("decode", "batch is missing"),
        ("decode:batch=8", "context is missing"),
        ("prefill", "prompt is missing"),
        ("train:batch=8", "no phase is called 'train'"),
        ("decode:batch=8,contxt=3", "Did you mean 'context'"),
        ("decode:batch=0,context=3", "batch must be a whole number"),
        ("decode:batch=,context=3", "batch must be a whole number"),
    ],
)
def test_a_workload_that_says_too_little_or_too_much_is_refused(text: str, reason: str) -> None:
    with pytest.raises(BudgetError, match=reason):
        parse_workload(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("12ms", 0.012), ("0.4s", 0.4), ("800us", 8e-4), ("1.5 ms", 0.0015)]
)
def test_a_time_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)
    for wrong in ("12", "ms", "-3ms", "12 h", "nan s", "1e3ms"):
        with pytest.raises(BudgetError, match="not a time"):
            parse_seconds(wrong)


def test_seconds_are_shown_in_the_unit_that_suits() -> None:
    assert [shown_seconds(s) for s in (2.0, 0.0123, 4.5e-5)] == ["2 s", "12.3 ms", "45 us"]


def test_every_device_says_where_its_figures_are_from() -> None:
    for name, device in DEVICE_MODELS.items():
        assert device.name == name
        assert "http" in device.source or "github.com" in device.source
        assert device.instructions >= {"bf16", "int8"}
        assert not device.operations_per_second.keys() & set(device.unrated)
        assert 2e11 < device.bytes_per_second < 1e13


@pytest.mark.parametrize(
    ("name", "gigabytes", "per_second", "peaks", "capability"),
    [
        # bf16, int8, fp8, fp4: with FP32 accumulation, which halves BF16 and FP8 on GeForce.
        ("rtx3090", 24, 936, (71, 284, None, None), (8, 6)),
        ("rtx4090", 24, 1008, (165.2, 660.6, 330.3, None), (8, 9)),
        ("rtx5090", 32, 1792, (209.5, 838, 419, 1676), (12, 0)),
        ("rtx-pro-6000", 96, 1792, (503.8, 1007.6, 1007.6, 2015.2), (12, 0)),
        ("dgx-spark", 128, 273, (None, None, None, 500), (12, 1)),
        ("l4", 24, 300, (121, 242.5, 242.5, None), (8, 9)),
    ],
)
def test_cards_for_desks_have_the_figures_of_their_sheets(
    name: str,
    gigabytes: int,
    per_second: float,
    peaks: tuple[float | None, ...],
    capability: tuple[int, int],
) -> None:
    device = load_device_model(name)
    assert device.memory_bytes == gigabytes * 10**9
    assert device.bytes_per_second == pytest.approx(per_second * 1e9)
    stated = dict(zip(("bf16", "int8", "fp8", "fp4"), peaks, strict=True))
    expected = {key: 1e12 * peak for key, peak in stated.items() if peak is not None}
    assert dict(device.operations_per_second) == pytest.approx(expected)
    assert device.capability == capability


def test_tensor_cores_of_geforce_have_half_of_the_fp32_rate_of_professional_ones() -> None:
    """By clock and multiprocessors: GB202 with 170 at 2.407 GHz, and with 188 at 2.617 GHz."""
    geforce, professional = (DEVICE_MODELS[name] for name in ("rtx5090", "rtx-pro-6000"))
    scale = (188 * 2.617) / (170 * 2.407)
    for kind, factor in (("bf16", 2), ("fp8", 2), ("int8", 1), ("fp4", 1)):
        expected = factor * scale * geforce.operations_per_second[kind]
        found = professional.operations_per_second[kind]
        assert found == pytest.approx(expected, rel=1e-3)


def test_a_device_of_ones_own_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "version: 1\nmemory_bytes: 1000\nbytes_per_second: 2.5e9\n"
        "operations_per_second: {bf16: 1e12, int8: 2e12}\ncapability: '8.6'\nsource: measured\n"
    )
    device = load_device_model(str(path))
    assert (device.name, device.bytes_per_second, device.capability) == ("mine", 2.5e9, (8, 6))
    path.write_text(path.read_text().replace("bf16", "bf17"))
    with pytest.raises(BudgetError, match="Did you mean 'bf16'"):
        load_device_model(str(path))
    with pytest.raises(BudgetError, match="Did you mean 'h100'"):
        load_device_model("h1000")


@pytest.mark.parametrize(
    ("roles", "unquantized", "head_bytes"),
    [
        ((), ("lm_head",), 300),  # of 600, the half that is multiplied
        ((), (), 600),  # tied
        (("linear",), (), 64 * 32 * 2),  # what is left is the embedding, which is looked up
        (("lookup",), ("lm_head",), 300),
        (("linear", "lookup"), (), 64 * 32 * 2),
        (("tied",), (), 64 * 32 * 2),
    ],
)
def test_what_is_multiplied_by_for_logits_takes_time_and_lookups_none(
    roles: tuple[Literal["linear", "lookup", "tied"], ...],
    unquantized: tuple[str, ...],
    head_bytes: int,
) -> None:
    names = {"linear": "lm_head", "lookup": "embeddings", "tied": "embeddings"}
    groups = tuple(
        TableGroup(
            names[role],
            (
                TableLayer(
                    names[role],
                    64,
                    32,
                    dtype="BF16",
                    decoder_layer=None,
                    module=names[role],
                    role=None if role == "linear" else role,
                ),
            ),
            4096,
        )
        for role in roles
    )
    # Of a table: bytes of what is in no group. A matrix that is decided is not among them.
    other = 0 if roles in (("linear", "lookup"), ("tied",)) else 300 if roles else 600
    header = SimpleNamespace(groups=groups, other_bytes=other, unquantized=unquantized)
    table: Any = SimpleNamespace(header=header, caches=())
    fast = DeviceModel("d", 1, 1e3, {"bf16": 1e12}, None, "test")
    time = TimeRequest(fast, parse_workload("decode:batch=1,context=1"))
    seconds = recipe_seconds(table, dict.fromkeys(names.values(), "bf16"), time)
    moved = 2 * (32 + 64) if {"linear", "tied"} & set(roles) else 0  # inputs and logits
    assert seconds == pytest.approx((head_bytes + moved) / 1e3)
