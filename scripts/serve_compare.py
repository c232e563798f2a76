"""Compares what vLLM computed with the emulated recipe. A part of serve_check.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mofq.backends.emulate import apply, find_recipe_layers, share_amax, static_amax
from mofq.checkpoint.headers import Checkpoint
from mofq.checkpoint.model import load_model, load_tokenizer
from mofq.checkpoint.tensors import read_layer_rows, read_tensor
from mofq.layers import FusionGroup, LinearLayer
from mofq.quantize import fake_quantize_activation, fake_quantize_weight
from mofq.recipe import Recipe
from mofq.schemes import Scheme, parse_scheme

UNITS = {"bfloat16": 2.0**-8, "float32": 2.0**-24}
_LAYER_UNITS = {"bfloat16": 2.0**-8, "float32": 2.0**-12}
_KL_FACTOR = 3.0
_KL_ABSOLUTE = 1e-4  #: nats; of the order of one bfloat16 rounding of a log-probability, squared
_MEAN_STANDARD_ERRORS = 4.0


def window_tokens(
    checkpoint: Checkpoint, text: str | None, tokens: int, window: int
) -> list[list[int]]:
    """The first tokens of a text, in windows."""
    source = Path(text) if text else _bundled_text()
    tokenizer = load_tokenizer(checkpoint.folder)
    encoded = tokenizer(source.read_text("utf-8")[: 20 * tokens], add_special_tokens=False)
    ids = list(encoded["input_ids"])[:tokens]
    windows = [ids[start : start + window] for start in range(0, len(ids), window)]
    return [each for each in windows if len(each) > 1]


def _bundled_text() -> Path:
    import mofq

    assert mofq.__file__ is not None
    return Path(mofq.__file__).parent / "demo" / "texts" / "heldout-en.txt"


def compare_layers(
    checkpoint: Checkpoint,
    recipe: Recipe,
    records: dict[str, Tensor],
    packed: dict[str, list[str]],
    dtype: str,
    report: dict[str, Any],
) -> list[str]:
    """Every linear layer's output in vLLM against the same layer emulated, input for input.

    Args:
        checkpoint: The original model.
        recipe: That was exported.
        records: ``name.x`` and ``name.y`` of vLLM's layers.
        packed: vLLM's fused name -> the names that it was fused from.
        dtype: Of vLLM's arithmetic.
        report: Gets ``layers``, ``worst_layer`` and its error as a share of the limit.

    Returns:
        What went wrong, with the layers named.
    """
    groups = {
        layer.name: (group, layer)
        for group in find_recipe_layers(checkpoint, recipe).groups
        for layer in group.layers
    }
    left = set(groups)
    shares: dict[str, float] = {}
    for key in sorted(key for key in records if key.endswith(".x")):
        name = key.removesuffix(".x")
        members = [groups[part] for part in _unfused(name, packed) if part in groups]
        if not members:
            continue
        left -= {layer.name for _, layer in members}
        expected, norm = _emulate(checkpoint, recipe, members, records[key].to(torch.float32))
        error = float((records[f"{name}.y"].to(torch.float32) - expected).norm())
        limit = _LAYER_UNITS[dtype] * (norm + float(expected.norm()))
        shares[name] = error / limit if error == error else float("inf")
    worst = max(shares, key=lambda name: shares[name], default="")
    report["layers"] = len(shares)
    report["worst_layer"] = worst
    report["worst_layer_share_of_limit"] = shares.get(worst)
    failures = [
        f"layer {name}: its output in vLLM is {share:.3g} times as far from the emulated one as "
        f"the kernel's arithmetic explains"
        for name, share in shares.items()
        if share > 1
    ]
    if left:
        failures.append(f"layers: vLLM never ran {len(left)} of them, such as {sorted(left)[0]}")
    return failures


def _unfused(name: str, packed: dict[str, list[str]]) -> list[str]:
    parent, _, word = name.rpartition(".")
    return [f"{parent}.{part}" for part in packed.get(word, [word])]


def _emulate(
    checkpoint: Checkpoint,
    recipe: Recipe,
    members: list[tuple[FusionGroup, LinearLayer]],
    x_TI: Tensor,
) -> tuple[Tensor, float]:
    """Concatenated output, and the root of the summed squares of its products."""
    outputs, squares = [], 0.0
    for group, layer in members:
        scheme = parse_scheme(recipe.schemes[layer.name])
        weight_OI = _weight(checkpoint, group, layer, scheme)
        inputs_TI = x_TI
        if scheme.activation is not None:
            amax = static_amax(group, scheme, recipe)
            inputs_TI = fake_quantize_activation(
                x_TI, scheme.activation, static_amax=None if amax is None else amax[layer.name]
            )
        y_TO = inputs_TI @ weight_OI.T
        bias = checkpoint.tensors.get(f"{layer.name}.bias")
        outputs.append(y_TO if bias is None else y_TO + read_tensor(bias).to(torch.float32))
        squares += float((inputs_TI.square() @ weight_OI.square().T).sum())
    return torch.cat(outputs, dim=1), squares**0.5


def _weight(
    checkpoint: Checkpoint, group: FusionGroup, layer: LinearLayer, scheme: Scheme
) -> Tensor:
    def read(each: LinearLayer) -> Tensor:
        return read_layer_rows(checkpoint, each, 0, each.out_features).to(torch.float32)

    if scheme.weight is None:
        return read(layer)
    amax = None
    if scheme.weight.needs_tensor_amax:
        amax = share_amax(group, {e.name: float(read(e).abs().max()) for e in group.layers})
    return fake_quantize_weight(
        read(layer),
        scheme.weight,
        tensor_amax=None if amax is None else amax[layer.name],
        name=layer.name,
    )


def compare_logprobs(
    checkpoint: Checkpoint,
    recipe: Recipe,
    windows: list[list[int]],
    logprobs: list[list[dict[str, float] | None]],
    dtype: str,
    report: dict[str, Any],
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

    Returns:
        What went wrong.
    """
    emulated = _emulated_logprobs(checkpoint, recipe, windows, "float32", nudge=0.0)
    floor = _emulated_logprobs(checkpoint, recipe, windows, dtype, nudge=UNITS[dtype])
    served, floored, distances, floor_distances, entropies = [], [], [], [], []
    for window, answers, expected, nudged in zip(windows, logprobs, emulated, floor, strict=True):
        for place, answer in enumerate(answers):
            if answer is None:
                continue
            keys = torch.tensor([int(key) for key in answer])
            found = torch.tensor(list(answer.values()), dtype=torch.float64)
            ours, theirs = expected[place - 1], nudged[place - 1]
            distances.append(_binned_kl(ours[keys], found))
            floor_distances.append(_binned_kl(ours[keys], theirs[keys]))
            token = window[place]
            entropies.append(-float(ours[token]))
            served.append(answer[str(token)] - float(ours[token]))
            floored.append(float(theirs[token] - ours[token]))
    return _judge(served, floored, distances, floor_distances, entropies, report)


def _judge(
    served: list[float],
    floored: list[float],
    distances: list[float],
    floor_distances: list[float],
    entropies: list[float],
    report: dict[str, Any],
) -> list[str]:
    difference = torch.tensor(served, dtype=torch.float64)
    noise = torch.tensor(floored, dtype=torch.float64)
    kl, kl_floor = (sum(each) / len(each) for each in (distances, floor_distances))
    limits = {
        "kl": _KL_FACTOR * kl_floor + _KL_ABSOLUTE,
        "max": _KL_FACTOR * float(noise.abs().max()) + 0.1,
        "mean": _MEAN_STANDARD_ERRORS * float(noise.square().mean()) ** 0.5 / len(served) ** 0.5
        + _KL_ABSOLUTE,
    }
    nll = sum(entropies) / len(entropies)
    report.update(
        positions=len(served),
        nll_emulated=nll,
        nll_served=nll - float(difference.mean()),
        kl_emulated_served=kl,
        kl_floor=kl_floor,
        kl_limit=limits["kl"],
        mean_abs_difference=float(difference.abs().mean()),
        max_abs_difference=float(difference.abs().max()),
        max_abs_limit=limits["max"],
        mean_difference=float(difference.mean()),
        mean_limit=limits["mean"],
    )
    checks = [
        ("KL divergence from the emulated recipe [nats]", kl, limits["kl"]),
        ("largest difference of a log-probability", float(difference.abs().max()), limits["max"]),
        ("difference of the mean log-probability", abs(float(difference.mean())), limits["mean"]),
    ]
    return [
        f"log-probabilities: {what} is {value:.4g}, expected at most {limit:.4g}"
        for what, value, limit in checks
        if not value <= limit
    ]


def _binned_kl(log_p: Tensor, log_q: Tensor) -> float:
    p, q = log_p.exp(), log_q.exp()
    rest_p, rest_q = ((1 - each.sum()).clamp(min=1e-12) for each in (p, q))
    return float((p * (log_p - log_q)).sum() + rest_p * (rest_p / rest_q).log())


def _emulated_logprobs(
    checkpoint: Checkpoint, recipe: Recipe, windows: list[list[int]], dtype: str, *, nudge: float
) -> list[Tensor]:
    """Log-probabilities of every token after every prefix, float64 [T, V] for each window."""
    model = apply(load_model(checkpoint.folder, dtype=dtype), recipe, checkpoint=checkpoint)
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
