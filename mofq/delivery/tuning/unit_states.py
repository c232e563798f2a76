"""What is learned of each unit of a model that is tuned layer by layer, in files between its turns.

A file for each unit has its norms, codes and scales by now, and the gradients that it got last; it
is written anew when it has new ones. Codes have moved by then. How far norms and scales move
depends on the gradients of all units (`even_steps`), so they move when the unit is read again: no
file is ever half of a step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mofq.delivery.tuning.codes import LearnedCodes
from mofq.delivery.tuning.even_steps import mean_square, median_of, move
from mofq.delivery.tuning.norms import TunedNorm
from mofq.delivery.tuning.tune import Rates
from mofq.evidence.code_changes import CodeChanges
from mofq.evidence.layer_codes import narrow
from mofq.files.documents import PART, write_beside_and_rename
from mofq.model.streaming.nested_tensors import map_tensors, pack, unpack
from mofq.model.streaming.records import read_content, write_tensors
from mofq.numbers.quantize import QuantizedWeight
from mofq.numbers.schemes import TensorScheme

#: Stands for what is of no unit.
OUTSIDE = ""
#: Of the names of files of what units begin with.
_ROUNDED = "rounded-"


@dataclass(slots=True)
class UnitState:
    """What is learned of one unit by now."""

    norms: list[TunedNorm]
    codes: list[LearnedCodes]  #: whoever has the unit's weights says which are theirs
    squares: list[Tensor | None]  #: running means, as `relative`; None: before the first gradient

    @property
    def relative(self) -> list[Tensor | None]:
        """What moves at even steps: norms, then the scales of each layer; None: they stay."""
        return [*(one.moved_C for one in self.norms), *(one.factor_AG for one in self.codes)]


def has_begun(folder: Path) -> bool:
    """Whether a folder has a unit that began to be learned."""
    return any(one.suffix != PART for one in folder.glob(f"{_ROUNDED}*"))


class UnitStates:
    """The files of all units."""

    def __init__(
        self, folder: Path, schemes: Mapping[str, TensorScheme], device: torch.device
    ) -> None:
        """Those in a folder, which may be empty.

        Args:
            folder: Exists.
            schemes: Layer -> that of its weight.
            device: Where what is read goes.
        """
        self._folder = folder
        self._schemes = schemes
        self._device = device
        self._medians: dict[int, list[float]] = {}

    def _now(self, unit: str) -> Path:
        return self._folder / f"learned-{unit}"

    def _rounded(self, unit: str) -> Path:
        """The codes that the unit begins with, and their changes to what schemes made; it stays."""
        return self._folder / f"{_ROUNDED}{unit}"

    def _step(self, number: int) -> Path:
        return self._folder / f"step-{number:05d}.json"

    def begin(self, unit: str, norms: Iterable[TunedNorm], codes: Sequence[LearnedCodes]) -> None:
        """Write what a unit begins with; it is not begun again then."""
        _write(
            self._rounded(unit),
            {
                one.name: {
                    "before": _parts(narrow(one.before)),
                    "start": None if one.start is None else _parts(one.start),
                }
                for one in codes
            },
        )
        state = UnitState(list(norms), list(codes), [])
        state.squares = [None] * len(state.relative)
        self._write(unit, state, 0)

    def has(self, unit: str) -> bool:
        """Whether a unit has begun."""
        return self._now(unit).exists()

    def is_learned(self, unit: str) -> bool:
        """Whether anything of it is."""
        content = _read(self._now(unit))
        return bool(content["norms"] or content["codes"])

    def steps(self, unit: str) -> int:
        """How many steps gave a unit its gradients."""
        return int(_read(self._now(unit))["steps"])

    def errors(self) -> dict[str, float]:
        """Layer -> error of rounding relative to its weight, of all units that have begun."""
        return {
            one["name"]: one["error"]
            for path in self._learned_files()
            for one in _read(path)["codes"]
        }

    def _learned_files(self) -> list[Path]:
        """Of all units that have begun, without what a killed process left half written."""
        return sorted(one for one in self._folder.glob("learned-*") if one.suffix != PART)

    def read(self, unit: str, rates: Rates) -> UnitState:
        """What a unit has learned; its norms and scales move as its last gradients say."""
        content = _read(self._now(unit), self._device)
        rounded = _read(self._rounded(unit), self._device)
        norms = [
            TunedNorm(
                *(one[key] for key in ("names", "path")),
                *(getattr(torch, one[key]) for key in ("dtype", "computed")),
                *(one[key] for key in ("size_C", "start_C", "moved_C")),
            )
            for one in content["norms"]
        ]
        codes = [self._learned(one, rounded[one["name"]]) for one in content["codes"]]
        state = UnitState(norms, codes, content["squares"])
        if number := content["steps"]:
            medians = self._medians_of(number - 1)
            for at, change in enumerate(state.relative):
                gradient, square = content["gradients"][at], state.squares[at]
                if change is not None and gradient is not None and square is not None:
                    move(
                        change,
                        gradient,
                        square,
                        median=medians[at >= len(norms)],
                        rate=rates.relative(number - 1),
                    )
        return state

    def _learned(self, one: Mapping[str, Any], rounded: Mapping[str, Any]) -> LearnedCodes:
        before, start = QuantizedWeight(**rounded["before"]), rounded["start"]
        if before.codes_OI.is_floating_point():
            before = replace(before, codes_OI=before.codes_OI.float())
        return LearnedCodes(
            one["name"],
            self._schemes[one["name"]],
            before,
            one["latent_OI"],
            one["factor_AG"],
            one["error"],
            None if start is None else CodeChanges(**map_tensors(start, lambda one: one.cpu())),
        )

    def write(self, unit: str, state: UnitState, steps: int) -> None:
        """Write what a unit has learned, once its codes have moved.

        Args:
            unit: Its path, or `OUTSIDE`.
            state: From `read`, with the gradients of what moves later as its ``grad``.
            steps: That gave the unit gradients, this one included.
        """
        state.squares = [
            None if one is None else mean_square(square, _gradient(one))
            for one, square in zip(state.relative, state.squares, strict=True)
        ]
        self._write(unit, state, steps)

    def _write(self, unit: str, state: UnitState, steps: int) -> None:
        content = {
            "steps": steps,
            "norms": [
                {
                    "names": one.names,
                    "path": one.path,
                    "dtype": str(one.dtype).removeprefix("torch."),
                    "computed": str(one.computed).removeprefix("torch."),
                    "size_C": one.size_C,
                    "start_C": one.start_C,
                    "moved_C": one.moved_C,
                }
                for one in state.norms
            ],
            "codes": [
                {
                    "name": one.name,
                    "error": one.error,
                    "latent_OI": one.latent_OI,
                    "factor_AG": one.factor_AG,
                }
                for one in state.codes
            ],
            "squares": state.squares,
            "gradients": [
                None if one is None or not steps else _gradient(one) for one in state.relative
            ],
        }
        _write(self._now(unit), content)

    def end_step(self, number: int) -> None:
        """Say that a step is over: all units have their gradients of it."""
        paths = self._learned_files()

        def squares(of_codes: bool) -> Iterable[Tensor]:
            for path in paths:
                content = _read(path)
                norms = len(content["norms"])
                own = content["squares"][norms:] if of_codes else content["squares"][:norms]
                yield from (one.to(self._device) for one in own if one is not None)

        medians = [median_of(lambda: squares(False)), median_of(lambda: squares(True))]
        write_beside_and_rename(self._step(number), json.dumps(medians))

    def has_ended(self, number: int) -> bool:
        """Whether a step is over."""
        return self._step(number).exists()

    def _medians_of(self, number: int) -> list[float]:
        """Of the squares after a step: of norms, and of scales."""
        if number not in self._medians:
            self._medians = {number: json.loads(self._step(number).read_text("utf-8"))}
        return self._medians[number]


def _parts(one: QuantizedWeight | CodeChanges) -> dict[str, Tensor | None]:
    return {part.name: getattr(one, part.name) for part in fields(one)}


def _gradient(one: Tensor) -> Tensor:
    return torch.zeros_like(one) if one.grad is None else one.grad


def _write(path: Path, content: Any) -> None:
    packed = pack(content, where=path.name)
    write_tensors(path, packed.form, packed.tensors)


def _read(path: Path, device: torch.device | None = None) -> Any:
    """A file's content; tensors are mapped, or on a device."""
    content = unpack(*read_content(path))
    return content if device is None else map_tensors(content, lambda one: one.to(device))
