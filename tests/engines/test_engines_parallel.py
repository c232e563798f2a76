"""Devices that share every layer: what one of them holds, by hand from the engines' sources."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import DEMO, ok, refused
from conftest import TinyCheckpoint
from families import TINY_FAMILIES

from mofq.api.preconditions import check_engine
from mofq.engines import ENGINES, check_devices, find_engine, legality, storage_problem
from mofq.evidence.table.lines import TableGroup, TableLayer
from mofq.exceptions import EngineError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import FusionGroup, LinearLayer, find_layers
from mofq.numbers.schemes import parse_scheme

BLOCKS = "fp8_e4m3.block128.s-f32+fp8_e4m3.g128"


def group(name: str, **shapes: tuple[int, int]) -> FusionGroup:
    """A fusion group of layers [outputs, inputs]; ``experts__w2`` is the module ``experts.w2``."""
    layers = [
        LinearLayer(
            name=f"{name}.{word}",
            tensor="",
            out_features=out_features,
            in_features=in_features,
            dtype="BF16",
            transposed=False,
            expert=None,
            row_start=0,
            decoder_layer=0,
            module=word.replace("__", "."),
            shares_scale="",
        )
        for word, (out_features, in_features) in shapes.items()
    ]
    return FusionGroup(name, tuple(layers))


# Of Qwen2.5-72B: 29568 inputs are 231 * 128, so 2 devices have 115.5 groups of 128 each.
DOWN = group("layers.0.mlp.down", down_proj=(8192, 29568))
GATE_UP = group("layers.0.mlp.gate_up", gate_proj=(29568, 8192), up_proj=(29568, 8192))
OUT = group("layers.0.attn.o", o_proj=(8192, 8192))
QKV = group("layers.0.attn.qkv", q_proj=(8192, 8192), k_proj=(1024, 8192), v_proj=(1024, 8192))
# Of Qwen3-30B-A3B: experts of 768, 96 on each of 8 devices.
EXPERTS = group(
    "layers.0.moe.experts",
    experts__gate_proj=(768, 2048),
    experts__up_proj=(768, 2048),
    experts__down_proj=(2048, 768),
)
MIXTRAL = group(
    "layers.0.moe.experts",
    experts__w1=(14336, 4096),
    experts__w3=(14336, 4096),
    experts__w2=(4096, 14336),
)


# Of DeepSeek-V3: latent vectors are whole on every device, shared experts are cut.
LATENT = group("layers.0.attn.latent", q_a_proj=(1536, 7168), kv_a_proj_with_mqa=(576, 7168))
SHARED_DOWN = group("layers.3.mlp.shared_down", down_proj=(7168, 2048))


def test_inputs_of_keys_and_values_from_latent_vectors_stay_as_they_are() -> None:
    latent_kv = group("layers.0.attn.kv", kv_b_proj=(32768, 512))
    w8a8, w8 = parse_scheme("int8.channel+int8.token"), parse_scheme("int8.channel")
    assert "take a weight-only scheme" in str(legality("vllm-hopper")(w8a8, latent_kv))
    assert legality("vllm-hopper")(w8, latent_kv) is None
    assert legality("vllm-hopper")(w8a8, OUT) is None
    assert "take bf16" in str(legality("vllm-cpu")(w8a8, latent_kv))
    assert legality("vllm-cpu")(w8a8, OUT) is None


@pytest.mark.parametrize("scheme", ["int4.g128", "int8.channel", "fp8_e4m3.tensor+fp8_e4m3.tensor"])
def test_sglang_cannot_load_what_joined_latent_layers_store_beside_rows(scheme: str) -> None:
    alone = group("layers.0.attn.latent", kv_a_proj_with_mqa=(576, 7168))
    check = legality("sglang-hopper")
    assert "the loader concatenates" in str(check(parse_scheme(scheme), LATENT))
    assert check(parse_scheme(scheme), alone) is None
    assert check(parse_scheme("fp8_e4m3.channel+fp8_e4m3.token"), LATENT) is None


def test_sglang_cannot_load_packed_shared_experts_of_glm_and_those_of_others() -> None:
    shared = group(
        "layers.1.mlp.shared_gate_up",
        shared_experts__gate_proj=(1408, 4096),
        shared_experts__up_proj=(1408, 4096),
    )
    glm, deepseek = (legality("sglang-hopper", name) for name in ("glm4_moe", "deepseek_v3"))
    for scheme in ("int4.g128", "int8.channel", "nvfp4"):
        assert "which packed ones have under another name" in str(glm(parse_scheme(scheme), shared))
        assert deepseek(parse_scheme(scheme), shared) is None
        assert glm(parse_scheme(scheme), OUT) is None
        assert glm(parse_scheme(scheme), SHARED_DOWN) is None
        assert legality("sglang-hopper")(parse_scheme(scheme), shared) is None  # of what is unknown
    for scheme in ("fp8_e4m3.channel+fp8_e4m3.token", "fp8_e4m3.channel"):
        assert glm(parse_scheme(scheme), shared) is None


def test_a_model_that_an_engine_does_not_load_is_refused_before_and_after_it_was_measured(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    model, table, space = tiny("qwen3_moe"), tmp_path / "t.jsonl", tmp_path / "space.yaml"
    space.write_text("version: 1\nschemes: [int8.channel]\n")
    says = "takes every decoder layer for one of experts"
    engine = ("--engine", "sglang-hopper")
    assert says in refused("inspect", model, *engine)
    assert says in refused("measure", model, "--space", space, *engine, "-o", table)
    ok("measure", model, "--space", space, "-o", table)
    recipe = tmp_path / "r.yaml"
    search = ("search", table, "--max-bits", "14", "-o", recipe)
    assert says in refused(*search, *engine)
    ok(*search, "--engine", "vllm-hopper")
    served = ok(*search).out
    assert "sglang" not in served
    to = ("--to", "compressed-tensors", "-o", tmp_path / "folder")
    assert says in refused("export", model, recipe, *engine, *to)
    sparse = tiny("qwen3_moe", mlp_only_layers=[])
    assert ok("inspect", sparse, *engine, "--json").json["offers"]


def test_latent_vectors_are_whole_on_every_device_and_shared_experts_are_cut() -> None:
    check = legality("vllm-hopper:tp=32")
    assert check(parse_scheme(BLOCKS), LATENT) is None
    assert "has 64 of layers.3.mlp.shared_down" in str(check(parse_scheme(BLOCKS), SHARED_DOWN))


@pytest.mark.parametrize(
    ("scheme", "layers", "served"),
    [
        # scheme, fusion group, numbers of devices that can share it, of 1, 2, 4, 8
        ("int4.g128", DOWN, {1}),
        ("int4.g64", DOWN, {1, 2}),
        ("int4.g32", DOWN, {1, 2, 4}),
        ("int4.channel", DOWN, {1, 2, 4, 8}),
        ("int8.channel+int8.token", DOWN, {1, 2, 4, 8}),
        ("fp8_e4m3.channel+fp8_e4m3.token", DOWN, {1, 2, 4, 8}),
        ("nvfp4", DOWN, {1, 2, 4, 8}),  # 3696 = 231 * 16
        ("mxfp8", DOWN, {1, 2, 4}),
        (BLOCKS, DOWN, {1}),
        ("int4.g128", GATE_UP, {1, 2, 4, 8}),  # cut along outputs
        (BLOCKS, GATE_UP, {1}),
        ("int4.g128", OUT, {1, 2, 4, 8}),
        (BLOCKS, OUT, {1, 2, 4, 8}),
        (BLOCKS, QKV, {1, 2, 4, 8}),  # one head of 128 of keys for each of 8
        ("int4.g128", EXPERTS, {1, 2}),
        ("int4.g64", EXPERTS, {1, 2, 4}),
        ("int4.g32", EXPERTS, {1, 2, 4, 8}),
        (BLOCKS, EXPERTS, {1, 2}),
        ("int4.g128", MIXTRAL, {1, 2, 4, 8}),
    ],
)
def test_what_shares_a_scale_lies_on_one_device(
    scheme: str, layers: FusionGroup, served: set[int]
) -> None:
    reasons = {
        devices: legality(f"vllm-hopper:tp={devices}")(parse_scheme(scheme), layers)
        for devices in (1, 2, 4, 8)
    }
    assert {devices for devices, reason in reasons.items() if reason is None} == served, reasons
    assert all("devices" in reason for reason in reasons.values() if reason is not None)


def test_a_refusal_says_what_one_device_has_of_which_layer() -> None:
    reason = legality("vllm-hopper:tp=4")(parse_scheme("int4.g64"), DOWN)
    assert reason is not None
    for words in ("vllm-hopper 0.33.0 on 4 devices", "down_proj", "7392", "divisible by 64"):
        assert words in reason


@pytest.mark.parametrize(
    ("scheme", "layers", "words"),
    [
        ("int8.channel", group("layers.0.mlp.down", down_proj=(64, 90)), "cannot share equally"),
        # 4 devices have 24 inputs each, 3 words of 8 codes; 8 have 12.
        ("int4.channel", group("layers.0.mlp.down", down_proj=(64, 96)), "no whole 32-bit words"),
        # Weights alone are packed in 8 bits too: 48 inputs are 6 codes for each of 8 devices.
        ("int8.channel", group("layers.0.mlp.down", down_proj=(64, 48)), "no whole 32-bit words"),
        ("int4.channel.asym", group("layers.0.mlp.up", fc1=(96, 64)), "zero points"),
    ],
)
def test_words_are_not_cut(scheme: str, layers: FusionGroup, words: str) -> None:
    reason = legality("vllm-ada:tp=8")(parse_scheme(scheme), layers)
    assert reason is not None
    assert words in reason


def test_int8_codes_beside_quantized_inputs_are_bytes_and_may_be_cut_anywhere() -> None:
    down = group("layers.0.mlp.down", down_proj=(64, 48))
    assert legality("vllm-ada:tp=8")(parse_scheme("int8.channel+int8.token"), down) is None


def test_keys_of_fewer_heads_than_devices_are_repeated() -> None:
    few = group("layers.0.attn.qkv", q_proj=(512, 512), k_proj=(4, 512), v_proj=(4, 512))
    assert legality("vllm-ada:tp=8")(parse_scheme("int4.g128"), few) is None


def test_keys_beside_a_gate_are_repeated_too_and_the_gate_is_not() -> None:
    def reason(**gate: tuple[int, int]) -> str | None:
        shapes = {"q_proj": (512, 512), "k_proj": (4, 512), "v_proj": (4, 512), **gate}
        return legality("vllm-ada:tp=8")(
            parse_scheme("int4.g128"), group("layers.0.attn.qkvg", **shapes)
        )

    assert reason(gate_proj=(512, 512)) is None
    assert "gate_proj has 4 outputs" in str(reason(gate_proj=(4, 512)))


def test_experts_of_a_hidden_size_that_marlin_has_not_are_refused() -> None:
    odd = group(
        "layers.0.moe.experts",
        experts__w1=(512, 2880),
        experts__w3=(512, 2880),
        experts__w2=(2880, 512),
    )
    reason = legality("vllm-ada")(parse_scheme("int4.g32"), odd)
    assert reason is not None
    assert "hidden size % 128 == 0; it is 2880" in reason
    assert legality("vllm-hopper")(parse_scheme("int4.g32"), odd) is None  # Humming pads


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vllm-hoper:tp=4", "Did you mean 'vllm-hopper'"),
        ("vllm-hopper:4", "are written vllm-hopper:tp=4"),
        ("vllm-hopper:tp=0", "are written vllm-hopper:tp=4"),
        ("vllm-hopper:", "are written vllm-hopper:tp=4"),
        ("torchao-cpu:tp=2", "has every layer on one device"),
        ("transformers:tp=2", "has every layer on one device"),
    ],
)
def test_what_is_no_number_of_devices_is_refused(name: str, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        find_engine(name)


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_weights_that_are_stored_transposed_are_for_engines_whose_class_of_the_model_turns_them(
    engine: str, tiny: TinyCheckpoint
) -> None:
    layers = find_layers(open_checkpoint(str(tiny("gpt2"))))
    scheme = parse_scheme("int8.channel")
    is_loaded = engine.startswith(("vllm", "sglang"))
    for each in layers.groups:
        for model_type in ("gpt2", "openai-gpt", None):
            problem = storage_problem(ENGINES[engine], each, model_type)
            assert (problem is None) == (is_loaded and model_type != "openai-gpt")
            if problem is not None:
                assert "is stored transposed (the Conv1D of GPT-2)" in problem
                assert legality(engine, model_type)(scheme, each) == problem
    if is_loaded:
        check_engine(engine, layers)
        return
    with pytest.raises(EngineError, match=r"transposed.*Leave engine out"):
        check_engine(engine, layers)


def test_a_table_that_does_not_say_what_is_transposed_has_the_names_of_gpt2(
    tiny: TinyCheckpoint,
) -> None:
    layers = find_layers(open_checkpoint(str(tiny("gpt2"))))
    for each in layers.groups:
        of_table = TableGroup(
            each.name,
            tuple(
                TableLayer(
                    one.name,
                    one.out_features,
                    one.in_features,
                    "BF16",
                    one.decoder_layer,
                    one.module,
                )
                for one in each.layers
            ),
            0,
        )
        for model_type in ("gpt2", "openai-gpt"):
            found = storage_problem(ENGINES["vllm-cpu"], of_table, model_type)
            assert found == storage_problem(ENGINES["vllm-cpu"], each, model_type)


@pytest.mark.parametrize("name", sorted(TINY_FAMILIES))
def test_two_devices_can_share_every_family(name: str, tiny: TinyCheckpoint) -> None:
    layers = find_layers(open_checkpoint(str(tiny(name))))
    check_devices(layers, 2)
    check, one = legality("vllm-hopper:tp=2"), legality("vllm-hopper")
    channels = parse_scheme("fp8_e4m3.channel+fp8_e4m3.token")
    for each in layers.groups:
        assert (check(channels, each) is None) == (one(channels, each) is None), each.name
    # 128 inputs that are cut are 64 on each device.
    refused = {
        each.name.split(".", 2)[-1]
        for each in layers.groups
        if check(parse_scheme("int4.g128"), each) and not one(parse_scheme("int4.g128"), each)
    }
    assert refused <= {"attn.o", "mlp.down", "mlp.shared_down", "moe.experts"}
    assert "attn.o" in refused


def test_heads_are_dealt_out_evenly() -> None:
    layers = find_layers(open_checkpoint(DEMO))  # 4 heads, 2 of keys and values
    for devices in (1, 2, 4):
        check_devices(layers, devices)
    for devices in (3, 8):
        with pytest.raises(EngineError, match="4 heads, 2 of them"):
            check_devices(layers, devices)


def test_a_recipe_for_several_devices_is_searched_exported_and_served_on_them(
    tmp_path: Path,
) -> None:
    engine, table, recipe = "vllm-hopper:tp=2", tmp_path / "t.jsonl", tmp_path / "r.yaml"
    space = tmp_path / "space.yaml"
    space.write_text('version: 1\nschemes: ["int4.g[128,64,32]", int8.channel]\n')
    offers = ok("inspect", DEMO, "--space", space, "--engine", engine, "--json").json["offers"]
    # 128 inputs of o are 64 on each device, and 384 of down 192; both take groups of 64.
    assert offers["layers.0.attn.o"]["schemes"] == ["int4.g64", "int8.channel", "bf16"]
    assert offers["layers.0.attn.qkv"]["schemes"] == ["int4.g128", "int8.channel", "bf16"]
    ok("measure", DEMO, "--space", space, "--engine", engine, "-o", table)
    ok("search", table, "--engine", engine, "--max-bits", "5", "-o", recipe)
    to = ("--to", "compressed-tensors", "-o", tmp_path / "folder")
    other = ("--engine", "vllm-hopper:tp=4")
    assert "on 4 devices" in refused("export", DEMO, recipe, *other, *to)
    served = ok("export", DEMO, recipe, *to, "--json").json["serve_command"]
    assert served.endswith("--tensor-parallel-size 2")


def test_a_model_that_the_devices_cannot_share_is_not_measured(tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    measure = ("measure", DEMO, "--space", "w8a8", "--engine", "vllm-ada:tp=3", "-o", table)
    assert "4 heads" in refused(*measure)
    assert not table.exists()


def test_advice_for_several_devices_names_them() -> None:
    asked = ("--device-model", "h100", "--deployment", "asynchronous", "--tp", "4")
    assert "--engine vllm-hopper:tp=4" in ok("advise", *asked, "--json").json["commands"][1]


def test_int8_weights_beside_int8_inputs_are_not_packed() -> None:
    narrow = group("layers.0.mlp.down", down_proj=(64, 48))
    judge = legality("vllm-ada:tp=8")
    assert "fill no whole 32-bit words" in str(judge(parse_scheme("int8.channel"), narrow))
    assert judge(parse_scheme("int8.channel+int8.token"), narrow) is None
