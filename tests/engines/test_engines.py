"""Legality of schemes on engines, against a table written by hand from the engines' sources."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mofq.engines import (
    ENGINES,
    find_engine,
    format_name,
    legality,
    matching_rule,
    serving_environment,
)
from mofq.engines.rules import readable
from mofq.exceptions import EngineError
from mofq.model.layers import FusionGroup, LinearLayer
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


#: Columns: vllm-cpu, -ampere, -ada, -hopper, -blackwell.
VLLM_TABLE = """
bf16                                          y y y y y
int8.channel+int8.token                       y y y y y
int8.channel.s-f32+int8.token                 y y y y y
int8.channel@fullrange+int8.token             y y y y y
int8.tensor+int8.token                        y y y y y
int8.channel+int8.tensor                      y y y y y
int8.channel.asym+int8.token                  n n n n n
int8.g128+int8.token                          n n n n n
int8.g64+int8.g64                             n n n n n
int8.channel                                  n y y y y
int8.g64                                      n y y y y
int8.g96                                      n n n n n
int8.g64.asym                                 n n n n n
int4.channel                                  y y y y y
int4.g32@mse                                  y y y y y
int4.g32@fullrange~gptq                       y y y y y
int4.g128                                     y y y y y
int4.g256                                     y n n n n
int4.g128.s-f32                               n n n n n
int4.g128.asym                                y y y n y
int4.g32.asym                                 y y y y y
int4.g128+int8.token                          n n n n n
int4.g128+fp8_e4m3.token                      n n n n n
int3.g128                                     n n n n n
fp8_e4m3.channel+fp8_e4m3.token               y n y y y
fp8_e4m3.tensor+fp8_e4m3.token                n n y y y
fp8_e4m3.tensor+fp8_e4m3.tensor               n n y y y
fp8_e4m3.block128.s-f32+fp8_e4m3.g128         n n n y y
fp8_e4m3.channel+fp8_e4m3.g128                n n n n n
fp8_e4m3.g128+fp8_e4m3.token                  n n n n n
fp8_e4m3.channel                              n y y y y
fp8_e4m3.channel.s-f32                        n n n n n
fp8_e4m3.block128                             n y y y y
fp8_e4m3.unscaled+fp8_e4m3.unscaled           n n n n n
fp8_e5m2.channel+fp8_e5m2.token               n n n n n
nvfp4                                         n y y y y
nvfp4+nvfp4                                   n n n n y
mxfp4                                         n y y y n
mxfp4+mxfp4                                   n n n n y
mxfp8                                         n y y y n
mxfp8+mxfp8                                   n n n n y
mxfp6_e2m3                                    n n n n n
fp4_e2m1.g32                                  n n n n n
fp4_e2m1.channel                              n n n n n
nf4.g64                                       n n n n n
"""
VLLM = ("vllm-cpu", "vllm-ampere", "vllm-ada", "vllm-hopper", "vllm-blackwell")
CASES = [
    (engine, line.split()[0], answer == "y")
    for line in VLLM_TABLE.strip().splitlines()
    for engine, answer in zip(VLLM, line.split()[1:], strict=True)
]


@pytest.mark.parametrize(("engine", "scheme", "served"), CASES)
def test_vllm_serves_what_its_sources_say(engine: str, scheme: str, served: bool) -> None:
    reason = legality(engine)(parse_scheme(scheme), gate_up())
    assert (reason is None) == served, reason


@pytest.mark.parametrize(
    ("engine", "scheme", "served"),
    [
        ("sglang-hopper", "int8.channel+int8.token", True),
        ("sglang-blackwell", "int8.channel+int8.token", False),
        ("sglang-ampere", "fp8_e4m3.channel+fp8_e4m3.token", False),
        ("sglang-ada", "fp8_e4m3.channel+fp8_e4m3.token", True),
        ("sglang-hopper", "int4.g128", True),
        ("sglang-hopper", "mxfp4", False),
        ("sglang-blackwell", "nvfp4+nvfp4", True),
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
        ("torchao-blackwell", "nvfp4+nvfp4", True),
    ],
)
def test_other_engines_serve_what_their_sources_say(engine: str, scheme: str, served: bool) -> None:
    reason = legality(engine)(parse_scheme(scheme), gate_up())
    assert (reason is None) == served, reason


@pytest.mark.parametrize(
    ("engine", "scheme", "served"),
    [
        ("vllm-cpu", "int8.channel+int8.token", False),
        ("vllm-hopper", "int8.channel+int8.token", True),
        ("vllm-blackwell", "int8.channel+int8.token", True),
        ("vllm-hopper", "int8.tensor+int8.token", False),
        ("vllm-hopper", "int4.g128", True),
        ("vllm-hopper", "int4.g128.asym", False),
        ("vllm-hopper", "fp8_e4m3.channel", False),
        ("vllm-hopper", "fp8_e4m3.block128.s-f32+fp8_e4m3.g128", True),
        ("sglang-hopper", "int8.channel+int8.token", False),
        ("transformers", "int4.g128", False),
    ],
)
def test_experts_have_rules_of_their_own(engine: str, scheme: str, served: bool) -> None:
    reason = legality(engine)(parse_scheme(scheme), experts())
    assert (reason is None) == served, reason


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
    assert held == [
        (readable(rule), "✗" if rule.refused else "✓")
        for rule in (*engine.applicable_rules, *engine.applicable_caches)
    ]


def test_every_refusal_suggests_schemes_that_exist() -> None:
    named = re.compile(r"\b(?:int\d|fp8_e4m3)\.[\w.+-]*[\w]|\bnvfp4\b|\bmxfp[48](?:\+mxfp[48])?\b")
    for engine in ENGINES.values():
        for rule in engine.rules:
            for word in named.findall(rule.refused.replace("gN", "g64")):
                parse_scheme(word)


def test_every_served_rule_matches_a_scheme_of_the_table() -> None:
    names = [line.split()[0] for line in VLLM_TABLE.strip().splitlines()]
    for engine in (ENGINES[name] for name in VLLM):
        hit = {
            rule.schemes
            for name in names
            for group in (gate_up(), experts())
            if (rule := matching_rule(engine, parse_scheme(name), group)) is not None
        }
        missed = [r.schemes for r in engine.applicable_rules if r.kernel and r.schemes not in hit]
        assert missed == [], engine.name


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
