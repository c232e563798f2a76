"""Runs the model over some text and keeps what scoring needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

from mofq.api.formatting import short_bytes
from mofq.api.inputs import load_corpora, open_layers
from mofq.api.options import (
    Corpora,
    GradientExecution,
    LayersFile,
    Model,
    Option,
    Samples,
    Tell,
    Vocabulary,
    Where,
    documented,
    silent,
)
from mofq.api.preconditions import check_device, check_folder
from mofq.exceptions import ClusterError, Remark, StatsError, option
from mofq.files.progress import Progress
from mofq.model.dtypes import check_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from mofq.evidence.calibration.stats import CorpusPlan, Plan, Stats
    from mofq.evidence.corpora import Corpus
    from mofq.model.checkpoint.headers import Checkpoint
    from mofq.model.layers import ModelLayers
    from mofq.model.streaming.execution import Chosen, Execution

#: Sequences of a corpus, where nothing else is asked for; chosen by scripts/bench/sample_plan.py.
SEQUENCES = 32
#: What the inputs of all sequences may take where nothing is said of them [bytes].
_INPUTS_BYTES = 8e9
#: Behind one of so many windows there is another, by which what was tuned on those is judged.
_JUDGED_OF = 4


@dataclass(frozen=True, slots=True)
class CalibrateResult:
    """A stats folder."""

    model: str  #: as it was given
    folder: Path
    stats: Stats
    was_there: bool  #: whether the folder was complete already
    bytes: int  #: of the folder
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """What was written, for machines."""
        plan = self.stats.plan
        return {
            "stats": str(self.folder),
            "sha256": self.stats.sha256,
            "bytes": self.bytes,
            "corpora": {one.name: one.sequences for one in plan.corpora},
            "kept": {one.name: len(one.kept_indices) for one in plan.corpora},
            "sequence_length": plan.sequence_length,
            "unseen": {corpus: list(names) for corpus, names in self.stats.unseen.items()},
            "seconds": round(self.seconds, 2),
        }

    def summary(self) -> list[str]:
        """What was written, for people."""
        plan = self.stats.plan
        count = sum(corpus.sequences for corpus in plan.corpora)
        kept = sum(len(corpus.kept_indices) for corpus in plan.corpora)
        inputs = " and the inputs of all" if plan.inputs else ""
        first = (
            f"{self.folder}: {count} sequences of {plan.sequence_length} tokens, "
            f"{kept} of them kept{inputs}, {short_bytes(self.bytes)}, {self.seconds:.1f} s"
        )
        end = "; they were there already." if self.was_there else "."
        return [first + end, *unseen_experts(self.stats), *unknown_routers(self.stats)]


def unseen_experts(stats: Stats) -> list[str]:
    """Sentences on the experts that no token of a corpus reached."""
    return [
        f"  corpus {corpus}: no token reached {len(names)} layers of experts, e.g. {names[0]}. "
        f"They are scored like the experts of their kind; longer text reaches more."
        for corpus, names in stats.unseen.items()
    ]


def unknown_routers(stats: Stats) -> list[str]:
    """A sentence where nothing is known of the routers of a mixture."""
    from mofq.evidence.calibration.routing import read_routing

    files = [path for one in stats.plan.corpora for path in stats.routing_files(one.name)]
    if not files or any(read_routing(path).cost for path in files):
        return []
    return [
        "  What its routers choose by is not seen, so that what tokens cost which change their "
        "experts is not in predictions: `mofq validate` measures it."
    ]


def remarks_on(checkpoint: Checkpoint, plan: Plan, windows: Mapping[str, Tensor]) -> list[str]:
    """What a user should know of a calibration before it runs."""
    from mofq.evidence.corpora import unknown_words
    from mofq.model.loading import load_tokenizer

    texts = {f"corpus {name}": some for name, some in windows.items()}
    return [*few_sequences(plan), *unknown_words(load_tokenizer(checkpoint.folder), texts)]


def few_sequences(plan: Plan) -> list[str]:
    """Sentences on the corpora of which too few sequences are kept for error bars."""
    from mofq.evidence.table import FEW_SAMPLES

    kept = {corpus.name: len(corpus.kept_indices) for corpus in plan.corpora}
    return [
        Remark(
            f"corpus {name}: {count} calibration sequences are too few for error bars that mean "
            f"anything. Give at least {FEW_SAMPLES}, of {plan.sequence_length} tokens each: a "
            f"longer text, or larger {option('sequences')} and {option('keep')}, or a smaller "
            f"{option('sequence_length')}."
        )
        for name, count in kept.items()
        if count < FEW_SAMPLES
    ]


def check_gradient_dtype(dtype: str) -> None:
    """Refuse a dtype that a model cannot be calibrated in.

    Raises:
        MofqError: As said.
    """
    if dtype == "float16":
        raise StatsError(
            f"gradients underflow in float16. Use {option('dtype', 'bfloat16')} or float32."
        )
    check_dtype(dtype)


@documented
def calibrate(
    model: Model,
    corpora: Annotated[
        Corpora, Option("NAME=FILE, or NAME=DATASET of a hub; repeatable.", flag="--corpus")
    ],
    output: Annotated[str | Path, Option("The stats folder.", short="-o")],
    *,
    samples: Samples = Samples(),
    where: Where = Where(),
    execution: GradientExecution = "auto",
    kv_cache: Annotated[
        bool, Option("Keep keys and values too, to measure formats of the KV cache.")
    ] = False,
    layers: LayersFile = None,
    vocabulary: Vocabulary = Vocabulary(),
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> CalibrateResult:
    """Run the model once over a text and keep what `measure` needs.

    A stats folder that is complete already is kept; one that was stopped is continued. Corpora
    that are named behind those of the folder are added to it, and only they are run.

    Returns:
        The folder and its content.

    Raises:
        MofqError: An input is not valid; the message says which and what to do.
    """
    start = monotonic()
    tell = tell or silent
    folder = Path(output)
    texts = load_corpora(corpora, tell)
    check_gradient_dtype(where.dtype)
    if where.cluster is not None and execution == "spread":
        raise ClusterError(
            f"{option('execution', 'spread')} spreads a model over one machine. Drop it or "
            f"{option('cluster')}."
        )
    check_folder(folder, folders=[model])

    from mofq.model.checkpoint.headers import open_checkpoint

    checkpoint = open_checkpoint(str(model))
    found = open_layers(checkpoint, vocabulary, layers)
    if where.cluster is None:
        check_device(where.device)

    from mofq.evidence.calibration.stats import open_plan, read_stats

    if kv_cache and not found.caches:
        raise StatsError(
            f"{model}: {option('kv_cache')} watches keys and values by head, and what attention in "
            f"a {found.architecture!r} caches is latent vectors in engines, or not known. Leave "
            "the option out."
        )
    plan, windows = plan_calibration(
        checkpoint, found, texts, samples=samples, dtype=where.dtype, kv_cache=kv_cache
    )
    plan = _as_begun(plan, folder, inputs=samples.inputs)
    stats = None
    if (folder / "stats.json").exists():
        # Refuses the stats of another plan; a sequence that was lost is made again below.
        with open_plan(folder, plan), suppress(StatsError):
            stats = read_stats(folder)
    was_there = stats is not None and _texts(stats.plan) == _texts(plan)
    if stats is None or not was_there:
        stats = _run_model(
            checkpoint,
            found,
            plan,
            windows,
            folder,
            execution=execution,
            where=where,
            progress=progress,
            tell=tell,
        )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return CalibrateResult(str(model), folder, stats, was_there, size, monotonic() - start)


def _run_model(
    checkpoint: Checkpoint,
    layers: ModelLayers,
    plan: Plan,
    windows: Mapping[str, Tensor],
    folder: Path,
    *,
    execution: Execution,
    where: Where,
    progress: Progress | None,
    tell: Tell,
) -> Stats:
    """Calibrate: layer by layer, with the whole model in memory, or on a cluster."""
    for remark in remarks_on(checkpoint, plan, windows):
        tell(remark)
    choose = partial(chosen_execution, execution, checkpoint, layers, plan, device=where.device)
    if where.cluster is not None:
        from mofq.evidence.calibration.on_workers import calibrate_remotely, free_of_workers
        from mofq.evidence.cluster import cluster

        with cluster(where.cluster, tell=tell):
            chosen = choose(free=partial(free_of_workers, cpus=where.cluster_cpus))
            if chosen.remark is not None:
                tell(chosen.remark)
            return calibrate_remotely(
                checkpoint,
                plan=plan,
                windows=windows,
                folder=folder,
                is_streamed=chosen.is_streamed,
                device=where.device,
                cpus=where.cluster_cpus,
                progress=progress,
            )
    chosen = choose()
    if chosen.remark is not None:
        tell(chosen.remark)
    from mofq.model.checkpoint.tensors import check_finite

    if chosen.is_streamed:
        from mofq.evidence.calibration.streamed import calibrate_streamed, check_disk
        from mofq.model.streaming.streamed import open_streamed

        with open_streamed(checkpoint.folder, dtype=plan.dtype, device=where.device) as streamed:
            check_disk(streamed, layers, plan=plan, folder=folder)
            check_finite(checkpoint, layers)  # reads gigabytes of a large vocabulary
            return calibrate_streamed(
                streamed, layers, plan=plan, windows=windows, folder=folder, progress=progress
            )
    from mofq.evidence.calibration.calibrate import calibrate as calibrate_here
    from mofq.model.loading import load_model

    check_finite(checkpoint, layers)
    return calibrate_here(
        load_model(
            checkpoint.folder,
            dtype=plan.dtype,
            device=where.device,
            device_map="auto" if execution == "spread" else None,
        ),
        layers,
        plan=plan,
        windows=windows,
        folder=folder,
        progress=progress and _over_corpora(progress, plan),
    )


def chosen_execution(
    execution: Execution,
    checkpoint: Checkpoint,
    layers: ModelLayers,
    plan: Plan,
    *,
    device: str,
    more_bytes: int = 0,
    unless: str | None = None,
    free: Callable[[str], int | None] | None = None,
) -> Chosen:
    """Whether the model is run whole, forward and backward; the rest as `choose_execution`."""
    from mofq.model.streaming.execution import choose_execution, pass_bytes

    return choose_execution(
        execution,
        checkpoint,
        dtype=plan.dtype,
        device=device,
        more_bytes=pass_bytes(checkpoint, layers, plan.sequence_length) + more_bytes,
        unless=unless,
        free=free,
    )


def _as_begun(plan: Plan, folder: Path, *, inputs: str) -> Plan:
    """A plan that goes on without what a folder of an earlier version did not keep."""
    from mofq.evidence.calibration.stats import begun_plan

    begun = begun_plan(folder)
    if begun is None:
        return plan
    return replace(
        plan,
        routing=plan.routing and begun.routing,
        inputs=begun.inputs if inputs == "auto" else plan.inputs,
    )


def without_inputs(plan: Plan) -> Plan:
    """A plan as versions made it that kept no inputs of sequences without samples."""
    return replace(plan, inputs=None)


def as_measured(plan: Plan, table: Path, *, inputs: str) -> Plan:
    """A plan of statistics that are not stored, as a table that is there was measured by them."""
    before = without_inputs(plan)
    is_asked = inputs == "auto" and table.exists()
    return before if is_asked and rests_on_passing(table, before) else plan


def rests_on_passing(table: Path, *plans: Plan) -> bool:
    """Whether a table was measured by statistics of one of some plans that were not stored."""
    from mofq.evidence.calibration.stats import passing_stats
    from mofq.evidence.table import read_table

    noted = read_table(table).header.stats
    passing = (passing_stats(table.parent, plan).sha256 for plan in plans)
    return noted is not None and noted.sha256 in passing


def _texts(plan: Plan) -> list[CorpusPlan]:
    """The corpora of a plan, wherever their files lie."""
    return [replace(one, source="") for one in plan.corpora]


def _over_corpora(progress: Progress, plan: Plan) -> Progress:
    """Takes what is done of one corpus after the other, and tells what is done of all."""
    counts = [one.sequences for one in plan.corpora]
    before = dict(zip((one.name for one in plan.corpora), accumulate([0, *counts]), strict=False))
    return lambda corpus, done, _: progress("calibrate", before[corpus] + done, sum(counts))


def plan_calibration(
    checkpoint: Checkpoint,
    layers: ModelLayers,
    texts: Sequence[Corpus],
    *,
    samples: Samples,
    dtype: str,
    kv_cache: bool,
) -> tuple[Plan, dict[str, Tensor]]:
    """What is computed, and corpus name -> token ids, [sequences, sequence_length]."""
    from mofq.model.layers import is_expert, vocabulary_names

    windows, bos = _windows(checkpoint, texts, samples)
    plan = _plan(
        checkpoint, texts, windows, samples=samples, dtype=dtype, kv_cache=kv_cache, bos=bos
    )
    is_mixture = any(map(is_expert, layers.grouped_layers))
    inputs = _keeps_inputs(checkpoint, layers, plan, asked=samples.inputs)
    return replace(
        plan,
        layers=layers.stated,
        routing=is_mixture or None,
        inputs=inputs or None,
        vocabulary=vocabulary_names(layers.groups) or None,
    ), windows


def _keeps_inputs(checkpoint: Checkpoint, layers: ModelLayers, plan: Plan, *, asked: str) -> bool:
    """Whether inputs are kept of the sequences of which nothing else is."""
    from mofq.evidence.calibration.disk_needs import experts_per_token, inputs_bytes

    others = sum(one.sequences - len(one.kept_indices) for one in plan.corpora)
    needed = inputs_bytes(
        layers,
        tokens=others * plan.sequence_length,
        experts_per_token=experts_per_token(checkpoint.config),
    )
    return others > 0 and (asked == "all" or (asked == "auto" and needed <= _INPUTS_BYTES))


def judging_windows(
    checkpoint: Checkpoint,
    texts: Sequence[Corpus],
    windows: Mapping[str, Tensor],
    *,
    samples: Samples,
) -> dict[str, Tensor]:
    """Other windows of the texts that calibrate, for what is to be judged on them.

    Args:
        checkpoint: Whose tokenizer is used.
        texts: Of the calibration.
        windows: Corpus name -> what was drawn of it, [sequences, sequence_length].
        samples: That were asked for.

    Returns:
        Corpus name -> a quarter as many; empty where one of the texts is too short.
    """
    from mofq.evidence.corpora import leading_tokens, windows_between
    from mofq.model.loading import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.folder)
    begin = leading_tokens(tokenizer, samples.bos)
    found = {}
    for text in texts:
        sequences, length = windows[text.name].shape
        between = windows_between(
            text,
            tokenizer,
            sequences=sequences,
            sequence_length=length,
            leading=begin,
            every=_JUDGED_OF,
        )
        if between is None or not len(between):
            return {}
        found[text.name] = between
    return found


def _windows(
    checkpoint: Checkpoint, texts: Sequence[Corpus], samples: Samples
) -> tuple[dict[str, Tensor], bool]:
    """Corpus name -> token ids, [sequences, sequence_length]; and whether BOS is their first."""
    from mofq.evidence.corpora import leading_tokens, spread_windows
    from mofq.model.loading import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.folder)
    leading = leading_tokens(tokenizer, samples.bos)
    windows = {
        text.name: spread_windows(
            text,
            tokenizer,
            sequences=samples.sequences or SEQUENCES,
            sequence_length=samples.sequence_length,
            leading=leading,
            or_fewer=samples.sequences is None,
        )
        for text in texts
    }
    return windows, bool(leading)


def _plan(
    checkpoint: Checkpoint,
    texts: Sequence[Corpus],
    windows: Mapping[str, Tensor],
    *,
    samples: Samples,
    dtype: str,
    kv_cache: bool,
    bos: bool,
) -> Plan:
    from mofq.evidence.calibration.stats import CorpusPlan, Plan
    from mofq.model.checkpoint.weights_hash import hash_weights

    return Plan(
        model_name=checkpoint.name,
        index_sha256=checkpoint.index_sha256,
        weights_sha256=hash_weights(checkpoint),
        seed=samples.seed,
        sequence_length=samples.sequence_length,
        draws=1,
        dtype=dtype,
        kv_cache=kv_cache or None,
        bos=bos or None,
        corpora=tuple(
            CorpusPlan(
                text.name,
                text.source,
                text.sha256,
                sequences=len(windows[text.name]),
                kept=samples.keep if samples.keep < len(windows[text.name]) else None,
            )
            for text in texts
        ),
    )
