"""Asks vLLM which scheme and kernel it selects. Runs where vLLM's own sources can be imported.

    python ask_vllm.py REQUEST RESULT

Nothing of mofq is imported, and nothing of CUDA: vLLM's CUDA platform answers with a capability
that the request names, and the few questions that go to compiled code are answered by
``COMPILED``. Everything else is vLLM's: ``CompressedTensorsConfig`` parses the config, a layer is
built by the class that its models build, and where Humming is selected, the code that a loaded
layer runs decides what is done to its inputs. Where devices share a layer, the share of each is
built and a checkpoint's tensors are loaded into it.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib.abc
import importlib.machinery
import inspect
import json
import os
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shares import check_shares

#: Compiled functions that selection asks, and the capabilities from which they say yes.
#: Source: vllm csrc/quantization/w8a8/cutlass/scaled_mm_entry.cu and
#: csrc/quantization/fp4/nvfp4_scaled_mm_entry.cu, for CUDA 12.8 and above; read.
COMPILED = {
    "cutlass_scaled_mm_supports_fp8": 89,
    "cutlass_scaled_mm_supports_block_fp8": 90,
    "cutlass_group_gemm_supported": 90,
    "cutlass_scaled_mm_supports_fp4": 100,
    "mxfp4_experts_quant_supported": 100,
}
#: Operators of the CPU wheel for x86-64 that selection looks for.
CPU_OPERATORS = ("fp8_scaled_mm_cpu", "create_onednn_mm_handler")
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
#: Modules that ask for the device when they are imported, and what they keep of the answer.
KEPT = {
    "vllm.model_executor.layers.quantization.utils.w8a8_utils": (
        "CUTLASS_BLOCK_FP8_SUPPORTED",
        "cutlass_block_fp8_supported",
    ),
}
#: Modules that ask then for what selection does not use: norms, quantizing while loading, and
#: which kernels FlashAttention compiles before the first request.
OTHERS = {
    "vllm.kernels.oink_ops",
    "vllm.model_executor.layers.quantization.online.fp8",
    "vllm.v1.attention.backends.flash_attn",
}


class StopLoading(Exception):
    """What was asked is known; what follows would pack weights on a GPU."""


class Device:
    """The device that vLLM believes to run on, and which modules asked for it at import."""

    capability: tuple[int, int] | None = None
    amx = False
    asked_by: set[str] = set()  # noqa: RUF012

    @classmethod
    def ask(cls) -> None:
        """Note the module whose import asks."""
        frame = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_name == "<module>" and frame.f_globals["__name__"] != __name__:
                cls.asked_by.add(frame.f_globals["__name__"])
                return
            frame = frame.f_back  # type: ignore[assignment]


class Compiled(types.ModuleType):
    """Stands for a compiled module: every function is there, and does nothing."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        return lambda *_, **__: None


class CompiledFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules that the wheel has as shared objects."""

    def __init__(self, names: Sequence[str]) -> None:
        # A module ``_C`` beside ``_C_extension`` is a facade that loads it by its path.
        self.names = {*names, *(name.removesuffix("_extension") for name in names)}

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        """A compiled module of the wheel, or what Python imports from within one."""
        if name in self.names or name.rpartition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """Its substitute."""
        return Compiled(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run."""


def fake_cpu() -> None:
    """Make vLLM believe that it runs on an x86-64 CPU."""
    import torch
    from vllm import platforms
    from vllm.platforms.cpu import CpuPlatform

    for name in CPU_OPERATORS:
        _LIBRARIES.define(f"{name}(int nothing) -> bool")

    def has_amx_tiles() -> bool:
        Device.ask()
        return Device.amx

    torch.cpu._is_amx_tile_supported = has_amx_tiles
    platforms._current_platform = CpuPlatform()


def fake_cuda() -> None:
    """Make vLLM believe that it runs on an NVIDIA GPU."""
    import torch
    from vllm import platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    def number() -> int:
        assert Device.capability is not None
        return 10 * Device.capability[0] + Device.capability[1]

    for name, least in COMPILED.items():
        _LIBRARIES.define(f"{name}(int capability) -> bool")
        function = lambda _, least=least: number() >= least  # noqa: E731
        _LIBRARIES.impl(name, function, "CompositeImplicitAutograd")

    class FakedCudaPlatform(NonNvmlCudaPlatform):  # type: ignore[misc]
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            Device.ask()
            return DeviceCapability(*Device.capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "faked"

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 128

        @classmethod
        def device_count(cls) -> int:
            return 1

    platforms._current_platform = FakedCudaPlatform()
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=128)
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = lambda _: -1
    try:
        from humming.device import DeviceInfo
    except ImportError:
        return

    def value(_: Any) -> Any:
        assert Device.capability is not None
        major, minor = Device.capability
        return types.SimpleNamespace(
            sm_version=number(), sm_major=major, sm_minor=minor, is_ppu=False
        )

    DeviceInfo._get_value = value


def start_groups() -> None:
    """The process groups, which layers ask for their share; only layers are shared by devices."""
    import torch
    from vllm.distributed import parallel_state

    alone = types.SimpleNamespace(
        world_size=1,
        rank_in_group=0,
        rank=0,
        local_rank=0,
        device=torch.device("cpu"),
        cpu_group=None,
        device_group=None,
    )
    for name in ("_EP", "_DP", "_PP", "_PCP", "_DCP", "_WORLD", "_EPLB"):
        if hasattr(parallel_state, name):
            setattr(parallel_state, name, alone)
    parallel_state._TP = copy.copy(alone)


def share_layers(devices: int, rank: int) -> None:
    """Be one of several devices that share every layer."""
    from vllm.distributed import parallel_state

    parallel_state._TP.world_size = devices
    parallel_state._TP.rank_in_group = rank


def build_layer(case: dict[str, Any], device: str, rank: int = 0) -> Any:
    """The layer of a case, as a model of vLLM builds it on one device.

    Args:
        case: ``config``, ``kind``, ``in_features``, ``out_features`` (of each layer that is
            concatenated), ``devices`` (that share it), ``prefix``.
        device: ``meta`` for shapes alone.
        rank: Which of the devices.

    Returns:
        The module that holds the weights.
    """
    import torch
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    get_current_vllm_config().compilation_config.static_forward_context.clear()
    share_layers(case["devices"], rank)
    config = CompressedTensorsConfig.from_config(copy.deepcopy(case["config"]))
    config.packed_modules_mapping = PACKED
    size, outputs, kind = case["in_features"], case["out_features"], case["kind"]
    options = {
        "params_dtype": served_dtype(),
        "quant_config": config,
        "prefix": case["prefix"],
    }
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
        from vllm.model_executor.layers.fused_moe.layer import FusedMoEFactory

        names = {"ckpt_names": ("w1", "w2", "w3")} if kind == "mixtral" else {}
        runner = FusedMoEFactory(
            num_experts=2,
            top_k=1,
            hidden_size=size,
            intermediate_size=outputs[0],
            **names,
            **options,
        )
    return next(m for m in runner.modules() if type(m).__name__ == "RoutedExperts")


def selected_kernel(method: Any) -> str:
    """The class of the kernel that a quantization method chose."""
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEExperts

    names = []
    for value in vars(method).values():
        of_linear = type(value).__module__.startswith("vllm.model_executor.kernels.linear")
        if of_linear and "Kernel" in type(value).__name__:
            names.append(type(value).__name__)
        elif inspect.isclass(value) and issubclass(value, FusedMoEExperts):
            names.append(value.__name__)
    return " and ".join(names)


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """What vLLM makes of one case: scheme, kernel, and what Humming does to inputs."""
    if case["kind"] == "attention":
        return attention_answer(case)
    layer = build_layer(case, "meta")
    method = getattr(layer, "scheme", None) or layer.quant_method
    kernel = selected_kernel(method)
    found = {"scheme": type(method).__name__, "kernel": kernel, "scales": scale_dtype(layer)}
    if "Humming" in kernel:
        found["inputs"] = humming_inputs(build_layer(case, "cpu"))
    check_shares(case, build_layer, share_layers)
    return found


def attention_answer(case: dict[str, Any]) -> dict[str, Any]:
    """What vLLM makes of an attention with a format of the KV cache, on the last device.

    Args:
        case: ``config``, ``heads``, ``kv_heads``, ``head_size``, ``devices`` (that share it),
            ``cache_dtype`` (the server's flag), ``scales`` (name -> numbers, as stored),
            ``prefix``.

    Raises:
        ValueError: A scale is another one after loading than in the checkpoint.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )
    from vllm.model_executor.model_loader.weight_utils import default_weight_loader

    class NoBuffers(TorchFunctionMode):
        """Makes a backend's buffers on a GPU shapes alone."""

        def __torch_function__(self, function: Any, _: Any, args: Any, kwargs: Any = None) -> Any:
            options = dict(kwargs or {})
            if str(options.get("device")).startswith("cuda"):
                options["device"] = "meta"
            return function(*args, **options)

    devices, kv_heads = case["devices"], case["kv_heads"]
    settings = get_current_vllm_config()
    settings.compilation_config.static_forward_context.clear()
    settings.cache_config.cache_dtype = case["cache_dtype"]
    config = CompressedTensorsConfig.from_config(copy.deepcopy(case["config"]))
    config.total_num_heads, config.total_num_kv_heads = case["heads"], kv_heads
    share_layers(devices, devices - 1)
    with NoBuffers():
        layer = Attention(
            case["heads"] // devices,
            case["head_size"],
            case["head_size"] ** -0.5,
            max(1, kv_heads // devices),
            cache_config=settings.cache_config,
            quant_config=config,
            prefix=case["prefix"],
        )
    for name, numbers in case["scales"].items():
        parameter, stored = getattr(layer, name), torch.tensor(numbers)
        loader = getattr(parameter, "weight_loader", default_weight_loader)
        loader(parameter, stored)
    layer.quant_method.process_weights_after_loading(layer)
    for name, numbers in case["scales"].items():
        stored = torch.tensor(numbers).flatten()
        expected = stored[-layer.num_kv_heads :] if len(stored) > 1 else stored
        loaded = getattr(layer, f"_{name}").flatten()
        if not torch.equal(loaded, expected):
            raise ValueError(f"{name} is {loaded.tolist()}, stored as {expected.tolist()}")
    return {
        "backend": layer.attn_backend.get_name(),
        "cache": layer.kv_cache_dtype,
        "queries": "kept" if layer.query_quant is None else "quantized",
    }


def scale_dtype(layer: Any) -> str:
    """The dtype that the scales of weights are loaded in."""
    for name, parameter in layer.named_parameters():
        if name in ("weight_scale", "w13_weight_scale"):
            return str(parameter.dtype).removeprefix("torch.")
    return ""


def humming_inputs(layer: Any) -> str:
    """The element type that Humming gives to the inputs of a layer; ``none`` where it is left.

    Loading stops where that is decided. Weights are not converted, which needs a GPU.
    """
    import torch
    from humming.schema import BaseWeightSchema
    from vllm.model_executor.layers.quantization.utils.humming import schema

    for parameter in layer.parameters():
        is_number = parameter.is_floating_point() and parameter.dtype.itemsize > 1
        parameter.data = torch.ones_like(parameter) if is_number else torch.zeros_like(parameter)
    decide = schema.check_and_fallback_input_schema
    users = [
        module
        for name, module in sys.modules.items()
        if name.startswith("vllm.") and vars(module).get(decide.__name__) is decide
    ]
    found: list[Any] = []

    def record(*arguments: Any, **options: Any) -> Any:
        found.append(decide(*arguments, **options))
        raise StopLoading

    def keep_tensors(weight_schema: Any, tensors: Any, param_dtype: Any, **_: Any) -> Any:
        return weight_schema.to_humming_schema(param_dtype), tensors

    convert = BaseWeightSchema.convert_humming
    BaseWeightSchema.convert_humming = keep_tensors
    for module in users:
        setattr(module, decide.__name__, record)
    try:
        (getattr(layer, "scheme", None) or layer.quant_method).process_weights_after_loading(layer)
    except StopLoading:
        pass
    finally:
        BaseWeightSchema.convert_humming = convert
        for module in users:
            setattr(module, decide.__name__, decide)
    element = found[0].a_dtype
    return "none" if element is None or element.num_bits == 16 else str(element)


def served_dtype() -> Any:
    """The dtype of the model: GPUs before 8.0 have no bfloat16."""
    import torch

    before = Device.capability is not None and Device.capability < (8, 0)
    return torch.float16 if before else torch.bfloat16


def answers(cases: list[dict[str, Any]], backend: str) -> Iterator[dict[str, Any]]:
    """One answer for each case, in order."""
    from vllm.config import CompilationConfig, KernelConfig, VllmConfig, set_current_vllm_config

    kernels = KernelConfig(linear_backend=backend) if backend else KernelConfig()
    config = VllmConfig(kernel_config=kernels, compilation_config=CompilationConfig())
    model = types.SimpleNamespace(model_type="llama")
    config.model_config = types.SimpleNamespace(
        dtype=served_dtype(),
        quantization_config=None,
        enforce_eager=False,
        hf_config=model,
        hf_text_config=model,
        is_mm_prefix_lm=False,
        rswa_window=None,
        is_diffusion=False,
    )
    for case in cases:
        with set_current_vllm_config(config):
            try:
                yield answer(case)
            except Exception as error:  # whatever stops the engine is the answer
                last = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{Path(last.filename).name}, {last.line}"
                text = " ".join(str(error).split()) or place
                yield {"error": f"{type(error).__name__}: {text}"}


def become(platform: dict[str, Any]) -> None:
    """Be on another device than that of the first imports."""
    os.environ.update(platform["environment"])
    Device.capability = platform["capability"] and tuple(platform["capability"])
    Device.amx = platform["amx"]
    for value in gc.get_objects():
        is_cache = isinstance(value, functools._lru_cache_wrapper)
        if is_cache and str(value.__module__).startswith(("vllm.", "humming.")):
            value.cache_clear()
    for name, (constant, function) in KEPT.items():
        if (module := sys.modules.get(name)) is not None:
            new = getattr(module, function)()
            for other_name, other in list(sys.modules.items()):
                if other_name.startswith("vllm.") and constant in vars(other):
                    setattr(other, constant, new)


def main() -> None:
    """Answer the request: import everything once, then one child process for each platform."""
    import torch

    global _LIBRARIES
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    _LIBRARIES = torch.library.Library("_C", "FRAGMENT")
    sys.meta_path.insert(0, CompiledFinder(request["compiled"]))
    first = request["platforms"][0]
    Device.capability = first["capability"] and tuple(first["capability"])
    fake_cuda() if first["capability"] else fake_cpu()
    start_groups()
    torch.set_default_dtype(served_dtype())
    list(answers(request["cases"], ""))
    if unknown := Device.asked_by - set(KEPT) - OTHERS:
        sys.exit(f"these modules ask for the device when imported; add them to KEPT: {unknown}")
    for number, platform in enumerate(request["platforms"]):
        child = os.fork()
        if child == 0:
            become(platform)
            torch.set_default_dtype(served_dtype())
            found = list(
                answers(
                    [request["cases"][index] for index in platform["cases"]],
                    platform["linear_backend"],
                )
            )
            Path(f"{sys.argv[2]}.{number}").write_text(json.dumps(found), encoding="utf-8")
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"vLLM could not be asked for {platform}")


if __name__ == "__main__":
    main()
