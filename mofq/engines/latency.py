"""How long a forward pass takes at least: bytes moved and operations on a named device.

A fusion group is one matrix product; experts are two, gate and up together, then down. It
takes the longer of what its bytes need (weights as exported, inputs at their quantized
width, outputs in bf16) and what its operations need,
at the peak of the arithmetic that its kernel uses: INT8, FP8 or FP4 where weights and
activations are quantized and the device has the instruction, else bf16 (weight-only
kernels unpack to it). Quantizing an activation is fused with what produces it, scales of
activations and the start of kernels are neglected, and tensor parallelism divides all
of it, without its communication: so these are lower bounds, and good for comparing schemes.

Source: the roofline model, S. Williams, A. Waterman, D. Patterson, CACM 52 (2009), 65.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mofq.engines.devices import DeviceModel
from mofq.engines.groups import embedding_role, is_experts
from mofq.exceptions import BudgetError, nearest_name
from mofq.model.layers import FUSION_RULES, AnyGroup, attention_of
from mofq.model.sizes import layer_bytes
from mofq.numbers.formats import IntFormat
from mofq.numbers.schemes import Scheme

Phase = Literal["prefill", "decode"]

_ACTIVATION_BYTES = 2  #: bf16
#: What a workload must say, and what it may, with the value where it does not.
_KEYS: dict[str, dict[str, int | None]] = {
    "decode": {"batch": None, "context": None, "tp": 1, "experts_per_token": 0},
    "prefill": {"batch": 1, "prompt": None, "tp": 1, "experts_per_token": 0},
}
#: One matrix with the gate, so that both read their inputs once.
_UP_MODULES = frozenset(f"experts.{f.experts.up}" for f in FUSION_RULES.values() if f.experts)
_TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_EXAMPLE = "Write e.g. decode:batch=8,context=1024 or prefill:prompt=2048."


@dataclass(frozen=True, slots=True)
class Workload:
    """One forward pass: the tokens that it computes, and those that it looks back on."""

    text: str  #: as it was written
    phase: Phase
    batch: int  #: sequences
    tokens: int  #: computed for each sequence: 1, or the prompt
    context: int  #: tokens of each sequence in the KV cache before the pass
    tp: int  #: devices that share every layer
    experts_per_token: int  #: of a mixture of experts; 0: not said

    @property
    def positions(self) -> int:
        """Tokens that pass through every linear layer."""
        return self.batch * self.tokens


def parse_workload(text: str) -> Workload:
    """A workload from ``decode:batch=8,context=1024`` or ``prefill:prompt=2048``.

    Args:
        text: The phase, a colon, and keys: ``batch`` (sequences), ``context`` (tokens in the
            KV cache) or ``prompt`` (tokens of each sequence), ``tp`` (devices of tensor
            parallelism), ``experts_per_token`` (for a mixture of experts).

    Raises:
        BudgetError: The text is not a workload.
    """
    phase, _, rest = text.partition(":")
    if phase not in _KEYS:
        raise BudgetError(f"workload {text!r}: no phase is called {phase!r}. {_EXAMPLE}")
    values = {key: value for key, value in _KEYS[phase].items() if value is not None}
    for part in filter(None, rest.split(",")):
        key, _, number = part.partition("=")
        if key not in _KEYS[phase]:
            raise BudgetError(
                f"workload {text!r}: {phase} has no {key!r}." + nearest_name(key, _KEYS[phase])
            )
        if not re.fullmatch(r"[1-9]\d{0,8}", number, re.ASCII):
            raise BudgetError(f"workload {text!r}: {key} must be a whole number of at least 1.")
        values[key] = int(number)
    missing = [key for key in _KEYS[phase] if key not in values]
    if missing:
        raise BudgetError(f"workload {text!r}: {missing[0]} is missing. {_EXAMPLE}")
    return Workload(
        text,
        "decode" if phase == "decode" else "prefill",
        batch=values["batch"],
        tokens=values.get("prompt", 1),
        context=values.get("context", 0),
        tp=values["tp"],
        experts_per_token=values["experts_per_token"],
    )


def parse_seconds(text: str) -> float:
    """Seconds from ``"12ms"``, ``"0.4s"`` or ``"800us"``.

    Raises:
        BudgetError: The text is not a time.
    """
    words = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zµ]+)", text.strip())
    if words is None or words[2] not in _TIME_UNITS:
        raise BudgetError(f"{text!r} is not a time. Write e.g. 12ms, 0.4s or 800us.")
    return float(words[1]) * _TIME_UNITS[words[2]]


def arithmetic(scheme: Scheme, device: DeviceModel) -> str:
    """What the matrix instructions of a scheme's kernel multiply on a device.

    Returns:
        A key of the device's ``operations_per_second``.
    """
    if scheme.weight is None or scheme.activation is None:
        return "bf16"
    activation = scheme.activation.element
    if isinstance(activation, IntFormat):
        wanted = "int8"
    else:
        is_fp4 = max(activation.bits, scheme.weight.element.bits) <= 4
        wanted = "fp4" if is_fp4 else "fp8"
    return wanted if wanted in device.operations_per_second else "bf16"


def group_seconds(
    group: AnyGroup, scheme: Scheme, device: DeviceModel, workload: Workload
) -> float:
    """The least time that one fusion group of a model takes under a scheme [s].

    Args:
        group: Layers that are multiplied by one kernel; experts are multiplied with those
            tokens that are routed to them, evenly; an embedding is looked up, in no time.
        scheme: Of its weights and inputs.
        device: Its memory and its arithmetic.
        workload: How many tokens there are.

    Raises:
        BudgetError: The group has experts, and the workload does not say how many a token takes.
    """
    if embedding_role(group) == "lookup":
        return 0.0  # a few rows
    layers = group.layers
    tokens, touched = float(workload.positions), 1.0
    inputs: float = tokens * layers[0].in_features
    if is_experts(group):
        share = _share_of_experts(group, workload)
        touched = 1 - (1 - share) ** workload.positions  # a weight that no token needs stays put
        tokens *= share
        inputs = tokens * sum(la.in_features for la in layers if la.module not in _UP_MODULES)
    weight_bytes = touched * sum(layer_bytes(layer, scheme) for layer in layers)
    activation = scheme.activation
    input_bytes = inputs * (
        _ACTIVATION_BYTES if activation is None else activation.element.bits / 8
    )
    output_bytes = tokens * _ACTIVATION_BYTES * sum(layer.out_features for layer in layers)
    operations = 2 * tokens * sum(layer.weights for layer in layers)
    moving = (weight_bytes + input_bytes + output_bytes) / device.bytes_per_second
    computing = operations / device.operations_per_second[arithmetic(scheme, device)]
    return max(moving, computing) / workload.tp


def _share_of_experts(group: AnyGroup, workload: Workload) -> float:
    experts = sum(layer.module == group.layers[0].module for layer in group.layers)
    if not workload.experts_per_token:
        raise BudgetError(
            f"{group.name}: a mixture of {experts} experts; how long it takes depends on how many "
            f"of them a token is sent to. Add it to the workload: "
            f"{workload.text},experts_per_token=2"
        )
    return min(1.0, workload.experts_per_token / experts)


def other_seconds(
    groups: Sequence[AnyGroup],
    device: DeviceModel,
    workload: Workload,
    *,
    other_bytes: int,
    has_own_lm_head: bool,
) -> float:
    """The least time of what no choice on layers changes: attention, and the lm_head [s].

    Args:
        groups: All of the model.
        device: Its memory and its bf16 arithmetic.
        workload: How many tokens there are.
        other_bytes: All tensors that are not weights of the groups; nearly all are the
            embedding and the lm_head.
        has_own_lm_head: Whether these are two tensors, of which the embedding is only looked up.

    Raises:
        BudgetError: Attention reads latent vectors (DeepSeek), whose time is not known here.
    """
    attention = sum(_attention(groups, device, workload, {}).values())
    head_bytes = other_bytes / 2 if has_own_lm_head else other_bytes
    operations = workload.batch * head_bytes  # 2 for each weight of 2 bytes
    head = _roofline(head_bytes, operations, device)
    return (attention + head) / workload.tp


def attention_seconds(
    groups: Sequence[AnyGroup],
    device: DeviceModel,
    workload: Workload,
    *,
    cache_bits: Mapping[str, int],
) -> dict[str, float]:
    """The least time of attention over the KV cache [s].

    Args:
        groups: All of the model; attention's sizes are read from ``…attn.qkv`` (or ``…qkvg``) and
            ``…attn.o``.
        device: Its memory and its bf16 arithmetic, which kernels unpack a quantized cache to.
        workload: How many tokens there are.
        cache_bits: What a token takes in the cache of a layer, ``…attn.kv_cache`` [bits]; of
            those that are not named, 16 for each number.

    Returns:
        Name of a layer's cache -> time.

    Raises:
        BudgetError: As for `other_seconds`.
    """
    found = _attention(groups, device, workload, cache_bits)
    return {name: seconds / workload.tp for name, seconds in found.items()}


def _attention(
    groups: Sequence[AnyGroup],
    device: DeviceModel,
    workload: Workload,
    cache_bits: Mapping[str, int],
) -> dict[str, float]:
    """On a single device."""
    latent = next((group.name for group in groups if group.name.endswith(".attn.latent")), None)
    if latent is not None:
        raise BudgetError(
            f"{latent}: the time of attention over latent vectors is not known here. Give a budget "
            f"of size or bits in place of one of time."
        )
    by_name = {group.name: group for group in groups}
    found = {}
    for name, qkv in by_name.items():
        attention = attention_of(name)
        output = by_name.get(f"{attention}.o")
        if attention is not None and output is not None:
            q = output.layers[0].in_features
            kv = sum(layer.out_features for layer in qkv.layers[:3]) - q
            cache = f"{attention}.kv_cache"
            kept = cache_bits.get(cache, 8 * _ACTIVATION_BYTES * kv) / 8
            found[cache] = _attention_seconds(q, kept, device, workload)
    return found


def _attention_seconds(q: int, kept: float, device: DeviceModel, workload: Workload) -> float:
    """Of one decoder layer: q columns of queries; bytes of keys and values kept of a token."""
    seen = workload.context + workload.tokens  # written once, and read
    pairs = workload.tokens * workload.context + workload.tokens * (workload.tokens + 1) / 2
    moved = workload.batch * (seen * kept + 2 * workload.tokens * q * _ACTIVATION_BYTES)
    return _roofline(moved, 4 * workload.batch * pairs * q, device)


def _roofline(moved_bytes: float, operations: float, device: DeviceModel) -> float:
    peak = device.operations_per_second["bf16"]
    return max(moved_bytes / device.bytes_per_second, operations / peak)


def shown_seconds(seconds: float) -> str:
    """``12.3 ms``: three digits, in the unit that suits."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"
