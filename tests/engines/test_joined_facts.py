"""What mofq joins, against what vLLM's model classes join: ``mofq/engines/facts/joined``.

The facts were read in vLLM's sources by `scripts.engines.joined`, which is tested here too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from families import long_but
from tiny_types import CAUSAL_TYPES, write_type

import mofq.engines
from mofq.engines import legality
from mofq.engines.vllm_gpu import PLAIN_HEADS
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import FUSION_RULES, FusionGroup, LinearLayer, ModelLayers, find_layers
from mofq.model.layers.joining import JOINED, JOINED_IN, JOINED_OF_TYPE
from mofq.model.layers.names_in_memory import known_types
from mofq.numbers.schemes import parse_scheme
from scripts.engines import joined

FACTS = sorted((Path(mofq.engines.__file__).parent / "facts" / "joined").glob("*.json"))
NEWEST = FACTS[-1]
#: The types that can be built and are not refused.
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "families.md"
PASSING = set(
    re.findall(
        r"^\| \**`([\w.-]+)`\** \| [^|]* \| passes \|", PAGE.read_text("utf-8"), re.MULTILINE
    )
)

#: What classes join that is no fusion group of a type of transformers.
NO_GROUPS = {
    # of towers, and of decoders that read what an encoder made
    ("fc1", "fc3"),
    ("k_proj", "v_proj"),
    ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("attn.q", "attn.k", "attn.v"),
    ("wq", "wk", "wv"),
    ("wk", "wv"),
    # that stay as they are: convolutions, indexers, mixtures of residual streams
    ("q_conv1d", "k_conv1d", "v_conv1d"),
    ("wk", "weights_proj"),
    ("input_mix_weight_down", "block_inject_weight"),
    ("input_mix_weight_down", "block_inject_weight", "_input_mix_padding"),
    # with an indexer, so that a rule refuses the rest
    ("q_proj", "k_proj", "v_proj", "indexer.index_qk_proj"),
    ("q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj"),
    # in words that vLLM gives to layers of other names
    ("q_proj", "k_proj", "v_proj", "output_gate_proj"),
    # of types that are refused
    ("wq_du", "wk_dv", "wv_dv", "wr_du"),
}
#: Classes that join nothing: they have what is joined in one matrix, as checkpoints do.
JOINED_ON_DISK = {
    "BloomForCausalLM",
    "DbrxForCausalLM",
    "FalconMambaForCausalLM",
    "GPT2LMHeadModel",
    "HrmTextForCausalLM",
    "Mamba2ForCausalLM",
    "MambaForCausalLM",
}
#: Built without the quantization, and no fusion group: routers, indexers, convolutions, mixtures of
#: residual streams, heads (a rule of their own), towers, and what no model of transformers has.
NO_GROUP_BUILT = re.compile(
    r"(?i).*\.(gate|router|classifier|shared_expert_gate|lm_head|\w*conv1d|hc_\w+|input_mix_\w+)"
    r"|.*Router\.proj|.*\.(wk_weights_proj|weights_proj|\w+_res_proj|routed_expert_\w+)"
    r"|.*(vision|vit|visual|audio|siglip|clip|projector|tower|MLP2|adapter).*"
)
#: Types that are refused.
REFUSED = {"inkling_text", "muse_spark"}
#: In the fast tests: types whose joins are their own.
SHORT = ("beam", "deepseek_v4", "kimi_linear", "qwen4_exp_text")


@cache
def _rows(path: Path) -> Mapping[str, Mapping[str, Any]]:
    return {row["architecture"]: row for row in json.loads(path.read_text("utf-8"))["rows"]}


def _known(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Types that mofq knows and the engine serves, and the engine's row."""
    for name, known in known_types().items():
        if known.kind in _rows(path):
            yield name, _rows(path)[known.kind]


def _ways(row: Mapping[str, Any]) -> set[tuple[str, ...]]:
    return {tuple(way) for ways in row["joined"].values() for way in ways if len(way) > 1}


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.stem)
def test_what_an_engine_joins_in_a_type_that_is_known_is_joined(path: Path) -> None:
    rows = dict(_known(path))
    assert len(rows) > 140
    general = {names for names, _ in (*JOINED, *JOINED_IN.values())}
    missing = {
        (name, way)
        for name, row in rows.items()
        for way in _ways(row) - general - {names for names, _ in JOINED_OF_TYPE.get(name, ())}
        if way not in NO_GROUPS
    }
    assert missing == set()


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.stem)
def test_nothing_is_joined_for_one_type_alone_that_its_class_does_not_join(path: Path) -> None:
    rows = dict(_known(path))
    ours = {(name, way) for name, rules in JOINED_OF_TYPE.items() for way, _ in rules}
    theirs = {(name, way) for name, row in rows.items() for way in _ways(row)}
    assert {one for one in ours if one[0] in rows} <= theirs
    assert JOINED_OF_TYPE.keys() <= dict(_known(NEWEST)).keys()


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.stem)
def test_a_class_of_a_known_type_without_joins_has_none_to_say(path: Path) -> None:
    found_out_later = f"{joined._MODELS}.transformers"
    without = {
        row["architecture"]
        for _, row in _known(path)
        if not row["joined"] and "inner" not in row and row["module"] != found_out_later
    }
    assert without <= JOINED_ON_DISK


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.stem)
def test_lm_heads_that_classes_build_without_the_quantization_are_refused(path: Path) -> None:
    plain = {
        name
        for name, row in _known(path)
        if any(built.endswith(".lm_head") for built in row.get("plain", ()))
    }
    assert plain >= {"bloom", "deepseek_v4", "opt", "qwen4_exp"}
    assert plain <= {*PLAIN_HEADS.model_types}


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.stem)
def test_layers_that_classes_build_without_the_quantization_have_a_rule(path: Path) -> None:
    plain = {
        (name, built)
        for name, row in _known(path)
        for built in row.get("plain", ())
        if name not in REFUSED and not NO_GROUP_BUILT.fullmatch(built)
    }
    assert plain == {
        ("deepseek_v4", "DeepseekCompressor.fused_wkv_wgate"),
        ("glm5_next", "Glm5NextDecoderLayer.self_attn"),
        ("glm5_next", "Glm5NextLinearAttention"),
    }


SERVED = sorted(
    name
    for name, _ in _known(NEWEST)
    if name in PASSING and name in CAUSAL_TYPES and name not in FUSION_RULES
)


@pytest.mark.parametrize("name", long_but(SERVED, *SHORT))
def test_layers_that_a_class_joins_are_one_choice_or_refused(tmp_path: Path, name: str) -> None:
    layers = _layers(tmp_path, name)
    groups = {layer.name: group for group in layers.groups for layer in group.layers}
    left = {layer.name for layer in layers.unquantized}
    left |= {tensor.removesuffix(".weight") for tensor in layers.left_out}
    row = dict(_known(NEWEST))[name]
    for place in {layer.rpartition(".")[0] for layer in groups}:
        for way in _ways(row):
            parts = [f"{place}.{part}" for part in way]
            if not {*parts} <= groups.keys() | left:
                continue
            chosen = {groups[part].name: groups[part] for part in parts if part in groups}
            if len(chosen) > 1 or not groups.keys() >= {*parts}:
                _assert_refused(chosen.values(), name, because=parts)


@pytest.mark.parametrize(
    ("name", "refused", "served"),
    [
        ("deepseek_v4", {"attn.compressor.wkv_wgate"}, {"attn.latent", "attn.q", "attn.wo_b"}),
        ("glm5_next", {"attn.latent", "attn.qkvbfg", "attn.o"}, {"mlp.down", "mlp.gate_up"}),
        ("minimax_m3_vl", {"attn.qkv"}, {"attn.o", "mlp.down"}),
        ("qwen4_exp", {"attn.qkv"}, {"attn.o", "linear_attn.in_proj_qkvz"}),
    ],
)
def test_layers_that_a_class_reads_as_they_are_are_refused(
    tmp_path: Path, name: str, refused: set[str], served: set[str]
) -> None:
    by_kind: dict[str, FusionGroup] = {}
    for group in _layers(tmp_path, name).groups:
        by_kind.setdefault(group.name.split(".", 2)[2], group)
    _assert_refused([by_kind[kind] for kind in refused], name)
    legal = legality("vllm-hopper", name)
    assert [kind for kind in served if legal(parse_scheme("int8.channel"), by_kind[kind])] == []
    other = legality("vllm-hopper", "llama")
    assert [kind for kind in refused if other(parse_scheme("int8.channel"), by_kind[kind])] == []


@pytest.mark.parametrize(
    ("scheme", "is_served"),
    [
        ("int4.g128", False),
        ("int8.channel", False),
        ("nvfp4", False),
        ("int8.channel+int8.token", True),
        ("fp8_e4m3.channel+fp8_e4m3.token", True),
    ],
)
def test_packed_codes_of_kimi_linear_are_of_its_experts_alone(scheme: str, is_served: bool) -> None:
    layer = LinearLayer("model.layers.0.mlp.down_proj", "t", 256, 256, "BF16", "down_proj", "")
    dense = FusionGroup("layers.0.mlp.down", (layer,))
    refusal = legality("vllm-hopper", "kimi_linear")(parse_scheme(scheme), dense)
    assert (refusal is None) == is_served
    assert is_served or "packed codes" in str(refusal)
    assert legality("vllm-hopper", "llama")(parse_scheme(scheme), dense) is None


def _layers(folder: Path, name: str) -> ModelLayers:
    return find_layers(open_checkpoint(str(write_type(name, folder / name))))


def _assert_refused(groups: Any, model_type: str, because: object = None) -> None:
    for engine in ("vllm-ampere", "vllm-hopper", "vllm-cpu"):
        legal = legality(engine, model_type)
        for group in groups:
            for scheme in ("int8.channel", "int4.g32", "int8.channel+int8.token"):
                assert legal(parse_scheme(scheme), group), (engine, group.name, scheme, because)


def _write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return folder


REGISTRY = "model_executor/models/registry.py"


def test_joins_are_read_from_package_and_bases_in_every_way_that_a_class_says_them(
    tmp_path: Path,
) -> None:
    wheel = _write(
        tmp_path,
        {
            REGISTRY: '_TEXT_GENERATION_MODELS = {"AForCausalLM": ("vllm.models.a", "A"),'
            ' "OldForCausalLM": ("old", "Old")}\n'
            '_MULTIMODAL_MODELS = {"AForImages": ("old", "Images")}\n'
            "_TRANSFORMERS_SUPPORTED_MODELS = {}\n",
            "models/a/__init__.py": "if cuda:\n    from .nvidia.model import A\n"
            "else:\n    from .cpu import B as A\n",
            "models/a/nvidia/model.py": "from vllm.model_executor.models.old import Old\n"
            "from ..common import MAPPER, Attention\n"
            "class A(Old):\n"
            "    mapper = MAPPER\n"
            "    def __init__(self):\n"
            '        self.attn = Attention(prefix=f"{prefix}.attn")\n'
            '        self.packed_modules_mapping["latent"] = ["q_a", "kv_a"]\n',
            "models/a/cpu.py": "class B:\n"
            '    packed_modules_mapping = {"ba": ["b", "a"]} | {"own": ["own"]}\n',
            "models/a/common.py": "MAPPER = WeightsMapper(\n"
            '    orig_to_new_stacked={".mlp.gate": (".mlp.gate_up", 0),'
            ' ".mlp.up": (".mlp.gate_up", 1)},\n'
            '    orig_to_new_substr={".attn.gate_proj": ".attn.out_gate"})\n'
            "class Attention:\n"
            "    def __init__(self):\n"
            '        self.plain = ReplicatedLinear(1, quant_config=None, prefix=f"{p}.plain")\n'
            "        config.quant_config = None\n"
            '        self.kept = ReplicatedLinear(1, quant_config=q, prefix=f"{p}.kept")\n'
            "    def load_weights(self):\n"
            '        stacked_params_mapping = [("attn.qkv", "attn.q", 0),'
            ' ("attn.qkv", "attn.k", shard)]\n'
            "        if gated:\n"
            '            stacked_params_mapping.append(("attn.qkv", "attn.out_gate", 2))\n',
            "model_executor/models/old.py": "class Old:\n"
            "    packed_modules_mapping = NAMES\n"
            "class Images:\n"
            "    def __init__(self):\n"
            '        self.text = init_vllm_registered_model(architectures=["AForCausalLM"])\n'
            'NAMES = {"PACKED_MODULES_MAPPING": []}\n',
        },
    )
    classes = dict(joined._registered(wheel))
    expected = {
        "ba": [["b", "a"]],
        "gate_up": [["gate", "up"]],
        "latent": [["q_a", "kv_a"]],
        "own": [["own"]],
        "qkv": [["q", "k"], ["q", "k", "gate_proj"], ["q", "k", "out_gate"]],
    }
    row = joined._row(wheel, classes, "AForCausalLM")
    assert row["joined"] == expected
    assert row["plain"] == ["Attention", "Attention.plain"]
    assert row["module"] == "vllm.models.a"
    images = joined._row(wheel, classes, "AForImages")
    assert (images["joined"], images["inner"]) == (expected, ["AForCausalLM"])
    with pytest.raises(SystemExit, match=r"OldForCausalLM .*packed_modules_mapping was not under"):
        joined._row(wheel, classes, "OldForCausalLM")


def test_a_class_that_is_not_found_stops_the_reading(tmp_path: Path) -> None:
    wheel = _write(tmp_path, {REGISTRY: "", "models/b/__init__.py": "from .model import Other\n"})
    with pytest.raises(SystemExit, match="its class was not understood"):
        joined._row(wheel, {"B": ("vllm.models.b", "B")}, "B")
