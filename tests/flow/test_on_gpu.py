"""Calibration and validation on a GPU that is not there: the numbers, and what is waited for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import calibrate_folder, plan_of, some_tokens
from conftest import TinyCheckpoint
from pretend_gpu import Gpu, OnGpu, pretend_gpu

from mofq.delivery.apply import emulate
from mofq.delivery.validation import enforcement, validate_many
from mofq.demo import demo_model_folder
from mofq.evidence.calibration.calibrate import run_sequence
from mofq.evidence.calibration.capture import capture_layers
from mofq.evidence.calibration.captured_place import captured_place
from mofq.evidence.calibration.disk_needs import samples_bytes
from mofq.evidence.calibration.gains import write_gains
from mofq.evidence.corpora import load_text
from mofq.evidence.measure.layer_inputs import prepare_layer
from mofq.evidence.measure.score import score_rows
from mofq.exceptions import MofqError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.layers.module_layers import layers_within
from mofq.model.loading import load_model
from mofq.model.modules import find_kind, multiply, run_experts
from mofq.model.streaming import writer
from mofq.model.streaming.records import write_tensors
from mofq.numbers.quantize import factorise_hessian, fake_quantize_activation, quantize_weight
from mofq.numbers.schemes import parse_scheme
from scripts.quality.gpu.applier import mixed_recipe
from scripts.quality.gpu.streamed import calibrate_by_layers

WINDOWS = {"a": some_tokens(2, 16)}


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "stats.json"
    }


def calibrated_on(
    device: str, folder: Path, out: Path, *, streamed: bool = False, **changes: Any
) -> dict[str, bytes]:
    if streamed:
        calibrate_by_layers(folder, out, WINDOWS, device, **changes)
    else:
        model = load_model(folder, dtype=changes.get("dtype", "float32"), device=device)
        calibrate_folder(folder, out, WINDOWS, model=model, kept=1, **changes)
    return content(out)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"dtype": "bfloat16", "inputs": True}),
        ("llama", {"draws": 2, "kv_cache": True}),
        pytest.param("qwen3_moe", {"routing": True}, marks=pytest.mark.long),
        pytest.param("mixtral", {"routing": True, "dtype": "bfloat16"}, marks=pytest.mark.long),
    ],
)
def test_statistics_of_a_gpu_are_those_of_the_cpu(
    family: str, changes: dict[str, Any], streamed: bool, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny(family)
    needed = calibrated_on("cpu", folder, tmp_path / "cpu", streamed=streamed, **changes)
    with pretend_gpu():
        found = calibrated_on("cuda", folder, tmp_path / "gpu", streamed=streamed, **changes)
    assert found == needed
    assert any(name.startswith("a/sequence-") for name in found)


@pytest.mark.parametrize(
    ("family", "file", "changes"),
    [
        ("llama", "back-00001", {}),
        ("llama", "piece-00001", {"draws": 2}),
        pytest.param("mixtral", "margins-00001", {"routing": True}, marks=pytest.mark.long),
        pytest.param("mixtral", "back-00001", {"routing": True}, marks=pytest.mark.long),
    ],
)
def test_a_run_whose_writes_fail_goes_on_to_the_same_statistics(
    family: str, file: str, changes: dict[str, Any], tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny(family)
    needed = calibrated_on("cpu", folder, tmp_path / "cpu", streamed=True, **changes)
    behind: list[str] = []

    def write_but_one(path: Path, given: Any, tensors: Any) -> None:
        if path.name == file or behind:
            behind.append(path.name)
            raise MofqError(f"{path}: cannot be written")
        write_tensors(path, given, tensors)

    with pytest.MonkeyPatch.context() as patch, pretend_gpu():
        patch.setattr(writer, "write_tensors", write_but_one)
        with pytest.raises(MofqError, match=file):
            calibrate_by_layers(folder, tmp_path / "gpu", WINDOWS, "cuda", **changes)
    assert behind == [file]
    with pretend_gpu():
        found = calibrated_on("cuda", folder, tmp_path / "gpu", streamed=True, **changes)
    assert found == needed


def test_what_layers_see_stays_on_a_gpu_that_has_room_for_the_largest_part(
    tiny: TinyCheckpoint,
) -> None:
    folder = tiny("llama")
    layers = find_layers(open_checkpoint(str(folder)))
    halves = [layers_within(layers, f"model.layers.{number}") for number in (0, 1)]
    needed = 4 * samples_bytes(layers, tokens=16, draws=2, experts_per_token=0)
    caches = 4 * 2 * 16 * sum(2 * one.numbers for one in layers.caches)
    assert min(needed, caches) > 0

    def place(free: int, parts: Any = (layers,), *, held: int = 0, **changes: Any) -> str:
        gpu.free_bytes, gpu.reserved_bytes = free, held
        return captured_place(model, parts, plan_of(folder, WINDOWS, **changes)).type

    with pretend_gpu() as gpu:
        model = load_model(folder, device="cuda")
        assert place(needed) == "cuda"
        assert place(needed - 1) == "cpu"
        assert place(needed // 2, halves) == "cuda"
        assert place(needed // 2 - 1, halves) == "cpu"
        assert place(0, held=needed) == "cuda"  # torch has it, and no tensor does
        assert place(needed, kv_cache=True) == "cpu"
        assert place(needed + caches, kv_cache=True) == "cuda"


@pytest.mark.long
def test_statistics_are_the_same_where_a_gpu_has_no_room_for_a_sequence(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny("qwen3_moe")
    needed = calibrated_on("cpu", folder, tmp_path / "cpu", routing=True)
    moved = {}
    for free_bytes in (2**30, 0):
        with pretend_gpu() as gpu:
            gpu.free_bytes = free_bytes
            out = tmp_path / f"gpu-{free_bytes}"
            assert calibrated_on("cuda", folder, out, routing=True) == needed
        moved[free_bytes] = gpu.to_host_bytes
    assert moved[0] > 1.5 * moved[2**30]


def gains_on_gpu(folder: Path, out: Path, layers_of_model: int) -> Gpu:
    layers = find_layers(open_checkpoint(str(folder)))
    assert len(layers.groups) == layers_of_model
    with pretend_gpu() as gpu:
        model = load_model(folder, device="cuda")
        place = captured_place(model, [layers], plan_of(folder, WINDOWS))
        gpu.waits.clear()
        gpu.to_host_bytes = 0
        with capture_layers(model, layers, place=place) as captured:
            run_sequence(model, WINDOWS["a"][0], [0, 1])
            write_gains(out, captured, [one.name for one in layers.grouped_layers])
    return gpu


def test_a_sequence_that_is_not_kept_leaves_numbers_alone_and_is_waited_for_once(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    gpu = gains_on_gpu(tiny("llama"), tmp_path / "gains.json", 8)
    assert gpu.to_host_bytes == 0
    # Tokens, a mask of transformers, whether logits are finite; and all sums.
    assert len(gpu.waits) <= 4
    assert gpu.waits[-1] == "tolist"


def test_a_streamed_run_waits_for_no_copy_of_what_units_return(
    tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = []
    with pretend_gpu() as gpu:
        made = torch.cuda.Stream
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: streams.append(1) or made(device))
        calibrate_by_layers(tiny("llama"), tmp_path / "stats", WINDOWS, "cuda")
        monkeypatch.undo()
    assert "to cpu" not in gpu.waits
    assert gpu.waits.count("to cuda") <= 4  # what no unit has, when the model is opened
    assert len(streams) == 1


def test_experts_are_waited_for_together(tiny: TinyCheckpoint) -> None:
    with pretend_gpu() as gpu:
        model = load_model(tiny("qwen3_moe"), device="cuda")
        experts = model.get_submodule("model.layers.0.mlp.experts")
        kind = find_kind(experts)
        hidden_TI = torch.randn(12, model.config.hidden_size).to("cuda")
        index_TK = torch.stack([torch.arange(12) % kind.count, (torch.arange(12) + 1) % kind.count])
        index_TK = index_TK.T.to("cuda")
        gpu.waits.clear()

        def linear(parameter: str, expert: int, x_TI: Any, _token_T: Any) -> Any:
            return multiply(experts, kind, parameter, expert, x_TI)

        run_experts(kind, hidden_TI, index_TK, torch.ones(12, 2).to("cuda"), linear=linear)
    assert kind.count > 2
    assert gpu.waits == ["to cuda", "_unique2", "tolist"]


@pytest.mark.parametrize("name", ["int8.channel", "int4.g32@mse", "int4.g32~gptq", "nf4.g64"])
def test_a_weight_is_waited_for_a_few_times_whatever_its_columns(name: str) -> None:
    scheme = parse_scheme(name).weight
    assert scheme is not None
    counts = {}
    for columns in (64, 256):
        x_TI = torch.randn(2 * columns, columns, dtype=torch.float64)
        feedback = factorise_hessian(x_TI.T @ x_TI) if scheme.rounds_by_hessian else None
        with pretend_gpu() as gpu:
            weight_OI = torch.randn(8, columns).to("cuda")
            options = {} if feedback is None else {"feedback": feedback.to("cuda")}
            gpu.waits.clear()
            quantize_weight(weight_OI, scheme, **options)
        counts[columns] = len(gpu.waits)
    assert counts[256] == counts[64] <= 4


def test_a_block_of_weights_is_sent_once_and_its_sums_are_waited_for() -> None:
    weight_OI = torch.randn(64, 128).bfloat16()
    schemes = [parse_scheme("int8.channel"), parse_scheme("int4.g32")]
    with pretend_gpu() as gpu:
        layer = prepare_layer(
            lambda start, stop: weight_OI[start:stop], (64, 128), schemes, samples={}, device="cuda"
        )
        gpu.waits.clear()
        score_rows(layer, weight_OI, start=0)
    # The block; whether its sums are finite; crest factors and their number, of one block in eight.
    assert gpu.waits == ["to cuda", "_local_scalar_dense", "to cpu", "to cpu"]


@pytest.mark.parametrize("name", ["bf16+int8.token", "bf16+fp8_e4m3.tensor", "bf16+nvfp4"])
def test_rounding_inputs_waits_for_nothing(name: str) -> None:
    scheme = parse_scheme(name).activation
    assert scheme is not None
    with pretend_gpu() as gpu:
        x_TI = torch.randn(8, 64).to("cuda")
        gpu.waits.clear()
        fake_quantize_activation(x_TI, scheme, static_amax=2.0)
    assert gpu.waits == []


@pytest.mark.long
@pytest.mark.parametrize("execution", ["resident", "streamed"])
def test_a_recipe_is_enforced_and_costs_on_a_gpu_what_it_costs_on_the_cpu(
    execution: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(demo_model_folder())
    recipe = mixed_recipe(open_checkpoint(folder), ("int8.channel+int8.token", "int4.g32", "bf16"))
    options: dict[str, Any] = {"tokens": 128, "sequence_length": 64, "execution": execution}
    (needed,) = validate_many(folder, [recipe], load_text("demo-en"), **options)
    for module in (emulate, enforcement):  # which take torch's own tensors alone
        monkeypatch.setattr(module, "Tensor", OnGpu)
    with pretend_gpu():
        (found,) = validate_many(folder, [recipe], load_text("demo-en"), device="cuda", **options)
    assert found.enforced is True
    assert found.kl_nats_per_token == needed.kl_nats_per_token
