"""A quantized model that is tuned with one decoder layer in memory.

A step runs its sequences forward, layer after layer, and backward, where each layer is computed
again, gets the gradients of its norms and rounded weights, and moves. What was learned of a layer
lies in a file between its turns (`unit_states`). Of the original the last hidden states are kept,
from which its head computes logits when they are compared. All are files: a run that was killed
goes on with the layer that it was at, and ends with the bytes of a model in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mofq.decision.recipe import Recipe
from mofq.delivery.apply.apply_by_unit import Applied, UnitModules, unit_modules
from mofq.delivery.apply.emulate import apply_group, prepare, put_group
from mofq.delivery.recipe_fits import check_fits
from mofq.delivery.tuning.codes import LearnedCodes, find_leaf, learned_layers
from mofq.delivery.tuning.norms import TunedNorm, find_norms
from mofq.delivery.tuning.products import in_bfloat16
from mofq.delivery.tuning.tensors import replaced
from mofq.delivery.tuning.tune import BATCH, Rates, Split, check_has_any, send_divergence
from mofq.delivery.tuning.unit_states import OUTSIDE, UnitState, UnitStates
from mofq.delivery.validation.divergence import check_logits, score_window
from mofq.delivery.validation.streamed import Run, Subject, check_units
from mofq.evidence.code_changes import CodeChanges, can_learn
from mofq.evidence.fits import Fits
from mofq.exceptions import StreamingError
from mofq.files.documents import write_beside_and_rename
from mofq.files.progress import Progress, Steps
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import FusionGroup, LinearLayer, ModelLayers
from mofq.model.layers.module_layers import layers_within
from mofq.model.streaming.backward import Gradients, Sent, StepBack, collect, needs_gradients
from mofq.model.streaming.disk import KEPT_STEPS, check_disk, hidden_size
from mofq.model.streaming.records import read_content, write_tensors
from mofq.model.streaming.replay import StreamedSequence
from mofq.model.streaming.streamed import StreamedModel, open_streamed
from mofq.numbers.quantize import dequantize_weight
from mofq.numbers.quantize.tiles import tile_shape
from mofq.numbers.schemes import Scheme, TensorScheme

#: Results of a layer that lie on the disk as gradients of those.
_GRADIENTS = 2
#: Bytes of a weight in a file: where it is in its cell, and its code.
_WEIGHT_BYTES = 4 + 1
#: Of a scale: the scale, its zero point, its factor, and the gradient and mean square of that.
_SCALE_BYTES = 4 + 1 + 3 * 4


@dataclass(slots=True)
class Streamed:
    """As `Tunable` says, layer by layer; from `open_tuning`."""

    base: StreamedModel  #: that the recipe is applied to
    original: StreamedModel  #: the same, unless the recipe rewrites the model
    applied: Applied
    layers: ModelLayers  #: of the base's checkpoint
    checkpoint: Checkpoint  #: the base's
    fits: Fits | None
    split: Split
    states: UnitStates
    folder: Path
    steps: int
    learns: bool  #: whether codes are
    tell: Steps
    _start: Mapping[str, CodeChanges] = field(init=False, default_factory=dict)
    _rates: Rates = field(init=False)
    _learned: dict[str, LearnedCodes] = field(init=False, default_factory=dict)  #: of this unit
    _stepped: list[StreamedSequence] = field(init=False)  #: in the original
    _held_out: list[StreamedSequence] = field(init=False)
    _reference_step: int = field(init=False)  #: of the original's head

    def run_original(self, progress: Progress | None) -> None:
        """Run the original up to its head; this comes first."""
        stepped = len(self.split.stepped_NT) if self.steps else 0
        tokens_NT = torch.cat([self.split.stepped_NT[:stepped], self.split.held_out_NT])
        every = self._sequences("original", tokens_NT)
        self._stepped, self._held_out = every[:stepped], every[stepped:]
        tell = Steps(progress, "original", len(self.original.weights.units))
        self._reference_step = self.original.forward(every, forget=True, on_step=lambda _: tell())
        tell()

    def put(self, start: Mapping[str, CodeChanges]) -> None:
        """As `Tunable` says."""
        self._start = start

    def begin(self) -> None:
        """As `Tunable` says: every unit is quantized once."""
        units = (OUTSIDE, *self.base.weights.units)
        for unit in units:
            if not self.states.has(unit):
                self._begin(unit)
            self.tell()
        check_has_any(
            self.applied.prepared.recipe, self.checkpoint, any(map(self.states.is_learned, units))
        )
        errors = self.states.errors()
        names = (layer.name for layer in self.layers.grouped_layers)
        self._rates = Rates(self.steps, [errors[name] for name in names if name in errors])

    def _begin(self, unit: str) -> None:
        model, weights = self.base.model, self.base.weights
        ahead = None if unit == OUTSIDE else self.base.next_unit(unit)
        with nullcontext() if unit == OUTSIDE else weights.loaded(unit, ahead=ahead):
            found = find_norms(model, self.checkpoint, self.layers.architecture)
            norms = [TunedNorm.of(one) for one in found if self.unit_of(one.path) == unit]
            codes: list[LearnedCodes] = []
            if unit != OUTSIDE and self.learns:
                with unit_modules(model, unit, [self.applied]).applied(self.applied):
                    codes = list(
                        learned_layers(
                            model,
                            self.applied.prepared.recipe,
                            layers_within(self.layers, unit),
                            self.checkpoint,
                            fits=self.fits,
                            start=self._start,
                        )
                    )
            self.states.begin(unit, norms, codes)

    def unit_of(self, path: str) -> str:
        """The unit that a parameter is in, or `OUTSIDE`."""
        units = self.base.weights.units
        return next((unit for unit in units if path.startswith(f"{unit}.")), OUTSIDE)

    def _sequences(self, name: str, tokens_NT: Tensor) -> list[StreamedSequence]:
        """Sequences of a pass, each with a folder."""
        found = [
            StreamedSequence(token_T, self.folder / name / f"{index:05d}")
            for index, token_T in enumerate(tokens_NT)
        ]
        for one in found:
            one.folder.mkdir(parents=True, exist_ok=True)
        return found

    def apply_one(
        self,
        model: nn.Module,
        group: FusionGroup,
        scheme: Scheme,
        *,
        sources: Mapping[str, Tensor],
        recipe: Recipe,
        changes: Mapping[str, CodeChanges],
    ) -> None:
        """As `apply_group`, with what was learned of the unit."""
        learned = self._learned
        if group.layers[0].name not in learned:
            apply_group(
                model,
                group,
                scheme,
                sources=sources,
                recipe=recipe,
                fits=self.fits,
                changes={**changes, **self._start},
            )
            return

        def rounded(layer: LinearLayer) -> Tensor:
            one = learned[layer.name]
            return dequantize_weight(one.learned(), one.scheme)

        put_group(model, group, scheme, rounded, recipe=recipe)

    @contextmanager
    def _turn(self, unit: str, *, times: int = 1) -> Iterator[_Turn]:
        """What is learned of a unit, whose weights are there, to be applied so many times."""
        modules = unit_modules(self.base.model, unit, [self.applied], times=times)
        state, outside = map(self._state, (unit, OUTSIDE))
        self._learned = {one.name: one for one in state.codes}
        try:
            yield _Turn(self, unit, modules, state, outside)
        finally:
            self._learned = {}

    def _state(self, unit: str) -> UnitState:
        """What is learned of a unit; nothing before `begin`."""
        if not self.states.has(unit):
            return UnitState([], [], [])
        return self.states.read(unit, self._rates)

    @contextmanager
    def _within(self, unit: str) -> Iterator[None]:
        with self._turn(unit) as turn, turn.applied():
            yield

    def _forward(self, sequences: Sequence[StreamedSequence], *, for_gradients: bool) -> int:
        """Run sequences through the quantized model up to its head; the step of that."""
        with self._products() if for_gradients else nullcontext():
            step = self.base.forward(
                sequences,
                for_gradients=for_gradients,
                forget=not for_gradients,
                within=self._within,
                on_step=lambda _: self.tell(),
            )
        seen: set[str] = set()
        for one in range(step):
            unit = _unit_at(sequences[0], one)
            if unit in seen and self.states.has(unit) and self.states.is_learned(unit):
                raise StreamingError(
                    f"{unit} runs more than once for a token, and is learned once for all"
                )
            seen.add(unit)
        self.tell()
        return step

    def _products(self) -> torch.autocast:
        """In what a step multiplies matrices."""
        return in_bfloat16(self.base.model, self.base.weights.device)

    def _tell_passes(self, count: int) -> None:
        """Of what was done before."""
        for _ in range(count * len(self.base.weights.units)):
            self.tell()

    @contextmanager
    def _heads(self, *, times: int) -> Iterator[_Turn]:
        """The weights of both heads, and what is learned of the quantized one."""
        with ExitStack() as stack:
            for one in {id(one): one for one in (self.base, self.original)}.values():
                stack.enter_context(one.weights.loaded(one.head))
            yield stack.enter_context(self._turn(self.base.head, times=times))

    def _reference(self, sequence: StreamedSequence) -> Tensor:
        """The original's logits of a sequence of it, [T, V], float32; its head is there."""
        logits_TV = self.original.logits(sequence, self._reference_step)
        check_logits(logits_TV, what="the original model")
        return logits_TV.float()

    def judge(self, when: str) -> Tensor:
        """As `Tunable` says."""
        path, windows_NT = self.folder / f"{when}.json", self.split.held_out_NT
        if not path.exists():
            sequences = self._sequences(when, windows_NT)
            step = self._forward(sequences, for_gradients=False)
            found = []
            with self._heads(times=len(sequences)) as turn:
                for original, sequence in zip(self._held_out, sequences, strict=True):
                    reference_TV = self._reference(original)
                    with turn.applied():
                        logits_TV = self.base.logits(sequence, step)
                    check_logits(logits_TV, what="the quantized model")
                    score = score_window(reference_TV, logits_TV, sequence.token_T)
                    found.append(score.kl_nats / windows_NT.shape[1])
            write_beside_and_rename(path, json.dumps(found))
        else:
            self._tell_passes(1)
        shutil.rmtree(self.folder / when, ignore_errors=True)
        return torch.tensor(json.loads(path.read_text("utf-8")), dtype=torch.float64)

    def step(self, number: int, indices: Sequence[int]) -> None:
        """As `Tunable` says."""
        name = f"pass-{number:05d}"
        if not self.states.has_ended(number):
            sequences = self._sequences(name, self.split.stepped_NT[list(indices)])
            head = self._forward(sequences, for_gradients=True)
            gradients = [Gradients(one) for one in sequences]
            self._send_from_head(gradients, indices, head, number)
            self.tell()
            for step in range(head - 1, -1, -1):
                self._send(gradients, step, head, number)
                self.tell()
            self._end_outside(name, head, number)
            self.states.end_step(number)
        else:
            self._tell_passes(2)
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def _send_from_head(
        self, gradients: Sequence[Gradients], indices: Sequence[int], head: int, number: int
    ) -> None:
        """Run backward from the divergence of each sequence to what the logits are made of."""
        unit = self.base.head
        if self._is_done(gradients, head, unit, number):
            return
        with self._heads(times=len(gradients)) as turn:
            for one, index in zip(gradients, indices, strict=True):
                reference_TV = self._reference(self._stepped[index])
                with turn.applied():
                    turn.want_gradients()
                    with torch.enable_grad(), self._products():
                        logits_TV, leaves = self.base.replayer.finish(one.sequence, head)
                    send_divergence(logits_TV, reference_TV)
                sent: Sent = {}
                collect(leaves, sent)
                one.keep(head, sent, writer=self.base.writer)
                del logits_TV, leaves, sent
            self.base.writer.wait()
            turn.end(number, self._outside(gradients, head))

    def _send(self, gradients: Sequence[Gradients], step: int, head: int, number: int) -> None:
        """Run backward through one step of each sequence."""
        unit = _unit_at(gradients[0].sequence, step)
        if self._is_done(gradients, step, unit, number):
            return
        with self._products():
            call, _ = self.base.replayer.reach(gradients[0].sequence, step, with_gradients=True)
        if not needs_gradients(call) and not self.states.is_learned(unit):
            for one in gradients:
                one.keep(step, {}, writer=self.base.writer)
            self.base.writer.wait()
            return
        ahead = self.base.next_unit(unit, backwards=True)
        with (
            self.base.weights.loaded(unit, ahead=ahead),
            self._turn(unit) as turn,
            turn.applied(),
        ):
            turn.want_gradients()
            for one in gradients:
                sent: Sent = {}
                with self._products():
                    back = StepBack(self.base.replayer, one.sequence, step)
                arrived = one.arrived(step, last=head)
                back.send({index: grad[0] for index, grad in arrived.items()}, sent)
                one.keep(step, sent, writer=self.base.writer)
                del back, arrived, sent
            self.base.writer.wait()
            turn.end(number, self._outside(gradients, step))
        # Not before: until the unit has moved, a run that was stopped needs the rest.
        for one in gradients:
            one.drop(step, last=head)

    def _is_done(self, gradients: Sequence[Gradients], step: int, unit: str, number: int) -> bool:
        """Whether a step was run backward, and its unit has moved."""
        return (
            all(one.has(step) for one in gradients)
            and self._outside(gradients, step).exists()
            and (not self.states.is_learned(unit) or self.states.steps(unit) > number)
        )

    def _outside(self, gradients: Sequence[Gradients], step: int) -> Path:
        """The file of the gradients that a step gave to norms outside of the units."""
        return gradients[0].sequence.folder.parent / f"outside-{step:05d}"

    def _end_outside(self, name: str, head: int, number: int) -> None:
        """Have the norms outside of the units their gradients."""
        if self.states.steps(OUTSIDE) > number:
            return
        state = self.states.read(OUTSIDE, self._rates)
        summed: dict[str, Tensor] = {}
        for step in range(head, -1, -1):
            path = self.folder / name / f"outside-{step:05d}"
            if path.exists():
                for norm, gradient_C in zip(*read_content(path), strict=True):
                    summed[norm] = summed[norm] + gradient_C if norm in summed else gradient_C
        for one in state.norms:
            one.take_gradient(summed[one.path].to(one.size_C) if one.path in summed else None)
        self.states.write(OUTSIDE, state, number + 1)

    def tensors(self) -> dict[str, Tensor]:
        """As `Tunable` says."""
        return {
            name: tensor
            for unit in (OUTSIDE, *self.base.weights.units)
            for norm in self.states.read(unit, self._rates).norms
            for name, tensor in norm.changed().items()
        }

    def changes(self) -> dict[str, CodeChanges]:
        """As `Tunable` says."""
        return {
            one.name: one.changes()
            for unit in self.base.weights.units
            for one in self.states.read(unit, self._rates).codes
        }


@dataclass(slots=True)
class _Turn:
    """A unit whose weights are there, with what is learned of it."""

    tuning: Streamed
    unit: str
    modules: UnitModules
    state: UnitState
    outside: UnitState
    #: Path -> what gets the gradient of a norm.
    _parameters: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def _norms(self) -> list[TunedNorm]:
        return [*self.state.norms, *self.outside.norms]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Have it in the model while the context lasts."""
        model = self.tuning.base.model
        with self.modules.applied(self.tuning.applied):
            values = [(model.get_parameter(one.path).detach(), one.value_C) for one in self._norms]
            with replaced(values):
                yield

    def want_gradients(self) -> None:
        """Ask for the gradients of norms and rounded weights; it is applied."""
        model, layers = self.tuning.base.model, self.tuning.layers
        for norm in self._norms:
            self._parameters[norm.path] = model.get_parameter(norm.path).requires_grad_(True)
        by_name = {layer.name: layer for layer in layers.grouped_layers}
        for one in self.state.codes:
            found = find_leaf(model, by_name[one.name], layers.architecture)
            assert found is not None
            one.place(*found)
            one.begin_step()

    def end(self, number: int, outside: Path) -> None:
        """Move as the gradients of a step say.

        Args:
            number: Of the step.
            outside: The file for the gradients of norms outside of the units.
        """
        grads = {path: one.grad for path, one in self._parameters.items()}
        for one in self._parameters.values():
            one.grad = None
            one.requires_grad_(False)
        found = {n.path: g for n in self.outside.norms if (g := grads[n.path]) is not None}
        write_tensors(outside, list(found), list(found.values()))  # its being there says: all sent
        if not self.state.norms and not self.state.codes:
            return
        for norm in self.state.norms:
            norm.take_gradient(grads[norm.path])
        for code in self.state.codes:
            code.step_codes(self.tuning._rates.of_codes(number))
        for code in self.state.codes:
            code.end_step()
        self.tuning.states.write(self.unit, self.state, number + 1)


def _unit_at(sequence: StreamedSequence, step: int) -> str:
    """Which unit a step that is done called."""
    content, _ = read_content(sequence.record(step))
    return str(content["unit"])


@contextmanager
def open_tuning(
    original: Checkpoint,
    recipe: Recipe,
    checkpoint: Checkpoint,
    split: Split,
    *,
    layers: ModelLayers,
    fits: Fits | None,
    folder: Path,
    steps: int,
    codes: bool,
    judgements: int,
    dtype: str,
    device: str,
    progress: Progress | None,
    tell: Callable[[str], None] | None,
) -> Iterator[Streamed]:
    """A model that is tuned layer by layer.

    Args:
        original: The model as it is.
        recipe: Of ``checkpoint``, not tuned.
        checkpoint: That the recipe is applied to.
        split: What is stepped on, and what judges.
        layers: Of the checkpoint.
        fits: Of the recipe's own stats, where a scheme is fitted.
        folder: Exists, and has what is kept between layers. Of a tuning that was stopped, which
            was of the same arguments, it has what was done.
        steps: Of four sequences each; 0: what it is given is judged alone.
        codes: Whether codes and scales are learned beside norms.
        judgements: How often `Streamed.judge` will be called.
        dtype: Of the arithmetic.
        device: Where it runs.
        progress: Called with ``"original"`` and ``"tune"``, units run, and all of them.
        tell: Called with what the disk has to hold.

    Raises:
        StreamingError: The model cannot be run unit by unit, or runs a unit that is learned more
            than once for a token.
        MofqError: The disk has too little space, or as `tune_model`.
    """
    with ExitStack() as stack:
        open_one = partial(open_streamed, dtype=dtype, device=device)
        base = stack.enter_context(open_one(checkpoint.folder))
        first = base
        if original.folder != checkpoint.folder:
            first = stack.enter_context(open_one(original.folder))
        prepared = prepare(
            base.model, recipe, check=partial(check_fits, fits), checkpoint=checkpoint
        )
        weights = {
            layer.name: scheme
            for group in prepared.quantized
            if (scheme := prepared.schemes[group.name].weight) is not None
            for layer in group.layers
        }
        states = UnitStates(folder, weights, base.weights.device)
        total = (judgements + (2 * steps + 1 if steps else 0)) * len(base.weights.units)
        tuning = Streamed(
            base,
            first,
            Applied(prepared, apply_group, base.head),
            layers,
            checkpoint,
            fits,
            split,
            states,
            folder,
            steps,
            codes,
            Steps(progress, "tune", total),
        )
        tuning.applied = Applied(prepared, tuning.apply_one, base.head)
        if steps:
            _check_apart(tuning)
        check_units(Run(base, [Subject(folder, applied=tuning.applied)]), checkpoint)
        needed = _check_room(folder, tuning)
        if tell is not None:
            tell(f"Between layers, about {needed / 1e9:.2f} GB are kept in {folder.parent}.")
        tuning.run_original(progress)
        yield tuning


def _check_apart(tuning: Streamed) -> None:
    """Refuse a model of which two units have the same weights."""
    units: dict[int, str] = {}
    for path, one in tuning.base.model.named_parameters(remove_duplicate=False):
        unit = tuning.unit_of(path)
        if units.setdefault(id(one), unit) != unit:
            raise StreamingError(
                f"{path} is a weight of {units[id(one)]} too, and is learned once for both"
            )


def _check_room(folder: Path, tuning: Streamed) -> int:
    """Refuse to begin what the disk cannot hold.

    Returns:
        What is kept at once, about [bytes].

    Raises:
        MofqError: There is less space than that.
    """
    split, model = tuning.split, tuning.base.model
    held_out = len(split.held_out_NT)
    every = held_out + (len(split.stepped_NT) if tuning.steps else 0)
    results = max(every * KEPT_STEPS, every + held_out * KEPT_STEPS)
    if tuning.steps:
        results = max(results, every + BATCH * (len(tuning.base.weights.units) + _GRADIENTS))
    needed: int = results * split.held_out_NT.shape[1] * hidden_size(model) * model.dtype.itemsize
    needed += _learned_bytes(tuning) if tuning.steps and tuning.learns else 0
    check_disk(folder, needed, fewer="sequences")
    return needed


def _learned_bytes(tuning: Streamed) -> int:
    """Of the files of what is learned; of the largest unit they are there twice for a moment."""

    def of(layers: Iterable[LinearLayer], scheme: TensorScheme) -> int:
        total = 0
        for one in layers:
            shape = (one.out_features, one.in_features)
            rows, columns = tile_shape(shape, scheme.granularity, name=one.name)
            total += one.weights * _WEIGHT_BYTES + one.weights // (rows * columns) * _SCALE_BYTES
        return total

    schemes = tuning.applied.prepared.schemes
    units = [
        sum(
            of(group.layers, scheme)
            for group in tuning.applied.groups_within(unit)
            if (scheme := schemes[group.name].weight) is not None and can_learn(scheme)
        )
        for unit in tuning.base.weights.units
    ]
    return sum(units) + max(units)
