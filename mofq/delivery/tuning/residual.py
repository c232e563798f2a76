"""Where the outputs of linear layers meet the residual stream of a decoder layer.

Seen in one call of the layer and not known of its family: a module adds to the stream if what it
gives, or what a norm makes of that, and the stream before are together the stream behind. Behind is
what another module is given (the norm before an MLP), or what the decoder layer returns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mofq.model.streaming.nested_tensors import tensors_in
from mofq.model.streaming.replay import Call

#: How exactly a sum is one, relative to what is added.
_EXACT = 1e-3


@dataclass(frozen=True, slots=True)
class AddsTo:
    """How the outputs of a module meet the residual stream."""

    path: str  #: of the module
    through: str  #: path of what its outputs go through before they are added; its own: nothing
    behind: str | None  #: path of the module that is given the sum; None: the layer returns it


class StopCall(Exception):
    """Ends a call: all that was looked for was seen."""


class Watched:
    """What some modules are given and give in a call; use it in a ``with`` statement."""

    def __init__(self, model: nn.Module, added: Iterable[AddsTo], *, stop: bool = False) -> None:
        """Begin to watch.

        Args:
            model: That has the modules.
            added: What is looked for.
            stop: End the call by `StopCall` once all of it was seen.
        """
        added = list(added)
        self._given = {one.behind for one in added if one.behind is not None}
        self._gives = {path for one in added for path in (one.path, one.through)}
        self._needs_result = any(one.behind is None for one in added)
        self._model, self._stop = model, stop
        self.given: dict[str | None, Tensor] = {}
        self.gave: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Watched:
        for path in self._given:
            module = self._model.get_submodule(path)
            self._handles.append(module.register_forward_pre_hook(self._note_given(path)))
        for path in self._gives:
            module = self._model.get_submodule(path)
            self._handles.append(module.register_forward_hook(self._note_gave(path)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def before(self, adds: AddsTo) -> Tensor:
        """The residual stream before a module adds to it, [T, C], float32."""
        return _rows(self.given[adds.behind]) - _rows(self.gave[adds.through])

    def at_outputs(self, lost_TC: Tensor, adds: AddsTo) -> Tensor:
        """What would have to be added to a module's outputs to add something to the stream."""
        if adds.through == adds.path:
            return lost_TC
        # A norm of the size multiplies each channel of a token by what does not depend on its sign.
        outputs_TC, added_TC = _rows(self.gave[adds.path]), _rows(self.gave[adds.through])
        return torch.where(added_TC.abs() > 0, lost_TC * outputs_TC / added_TC, 0.0)

    def note_result(self, result: Any) -> None:
        """Take what the decoder layer returned."""
        self.given[None] = next(iter(tensors_in(result)))

    def _note_given(self, path: str) -> Any:
        def note(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self.given[path] = args[0]
            is_all = self._given <= self.given.keys() and self._gives <= self.gave.keys()
            if self._stop and is_all and not self._needs_result:
                raise StopCall

        return note

    def _note_gave(self, path: str) -> Any:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            self.gave[path] = output

        return note


def call(reached: Call, watched: Watched | None = None) -> Any:
    """Call a decoder layer without gradients; None where `StopCall` ended it."""
    with torch.no_grad():
        try:
            result = reached.forward(*reached.args, **reached.kwargs)
        except StopCall:
            return None
    if watched is not None:
        watched.note_result(result)
    return result


def find_added(reached: Call, model: nn.Module, names: Collection[str]) -> dict[str, AddsTo]:
    """Which modules of a decoder layer add to the residual stream.

    Args:
        reached: A call of the decoder layer as it is, with its weights there. It is run.
        model: That has it.
        names: Paths of linear layers in it.

    Returns:
        Path -> how its outputs meet the stream; of those of which that was seen.
    """
    seen = _Seen(model, reached.unit)
    with seen:
        result = call(reached)
    returned = next(iter(tensors_in(result)), None)
    entered = next(
        (
            one
            for one in tensors_in([list(reached.args), dict(reached.kwargs)])
            if returned is not None and one.shape == returned.shape
        ),
        None,
    )
    if returned is None or entered is None or not returned.is_floating_point():
        return {}
    behind: dict[str | None, Tensor] = {
        path: one for path, one in seen.given.items() if one.shape == returned.shape
    }
    behind[None] = returned
    outputs = {
        name: one
        for name in names
        if (one := seen.gave.get(name)) is not None and one.shape == returned.shape
    }
    befores = [entered, *list(behind.values())[:-1], *(entered + one for one in outputs.values())]
    found = {}
    for name, output in outputs.items():
        for through, added in ((name, output), *seen.norms_of(output)):
            size = float(added.float().norm())
            where = next(
                (
                    path
                    for path, after in behind.items()
                    for before in befores
                    if size > 0 and _is_sum(after, before, added, within=_EXACT * size)
                ),
                name,
            )
            if where != name:
                found[name] = AddsTo(name, through, where)
                break
    return found


class _Seen:
    """What every module inside a decoder layer is given and gives, of those called once."""

    def __init__(self, model: nn.Module, unit: str) -> None:
        inside = model.get_submodule(unit).named_modules(prefix=unit)
        self._modules = {path: module for path, module in inside if path != unit}
        self._handles: list[Any] = []
        self._calls: dict[str, int] = {}
        self.given: dict[str, Tensor] = {}
        self.gave: dict[str, Tensor] = {}

    def __enter__(self) -> _Seen:
        for path, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._note(path)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for path, calls in self._calls.items():
            if calls > 1:
                self.given.pop(path, None)
                self.gave.pop(path, None)

    def norms_of(self, output: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Norms of the size that are given a tensor, and what they make of it."""
        for path, one in self.given.items():
            is_norm = "rmsnorm" in type(self._modules[path]).__name__.lower()
            if one is output and is_norm and path in self.gave:
                yield path, self.gave[path]

    def _note(self, path: str) -> Any:
        def note(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._calls[path] = self._calls.get(path, 0) + 1
            if args and isinstance(args[0], Tensor):
                self.given[path] = args[0]
            if isinstance(output, Tensor):
                self.gave[path] = output

        return note


def _is_sum(after: Tensor, before: Tensor, added: Tensor, *, within: float) -> bool:
    """Whether two are together the third; in bfloat16 only the model's own sum is that exactly."""
    if torch.equal(before + added, after):
        return True
    return float((after.float() - before.float() - added.float()).norm()) <= within


def _rows(x: Tensor) -> Tensor:
    """[..., T, C] as [T, C], float32."""
    return x.detach().flatten(0, -2).float()
