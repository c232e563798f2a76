"""Codes that make up for what the layers before them change, one decoder layer after the other.

A scheme rounds a weight ``W`` as if the layer saw the inputs ``x`` of the original. In the
quantized model it sees others, ``x'``, and it can give back a part of what these lost:

    T = W + (sum_t w_t (W (x_t - x'_t) + r_t) x'_t^T) (sum_t w_t x'_t x'_t^T + damping)^-1

is the weight whose outputs on ``x'`` are those of ``W`` on ``x`` as nearly as least squares allow.
``r`` is 0 but for layers whose outputs are added to the residual stream: it is what the stream
itself lost before, which they can give back too. On other text all of that is too much: layers
have thousands of inputs, and few tokens count. So ``W`` is moved by a share of it, the one that is
best where what every other sequence says is judged by the others, and so is the damping.

Codes are found for ``T`` by descent from those that the scheme made, with the Hessian of ``x'``;
where that changes much, they are fitted to ``T`` anew, as ``~descent`` fits, if that is better.
(Where it changes little, a fit would only give other codes that are as good.)
Layers are taken in the order in which they compute, each in the model in which those before have
their codes. Where inputs are rounded, ``x'`` are the rounded ones. Tokens count ``w_t`` as for
``~gptq``.

``x`` and ``w`` are in the statistics. The model is run as it is and quantized, one decoder layer in
memory at a time. Experts keep their codes: other tokens reach them than in the original.

Source: GPTAQ, Y. Li et al., arXiv:2504.02692, which puts ``x - x'`` into GPTQ's updates of columns.
What the stream lost, and the share, are added to that here.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from mofq.decision.recipe import Recipe
from mofq.delivery.apply.apply_by_unit import Applied, unit_modules
from mofq.delivery.apply.emulate import apply_group, prepare
from mofq.delivery.apply.loaded_model import module_path
from mofq.delivery.recipe_fits import check_fits
from mofq.delivery.tuning.residual import AddsTo, StopCall, Watched, call, find_added
from mofq.evidence.code_changes import (
    CodeChanges,
    can_change_scales,
    can_learn,
    from_tensors,
    to_tensors,
)
from mofq.evidence.fits import Fits, SeenSequence
from mofq.evidence.layer_codes import fit_rows, layer_codes
from mofq.exceptions import MofqError, Remark, StreamingError
from mofq.files.progress import Progress, Steps, Tell
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows, read_shared_amax
from mofq.model.layers import LinearLayer, ModelLayers, find_loaded_weight, is_expert
from mofq.model.streaming.disk import KEPT_STEPS, check_disk, hidden_size
from mofq.model.streaming.execution import free_bytes
from mofq.model.streaming.records import read_content, write_tensors
from mofq.model.streaming.replay import Call, StreamedSequence, keep, run
from mofq.model.streaming.streamed import StreamedModel, open_streamed
from mofq.numbers.quantize import (
    FakeQuantLinear,
    QuantizedWeight,
    damped_hessian,
    dequantize_weight,
    descend_from,
    factorise_hessian,
)
from mofq.numbers.schemes import TensorScheme

#: Dampings that are tried, relative to the mean of the Hessian's diagonal.
_DAMPINGS = (0.1, 0.3, 1.0)
#: Most rows of a weight by which damping and share are chosen.
_ROWS = 256
#: Where descent leaves less than this of what the scheme's codes lose, others may be far better.
_FAR = 0.9
#: Fewest tokens for each input of a layer: of fewer, least squares fit what is chance.
_TOKENS_PER_INPUT = 4
#: Matrices in eight bytes, of inputs by inputs: of each layer that reads the same, and beside them;
#: of outputs by inputs: of the largest of them.
_MATRICES, _BESIDE, _OF_OUTPUTS = 2, 4, 4
#: Every other sequence is of one half.
_HALVES = 2
#: Each has its results on the disk.
_PASSES = ("original", "quantized")
#: In the folder of what was done: files of the changes of a step, and of none when all are done.
_CODES, _DONE = "codes-", "codes-done"


@dataclass(frozen=True, slots=True)
class SeenTokens:
    """A sequence of which the statistics have the inputs of layers."""

    corpus: str
    index: int  #: of the corpus's sequences
    token_T: Tensor  #: int64


@dataclass(slots=True, eq=False)
class FittedLayer:
    """A layer whose codes are found anew, where its unit is in memory."""

    layer: LinearLayer
    scheme: TensorScheme
    path: str  #: of the module
    module: FakeQuantLinear
    amax: float | Tensor | None
    adds: AddsTo | None  #: where its outputs meet the residual stream
    #: Of each half: sum w x' x'^T, sum w (x - x') x'^T and sum w r x'^T, float32.
    hessian_HII: Tensor = field(init=False)
    lost_HII: Tensor = field(init=False)
    stream_HOI: Tensor | None = None
    tokens: int = 0

    def begin(self) -> None:
        """Forget all inputs."""
        columns, device = self.layer.in_features, self.module.weight.device
        zeros = partial(torch.zeros, dtype=torch.float32, device=device)
        self.hessian_HII = zeros(_HALVES, columns, columns)
        self.lost_HII = zeros(_HALVES, columns, columns)
        if self.adds is not None:
            self.stream_HOI = zeros(_HALVES, self.layer.out_features, columns)
        self.tokens = 0

    def see(self, x_TI: Tensor, seen: SeenSequence, lost_TO: Tensor | None, *, half: int) -> bool:
        """Take what one sequence shows.

        Args:
            x_TI: Its inputs in the quantized model, rounded, float32.
            seen: Those of the original, and what each token counts.
            lost_TO: What the residual stream lost before, at the layer's outputs, float32.
            half: That the sequence is of.

        Returns:
            False where these are not the same tokens.
        """
        original_TI = seen.x_TI.to(x_TI.device, torch.float32)
        if original_TI.shape != x_TI.shape:
            return False
        norm_T1 = seen.norm_T.to(x_TI.device, torch.float32)[:, None]
        norm_T1 = norm_T1 * seen.share**0.5
        lost_TI = (original_TI - x_TI) * norm_T1
        x_TI = x_TI * norm_T1
        self.hessian_HII[half].addmm_(x_TI.T, x_TI)
        self.lost_HII[half].addmm_(lost_TI.T, x_TI)
        if self.stream_HOI is not None and lost_TO is not None:
            self.stream_HOI[half].addmm_((lost_TO * norm_T1).T, x_TI)
        self.tokens += len(x_TI)
        return True

    def end(self) -> None:
        """Give the matrices back."""
        del self.hessian_HII, self.lost_HII
        self.stream_HOI = None

    def target(self, weight_OI: Tensor) -> Tensor:
        """What codes are to stand for, float32; the weight where nothing can be given back."""
        given_HOI = weight_OI @ self.lost_HII
        if self.stream_HOI is not None:
            given_HOI += self.stream_HOI
        some = slice(None, None, -(-len(weight_OI) // _ROWS))
        best = (0.0, 0.0, 0.0)
        for damping in _DAMPINGS:
            pulls = scale = 0.0
            for half in range(_HALVES):
                other = 1 - half
                step_OI = _solved(self.hessian_HII[half], given_HOI[half, some], damping)
                pulls += float((step_OI * given_HOI[other, some]).sum())
                scale += float(((step_OI @ self.hessian_HII[other]) * step_OI).sum())
            share = min(max(pulls / scale, 0.0), 1.0) if scale > 0 else 0.0
            best = max(best, (2 * share * pulls - share**2 * scale, share, damping))
        _, share, damping = best
        if not share > 0:
            return weight_OI
        share = 2 * share / (1 + share)  # both halves together: the same signal, half of the noise
        step_OI = _solved(self.hessian_HII.sum(0), given_HOI.sum(0), damping)
        return weight_OI + share * step_OI


#: Of a corpus, one of its sequences.
_Key = tuple[str, int]


@dataclass(slots=True)
class _Compensation:
    """All that one pass through the model needs."""

    streamed: StreamedModel
    applied: Applied
    layers: ModelLayers  #: of the checkpoint
    checkpoint: Checkpoint
    fits: Fits | None  #: of the recipe
    seen: Fits
    originals: Mapping[_Key, StreamedSequence]  #: that the model runs as it is
    sequences: Mapping[_Key, StreamedSequence]  #: the same, that it runs quantized
    work: Path  #: has the changes of each step that is done
    changes: dict[str, CodeChanges] = field(default_factory=dict)  #: of this step
    no_room: list[str] = field(default_factory=list)  #: layers that memory is too small for
    #: Layer, sequence -> a file: the residual stream of the original without what the layer adds.
    _streams: dict[tuple[str, _Key], Path] = field(default_factory=dict)

    def run(self, progress: Progress | None) -> None:
        """Every unit in the order in which it is called."""
        streamed, sequences = self.streamed, list(self.sequences.values())
        originals = list(self.originals.values())
        tell = Steps(progress, "compensate", len(streamed.weights.units))
        done: set[str] = set()
        for step in count():
            unit = streamed.unit_at(originals[0], step)
            if unit == streamed.head:
                tell()
                return
            if unit in done:
                raise StreamingError(
                    f"{unit} runs more than once for a token, and has one set of codes"
                )
            done.add(unit)
            path = self.work / f"{_CODES}{step:05d}"
            if not path.exists():
                self._run_unit(unit, step)
                _write_changes(path, self.changes)
            streamed.replayer.forget([*originals, *sequences], step)
            tell()

    def _run_unit(self, unit: str, step: int) -> None:
        """Find the codes of a unit, and run both models through it."""
        self.changes.clear()
        self._streams.clear()
        streamed = self.streamed
        with streamed.weights.loaded(unit, ahead=streamed.next_unit(unit)):
            added = self._run_original(unit, step)
            with unit_modules(streamed.model, unit, [self.applied]).applied(self.applied):
                for together in self._by_input(unit, step, added):
                    self._fit(together, step)
                for one in self.sequences.values():
                    streamed.run_step(one, step, unit)
                streamed.writer.wait()

    def _run_original(self, unit: str, step: int) -> dict[str, AddsTo]:
        """Run a unit as it is, and keep what the residual stream is where layers add to it.

        Returns:
            Path of a linear layer's module -> how its outputs meet the stream.
        """
        names = [
            module_path(layer)
            for group in self.applied.groups_within(unit)
            for layer in group.layers
            if layer.role == "linear" and layer.expert is None
        ]
        model, first = self.streamed.model, next(iter(self.originals))
        found = find_added(self._reach(self.originals, first, step), model, names) if names else {}
        for key, sequence in self.originals.items():
            if found:
                reached = self._reach(self.originals, key, step)
                with Watched(model, found.values()) as watched:
                    returned = run(reached)
                watched.note_result(returned.output)
                keep(returned, reached, sequence.record(step), writer=self.streamed.writer)
                for number, (path, adds) in enumerate(found.items()):
                    place = sequence.folder / f"stream-{number}"
                    write_tensors(place, None, [watched.before(adds)])
                    self._streams[path, key] = place
            else:
                self.streamed.run_step(sequence, step, unit)
        self.streamed.writer.wait()
        return found

    def _by_input(
        self, unit: str, step: int, added: Mapping[str, AddsTo]
    ) -> list[list[FittedLayer]]:
        """The layers of a unit that can be fitted, those together that read the very same."""
        found = {id(one.module): one for one in self._layers(unit, added)}
        if not found:
            return []
        calls: list[tuple[Tensor, FittedLayer]] = []

        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            calls.append((args[0], found[id(module)]))

        handles = [one.module.register_forward_pre_hook(note) for one in found.values()]
        try:
            call(self._reach(self.sequences, next(iter(self.sequences)), step))
        finally:
            for handle in handles:
                handle.remove()
        order = [one.layer.name for _, one in calls]
        together: dict[int, list[FittedLayer]] = {}
        for x, one in calls:  # all inputs are alive: no two have one address
            if order.count(one.layer.name) == 1:
                together.setdefault(id(x), []).append(one)
        return list(together.values())

    def _layers(self, unit: str, added: Mapping[str, AddsTo]) -> Iterator[FittedLayer]:
        model, prepared = self.streamed.model, self.applied.prepared
        for group in self.applied.groups_within(unit):
            scheme = prepared.schemes[group.name].weight
            if scheme is None or not can_learn(scheme):
                continue
            stored = [prepared.stored[layer.name] for layer in group.layers]
            amax: Mapping[str, float | Tensor] = {}
            if scheme.needs_tensor_amax:
                whole = next(one for one in self.layers.groups if one.name == group.name)
                amax = read_shared_amax(self.checkpoint, whole, scheme)
            for layer in stored:
                if layer.role != "linear" or is_expert(layer):
                    continue
                at = find_loaded_weight(layer, self.layers.architecture)
                path = at.name.rpartition(".")[0]
                module = model.get_submodule(path)
                if isinstance(module, FakeQuantLinear):
                    known = amax.get(layer.name)
                    yield FittedLayer(layer, scheme, path, module, known, added.get(path))

    def _fit(self, together: Sequence[FittedLayer], step: int) -> None:
        """Find the codes of layers that read the same anew, where there is room for it."""
        if not _has_room(together):
            self.no_room += [one.layer.name for one in together]
            return
        for one in together:
            one.begin()
        try:
            known = zip(*(self.seen.seen(one.layer) for one in together), strict=True)
            number = 0
            for every in known:
                key = every[0].key[:2]
                if key not in self.sequences:
                    continue
                number += 1
                x_TI, lost = self._inputs(together, key, step)
                for one, seen in zip(together, every, strict=True):
                    rounded_TI = one.module.rounded(x_TI).float()
                    if not one.see(rounded_TI, seen, lost.get(one.path), half=number % _HALVES):
                        return
            for one in together:
                if one.tokens >= _TOKENS_PER_INPUT * one.layer.in_features:
                    self._choose(one)
        finally:
            for one in together:
                one.end()

    def _inputs(
        self, together: Sequence[FittedLayer], key: _Key, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What layers are given in one sequence that read the same, [tokens, in_features].

        Returns:
            That; path -> what the residual stream lost before a layer adds to it.
        """
        inputs: list[Tensor] = []
        added = {one.path: one.adds for one in together if one.adds is not None}

        def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.append(args[0].detach().flatten(0, -2))
            if not added:
                raise StopCall

        handle = together[0].module.register_forward_pre_hook(note)
        model, reached = self.streamed.model, self._reach(self.sequences, key, step)
        try:
            with Watched(model, added.values(), stop=True) as watched:
                call(reached, watched)
        finally:
            handle.remove()
        if not inputs:
            raise StreamingError("a layer is called for one sequence and not for another")
        lost = {}
        for path, adds in added.items():
            _, (stream_TC,) = read_content(self._streams[path, key])
            before_TC = watched.before(adds)
            lost[path] = watched.at_outputs(stream_TC.to(before_TC.device) - before_TC, adds)
        return inputs[0], lost

    def _reach(self, of: Mapping[_Key, StreamedSequence], key: _Key, step: int) -> Call:
        return self.streamed.replayer.reach(of[key], step)[0]

    def _choose(self, one: FittedLayer) -> None:
        """The codes of a layer whose inputs are known."""
        layer, scheme, module = one.layer, one.scheme, one.module
        read_rows = partial(read_layer_rows, self.checkpoint, layer)
        codes = layer_codes(self.fits, layer, scheme, read_rows, tensor_amax=one.amax)
        before = codes.rows(0, layer.out_features)
        device = module.weight.device
        weight_OI = read_rows(0, layer.out_features).to(device, torch.float32)
        target_OI, hessian_II = one.target(weight_OI), one.hessian_HII.sum(0, dtype=torch.float64)
        if not bool(torch.isfinite(target_OI).all() and torch.isfinite(hessian_II).all()):
            return
        after = descend_from(
            before.to(device),
            target_OI,
            scheme,
            hessian_II=damped_hessian(hessian_II.clone()),
            moves_scales=can_change_scales(scheme),
        ).to("cpu")
        lost = partial(_lost, scheme=scheme, target_OI=target_OI, hessian_II=hessian_II)
        descended = lost(after)
        if descended < _FAR * lost(before) and _can_be_fitted(scheme):
            factors = factorise_hessian(hessian_II, name=layer.name, keep=True)
            fresh = fit_rows(
                *(layer, replace(scheme, rounding="descent")),
                lambda start, stop: target_OI[start:stop],
                {"importance": None, "feedback": factors.to(device)},
                tensor_amax=one.amax,
                device=device,
            )
            after = fresh if lost(fresh) < descended else after
        self.changes[layer.name] = CodeChanges.between(before, after)
        module.weight.copy_(dequantize_weight(after.to(device), scheme))


def _lost(
    codes: QuantizedWeight, *, scheme: TensorScheme, target_OI: Tensor, hessian_II: Tensor
) -> float:
    """What codes lose of what they are to stand for, in the units of the Hessian."""
    lost_OI = dequantize_weight(codes.to(target_OI.device), scheme) - target_OI
    return float(((lost_OI @ hessian_II.float()) * lost_OI).sum())


def _can_be_fitted(scheme: TensorScheme) -> bool:
    """Whether all that a scheme makes may be changes: zero points are none."""
    return scheme.symmetric and can_change_scales(scheme)


def _solved(hessian_II: Tensor, given_OI: Tensor, damping: float) -> Tensor:
    """What is given times the inverse of the damped Hessian, float32."""
    damped_II = hessian_II.double()
    damped_II.diagonal().add_(damping * float(damped_II.diagonal().mean()))
    root_II, failed = torch.linalg.cholesky_ex(damped_II)
    if int(failed):  # not finite, or no token counts
        return torch.full_like(given_OI, math.nan)
    return torch.cholesky_solve(given_OI.double().T, root_II).T.float()


def _has_room(together: Sequence[FittedLayer]) -> bool:
    free = free_bytes(str(together[0].module.weight.device))
    columns = together[0].layer.in_features
    rows = max(one.layer.out_features for one in together)
    of_inputs = (_MATRICES * len(together) + _BESIDE) * columns**2
    return free is None or 8 * (of_inputs + _OF_OUTPUTS * rows * columns) < free


def compensate(
    checkpoint: Checkpoint,
    recipe: Recipe,
    sequences: Sequence[SeenTokens],
    *,
    layers: ModelLayers,
    fits: Fits | None,
    seen: Fits,
    dtype: str,
    device: str,
    work: Path | None = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> dict[str, CodeChanges]:
    """Find codes that make up for what the layers before them change.

    Args:
        checkpoint: That the recipe is applied to.
        recipe: Not tuned.
        sequences: That codes are fitted to; those alone count whose inputs are in ``seen``.
        layers: Of the checkpoint.
        fits: Of the recipe's stats; where a scheme is fitted.
        seen: The statistics of a calibration on these sequences.
        dtype: Of the arithmetic.
        device: Where the model runs, one decoder layer at a time.
        work: A folder that has what is kept between layers; of a run that was stopped, which was
            of the same arguments, it has what was done. None: a temporary one.
        progress: Called with ``"compensate"``, units run, and all of them.
        tell: Called with which layers memory is too small for.

    Returns:
        Layer -> what becomes of the codes and scales that its scheme makes; of linear layers
        outside of experts.

    Raises:
        StreamingError: The model cannot be run layer by layer, or the disk is too small.
        MofqError: The recipe does not fit the model, or weights or statistics are damaged.
    """
    with _folder(work) as folder:
        if not has_compensated(folder):
            with (
                open_streamed(checkpoint.folder, dtype=dtype, device=device) as streamed,
                torch.no_grad(),
            ):
                prepared = prepare(
                    streamed.model, recipe, check=partial(check_fits, fits), checkpoint=checkpoint
                )
                _check_room(folder, streamed, sequences)
                originals, quantized = (_sequences(folder / one, sequences) for one in _PASSES)
                applied = Applied(prepared, partial(apply_group, fits=fits), streamed.head)
                found = _Compensation(
                    *(streamed, applied, layers, checkpoint, fits, seen),
                    *(originals, quantized, folder),
                )
                found.run(progress)
                if found.no_room and tell is not None:
                    tell(Remark(_without_room(found.no_room)))
            _write_changes(folder / _DONE, {})
        return {
            name: one
            for path in sorted(folder.glob(f"{_CODES}*"))
            for name, one in _read_changes(path).items()
        }


def _without_room(names: Sequence[str]) -> str:
    return (
        f"{len(names)} layers keep their codes, such as {names[0]}: matrices of their inputs do "
        f"not fit into the free memory. The codes of all others compensate."
    )


def has_compensated(folder: Path) -> bool:
    """Whether `compensate` came to its end in a folder."""
    return (folder / _DONE).exists()


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    """That of what is done; what both passes kept goes, unless the process is stopped.

    So do the codes where it ends with an error before all are found: it goes on from the passes.
    """
    if work is None:
        with tempfile.TemporaryDirectory(prefix="mofq-compensate-") as folder:
            yield Path(folder)
        return
    try:
        yield work
    except MofqError:
        if not has_compensated(work):
            for path in sorted(work.glob(f"{_CODES}*"), reverse=True):  # killed here, it goes on
                path.unlink()
        _drop_passes(work)
        raise
    _drop_passes(work)


def _drop_passes(folder: Path) -> None:
    for name in _PASSES:
        shutil.rmtree(folder / name, ignore_errors=True)


def _sequences(folder: Path, seen: Sequence[SeenTokens]) -> dict[_Key, StreamedSequence]:
    """Those of a pass, each with a folder."""
    found = {}
    for number, one in enumerate(seen):
        place = folder / f"{number:05d}"
        place.mkdir(parents=True, exist_ok=True)
        found[one.corpus, one.index] = StreamedSequence(one.token_T, place)
    return found


def _check_room(folder: Path, streamed: StreamedModel, sequences: Sequence[SeenTokens]) -> None:
    """Refuse to begin what the disk cannot hold."""
    model = streamed.model
    tokens = sum(len(one.token_T) for one in sequences)
    results = len(_PASSES) * KEPT_STEPS * tokens
    needed = results * hidden_size(model) * model.dtype.itemsize
    check_disk(folder, needed, fewer="sequences", error=StreamingError)


def _write_changes(path: Path, changes: Mapping[str, CodeChanges]) -> None:
    """Write changes to codes, to go on with."""
    tensors = to_tensors(changes)
    write_tensors(path, list(tensors), list(tensors.values()))


def _read_changes(path: Path) -> dict[str, CodeChanges]:
    """What `_write_changes` wrote."""
    return from_tensors(dict(zip(*read_content(path), strict=True)))
