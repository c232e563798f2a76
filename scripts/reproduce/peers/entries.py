"""What the table compares: each entry is a peer's method with settings in the peer's own words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: The environment of mofq itself.
MOFQ = "mofq"
#: Columns of the table, in true bits of weights; W and A: of weights and inputs.
COLUMNS = ("3.5", "4.25", "4.5", "5", "6", "8", "W8A8", "W4A8", "W4A4")


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One row of the table."""

    name: str  #: of files and on the command line
    peer: str  #: its environment: requirements/PEER.txt, run by with_PEER.py
    column: str  #: of COLUMNS
    title: str  #: for people
    settings: Mapping[str, Any]


def _int(bits: int, group_size: int) -> dict[str, Any]:
    """Symmetric integers in groups, in the words of llm-compressor."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"ignore": ["lm_head"], "config_groups": groups}


def _auto_round(name: str, column: str, title: str, **settings: object) -> Entry:
    return Entry(f"auto-round-{name}", "auto-round", column, f"AutoRound, {title}", settings)


def _llm_compressor(name: str, column: str, title: str, **settings: object) -> Entry:
    title = f"llm-compressor, {title}"
    return Entry(f"llm-compressor-{name}", "llm-compressor", column, title, settings)


def _modelopt(name: str, column: str, title: str, **settings: object) -> Entry:
    return Entry(f"modelopt-{name}", "modelopt", column, f"ModelOpt, {title}", settings)


def _torchao(name: str, column: str, title: str, config: str, **arguments: object) -> Entry:
    settings = {"config": config, "arguments": arguments}
    if config == "Int8DynamicActivationInt8WeightConfig":
        settings["inputs"] = "int8.token"  # what that configuration does by default
    return Entry(f"torchao-{name}", "torchao", column, f"TorchAO, {title}", settings)


def _nncf(name: str, column: str, title: str, **settings: object) -> Entry:
    settings |= {"ratio": 1.0, "all_layers": False}
    return Entry(f"nncf-{name}", "nncf", column, f"NNCF, {title}", settings)


def _mofq(column: str, *words: str, name: str = "") -> Entry:
    title = f"mofq, `run {' '.join(words)}`"
    return Entry(f"mofq-{name or column.lower()}", MOFQ, column, title, {"words": words})


_W4G32: Mapping[str, object] = {"scheme": "W4A16", "group_size": 32}
_W4G64: Mapping[str, object] = {"scheme": "W4A16", "group_size": 64}
_MIXED = ["W4A16G32", "W8A16G32"]
#: AutoScheme counts zero points, which these symmetric codes do not have: true bits of 5 and 6.
_AVERAGE_5, _AVERAGE_6 = 5.14, 6.17
_AWQ_OR_INT8 = [{"config": "INT4_AWQ_CFG", "block_size": 32}, {"config": "INT8_WEIGHT_ONLY_CFG"}]
_DECODER: dict[str, object] = {
    "cost_model": "weight",
    "cost": {"excluded_module_name_patterns": ["*lm_head*"]},
}
_INTX = "IntxWeightOnlyConfig"
_ENGINE = ("--engine", "vllm-hopper", "--max-bits")

ENTRIES = (
    _mofq("3.5", *_ENGINE, "3.5", "--space", "serving_low_bits"),
    _mofq("4.25", *_ENGINE, "4.25"),
    _mofq("4.25", *_ENGINE, "4.25", "--sequences", "64", name="4.25-64"),
    _mofq("4.5", *_ENGINE, "4.5"),
    _mofq("5", *_ENGINE, "5"),
    _mofq("6", *_ENGINE, "6"),
    _mofq("8", *_ENGINE, "8.25"),
    _mofq("W8A8", *_ENGINE, "8.25", "--space", "w8a8"),
    _mofq("W4A8", "--max-bits", "4.5", "--space", "w4a8"),
    # NVFP4 has a scale for each layer beside 4.5 bits.
    _mofq("W4A4", "--engine", "vllm-blackwell", "--max-bits", "4.51", "--space", "w4a4"),
    _torchao("int4-g32", "4.5", "INT4 g32", _INTX, weight_dtype="int4", granularity=32),
    _torchao("int4-g64", "4.25", "INT4 g64", _INTX, weight_dtype="int4", granularity=64),
    _torchao(
        "hqq-int4-g32",
        "4.5",
        "HQQ (scales only) INT4 g32",
        _INTX,
        weight_dtype="int4",
        granularity=32,
        intx_choose_qparams_algorithm="hqq_scale_only",
    ),
    _torchao("int8", "8", "INT8 per channel", "Int8WeightOnlyConfig"),
    _torchao("w8a8", "W8A8", "INT8 per channel", "Int8DynamicActivationInt8WeightConfig"),
    _auto_round("rtn-int4-g32", "4.5", "RTN INT4 g32", **_W4G32, iters=0, disable_opt_rtn=True),
    _auto_round("opt-rtn-int4-g32", "4.5", "`iters=0` INT4 g32", **_W4G32, iters=0),
    _auto_round("opt-rtn-int4-g64", "4.25", "`iters=0` INT4 g64", **_W4G64, iters=0),
    _nncf("int4-g32", "4.5", "INT4 g32", mode="INT4_SYM", group_size=32),
    _nncf(
        "scale-estimation-int4-g32",
        "4.5",
        "scale estimation, INT4 g32",
        mode="INT4_SYM",
        group_size=32,
        scale_estimation=True,
    ),
    _nncf(
        "awq-int4-g32",
        "4.5",
        "AWQ and scale estimation, INT4 g32",
        mode="INT4_SYM",
        group_size=32,
        scale_estimation=True,
        awq=True,
    ),
    _modelopt("awq-int4-g32", "4.5", "AWQ INT4 g32", config="INT4_AWQ_CFG", block_size=32),
    _modelopt(
        "auto-quantize-5",
        "5",
        "AutoQuantize of AWQ INT4 g32 and INT8",
        auto_quantize={"constraints": _DECODER | {"effective_bits": 4.5}, "formats": _AWQ_OR_INT8},
    ),
    _auto_round(
        "auto-scheme-5",
        "5",
        "AutoScheme of INT4 and INT8 g32, `iters=0`",
        auto_scheme={"avg_bits": _AVERAGE_5, "options": _MIXED},
        iters=0,
    ),
    _auto_round(
        "auto-scheme-6",
        "6",
        "AutoScheme of INT4 and INT8 g32, `iters=0`",
        auto_scheme={"avg_bits": _AVERAGE_6, "options": _MIXED},
        iters=0,
    ),
    _llm_compressor(
        "smoothquant-w8a8",
        "W8A8",
        "SmoothQuant and GPTQ",
        SmoothQuantModifier={"smoothing_strength": 0.8},
        GPTQModifier={"ignore": ["lm_head"], "targets": ["Linear"], "scheme": "W8A8"},
    ),
    _llm_compressor("gptq-int4-g32", "4.5", "GPTQ INT4 g32", GPTQModifier=_int(4, 32)),
    _llm_compressor("gptq-int4-g64", "4.25", "GPTQ INT4 g64", GPTQModifier=_int(4, 64)),
    _llm_compressor("gptq-int3-g32", "3.5", "GPTQ INT3 g32", GPTQModifier=_int(3, 32)),
    _llm_compressor(
        "awq-int4-g32",
        "4.5",
        "AWQ INT4 g32",
        AWQModifier={},
        QuantizationModifier=_int(4, 32),
    ),
    _llm_compressor(
        "awq-int4-g64",
        "4.25",
        "AWQ INT4 g64",
        AWQModifier={},
        QuantizationModifier=_int(4, 64),
    ),
    _llm_compressor(
        "nvfp4",
        "W4A4",
        "NVFP4 by GPTQ",
        GPTQModifier={"ignore": ["lm_head"], "targets": ["Linear"], "scheme": "NVFP4"},
    ),
    _auto_round("int4-g32", "4.5", "200 iterations, INT4 g32", **_W4G32, iters=200),
    _auto_round("int4-g64", "4.25", "200 iterations, INT4 g64", **_W4G64, iters=200),
    _auto_round(
        "int3-g32", "3.5", "200 iterations, INT3 g32", scheme="W3A16", group_size=32, iters=200
    ),
    _auto_round(
        "auto-scheme-5-tuned",
        "5",
        "AutoScheme of INT4 and INT8 g32, 200 iterations",
        auto_scheme={"avg_bits": _AVERAGE_5, "options": _MIXED},
        iters=200,
    ),
    _auto_round(
        "auto-scheme-6-tuned",
        "6",
        "AutoScheme of INT4 and INT8 g32, 200 iterations",
        auto_scheme={"avg_bits": _AVERAGE_6, "options": _MIXED},
        iters=200,
    ),
)
