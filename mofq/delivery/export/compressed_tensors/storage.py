"""How compressed-tensors writes each scheme down: its arguments, its format, its tensors.

======================  ========================================================
``int-quantized``       ``weight`` I8, ``weight_scale``; quantized activations
``float-quantized``     ``weight`` F8_E4M3, ``weight_scale``
``pack-quantized``      ``weight_packed`` I32, low bits first, code + 2^(b-1)
                        (asymmetric: the code itself); ``weight_scale``;
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

Source: compressed-tensors 0.20.0, ``compressors/`` and ``quantization/quant_args.py``;
the same in 0.17.0, which vLLM 0.32.0 pins, for what is written here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mofq.exceptions import BackendError
from mofq.numbers.formats import FP4_E2M1, FP8_E4M3, IntFormat
from mofq.numbers.schemes import Scheme, TensorScheme

Arguments = dict[str, Any]

#: 3, 5, 6 and 7 bits are packed with gaps by 0.17 and without by 0.20.
_PACKED_BITS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Storage:
    """What compressed-tensors makes of a scheme."""

    format: str
    weights: Arguments  #: of a ``QuantizationArgs``
    input_activations: Arguments | None  #: likewise


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
    weight = scheme.weight
    if weight is None:
        raise _cannot(where, scheme, "weights must be quantized where activations are", "bf16")
    if scheme.activation is not None and _has_own_rule(scheme.activation):
        raise _cannot(
            where, scheme, "engines round inputs by the plain rule alone", "plain activations"
        )
    microscaling = _microscaling(scheme, weight, where)
    if microscaling is not None:
        return microscaling
    if weight.scale.name not in ("bf16", "f32"):
        raise _cannot(
            where, scheme, f"it has no {weight.scale.name} scales for this format", "bf16 scales"
        )
    if isinstance(weight.element, IntFormat):
        return _integer(scheme, weight, weight.element, where)
    if weight.element is FP8_E4M3:
        return _float8(scheme, weight, where)
    if weight.element is FP4_E2M1:
        raise _cannot(
            where,
            scheme,
            "FP4 exists there as NVFP4 and MXFP4 alone, and engines read anything else as INT4",
            "nvfp4, mxfp4 or int4.gN",
        )
    raise _cannot(
        where, scheme, f"it has no element {weight.element.name}", "int4, int8 or fp8_e4m3"
    )


def _has_own_rule(activation: TensorScheme) -> bool:
    return (
        activation.scale_rule != "absmax"
        or activation.outliers > 0
        or activation.granularity.kind == "peg"
    )


def _integer(scheme: Scheme, weight: TensorScheme, element: IntFormat, where: str) -> Storage:
    arguments = {
        "num_bits": element.bits,
        "type": "int",
        "symmetric": weight.symmetric,
        **_tiles(scheme, weight, where),
        "dynamic": False,
    }
    activations = _activations(scheme, where)
    if element.bits == 8 and activations is not None:
        if weight.granularity.kind not in ("channel", "tensor"):
            raise _cannot(
                where,
                scheme,
                "no engine multiplies INT8 group weights with quantized activations",
                "int8.channel+int8.token, int8.gN (weight only) or FP8",
            )
        return Storage("int-quantized", arguments, activations)
    if element.bits not in _PACKED_BITS:
        raise _cannot(
            where,
            scheme,
            f"its releases disagree on how {element.bits}-bit codes are packed",
            "int4 or int8",
        )
    if weight.granularity.kind not in ("channel", "group"):
        raise _cannot(
            where, scheme, "packed codes have scales per channel or group", "channel or gN"
        )
    return Storage("pack-quantized", arguments, activations)


def _float8(scheme: Scheme, weight: TensorScheme, where: str) -> Storage:
    if weight.granularity.kind == "group":
        raise _cannot(
            where, scheme, "no engine reads FP8 group weights", "fp8_e4m3.channel or .block128"
        )
    arguments = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        **_tiles(scheme, weight, where),
        "dynamic": False,
    }
    return Storage("float-quantized", arguments, _activations(scheme, where))


def _microscaling(scheme: Scheme, weight: TensorScheme, where: str) -> Storage | None:
    element, scale, size = weight.element, weight.scale.name, weight.granularity.columns
    if weight.granularity.kind != "group":
        return None
    if element is FP4_E2M1 and scale == "e4m3" and size == 16:
        arguments = _nvfp4_arguments()
        activations = None
        if scheme.activation is not None:
            _require_same_format(scheme, where)
            activations = {**arguments, "dynamic": "local"}
        return Storage("nvfp4-pack-quantized", arguments, activations)
    if scale not in ("e8m0", "e8m0ceil") or size != 32 or element not in (FP4_E2M1, FP8_E4M3):
        return None
    arguments = {
        "num_bits": element.bits,
        "type": "float",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
        "scale_dtype": "torch.uint8",
    }
    activations = None
    if scheme.activation is not None:
        _require_same_format(scheme, where)
        activations = {**arguments, "dynamic": True}
    name = "mxfp4-pack-quantized" if element is FP4_E2M1 else "mxfp8-quantized"
    return Storage(name, arguments, activations)


def _nvfp4_arguments() -> Arguments:
    return {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
    }


def _require_same_format(scheme: Scheme, where: str) -> None:
    weight, activation = scheme.weight, scheme.activation
    assert weight is not None
    assert activation is not None
    same = (weight.element, weight.granularity, weight.scale) == (
        activation.element,
        activation.granularity,
        activation.scale,
    )
    if not same:
        raise _cannot(
            where,
            scheme,
            "microscaling weights go with activations of the same format",
            "the same words on both sides of the '+', or none after it",
        )


def _tiles(scheme: Scheme, operand: TensorScheme, where: str) -> Arguments:
    granularity = operand.granularity
    if granularity.kind == "unscaled":
        raise _cannot(where, scheme, "every format there has a scale", "fp8_e4m3.tensor")
    if granularity.kind == "tensor" and not operand.symmetric:
        raise _cannot(where, scheme, "zero points come per channel or group", "a symmetric scheme")
    if granularity.kind == "group":
        return {"strategy": "group", "group_size": granularity.columns}
    if granularity.kind == "block":
        return {"strategy": "block", "block_structure": [granularity.rows, granularity.columns]}
    return {"strategy": granularity.kind}


def _activations(scheme: Scheme, where: str) -> Arguments | None:
    activation = scheme.activation
    if activation is None:
        return None
    if activation.scale.name != "f32":
        raise _cannot(
            where, scheme, "scales of activations are f32 in every engine", "no scale after the '+'"
        )
    is_int = isinstance(activation.element, IntFormat)
    if activation.element.bits != 8 or not (is_int or activation.element is FP8_E4M3):
        raise _cannot(
            where,
            scheme,
            f"no engine has {activation.element.name} activations",
            "int8 or fp8_e4m3",
        )
    is_static = activation.granularity.kind == "tensor"
    if is_static and not activation.symmetric:
        raise _cannot(
            where, scheme, "a static zero point needs more than a maximum", "a symmetric scheme"
        )
    return {
        "num_bits": 8,
        "type": "int" if is_int else "float",
        "symmetric": activation.symmetric,
        **_tiles(scheme, activation, where),
        "dynamic": not is_static,
    }


def _cannot(where: str, scheme: Scheme, why: str, instead: str) -> BackendError:
    return BackendError(
        f"{where}: compressed-tensors cannot hold {scheme.name}: {why}. Take {instead}."
    )
