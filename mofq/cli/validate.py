"""``mofq validate``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mofq.cli.checks import check_device, check_dtype, check_output
from mofq.cli.histogram import print_histogram, recipe_of
from mofq.cli.terminal import (
    next_step,
    note,
    print_json,
    print_table,
    progress_bars,
    say,
    stats_for,
    with_error,
)
from mofq.exceptions import MofqError

if TYPE_CHECKING:
    from mofq.decision.recipe import Recipe
    from mofq.delivery.validation import Tasks, Validation


def run_validate(
    model: str,
    recipe_or_folder: str,
    *,
    texts: Sequence[str],
    tokens: int = 8192,
    sequence_length: int = 512,
    dtype: str = "float32",
    device: str = "cpu",
    backend: str = "emulate",
    emulated: Sequence[str] = (),
    stats: Path | None = None,
    tasks: Sequence[str] = (),
    task_folder: Path | None = None,
    task_limit: int | None = None,
    output: Path | None = None,
    as_json: bool = False,
) -> None:
    """Validate, print the result, and exit with 1 where the recipe is not enforced."""
    from mofq.cli.calibrate import load_corpora
    from mofq.delivery.validation import validate, write_validation

    _check(dtype, device)
    corpora = load_corpora(texts)
    outputs = _outputs(output, [corpus.name for corpus in corpora])
    for path in outputs.values():
        check_output(path, recipe_or_folder, *(corpus.source for corpus in corpora))
    # Tasks have texts of their own, and are run with the first corpus.
    left = [_tasks(tasks, task_folder, task_limit)]
    how: dict[str, Any] = {"tokens": tokens, "sequence_length": sequence_length, "dtype": dtype}
    how |= {"device": device, "backend": backend, "emulated": emulated, "stats": stats}
    validations: dict[str, Validation] = {}
    for corpus in corpora:
        with progress_bars() as bars:
            first = left.pop() if left else None
            validations[corpus.name] = validate(
                model, recipe_or_folder, corpus, tasks=first, progress=bars.stage, **how
            )
        if corpus.name in outputs:
            write_validation(validations[corpus.name], outputs[corpus.name])
    _report(validations, recipe_of(recipe_or_folder), as_json=as_json)


def suggest_export(model: str, recipe_or_folder: str) -> None:
    """Say how a recipe becomes a checkpoint; of a folder, nothing: it was exported already."""
    recipe = recipe_of(recipe_or_folder)
    if recipe is not None and not Path(recipe_or_folder).is_dir():
        to = ("--to", "compressed-tensors", "--engine", "ENGINE", *stats_for(recipe))
        next_step("export", model, recipe_or_folder, *to, "-o", "FOLDER")


def _check(dtype: str, device: str) -> None:
    check_dtype(dtype)
    check_device(device)


def _tasks(tasks: Sequence[str], folder: Path | None, limit: int | None) -> Tasks | None:
    from mofq.delivery.validation import Tasks

    names = tuple(name for one in tasks for name in one.split(",") if name)
    if not names and (folder is not None or limit is not None):
        raise MofqError("--task-folder and --task-limit need --tasks. Name the tasks to run.")
    return Tasks(names, folder, limit) if names else None


def _outputs(output: Path | None, names: Sequence[str]) -> dict[str, Path]:
    """Where each text's validation goes: with several, the name before the suffix."""
    if output is None:
        return {}
    return {
        name: output
        if len(names) == 1
        else output.with_name(f"{output.stem}-{name}{output.suffix}")
        for name in names
    }


def _report(validations: Mapping[str, Validation], recipe: Recipe | None, *, as_json: bool) -> None:
    """Print every text's result, of several the worst, and the recipe's schemes."""
    if as_json:
        content = {name: one.to_json() for name, one in validations.items()}
        print_json(content if len(content) > 1 else next(iter(content.values())))
    else:
        for one in validations.values():
            print_validation(one)
        if recipe is not None:
            print_histogram(recipe)
        if len(validations) > 1:
            worst = max(validations, key=lambda name: validations[name].kl_nats_per_token)
            value = with_error(validations[worst].kl_nats_per_token, validations[worst].kl_stderr)
            say(f"worst text: {worst}, {value} nats/token")
    for name, one in validations.items():
        if one.enforced is False:
            for deviation in one.deviations[:20]:
                note(f"{name}: {deviation.layer}: {deviation.reason}")
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
    if validation.tasks:
        print_tasks(validation)
    say(
        f"seconds: original {validation.seconds_original:.1f}, "
        f"apply, enforce and run {validation.seconds:.1f}"
    )


def print_tasks(validation: Validation) -> None:
    """What lm-eval scores both models by."""
    columns = ["task", "metric", "items", "quantized", "original", "difference", "recovery [%]"]
    rows = [
        [
            one.task,
            one.metric,
            str(one.items or "–"),
            with_error(one.value, one.stderr),
            with_error(one.original, one.original_stderr),
            with_error(one.difference, one.difference_stderr),
            "–" if one.recovery_percent is None else f"{one.recovery_percent:.1f}",
        ]
        for one in validation.tasks
    ]
    print_table("tasks, by lm-eval", columns, rows)


def _budget_rows(validation: Validation) -> list[list[str]]:
    budget = validation.kl_budget_nats_per_token
    if budget is None:
        return []
    kept = "kept" if validation.within_kl_budget else "NOT kept"
    return [["KL, budget [nats/token]", f"{budget:.4g}, {kept}"]]
