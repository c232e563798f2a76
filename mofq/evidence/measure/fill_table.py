"""Fills the table: one fusion group after another, what is there already left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from mofq import __version__
from mofq.evidence.calibration.stats import Stats, check_same_model, earlier_stats, verify_sequences
from mofq.evidence.fits import Fits
from mofq.evidence.measure.crossfit import (
    check_sequences,
    fits_of,
    join_parts,
    parts_of,
    prepare_parts,
)
from mofq.evidence.measure.expert_visits import visits_of
from mofq.evidence.measure.fit_ahead import FitsAhead
from mofq.evidence.measure.flip_rates import corpus_flips
from mofq.evidence.measure.kv_cache import (
    CacheWork,
    check_cache_stats,
    fill_caches,
    measure_caches,
    missing_formats,
)
from mofq.evidence.measure.layer_inputs import PreparedLayer, prepare_layer
from mofq.evidence.measure.magnitudes import group_profiles
from mofq.evidence.measure.rows import group_rows
from mofq.evidence.measure.samples import SampleAnswers, SampleReader
from mofq.evidence.measure.schedule import score_layers
from mofq.evidence.measure.score import LayerScore
from mofq.evidence.measure.stored_inputs import SharedInputs
from mofq.evidence.measure.worker_threads import Workers, worker_threads
from mofq.evidence.spaces import (
    CacheLegality,
    Legality,
    Offer,
    SearchSpace,
    offer_caches,
    offer_schemes,
)
from mofq.evidence.table import (
    Profile,
    Rejection,
    Row,
    TableSpace,
    TableStats,
    TableWriter,
    Visits,
    header_of,
    open_table,
)
from mofq.files.progress import Progress, Tell, silent
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.safetensors_header import kept_dtype
from mofq.model.checkpoint.tensors import check_finite, check_scales, read_amax, read_layer_rows
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.layers import (
    FusionGroup,
    LinearLayer,
    ModelLayers,
    share_amax,
    stored_amax,
)
from mofq.numbers.formats import SCALE_FORMATS, FloatFormat
from mofq.numbers.quantize.compiled import Kind, pass_maker
from mofq.numbers.quantize.rounding_errors import Pass, is_candidate
from mofq.numbers.schemes import Granularity, Scheme, TensorScheme

#: The weight of an FP8 source where it is left unquantized: written in bf16, which rounds it.
#: No scheme may be named with it.
_BF16 = FloatFormat(
    "bf16",
    8,
    7,
    bias=127,
    max=torch.finfo(torch.bfloat16).max,
    source="Intel, BFLOAT16 Hardware Numerics Definition, 2018",
)
_IN_BF16 = TensorScheme(
    element=_BF16,
    granularity=Granularity("unscaled", 0, 0),
    symmetric=True,
    scale=SCALE_FORMATS["bf16"],
    scale_rule="absmax",
    rounding="nearest",
)


class Work(NamedTuple):
    """What is measured of a fusion group in one pass over its weights."""

    group: FusionGroup
    schemes: Sequence[Scheme]  #: that fit it
    corpora: tuple[str, ...]  #: of the stats; empty without


class Measured(NamedTuple):
    """What is measured of a fusion group."""

    rows: list[Row]
    profiles: list[Profile]


class Scored(NamedTuple):
    """What was measured while the model was calibrated."""

    groups: list[Measured]  #: in the order of the work
    caches: list[list[Row]]  #: likewise
    visits: dict[str, list[Visits]]  #: fusion group of experts -> of each corpus
    stats: Stats | None  #: gains and routing alone; None where nothing was missing


#: Work, and that of caches -> what is measured of both while the model is calibrated.
WhileCalibrating = Callable[[Sequence[Work], Sequence[CacheWork]], Scored]
#: Checkpoint, work, ``stats=``, ``device=`` -> what is measured, in the order of the work.
Remotely = Callable[..., Generator[Measured, None, None]]
#: Fusion group, name of a scheme -> whether it is to be measured.
Wanted = Callable[[str, str], bool]
#: Layer, what the pass gives, schemes that are all candidates -> the pass.
LayerPasses = Callable[[LinearLayer, Kind, Sequence[TensorScheme]], Pass]


def measure(
    checkpoint: Checkpoint,
    model_layers: ModelLayers,
    space: SearchSpace,
    *,
    table_path: Path,
    stats: Stats | None = None,
    engine: str | None = None,
    legality: Legality | None = None,
    cache_legality: CacheLegality | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    tell: Tell = silent,
    remotely: Remotely | None = None,
    wanted: Wanted | None = None,
    while_calibrating: WhileCalibrating | None = None,
) -> Stats | None:
    """Measure every offered (fusion group, scheme) that the table does not have yet.

    Args:
        checkpoint: The model.
        model_layers: Its layers.
        space: What may be chosen.
        table_path: Where the rows go; an existing table of the same model and stats grows.
        stats: Calibration, or None for calibration-free rows.
        engine: Name of the serving engine that ``legality`` speaks for.
        legality: What the engine refuses.
        cache_legality: What it refuses of the KV cache.
        device: Where the arithmetic runs.
        progress: Called with ``"measure"``, fusion groups done and in all.
        tell: Gets a line about what takes its time before the first group is done.
        remotely: What measures in the place of `measure_groups`: the same rows, elsewhere.
        wanted: Which of the offered schemes are measured; None: all.
        while_calibrating: What calibrates and measures; needed where the samples of ``stats`` are
            not stored.

    Returns:
        The stats that something was measured on, with the experts that no token reached.

    Raises:
        StatsError: The stats belong to another model, or are too few to fit a scheme to.
        TableError: The table belongs to another model or other stats.
        SearchSpaceError: No scheme fits some fusion group.
        SchemeError: A weight is not finite.
        CheckpointError: A norm, a bias or the embedding is not finite.
    """
    weights = hash_weights(checkpoint)
    if stats is not None:
        check_same_model(stats, checkpoint, weights_sha256=weights)
    check_scales(checkpoint)
    check_finite(checkpoint, model_layers)
    offers = offer_schemes(
        space, model_layers.groups, legality=legality, has_stats=stats is not None
    )
    cache_offers = offer_caches(space, model_layers.caches, legality=cache_legality)
    cached_stats = check_cache_stats(stats) if cache_offers else None
    header = header_of(
        model_layers,
        model_name=checkpoint.name,
        index_sha256=checkpoint.index_sha256,
        weights_sha256=weights,
        stats=None if stats is None else table_stats(stats),
    )
    earlier = [] if stats is None else [one.sha256 for one in earlier_stats(stats)]
    with open_table(table_path, header, earlier=earlier) as table:
        missing = [_missing(table, offer, stats, wanted) for offer in offers]
        _check_samples(stats, missing)
        corpora = [] if stats is None else [corpus.name for corpus in stats.plan.corpora]
        formats = [missing_formats(table, offer, corpora) for offer in cache_offers]
        table.add_space(table_space(space, engine))
        caches = model_layers.caches if stats is not None and stats.plan.kv_cache else ()
        work, cache_work = list(chain(*missing)), list(chain(*formats))
        if while_calibrating is not None:
            scored = Scored([], [], {}, None)
            if work or cache_work:
                scored = while_calibrating(work, cache_work)
            measured = (one for one in scored.groups)
            visits, stats = scored.visits, scored.stats
            cached = (one for one in scored.caches)
        else:
            here = partial(measure_groups, tell=tell)
            measured = (remotely or here)(checkpoint, work, stats=stats, device=device)
            visits = {} if stats is None else visits_of(stats, model_layers.groups)
            cached = measure_caches(cached_stats, cache_work, device=device)
        _fill(table, offers, missing, measured, visits=visits, progress=progress)
        fill_caches(table, cache_offers, formats, cached)
        if stats is not None:
            table.add_flips(corpus_flips(stats, model_layers.groups, caches=caches))
    return stats


def table_space(space: SearchSpace, engine: str | None) -> TableSpace:
    """What a table notes of a search space that is measured for an engine."""
    return TableSpace(
        name=space.name,
        sha256=space.sha256,
        schemes=tuple(
            dict.fromkeys([s.name for s in space.schemes] + [s.name for s in space.kv_cache])
        ),
        base=space.base,
        min_gain=space.min_gain,
        engine=engine,
        mofq=__version__,
        exclude=space.exclude,
        candidates=tuple(tuple(s.name for s in one.schemes) for one in space.candidates),
        constraints=space.constraints,
        stored=tuple(space.kept.items()),
    )


def _check_samples(stats: Stats | None, missing: Sequence[Sequence[Work]]) -> None:
    """Raise unless the samples are as they were written, and enough for what is to be fitted."""
    schemes = [scheme for of_group in missing for one in of_group for scheme in one.schemes]
    if stats is not None and schemes:
        check_sequences(stats, schemes)
        if stats.is_stored:
            verify_sequences(stats)


def _fill(
    table: TableWriter,
    offers: Sequence[Offer],
    missing: Sequence[Sequence[Work]],
    measured: Generator[Measured, None, None],
    *,
    visits: Mapping[str, Sequence[Visits]],
    progress: Progress | None,
) -> None:
    if progress is not None and any(missing):
        progress("measure", 0, len(offers))
    with closing(measured):
        for done, (offer, of_group) in enumerate(zip(offers, missing, strict=True)):
            rejected = [Rejection(offer.group.name, s, why) for s, why in offer.rejected.items()]
            found = [next(measured) for _ in of_group]
            # What rests on no corpus is measured with every one that is added.
            new = [
                row
                for each in found
                for row in each.rows
                if not table.has(row.group, row.scheme, unit=row.unit, corpus=row.corpus)
            ]
            profiles = {one.key: one for each in found for one in each.profiles}
            table.add_group(
                new,
                rejected,
                profiles=profiles.values(),
                visits=visits.get(offer.group.name, ()),
            )
            if progress is not None:
                progress("measure", done + 1, len(offers))


def measure_groups(
    checkpoint: Checkpoint,
    work: Sequence[Work],
    *,
    stats: Stats | None = None,
    device: str = "cpu",
    tell: Tell = silent,
    elements: int = 0,
    reader: SampleReader | None = None,
) -> Generator[Measured, None, None]:
    """The rows and profiles of fusion groups under some schemes; nothing else is read or written.

    Args:
        checkpoint: The model.
        work: Its fusion groups, each with schemes that fit it, and the corpora to measure on.
        stats: Calibration, or None.
        device: Where the arithmetic runs.
        tell: Gets a line about a compilation.
        elements: Of all weights, where the work is a part of more.
        reader: Of the stats, where it is open already: the headers of a mixture's samples take
            as long to read as its groups take to measure.

    Yields:
        The rows of each fusion group and its profiles, in a fixed order. Which others are
        measured with it changes no number.

    Raises:
        StatsError: The stats do not know a layer, or no token reached a layer or one like it.
        SchemeError: A weight is not finite, or a scheme does not fit.
    """
    draws = 1 if stats is None else stats.plan.draws
    written = [one._replace(schemes=_written_schemes(one.group, one.schemes)) for one in work]
    with ExitStack() as stack:
        if reader is None and stats is not None:
            reader = stack.enter_context(SampleReader(stats))
        workers = stack.enter_context(worker_threads(device))
        fits = None
        if reader is not None and stats is not None:
            asked = (
                one
                for group, schemes, _ in written
                for layer in group.layers
                for one in fits_of(layer, schemes)
            )
            opened = stack.enter_context(Fits(stats, files=reader.files))
            fits = stack.enter_context(closing(FitsAhead(opened, asked, workers=workers)))
        prepared = _prepare_all(
            checkpoint,
            written,
            reader,
            fits,
            device=device,
            pass_of=_layer_passes(written, device=device, tell=tell, elements=elements),
            workers=workers,
        )
        scores = stack.enter_context(
            closing(score_layers(prepared, device=device, workers=workers))
        )
        for (group, schemes, corpora), (_, measured, _) in zip(work, written, strict=True):
            parts = parts_of(measured)
            found: dict[str, dict[str, LayerScore]] = {layer.name: {} for layer in group.layers}
            for _ in range(len(parts) * len(group.layers)):
                score = next(scores)
                found[score.name][score.part] = score
            by_name = {name: join_parts(measured, one) for name, one in found.items()}
            profiles = group_profiles(
                group,
                {name: score.extent for name, score in by_name.items()},
                {name: score.input_extents for name, score in by_name.items()},
            )
            scaling = {} if reader is None else _scaling(reader, group, corpora)
            rows = group_rows(
                group, schemes, by_name, corpora=corpora, draws=draws, scaling=scaling
            )
            yield Measured(rows, profiles)


def _scaling(
    reader: SampleReader, group: FusionGroup, corpora: Sequence[str]
) -> dict[str, dict[str, SampleAnswers]]:
    """Corpus -> layer -> what the model answers to a change of size, where the stats know it."""
    found = {
        corpus: {layer.name: reader.scaling(corpus, layer.name) for layer in group.layers}
        for corpus in corpora
    }
    return {
        corpus: {name: one for name, one in by_layer.items() if one is not None}
        for corpus, by_layer in found.items()
        if None not in by_layer.values()
    }


def _written_schemes(group: FusionGroup, schemes: Sequence[Scheme]) -> list[Scheme]:
    """The schemes of a fusion group as they are measured, in the same order.

    In a quantized source, those without a weight scheme round the weight to bf16.
    """
    if not any(kept_dtype(layer.dtype) != layer.dtype for layer in group.layers):
        return list(schemes)
    return [replace(s, weight=_IN_BF16) if s.weight is None else s for s in schemes]


def _layer_passes(
    work: Sequence[Work], *, device: str, tell: Tell, elements: int = 0
) -> LayerPasses:
    """What gives each layer its pass over a block; layers with the same schemes share one.

    It compiles when it is first asked for a set of schemes, and where there is enough to do for
    that pass: ``elements`` of all weights, where the work is a part of more.
    """
    counts: Counter[frozenset[TensorScheme]] = Counter()
    for group, schemes, _ in work:
        weights = (scheme.weight for scheme in schemes)
        candidates = frozenset(w for w in weights if w is not None and is_candidate(w))
        counts[candidates] += sum(layer.weights for layer in group.layers)
    make = pass_maker(device=device, tell=tell)
    made: dict[tuple[Kind, tuple[TensorScheme, ...], torch.dtype], Pass] = {}

    def pass_of(layer: LinearLayer, kind: Kind, schemes: Sequence[TensorScheme]) -> Pass:
        dtype = torch.bfloat16 if layer.dtype == "BF16" else torch.float32
        key = (kind, tuple(schemes), dtype)
        if key not in made:
            made[key] = make(kind, schemes, dtype, max(elements, counts[frozenset(schemes)]))
        return made[key]

    return pass_of


def _prepare_all(
    checkpoint: Checkpoint,
    work: Sequence[Work],
    reader: SampleReader | None,
    fits: FitsAhead | None,
    *,
    device: str,
    pass_of: LayerPasses,
    workers: Workers,
) -> Iterator[PreparedLayer]:
    """What is scored, in order: every layer, in as many parts as its schemes need."""
    shared = SharedInputs()
    for group, schemes, corpora in work:
        is_asked = any(scheme.needs_weight_amax for scheme in schemes)
        amax = read_amax(checkpoint, group) if is_asked else {}
        of_scale = share_amax(group, amax) if amax else {}
        of_stored = stored_amax(group, amax) if amax else {}
        for layer in group.layers:
            prepare = partial(
                prepare_layer,
                partial(read_layer_rows, checkpoint, layer),
                (layer.out_features, layer.in_features),
                tensor_amax=of_scale.get(layer.name),
                stored_amax=of_stored.get(layer.name),
                device=device,
                name=layer.name,
                make_pass=partial(pass_of, layer),
                shared=shared,
                workers=workers,
            )
            samples = {} if reader is None else reader.read_all(layer.name, corpora)
            yield from prepare_parts(prepare, layer, schemes, samples=samples, fits=fits)


def table_stats(stats: Stats) -> TableStats:
    """What a table says of the calibration that its rows rest on."""
    first = stats.plan.corpora[0]
    return TableStats(
        sha256=stats.sha256,
        seed=stats.plan.seed,
        corpora={corpus.name: corpus.text_sha256 for corpus in stats.plan.corpora},
        samples=len(first.kept_indices),
        sequence_length=stats.plan.sequence_length,
        bos=stats.plan.bos,
    )


def _missing(
    table: TableWriter, offer: Offer, stats: Stats | None, wanted: Wanted | None
) -> list[Work]:
    """What a table lacks of a fusion group: the schemes that lack the same corpora, together."""
    corpora = [] if stats is None else [corpus.name for corpus in stats.plan.corpora]
    schemes_of: dict[tuple[str, ...], list[Scheme]] = {}
    for scheme in offer.schemes:
        if wanted is not None and not wanted(offer.group.name, scheme.name):
            continue
        has = partial(table.has, offer.group.name, scheme.name)
        lacking = tuple(
            corpus
            for corpus in corpora
            if not all(has(unit=u, corpus=corpus) for u in ("output_mse", "kl_nats_per_token"))
        )
        if lacking or not has(unit="relative_weight_error"):
            schemes_of.setdefault(lacking, []).append(scheme)
    return [Work(offer.group, schemes, lacking) for lacking, schemes in schemes_of.items()]
