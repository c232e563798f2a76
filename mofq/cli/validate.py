"""``mofq validate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mofq.cli.checks import check_device, check_dtype, check_output
from mofq.cli.terminal import note, print_json, print_table, progress_bars, say, with_error

if TYPE_CHECKING:
    from mofq.validate import Validation


def run_validate(
    model: str,
    recipe_or_folder: str,
    *,
    text: str,
    tokens: int = 8192,
    sequence_length: int = 512,
    dtype: str = "float32",
    device: str = "cpu",
    output: Path | None = None,
    as_json: bool = False,
) -> None:
    """Validate, print the result, and exit with 1 where the recipe is not enforced."""
    from mofq.cli.calibrate import load_named
    from mofq.validate import validate, write_validation

    if output is not None:
        check_output(output)
    check_dtype(dtype)
    check_device(device)
    with progress_bars() as bars:
        validation = validate(
            model,
            recipe_or_folder,
            load_named(text),
            tokens=tokens,
            sequence_length=sequence_length,
            dtype=dtype,
            device=device,
            progress=bars.stage,
        )
    if output is not None:
        write_validation(validation, output)
    if as_json:
        print_json(validation.to_json())
    else:
        print_validation(validation)
    if validation.enforced is False:
        for deviation in validation.deviations[:20]:
            note(f"{deviation.layer}: {deviation.reason}")
        sys.exit(1)


def print_validation(validation: Validation) -> None:
    """One table: predicted beside measured."""
    predicted = with_error(validation.predicted_kl_nats_per_token, validation.predicted_kl_stderr)
    rows = [
        [
            "KL, measured [nats/token]",
            with_error(validation.kl_nats_per_token, validation.kl_stderr),
        ],
        ["KL, predicted [nats/token]", predicted],
        *_budget_rows(validation),
        ["perplexity", f"{validation.perplexity:.4g}"],
        ["perplexity of the original", f"{validation.perplexity_original:.4g}"],
        ["top-1 agreement", f"{100 * validation.top1_agreement:.2f} %"],
        ["bits per weight", f"{validation.bits_per_weight:.4f}"],
        ["enforced", {True: "yes", False: "NO", None: "nothing to enforce"}[validation.enforced]],
    ]
    lineage = validation.lineage
    windows = f"{validation.tokens} tokens of {lineage.text}, {lineage.sequence_length} at a time"
    print_table(f"{lineage.candidate} on {windows}", ["", ""], rows)
    say(
        f"seconds: original {validation.seconds_original:.1f}, "
        f"apply, enforce and run {validation.seconds:.1f}"
    )


def _budget_rows(validation: Validation) -> list[list[str]]:
    budget = validation.kl_budget_nats_per_token
    if budget is None:
        return []
    kept = "kept" if validation.within_kl_budget else "NOT kept"
    return [["KL, budget [nats/token]", f"{budget:.4g}, {kept}"]]
