"""What calibration captures, against autograd's own account of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from calibrated import calibrate_folder, read_sequence, scored_loss, scores_of, some_tokens
from conftest import TinyCheckpoint
from families import TINY_FAMILIES, long_but
from rounding import apart
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from mofq.evidence.calibration.calibrate import run_sequence, sample_scores, score_seed
from mofq.evidence.calibration.capture import capture_layers
from mofq.evidence.calibration.sequence_file import SequenceFile
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.loading import load_model

TOKENS = some_tokens(2, 16)


def layer_names(folder: Path) -> list[str]:
    groups = find_layers(open_checkpoint(str(folder))).groups
    return [layer.name for group in groups for layer in group.layers]


@contextmanager
def shifted_outputs(
    model: nn.Module, names: Sequence[str], tokens: int
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Add a shift of zeros to the output of some layers; the loss's gradient with respect to it
    is its gradient with respect to the output. Inputs are noted too."""
    inputs, shifts, handles = {}, {}, []
    for name in names:
        module = model.get_submodule(name)

        def shift(
            module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name
        ) -> Tensor:
            inputs[name] = args[0].detach().reshape(tokens, -1)
            shifts[name] = torch.zeros_like(output, requires_grad=True)
            return output + shifts[name]

        handles.append(module.register_forward_hook(shift))
    try:
        yield inputs, shifts
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", long_but(TINY_FAMILIES, "gpt2", "gemma3_text", "deepseek_v3"))
def test_inputs_and_gradients_are_those_that_autograd_finds_for_the_loss_written_out(
    family: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny(family)
    alone = [name for name in layer_names(folder) if ".experts." not in name]
    names = {name: loaded(family, name) for name in alone}
    stats = calibrate_folder(folder, tmp_path / "stats", {"a": TOKENS})
    model = load_model(folder)
    for sequence, token_T in enumerate(TOKENS):
        with (
            shifted_outputs(model, list(names.values()), 16) as (inputs, shifts),
            SequenceFile(stats.sequence_files("a")[sequence]) as file,
        ):
            logits_TV = model(token_T[None]).logits[0]
            loss = scored_loss(logits_TV, scores_of(logits_TV, sequence=sequence))
            expected = torch.autograd.grad(loss, [shifts[module] for module in names.values()])
            for name, grad in zip(names, expected, strict=True):
                found = file.read(name)
                assert found is not None
                assert found.token_T is None
                assert torch.equal(found.x_TI, inputs[names[name]].bfloat16())
                torch.testing.assert_close(
                    found.grad_DTO[0].float(),
                    grad.reshape(16, -1),
                    rtol=2**-8,
                    atol=apart(256) * float(grad.abs().max()),  # the widest layer
                )


def loaded(family: str, name: str) -> str:
    """A layer's module in the model that transformers builds."""
    if family == "gemma3":
        return name.replace("language_model.model.", "model.language_model.")
    return name


def test_the_outer_products_are_autograds_gradient_of_the_weight(
    tiny_llama: Path, tmp_path: Path
) -> None:
    stats = calibrate_folder(tiny_llama, tmp_path / "stats", {"a": TOKENS})
    model = load_model(tiny_llama)
    name = "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(name).weight
    weight.requires_grad_(True)
    logits_TV = model(TOKENS[1][None]).logits[0]
    loss = scored_loss(logits_TV, scores_of(logits_TV, sequence=1))
    (expected,) = torch.autograd.grad(loss, [weight])
    found = read_sequence(stats, 1)
    product = found[f"grad/{name}"][0].double().T @ found[f"x/{name}"].double()
    # Rounding to bfloat16 moves each of 16 terms by at most 2**-8 of itself.
    assert (product - expected).norm() < 2**-8 * expected.norm()


def test_what_a_model_changes_in_place_is_kept_as_it_was(tiny: TinyCheckpoint) -> None:
    folder = tiny("olmoe", clip_qkv=0.001)
    model = load_model(folder, dtype="bfloat16")
    layers = find_layers(open_checkpoint(str(folder)))
    inputs = []
    name = "model.layers.0.self_attn.v_proj"
    projection = model.get_submodule(name)
    with capture_layers(model, layers) as captured:
        projection.register_forward_hook(lambda _module, given, _output: inputs.append(given[0]))
        run_sequence(model, TOKENS[0], [0])
    needed = nn.functional.linear(inputs[0].detach()[0], projection.weight)
    assert needed.abs().max() > 0.01
    assert torch.equal(captured.y[name], needed)
    inputs[0].detach().zero_()
    assert captured.x[captured.source[name]].abs().max() > 0


def test_layers_that_read_the_same_input_share_one_copy_of_it(
    tiny_llama: Path, tmp_path: Path
) -> None:
    stats = calibrate_folder(tiny_llama, tmp_path / "stats", {"a": TOKENS})
    stored = [key.removeprefix("x/") for key in read_sequence(stats) if key.startswith("x/")]
    assert sorted(stored) == sorted(
        f"model.layers.{i}.{word}"
        for i in (0, 1)
        for word in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    )
    with safe_open(stats.sequence_files("a")[0], "pt") as file:
        inputs = json.loads(file.metadata()["inputs"])
    assert list(inputs) == layer_names(tiny_llama)
    assert inputs["model.layers.1.self_attn.v_proj"] == "model.layers.1.self_attn.q_proj"
    assert inputs["model.layers.1.mlp.up_proj"] == "model.layers.1.mlp.gate_proj"
    assert inputs["model.layers.1.mlp.down_proj"] == "model.layers.1.mlp.down_proj"


def test_further_draws_have_their_own_labels_and_leave_the_first_as_it_was(
    tiny_llama: Path, tmp_path: Path
) -> None:
    one = read_sequence(calibrate_folder(tiny_llama, tmp_path / "one", {"a": TOKENS}))
    three = read_sequence(calibrate_folder(tiny_llama, tmp_path / "three", {"a": TOKENS}, draws=3))
    for key, tensor in one.items():
        if key.startswith("x/"):
            assert torch.equal(three[key], tensor)
            continue
        assert three[key].shape == (3, *tensor.shape[1:])
        assert torch.equal(three[key][0], tensor[0])
        assert not torch.equal(three[key][1], tensor[0])
        assert not torch.equal(three[key][2], three[key][1])


def test_the_seed_changes_the_labels_and_nothing_else(tiny_llama: Path, tmp_path: Path) -> None:
    first = read_sequence(calibrate_folder(tiny_llama, tmp_path / "0", {"a": TOKENS}))
    other = read_sequence(calibrate_folder(tiny_llama, tmp_path / "1", {"a": TOKENS}, seed=1))
    assert first.keys() == other.keys()
    for key, tensor in first.items():
        assert torch.equal(other[key], tensor) == key.startswith("x/")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_calibration_leaves_the_model_as_it_was(
    family: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    model = load_model(tiny(family))
    before = logits_and_hooks(model)
    calibrate_folder(tiny(family), tmp_path, {"a": TOKENS}, model=model)
    after = logits_and_hooks(model)
    assert torch.equal(after[0], before[0])
    assert after[1] == before[1]
    assert all(parameter.grad is None for parameter in model.parameters())


def logits_and_hooks(model: PreTrainedModel) -> tuple[Tensor, list[object]]:
    with torch.inference_mode():
        logits = model(TOKENS).logits
    state = [(name, len(m._forward_hooks), "forward" in vars(m)) for name, m in named(model)]
    return logits, list(state)


def named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules())


def test_scores_have_the_covariance_of_the_models_own_distribution() -> None:
    logits_V = torch.tensor([2.0, 0.0, -1.0, 1.0, -30.0])
    p_V = logits_V.softmax(-1)
    count = 40_000
    score_TV = sample_scores(logits_V.expand(count, -1), seed=3)
    # Three standard errors of a mean of 40,000 numbers of variance 1/4 at most are 0.0075.
    torch.testing.assert_close(score_TV.mean(0), torch.zeros(5), rtol=0, atol=0.0075)
    covariance_VV = score_TV.T @ score_TV / count
    fisher_VV = p_V.diag() - p_V[:, None] * p_V
    torch.testing.assert_close(covariance_VV, fisher_VV, rtol=0, atol=0.0075)
    # Adding a constant to all logits changes no probability.
    torch.testing.assert_close(score_TV.sum(1), torch.zeros(count), rtol=0, atol=1e-6)


def test_scores_of_neighbouring_positions_are_independent() -> None:
    score_T = sample_scores(torch.zeros(40_000, 2), seed=5)[:, 0].double()
    for lag in (1, 2, 64):
        assert abs(float((score_T[lag:] * score_T[:-lag]).mean())) < 3 * 0.25 / 200


def test_every_corpus_sequence_and_draw_has_a_seed_of_its_own() -> None:
    places = [(s, c, i, d) for s in (0, 1) for c in ("a", "b") for i in range(3) for d in range(2)]
    assert len({score_seed(*place) for place in places}) == len(places)
