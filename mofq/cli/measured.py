"""What `mofq search` does where it runs the model: --refine and --solver optuna."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from mofq.cli.calibrate import load_named
from mofq.cli.search_options import SearchOptions, search_request
from mofq.cli.terminal import Bars, note, progress_bars, short_bytes, with_error
from mofq.exceptions import MofqError

if TYPE_CHECKING:
    from mofq.decision import Decision, Request
    from mofq.delivery.validation.measured_kl import MeasuredKl
    from mofq.evidence.table import Table
    from mofq.model.checkpoint.headers import Checkpoint


def search_measured(options: SearchOptions, table: Table, request: Request) -> Decision:
    """Decide, and let measurements have the last word."""
    from mofq.delivery.validation.measured_kl import MeasuredKl

    assert options.model is not None
    assert options.text is not None
    text = load_named(options.text)
    with (
        progress_bars() as bars,
        MeasuredKl(
            options.model,
            text,
            tokens=options.tokens,
            sequence_length=options.sequence_length,
            device=options.device,
            stats=options.stats,
            progress=bars.stage,
        ) as objective,
    ):
        check_model(table, objective.checkpoint)
        measure = _in_study if options.solver == "optuna" else _refined
        return measure(options, table, request, objective=objective, bars=bars)


def _refined(
    options: SearchOptions, table: Table, request: Request, *, objective: MeasuredKl, bars: Bars
) -> Decision:
    from mofq.decision.measured import decide_refined

    return decide_refined(
        table,
        request,
        evaluate=objective.evaluate,
        swaps=options.refine,
        text_sha256=objective.text.sha256,
        progress=lambda done, total: bars.stage("refine", done, total),
    ).decision


def _in_study(
    options: SearchOptions, table: Table, request: Request, *, objective: MeasuredKl, bars: Bars
) -> Decision:
    from mofq.decision.front import decide_on_front
    from mofq.decision.study import StudyPlan, decide_in_study

    plan = StudyPlan(
        storage=options.storage or str(options.output.with_suffix(".optuna.db")),
        text_sha256=objective.text.sha256,
        tokens=objective.tokens,
        sequence_length=options.sequence_length,
        device=options.device,
        trials=options.trials,
        seed=options.seed,
    )
    keys: dict[str, Any] = {
        "evaluate": objective.evaluate,
        "plan": plan,
        "progress": lambda done, total: bars.stage("trials", done, total),
    }
    with _other_workers(options):
        if not options.multi_objective:
            return decide_in_study(table, request, **keys)
        decision, front = decide_on_front(table, request, **keys)
    for point in front:
        kl = with_error(point.measured.kl.value, point.measured.kl.stderr)
        size = f"{point.size:.4f} bits"
        if options.kv_tokens:
            size = f"{short_bytes(round(point.size))} with the cache"
        note(f"trial {point.trial}: {size}, {kl} nats per token")
    return decision


@contextmanager
def _other_workers(options: SearchOptions) -> Iterator[None]:
    """Processes that work on the same study, until it has its trials."""
    context = get_context("spawn")  # a fork of a process that uses torch hangs
    alone = replace(options, workers=1)
    processes = [
        context.Process(target=work, args=(alone,), daemon=True) for _ in range(options.workers - 1)
    ]
    for process in processes:
        process.start()
    yield
    for process in processes:
        process.join()
        if process.exitcode:
            note(f"A worker ended with exit code {process.exitcode}; the others did its part.")


def work(options: SearchOptions) -> None:
    """One more process on a study; what it finds is in the study."""
    from mofq.evidence.table import read_table

    search_measured(options, read_table(options.table), search_request(options))


def check_model(table: Table, checkpoint: Checkpoint) -> None:
    """Refuse to measure another model than the table's.

    Raises:
        MofqError: It is another.
    """
    from mofq.model.checkpoint.weights_hash import hash_weights

    for key, ours, theirs in (
        ("index_sha256", table.header.index_sha256, checkpoint.index_sha256),
        ("weights_sha256", table.header.weights_sha256, hash_weights(checkpoint)),
    ):
        if ours not in (None, theirs):
            raise MofqError(
                f"the table is of {table.header.model_name} with {key} {ours[:8]}, and --model "
                f"has {theirs[:8]}. Give the model that was measured."
            )
