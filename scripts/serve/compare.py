"""Compares what vLLM computed with the emulated recipe. A part of check.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mofq.decision.recipe import Recipe
from mofq.delivery.apply.emulate import apply
from mofq.delivery.recipe_layers import find_recipe_layers, static_amax
from mofq.delivery.tuning.tensors import learned_codes
from mofq.evidence.code_changes import CodeChanges
from mofq.evidence.corpora import leading_tokens
from mofq.evidence.fits import Fits
from mofq.evidence.layer_codes import layer_codes
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows, read_shared_amax, read_tensor
from mofq.model.layers import FusionGroup, LinearLayer
from mofq.model.loading import load_model, load_tokenizer
from mofq.numbers.quantize import fake_quantize_activation
from mofq.numbers.schemes import Scheme, parse_scheme

UNITS = {"bfloat16": 2.0**-8, "float32": 2.0**-24}
_LAYER_UNITS = {"bfloat16": 2.0**-8, "float32": 2.0**-12}
_KL_FACTOR = 3.0
_KL_ABSOLUTE = 1e-4  #: nats; of the order of one bfloat16 rounding of a log-probability, squared
_MAX_ABSOLUTE = 0.1  #: nats; where the floor is nothing, a log-probability of -30 is still rounded
_MEAN_STANDARD_ERRORS = 4.0
_LIMITS = {
    "kl_emulated_served": "kl_limit",
    "max_abs_difference": "max_abs_limit",
    "mean_difference": "mean_limit",
}


@dataclass(frozen=True, slots=True)
class _Position:
    """One predicted token: vLLM and the floor against the emulated recipe [nats]."""

    entropy: float  #: of the text's own token, emulated
    difference: float  #: of its log-probability, served minus emulated
    floor_difference: float
    kl: float
    kl_floor: float


def window_tokens(
    checkpoint: Checkpoint, text: str | None, tokens: int, window: int
) -> list[list[int]]:
    """The first tokens of a text, in windows that begin with BOS where the tokenizer adds it."""
    source = Path(text) if text else _bundled_text()
    tokenizer = load_tokenizer(checkpoint.folder)
    encoded = tokenizer(source.read_text("utf-8")[: 20 * tokens], add_special_tokens=False)
    ids = list(encoded["input_ids"])[:tokens]
    leading = list(leading_tokens(tokenizer, "auto"))
    step = window - len(leading)
    windows = [leading + ids[start : start + step] for start in range(0, len(ids), step)]
    return [each for each in windows if len(each) > 1 + len(leading)]


def _bundled_text() -> Path:
    import mofq

    assert mofq.__file__ is not None
    return Path(mofq.__file__).parent / "demo" / "texts" / "heldout-en.txt"


def compare_layers(
    checkpoint: Checkpoint,
    recipe: Recipe,
    records: dict[str, Tensor],
    packed: dict[str, list[str]],
    names: dict[str, str],
    dtype: str,
    report: dict[str, Any],
    *,
    fits: Fits | None = None,
) -> list[str]:
    """Every linear layer's output in vLLM against the same layer emulated, input for input.

    Args:
        checkpoint: The original model.
        recipe: That was exported.
        records: ``name.x`` and ``name.y`` of vLLM's layers.
        packed: vLLM's fused name -> the names that it was fused from.
        names: Of a layer in the checkpoint -> in vLLM, before it is fused; those that differ.
        dtype: Of vLLM's arithmetic.
        report: Gets ``layers``, ``worst_layer`` and its error as a share of the limit.
        fits: Of the recipe, where a scheme is fitted.

    Returns:
        What went wrong, with the layers named.
    """
    layers = find_recipe_layers(checkpoint, recipe)
    changes = learned_codes(recipe, layers)
    groups = {layer.name: (group, layer) for group in layers.groups for layer in group.layers}
    # Experts run joined, in a module that is no linear layer: bytes and log-probabilities speak
    # for them.
    left = {name for name in groups if ".experts." not in name}
    in_vllm = {names.get(name, name): name for name in groups}
    shares: dict[str, float] = {}
    for key in sorted(key for key in records if key.endswith(".x")):
        name = key.removesuffix(".x")
        members = [groups[in_vllm[part]] for part in _unfused(name, packed) if part in in_vllm]
        if not members:
            continue
        left -= {layer.name for _, layer in members}
        x_TI = records[key].to(torch.float32)
        expected, norm = _emulate(checkpoint, recipe, members, x_TI, fits=fits, changes=changes)
        error = float((records[f"{name}.y"].to(torch.float32) - expected).norm())
        limit = _LAYER_UNITS[dtype] * (norm + float(expected.norm()))
        shares[name] = error / limit if error == error else float("inf")
    report |= _summary(shares, experts=sum(".experts." in name for name in groups))
    failures = [
        f"layer {name}: its output in vLLM is {share:.3g} times as far from the emulated one as "
        f"the kernel's arithmetic explains"
        for name, share in shares.items()
        if share > 1
    ]
    if left:
        failures.append(f"layers: vLLM never ran {len(left)} of them, such as {sorted(left)[0]}")
    return failures


def _summary(shares: dict[str, float], *, experts: int) -> dict[str, Any]:
    worst = max(shares, key=lambda name: shares[name], default="")
    return {
        "layers": len(shares),
        "experts_not_watched": experts,
        "worst_layer": worst,
        "worst_layer_share_of_limit": shares.get(worst),
    }


def _unfused(name: str, packed: dict[str, list[str]]) -> list[str]:
    parent, dot, word = name.rpartition(".")
    # GLM-4 has joined on disk what vLLM would join.
    # Phi-3's is packed of itself.
    return [f"{parent}{dot}{part}" for part in dict.fromkeys((word, *packed.get(word, ())))]


def _emulate(
    checkpoint: Checkpoint,
    recipe: Recipe,
    members: list[tuple[FusionGroup, LinearLayer]],
    x_TI: Tensor,
    *,
    fits: Fits | None,
    changes: Mapping[str, CodeChanges],
) -> tuple[Tensor, float]:
    """Concatenated output, and the root of the summed squares of its products."""
    outputs, squares = [], 0.0
    for group, layer in members:
        scheme = parse_scheme(recipe.schemes[layer.name])
        weight_OI = _weight(
            checkpoint, group, layer, scheme, fits=fits, changes=changes.get(layer.name)
        )
        inputs_TI = x_TI
        if scheme.activation is not None:
            amax = static_amax(group, scheme, recipe)
            inputs_TI = fake_quantize_activation(
                x_TI, scheme.activation, static_amax=amax.get(layer.name)
            )
        y_TO = inputs_TI @ weight_OI.T
        bias = checkpoint.tensors.get(f"{layer.name}.bias")
        outputs.append(y_TO if bias is None else y_TO + read_tensor(bias).to(torch.float32))
        squares += float((inputs_TI.square() @ weight_OI.square().T).sum())
    return torch.cat(outputs, dim=1), squares**0.5


def _weight(
    checkpoint: Checkpoint,
    group: FusionGroup,
    layer: LinearLayer,
    scheme: Scheme,
    *,
    fits: Fits | None,
    changes: CodeChanges | None,
) -> Tensor:
    weight, rows = scheme.weight, partial(read_layer_rows, checkpoint, layer)
    if weight is None:
        return rows(0, layer.out_features).to(torch.float32)
    amax = read_shared_amax(checkpoint, group, weight) if weight.needs_tensor_amax else {}
    codes = layer_codes(
        fits, layer, weight, rows, tensor_amax=amax.get(layer.name), changes=changes
    )
    return codes.decoded(0, layer.out_features)


def compare_logprobs(
    checkpoint: Checkpoint,
    recipe: Recipe,
    windows: list[list[int]],
    logprobs: list[list[dict[str, float] | None]],
    dtype: str,
    report: dict[str, Any],
    *,
    fits: Fits | None = None,
) -> list[str]:
    """Prompt log-probabilities of vLLM against the emulated recipe, token by token.

    The KL divergence is taken over the likeliest tokens that vLLM returned and one
    bin with all others; it is at most the full one.

    Args:
        checkpoint: The original model.
        recipe: That was exported.
        windows: Token ids.
        logprobs: vLLM's answer for each window and position.
        dtype: Of vLLM's arithmetic.
        report: Gets the figures.
        fits: Of the recipe, where a scheme is fitted.

    Returns:
        What went wrong.
    """
    emulated = emulated_logprobs(checkpoint, recipe, windows, "float32", nudge=0.0, fits=fits)
    floor = emulated_logprobs(checkpoint, recipe, windows, dtype, nudge=UNITS[dtype], fits=fits)
    positions = []
    for window, answers, expected, nudged in zip(windows, logprobs, emulated, floor, strict=True):
        for place, answer in enumerate(answers):
            if answer is None:
                continue
            keys = torch.tensor([int(key) for key in answer])
            found = torch.tensor(list(answer.values()), dtype=torch.float64)
            ours, theirs, token = expected[place - 1], nudged[place - 1], window[place]
            position = _Position(
                entropy=-float(ours[token]),
                difference=answer[str(token)] - float(ours[token]),
                floor_difference=float(theirs[token] - ours[token]),
                kl=binned_kl(ours[keys], found),
                kl_floor=binned_kl(ours[keys], theirs[keys]),
            )
            positions.append(position)
    report.update(_figures(positions))
    return [
        f"log-probabilities: {key} is {report[key]:.4g}, expected at most {report[limit]:.4g}"
        for key, limit in _LIMITS.items()
        if not abs(report[key]) <= report[limit]
    ]


def _figures(positions: list[_Position]) -> dict[str, float]:
    """Means over all positions, and what they may be."""
    count = len(positions)
    nll = sum(each.entropy for each in positions) / count
    mean = sum(each.difference for each in positions) / count
    kl_floor = sum(each.kl_floor for each in positions) / count
    floor_max = max(abs(each.floor_difference) for each in positions)
    stderr = (sum(each.floor_difference**2 for each in positions) / count / count) ** 0.5
    return {
        "positions": count,
        "nll_emulated": nll,
        "nll_served": nll - mean,
        "mean_difference": mean,
        "mean_limit": _MEAN_STANDARD_ERRORS * stderr + _KL_ABSOLUTE,
        "mean_abs_difference": sum(abs(each.difference) for each in positions) / count,
        "max_abs_difference": max(abs(each.difference) for each in positions),
        "max_abs_limit": _KL_FACTOR * floor_max + _MAX_ABSOLUTE,
        "kl_emulated_served": sum(each.kl for each in positions) / count,
        "kl_floor": kl_floor,
        "kl_limit": _KL_FACTOR * kl_floor + _KL_ABSOLUTE,
    }


def binned_kl(log_p: Tensor, log_q: Tensor) -> float:
    """KL over some tokens and one bin with all others; at most the full one [nats]."""
    p, q = log_p.exp(), log_q.exp()
    rest_p, rest_q = ((1 - each.sum()).clamp(min=1e-12) for each in (p, q))
    return float((p * (log_p - log_q)).sum() + rest_p * (rest_p / rest_q).log())


def emulated_logprobs(
    checkpoint: Checkpoint,
    recipe: Recipe,
    windows: list[list[int]],
    dtype: str,
    *,
    nudge: float,
    fits: Fits | None = None,
) -> list[Tensor]:
    """Log-probabilities of every token after every prefix, float64 [T, V] for each window."""
    original = load_model(checkpoint.folder, dtype=dtype)
    model = apply(original, recipe, checkpoint=checkpoint, fits=fits)
    generator = torch.Generator().manual_seed(0)

    def move(module: Any, inputs: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator)
        return output * (1 + nudge * noise).to(output.dtype)

    if nudge:
        model.get_input_embeddings().register_forward_hook(move)
    with torch.inference_mode():
        run = partial(model, use_cache=False)
        logits = [run(torch.tensor([window])).logits[0] for window in windows]
    return [each.double().log_softmax(dim=-1) for each in logits]
