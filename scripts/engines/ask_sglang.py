"""Asks SGLang which scheme it selects. Runs where SGLang's own sources can be imported.

    python ask_sglang.py REQUEST RESULT

As `ask_vllm.py`, but SGLang has one kernel for a scheme, so nothing is chosen after it. For linear
layers the scheme also creates its parameters, where it checks shapes, and is asked whether loading
quantizes INT8 codes again. The experts' scheme is chosen and creates nothing. Where devices share a
layer, the share of each is built, of experts too, and a checkpoint's tensors are loaded into it.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import importlib.abc
import importlib.machinery
import json
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from shares import check_shares

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
#: Packages that SGLang imports and selection does not need; compiled, or not in the venv.
ABSENT = {
    "IPython",
    "deep_gemm",
    "flashinfer",
    "gguf",
    "llguidance",
    "modelscope",
    "orjson",
    "petit_kernel",
    "sgl_kernel",
    "torchaudio",
    "torchvision",
    "xgrammar",
    "zmq",
}


class QuantizedAgain(Exception):
    """Codes of weights are turned into numbers and quantized to FP8 while they are loaded."""


class AnyClass(type):
    """A class whose every attribute is such a class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return any_class(name)


def any_class(name: str) -> AnyClass:
    """A class that can be made, called and indexed with anything, and does nothing."""
    members = {
        "__init__": lambda *_, **__: None,
        "__call__": lambda *_, **__: None,
        "__class_getitem__": classmethod(lambda cls, _: cls),
        "__get_pydantic_core_schema__": classmethod(lambda cls, *_: {"type": "any"}),
    }
    return AnyClass(name, (), members)


class AbsentModule(types.ModuleType):
    """A module that has every name."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return any_class(name)


class AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages that are not there."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        """A package of ``ABSENT``, or what is in one."""
        absent = name.partition(".")[0] in ABSENT
        return importlib.machinery.ModuleSpec(name, self) if absent else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Its substitute."""
        return AbsentModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


class Device:
    """The GPU that SGLang believes to run on."""

    capability = (0, 0)


def fake_cuda() -> None:
    """Make torch say that it has a GPU of ``Device.capability``."""
    import torch

    torch.version.cuda = "13.0"
    torch.cuda.is_available = lambda: True
    torch.cuda.is_initialized = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_name = lambda *_: "faked"
    torch.cuda.get_device_capability = lambda *_: Device.capability
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(
        major=Device.capability[0],
        minor=Device.capability[1],
        multi_processor_count=128,
        name="faked",
        total_memory=80 << 30,
    )


def start_context() -> None:
    """The server's arguments, and the parallel context of one process; neither has a launcher."""
    import torch
    from sglang.srt import runtime_context

    runtime_context.get_context().override_server_args().install()
    alone = types.SimpleNamespace(
        world_size=1,
        rank_in_group=0,
        rank=0,
        local_rank=0,
        is_first_rank=True,
        is_last_rank=True,
        device=torch.device("cpu"),
        cpu_group=None,
        device_group=None,
    )
    parallel = runtime_context.get_parallel()
    for name in sorted(runtime_context._parallel_fields()):
        try:
            getattr(parallel, name)
        except (AttributeError, RuntimeError):  # not set without a launcher
            value = alone if name.endswith("group") else int(name.endswith("size"))
            parallel.override_permanently(**{name: value})


def share_layers(devices: int, rank: int) -> None:
    """Be one of several devices that share every layer."""
    from sglang.srt import runtime_context

    group = types.SimpleNamespace(world_size=devices, rank_in_group=rank)
    runtime_context.get_parallel().override_permanently(
        **{f"{kind}_size": devices for kind in ("tp", "moe_tp", "attn_tp")},
        **{f"{kind}_rank": rank for kind in ("tp", "moe_tp", "attn_tp")},
        **{f"{kind}_group": group for kind in ("tp", "moe_tp", "attn_tp")},
    )


def build_layer(case: dict[str, Any], device: str, rank: int = 0) -> Any:
    """The layer of a case, as a model of SGLang builds it on one device.

    Args:
        case: As `ask_vllm.build_layer` has it.
        device: ``meta`` for shapes alone.
        rank: Which of the devices.

    Returns:
        The module that holds the weights.
    """
    import torch
    from sglang.srt.layers import linear
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    share_layers(case["devices"], rank)
    config = CompressedTensorsConfig.from_config(
        {**copy.deepcopy(case["config"]), "packed_modules_mapping": PACKED}
    )
    size, outputs, kind = case["in_features"], case["out_features"], case["kind"]
    options = {"params_dtype": torch.bfloat16, "quant_config": config, "prefix": case["prefix"]}
    with torch.device(device):
        if kind == "gate_up":
            return linear.MergedColumnParallelLinear(size, outputs, bias=False, **options)
        if kind == "down":
            return linear.RowParallelLinear(size, outputs[0], bias=False, **options)
        if kind == "qkv":
            heads = [rows // case["head_size"] for rows in outputs]
            return linear.QKVParallelLinear(
                size, case["head_size"], heads[0], heads[1], bias=False, **options
            )
        from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class

        return get_moe_impl_class(config)(
            num_experts=2,
            top_k=1,
            hidden_size=size,
            intermediate_size=outputs[0],
            layer_id=0,
            **options,
        )


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """What SGLang makes of one case."""
    found = selected(case)
    if case["is_shared"]:
        check_shares(case, build_layer, share_layers)
    return found


def selected(case: dict[str, Any]) -> dict[str, Any]:
    """The scheme that is chosen on one device, and what it does to codes and scales."""
    import torch
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    config = CompressedTensorsConfig.from_config(copy.deepcopy(case["config"]))
    layer = torch.nn.Module()
    layer.tp_group = None  # not shared by devices
    if case["kind"] in ("experts", "mixtral"):
        scheme = config.get_moe_scheme(layer, case["prefix"])
        if scheme is None:
            raise ValueError("no target is found, and weights are taken as unquantized")
        return {"scheme": type(scheme).__name__, "kernel": type(scheme).__name__, "scales": ""}
    scheme = config.get_linear_scheme(layer, case["prefix"])
    config._check_scheme_supported(scheme.get_min_capability())
    scheme.create_weights(
        layer=layer,
        input_size=case["in_features"],
        output_size=sum(case["out_features"]),
        input_size_per_partition=case["in_features"],
        output_partition_sizes=case["out_features"],
        params_dtype=torch.bfloat16,
        weight_loader=lambda *_: None,
    )
    scale = getattr(layer, "weight_scale", None)
    found = {"scheme": type(scheme).__name__, "kernel": type(scheme).__name__}
    found["scales"] = "" if scale is None else str(scale.dtype).removeprefix("torch.")
    if getattr(layer, "weight", None) is not None and layer.weight.dtype is torch.int8:
        found["weights"] = "quantized again as FP8" if is_quantized_again(scheme, layer) else ""
    return found


def is_quantized_again(scheme: Any, layer: Any) -> bool:
    """Whether loading the layer calls for FP8 codes of its weight."""
    utils = importlib.import_module("sglang.srt.layers.quantization.utils")
    real = utils.scaled_fp8_quant

    def record(*_: Any, **__: Any) -> None:
        raise QuantizedAgain

    for parameter in layer.parameters():
        parameter.data.zero_()
    utils.scaled_fp8_quant = record
    try:
        scheme.process_weights_after_loading(layer)
    except QuantizedAgain:
        return True
    finally:
        utils.scaled_fp8_quant = real
    return False


def main() -> None:
    """Answer the request."""
    import torch
    import transformers  # noqa: F401  # looks for torchvision, so before it seems to be there

    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    sys.meta_path.insert(0, AbsentFinder())
    Device.capability = tuple(request["platforms"][0]["capability"])
    fake_cuda()
    importlib.import_module("sglang.srt.layers.quantization.compressed_tensors.compressed_tensors")
    start_context()
    for number, platform in enumerate(request["platforms"]):
        Device.capability = tuple(platform["capability"])
        for value in gc.get_objects():
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()  # of any module: a cached partial does not know its own
        found = []
        for index in platform["cases"]:
            try:
                with torch.device("cpu"):
                    found.append(answer(request["cases"][index]))
            except Exception as error:  # whatever stops the engine is the answer
                last = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(last.filename).name}, {last.line}"
                text = " ".join(" ".join(map(str, error.args)).split()) or place
                found.append({"error": f"{type(error).__name__}: {text}"})
        Path(f"{sys.argv[2]}.{number}").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
