"""What a run is asked for, checked from headers and texts before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from mofq.api.calibrate import (
    check_gradient_dtype,
    plan_calibration,
    rests_on_passing,
    without_inputs,
)
from mofq.api.inputs import load_corpora, load_named, open_layers
from mofq.api.options import (
    Corpora,
    GradientExecution,
    LayersFile,
    Running,
    Samples,
    Tell,
    Vocabulary,
    Where,
    Windows,
)
from mofq.api.preconditions import check_device, check_engine, check_vocabulary
from mofq.api.run_effort import Offered
from mofq.api.run_folder import RunFiles, lack_of_space
from mofq.exceptions import BudgetError, CorpusError, MofqError, Remark, option
from mofq.files.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from mofq.decision import Request
    from mofq.evidence.calibration.stats import Plan
    from mofq.evidence.constraints import Selection
    from mofq.evidence.spaces import SearchSpace
    from mofq.model.checkpoint.headers import Checkpoint
    from mofq.model.layers import ModelLayers

#: Sequences of each corpus whose samples are kept with the effort ``best``.
_KEPT_AT_BEST = 32


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The options of a run."""

    model: str
    request: Request  #: what is searched for
    space: SearchSpace  #: as it is named
    effort: str
    corpora: Corpora
    text: str  #: to validate on
    windows: Windows
    samples: Samples
    layers: LayersFile
    vocabulary: Vocabulary
    running: Running
    execution: GradientExecution
    no_stats: bool
    rivals: int
    progress: Progress | None
    tell: Tell

    @property
    def where(self) -> Where:
        """For stages that may work on a cluster, which a run does not."""
        return Where(dtype=self.running.dtype, device=self.running.device)

    @property
    def forward_execution(self) -> Literal["auto", "resident", "streamed"]:
        """How the model is run where no gradients are needed: spread for them alone."""
        return "auto" if self.execution == "spread" else self.execution

    @property
    def other_tool(self) -> str | None:
        """The format of the file that the engine reads where it reads no checkpoint."""
        from mofq.delivery.backends import RECIPE_EXPORTERS
        from mofq.engines import find_engine

        engine = self.request.engine
        reads = None if engine is None else find_engine(engine).reads
        return reads if reads in RECIPE_EXPORTERS else None


@dataclass(frozen=True, slots=True)
class CheckedRun:
    """A run that can be done, and what its options mean for the model."""

    options: RunOptions  #: with windows no longer than the model's context, and samples as long
    checkpoint: Checkpoint
    layers: ModelLayers  #: that get schemes
    plan: Plan  #: what is drawn from the corpora
    windows: Mapping[str, Tensor]  #: corpus -> what was drawn, [sequences, sequence_length]
    offered: Offered  #: what the space offers of this model at the effort
    selections: tuple[Selection, ...]  #: how many layers each constraint names


def check_run(asked: RunOptions) -> CheckedRun:
    """Refuse what cannot end well, before anything runs.

    Raises:
        MofqError: No recipe can meet the request, no engine serves one, a text is too short or
            is used twice, or an option does not go with another.
    """
    checkpoint, layers, offered, selections = _check_request(asked)
    _check_texts(asked)
    check_device(asked.running.device)
    check_gradient_dtype(asked.running.dtype)
    if asked.no_stats and asked.execution == "spread":
        raise MofqError(
            f"{option('no_stats')}: the model is run layer by layer then. Leave "
            f"{option('execution', 'spread')} out."
        )
    windows = _checked_windows(checkpoint, asked)
    samples = replace(asked.samples, sequence_length=windows.sequence_length, bos=windows.bos)
    if asked.effort == "best":
        samples = replace(samples, keep=_KEPT_AT_BEST)
    asked = replace(asked, windows=windows, samples=samples)
    plan, drawn = plan_calibration(
        checkpoint,
        layers,
        load_corpora(asked.corpora),
        samples=samples,
        dtype=asked.running.dtype,
        kv_cache=False,
    )
    if asked.effort != "quick":
        _check_halves(plan, asked.effort)
    return CheckedRun(asked, checkpoint, layers, plan, drawn, offered, selections)


def stores_stats(run: CheckedRun, files: RunFiles) -> bool:
    """Whether samples are stored: as a former run did it, else where the disk has room for them.

    That it has none is told.
    """
    from mofq.evidence.calibration.disk_needs import experts_per_token, kept_bytes

    if run.options.no_stats:
        return False
    if files.stats.exists():
        return True
    plan = run.plan
    if files.table.exists():
        return not rests_on_passing(files.table, plan, without_inputs(plan))
    kept = sum(len(one.kept_indices) for one in plan.corpora)
    needed = kept_bytes(
        run.layers,
        plan,
        kept=kept,
        others=sum(one.sequences for one in plan.corpora) - kept,
        experts_per_token=experts_per_token(run.checkpoint.config),
    )
    lack = lack_of_space(needed, files.folder)
    if lack is not None:
        run.options.tell(
            Remark(
                f"Statistics would take about {lack}: schemes are measured while the model is "
                f"calibrated, and no statistics are stored ({option('no_stats')})."
            )
        )
    return lack is None


def may_be_rewritten(run: CheckedRun) -> bool:
    """Whether what comes out of rewriting the model can be measured, validated and exported.

    Samples of a KV cache are those of the model as it is; files for other tools are of a model that
    is there; a quantized source would be written in bf16; sites are those of inferred or ruled
    layers, not of stated ones, and none is a matrix of the vocabulary; and a budget in nats is
    proved against the model that is searched.
    """
    asked, checkpoint, offered = run.options, run.checkpoint, run.offered
    if not offered.twins or offered.space.kv_cache or checkpoint.source_format is not None:
        return False
    if asked.layers is not None or any(asked.vocabulary.asked.values()):
        return False
    return asked.request.budgets.max_kl is None and asked.other_tool is None


def _check_halves(plan: Plan, effort: str) -> None:
    """Refuse to fit codes to a corpus that cannot be halved."""
    for corpus in plan.corpora:
        if len(corpus.kept_indices) < 2:
            raise MofqError(
                f"{option('effort', effort)}: codes are fitted to one half of the sequences of a "
                f"corpus and judged by the other, and {corpus.name!r} has one sequence. Calibrate "
                f"on more, or run with {option('effort', 'quick')}."
            )


def _check_request(
    asked: RunOptions,
) -> tuple[Checkpoint, ModelLayers, Offered, tuple[Selection, ...]]:
    """Refuse what no recipe can meet, or no engine serves, from headers alone.

    Returns:
        The model, opened; its layers that get schemes; what the space offers of this model at the
        effort; how many layers each of the request's constraints names.
    """
    from mofq.decision import check_budget
    from mofq.delivery.backends import find_exporter
    from mofq.engines import find_engine, legality
    from mofq.evidence.constraints import selections_of
    from mofq.evidence.spaces import offer_schemes, selected_layers, with_stored
    from mofq.model.checkpoint.headers import CONFIG_FILE, open_checkpoint
    from mofq.model.checkpoint_notes import wider_dtype
    from mofq.model.layers.model_class import check_next_tokens

    request, space = asked.request, asked.space
    engine, budgets = request.engine, request.budgets
    checkpoint = open_checkpoint(asked.model)
    found = open_layers(checkpoint, asked.vocabulary, asked.layers)
    check = None if engine is None else legality(engine, found.architecture)
    check_next_tokens(checkpoint.config, where=str(checkpoint.folder / CONFIG_FILE))
    check_engine(engine, found)
    selected_layers(space, found)
    offered = Offered.at(asked.effort, with_stored(space, checkpoint, found.groups))
    selections = selections_of(request.constraints, found.groups)
    offers = offer_schemes(
        offered.space, found.groups, legality=check, has_stats=True, constraints=request.constraints
    )
    check_vocabulary(offers, space)
    if not budgets.any_given and any(one.is_unquantized for one in space.schemes):
        raise BudgetError(
            f"needed a budget, found none; without one every layer stays as it is. Give "
            f"{option('max_bits', 5)}, {option('max_size', '4GB')} or {option('max_kl', 0.02)}, "
            f"for example."
        )
    if budgets.max_finer is not None and not space.base:
        raise BudgetError(
            f"{option('max_finer')}: the search space {space.name} names no `base` schemes, so "
            f"that nothing is finer. Add the key `base`, or drop the budget."
        )
    try:
        check_budget(offers, budgets, other_bytes=found.other_bytes)
    except BudgetError as error:
        raise BudgetError(" ".join(filter(None, [*error.args, wider_dtype(checkpoint)]))) from None
    if engine is not None:
        find_exporter(find_engine(engine).reads)
    return checkpoint, found, offered, selections


def _check_texts(asked: RunOptions) -> None:
    """Refuse to validate on a text that was calibrated on, and weights of other corpora."""
    from mofq.decision.request import weights_in_order

    text, corpora = load_named(asked.text), load_corpora(asked.corpora)
    if (found := asked.request.corpus_weights) is not None:
        weights_in_order(found, [corpus.name for corpus in corpora])
    for corpus in corpora:
        if corpus.sha256 == text.sha256:
            raise CorpusError(
                f"{asked.text}: is the calibration corpus {corpus.name!r} too, and would flatter "
                f"the recipe. Validate on another text."
            )


def _checked_windows(checkpoint: Checkpoint, asked: RunOptions) -> Windows:
    """Windows no longer than the model's context, of which the text fills enough."""
    from mofq.evidence.corpora import leading_tokens, tokenize
    from mofq.model.loading import load_tokenizer

    windows, source = asked.windows, asked.text
    least = 1 if asked.request.budgets.max_kl is None else 4
    limit = checkpoint.config.get("max_position_embeddings") or checkpoint.config.get("n_positions")
    length = min(windows.sequence_length, int(limit or windows.sequence_length))
    tokenizer = load_tokenizer(checkpoint.folder)
    windows_NT = tokenize(
        load_named(source),
        tokenizer,
        tokens=windows.tokens,
        sequence_length=length,
        leading=leading_tokens(tokenizer, windows.bos),
    )
    if len(windows_NT) < least:
        raise CorpusError(
            f"{source}: {option('max_kl')} is proved on every other window, and the others say "
            f"what the recipe costs; that needs {least} windows, found {len(windows_NT)}. Give "
            f"more {option('tokens')}, a longer text, or a shorter {option('sequence_length')}."
        )
    return replace(windows, sequence_length=length)
