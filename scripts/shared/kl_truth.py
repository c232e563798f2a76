"""Measures the KL divergence of many quantized versions of one model, cheaply and resumably.

A part of the bench scripts. The original runs once over each window of text; the hidden
states that enter its decoder layers and its logits are kept. A version whose first
quantized layer is in decoder layer i then runs from there on, on the kept state. Every
number goes to a file of JSON lines as soon as it is known, and is not computed again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mofq.decision import recipe_from_layers
from mofq.decision.recipe import Recipe
from mofq.delivery.backends import apply_recipe
from mofq.evidence.corpora import Corpus, leading_tokens
from mofq.evidence.metrics import kl_divergence
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import LinearLayer, ModelLayers
from mofq.model.loading import load_model, load_tokenizer
from scripts.shared.windows import model_windows

#: The version of mofq since which its quantizers give the same numbers; what was measured with
#: another one is not used again.
QUANTIZER = "0.1.0"

#: Windows that a text is cut into; a run uses the first few of a fixed, spread order, so that
#: a run on more windows keeps the measurements of the earlier one.
WINDOWS = 16


@dataclass(frozen=True, slots=True)
class Version:
    """A way to quantize the model."""

    label: str  #: for people
    schemes: Mapping[str, str]  #: fusion group -> scheme; those left out stay as they are


@dataclass(frozen=True, slots=True)
class Original:
    """The original after its run, one entry for each window."""

    model: PreTrainedModel
    layers: ModelLayers
    windows_NT: Tensor
    states: tuple[tuple[Tensor, ...], ...]  #: what enters each decoder layer, [1, T, hidden]
    logits: tuple[Tensor, ...]  #: [T, V]


@dataclass(frozen=True, slots=True)
class Truths:
    """Measured KL [nats per token] of each window under each version; see `measure_truths`."""

    index_sha256: str
    windows_NT: Tensor
    known: dict[str, float]

    def of(self, version: Version) -> list[float]:
        """KL of every window [nats per token]."""
        return [self.known[key] for key in self.keys(version)]

    def missing(self, version: Version) -> list[int]:
        """The windows that were not measured."""
        return [n for n, key in enumerate(self.keys(version)) if key not in self.known]

    def keys(self, version: Version) -> list[str]:
        """What identifies a measurement: model, quantizer, window, schemes."""
        chosen = sorted(item for item in version.schemes.items() if item[1] != "bf16")
        version_text = json.dumps([QUANTIZER, self.index_sha256, chosen])
        return [
            hashlib.sha256(version_text.encode() + window_T.numpy().tobytes()).hexdigest()[:24]
            for window_T in self.windows_NT
        ]


def text_windows(
    checkpoint: Checkpoint, text: Corpus, *, windows: int, sequence_length: int
) -> Tensor:
    """The first windows of a spread order over a whole text, [windows, sequence_length]."""
    if windows > WINDOWS:
        raise SystemExit(f"{windows} windows: at most {WINDOWS}. Use longer windows.")
    spread_NT = model_windows(
        checkpoint,
        text,
        windows=WINDOWS,
        sequence_length=sequence_length,
    )
    return spread_NT[spread_order(WINDOWS)[:windows]].contiguous()


def windows_between(
    checkpoint: Checkpoint, text: Corpus, *, sequences: int, windows: int, sequence_length: int
) -> Tensor:
    """Windows halfway between the sequences that a calibration on the same text takes.

    Args:
        checkpoint: The model.
        text: That was calibrated on.
        sequences: Of the calibration.
        windows: How many, spread evenly over the gaps; the same for any one number.
        sequence_length: Tokens of each, and of each sequence.
    """
    tokenizer = load_tokenizer(checkpoint.folder)
    leading = leading_tokens(tokenizer, "auto")
    ids = tokenizer(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    spacing = (len(ids) - sequence_length) / (sequences - 1)
    if len(text.text) > 64 * sequences * sequence_length or spacing < 2 * sequence_length:
        raise SystemExit("the text is too long or too short for windows between its sequences.")
    gaps = [(2 * n + 1) * (sequences - 1) // (2 * windows) for n in range(windows)]
    starts = [round((gap + 0.5) * spacing) for gap in gaps]
    own = sequence_length - len(leading)
    return torch.tensor([[*leading, *ids[start : start + own]] for start in starts])


def spread_order(count: int) -> list[int]:
    """An order of ``range(count)`` whose beginnings are spread evenly: its bits reversed.

    Source: the van der Corput sequence in base 2.
    """
    bits = (count - 1).bit_length()
    turned = (int(format(n, f"0{bits}b")[::-1], 2) for n in range(2**bits))
    return [n for n in turned if n < count]


def measure_truths(
    windows_NT: Tensor,
    versions: Sequence[Version],
    *,
    checkpoint: Checkpoint,
    layers: ModelLayers,
    path: Path,
) -> Truths:
    """Measure every version on every window where it is not known yet.

    Args:
        windows_NT: Token ids of each window.
        versions: What to measure.
        checkpoint: The model.
        layers: Its layers.
        path: JSON lines of what was measured before, a half last one left out; each measurement
            is added.
    """
    lines = path.read_text("utf-8").split("\n")[:-1] if path.exists() else []
    known = {one["key"]: one["kl"] for one in map(json.loads, lines)}
    truths = Truths(checkpoint.index_sha256, windows_NT, known)
    waiting = [one for one in versions if truths.missing(one)]
    if not waiting:
        return truths
    original = run_original(load_model(checkpoint.folder), layers=layers, windows_NT=windows_NT)
    for done, version in enumerate(waiting):
        windows, keys = truths.missing(version), truths.keys(version)
        for n, kl in zip(windows, true_kl(original, version, windows), strict=True):
            line = {"key": keys[n], "label": version.label, "window": n, "kl": kl}
            _append_line(path, json.dumps(line))
            truths.known[keys[n]] = kl
        print(f"{done + 1}/{len(waiting)} {version.label}", file=sys.stderr, flush=True)
    return truths


def _append_line(path: Path, line: str) -> None:
    """Add a line; a half one that a killed run left is cut off first."""
    data = path.read_bytes() if path.exists() else b""
    with path.open("r+b" if data else "wb") as file:
        file.truncate(data.rfind(b"\n") + 1)
        file.seek(0, 2)
        file.write(line.encode() + b"\n")


@torch.inference_mode()
def run_original(model: PreTrainedModel, *, layers: ModelLayers, windows_NT: Tensor) -> Original:
    """Run the original over all windows and keep what `true_kl` needs.

    Args:
        model: Without a key-value cache, in eval mode.
        layers: Of its checkpoint.
        windows_NT: Token ids.
    """
    states: list[tuple[Tensor, ...]] = []
    logits = []
    seen: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handles = [
        layer.register_forward_pre_hook(keep, with_kwargs=True)
        for layer in find_decoder_layers(model)
    ]
    for window_T in windows_NT:
        seen.clear()
        logits.append(model(window_T[None]).logits[0])
        states.append(tuple(seen))
    for handle in handles:
        handle.remove()
    return Original(model, layers, windows_NT, tuple(states), logits=tuple(logits))


def find_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of decoder layers."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) and _has_attention(module[0]):
            return module
    raise SystemExit("the model has no list of decoder layers with `self_attn` or `attn`.")


def _has_attention(layer: nn.Module) -> bool:
    return hasattr(layer, "self_attn") or hasattr(layer, "attn")


@torch.inference_mode()
def true_kl(original: Original, version: Version, windows: Sequence[int]) -> list[float]:
    """KL(original || version) over some windows, as the mean over their positions.

    Args:
        original: From `run_original`.
        version: What to measure.
        windows: Which windows.

    Returns:
        Nats per token of each window.
    """
    first = _first_decoder_layer(original.layers, version)
    with _applied(original, version):
        return [
            float(kl_divergence(original.logits[n], _run_from(original, first, n)).mean())
            for n in windows
        ]


def _first_decoder_layer(layers: ModelLayers, version: Version) -> int:
    return min((layer.decoder_layer or 0 for layer in _quantized(layers, version)), default=0)


def _quantized(layers: ModelLayers, version: Version) -> Iterator[LinearLayer]:
    for group in layers.groups:
        if version.schemes.get(group.name, "bf16") != "bf16":
            yield from group.layers


def _run_from(original: Original, first: int, window: int) -> Tensor:
    """Logits with every decoder layer before ``first`` replaced by the state it led to."""
    state = original.states[window][first]
    skipped = list(find_decoder_layers(original.model))[:first]
    for layer in skipped:
        layer.forward = lambda *_args, **_kwargs: state  # type: ignore[method-assign]
    try:
        logits_TV: Tensor = original.model(original.windows_NT[window][None]).logits[0]
    finally:
        for layer in skipped:
            del layer.forward
    return logits_TV


@contextmanager
def _applied(original: Original, version: Version) -> Iterator[None]:
    """Emulate a version for as long as the context lasts."""
    names = [layer.name for layer in _quantized(original.layers, version)]
    modules = {name: original.model.get_submodule(name) for name in names}
    apply_recipe(original.model, recipe_of(original.layers, version))
    try:
        yield
    finally:
        for name, module in modules.items():
            parent, _, word = name.rpartition(".")
            setattr(original.model.get_submodule(parent), word, module)


def recipe_of(layers: ModelLayers, version: Version) -> Recipe:
    """A version as a recipe. Static activations, which need a calibrated scale, are refused."""
    others = dict.fromkeys((group.name for group in layers.groups), "bf16")
    return recipe_from_layers(layers, {**others, **version.schemes})
