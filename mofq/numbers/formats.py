"""Element and scale formats as data. Nothing here computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class IntFormat:
    """A signed integer element format.

    Symmetric codes are ``-(2**(bits-1) - 1) .. 2**(bits-1) - 1``; the full-range
    and error-minimising scale rules also use ``-2**(bits-1)``. Asymmetric codes
    are ``0 .. 2**bits - 1`` with an integer zero point.
    """

    name: str
    bits: int  #: [bits]
    source: str  #: document that defines the format

    @property
    def max(self) -> int:
        """Largest symmetric code."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """A small binary floating-point element format.

    Sign ``s``, exponent field ``e`` and mantissa field ``m`` stand for
    ``(-1)**s * 2**(max(e, 1) - bias) * (min(e, 1) + m / 2**mantissa_bits)``.
    """

    name: str
    exponent_bits: int  #: [bits]
    mantissa_bits: int  #: stored, without the implicit leading one [bits]
    bias: int  #: subtracted from the exponent field
    max: float  #: largest finite magnitude; anything larger saturates to it
    source: str  #: document that defines the format

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa [bits]."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 1 - self.bias


@dataclass(frozen=True, slots=True)
class CodebookFormat:
    """An element format whose values are a sorted table; the code is the index."""

    name: str
    bits: int  #: [bits]
    values: tuple[float, ...]  #: ascending, 2**bits of them
    source: str  #: document that defines the format

    @property
    def max(self) -> float:
        """Largest magnitude in the table."""
        return max(abs(value) for value in self.values)


ElementFormat = IntFormat | FloatFormat | CodebookFormat
#: Kernels of vLLM with rules of their own for what they cache, see ``quantize.cache_kernels``.
CacheKernel = Literal["token_head", "rotated", "nvfp4", "nvfp4_fouroversix"]


@dataclass(frozen=True, slots=True)
class ScaleFormat:
    """How the scale of a group is stored."""

    name: str
    bits: int  #: [bits]
    global_scale_bits: int  #: one more scale for each tensor [bits]; 0: there is none
    source: str
    shared_bits: int = 0  #: of an exponent that neighbouring groups share [bits]; 0: none
    shared_columns: int = 0  #: weights in a row under one such exponent


INT2 = IntFormat("int2", 2, source="two's complement")
INT3 = IntFormat("int3", 3, source="two's complement")
INT4 = IntFormat("int4", 4, source="two's complement")
INT5 = IntFormat("int5", 5, source="two's complement")
INT6 = IntFormat("int6", 6, source="two's complement")
INT7 = IntFormat("int7", 7, source="two's complement")
INT8 = IntFormat("int8", 8, source="two's complement")

FP8_E4M3 = FloatFormat("fp8_e4m3", 4, 3, bias=7, max=448.0, source="OCP OFP8 v1.0")
FP8_E5M2 = FloatFormat("fp8_e5m2", 5, 2, bias=15, max=57344.0, source="OCP OFP8 v1.0")
FP6_E3M2 = FloatFormat("fp6_e3m2", 3, 2, bias=3, max=28.0, source="OCP MX v1.0")
FP6_E2M3 = FloatFormat("fp6_e2m3", 2, 3, bias=1, max=7.5, source="OCP MX v1.0")
FP4_E2M1 = FloatFormat("fp4_e2m1", 2, 1, bias=1, max=6.0, source="OCP MX v1.0; arXiv:2305.12356")
FP4_E2M1_IEEE = FloatFormat(
    "fp4_e2m1_ieee", 2, 1, bias=1, max=3.0, source="IEEE 754 rules: top exponent is NaN and Inf"
)

NF4 = CodebookFormat(
    "nf4",
    4,
    values=(
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    source="QLoRA, arXiv:2305.14314, appendix E",
)

ELEMENT_FORMATS: dict[str, ElementFormat] = {
    one.name: one
    for one in (
        *(INT2, INT3, INT4, INT5, INT6, INT7, INT8),
        *(FP8_E4M3, FP8_E5M2, FP6_E3M2, FP6_E2M3, FP4_E2M1, FP4_E2M1_IEEE, NF4),
    )
}

#: From simple to intricate: ties are decided in this order.
SCALE_FORMATS: dict[str, ScaleFormat] = {
    one.name: one
    for one in (
        ScaleFormat("bf16", 16, 0, source="bfloat16, nearest even"),
        ScaleFormat("f32", 32, 0, source="IEEE 754 binary32"),
        ScaleFormat("e8m0", 8, 0, source="OCP MX v1.0, section 6.3: floor of the exponent"),
        ScaleFormat("e8m0ceil", 8, 0, source="smallest power of two that saturates nothing"),
        ScaleFormat(
            "micro16",
            1,
            0,
            source="shared microexponents, arXiv:2302.08007: all or half of an E8M0 scale",
            shared_bits=8,
            shared_columns=16,
        ),
        ScaleFormat("e4m3", 8, 32, source="NVFP4: E4M3 group scales under one f32 scale"),
    )
}
