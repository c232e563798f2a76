"""Errors that a user can mend, and how messages name options.

The command line prints errors without a traceback.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches

_OPTION = re.compile("⟨(.+?)(?:=(.*?))?⟩")


def option(name: str, value: object = None) -> str:
    """An option in the message of an error, or in a `Remark`.

    Args:
        name: As Python calls it, ``"max_bits"``; the command line shows ``--max-bits``.
        value: That was given, or should be; None: no value is named.
    """
    return f"⟨{name}⟩" if value is None else f"⟨{name}={value}⟩"


def _spelled(template: str, flag: Callable[[str], str], between: str) -> str:
    """A message with its options as an interface writes them."""

    def spell(found: re.Match[str]) -> str:
        name, value = found.groups()
        return flag(name) if value is None else f"{flag(name)}{between}{value}"

    return _OPTION.sub(spell, template)


class Remark(str):
    """A line that a user should read, which names options by `option`.

    It reads as Python writes them; the command line spells it anew. (What is made of it, by
    `str.join` or in another text, stays as Python writes it.)
    """

    __slots__ = ("template",)
    template: str  #: the line with its options not yet spelled, to be a part of another remark

    def __new__(cls, template: str) -> Remark:
        """The line, from a text with options by `option`."""
        made = super().__new__(cls, _spelled(template, lambda name: name, "="))
        made.template = template
        return made

    def __getnewargs__(self) -> tuple[str]:
        return (self.template,)

    def spelled(self, flag: Callable[[str], str], between: str = " ") -> str:
        """The line with options as another interface writes them; see `MofqError.spelled`."""
        return _spelled(self.template, flag, between)


class MofqError(Exception):
    """Base of every error that mofq raises on purpose.

    The message says where (file, layer or key), what was needed, what was
    found, and what to do. It names options by `option`.
    """

    @property
    def template(self) -> str:
        """The message with its options not yet spelled, to be a part of another message."""
        return super().__str__()

    def __str__(self) -> str:
        """The message, with options as Python writes them."""
        return self.spelled(lambda name: name, "=")

    def spelled(self, flag: Callable[[str], str], between: str = " ") -> str:
        """The message with options as another interface writes them.

        Args:
            flag: From an option's name in Python to the other.
            between: An option and its value.
        """
        return _spelled(self.template, flag, between)


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


class StreamingError(MofqError):
    """A model cannot be run decoder layer after decoder layer, or what is kept of that is lost."""


class EnforcementError(MofqError):
    """A layer of a quantized model is not what the recipe says."""


def first_line(error: Exception) -> str:
    """What another library's error says first, without a full stop; else its kind."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def how_to_install(extra: str) -> str:
    """The end of a message: how a user gets the packages of an extra of mofq."""
    return f"Run `pip install '.[{extra}]'` in a checkout of mofq."


#: Names that a message lists at most: a large model has thousands of layers.
_MOST_NAMES = 40
_MOST_CONTAINING = 6


def nearest_name(name: str, known: Iterable[str]) -> str:
    """The end of a message that suggests a known name: ``" Did you mean 'x'?"``.

    Args:
        name: What was found.
        known: What would have been accepted.

    Returns:
        The names that begin with what was found (``vllm`` is five engines) or contain it, else
        the one that is spelled most like it, else all known ones.
    """
    names = sorted(set(known))
    begun = [one for one in names if one.startswith(name)] if len(name) >= 3 else []
    containing = begun or [one for one in names if name in one and len(name) >= 3]
    if len(containing) > 1:
        listed = ", ".join(map(repr, containing[:_MOST_CONTAINING]))
        more = len(containing) - _MOST_CONTAINING
        return f" Did you mean one of {listed}{f' and {more} more' if more > 0 else ''}?"
    close = containing or get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f" Did you mean {close[0]!r}?"
    more = len(names) - _MOST_NAMES
    return f" Known: {', '.join(names[:_MOST_NAMES])}{f' and {more} more' if more > 0 else ''}."
