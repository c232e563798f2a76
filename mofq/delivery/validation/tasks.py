"""Tasks: what lm-eval scores a model by, for the original and for what was made of it.

lm-eval, the language model evaluation harness, is an extra. A task is one that it
knows by name, or a YAML file of its format in a folder of one's own.
"""

from __future__ import annotations

import io
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mofq.evidence.standard_error import standard_error
from mofq.exceptions import MofqError, how_to_install, nearest_name

#: lm-eval lists thousands; a message names so many.
_SUGGESTIONS = 8


@dataclass(frozen=True, slots=True)
class Tasks:
    """Which tasks to run."""

    names: tuple[str, ...]
    folder: Path | None = None  #: with task files of lm-eval's format, beside those it knows
    limit: int | None = None  #: items of each task; None: all


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What one model reaches in one task by one metric."""

    task: str
    metric: str  #: lm-eval's, with its filter where that is not ``none``
    value: float
    stderr: float | None
    items: tuple[float, ...]  #: of each item, where the metric is their mean; else empty


@dataclass(frozen=True, slots=True)
class TaskResult:
    """A quantized model beside the original in one task."""

    task: str
    metric: str
    items: int  #: how many were asked
    value: float
    stderr: float | None
    original: float
    original_stderr: float | None
    difference: float  #: value - original
    difference_stderr: float | None  #: over items, each item compared with itself
    recovery_percent: float | None  #: of the original's value; None where that is 0


class TaskRunner:
    """Runs the same tasks for one model after another."""

    def __init__(self, tasks: Tasks) -> None:
        """Find the tasks before any model runs.

        Raises:
            MofqError: lm-eval is not installed, a task is not known, or its data cannot be read.
        """
        self._tasks = tasks
        self._manager = _find(tasks)

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[TaskScore, ...]:
        """The scores of a model.

        Args:
            model: In eval mode, on any device.
            tokenizer: Its own.

        Returns:
            One score for each task and metric, in lm-eval's order.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with _bars_on_terminals_only():
            results = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1),
                tasks=list(self._tasks.names),
                limit=self._tasks.limit,
                task_manager=self._manager,
                bootstrap_iters=0 if self._tasks.limit == 1 else 1000,
            )
        samples = results["samples"]
        return tuple(
            score for task in samples for score in _scores(task, results["results"], samples[task])
        )


def compare_tasks(
    quantized: Sequence[TaskScore], original: Sequence[TaskScore]
) -> tuple[TaskResult, ...]:
    """Two models' scores of the same tasks, side by side.

    Args:
        quantized: Of the quantized model.
        original: Of the original, from the same `TaskRunner`.

    Returns:
        One result for each task and metric. Both models meet the same items, so the error
        of the difference is that of the differences.
    """
    return tuple(_compare(ours, theirs) for ours, theirs in zip(quantized, original, strict=True))


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Keep lm-eval's progress bars out of files."""
    with ExitStack() as stack:
        if not sys.stderr.isatty():
            stack.enter_context(redirect_stderr(io.StringIO()))
        yield


def _find(tasks: Tasks) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MofqError(
            f"tasks need lm-eval, which is not installed. {how_to_install('lm-eval')}"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = None
    if tasks.folder is not None:
        if not tasks.folder.is_dir():
            raise MofqError(f"{tasks.folder}: is not a folder. Give one with task files.")
        # Reading the index of all that lm-eval knows takes ten seconds.
        manager = TaskManager(include_path=str(tasks.folder), include_defaults=False)
    if manager is None or not set(tasks.names) <= set(manager.all_tasks):
        folder = None if tasks.folder is None else str(tasks.folder)
        manager = TaskManager(include_path=folder)
    for name in tasks.names:
        if name not in manager.all_tasks:
            near = [one for one in manager.all_tasks if name.partition("_")[0] in one]
            raise MofqError(
                f"task {name!r}: lm-eval does not know it."
                + nearest_name(name, near[:_SUGGESTIONS] or manager.all_tasks[:_SUGGESTIONS])
            )
    try:
        with _bars_on_terminals_only():
            manager.load(list(tasks.names))
    except Exception as error:  # data sets and their hub raise dozens of kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise MofqError(
            f"tasks {', '.join(tasks.names)}: their data cannot be read: {reason}. "
            f"Without a network take tasks whose data is a local file."
        ) from error
    return manager


def _scores(
    task: str, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> list[TaskScore]:
    scores = []
    for key, value in results[task].items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = results[task].get(f"{metric}_stderr,{kind}")
        scores.append(
            TaskScore(
                task=task,
                metric=metric if kind == "none" else f"{metric},{kind}",
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                items=_items(samples, metric, kind, float(value)),
            )
        )
    return scores


def _items(
    samples: Sequence[Mapping[str, Any]], metric: str, kind: str, value: float
) -> tuple[float, ...]:
    own = [one for one in samples if one.get("filter", kind) == kind]
    found = [one.get(metric) for one in sorted(own, key=lambda one: int(one["doc_id"]))]
    numbers = [float(x) for x in found if isinstance(x, int | float)]
    is_mean = len(numbers) == len(found) > 0 and math.isclose(
        math.fsum(numbers) / len(numbers), value, rel_tol=1e-6, abs_tol=1e-9
    )
    return tuple(numbers) if is_mean else ()


def _compare(ours: TaskScore, theirs: TaskScore) -> TaskResult:
    assert (ours.task, ours.metric) == (theirs.task, theirs.metric)
    differences: list[float] = []
    if len(ours.items) == len(theirs.items):  # of one of them the items may not be known
        differences = [a - b for a, b in zip(ours.items, theirs.items, strict=True)]
    return TaskResult(
        task=ours.task,
        metric=ours.metric,
        items=len(ours.items),
        value=ours.value,
        stderr=ours.stderr,
        original=theirs.value,
        original_stderr=theirs.stderr,
        difference=ours.value - theirs.value,
        difference_stderr=standard_error(np.asarray(differences)),
        recovery_percent=100 * ours.value / theirs.value if theirs.value else None,
    )
