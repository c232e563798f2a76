"""What tokens that change their experts cost the bundled mixture: predicted and measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import calibrate_folder, some_tokens, space_of
from conftest import TinyCheckpoint
from emulated import recipe_of
from torch import Tensor
from transformers import PreTrainedModel

from mofq.decision import Problem, request_problem
from mofq.decision.prediction import predict
from mofq.delivery.apply import emulate
from mofq.demo import demo_mixture_folder
from mofq.evidence.corpora import load_text, spread_windows
from mofq.evidence.measure.fill_table import measure
from mofq.evidence.metrics import kl_divergence
from mofq.evidence.table import read_table
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.loading import load_model, load_tokenizer

pytestmark = pytest.mark.long
SCHEMES = ("int4.g32@mse", "int6.channel", "bf16+int6.token")


@pytest.fixture(scope="module")
def mixture() -> Checkpoint:
    return open_checkpoint(str(demo_mixture_folder()))


@pytest.fixture(scope="module")
def windows_NT() -> Tensor:
    tokenizer = load_tokenizer(demo_mixture_folder())
    text = load_text("demo-en")
    return spread_windows(text, tokenizer, sequences=16, sequence_length=256)


@pytest.fixture(scope="module")
def problem(mixture: Checkpoint, windows_NT: Tensor, tmp_path_factory: Any) -> Problem:
    """From every second window; the others are measured on."""
    folder: Path = tmp_path_factory.mktemp("routing")
    stats = calibrate_folder(
        mixture.folder, folder / "stats", {"a": windows_NT[::2]}, kept=4, routing=True
    )
    path = folder / "table.jsonl"
    measure(mixture, find_layers(mixture), space_of(*SCHEMES), table_path=path, stats=stats)
    return request_problem(read_table(path))


def logits_of(model: PreTrainedModel, windows_NT: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(token_T[None]).logits[0] for token_T in windows_NT])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_mixture_is_predicted_with_its_changes_of_experts(
    scheme: str, mixture: Checkpoint, windows_NT: Tensor, problem: Problem
) -> None:
    choice_F = problem.choice_of({group.name: scheme for group in problem.groups})
    original, model = load_model(mixture.folder), load_model(mixture.folder)
    emulate.apply(model, recipe_of(mixture, scheme), checkpoint=mixture)
    compared = (logits_of(one, windows_NT[1::2]) for one in (original, model))
    measured = float(kl_divergence(*compared).mean())
    assert predict(problem, choice_F).value == pytest.approx(measured, rel=0.2)
    # Without them, a third to a half of it is missing.
    assert predict(replace(problem, flip_FC=None), choice_F).value < 0.7 * measured


@pytest.mark.parametrize("groups", [1, 4])
def test_routers_with_biases_and_groups_are_predicted_too(
    groups: int, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    """Of random weights, whose experts are all different: most of the loss is by changes."""
    sizes = {"n_routed_experts": 16, "n_group": groups, "topk_group": max(1, groups // 2)}
    checkpoint = open_checkpoint(str(tiny("deepseek_v3", num_hidden_layers=4, **sizes)))
    tokens_NT = some_tokens(24, 128)
    stats = calibrate_folder(
        checkpoint.folder, tmp_path / "stats", {"a": tokens_NT[::2]}, kept=6, routing=True
    )
    path, schemes = tmp_path / "table.jsonl", ("int8.channel", "fp8_e4m3.channel")
    measure(checkpoint, find_layers(checkpoint), space_of(*schemes), table_path=path, stats=stats)
    problem = request_problem(read_table(path))
    original_TV = logits_of(load_model(checkpoint.folder), tokens_NT[1::2])
    for scheme in schemes:
        model = load_model(checkpoint.folder)
        emulate.apply(model, recipe_of(checkpoint, scheme), checkpoint=checkpoint)
        changed_TV = logits_of(model, tokens_NT[1::2])
        measured = float(kl_divergence(original_TV, changed_TV).mean())
        choice_F = problem.choice_of({group.name: scheme for group in problem.groups})
        assert predict(problem, choice_F).value == pytest.approx(measured, rel=0.3)
        assert predict(replace(problem, flip_FC=None), choice_F).value < 0.7 * measured
