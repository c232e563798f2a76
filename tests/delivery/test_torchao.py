"""TorchAO's kernels in a model in memory, on the CPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyCheckpoint
from emulated import logits_of, recipe_of
from exported import uniform_recipe
from rounding import apart
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mofq.delivery.apply import emulate, torchao
from mofq.delivery.apply.loaded_model import replace_module
from mofq.delivery.apply.torchao import TorchaoLinear
from mofq.delivery.apply.torchao.apply import device_engine, kernel_refusal
from mofq.delivery.apply.torchao.linear import _PRODUCTS, integer_product
from mofq.delivery.apply.torchao.weights import MAKERS
from mofq.delivery.backends import apply_recipe
from mofq.delivery.validation import find_deviations
from mofq.engines import ENGINES
from mofq.exceptions import BackendError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.loading import load_model
from mofq.numbers.quantize import FakeQuantLinear, fake_quantize_activation
from mofq.numbers.schemes import parse_scheme

UP = "model.layers.1.mlp.up_proj"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

#: Scheme -> TorchAO's class and, where it is not a plain product, the operator that must run.
KERNELS = {
    "int8.channel+int8.token": ("Int8Tensor", "aten._int_mm"),
    "int8.channel.s-f32@fullrange+int8.token": ("Int8Tensor", "aten._int_mm"),
    "int8.tensor+int8.token": ("Int8Tensor", "aten._int_mm"),
    "int8.channel+int8.tensor": ("Int8Tensor", "aten._int_mm"),
    "int8.channel@mse": ("Int8Tensor", ""),
    "int8.g32": ("Int8Tensor", ""),
    "int8.g64.asym": ("IntxUnpackedToInt8Tensor", ""),
    "int4.g32@fullrange": ("Int4OpaqueTensor", "aten._weight_int4pack_mm_for_cpu"),
    "int4.g128@mse": ("Int4OpaqueTensor", "aten._weight_int4pack_mm_for_cpu"),
    "int4.g64.asym": ("IntxUnpackedToInt8Tensor", ""),
    "int4.channel": ("IntxUnpackedToInt8Tensor", ""),
    "int3.block32x64.s-f32": ("IntxUnpackedToInt8Tensor", ""),
    "fp8_e4m3.channel+fp8_e4m3.token": ("Float8Tensor", "aten._scaled_mm"),
    "fp8_e4m3.channel@mse": ("Float8Tensor", ""),
    "fp8_e4m3.block64": ("Float8Tensor", ""),
    "nvfp4": ("NVFP4Tensor", ""),
    "mxfp8+mxfp8": ("MXTensor", ""),
    "mxfp4+mxfp4": ("MXTensor", ""),
}


class RecordOperators(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scheme", KERNELS)
def test_a_kernel_of_torchao_computes_what_was_measured(tiny_llama: Path, scheme: str) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = uniform_recipe(checkpoint, scheme)
    emulated = apply_recipe(load_model(tiny_llama), recipe, checkpoint=checkpoint)
    applied = apply_recipe(load_model(tiny_llama), recipe, "torchao", checkpoint=checkpoint)
    kind, operator = KERNELS[scheme]
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0))
    modules = {n: m for n, m in applied.named_modules() if isinstance(m, TorchaoLinear)}
    assert modules.keys() == {name for name, one in recipe.schemes.items() if one == scheme}
    for name, module in modules.items():
        if module.in_features != 128:
            continue
        assert type(module.weight.data).__name__ == kind
        with RecordOperators() as ran:
            y = module(x)
        assert not operator or operator in ran.names
        expected = emulated.get_submodule(name)(x)
        atol = apart(module.in_features) * float(expected.abs().max())
        torch.testing.assert_close(y, expected, rtol=0, atol=atol)
    assert find_deviations(applied, recipe, checkpoint=checkpoint) == ()  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["int4.g32", "fp8_e4m3.channel+fp8_e4m3.token", "nvfp4"])
@pytest.mark.parametrize("family", ["qwen2", "gpt2", "opt", "gemma3"])
def test_a_model_with_kernels_is_the_emulated_one(
    tiny: TinyCheckpoint, family: str, scheme: str
) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    recipe = recipe_of(checkpoint, scheme, layers_1_attn_o="bf16")
    expected = logits_of(emulate.apply(load_model(checkpoint.folder), recipe))
    model = torchao.apply(load_model(checkpoint.folder), recipe)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4)
    assert find_deviations(model, recipe, checkpoint=checkpoint) == ()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", KERNELS)
def test_a_model_in_bfloat16_holds_the_same_codes_and_scales(
    tiny_llama: Path, scheme: str, device: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = uniform_recipe(checkpoint, scheme)
    engine = device_engine(torch.device(device))
    for group in find_layers(checkpoint).groups:
        if kernel_refusal(parse_scheme(scheme), group, engine=engine, dtype=torch.bfloat16):
            assert device == "cuda"
            return  # this GPU has no kernel for it
    model = load_model(tiny_llama, dtype="bfloat16", device=device)
    torchao.apply(model, recipe, checkpoint=checkpoint)
    emulated = load_model(tiny_llama, dtype="bfloat16", device=device)
    emulate.apply(emulated, recipe, checkpoint=checkpoint)
    x = torch.randn(20, 128, generator=torch.Generator().manual_seed(2)).to(device, torch.bfloat16)
    found, expected = (each.get_submodule(UP)(x) for each in (model, emulated))
    assert found.dtype is torch.bfloat16
    assert (found - expected).norm() < 2**-6 * expected.norm()
    assert find_deviations(model, recipe, checkpoint=checkpoint) == ()


@pytest.mark.parametrize("name", ["mxfp8+mxfp8", "mxfp4+mxfp4"])
def test_torchao_rounds_microscaling_inputs_to_the_same_numbers(name: str) -> None:
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    activation = parse_scheme(name).activation
    assert activation is not None
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * 5
    x[3, :32] = 0
    element = torch.float8_e4m3fn if "8" in name else torch.float4_e2m1fn_x2
    theirs = MXTensor.to_mx(x, element, 32, ScaleCalculationMode.FLOOR).dequantize()
    assert torch.equal(theirs, fake_quantize_activation(x, activation))


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("int8.g32+int8.token", "no kernel multiplies INT8 group weights"),
        ("fp4_e2m1.g32", "no kernel for linear layers in fp4_e2m1.g32"),
        ("nvfp4+nvfp4", "compute capability 10.0"),
        ("mxfp4", "mxfp4\\+mxfp4"),
    ],
)
def test_a_layer_without_a_kernel_stops_and_is_named(
    tiny_llama: Path, scheme: str, words: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = uniform_recipe(checkpoint, scheme)
    model = load_model(tiny_llama)
    with pytest.raises(BackendError, match=rf"model\.layers\.0\.self_attn\.q_proj .*{words}"):
        torchao.apply(model, recipe)
    assert not any(isinstance(module, TorchaoLinear) for module in model.modules())


def test_only_the_layers_asked_for_are_emulated(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = recipe_of(checkpoint, "int8.channel+int8.token", layers_1_mlp_gate_up="fp4_e2m1.g32")
    with pytest.raises(BackendError, match=r"emulate=\('model.layers.1.mlp.gate_proj',\)"):
        torchao.apply(load_model(tiny_llama), recipe, emulate=["*.up_proj"])
    model = torchao.apply(load_model(tiny_llama), recipe, emulate=["*.layers.1.mlp.*"])
    kinds = {
        name: type(module)
        for name, module in model.named_modules()
        if isinstance(module, TorchaoLinear | FakeQuantLinear)
    }
    emulated = {name for name, kind in kinds.items() if kind is FakeQuantLinear}
    assert emulated == {UP, UP.replace("up_proj", "gate_proj")}
    assert len(kinds) == 14
    assert find_deviations(model, recipe, checkpoint=checkpoint) == ()


def test_experts_are_emulated_or_named(tiny: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(str(tiny("mixtral")))
    recipe = recipe_of(checkpoint, "int8.channel+int8.token")
    with pytest.raises(BackendError, match="experts"):
        torchao.apply(load_model(checkpoint.folder), recipe)
    model = torchao.apply(load_model(checkpoint.folder), recipe, emulate=["*.experts.*"])
    assert find_deviations(model, recipe, checkpoint=checkpoint) == ()


def test_a_recipe_is_not_applied_twice(tiny_llama: Path) -> None:
    recipe = recipe_of(open_checkpoint(str(tiny_llama)), "int8.channel")
    model = torchao.apply(load_model(tiny_llama), recipe)
    for backend in (torchao, emulate):
        with pytest.raises(BackendError, match=r"q_proj: needed a linear layer .*Int8Tensor"):
            backend.apply(model, recipe)


def test_a_model_with_kernels_is_not_saved_but_exported(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = recipe_of(open_checkpoint(str(tiny_llama)), "int8.channel+int8.token")
    model = apply_recipe(load_model(tiny_llama), recipe, "torchao")
    with pytest.raises(BackendError, match="mofq export MODEL RECIPE --to torchao -o FILE"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("tokens", [1, 16, 17, 24, 33])
def test_the_integer_product_of_a_gpu_is_exact_for_few_tokens(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    codes_TI, codes_OI = (
        torch.randint(-128, 128, (n, 4096), generator=generator).to(torch.int8)
        for n in (tokens, 24)
    )
    multiply = torch._int_mm

    def as_on_a_gpu(a: Tensor, b: Tensor) -> Tensor:
        assert len(a) > 16
        assert a.is_contiguous()
        assert b.T.is_contiguous()  # by columns, or it is five times slower
        return multiply(a, b)

    monkeypatch.setattr(torch, "_int_mm", as_on_a_gpu)
    found = integer_product(codes_TI, codes_OI)
    assert torch.equal(found.long(), codes_TI.long() @ codes_OI.T.long())
    assert float(found.abs().max()) > 2**19


def test_an_empty_batch_has_an_empty_output(tiny_llama: Path) -> None:
    recipe = recipe_of(open_checkpoint(str(tiny_llama)), "fp8_e4m3.channel+fp8_e4m3.token")
    model = torchao.apply(load_model(tiny_llama), recipe)
    assert model.get_submodule(UP)(torch.empty(0, 128)).shape == (0, 256)


def test_the_classes_that_engines_name_are_the_ones_that_are_made() -> None:
    named = {
        rule.kernel.partition(", ")[0]
        for engine in ENGINES.values()
        if engine.reads == "torchao"
        for rule in engine.rules
        if rule.kernel
    }
    assert named == set(MAKERS)
    assert set(_PRODUCTS) <= set(MAKERS)


def weight_of(model: nn.Module) -> Any:
    return model.get_parameter(f"{UP}.weight")


def edit_one_code(model: nn.Module) -> None:
    codes: Tensor = weight_of(model).qdata
    codes[200, 100] = 3 if codes[200, 100] != 3 else 4


def swap_two_scales(model: nn.Module) -> None:
    scale: Tensor = weight_of(model).scale
    scale[[5, 9]] = scale[[9, 5]]


def transpose_the_scales(model: nn.Module) -> None:
    weight = weight_of(model)
    weight.scale = weight.scale.T.contiguous()


def shuffle_the_scales_as_if_transposed(model: nn.Module) -> None:
    weight = weight_of(model)
    weight.scale = weight.scale.T.reshape(weight.scale.shape).contiguous()


def leave_unquantized(model: nn.Module) -> None:
    put(model, load_model(Path(model.name_or_path)).get_submodule(UP))  # type: ignore[arg-type]


def apply_another(scheme: str, backend: Any = torchao) -> Callable[[nn.Module], None]:
    def plant(model: nn.Module) -> None:
        folder = Path(model.name_or_path)  # type: ignore[arg-type]
        recipe = recipe_of(open_checkpoint(str(folder)), scheme)
        put(model, backend.apply(load_model(folder), recipe).get_submodule(UP))

    return plant


def state_another_granularity(model: nn.Module) -> None:
    weight_of(model).block_size = [1, 64]


def let_torchao_quantize(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, quantize_

    leave_unquantized(model)
    config = Int8WeightOnlyConfig(granularity=PerGroup(32), set_inductor_config=False)
    quantize_(model, config, filter_fn=lambda module, name: name == UP)


def put(model: nn.Module, module: nn.Module) -> None:
    replace_module(model, UP, module)


@pytest.mark.parametrize(
    ("plant", "reason"),
    [
        (edit_one_code, r"1 of 32768 values of qdata differ \(first at \[200, 100\]"),
        (swap_two_scales, r"8 of 1024 values of scale differ \(first at \[5, 0\]"),
        (transpose_the_scales, r"needed scale of torch.float32 \[256, 4\], found .*\[4, 256\]"),
        (shuffle_the_scales_as_if_transposed, "values of scale differ"),
        (leave_unquantized, "found the layer left unquantized"),
        (apply_another("int8.g64"), r"needed block_size \[1, 32\], found \[1, 64\]"),
        (apply_another("int8.g32@mse"), "values of qdata differ|values of scale differ"),
        (apply_another("int8.channel+int8.token"), "found inputs quantized as"),
        (apply_another("int8.g32.asym"), "class Int8Tensor .*found IntxUnpackedToInt8Tensor"),
        (apply_another("int8.g64", emulate), "weights are not those of scheme 'int8.g32'"),
        (state_another_granularity, r"needed block_size \[1, 32\], found \[1, 64\]"),
        (let_torchao_quantize, "found a weight of class Int8Tensor"),
    ],
)
def test_a_planted_deviation_is_caught_and_named(
    tiny_llama: Path, plant: Callable[[nn.Module], None], reason: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = recipe_of(checkpoint, "int8.g32")
    model = torchao.apply(load_model(tiny_llama), recipe)
    assert find_deviations(model, recipe, checkpoint=checkpoint) == ()
    plant(model)
    deviations = find_deviations(model, recipe, checkpoint=checkpoint)
    assert {deviation.layer for deviation in deviations} == {UP}
    assert any(re.search(reason, deviation.reason) for deviation in deviations)


@pytest.mark.parametrize(
    ("scheme", "attribute"),
    [
        ("int4.g32", "qdata"),
        ("int4.g32", "scale_and_zero"),
        ("fp8_e4m3.channel", "qdata"),
        ("nvfp4", "scale"),
        ("nvfp4", "per_tensor_scale"),
        ("mxfp8+mxfp8", "scale"),
        ("int4.g32.asym", "zero_point"),
    ],
)
def test_one_changed_bit_is_caught_in_every_class(
    tiny_llama: Path, scheme: str, attribute: str
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = recipe_of(checkpoint, scheme)
    model = torchao.apply(load_model(tiny_llama), recipe)
    part: Tensor = getattr(weight_of(model), attribute)
    part.reshape(-1).view(torch.uint8)[-1] ^= 1
    (deviation,) = find_deviations(model, recipe, checkpoint=checkpoint)
    assert deviation.layer == UP
    assert f"values of {attribute} differ" in deviation.reason
