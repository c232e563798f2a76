"""Proves that a recipe is applied, and measures what it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mofq.api.inputs import load_corpora, text_file
from mofq.api.options import (
    Execution,
    LmEval,
    Model,
    Option,
    Running,
    Stats,
    Tell,
    Windows,
    documented,
    silent,
)
from mofq.api.preconditions import check_device, check_output
from mofq.exceptions import MofqError, option
from mofq.files.progress import Progress
from mofq.model.dtypes import check_dtype

if TYPE_CHECKING:
    from mofq.decision.recipe import Recipe
    from mofq.delivery.validation import Tasks, Validation

Candidate = Annotated[
    "Recipe | str | Path",
    Option("A recipe, or a compressed-tensors folder.", positional=True, read_as=str),
]


@dataclass(frozen=True, slots=True)
class ValidateResult:
    """A quantized model against the original, on one text or several."""

    model: str  #: as it was given
    candidate: Recipe | str | Path  #: as it was given
    recipe: Recipe | None  #: None: a folder that holds none
    validations: Mapping[str, Validation]  #: text's name -> result
    outputs: tuple[Path, ...] = ()  #: that they were written to
    stats: str | Path | None = None  #: as they were given

    @property
    def worst(self) -> Validation:
        """The result on the text with the largest KL."""
        return self.validations[self.worst_text]

    @property
    def worst_text(self) -> str:
        """The name of that text."""
        return max(self.validations, key=lambda name: self.validations[name].kl_nats_per_token)

    def to_json(self) -> dict[str, Any]:
        """As ``validation.json``; of several texts, by name."""
        content = {name: one.to_json() for name, one in self.validations.items()}
        return content if len(content) > 1 else next(iter(content.values()))


@documented
def validate(
    model: Model,
    recipe_or_folder: Candidate,
    text: Annotated[
        str | Sequence[str],
        Option("[NAME=]FILE, a hub data set, or demo-en or demo-pt; repeatable."),
    ],
    *,
    windows: Windows = Windows(),
    running: Running = Running(),
    execution: Execution = "auto",
    stats: Stats = None,
    backend: Annotated[str, Option("What applies the recipe: emulate or torchao.")] = "emulate",
    emulate: Annotated[
        Sequence[str],
        Option("Layers, e.g. '*', to emulate where torchao has no kernel; repeatable."),
    ] = (),
    lm_eval: LmEval = LmEval(),
    output: Annotated[str | Path | None, Option("Write validation.json.", short="-o")] = None,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> ValidateResult:
    """Prove that a recipe is applied; measure what it does.

    The text should not be one that was calibrated on. With several texts, the name of each is
    put before the suffix of ``output``.

    Returns:
        KL, perplexity and agreement beside the prediction, and whether the recipe is enforced.

    Raises:
        MofqError: An input is not valid.
    """
    from mofq.decision.recipe import find_recipe
    from mofq.model.checkpoint.headers import open_checkpoint

    check_dtype(running.dtype)
    corpora = load_corpora([text] if isinstance(text, str) else text, tell or silent)
    outputs = _outputs(output, [corpus.name for corpus in corpora])
    for output_path in outputs.values():
        check_output(
            output_path,
            files=[recipe_or_folder, *(text_file(corpus.source) for corpus in corpora)],
            folders=[model, recipe_or_folder, stats, lm_eval.task_folder],
        )
    open_checkpoint(str(model))
    recipe = find_recipe(recipe_or_folder)
    # From here on torch is imported, which takes seconds.
    from mofq.delivery.validation import validate_many, write_validation
    from mofq.delivery.validation.streamed import drop_unfinished

    check_device(running.device)
    tasks = _tasks(lm_eval)
    validations: dict[str, Validation] = {}
    for corpus in corpora:
        path = outputs.get(corpus.name)
        work = path and path.with_name(f".{path.name}.streamed")
        (validations[corpus.name],) = validate_many(
            str(model),
            [recipe_or_folder],
            corpus,
            tokens=windows.tokens,
            sequence_length=windows.sequence_length,
            bos=windows.bos,
            dtype=running.dtype,
            device=running.device,
            # Tasks have texts of their own, and are run with the first corpus.
            tasks=None if validations else tasks,
            backend=backend,
            emulated=emulate,
            stats=stats,
            execution=execution,
            # Where a run that was stopped is continued: beside what it will write.
            work=work,
            progress=progress,
            tell=tell,
        )
        if path is not None and work is not None:
            write_validation(validations[corpus.name], path)
            drop_unfinished(work)
    return ValidateResult(
        str(model), recipe_or_folder, recipe, validations, tuple(outputs.values()), stats
    )


def _tasks(lm_eval: LmEval) -> Tasks | None:
    from mofq.delivery.validation import Tasks

    folder, limit = lm_eval.task_folder, lm_eval.task_limit
    names = tuple(name for one in lm_eval.tasks for name in one.split(",") if name)
    if not names and (folder is not None or limit is not None):
        raise MofqError(
            f"{option('task_folder')} and {option('task_limit')} need {option('tasks')}. Name the "
            f"tasks to run."
        )
    return Tasks(names, None if folder is None else Path(folder), limit) if names else None


def _outputs(output: str | Path | None, names: Sequence[str]) -> dict[str, Path]:
    """Where each text's validation goes: with several, the name before the suffix."""
    if output is None:
        return {}
    path = Path(output)
    if len(names) == 1:
        return {names[0]: path}
    return {name: path.with_name(f"{path.stem}-{name}{path.suffix}") for name in names}
