"""How compressed-tensors writes each scheme down: its arguments, its format, its tensors.

======================  ========================================================
``int-quantized``       ``weight`` I8, ``weight_scale``; quantized activations
``float-quantized``     ``weight`` F8_E4M3, ``weight_scale``
``pack-quantized``      ``weight_packed`` I32, without gaps, low bits first,
                        code + 2^(b-1) (asymmetric: the code itself); 2 to 8
                        bits; ``weight_scale``;
                        ``weight_shape`` I64; ``weight_zero_point`` I32, packed
                        down the rows
``nvfp4-pack-``         ``weight_packed`` U8, the even column in the low half;
``quantized``           ``weight_scale`` F8_E4M3; ``weight_global_scale`` F32,
                        a divisor; ``input_global_scale``, a divisor
``mxfp4-pack-``         ``weight_packed`` U8; ``weight_scale`` U8, the exponent
``quantized``           with bias 127
``mxfp8-quantized``     ``weight`` F8_E4M3; ``weight_scale`` U8
======================  ========================================================

A static activation scale adds ``input_scale`` F32. Scales are multipliers but
for the global ones.

Source: compressed-tensors 0.20.0, ``compressors/`` and ``quantization/quant_args.py``. Version
0.17.0, which vLLM 0.32.0 and 0.33.0 pin, packs 3, 5, 6 and 7 bits with gaps, but vLLM unpacks
them itself, without gaps (``ct/schemes/compressed_tensors_wNa16.py``, the shape of
``weight_packed``; humming-kernels 0.1.19 ``include/humming/kernel/pack_weight.cuh``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mofq.engines.groups import embedding_role
from mofq.engines.scheme_names import format_name
from mofq.exceptions import BackendError
from mofq.model.layers import AnyGroup
from mofq.numbers.formats import FP4_E2M1, FP8_E4M3, IntFormat
from mofq.numbers.schemes import Scheme, TensorScheme

Arguments = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Storage:
    """What compressed-tensors makes of a scheme."""

    format: str
    weights: Arguments  #: of a ``QuantizationArgs``
    input_activations: Arguments | None  #: likewise


class _CannotHoldError(Exception):
    """Why compressed-tensors cannot hold a scheme, and what to take instead."""


def scheme_problem(scheme: Scheme, group: AnyGroup) -> str | None:
    """Why compressed-tensors cannot hold a quantized scheme of a fusion group, or None."""
    # Experts and embeddings are stored as linear layers are.
    if problem := tied_problem(group):
        return problem
    try:
        _storage(scheme)
    except _CannotHoldError as reason:
        return f"cannot hold layers in {format_name(scheme)}: {reason}"
    return None


def tied_problem(group: AnyGroup) -> str | None:
    """Why no loader reads a quantized fusion group, where it is a tied embedding, or None.

    Source: compressed-tensors 0.20.0 ``compressors/base.py``; transformers 5.23.0
    ``modeling_utils.py``, ``tie_weights``; vLLM 0.32.0 ``layers/vocab_parallel_embedding.py:634``:
    what is tied is ``weight``.
    """
    if embedding_role(group) != "tied":
        return None
    return (
        "stores codes and scales, and loaders tie an lm_head to a `weight` alone, so that it would "
        "have none; take bf16 for the embedding"
    )


def storage_of(scheme: Scheme, *, where: str) -> Storage:
    """The storage of a quantized scheme.

    Args:
        scheme: Not the unquantized one.
        where: The layer, for messages.

    Returns:
        Format and arguments.

    Raises:
        BackendError: compressed-tensors has no words for the scheme, or no engine
            reads them; the message says what to take instead.
    """
    try:
        return _storage(scheme)
    except _CannotHoldError as reason:
        raise BackendError(
            f"{where}: compressed-tensors cannot hold {scheme.name}: {reason}."
        ) from None


def _storage(scheme: Scheme) -> Storage:
    weight, activation = scheme.weight, scheme.activation
    if weight is None:
        raise _cannot("weights must be quantized where activations are", "bf16")
    if activation is not None and _has_own_rule(activation):
        raise _cannot("engines round inputs by the plain rule alone", "plain activations")
    microscaling = _microscaling(weight)
    if microscaling is not None:
        name, arguments, dynamic = microscaling
        if activation is None:
            return Storage(name, arguments, None)
        _require_same_format(weight, activation)
        return Storage(name, arguments, {**arguments, "dynamic": dynamic})
    if weight.scale.name not in ("bf16", "f32"):
        raise _cannot(f"it has no {weight.scale.name} scales for this format", "bf16 scales")
    if isinstance(weight.element, IntFormat):
        weights, inputs = _plain_arguments(scheme, weight)
        return Storage(_integer_format(weight, has_inputs=inputs is not None), weights, inputs)
    if weight.element is FP8_E4M3 and weight.granularity.kind == "group":
        raise _cannot("no engine reads FP8 group weights", "fp8_e4m3.channel or .block128")
    if weight.element is FP8_E4M3:
        return Storage("float-quantized", *_plain_arguments(scheme, weight))
    if weight.element is FP4_E2M1:
        raise _cannot(
            "FP4 exists there as NVFP4 and MXFP4 alone, and engines read anything else as INT4",
            "nvfp4, mxfp4 or int4.gN",
        )
    raise _cannot(f"it has no element {weight.element.name}", "int4, int8 or fp8_e4m3")


def _plain_arguments(scheme: Scheme, weight: TensorScheme) -> tuple[Arguments, Arguments | None]:
    weights = _arguments(weight, _tiles(weight), dynamic=False)
    return weights, None if scheme.activation is None else _activations(scheme.activation)


def _has_own_rule(activation: TensorScheme) -> bool:
    return (
        activation.scale_rule != "absmax"
        or activation.outliers > 0
        or activation.granularity.kind == "peg"
    )


def _integer_format(weight: TensorScheme, *, has_inputs: bool) -> str:
    bits, kind = weight.element.bits, weight.granularity.kind
    if bits == 8 and has_inputs:
        if kind not in ("channel", "tensor"):
            raise _cannot(
                "no engine multiplies INT8 group weights with quantized activations",
                "int8.channel+int8.token, int8.gN (weight only) or FP8",
            )
        return "int-quantized"
    if kind not in ("channel", "group"):
        raise _cannot("packed codes have scales per channel or group", "channel or gN")
    return "pack-quantized"


def _microscaling(weight: TensorScheme) -> tuple[str, Arguments, bool | str] | None:
    """Format, arguments, and how inputs are scaled on the fly, of NVFP4 and the MX formats."""
    element, scale, size = weight.element, weight.scale.name, weight.granularity.columns
    if weight.granularity.kind != "group":
        return None
    if element is FP4_E2M1 and scale == "e4m3" and size == 16:
        tiles = {"strategy": "tensor_group", "group_size": 16}
        arguments = _arguments(weight, tiles, dynamic=False)
        arguments["scale_dtype"] = "torch.float8_e4m3fn"
        return "nvfp4-pack-quantized", arguments, "local"
    if scale not in ("e8m0", "e8m0ceil") or size != 32 or element not in (FP4_E2M1, FP8_E4M3):
        return None
    arguments = _arguments(weight, _tiles(weight), dynamic=False)
    arguments["scale_dtype"] = "torch.uint8"
    return "mxfp4-pack-quantized" if element is FP4_E2M1 else "mxfp8-quantized", arguments, True


def _require_same_format(weight: TensorScheme, activation: TensorScheme) -> None:
    same = (weight.element, weight.granularity, weight.scale) == (
        activation.element,
        activation.granularity,
        activation.scale,
    )
    if not same:
        raise _cannot(
            "microscaling weights go with activations of the same format",
            "the same words on both sides of the '+', or none after it",
        )


def _arguments(operand: TensorScheme, tiles: Mapping[str, Any], *, dynamic: bool) -> Arguments:
    return {
        "num_bits": operand.element.bits,
        "type": "int" if isinstance(operand.element, IntFormat) else "float",
        "symmetric": operand.symmetric,
        **tiles,
        "dynamic": dynamic,
    }


def _tiles(operand: TensorScheme) -> Arguments:
    granularity = operand.granularity
    if granularity.kind == "unscaled":
        raise _cannot("every format there has a scale", "fp8_e4m3.tensor")
    if granularity.kind == "tensor" and not operand.symmetric:
        raise _cannot("zero points come per channel or group", "a symmetric scheme")
    if granularity.kind == "group":
        return {"strategy": "group", "group_size": granularity.columns}
    if granularity.kind == "block":
        return {"strategy": "block", "block_structure": [granularity.rows, granularity.columns]}
    return {"strategy": granularity.kind}


def _activations(activation: TensorScheme) -> Arguments:
    if activation.scale.name != "f32":
        raise _cannot("scales of activations are f32 in every engine", "no scale after the '+'")
    element = activation.element
    if element.bits != 8 or not (isinstance(element, IntFormat) or element is FP8_E4M3):
        raise _cannot(f"no engine has {element.name} activations", "int8 or fp8_e4m3")
    is_static = activation.granularity.kind == "tensor"
    if is_static and not activation.symmetric:
        raise _cannot("a static zero point needs more than a maximum", "a symmetric scheme")
    return _arguments(activation, _tiles(activation), dynamic=not is_static)


def _cannot(why: str, instead: str) -> _CannotHoldError:
    return _CannotHoldError(f"{why}. Take {instead}")
