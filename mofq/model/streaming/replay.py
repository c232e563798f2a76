"""Runs a model module by module: its own forward is replayed up to the module whose turn it is.

```text
replay for step 3:  embed ─► layer 0 ─► layer 1 ─► layer 2: its arguments are what was looked for
                    └─ what these returned is read from files ─┘
```

A step is a call of a unit (`mofq.model.streaming.weights`). What a unit returned for a sequence
is kept in a file, and a later replay takes it from there, so that nothing but the next unit
computes. What the model does between its units (masks, rotary tables, norms, which keys later
layers share) is done by its own code every time. So the state of a run is files alone: it can be
stopped and continued anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from mofq.exceptions import StreamingError
from mofq.model.streaming.nested_tensors import (
    Watched,
    map_tensors,
    pack,
    put_changes,
    tensors_in,
    unpack,
)
from mofq.model.streaming.records import drop_tensors, read_content, read_placeholders
from mofq.model.streaming.send_to_device import send
from mofq.model.streaming.writer import Writer


@dataclass(frozen=True, slots=True)
class Call:
    """A unit that is about to be called."""

    unit: str  #: its path
    forward: Callable[..., Any]  #: of the module, with hooks of those inside
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Returned:
    """What a call gave: its result, and the entries of its arguments that it changed."""

    output: Any
    changes: list[tuple[list[Any], Any]]

    @property
    def tensors(self) -> list[Tensor]:
        """Of both, in the order in which they are kept."""
        return list(tensors_in((self.output, [value for _, value in self.changes])))


@dataclass(frozen=True, slots=True)
class StreamedSequence:
    """One sequence of one model: its tokens, and where what its units returned is kept."""

    token_T: Tensor
    folder: Path

    def record(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:05d}"

    def has(self, step: int) -> bool:
        """Whether a step is done."""
        return self.record(step).exists()


class _ReachedError(Exception):
    """Ends a replay: the unit whose turn it is was called."""

    def __init__(self, call: Call) -> None:
        super().__init__(call.unit)
        self.call = call


@dataclass(slots=True)
class _State:
    """Of the replay that runs."""

    sequence: StreamedSequence
    target: int
    with_gradients: bool
    #: Gradients start where they do in a resident run: at the embeddings of tokens alone.
    as_resident: bool
    dead: set[int]
    step: int = 0
    #: Step -> the tensors that were taken from files.
    leaves: dict[int, list[Tensor]] = field(default_factory=dict)


class Replayer:
    """Replays the forward of one model; use `replaying` to have one."""

    def __init__(
        self,
        model: PreTrainedModel,
        units: Mapping[str, nn.Module],
        head: str,
        device: torch.device,
    ) -> None:
        self.model = model
        self.head = head
        self._device = device
        self._embeddings = {
            unit for unit, module in units.items() if isinstance(module, nn.Embedding)
        }
        #: Embeddings at which no gradient starts in a resident run.
        self._frozen = {
            unit for unit in self._embeddings if units[unit] is not model.get_input_embeddings()
        }
        self._state: _State | None = None
        #: Steps whose results nothing looks at any more, by the step from which on.
        self._dead: dict[int, set[int]] = {}

    def reach(
        self, sequence: StreamedSequence, step: int, *, with_gradients: bool = False
    ) -> tuple[Call, dict[int, list[Tensor]]]:
        """Replay up to a step.

        Args:
            sequence: All steps before are done.
            step: Number of the call, from 0.
            with_gradients: Let autograd see what the model does between units.

        Returns:
            The call; step -> what was taken from files, which has gradients of its own.

        Raises:
            StreamingError: The model computes its logits otherwise than by its head, or calls
                it before the step.
        """
        probed = step in self._dead
        tracked = with_gradients or not probed
        dead = self._dead.get(step, self._dead.get(step - 1, set()))
        state = _State(sequence, step, tracked, with_gradients, dead)
        self._state = state
        try:
            with torch.set_grad_enabled(tracked):
                self.model(send(sequence.token_T[None], self._device))
        except _ReachedError as reached:
            if not probed and not with_gradients:
                self._dead[step] = state.dead | _unreferenced(state)
            return reached.call, state.leaves
        finally:
            self._state = None
        raise StreamingError(
            f"{type(self.model).__name__} computes its logits without calling {self.head}"
        )

    def finish(
        self, sequence: StreamedSequence, step: int
    ) -> tuple[Tensor, dict[int, list[Tensor]]]:
        """Replay to the end, with gradients as far as they are enabled.

        Args:
            sequence: All steps before the head are done.
            step: That of the head, whose weights are there.

        Returns:
            Logits [T, V]; step -> what was taken from files.
        """
        tracked = torch.is_grad_enabled()
        state = _State(sequence, -1, tracked, tracked, self._dead.get(step, set()))
        self._state = state
        try:
            logits_TV: Tensor = self.model(send(sequence.token_T[None], self._device)).logits[0]
        finally:
            self._state = None
        return logits_TV, state.leaves

    def forget(self, sequences: Sequence[StreamedSequence], step: int) -> None:
        """Drop what no replay for this step or a later one looks at.

        Args:
            sequences: All that the model runs.
            step: That was reached.
        """
        for done in self._dead.get(step, set()) - self._dead.get(step - 1, set()):
            for sequence in sequences:
                drop_tensors(sequence.record(done))

    def on_call(self, unit: str, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """In the place of a unit's forward."""
        state = self._state
        if state is None:
            return forward(*args, **kwargs)
        step, state.step = state.step, state.step + 1
        if step == state.target:
            raise _ReachedError(Call(unit, forward, args, kwargs))
        if unit == self.head and state.target < 0:
            return forward(*args, **kwargs)
        read = read_placeholders if step in state.dead else read_content
        content, tensors = read(state.sequence.record(step))
        if content["unit"] != unit:
            raise StreamingError(
                f"{type(self.model).__name__} called {content['unit']}, and now calls {unit}"
            )
        leaves = [send(one, self._device) for one in tensors]
        if state.with_gradients and not (state.as_resident and unit in self._frozen):
            for one in leaves:
                if one.is_floating_point():
                    one.requires_grad_(True)
        if step not in state.dead:
            state.leaves[step] = leaves
        # Copies of what a model may change in place; of others nothing needs to be read.
        is_changed = step == state.target - 1 or state.target < 0 or unit in self._embeddings
        shown = [one.clone() if is_changed else one for one in leaves]
        form = content["form"]
        output = unpack(form["output"], shown)
        put_changes((args, kwargs), [(p, unpack(f, shown)) for p, f in form["changes"]])
        return output


def _unreferenced(state: _State) -> set[int]:
    """The steps of a replay whose results are nowhere any more, or in what autograd keeps.

    Called while the frames of the replay are still there.
    """
    gone = set()
    for step, leaves in state.leaves.items():
        if any(not one.requires_grad for one in leaves):
            continue
        references = [ref(one) for one in leaves]
        leaves.clear()
        alive = [reference() for reference in references]
        if all(each is None for each in alive):
            gone.add(step)
        leaves.extend(each for each in alive if each is not None)
    return gone


@contextmanager
def replaying(
    model: PreTrainedModel, units: Mapping[str, nn.Module], head: str, device: torch.device
) -> Iterator[Replayer]:
    """Have the units of a model taken from files for as long as the context lasts."""
    replayer = Replayer(model, units, head, device)
    for unit, module in units.items():
        module.forward = partial(replayer.on_call, unit, module.forward)
    try:
        yield replayer
    finally:
        for module in units.values():
            del module.forward


def run(call: Call) -> Returned:
    """Call the unit, with its weights there.

    Raises:
        StreamingError: It keeps a state that a replay does not see.
    """
    for one in (*call.args, *call.kwargs.values()):
        if isinstance(one, Cache):
            raise StreamingError(f"{call.unit} is given a {type(one).__name__}")
    given = (call.args, dict(call.kwargs))
    watched = Watched(given)
    output = call.forward(*call.args, **call.kwargs)
    return Returned(output, watched.changes(where=call.unit))


def keep(returned: Returned, call: Call, path: Path, *, writer: Writer) -> None:
    """Have what a call gave written."""
    packed = pack([returned.output, [value for _, value in returned.changes]], where=call.unit)
    output, values = packed.form["list"]
    changes = [
        [place, form] for (place, _), form in zip(returned.changes, values["list"], strict=True)
    ]
    form = {"output": output, "changes": changes}
    writer.write(path, {"unit": call.unit, "form": form}, packed.tensors)


def detached(call: Call) -> tuple[Call, list[tuple[Tensor, Tensor]]]:
    """The same call on tensors of their own, to take gradients of.

    Returns:
        The call; each tensor that needs a gradient, and the one that takes its place.
    """
    pairs: list[tuple[Tensor, Tensor]] = []

    def cut(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        leaf = tensor.detach().requires_grad_(True)
        pairs.append((tensor, leaf))
        return leaf.clone()  # may be changed in place

    args, kwargs = map_tensors((call.args, dict(call.kwargs)), cut)
    return Call(call.unit, call.forward, args, kwargs), pairs
