"""The backward pass of a model that is run unit by unit, for one sequence and one step.

A step is computed again from its arguments, with autograd on. The gradients of what it returned
came from later steps and were kept; those of its arguments go through what the model does between
its units to what earlier steps returned, and are kept for them. A file for each step that sent
gradients: it is complete or not there, so that nothing is counted twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mofq.model.streaming.records import read_content, write_tensors
from mofq.model.streaming.replay import Call, Replayer, StreamedSequence, detached, run

#: (step, which of the tensors that it returned) -> a gradient for each draw.
Sent = dict[tuple[int, int], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Gradients:
    """What the steps of one sequence sent down."""

    sequence: StreamedSequence

    def file(self, step: int) -> Path:
        """What a step sent."""
        return self.sequence.folder / f"back-{step:05d}"

    def has(self, step: int) -> bool:
        """Whether a step is done."""
        return self.file(step).exists()

    def keep(self, step: int, sent: Sent) -> None:
        """Write what a step sent; from then on it is done."""
        targets = sorted(sent)
        tensors = [torch.stack(sent[target]) for target in targets]
        write_tensors(self.file(step), targets, tensors)

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


def step_back(
    replayer: Replayer,
    sequence: StreamedSequence,
    step: int,
    *,
    arrived: dict[int, Tensor],
    draws: int,
) -> Sent:
    """Compute a step again, whose weights are there, and send its gradients down.

    Args:
        replayer: Of the model.
        sequence: All steps before are done forward.
        step: Which.
        arrived: From `Gradients.arrived`.
        draws: How many gradients of each tensor there are.

    Returns:
        What is sent to earlier steps; hooks inside the unit saw all of it.
    """
    call, leaves = replayer.reach(sequence, step, with_gradients=True)
    again, pairs = detached(call)
    with torch.enable_grad():
        returned = run(again).tensors
    sent: Sent = {}
    ends = [(returned[index], grad) for index, grad in arrived.items()]
    ends = [(one, grad) for one, grad in ends if one.requires_grad]
    for draw in range(draws):
        is_last = draw == draws - 1
        if ends:
            torch.autograd.backward(
                [one for one, _ in ends],
                [grad[draw].to(one.device) for one, grad in ends],
                retain_graph=not is_last,
            )
        down = [(given, leaf.grad) for given, leaf in pairs if leaf.grad is not None]
        if down:
            torch.autograd.backward(
                [given for given, _ in down],
                [grad for _, grad in down],
                retain_graph=not is_last,
            )
        for _, leaf in pairs:
            leaf.grad = None
        collect(leaves, sent)
    return sent


def needs_gradients(call: Call) -> bool:
    """Whether a gradient goes through a call of a replay with gradients."""
    return bool(detached(call)[1])
