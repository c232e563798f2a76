"""The rules of engines against what the engines' own code selects: ``mofq/engines/facts``.

The facts were made by executing the engines (`scripts/engines/README.md`); nothing in them is
transcribed: ``selection`` for one device, ``tensor_parallel`` for several that share a layer,
``kv_cache`` for attention. A rule that serves a scheme must meet a kernel that quantizes
activations if, and only if, the scheme does. A rule that refuses one must refuse what the engine
would not serve as measured, or rest on something that selection does not show (``NOT_SHOWN``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import mofq.engines
from mofq.engines import (
    ENGINES,
    Engine,
    cache_legality,
    find_engine,
    legality,
    matching_rule,
)
from mofq.evidence.spaces import shape_rejection
from mofq.model.kv_schemes import is_cache_scheme
from mofq.model.layers import CacheLayer
from mofq.numbers.schemes import Scheme, parse_scheme
from scripts.engines.schemes import CPUS, MATRICES, AskedLayer, fusion_group
from scripts.engines.selection import (
    COMPANIONS,
    ON_CPU,
    case_of,
    group_rows,
    outcome,
    storage_to_ask,
)
from scripts.engines.shares import require_whole

FOLDER = Path(mofq.engines.__file__).parent / "facts"
#: Of layers: what is selected, and what devices can share.
FACTS = [
    path
    for matrix in ("selection", "tensor_parallel")
    for path in sorted((FOLDER / matrix).glob("*.json"))
]
CACHE_FACTS = sorted((FOLDER / "kv_cache").glob("*.json"))
LARGEST_BYTES = 100_000

#: Names of layers in `MATRICES`, as regular expressions.
DENSE, EXPERTS = r"(?!experts|mixtral).*", r"(experts|mixtral).*"

#: Makers of kernels, as their class names and our rules have them.
FAMILIES = (
    "CPU",
    "Cutlass",
    "FlashInfer",
    "Humming",
    "Machete",
    "Marlin",
    "Torch",
    "Triton",
    "TrtLlm",
)

Facts = dict[tuple[str, str, str], dict[str, Any]]


class Case(NamedTuple):
    """Where a rule and an engine meet."""

    facts: str  #: engine and version
    engine: str  #: key of ENGINES
    scheme: str
    layer: str


class Excuse(NamedTuple):
    """Refusals that are known: a regular expression for each word of a case."""

    facts: str
    engine: str
    scheme: str
    layer: str
    why: str
    refusal: str  #: found in the reason that our rule gives

    def covers(self, case: Case, reason: str) -> bool:
        """Whether every word of the case matches in full, and the reason is that one."""
        return bool(re.search(self.refusal, reason)) and all(map(re.fullmatch, self[:4], case))


def name_of(facts: Path) -> str:
    """Of a test's parameter."""
    return f"{facts.parent.name}-{facts.stem}"


def read_facts(path: Path) -> tuple[str, Facts]:
    """Engine and version, and the answer for each scheme, layer and device."""
    facts = json.loads(path.read_text("utf-8"))
    answers = {
        (scheme, layer, device): {
            key: value for key, value in row.items() if key not in ("schemes", "layers", "devices")
        }
        for row in facts["rows"]
        for scheme in row["schemes"]
        for layer in row["layers"]
        for device in row["devices"]
    }
    return f"{facts['engine']} {facts['version']}", answers


def devices_of(engine: Engine, settings: tuple[str, ...]) -> list[str]:
    """The devices of the facts that an engine stands for, under the settings of a rule."""
    chips = list(CPUS) if engine.capability is None else ["{}.{}".format(*engine.capability)]
    return [" ".join([chip, *settings]) for chip in chips]


def is_as_measured(scheme: Scheme, answer: Mapping[str, Any]) -> bool:
    """Whether the selected kernel computes what the scheme's name says."""
    wanted = "kept" if scheme.activation is None else "quantized"
    is_changed = "scales" in answer or "weights" in answer
    return answer.get("activations") == wanted and not is_changed


def engines_of(facts: Path) -> dict[str, str]:
    """The engines that facts are of: key of ENGINES -> the same with the version of the facts."""
    family, number = facts.stem.rsplit("-", 1)
    return {name: f"{name}@{number}" for name in ENGINES if name.startswith(family)}


def sharing(engine: str, layer: AskedLayer) -> Engine:
    """An engine on the devices that share a layer."""
    return find_engine(engine if layer.devices == 1 else f"{engine}:tp={layer.devices}")


def compare(facts: Path) -> Iterator[tuple[Case, str, list[dict[str, Any]]]]:
    """For each rule that a scheme and a layer meet: the case, our reason or "", and the answers."""
    version, answers = read_facts(facts)
    matrix = MATRICES[facts.parent.name]
    for name_of_engine, versioned in engines_of(facts).items():
        for name in matrix.schemes:
            for layer, asked in matrix.layers.items():
                engine = sharing(versioned, asked)
                scheme, group = parse_scheme(name), fusion_group(layer)
                if any(shape_rejection(scheme, one) for one in group.layers):
                    continue  # refused for every engine
                rule = matching_rule(engine, scheme, group)
                keys = [(name, layer, d) for d in devices_of(engine, rule.settings if rule else ())]
                found = [answers[key] for key in keys if key in answers]
                reason = legality(engine.name)(scheme, group) or ""
                yield Case(version, name_of_engine, name, layer), reason, found


def contradictions(facts: Path) -> Iterator[tuple[Case, str, str]]:
    """Where rules and engine disagree about what is served: case, our reason or "", both sides."""
    for case, reason, found in compare(facts):
        scheme = parse_scheme(case.scheme)
        if reason:
            wrong = found[:1] if found and all(is_as_measured(scheme, a) for a in found) else []
        else:
            wrong = [answer for answer in found if not is_as_measured(scheme, answer)]
        if wrong:
            ours = f"refused ({reason})" if reason else "served"
            yield case, reason, f"{' '.join(case)}: by our rule {ours}; the engine: {wrong[0]}"


#: Refused for what selection does not show; each rule names where that was read or run.
NOT_SHOWN = (
    Excuse(
        r"vllm .*",
        r"vllm-hopper",
        r"int[48]\..*\.asym",
        DENSE,
        "Machete's own arithmetic with zero points",
        refusal="Machete rounds scale times zero point",
    ),
    Excuse(
        r"vllm .*",
        r"vllm-(ampere|ada|hopper|blackwell)",
        r"int[48]\.g96",
        DENSE,
        "tiles of 64 or 128 inputs, which Humming and Triton give the scales of whole groups",
        refusal="scale of a neighbour",
    ),
    Excuse(
        r"vllm .*",
        r"vllm-(ampere|ada|hopper|blackwell)",
        r"fp8_e4m3\.channel\.s-f32",
        DENSE,
        "Humming's own conversion of the scales, after its choice of input types",
        refusal="Humming rounds weight scales",
    ),
    Excuse(
        r"vllm .*",
        r"vllm-hopper",
        r"int4\.g128\+fp8_e4m3\.token",
        r".*",
        "Cutlass's scales, made when it packs the weights",
        refusal="rounds the group scales to FP8",
    ),
    Excuse(
        r"vllm .*",
        r"vllm-(ada|hopper|blackwell)",
        r"fp8_e4m3\.channel\+fp8_e4m3\.g128",
        DENSE,
        "activations are quantized, per token",
        refusal="activations per token, not per group",
    ),
    Excuse(
        r"(vllm|sglang) .*",
        r"vllm-cpu|sglang-(ada|hopper|blackwell)",
        r"fp8_e4m3\.channel\+fp8_e4m3\.g128",
        DENSE,
        "activations are quantized, per token",
        refusal="has no kernel",
    ),
    Excuse(
        r"vllm .*",
        r"vllm-cpu",
        r"fp8_e4m3\.tensor\+fp8_e4m3\.t.*",
        DENSE,
        "the product stops at the first forward",
        refusal="stop in the kernel",
    ),
    Excuse(
        r"vllm .*",
        r"vllm-cpu",
        r"mxfp4|mxfp8\+mxfp8",
        EXPERTS,
        "the choice for experts does not ask for the platform: Marlin and Triton need a GPU",
        refusal="experts on CPU need AMX tiles",
    ),
    Excuse(
        r"vllm .*",
        r"vllm-cpu",
        r"fp8_e4m3\.channel\+fp8_e4m3\.token",
        DENSE,
        "a layer of few or odd outputs meets another kernel than the usual ones",
        refusal="with AMX tiles activations stay in bfloat16",
    ),
    Excuse(
        r"vllm 0\.32\.0",
        r"vllm-cpu",
        r"fp8_e4m3\.channel\+fp8_e4m3\.token",
        DENSE,
        "torch._scaled_mm stops at the first forward",
        refusal=r"needs (in|out)_features % 16 == 0",
    ),
    Excuse(
        r"vllm .*",
        r"vllm-(ampere|ada|hopper|blackwell)",
        r"int4\.g16",
        r".*",
        "the rule is for every width of codes: 16 of 4 bits fill whole words already",
        refusal=r"Humming\)? needs in_features % 32",
    ),
    Excuse(
        r"vllm .*",
        r"vllm-(ampere|ada|hopper|blackwell)",
        r"int[68]\.g64\.asym",
        DENSE,
        "the rule is for every width of codes: 16 zero points of 6 bits fill whole words already",
        refusal="Humming needs out_features % 32",
    ),
    Excuse(
        r"vllm .*",
        r"vllm-(ampere|ada|hopper|blackwell)",
        r"int3\.g32\.asym|mxfp8\+mxfp8",
        r"qkv .* tp=8",
        "keys of fewer heads than devices are repeated, and by the rules taken to be cut",
        refusal="fill no whole 32-bit words|at least 128 outputs",
    ),
    Excuse(
        r"vllm .*",
        r"vllm-blackwell",
        r"mxfp8",
        r"gate_up 96x512 .*",
        "layers of less than 128 outputs are served weight-only",
        refusal="from 10.0 activations are quantized",
    ),
    Excuse(
        r"sglang .*",
        r"sglang-blackwell",
        r"int8\.channel(\.s-f32)?\+int8\..*",
        DENSE,
        "the compiled product",
        refusal="int8_scaled_mm stops at compute capability 9.0",
    ),
    Excuse(
        r"sglang .*",
        r"sglang-.*",
        r"int[48]\..*|nvfp4",
        r".*",
        "SGLang chooses no kernel: Marlin checks shapes when it packs the weights",
        refusal=r"Marlin needs (in|out)_features",
    ),
    Excuse(
        r"sglang .*",
        r"sglang-(ampere|ada|hopper)",
        r"int8\.channel\+int8\.token",
        DENSE,
        "the compiled product checks its shapes",
        refusal=r"int8_scaled_mm needs (in|out)_features % 16",
    ),
    Excuse(
        r"sglang .*",
        r"sglang-.*",
        r"int[48]\..*",
        r".*",
        "SGLang chooses no kernel: Marlin checks sizes of groups when it packs the weights",
        refusal="has no kernel",
    ),
    Excuse(
        r"sglang .*",
        r"sglang-.*",
        r"int4\.g128\.s-f32",
        EXPERTS,
        "the experts' scheme is chosen and creates no scales here",
        refusal="rounds f32 scales",
    ),
    Excuse(
        r"sglang .*",
        r"sglang-ampere",
        r"fp8_e4m3\..*",
        EXPERTS,
        "the experts' scheme is chosen without asking for the device",
        refusal="below compute capability 8.9",
    ),
    Excuse(
        r"sglang .*",
        r"sglang-.*",
        r"fp8_e4m3\.channel\.s-f32",
        DENSE,
        "Marlin rounds the scales when it packs the weights",
        refusal="has no kernel",
    ),
)


@pytest.mark.parametrize("path", FACTS, ids=name_of)
def test_no_rule_contradicts_what_the_engine_selects(path: Path) -> None:
    wrong = [
        text
        for case, reason, text in contradictions(path)
        if not any(excuse.covers(case, reason) for excuse in NOT_SHOWN)
    ]
    assert wrong == [], "\n".join(wrong)


def names_of_kernels(facts: Path) -> Iterator[tuple[Case, str, str]]:
    """Where a served rule names another kernel: case, the rule's words, the engine's class."""
    for case, reason, found in compare(facts):
        scheme = parse_scheme(case.scheme)
        asked = MATRICES[facts.parent.name].layers[case.layer]
        engine = sharing(engines_of(facts)[case.engine], asked)
        rule = matching_rule(engine, scheme, fusion_group(case.layer))
        if reason or rule is None:
            continue
        for answer in (one for one in found if is_as_measured(scheme, one)):
            kernel = answer["kernel"]
            named = any(word in kernel and word in rule.kernel for word in FAMILIES)
            if not named and answer["scheme_class"] != kernel:
                yield case, rule.kernel, kernel


@pytest.mark.parametrize("path", FACTS, ids=name_of)
def test_a_rule_names_the_kernel_that_the_engine_selects(path: Path) -> None:
    wrong = [
        f"{' '.join(case)}: our rule names {ours!r}; the engine selects {kernel}"
        for case, ours, kernel in names_of_kernels(path)
    ]
    assert wrong == [], "\n".join(wrong)


@pytest.mark.parametrize("path", sorted((FOLDER / "selection").glob("*.json")), ids=name_of)
def test_every_served_rule_was_met_by_an_answer_of_the_engine(path: Path) -> None:
    engines = {name: find_engine(versioned) for name, versioned in engines_of(path).items()}
    met = {
        matching_rule(engines[case.engine], parse_scheme(case.scheme), fusion_group(case.layer))
        for case, reason, found in compare(path)
        if found and not reason
    }
    served = {rule for engine in engines.values() for rule in engine.applicable_rules}
    # Embeddings are not asked for: what is served of them was read.
    assert [
        r.schemes for r in served if r.kernel and r.layers != "embeddings" and r not in met
    ] == []


def test_every_excuse_is_still_needed() -> None:
    cases = [(case, reason) for path in FACTS for case, reason, _ in contradictions(path)]
    unneeded = [excuse for excuse in NOT_SHOWN if not any(excuse.covers(*case) for case in cases)]
    assert unneeded == []


#: Formats of the cache that selection takes, and what is known of the kernels -> words of the
#: refusal. The kernel for CPUs rounds otherwise and reads one scale, and 0.32 selects it without
#: asking whether it knows the format; vLLM doubts FP8 on Ampere.
CACHES_NOT_SHOWN = {
    ("vllm-cpu", r"kv:fp8_e4m3\.(tensor|unscaled)"): "cuts codes off towards zero",
    ("vllm-cpu", r"kv:fp8_e4m3\.head"): "one scale for all heads",
    ("vllm-cpu", r"kv:(int8|fp8_e4m3)\.token_head"): "are for the Triton backend",
    ("vllm-ampere", r"kv:fp8_e4m3\.(tensor|unscaled)"): "E5M2 the only FP8 cache",
}


def cache_answers(facts: Path) -> Iterator[tuple[str, str, CacheLayer, str | None, dict[str, Any]]]:
    """Engine, format, shape of the cache, our reason or None, and the answer."""
    _, answers = read_facts(facts)
    for name, versioned in engines_of(facts).items():
        for layer, asked in MATRICES["kv_cache"].layers.items():
            cache = CacheLayer("cache", "attn", asked.kv_heads, asked.head_size, 0)
            engine = sharing(versioned, asked)
            for scheme in MATRICES["kv_cache"].schemes:
                reason = cache_legality(engine.name)(scheme, cache)
                for device in devices_of(engine, ()):
                    yield name, scheme, cache, reason, answers[scheme, layer, device]


def test_a_format_of_the_cache_is_held_if_and_only_if_a_backend_takes_it() -> None:
    unexplained, excuses = [], set()
    for path in CACHE_FACTS:
        for engine, scheme, cache, reason, answer in cache_answers(path):
            if (reason is None) == ("error" not in answer):
                continue
            found = [
                key
                for key, words in CACHES_NOT_SHOWN.items()
                if engine == key[0] and re.fullmatch(key[1], scheme) and words in str(reason)
            ]
            excuses.update(found)
            if not found:
                unexplained.append(f"{engine} {scheme} {cache.head_size}: {reason}; {answer}")
    assert unexplained == []
    assert excuses == CACHES_NOT_SHOWN.keys()


@pytest.mark.parametrize("path", CACHE_FACTS, ids=name_of)
def test_a_rule_of_the_cache_says_whether_queries_are_rounded(path: Path) -> None:
    for name, scheme, cache, reason, answer in cache_answers(path):
        if reason is None:
            engine = find_engine(name)
            rule = next(r for r in engine.applicable_caches if re.fullmatch(r.schemes, scheme))
            said = "queries are rounded" in rule.note
            by_size = rule.note.startswith("FlashInfer for heads of 64") and cache.head_size != 96
            assert (answer["queries"] == "quantized") == (said and not by_size), (name, scheme)
            element = scheme.removeprefix("kv:").partition(".")[0].partition("_")[0]
            assert answer["cache"].startswith(element)


@pytest.mark.parametrize("path", [*FACTS, *CACHE_FACTS], ids=name_of)
def test_the_facts_answer_for_every_scheme_layer_and_device(path: Path) -> None:
    version, answers = read_facts(path)
    matrix = MATRICES[path.parent.name]
    gpus = {"{}.{}".format(*capability) for capability in matrix.gpus}
    on_cpu = version.partition(" ")[0] in ON_CPU
    devices = gpus | set(CPUS) if on_cpu else gpus
    asked = [
        name
        for name in matrix.schemes
        if is_cache_scheme(name) or storage_to_ask(parse_scheme(name)) is not None
    ]
    missing = [
        (scheme, layer, device)
        for scheme in asked
        for layer in matrix.layers
        for device in devices
        if (scheme, layer, device) not in answers
    ]
    assert missing == []


@pytest.mark.parametrize("path", FACTS, ids=name_of)
def test_every_selected_kernel_is_known(path: Path) -> None:
    _, answers = read_facts(path)
    unknown = {a["kernel"] for a in answers.values() if a.get("activations") == "unknown kernel"}
    assert unknown == set()


@pytest.mark.parametrize("path", [*FACTS, *CACHE_FACTS], ids=name_of)
def test_facts_are_small_and_name_what_they_were_made_from(path: Path) -> None:
    facts = json.loads(path.read_text("utf-8"))
    assert path.stem == f"{facts['engine']}-{facts['version']}"
    assert len(facts["with"]) == len(COMPANIONS[facts["engine"]])
    assert path.stat().st_size < LARGEST_BYTES


def test_rows_hold_every_answer_once() -> None:
    answers = {
        ("int4.g32", "4096x4096", "8.0"): {"kernel": "A"},
        ("int4.g32", "4096x4096", "9.0"): {"kernel": "A"},
        ("int4.g32", "576x576", "8.0"): {"kernel": "A"},
        ("int4.g32", "576x576", "9.0"): {"kernel": "B"},
        ("int4.g64", "4096x4096", "8.0"): {"kernel": "A"},
        ("int4.g64", "4096x4096", "9.0"): {"kernel": "A"},
    }
    rows = group_rows(answers)
    assert rows == [
        {
            "schemes": ["int4.g32", "int4.g64"],
            "layers": ["4096x4096"],
            "devices": ["8.0", "9.0"],
            "kernel": "A",
        },
        {"schemes": ["int4.g32"], "layers": ["576x576"], "devices": ["8.0"], "kernel": "A"},
        {"schemes": ["int4.g32"], "layers": ["576x576"], "devices": ["9.0"], "kernel": "B"},
    ]


@pytest.mark.parametrize(
    ("scheme", "kernel", "inputs", "activations"),
    [
        ("mxfp4", "HummingMxFp4LinearKernel", "float8e4m3", "to float8e4m3"),
        ("int5.g32", "HummingLinearKernel", "none", "kept"),
        ("int4.g128+fp8_e4m3.token", "HummingIndexedExperts", "float8e4m3", "quantized"),
        ("int4.g128+int8.token", "MarlinLinearKernel", None, "kept"),
        ("int8.channel+int8.token", "CutlassInt8ScaledMMLinearKernel", None, "quantized"),
        ("fp8_e4m3.channel+fp8_e4m3.token", "CPUFp8ChannelWiseScaledMMLinearKernel", None, "kept"),
        ("int4.g32", "KernelOfNextYear", None, "unknown kernel"),
    ],
)
def test_a_kernel_and_its_inputs_tell_what_is_done_to_activations(
    scheme: str, kernel: str, inputs: str | None, activations: str
) -> None:
    answer = {"scheme": "Scheme", "kernel": kernel, "inputs": inputs, "scales": ""}
    assert outcome(scheme, answer)["activations"] == activations


def test_a_case_has_what_an_export_writes_of_the_layer() -> None:
    packed = case_of("int8.channel", "down 64x48 tp=8")
    assert packed["config"]["config_groups"]["group_0"]["format"] == "pack-quantized"
    tensors = {"weight_packed": [64, 12], "weight_scale": [64, 1]}
    assert packed["stored"] == [{"shard": None, "tensors": tensors}]
    heads = case_of("kv:fp8_e4m3.head", "128")
    assert heads["scales"] == {"k_scale": [[[1.0]], [[0.5]]], "v_scale": [[[0.25]], [[0.125]]]}
    assert case_of("kv:int8.token_head", "128")["cache_dtype"] == "int8_per_token_head"


def test_a_part_that_no_device_loads_is_missed() -> None:
    quarter, half = Fraction(1, 4), Fraction(1, 2)
    require_whole("weight", [(half, Fraction(1)), (Fraction(0), half)])
    for parts in ([(Fraction(0), half)], [(Fraction(0), quarter), (half, Fraction(1))], []):
        with pytest.raises(ValueError, match="the rest by no device"):
            require_whole("weight", parts)


def test_packed_int8_is_not_cut_inside_a_word_and_int8_beside_int8_inputs_is() -> None:
    for path in (FOLDER / "tensor_parallel").glob("*.json"):
        _, answers = read_facts(path)
        assert "error" in answers["int8.channel", "down 64x48 tp=8", "9.0"]
        assert "error" not in answers["int8.channel+int8.token", "down 64x48 tp=8", "9.0"]


def test_float32_scales_that_are_loaded_in_the_models_dtype_are_said_to_be_rounded() -> None:
    answer = {"scheme": "Scheme", "kernel": "MarlinLinearKernel", "scales": "bfloat16"}
    assert outcome("int4.g128.s-f32", answer)["scales"] == "rounded to bfloat16"
    assert "scales" not in outcome("int4.g128", answer)


def test_errors_keep_no_paths_and_are_cut() -> None:
    error = "AssertionError: /home/user/.cache/vllm/linear.py, assert a == b " + "x" * 200
    kept = outcome("int4.g128", {"error": error})["error"]
    assert kept.startswith("AssertionError: linear.py, assert a == b xxx")
    assert len(kept) <= 161
