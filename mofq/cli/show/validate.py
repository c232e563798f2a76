"""What `mofq validate` shows: predicted beside measured, on every text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mofq.api.formatting import with_error, with_interval
from mofq.cli.show.histogram import print_histogram
from mofq.cli.show.terminal import next_step, note, print_table, say, stats_option
from mofq.evidence.corpora import differing_bos

if TYPE_CHECKING:
    from mofq.api import ValidateResult
    from mofq.delivery.validation import Validation

#: Layers that are not what the recipe says, of which so many are named.
_MOST_DEVIATIONS = 20


def show_validation(result: ValidateResult) -> None:
    """Every text's result, of several the worst, and the recipe's schemes."""
    recipe = result.recipe
    is_of_worst = recipe is not None and recipe.made_by.get("objective") == "worst-corpus"
    for one in result.validations.values():
        _print_validation(one, is_predicted=one is result.worst or not is_of_worst)
    if recipe is not None:
        print_histogram(recipe)
        if recipe.is_edited:
            note("The recipe was edited after it was found: no prediction is known of it.")
    if len(result.validations) > 1:
        value = with_error(result.worst.kl_nats_per_token, result.worst.kl_stderr)
        say(f"worst text: {result.worst_text}, {value} nats/token")
    if any(one.within_kl_budget is False for one in result.validations.values()):
        note(
            "Search again: with a smaller --max-kl, or with --model and --text beside it, which "
            "measures until the budget is kept."
        )
    elif all(one.enforced is not False for one in result.validations.values()):
        _suggest_export(result)


def _suggest_export(result: ValidateResult) -> None:
    """Say how a recipe becomes a checkpoint; of a folder, nothing: it was exported already."""
    recipe, candidate = result.recipe, result.candidate
    if recipe is not None and isinstance(candidate, str) and not Path(candidate).is_dir():
        stats = stats_option(recipe, result.stats)
        # Of a recipe's own engine, and its devices, the export takes what it needs.
        known = recipe.made_by.get("engine") is not None
        to = () if known else ("--to", "compressed-tensors", "--engine", "ENGINE")
        files = [word for path in result.outputs for word in ("--validation", path)]
        next_step("export", result.model, candidate, *to, *stats, *files, "-o", "FOLDER")


def end_validation(result: ValidateResult) -> int:
    """Name the layers that are not what the recipe says; exit code 1 where there are any."""
    # Of one candidate: the texts say nothing of it.
    deviations = next(iter(result.validations.values())).deviations
    for deviation in deviations[:_MOST_DEVIATIONS]:
        note(f"{deviation.layer}: {deviation.reason}")
    if (more := len(deviations) - _MOST_DEVIATIONS) > 0:
        note(f"and {more} more; `--json` names all.")
    return 1 if deviations else 0


def _print_validation(validation: Validation, *, is_predicted: bool) -> None:
    """A text's result; of one of several the recipe predicts nothing, but of the worst."""
    predicted = predicted_text(validation) if is_predicted else "of the worst text alone"
    rows = [
        [
            "KL, measured [nats/token]",
            with_error(validation.kl_nats_per_token, validation.kl_stderr),
        ],
        ["KL, predicted, 95 % [nats/token]", predicted],
        *_budget_rows(validation),
        ["perplexity", f"{validation.perplexity:.4g}"],
        ["perplexity of the original", f"{validation.perplexity_original:.4g}"],
        ["top-1 agreement", f"{100 * validation.top1_agreement:.2f} %"],
        ["bits per weight", f"{validation.bits_per_weight:.4f}"],
    ]
    if validation.enforced is False:
        # Before the figures, which are of something else than the recipe.
        rows.insert(0, ["enforced", "NO: what follows is not the recipe's"])
    else:
        known = "yes" if validation.enforced else "not known: no recipe beside the weights"
        rows.append(["enforced", known])
    lineage = validation.lineage
    windows = f"{validation.tokens} tokens of {lineage.text}, {lineage.sequence_length} at a time"
    if lineage.bos:
        windows += " from BOS on"
    print_table(f"{lineage.candidate} on {windows}", ["", ""], rows)
    if lineage.differs_in_bos:
        note(differing_bos(windows=lineage.bos))
    if lineage.is_longer_than_calibration:
        note(
            f"The windows have {lineage.sequence_length} tokens, and the sequences of the "
            f"calibration {lineage.stats_sequence_length}: the prediction and its interval are of "
            f"contexts as long as those. Compare with --sequence-length "
            f"{lineage.stats_sequence_length}, or calibrate on longer sequences."
        )
    if lineage.text_use is not None:
        note(
            f"The recipe was {lineage.text_use} on this very text, which flatters it: its KL on "
            f"other text may be larger. Validate on another text."
        )
    if validation.tasks:
        _print_tasks(validation)
    say(
        f"seconds: original {validation.seconds_original:.1f}, "
        f"apply, enforce and run {validation.seconds:.1f}"
    )


def predicted_text(validation: Validation) -> str:
    """The prediction with its interval, and whether what was measured is inside."""
    one = validation
    ends = one.predicted_kl_low, one.predicted_kl_high
    shown = with_interval(one.predicted_kl_nats_per_token, *ends, stderr=one.predicted_kl_stderr)
    if one.is_tuned and one.predicted_kl_nats_per_token is not None:
        return f"{shown}, before it was tuned"
    if one.within_prediction is None:
        return shown
    return f"{shown}, {'inside' if one.within_prediction else 'OUTSIDE'}"


def _print_tasks(validation: Validation) -> None:
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
    if not validation.within_kl_budget and validation.kl_nats_per_token <= budget:
        kept = f"NOT kept with two standard errors, {validation.kl_upper:.4g}"
    return [["KL, budget [nats/token]", f"{budget:.4g}, {kept}"]]
