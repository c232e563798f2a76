"""Tunes a recipe's model against the original, at no bit more: norms, codes and scales."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mofq.api.calibrate import (
    check_gradient_dtype,
    chosen_execution,
    judging_windows,
    plan_calibration,
)
from mofq.api.inputs import load_corpora, open_recipe, save_recipe, text_file
from mofq.api.options import (
    AnyRecipe,
    Corpora,
    Excerpts,
    Execution,
    Model,
    Option,
    RecipeOutput,
    Running,
    Samples,
    Tell,
    TuningStats,
    documented,
    silent,
)
from mofq.api.preconditions import check_device, check_output
from mofq.exceptions import RecipeError
from mofq.files.progress import Progress

if TYPE_CHECKING:
    from mofq.decision.recipe import Recipe
    from mofq.decision.tuning import Tuning

#: Of four sequences each (docs/rounding-and-rewrites.md).
STEPS = 64

Steps = Annotated[
    int,
    Option(
        "Steps of the optimizer, on four sequences each. 0: codes compensate the errors of layers "
        "before, and no more.",
        least=0,
    ),
]
What = Annotated[
    Literal["all", "norms"],
    Option("all: codes and scales of weights, and norms; norms: these alone, in less memory."),
]


@dataclass(frozen=True, slots=True)
class TuneResult:
    """A recipe before and after it was tuned."""

    model: str  #: as it was given
    recipe: Recipe  #: tuned where that helps; else as it was
    tuning: Tuning  #: what was measured, whether or not the recipe has it
    output: Path | None
    seconds: float
    stats: str | Path | None = None  #: as they were given

    @property
    def helps(self) -> bool:
        """Whether the recipe has what was tuned."""
        return self.recipe.tuning is not None

    def to_json(self) -> dict[str, Any]:
        """What was measured, for machines."""
        return {
            "recipe": None if self.output is None else str(self.output),
            "tuned": self.helps,
            **self.tuning.to_json(),
            "seconds": round(self.seconds, 2),
        }


@documented
def tune(
    model: Model,
    recipe: AnyRecipe,
    corpora: Annotated[
        Corpora,
        Option(
            "NAME=FILE, the text that calibrated, not the one that validates; repeatable.",
            flag="--corpus",
        ),
    ],
    output: RecipeOutput = None,
    *,
    stats: TuningStats = None,
    what: What = "all",
    steps: Steps = STEPS,
    excerpts: Excerpts = Excerpts(),
    running: Running = Running(),
    execution: Execution = "auto",
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> TuneResult:
    """Tune a quantized model against the original, at the same bits: codes, scales and norms.

    Codes make up for what the layers before them change, where the statistics are of these very
    sequences; then some steps are made on the KL divergence. Other sequences of the text judge, or,
    where it is too short, every fourth. Where the KL is surely less there (its 95 % interval), the
    recipe is written with what was tuned, which lies in
    a file beside it; else it is written as it was.

    Returns:
        The recipe, and what was measured.

    Raises:
        MofqError: An input is not valid; the message says which and what to do.
    """
    start = monotonic()
    check_gradient_dtype(running.dtype)
    tell = tell or silent
    texts = load_corpora(corpora, tell)
    path = None if output is None else Path(output)
    if path is not None:
        check_output(
            path,
            files=[text_file(text.source) for text in texts],
            folders=[model, stats],
        )
    untuned = open_recipe(recipe)
    if untuned.tuning is not None:
        raise RecipeError(
            f"{untuned.title}: is tuned already, in {untuned.tuning.steps} steps. To tune it anew, "
            f"take its section `tuning` out: without it, it is the recipe before."
        )
    check_device(running.device)

    from mofq.delivery.recipe_layers import find_recipe_layers
    from mofq.delivery.rewriting.remake import base_of
    from mofq.delivery.tuning.products import copies_bytes
    from mofq.delivery.tuning.tune_recipe import tune_recipe
    from mofq.delivery.validation.streamed import drop_unfinished
    from mofq.model.checkpoint.headers import open_checkpoint

    checkpoint = open_checkpoint(str(model))
    samples = Samples(
        sequences=excerpts.sequences, sequence_length=excerpts.sequence_length, bos=excerpts.bos
    )
    with base_of(untuned, checkpoint, stats) as base:
        layers = find_recipe_layers(base.checkpoint, untuned)
        plan, windows = plan_calibration(
            checkpoint, layers, texts, samples=samples, dtype=running.dtype, kv_cache=False
        )
        chosen = chosen_execution(
            *(execution, checkpoint, layers, plan),
            device=running.device,
            more_bytes=copies_bytes(checkpoint, dtype=plan.dtype, device=running.device),
        )
        if chosen.remark is not None:
            tell(chosen.remark)
        # Where a tuning that was stopped is continued: beside what it will write.
        work = path and path.with_name(f".{path.name}.streamed")
        found = tune_recipe(
            checkpoint,
            untuned,
            windows,
            judging=judging_windows(checkpoint, texts, windows, samples=samples),
            base=base,
            plan=plan,
            steps=steps,
            codes=what == "all",
            device=running.device,
            is_streamed=chosen.is_streamed,
            work=work,
            progress=progress,
            tell=tell,
        )
    written = found.recipe if found.helps else untuned
    if path is not None and work is not None:
        save_recipe(written, path, tell)
        drop_unfinished(work)
    return TuneResult(str(model), written, found.tuning, path, monotonic() - start, stats)
