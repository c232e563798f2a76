"""What `mofq search` does where it runs the model: --refine and --solver optuna."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mofq.cli.calibrate import load_named
from mofq.cli.terminal import progress_bars
from mofq.exceptions import MofqError

if TYPE_CHECKING:
    from mofq.cli.search import SearchOptions
    from mofq.decide import Decision, Request
    from mofq.table import Table


def check_measured(options: SearchOptions) -> None:
    """Refuse a measured search that lacks what it measures with.

    Raises:
        MofqError: --model or --text is missing.
    """
    asked = "--solver optuna" if options.solver == "optuna" else f"--refine {options.refine}"
    for name, value in (("--model", options.model), ("--text", options.text)):
        if value is None:
            raise MofqError(
                f"{asked} measures recipes on the model itself and needs {name}; the text should "
                f"be neither what was calibrated on nor what will validate."
            )


def search_measured(options: SearchOptions, table: Table, request: Request) -> Decision:
    """Decide, and let measurements have the last word."""
    from mofq.decide.measured import decide_refined
    from mofq.validate.objective import MeasuredKl

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
            progress=bars.stage,
        ) as objective,
    ):
        check_model(table, objective.checkpoint.index_sha256)
        return decide_refined(
            table,
            request,
            evaluate=objective.evaluate,
            swaps=options.refine,
            text_sha256=text.sha256,
            progress=lambda done, total: bars.stage("refine", done, total),
        ).decision


def check_model(table: Table, index_sha256: str) -> None:
    """Refuse to measure another model than the table's.

    Raises:
        MofqError: It is another.
    """
    if table.header.index_sha256 != index_sha256:
        raise MofqError(
            f"the table is of {table.header.model_name} with index_sha256 "
            f"{table.header.index_sha256[:8]}, and --model has {index_sha256[:8]}. "
            f"Give the model that was measured."
        )
