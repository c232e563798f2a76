"""Errors that a user can mend. The command line prints them without a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MofqError(Exception):
    """Base of every error that mofq raises on purpose.

    The message says where (file, layer or key), what was needed, what was
    found, and what to do.
    """


class CheckpointError(MofqError):
    """A checkpoint is missing, truncated, or disagrees with its config."""


class SchemeError(MofqError):
    """A scheme name does not parse, or a scheme does not fit a layer."""


class SearchSpaceError(MofqError):
    """A search space file is not valid."""


class CorpusError(MofqError):
    """A text cannot be read, or is too short."""


class StatsError(MofqError):
    """Calibration statistics are missing, incomplete, or belong to another model."""


class TableError(MofqError):
    """A table cannot be read, or its rows do not belong together."""


class BudgetError(MofqError):
    """No recipe meets the budget; the message names the tightest one possible."""


class RecipeError(MofqError):
    """A recipe is not valid, or does not belong to the model."""


class EngineError(MofqError):
    """An engine is unknown, or cannot serve what was asked."""


class ClusterError(MofqError):
    """A cluster cannot be reached, or its workers die."""


class BackendError(MofqError):
    """A backend cannot apply or export a scheme."""


class RewriteError(MofqError):
    """A checkpoint cannot be rewritten without changing what it computes."""


class EnforcementError(MofqError):
    """A layer of a quantized model is not what the recipe says."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The end of a message that suggests a known name: ``" Did you mean 'x'?"``.

    Args:
        name: What was found.
        known: What would have been accepted.

    Returns:
        The suggestion, or the list of all known names where none is near.
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(names)}."
