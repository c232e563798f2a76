"""Tells the files of the flow apart, where one is given in the place of another."""

from __future__ import annotations

import re
from typing import Literal

from mofq.exceptions import MofqError

Kind = Literal["table", "recipe", "search space", "validation"]

#: By what the beginning of a file is known, and what writes such a file.
_KINDS: dict[Kind, tuple[re.Pattern[str], str]] = {
    "table": (re.compile(r'\{"kind":"header"'), "`mofq measure`"),
    "recipe": (re.compile(r"^groups:", re.MULTILINE), "`mofq search`"),
    "search space": (re.compile(r"^schemes:", re.MULTILINE), "`mofq spaces`"),
    "validation": (re.compile(r'\s*\{\s*"version".*"candidate":', re.DOTALL), "`mofq validate`"),
}
#: Bytes of a file that are looked at.
_BEGINNING = 16_384


def check_kind(data: bytes, needed: Kind, where: str, error: type[MofqError]) -> None:
    """Refuse a file that is known to be of another kind than is needed.

    Args:
        data: The file, or its beginning.
        needed: The kind.
        where: The file, for messages.
        error: The exception to raise.

    Raises:
        error: As said. A file of no known kind is for the reader of its content to refuse.
    """
    beginning = data[:_BEGINNING].decode(errors="replace")
    for kind, (known_by, _) in _KINDS.items():
        if kind != needed and known_by.search(beginning):
            raise error(
                f"{where}: needed a {needed}, from {_KINDS[needed][1]}; found a {kind}, from "
                f"{_KINDS[kind][1]}."
            )
    if not _KINDS[needed][0].search(beginning) and _is_of_model(data):
        raise error(
            f"{where}: needed a {needed}, from {_KINDS[needed][1]}; found a file of a model. Where "
            f"a model is meant, give its folder."
        )


def _is_of_model(data: bytes) -> bool:
    """Whether a file is a ``config.json``, or of safetensors: a length of 8 bytes, then JSON."""
    beginning = data[:_BEGINNING]
    is_config = b'"model_type"' in beginning and not beginning.startswith(b'{"kind"')  # a table
    return is_config or data[8:10] == b'{"' != data[:2]
