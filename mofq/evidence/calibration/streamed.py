"""Calibration of a model of which one decoder layer is in memory at a time.

Forward, layer after layer, over all sequences; then backward, each layer computed again from its
arguments. What is kept on the way lies in ``.streamed`` in the stats folder until the last
sequence is written: a run that was stopped goes on from there, and what it writes has the very
bytes of a run with the whole model in memory. Samples can be handed on, unit by unit, and dropped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from stat import S_ISREG

import torch
from torch import Tensor

from mofq.evidence.calibration.calibrate import (
    check_model,
    check_windows,
    infinite_logits,
    is_done,
    kept_layers,
    planned_sequences,
    sample_scores,
    samples_path,
    score_seed,
    seeds_of,
)
from mofq.evidence.calibration.capture import (
    Captured,
    capture_layers,
    check_weights_apart,
    watch_lookups,
)
from mofq.evidence.calibration.captured_place import captured_place
from mofq.evidence.calibration.disk_needs import experts_per_token, kept_bytes
from mofq.evidence.calibration.gains import gains_of, gains_path, write_content
from mofq.evidence.calibration.routing import (
    join_routers,
    margin_gains,
    routing_path,
    write_routing,
)
from mofq.evidence.calibration.sequence_file import (
    input_tensors,
    is_complete,
    sequence_path,
    sequence_tensors,
    write_samples,
)
from mofq.evidence.calibration.stats import (
    UNFINISHED,
    CorpusPlan,
    Plan,
    Stats,
    finish_stats,
    has_gains,
    open_plan,
    passing_stats,
)
from mofq.exceptions import StatsError, option
from mofq.files.progress import Progress
from mofq.model.layers import ModelLayers
from mofq.model.layers.module_layers import layers_within
from mofq.model.streaming.backward import Gradients, Sent, StepBack, collect, needs_gradients
from mofq.model.streaming.records import read_content
from mofq.model.streaming.replay import StreamedSequence
from mofq.model.streaming.send_to_device import send
from mofq.model.streaming.streamed import StreamedModel
from mofq.model.streaming.writer import Writer


@dataclass(frozen=True, slots=True)
class Running:
    """A sequence of a corpus on its way through the model."""

    corpus: CorpusPlan
    index: int
    seeds: tuple[int, ...]  #: of the scores, one for each draw
    margin_seed: int  #: of what runs backward from the margins of routers
    streamed: StreamedSequence

    @property
    def gradients(self) -> Gradients:
        """What its steps sent down."""
        return Gradients(self.streamed)

    @property
    def margins(self) -> Gradients:
        """What its steps sent down of the margins of routers."""
        return Gradients(self.streamed, "margins")

    def keep(self, step: int, sent: Sent, of_margins: Sent, *, writer: Writer) -> None:
        """Have what a step sent written; from then on it is done."""
        self.margins.keep(step, of_margins, writer=writer)
        self.gradients.keep(step, sent, writer=writer)

    def drop(self, step: int, *, last: int) -> None:
        """Empty what later steps sent and no step before this one needs; what it sent is there."""
        self.margins.drop(step, last=last)
        self.gradients.drop(step, last=last)

    def piece(self, step: int) -> Path:
        """What is kept of the layers of a step."""
        return self.streamed.folder / f"piece-{step:05d}"


@dataclass(frozen=True, slots=True)
class Seen:
    """What the layers of one unit saw in one sequence."""

    running: Running
    step: int
    unit: str
    layer_names: tuple[str, ...]
    captured: Captured  #: of these layers; emptied when the next is asked for
    costs: list[float]  #: of exchanges at each router of the unit
    margin_gains: Mapping[str, float]  #: of the layers that a margin depends on


#: Step, statistics of the layers of one unit alone, these layers. The folder is deleted then;
#: after a run that was stopped, the same step may come again.
Take = Callable[[int, Stats, ModelLayers], None]


def calibrate_streamed(
    streamed: StreamedModel,
    layers: ModelLayers,
    *,
    plan: Plan,
    windows: Mapping[str, Tensor],
    folder: Path,
    take: Take | None = None,
    beside_bytes: int = 0,
    progress: Progress | None = None,
) -> Stats:
    """As `mofq.evidence.calibration.calibrate.calibrate`, with one decoder layer in memory.

    Args:
        streamed: The model, in bfloat16 or float32.
        layers: Of its checkpoint; those in fusion groups are kept.
        plan: What is computed; a folder begun with the same plan is continued.
        windows: Corpus name -> token ids, [sequences, sequence_length], int64.
        folder: Where the stats go.
        take: Gets the samples, unit after unit, the last first; no others are kept then.
        beside_bytes: What ``take`` keeps on the same disk in all.
        progress: Called with ``"calibrate"``, or where samples are taken ``"measure"``, steps
            done, steps in all.

    Returns:
        The finished stats; where samples are taken, gains and routing alone.

    Raises:
        StatsError: As `calibrate`.
        CorpusError: The windows do not fit the plan or the model.
        StreamingError: The model cannot be run unit by unit.
    """
    check_model(streamed.model, plan)
    for corpus in plan.corpora:
        check_windows(streamed.model, windows[corpus.name], corpus, plan)
    check_weights_apart(streamed.model, layers)
    with open_plan(folder, plan) as begun:
        run_and_write_streamed(
            streamed,
            layers,
            planned_sequences(plan, windows),
            plan=plan,
            folder=folder,
            take=take,
            beside_bytes=beside_bytes,
            progress=progress,
        )
        return finish_stats(folder, begun) if take is None else passing_stats(folder, plan)


def run_and_write_streamed(
    streamed: StreamedModel,
    layers: ModelLayers,
    sequences: Sequence[tuple[CorpusPlan, int, Tensor]],
    *,
    plan: Plan,
    folder: Path,
    take: Take | None = None,
    beside_bytes: int = 0,
    progress: Progress | None = None,
) -> None:
    """As `mofq.evidence.calibration.calibrate.run_and_write`, layer by layer.

    Processes that run sequences of one plan into one folder must not share a sequence.

    Args:
        streamed: As `calibrate_streamed` has it, and so has ``take`` and what follows.
        layers: Of its checkpoint.
        sequences: Corpus, index in it, token ids [T]; those that are there are left out.
        plan: What is computed.
        folder: Where the stats go.
        take: Gets the samples.
        beside_bytes: What it keeps in all.
        progress: As said there.

    Raises:
        StatsError: As `calibrate_streamed`.
        StreamingError: The model cannot be run unit by unit.
    """
    every = [
        Running(
            corpus,
            index,
            tuple(seeds_of(plan, corpus, index)),
            score_seed(plan.seed, corpus.name, index, plan.draws),
            StreamedSequence(token_T, folder / UNFINISHED / corpus.name / f"{index:05d}"),
        )
        for corpus, index, token_T in sequences
        if not is_done(folder, plan, corpus, index, with_samples=take is None)
    ]
    for corpus in plan.corpora:
        (folder / corpus.name).mkdir(exist_ok=True)
    for running in every:
        running.streamed.folder.mkdir(parents=True, exist_ok=True)
    if not every:
        return
    is_stored = take is None
    check_disk(
        streamed,
        layers,
        plan=plan,
        folder=folder,
        with_samples=is_stored,
        beside_bytes=beside_bytes,
    )
    steps = _run(streamed, layers, every, plan=plan, folder=folder, take=take, progress=progress)
    for running in every:
        _assemble(running, steps, plan=plan, folder=folder, layers=layers, with_samples=is_stored)


def _run(
    streamed: StreamedModel,
    layers: ModelLayers,
    sequences: Sequence[Running],
    *,
    plan: Plan,
    folder: Path,
    take: Take | None,
    progress: Progress | None,
) -> int:
    """Forward and backward; what is kept of each step of each sequence is a file then."""
    total = 2 * sum(bool(layers_within(layers, unit).groups) for unit in streamed.weights.units)

    def tell(done: int) -> None:
        if progress is not None:
            progress("calibrate" if take is None else "measure", min(done, total), total)

    steps = streamed.forward([one.streamed for one in sequences], for_gradients=True, on_step=tell)
    for seen in run_backward(streamed, layers, sequences, steps=steps, plan=plan):
        _keep_seen(seen, plan=plan, folder=folder, hand_on=take is not None, writer=streamed.writer)
        if seen.running is sequences[-1]:
            if take is not None:
                unit = passing_stats(_unit_folder(folder, seen.step), plan)
                take(seen.step, unit, layers_within(layers, seen.unit))
            tell(2 * steps - seen.step)
    return steps


def _keep_seen(seen: Seen, *, plan: Plan, folder: Path, hand_on: bool, writer: Writer) -> None:
    """Have what one unit has of a sequence written; none of its tensors is left behind."""
    running = seen.running
    path = sequence_path(folder, running.corpus.name, running.index)
    tensors, gains = {}, {}
    if samples_path(folder, plan, running.corpus, running.index) is not None:
        is_kept = running.index in running.corpus.kept_indices
        tensors_of = sequence_tensors if is_kept else input_tensors
        tensors = tensors_of(seen.captured, seen.layer_names, path)
    if has_gains(plan, running.corpus):
        gains = gains_of(seen.captured, seen.layer_names, path, draws=plan.draws)
    inputs = {name: seen.captured.source.get(name) for name in seen.layer_names}
    if hand_on:
        _hand_on(seen, tensors, inputs, gains, plan=plan, folder=folder)
        tensors = {}
    content = {
        "inputs": inputs,
        "names": list(tensors),
        "gains": gains,
        "costs": seen.costs,
        "margin_gains": seen.margin_gains,
    }
    writer.write(running.piece(seen.step), content, list(tensors.values()))


def _unit_folder(folder: Path, step: int) -> Path:
    """Of the samples of one unit; no corpus has such a name."""
    return folder / UNFINISHED / f".unit-{step:05d}"


def _hand_on(
    seen: Seen,
    tensors: Mapping[str, Tensor],
    inputs: Mapping[str, str | None],
    gains: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    plan: Plan,
    folder: Path,
) -> None:
    """Write what one unit has of a sequence into a stats folder of this unit alone."""
    corpus, index = seen.running.corpus, seen.running.index
    unit = _unit_folder(folder, seen.step)
    for other in unit.parent.glob(".unit-*"):
        if other != unit:  # the unit behind, which is taken
            shutil.rmtree(other)
    (unit / corpus.name).mkdir(parents=True, exist_ok=True)
    path = samples_path(unit, plan, corpus, index)
    if path is not None:
        write_samples(path, tensors, inputs)
    if has_gains(plan, corpus):
        write_content(gains_path(unit, corpus.name, index), gains)


def run_backward(
    streamed: StreamedModel,
    layers: ModelLayers,
    sequences: Sequence[Running],
    *,
    steps: int,
    plan: Plan,
) -> Iterator[Seen]:
    """Run backward from the logits, unit by unit, over all sequences.

    Args:
        streamed: The model.
        layers: Of its checkpoint.
        sequences: Run forward; what of them is done backward is not done again.
        steps: From the forward pass.
        plan: Says the draws, and whether caches are kept.

    Yields:
        What the layers of a unit saw, of one sequence after the other, the last unit first. It
        counts as done when the next is asked for; what was not is yielded again by a later run.

    Raises:
        StatsError: The logits are not finite, or a layer runs more than once for a token.
        StreamingError: The model cannot be run so.
    """
    parts = [layers_within(layers, unit) for unit in streamed.weights.units]
    place = captured_place(streamed.model, parts, plan)
    left = [one for one in sequences if not one.gradients.has(steps)]
    yield from _run_head(streamed, layers, left, steps, plan=plan, place=place)
    last_step: dict[str, int] = {}
    for step in range(steps - 1, -1, -1):
        content, _ = read_content(sequences[0].streamed.record(step))
        unit: str = content["unit"]
        inside = layers_within(layers, unit)
        if inside.groups and last_step.setdefault(unit, step) != step:
            raise StatsError(
                f"{inside.groups[0].layers[0].name}: runs more than once for a token, so that its "
                f"error counts more than once, which is not predicted. Measure without "
                f"{option('stats')}."
            )
        left = [one for one in sequences if not one.gradients.has(step)]
        if not left:
            continue
        call, _ = streamed.replayer.reach(left[0].streamed, step, with_gradients=True)
        if not needs_gradients(call):
            if inside.groups:
                yield from _run_embedding(
                    streamed, unit, inside, left, step, steps=steps, place=place
                )
            else:
                for running in left:
                    running.keep(step, {}, {}, writer=streamed.writer)
            streamed.writer.wait()
            continue
        names = tuple(kept_layers(inside, plan))
        with (
            streamed.weights.loaded(unit, ahead=streamed.next_unit(unit, backwards=True)),
            capture_layers(
                streamed.model,
                inside,
                kv_cache=bool(plan.kv_cache),
                routing=bool(plan.routing),
                place=place,
            ) as captured,
        ):
            for running in left:
                sent, of_margins, costs, gains = _step_back(
                    streamed, running, captured, step, steps=steps
                )
                yield Seen(running, step, unit, names, captured, costs, gains)
                running.keep(step, sent, of_margins, writer=streamed.writer)
                # Nothing of it lies beside what the next sequence or unit has.
                captured.clear()
                del sent, of_margins
            streamed.writer.wait()
        # Not before: until what this step sends is there, a run that was stopped needs the rest.
        for running in left:
            running.drop(step, last=steps)


def _step_back(
    streamed: StreamedModel, running: Running, captured: Captured, step: int, *, steps: int
) -> tuple[Sent, Sent, list[float], dict[str, float]]:
    """One step of one sequence, for all draws of the scores and then for margins of routers.

    Returns:
        What is sent down of both; of the unit's routers, what exchanges cost; and the gains of
        layers that margins depend on.
    """
    back = StepBack(streamed.replayer, running.streamed, step)
    arrived = running.gradients.arrived(step, last=steps)
    sent: Sent = {}
    for draw in range(len(running.seeds)):
        back.send(
            {index: grad[draw] for index, grad in arrived.items()},
            sent,
            keep_graph=captured.routers is not None or draw < len(running.seeds) - 1,
        )
    of_margins: Sent = {}
    if captured.routers is None:
        return sent, of_margins, [], {}
    costs = captured.routers.costs
    run = partial(
        back.send,
        {i: grad[0] for i, grad in running.margins.arrived(step, last=steps).items()},
        of_margins,
        objective=captured.routers.objective(seed=running.margin_seed),
    )
    return sent, of_margins, costs, margin_gains(captured, run)


def _run_head(
    streamed: StreamedModel,
    layers: ModelLayers,
    sequences: Sequence[Running],
    steps: int,
    *,
    plan: Plan,
    place: torch.device,
) -> Iterator[Seen]:
    """Draw the scores of each sequence, and send their gradients down from the logits.

    Yields:
        What an lm_head that is a layer of its own saw.
    """
    if not sequences:
        return
    inside = layers_within(layers, streamed.head)
    names = tuple(kept_layers(inside, plan))
    before = streamed.next_unit(streamed.head, backwards=True)
    with (
        streamed.weights.loaded(streamed.head, ahead=before),
        capture_layers(streamed.model, inside, place=place) as captured,
    ):
        for running in sequences:
            sent = _send_scores(streamed, running, steps)
            if names:
                yield Seen(running, steps, streamed.head, names, captured, [], {})
            running.keep(steps, sent, {}, writer=streamed.writer)
            captured.clear()
            del sent
        streamed.writer.wait()


def _send_scores(streamed: StreamedModel, running: Running, steps: int) -> Sent:
    """Draw the scores of a sequence, and run backward from the logits to what gave them.

    The head's weights are there; hooks in it see that.
    """
    with torch.enable_grad():
        logits_TV, leaves = streamed.replayer.finish(running.streamed, steps)
    if not torch.isfinite(logits_TV.detach()).all():
        raise infinite_logits(streamed.model)
    sent: Sent = {}
    for draw, seed in enumerate(running.seeds):
        score_TV = sample_scores(logits_TV.detach(), seed=seed)
        logits_TV.backward(score_TV, retain_graph=draw < len(running.seeds) - 1)
        collect(leaves, sent)
    return sent


def _run_embedding(
    streamed: StreamedModel,
    unit: str,
    inside: ModelLayers,
    sequences: Sequence[Running],
    step: int,
    *,
    steps: int,
    place: torch.device,
) -> Iterator[Seen]:
    """Look the tokens' rows up again, and send them what arrived.

    Where the lm_head is tied to the embedding, what its two roles see of a sequence is of one
    layer: the head runs again here, at the last step of its matrix, so that nothing as long as
    the vocabulary is kept of any sequence in between.
    """
    (embedding,) = inside.grouped_layers
    head = streamed.head if embedding.role == "tied" else None
    with (
        streamed.weights.loaded(unit, beside=head) as module,
        capture_layers(streamed.model, inside, place=place, lookups=False) as captured,
    ):
        for running in sequences:
            captured.clear()
            if head is not None:
                _send_scores(streamed, running, steps)
            call, _ = streamed.replayer.reach(running.streamed, step, with_gradients=True)
            with torch.enable_grad(), watch_lookups(streamed.model, captured, embedding):
                rows = module(*call.args, **call.kwargs)
            for grad in _arrived(running.gradients, step, steps, like=rows):
                rows.backward(grad, retain_graph=True)
            moved: dict[str, float] = {}
            for grad in _arrived(running.margins, step, steps, like=rows):
                moved = margin_gains(captured, partial(rows.backward, grad))
            yield Seen(running, step, unit, (embedding.name,), captured, [], moved)
            running.keep(step, {}, {}, writer=streamed.writer)


def _arrived(gradients: Gradients, step: int, steps: int, *, like: Tensor) -> Iterator[Tensor]:
    """Of what a step returned, which is one tensor, the gradient of each draw."""
    for grads in gradients.arrived(step, last=steps).values():
        yield from (send(grad, like.device) for grad in grads)


def _assemble(
    running: Running,
    steps: int,
    *,
    plan: Plan,
    folder: Path,
    layers: ModelLayers,
    with_samples: bool,
) -> None:
    """Make the files of a sequence of those of its steps, and delete these."""
    corpus, index = running.corpus, running.index
    tensors: dict[str, Tensor] = {}
    inputs: dict[str, str | None] = {}
    gains: dict[str, Mapping[str, Sequence[float]]] = {}
    costs: list[float] = []
    moved: dict[str, float] = {}
    mapped: list[Tensor] = []
    for step in range(steps + 1):  # the head's is the last
        if running.piece(step).exists():
            content, mapped = read_content(running.piece(step))
            inputs |= content["inputs"]
            gains |= content["gains"]
            costs += content["costs"]
            moved |= content["margin_gains"]
            tensors |= zip(content["names"], mapped, strict=True)
    names = kept_layers(layers, plan)
    missing = [name for name in names if name not in inputs]
    if missing:
        raise StatsError(
            f"{missing[0]}: no gradient reached its output in sequence {index} of "
            f"{corpus.name}; it does not take part in the model's prediction. List the layer "
            f"under `exclude` and report the model."
        )
    if has_gains(plan, corpus):
        path = gains_path(folder, corpus.name, index)
        write_content(path, {name: gains[name] for name in names})
    if plan.routing:
        routing = join_routers(costs, moved)
        write_routing(routing_path(folder, corpus.name, index), routing)
    of_samples = samples_path(folder, plan, corpus, index) if with_samples else None
    if of_samples is not None and not is_complete(of_samples):
        write_samples(of_samples, tensors, {name: inputs[name] for name in names})
    # A file that is mapped leaves something behind in its folder on a shared file system.
    tensors.clear()
    mapped = []
    shutil.rmtree(running.streamed.folder)


def check_disk(
    streamed: StreamedModel,
    layers: ModelLayers,
    *,
    plan: Plan,
    folder: Path,
    with_samples: bool = True,
    beside_bytes: int = 0,
) -> None:
    """Refuse to begin what the disk cannot hold: of all sequences that are not there yet.

    Args:
        streamed: The model.
        layers: Of it.
        plan: Of the run.
        folder: That all is written to; need not be there.
        with_samples: Whether the samples of all layers are kept, and not of one unit at a time.
        beside_bytes: What else is kept there.

    Raises:
        StatsError: As said.
    """
    config = streamed.model.config.get_text_config()
    hidden = int(getattr(config, "hidden_size", 0) or 0)
    itemsize = getattr(torch, plan.dtype).itemsize
    units = list(streamed.weights.units)
    left = [
        (corpus, index)
        for corpus in plan.corpora
        for index in range(corpus.sequences)
        if not is_done(folder, plan, corpus, index, with_samples=with_samples)
    ]
    boundary = len(left) * plan.sequence_length * hidden * itemsize
    needed = boundary * (len(units) + 2 * (plan.draws + bool(plan.routing)))
    kept = sum(index in corpus.kept_indices for corpus, index in left)
    others, experts = len(left) - kept, experts_per_token(config.to_dict())
    parts = [layers] if with_samples else [layers_within(layers, unit) for unit in units]
    needed += beside_bytes + max(
        kept_bytes(part, plan, kept=kept, others=others, experts_per_token=experts)
        for part in parts
    )
    # What a run that was stopped has written already takes no more.
    needed = max(0, needed - _bytes_in(folder / UNFINISHED))
    place = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise StatsError(
            f"{folder}: what is kept needs about {needed:,} bytes, found {free:,} free. Free some "
            f"space, or take fewer {option('sequences')}."
        )


def _bytes_in(folder: Path) -> int:
    """Of all files in a folder, which other processes may remove meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            status = path.lstat()
            total += status.st_size if S_ISREG(status.st_mode) else 0
    return total
