"""Schemes: what is done to the weights and activations of a layer, under one name.

``element.granularity[.asym][.outN][.s-SCALE][@RULE][~ROUNDING]`` for the weights,
then optionally ``+`` and the same for the activations. Defaults (symmetric, bf16
scale for weights and f32 for activations, absmax, to nearest) are not written. ``~gptq``
rounds column by column, by what calibration says of the inputs; ``~descent`` goes over its
columns again. ``.outN``, for activations alone, leaves input columns that reach the magnitude N
as they are. ``pegK``, for activations alone, sorts the columns of a sequence by range before it
cuts them into K groups.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeVar, get_args

from mofq.exceptions import SchemeError, nearest_name
from mofq.numbers.formats import (
    ELEMENT_FORMATS,
    SCALE_FORMATS,
    ElementFormat,
    FloatFormat,
    IntFormat,
    ScaleFormat,
)

GranularityKind = Literal["unscaled", "tensor", "channel", "token", "group", "peg", "block"]
#: From simple to intricate: ties are decided in this order.
ScaleRule = Literal["absmax", "fullrange", "fouroversix", "stored", "mse", "nats"]
Rounding = Literal["nearest", "gptq", "descent"]
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Granularity:
    """Which elements share a scale: a tile of ``rows`` by ``columns``; 0 means all of them.

    Of the kind ``peg``, ``columns`` is the number of groups that the columns are cut into, sorted
    by their range first.
    """

    kind: GranularityKind
    rows: int
    columns: int

    @property
    def name(self) -> str:
        """As it is written in a scheme name."""
        if self.kind in ("group", "peg"):
            return f"{'g' if self.kind == 'group' else 'peg'}{self.columns}"
        if self.kind == "block":
            tile = f"{self.rows}" if self.rows == self.columns else f"{self.rows}x{self.columns}"
            return f"block{tile}"
        return self.kind


@dataclass(frozen=True, slots=True)
class TensorScheme:
    """How one operand (a weight, or the input of a layer) is quantized."""

    element: ElementFormat
    granularity: Granularity
    symmetric: bool
    scale: ScaleFormat
    scale_rule: ScaleRule
    rounding: Rounding
    outliers: int = 0  #: input columns of at least this magnitude stay as they are; 0: none

    def __hash__(self) -> int:
        # Asked for with every layer and block; that of all fields of all fields takes ten times as
        # long.
        tile = self.granularity
        return hash((self.element.name, tile.kind, tile.rows, tile.columns, self.scale.name))

    @property
    def has_scale(self) -> bool:
        """Whether any scale is stored."""
        return self.granularity.kind != "unscaled"

    @property
    def needs_tensor_amax(self) -> bool:
        """Whether a number of the whole tensor must be known before its first row."""
        return self.granularity.kind == "tensor" or self.scale.global_scale_bits > 0

    @property
    def has_searched_scale(self) -> bool:
        """Whether the rule takes the best of some scales, and is no formula."""
        return self.scale_rule not in ("absmax", "fullrange")

    @property
    def has_stored_global_scale(self) -> bool:
        """Whether the scale of the whole tensor is that of a source, and not of its numbers."""
        return self.scale_rule == "stored" and self.scale.global_scale_bits > 0

    @property
    def is_fitted(self) -> bool:
        """Whether scales or codes follow from calibration statistics of the layer."""
        return self.scale_rule == "nats" or self.rounds_by_hessian

    @property
    def rounds_by_hessian(self) -> bool:
        """Whether codes are chosen by what they cost together, from the layer's inputs."""
        return self.rounding != "nearest"

    @property
    def columns_multiple(self) -> int:
        """What the number of columns must be a multiple of."""
        return max(self.granularity.columns, self.scale.shared_columns, 1)


@dataclass(frozen=True, slots=True)
class Scheme:
    """One choice for a layer. The name is the identity.

    ``weight`` is None where the weights stay at the checkpoint's own precision,
    ``activation`` where the inputs do; the scheme ``bf16`` has neither.
    """

    name: str
    weight: TensorScheme | None
    activation: TensorScheme | None

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def quantized_weight(self) -> TensorScheme:
        """How the weight is quantized, for callers that know that it is."""
        assert self.weight is not None, self.name
        return self.weight

    @property
    def is_unquantized(self) -> bool:
        """Whether the layer is left as it is."""
        return self.weight is None and self.activation is None

    @property
    def is_fitted(self) -> bool:
        """Whether scales or codes of the weight follow from calibration statistics."""
        return self.weight is not None and self.weight.is_fitted

    @property
    def needs_weight_amax(self) -> bool:
        """Whether the largest weight must be known before the first row is rounded."""
        return self.weight is not None and self.weight.needs_tensor_amax

    @property
    def has_static_inputs(self) -> bool:
        """Whether the inputs have a scale from calibration."""
        return self.activation is not None and self.activation.needs_tensor_amax


#: Published formats that have a name of their own.
ALIASES = {
    "nvfp4": "fp4_e2m1.g16.s-e4m3",
    "mxfp4": "fp4_e2m1.g32.s-e8m0",
    "mxfp6_e3m2": "fp6_e3m2.g32.s-e8m0",
    "mxfp6_e2m3": "fp6_e2m3.g32.s-e8m0",
    "mxfp8": "fp8_e4m3.g32.s-e8m0",
    "mxfp8_e5m2": "fp8_e5m2.g32.s-e8m0",
    "mxint8": "int8.g32.s-e8m0",
    "mx9": "int8.g2.s-micro16",
    "mx6": "int5.g2.s-micro16",
    "mx4": "int3.g2.s-micro16",
}
#: What others call a scheme -> its name here; for messages, since a scheme has one name.
#: Source: compressed-tensors 0.20 ``quantization/quant_scheme.py``, PRESET_SCHEMES; llama.cpp.
OTHER_NAMES = {
    "w4a16": "int4.g128",
    "w4a16_asym": "int4.g128.asym",
    "w8a16": "int8.g128",
    "w8a8": "int8.channel+int8.token",
    "int8_w8a8": "int8.channel+int8.token",
    "w4a8": "int4.g128+int8.token",
    "w4afp8": "int4.g128+fp8_e4m3.token",
    "fp8": "fp8_e4m3.tensor+fp8_e4m3.tensor",
    "fp8_dynamic": "fp8_e4m3.channel+fp8_e4m3.token",
    "fp8_block": "fp8_e4m3.block128+fp8_e4m3.g128",
    "nvfp4a16": "nvfp4",
    "mxfp4a16": "mxfp4",
    "mxfp8a16": "mxfp8",
    "gptq": "int4.g128~gptq",
    "q4_0": "int4.g32@fullrange",
    "q8_0": "int8.g32",
}
_ALIAS_OF = {expansion: alias for alias, expansion in ALIASES.items()}

_NVFP4_COLUMNS = 16

_GRANULARITY = re.compile(
    r"unscaled|tensor|channel|token|(?:g|peg)([1-9]\d*)|block([1-9]\d*)(?:x([1-9]\d*))?"
)
_OUTLIERS = re.compile(r"out[1-9]\d{0,8}")
_SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
_ROUNDINGS: Mapping[str, Rounding] = {"gptq": "gptq", "descent": "descent"}
_WEIGHT_KINDS = ("unscaled", "tensor", "channel", "group", "block")
_ACTIVATION_KINDS = ("unscaled", "tensor", "token", "group", "peg")


@lru_cache(maxsize=4096)
def parse_scheme(name: str) -> Scheme:
    """Parse a scheme name.

    Args:
        name: As the grammar at the top of this module says, for example
            ``"int4.g32@mse"`` or ``"int8.channel+int8.token"``.

    Returns:
        The scheme, under its canonical name (an alias where there is one).

    Raises:
        SchemeError: The name does not follow the grammar; the message suggests
            the nearest known word.
    """
    if name.startswith("kv:"):
        raise SchemeError(
            f"scheme {name!r} is of the KV cache and not of a layer. List it under `kv_cache`."
        )
    weight_name, plus, activation_name = name.partition("+")
    if plus and not activation_name:
        raise SchemeError(f"scheme {name!r}: nothing follows the '+'. Write e.g. 'int8.token'.")
    weight = None if weight_name == "bf16" else _parse_operand(name, weight_name, "bf16")
    activation = _parse_operand(name, activation_name, "f32") if plus else None
    if weight is not None and weight.granularity.kind not in _WEIGHT_KINDS:
        raise SchemeError(
            f"scheme {name!r}: weights cannot be quantized per token, nor by the range of inputs."
        )
    if activation is not None:
        _check_activation(name, activation)
    canonical = "bf16" if weight is None else _operand_name(weight, "bf16")
    if activation is not None:
        canonical += "+" + _operand_name(activation, "f32")
    return Scheme(canonical, weight, activation)


def _check_activation(name: str, activation: TensorScheme) -> None:
    if activation.granularity.kind not in _ACTIVATION_KINDS:
        raise SchemeError(
            f"scheme {name!r}: activations have granularity {activation.granularity.name!r}; "
            f"it must be one of: unscaled, tensor, token, gK, pegK."
        )
    if activation.scale_rule not in ("absmax", "fouroversix") or activation.rounding != "nearest":
        raise SchemeError(
            f"scheme {name!r}: activations are rounded to nearest under absmax scales, or "
            f"'@fouroversix' ones; drop '@' and '~' after the '+'."
        )


def _parse_operand(scheme_name: str, text: str, default_scale: str) -> TensorScheme:
    body, tilde, rounding_word = text.partition("~")
    body, at, rule_word = body.partition("@")
    words = ALIASES.get(body, body).split(".")
    if words[0] not in ELEMENT_FORMATS:
        raise SchemeError(
            f"scheme {scheme_name!r}: unknown element format {words[0]!r}."
            + _in_other_words(words[0], scheme_name)
        )
    element = ELEMENT_FORMATS[words[0]]
    if len(words) < 2:
        raise SchemeError(
            f"scheme {scheme_name!r}: {text!r} has no granularity. "
            f"Write e.g. {words[0] + '.channel'!r} or {words[0] + '.g128'!r}."
        )
    rule = _look_up(scheme_name, "scale rule", rule_word or "absmax", {r: r for r in _SCALE_RULES})
    if (at and not rule_word) or (tilde and rounding_word not in _ROUNDINGS):
        raise SchemeError(
            f"scheme {scheme_name!r}: '@' needs a scale rule, and only 'gptq' and 'descent' follow "
            f"'~'."
        )
    granularity = parse_granularity(words[1], where=f"scheme {scheme_name!r}")
    outliers = [word for word in words[2:] if _OUTLIERS.fullmatch(word)][:1]
    options = [word for word in words[2:] if word not in outliers]
    symmetric, scale_word = _parse_options(scheme_name, options, default_scale)
    operand = TensorScheme(
        element=element,
        granularity=granularity,
        symmetric=symmetric,
        scale=_look_up(scheme_name, "scale format", scale_word, SCALE_FORMATS),
        scale_rule=rule,
        rounding=_ROUNDINGS[rounding_word] if tilde else "nearest",
        outliers=int(outliers[0].removeprefix("out")) if outliers else 0,
    )
    _check_operand(scheme_name, operand, default_scale=default_scale)
    return operand


def _in_other_words(element: str, scheme_name: str) -> str:
    """What others call a scheme, in this grammar; else the nearest element."""
    known = OTHER_NAMES.get(scheme_name.lower().replace("-", "_"))
    if known is not None:
        return f" Here it is written {known!r}."
    return nearest_name(element, [*ELEMENT_FORMATS, *ALIASES, "bf16"])


def _parse_options(scheme_name: str, options: list[str], default_scale: str) -> tuple[bool, str]:
    """Whether codes are symmetric, and the name of the scale format."""
    scales = [word for word in options if word.startswith("s-")]
    unknown = [word for word in options if word != "asym" and word not in scales]
    if unknown or len(scales) > 1 or len(options) != len(set(options)):
        word = unknown[0] if unknown else options[-1]
        raise SchemeError(
            f"scheme {scheme_name!r}: {word!r} is not an option, or stands twice."
            + nearest_name(word, ["asym", "out6", *(f"s-{scale}" for scale in SCALE_FORMATS)])
        )
    return "asym" not in options, scales[0].removeprefix("s-") if scales else default_scale


def _look_up(scheme_name: str, what: str, word: str, known: Mapping[str, _Value]) -> _Value:
    if word not in known:
        raise SchemeError(
            f"scheme {scheme_name!r}: unknown {what} {word!r}." + nearest_name(word, known)
        )
    return known[word]


def parse_granularity(word: str, *, where: str) -> Granularity:
    """Parse a granularity as it stands in a scheme name, e.g. ``"g64"``.

    Raises:
        SchemeError: It is none; the message begins with ``where``.
    """
    match = _GRANULARITY.fullmatch(word)
    if match is None:
        raise SchemeError(
            f"{where}: unknown granularity {word!r}. "
            f"Known: unscaled, tensor, channel, token, gK (a group of K), pegK, blockN, blockNxM."
        )
    if match[1]:
        return Granularity("peg" if word.startswith("peg") else "group", 1, int(match[1]))
    if match[2]:
        return Granularity("block", int(match[2]), int(match[3] or match[2]))
    if word in ("channel", "token"):
        return Granularity("channel" if word == "channel" else "token", 1, 0)
    return Granularity("tensor" if word == "tensor" else "unscaled", 0, 0)


def _check_operand(scheme_name: str, operand: TensorScheme, *, default_scale: str) -> None:
    is_int = isinstance(operand.element, IntFormat)
    fullrange = operand.scale_rule == "fullrange"
    reasons = {
        "only integer formats have a zero point; drop '.asym'.": not (operand.symmetric or is_int),
        "asymmetric codes use the full range already; drop '@'.": (
            not operand.symmetric and fullrange
        ),
        "'@fullrange' is for integer formats only.": fullrange and not is_int,
        "E8M0 scales have no sign, which '@fullrange' needs.": (
            fullrange and operand.scale.name.startswith("e8m0")
        ),
        "only bf16 and f32 scales go with a zero point; drop '.asym'.": (
            not operand.symmetric and operand.scale.name not in ("bf16", "f32")
        ),
        "one scale for the whole tensor is symmetric and absmax: it must be known before the "
        "first row is read; drop '.asym' and '@', or write 'channel'.": (
            operand.granularity.kind == "tensor"
            and not (operand.symmetric and operand.scale_rule == "absmax")
        ),
        **_own_grammar(operand),
    }
    if not operand.has_scale:
        reasons |= {
            "only floating-point formats can go unscaled.": (
                not isinstance(operand.element, FloatFormat)
            ),
            "unscaled formats have no scale format and no scale rule; drop '.s-' and '@'.": (
                operand.scale_rule != "absmax" or operand.scale.name != default_scale
            ),
        }
    for reason, applies in reasons.items():
        if applies:
            raise SchemeError(f"scheme {scheme_name!r}: {reason}")


def _own_grammar(operand: TensorScheme) -> dict[str, bool]:
    """What the words that belong to one published format go with: reason -> whether it applies."""
    is_micro = operand.scale.shared_bits > 0
    is_nvfp4 = operand.element.name == "fp4_e2m1" and operand.scale.name == "e4m3"
    plain = operand.scale_rule == "absmax" and operand.rounding == "nearest"
    return {
        "microexponents are shared by two elements and follow from the largest exponents alone; "
        "write '.g2.s-micro16' without '@' and '~'.": (
            is_micro and not (operand.granularity.name == "g2" and plain)
        ),
        "'@fouroversix' chooses between the codes 4 and 6 of FP4 under E4M3 scales; "
        "write 'nvfp4@fouroversix'.": operand.scale_rule == "fouroversix" and not is_nvfp4,
        "'@stored' finds the scales again of integers or NVFP4 that a source stores, to nearest; "
        "write e.g. 'int4.g32@stored' or 'nvfp4@stored'.": operand.scale_rule == "stored"
        and not (
            operand.rounding == "nearest"
            and (
                (is_nvfp4 and operand.granularity.columns == _NVFP4_COLUMNS)
                or (
                    isinstance(operand.element, IntFormat)
                    and operand.granularity.kind in ("channel", "group", "block")
                    and operand.scale.name in ("bf16", "f32")
                )
            )
        ),
        "columns that are sorted by range share plain scales; drop '.s-', '@' and '~'.": (
            operand.granularity.kind == "peg"
            and not (plain and operand.scale.name in ("f32", "bf16"))
        ),
        "outlier columns are found among the tokens of an input; write '+int8.token.outN'.": (
            operand.outliers > 0 and operand.granularity.kind != "token"
        ),
    }


def _operand_name(operand: TensorScheme, default_scale: str) -> str:
    name = f"{operand.element.name}.{operand.granularity.name}"
    if not operand.symmetric:
        name += ".asym"
    if operand.outliers:
        name += f".out{operand.outliers}"
    if operand.scale.name != default_scale and operand.has_scale:
        name += f".s-{operand.scale.name}"
    name = _ALIAS_OF.get(name, name)
    if operand.scale_rule != "absmax":
        name += f"@{operand.scale_rule}"
    if operand.rounding != "nearest":
        name += f"~{operand.rounding}"
    return name
