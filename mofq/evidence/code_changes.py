"""Changes to the codes of a layer that were learned after its scheme rounded it.

What a scheme makes of a weight follows from the weight and its statistics, and is made again where
it is needed. What was learned on top is small: the codes that became others, and the scales.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mofq.numbers.formats import CodebookFormat, IntFormat
from mofq.numbers.quantize import QuantizedWeight, round_to_format
from mofq.numbers.quantize.rounding import round_to_integer
from mofq.numbers.quantize.scales import code_range
from mofq.numbers.quantize.tiles import tile_shape
from mofq.numbers.schemes import TensorScheme

#: Of the names of their tensors in a file, before the name of the layer and after it.
_PREFIX = "codes/"
_GAPS, _CODES, _SCALE = "/gaps", "/codes", "/scale"
#: Places as numbers of 8 bytes, in files of versions before.
_AT = "/at"
_ENDS = (_AT, _GAPS, _CODES, _SCALE)
#: Of a gap that is larger than a byte holds: so much, and more follows.
_MORE = 255
#: What an exponent is stored with, in a byte.
_BIAS = 127
#: Scales that take any value. Others have a few steps an octave, or none between.
_FINE_SCALES = ("bf16", "f32")
#: Formats of scales that may be others than the scheme makes -> what they are held in.
_SCALES = {
    "bf16": torch.bfloat16,
    **dict.fromkeys(("f32", "e4m3", "e8m0", "e8m0ceil"), torch.float32),
}


def can_learn(scheme: TensorScheme) -> bool:
    """Whether codes of a weight scheme can be learned."""
    is_grid = not isinstance(scheme.element, CodebookFormat)
    return is_grid and scheme.has_scale and scheme.scale_rule != "stored"


def can_learn_scales(scheme: TensorScheme) -> bool:
    """Whether its scales can be too, by small steps."""
    return can_change_scales(scheme) and scheme.scale.name in _FINE_SCALES


def can_change_scales(scheme: TensorScheme) -> bool:
    """Whether its scales can be others: not one of a whole tensor, which fused layers share."""
    return can_learn(scheme) and (
        scheme.scale.name in _SCALES and scheme.granularity.kind != "tensor"
    )


@dataclass(frozen=True, slots=True)
class CodeChanges:
    """What became of a layer's codes and scales."""

    at_N: Tensor  #: places in the flattened [out_features, in_features], ascending, int64
    codes_N: Tensor  #: what stands there, as in ``QuantizedWeight``
    scale: Tensor | None  #: in the place of ``QuantizedWeight.scale``; None: it stays

    @classmethod
    def between(cls, before: QuantizedWeight, after: QuantizedWeight) -> CodeChanges:
        """From what a scheme made to what was learned; scales keep their dtype."""
        was, now = before.codes_OI.flatten(), after.codes_OI.flatten()
        at_N = (was.float() != now.float()).nonzero().flatten()
        same = before.scale is None or after.scale is None or torch.equal(before.scale, after.scale)
        return cls(at_N, now[at_N].to(was.dtype), None if same else after.scale)

    def apply(
        self, rows: QuantizedWeight, start: int, *, tile_rows: int, columns: int
    ) -> QuantizedWeight:
        """The codes of some rows as they were learned.

        Args:
            rows: As the scheme makes them.
            start: The first of them, the first of a tile.
            tile_rows: Of the scheme; 0: one tile has all rows.
            columns: Of the weight.
        """
        codes_RI = rows.codes_OI.clone(memory_format=torch.contiguous_format)
        bounds = torch.tensor([start * columns, (start + len(codes_RI)) * columns])
        low, high = torch.searchsorted(self.at_N, bounds).tolist()
        at_N = (self.at_N[low:high] - start * columns).to(codes_RI.device)
        learned_N = self.codes_N[low:high].to(codes_RI.device, codes_RI.dtype)
        codes_RI.view(-1)[at_N] = learned_N
        changed = replace(rows, codes_OI=codes_RI)
        if self.scale is None or rows.scale is None:
            return changed
        down = slice(start // tile_rows, None) if tile_rows else slice(None)
        scale = self.scale[down][: len(rows.scale)].to(rows.scale.device)
        return replace(changed, scale=scale)

    def then(self, later: CodeChanges) -> CodeChanges:
        """These, and others that were made to what they gave."""
        left_N = ~torch.isin(self.at_N, later.at_N)
        at_N = torch.cat([self.at_N[left_N], later.at_N])
        codes_N = torch.cat([self.codes_N[left_N], later.codes_N.to(self.codes_N.dtype)])
        order_N = at_N.argsort()
        scale = self.scale if later.scale is None else later.scale
        return CodeChanges(at_N[order_N], codes_N[order_N], scale)

    def fault(self, scheme: TensorScheme, shape: tuple[int, int]) -> str | None:
        """Why these are no changes to a weight of this shape under a scheme; None: they are."""
        if not can_learn(scheme):
            return "codes of its scheme are not learned"
        at_N, codes_N = self.at_N, self.codes_N
        if at_N.dtype != torch.int64 or at_N.shape != codes_N.shape or at_N.ndim != 1:
            return "places and codes do not belong together"
        if len(at_N) and not (
            bool((at_N.diff() > 0).all())
            and int(at_N[0]) >= 0
            and int(at_N[-1]) < shape[0] * shape[1]
        ):
            return f"places are not within {list(shape)}, or not in order"
        element, dtype = scheme.element, torch.float32
        if isinstance(element, IntFormat):
            dtype = torch.int8 if scheme.symmetric else torch.uint8
        if codes_N.dtype != dtype:
            return f"needs codes in {dtype}, and has them in {codes_N.dtype}"
        values_N = codes_N.float()
        if isinstance(element, IntFormat):
            is_code_N = round_to_integer(values_N, *code_range(scheme)) == values_N
        else:
            is_code_N = round_to_format(values_N, element) == values_N
        if not bool(is_code_N.all()):
            return f"codes are none of {element.name}"
        if self.scale is None:
            return None
        rows, columns = tile_shape(shape, scheme.granularity, name="scale")
        wanted = (shape[0] // rows, shape[1] // columns)
        if tuple(self.scale.shape) != wanted:
            return f"needs scales of shape {list(wanted)}, and has {list(self.scale.shape)}"
        if not can_change_scales(scheme):
            return "scales of its scheme are not learned"
        dtype = _SCALES[scheme.scale.name]
        if self.scale.dtype != dtype:
            return f"needs scales in {dtype}, and has them in {self.scale.dtype}"
        if not bool((torch.isfinite(self.scale) & (self.scale != 0)).all()):
            return "scales are not finite, or 0"
        if scheme.scale.name == "e4m3" and not _is_e4m3(self.scale):
            return "scales are none of E4M3"
        if scheme.scale.name.startswith("e8m0") and not _is_e8m0(self.scale):
            return "scales are no powers of two"
        return None


def to_tensors(changes: Mapping[str, CodeChanges]) -> dict[str, Tensor]:
    """Layer -> changes as the tensors of a file."""
    found: dict[str, Tensor] = {}
    for name, one in changes.items():
        codes_N = one.codes_N
        if codes_N.is_floating_point():  # the elements of all grids are values of bfloat16
            codes_N = codes_N.bfloat16()
        found[f"{_PREFIX}{name}{_GAPS}"] = _to_gaps(one.at_N)
        found[f"{_PREFIX}{name}{_CODES}"] = codes_N
        if one.scale is not None:
            found[f"{_PREFIX}{name}{_SCALE}"] = _in_bytes(one.scale)
    return found


def is_of_codes(name: str) -> bool:
    """Whether a tensor of a file is of changes to codes."""
    return name.startswith(_PREFIX)


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, CodeChanges]:
    """The changes in the tensors of a file, by layer.

    Raises:
        KeyError: A part of a layer's is missing.
    """
    found = {}
    for name in _layers(tensors):
        at_N = tensors.get(f"{_PREFIX}{name}{_AT}")
        if at_N is None:
            at_N = _from_gaps(tensors[f"{_PREFIX}{name}{_GAPS}"])
        codes_N = tensors[f"{_PREFIX}{name}{_CODES}"]
        if codes_N.is_floating_point():
            codes_N = codes_N.float()
        scale = tensors.get(f"{_PREFIX}{name}{_SCALE}")
        if scale is not None and scale.dtype == torch.uint8:
            scale = torch.exp2(scale.float() - _BIAS)
        elif scale is not None and scale.itemsize == 1:
            scale = scale.float()
        found[name] = CodeChanges(at_N, codes_N, scale)
    return found


def _is_e4m3(scale: Tensor) -> bool:
    return torch.equal(scale.to(torch.float8_e4m3fn).float(), scale)


def _is_e8m0(scale: Tensor) -> bool:
    return bool((torch.frexp(scale)[0] == 0.5).all())


def _in_bytes(scale: Tensor) -> Tensor:
    """Scales in one byte each, where a format of one byte holds all of them."""
    if scale.dtype == torch.float32:
        if _is_e4m3(scale):
            return scale.to(torch.float8_e4m3fn)
        if _is_e8m0(scale):
            return (torch.frexp(scale)[1] - 1 + _BIAS).to(torch.uint8)
    return scale


def _to_gaps(at_N: Tensor) -> Tensor:
    """Ascending places as the number of places left out before each, in bytes.

    A byte of `_MORE` adds that and goes on with the next; every other one ends a number.
    """
    left_out_N = at_N.diff(prepend=at_N.new_tensor([-1])) - 1
    whole_N, rest_N = left_out_N // _MORE, left_out_N % _MORE
    ends_N = (whole_N + 1).cumsum(0) - 1
    size = int(ends_N[-1]) + 1 if len(ends_N) else 0
    gaps_B = torch.full((size,), _MORE, dtype=torch.uint8)
    gaps_B[ends_N] = rest_N.to(torch.uint8)
    return gaps_B


def _from_gaps(gaps_B: Tensor) -> Tensor:
    """The places again, int64; none where these are no gaps."""
    if gaps_B.dtype != torch.uint8 or gaps_B.ndim != 1:
        return torch.zeros(0, dtype=torch.int64)
    so_far_B = gaps_B.long().cumsum(0)
    at_N = so_far_B[gaps_B < _MORE]
    return at_N + torch.arange(len(at_N))


def unknown_names(names: Iterable[str]) -> list[str]:
    """Those of the names of changes that say nothing to this version, in order."""
    return sorted(name for name in names if is_of_codes(name) and not name.endswith(_ENDS))


def _layers(names: Iterable[str]) -> list[str]:
    found = (name.removeprefix(_PREFIX) for name in names if is_of_codes(name))
    return list(dict.fromkeys(name.rpartition("/")[0] for name in found if name.endswith(_ENDS)))
