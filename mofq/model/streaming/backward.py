"""The backward pass of a model that is run unit by unit, for one sequence and one step.

A step is computed again from its arguments, with autograd on. The gradients of what it returned
came from later steps and were kept; those of its arguments go through what the model does between
its units to what earlier steps returned, and are kept for them. A file for each step that sent
gradients: it is complete or not there, so that nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mofq.model.streaming.records import read_content, write_tensors
from mofq.model.streaming.replay import Call, Replayer, StreamedSequence, detached, run
from mofq.model.streaming.send_to_device import send
from mofq.model.streaming.writer import Writer

#: (step, which of the tensors that it returned) -> a gradient for each draw.
Sent = dict[tuple[int, int], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Gradients:
    """What the steps of one sequence sent down."""

    sequence: StreamedSequence
    name: str = "back"  #: of the files; gradients of something else than the scores have another

    def file(self, step: int) -> Path:
        """What a step sent."""
        return self.sequence.folder / f"{self.name}-{step:05d}"

    def has(self, step: int) -> bool:
        """Whether a step is done."""
        return self.file(step).exists()

    def keep(self, step: int, sent: Sent, *, writer: Writer) -> None:
        """Have what a step sent written; from then on it is done."""
        targets = sorted(sent)
        tensors = [torch.stack(sent[target]) for target in targets]
        writer.write(self.file(step), targets, tensors)

    def arrived(self, step: int, *, last: int) -> dict[int, Tensor]:
        """The gradients of what a step returned: which tensor -> [draws, …].

        Args:
            step: All later ones are done.
            last: The last step, the head's.
        """
        found: dict[int, Tensor] = {}
        for sender in range(last, step, -1):  # as autograd adds them
            targets, tensors = read_content(self.file(sender))
            for (target, index), grad in zip(targets, tensors, strict=True):
                if target == step:
                    found[index] = found[index] + grad if index in found else grad
        return found

    def drop(self, step: int, *, last: int) -> None:
        """Empty what later steps sent, once no step before this one needs it."""
        for sender in range(last, step, -1):
            targets, _ = read_content(self.file(sender))
            if targets and all(target >= step for target, _ in targets):
                write_tensors(self.file(sender), [], [])  # the file says that the step is done


def collect(leaves: dict[int, list[Tensor]], sent: Sent) -> None:
    """Take the gradients that arrived at what was read of earlier steps, for one draw.

    Args:
        leaves: From a replay.
        sent: Is added to.
    """
    for step, tensors in leaves.items():
        for index, one in enumerate(tensors):
            if one.grad is not None:
                sent.setdefault((step, index), []).append(one.grad)
                one.grad = None


class StepBack:
    """A step that is computed again, whose weights are there, to send gradients down."""

    def __init__(self, replayer: Replayer, sequence: StreamedSequence, step: int) -> None:
        """Compute it; hooks inside the unit see that.

        Args:
            replayer: Of the model.
            sequence: All steps before are done forward.
            step: Which.
        """
        call, self._leaves = replayer.reach(sequence, step, with_gradients=True)
        again, self._pairs = detached(call)
        with torch.enable_grad():
            self._returned = run(again).tensors

    def send(
        self,
        arrived: Mapping[int, Tensor],
        sent: Sent,
        *,
        objective: Tensor | None = None,
        keep_graph: bool = False,
    ) -> None:
        """Run backward once; hooks inside the unit see that.

        Args:
            arrived: A gradient for each of the tensors that the step returned.
            sent: What is sent to earlier steps; is added to.
            objective: A number computed inside the step, that runs backward too.
            keep_graph: Whether it is run backward again.
        """
        ends = [(self._returned[index], grad) for index, grad in arrived.items()]
        ends = [(one, send(grad, one.device)) for one, grad in ends if one.requires_grad]
        if objective is not None:
            ends.append((objective, torch.ones_like(objective)))
        if ends:
            torch.autograd.backward(
                [one for one, _ in ends], [grad for _, grad in ends], retain_graph=keep_graph
            )
        down = [(given, leaf.grad) for given, leaf in self._pairs if leaf.grad is not None]
        if down:
            torch.autograd.backward(
                [given for given, _ in down], [grad for _, grad in down], retain_graph=keep_graph
            )
        for _, leaf in self._pairs:
            leaf.grad = None
        collect(self._leaves, sent)


def needs_gradients(call: Call) -> bool:
    """Whether a gradient goes through a call of a replay with gradients."""
    return bool(detached(call)[1])
