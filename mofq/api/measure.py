"""Measures every scheme of a search space into a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from shutil import rmtree
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mofq.api.calibrate import (
    as_measured,
    check_gradient_dtype,
    plan_calibration,
    remarks_on,
    unseen_experts,
)
from mofq.api.inputs import load_corpora, open_layers
from mofq.api.options import (
    Corpora,
    Engine,
    LayersFile,
    Model,
    Option,
    Samples,
    Space,
    Tell,
    Vocabulary,
    Where,
    documented,
    silent,
)
from mofq.api.preconditions import check_device, check_engine, check_output, check_vocabulary
from mofq.exceptions import (
    ClusterError,
    EngineError,
    MofqError,
    Remark,
    StatsError,
    option,
)
from mofq.files.progress import Progress

if TYPE_CHECKING:
    from mofq.evidence.calibration.stats import Stats
    from mofq.evidence.constraints import Selection
    from mofq.evidence.measure.fill_table import Remotely, Wanted
    from mofq.evidence.refusals import Refused
    from mofq.evidence.spaces import SearchSpace
    from mofq.evidence.table import Table
    from mofq.model.layers import ModelLayers


@dataclass(frozen=True, slots=True)
class MeasureResult:
    """A table of measurements."""

    output: Path
    table: Table
    model: str  #: as it was given
    engine: str | None
    stats: Stats | None
    refused: tuple[Refused, ...]  #: of this run's space, what it did not offer to this engine
    is_new: bool  #: whether anything was measured that the table did not have
    seconds: float
    selections: tuple[Selection, ...] = ()  #: how many layers each selector of the space names

    def to_json(self) -> dict[str, Any]:
        """What the table holds, for machines."""
        unseen = {} if self.stats is None else self.stats.unseen
        return {
            "sha256": self.table.sha256,
            "rows": len(self.table.rows),
            "groups": len(self.table.header.groups),
            "schemes": sorted({row.scheme for row in self.table.rows}),
            "units": sorted({row.unit for row in self.table.rows}),
            "refused": [asdict(one) for one in self.refused],
            "table": str(self.output),
            "seconds": round(self.seconds, 2),
            "unseen": {corpus: list(names) for corpus, names in unseen.items()},
            "selections": [asdict(one) for one in self.selections],
        }

    def summary(self) -> list[str]:
        """What the table holds, for people."""
        from mofq.decision.expert_visits import rare_experts

        content = self.to_json()
        lines = [
            f"{self.output}: {content['rows']} rows, {content['groups']} fusion groups, "
            f"{len(content['schemes'])} schemes, {content['seconds']:.1f} s"
            + ("." if self.is_new else "; everything was there already."),
            *(f"  {one.remark}" for one in self.selections),
            *((f"  {one}" for one in self.refused) if self.is_new else _counted(self.refused)),
        ]
        if self.stats is not None:
            lines += unseen_experts(self.stats)
            lines += [Remark(f"  {line.template}") for line in rare_experts(self.table)]
        elif any("+" in name for name in content["schemes"]):
            lines.append(
                Remark(
                    f"  Without {option('stats')}, what rounding activations costs is not in the "
                    f"errors."
                )
            )
        return lines


def _counted(refused: Sequence[Refused]) -> list[str]:
    """How many refusals there are, where the run that measured has told them."""
    if not refused:
        return []
    count = len({name for one in refused for name in one.schemes})
    return [
        f"  {count} scheme{' is' if count == 1 else 's are'} not offered to every fusion group: "
        f"`mofq inspect` with the same space and engine says why."
    ]


@documented
def measure(
    model: Model,
    space: Space,
    output: Annotated[str | Path, Option("The table, table.jsonl.", short="-o")],
    *,
    stats: Annotated[str | Path | None, Option("From `mofq calibrate`.")] = None,
    corpora: Annotated[
        Corpora,
        Option(
            "NAME=FILE: calibrate while measuring, layer by layer, and store no statistics; "
            "repeatable.",
            flag="--corpus",
        ),
    ] = (),
    samples: Samples = Samples(),
    engine: Engine = None,
    layers: LayersFile = None,
    vocabulary: Vocabulary = Vocabulary(),
    experts: Annotated[
        Literal["layer", "projection", "expert", "matrix"],
        Option(
            "What of a mixture gets a scheme of its own. layer: all experts of a decoder layer, as "
            "engines need it; projection: gate and up, and down, of all; expert: each expert; "
            "matrix: gate and up, and down, of each."
        ),
    ] = "layer",
    where: Where = Where(),
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> MeasureResult:
    """Measure every scheme of a search space on the weights.

    Rows that the table has already are kept. Without ``stats``, errors are relative weight errors;
    with ``corpora`` in their place the model is run too, and the rows are those through a stats
    folder. What fitted schemes need afterwards is kept beside the table, in ``table.fits``, and is
    given as ``stats`` to validate and export.

    Returns:
        The table.

    Raises:
        MofqError: An input is not valid; the message says which and what to do.
    """
    from mofq.evidence.spaces import load_search_space

    check_output(Path(output), files=[space], folders=[model, stats])
    return measure_space(
        model,
        load_search_space(space),
        output,
        stats=stats,
        corpora=corpora,
        samples=samples,
        engine=engine,
        layers=layers,
        vocabulary=vocabulary,
        experts=experts,
        where=where,
        progress=progress,
        tell=tell or silent,
    )


def measure_space(
    model: str | Path,
    space: SearchSpace,
    output: str | Path,
    *,
    stats: str | Path | None,
    corpora: Corpora,
    samples: Samples,
    engine: str | None,
    layers: str | Path | None,
    vocabulary: Vocabulary,
    experts: Literal["layer", "projection", "expert", "matrix"] = "layer",
    where: Where,
    wanted: Wanted | None = None,
    progress: Progress | None,
    tell: Tell,
) -> MeasureResult:
    """As `measure`, of a search space that is open already, and of some of its schemes.

    The output is one that may be written. ``wanted`` says of a fusion group and the name of a
    scheme whether it is to be measured; None: all are.

    Raises:
        MofqError: As `measure`.
    """
    from mofq.engines import cache_legality, legality
    from mofq.evidence.refusals import count_refusals
    from mofq.evidence.spaces import (
        offer_caches,
        offer_schemes,
        selected_layers,
        with_stored,
    )
    from mofq.evidence.table import read_table
    from mofq.model.checkpoint.headers import open_checkpoint
    from mofq.model.checkpoint_notes import notes_on
    from mofq.model.layers import split_experts

    start = monotonic()
    path = Path(output)
    texts = load_corpora(corpora, tell)
    if texts:
        _check_corpora(stats, where, experts)
    check_gradient_dtype(where.dtype)
    rows_before = _count_lines(path)
    checkpoint = open_checkpoint(str(model))
    vocabulary = vocabulary.and_of(space)
    found = open_layers(checkpoint, vocabulary, layers)
    check_engine(engine, found)
    if engine is not None and experts != "layer":
        raise EngineError(
            f"{option('experts', experts)}: engines give all experts of a decoder layer one "
            f"scheme. Leave it or {option('engine')} out."
        )
    selections = selected_layers(space, found)
    check = None if engine is None else legality(engine, found.architecture)
    if any(vocabulary.asked.values()):
        offers = offer_schemes(
            with_stored(space, checkpoint, found.groups),
            found.groups,
            legality=check,
            has_stats=bool(texts) or stats is not None,
        )
        check_vocabulary(offers, space)
    for note in notes_on(checkpoint, found):
        tell(note)

    from mofq.evidence.calibration.stats import read_stats
    from mofq.evidence.measure.fill_table import measure as fill_table
    from mofq.evidence.measure.while_calibrating import Calibration, measure_while_calibrating

    if where.cluster is None:
        check_device(where.device)
    opened = None if stats is None else read_stats(stats)
    _check_vocabulary(opened, found)
    calibration = None
    if texts:
        plan, windows = plan_calibration(
            checkpoint,
            found,
            texts,
            samples=samples,
            dtype=where.dtype,
            kv_cache=bool(space.kv_cache and found.caches),
        )
        if rows_before == 0:
            for remark in remarks_on(checkpoint, plan, windows):
                tell(remark)
        plan = as_measured(plan, path, inputs=samples.inputs)
        calibration = Calibration(plan, windows, work_of(path), fits_beside(path))
        opened = calibration.stats
    unseen = set() if opened is None else set(chain.from_iterable(opened.unseen.values()))
    found = split_experts(found, experts, unseen=unseen)
    space = with_stored(space, checkpoint, found.groups)
    check_cache = None if engine is None else cache_legality(engine)
    with _connected(where, tell) as remotely:
        measured_on = fill_table(
            checkpoint,
            found,
            space,
            table_path=path,
            stats=opened,
            engine=engine,
            legality=check,
            cache_legality=check_cache,
            device=where.device,
            progress=progress,
            tell=tell,
            remotely=remotely,
            wanted=wanted,
            while_calibrating=None
            if calibration is None
            else partial(
                measure_while_calibrating,
                checkpoint,
                found,
                calibration,
                device=where.device,
                progress=progress,
                tell=tell,
            ),
        )
    if calibration is not None:
        opened = measured_on or opened
        rmtree(calibration.folder, ignore_errors=True)
    offers = offer_schemes(space, found.groups, legality=check, has_stats=opened is not None)
    caches = offer_caches(space, found.caches, legality=check_cache)
    rejected = [(one.group.name, one.rejected) for one in offers]
    rejected += [(one.cache.name, one.rejected) for one in caches]
    return MeasureResult(
        path,
        read_table(path),
        model=str(model),
        engine=engine,
        stats=opened,
        refused=count_refusals(
            (name, scheme, reason) for name, of in rejected for scheme, reason in of.items()
        ),
        is_new=_count_lines(path) > rows_before,
        seconds=monotonic() - start,
        selections=selections,
    )


def fits_beside(table: Path) -> Path:
    """Where what fitted schemes need is kept, of a table whose statistics were not stored."""
    return table.with_suffix(".fits")


def work_of(table: Path) -> Path:
    """Where a run that calibrates while it measures is continued, if it was stopped."""
    return table.with_name(f".{table.name}.streamed")


def _check_corpora(stats: str | Path | None, where: Where, experts: str) -> None:
    """Refuse what does not go with calibrating while measuring.

    Raises:
        MofqError: As said.
    """
    if stats is not None:
        raise MofqError(
            f"{option('corpora')}: {option('stats')} has corpora of its own. Leave one of the two "
            f"out."
        )
    if where.cluster is not None:
        raise ClusterError(
            f"{option('corpora')}: the model is calibrated layer by layer on one machine. "
            f"Calibrate into a folder, and give it as {option('stats')} with {option('cluster')}."
        )
    if experts != "layer":
        raise MofqError(
            f"{option('experts', experts)}: which experts no token reaches has to be known before. "
            f"Calibrate into a folder, and give it as {option('stats')}."
        )


def _check_vocabulary(stats: Stats | None, layers: ModelLayers) -> None:
    """Refuse statistics that do not have the lm_head or the embedding, where they are asked for.

    Raises:
        StatsError: As said.
    """
    from mofq.model.layers import vocabulary_names

    if stats is None:
        return
    missing = set(vocabulary_names(layers.groups)) - set(stats.plan.vocabulary or ())
    if missing:
        raise StatsError(
            f"{stats.folder}: was calibrated without {' and '.join(sorted(missing))}. Calibrate "
            f"into another folder with {option('lm_head')} or {option('embeddings')} too."
        )


@contextmanager
def _connected(where: Where, tell: Tell) -> Iterator[Remotely | None]:
    """What measures on the cluster, while it is connected; None where there is none."""
    if where.cluster is None:
        yield None
        return
    from mofq.evidence.cluster import cluster
    from mofq.evidence.measure.on_workers import measure_remotely

    with cluster(where.cluster, tell=tell):
        yield partial(measure_remotely, cpus=where.cluster_cpus)


def _count_lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)
