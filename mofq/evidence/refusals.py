"""Counts what is not offered, and why: one line for each reason."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mofq.engines import format_name
from mofq.model.kv_schemes import is_cache_scheme
from mofq.numbers.schemes import parse_scheme

#: The number of a decoder layer or an expert, within the name of a layer.
_NUMBER = re.compile(r"(?<=[a-z]\.)\d+(?=\.[a-z])")


@dataclass(frozen=True, slots=True)
class Refused:
    """Schemes that are not offered, for one reason."""

    schemes: tuple[str, ...]
    groups: int  #: fusion groups, or layers' caches, that do not get any of them
    reason: str

    def __str__(self) -> str:
        names = ", ".join(self.schemes)
        return f"not offered to {self.groups} fusion groups: {names}: {self.reason}"


def count_refusals(refusals: Iterable[tuple[str, str, str]]) -> tuple[Refused, ...]:
    """Refusals by their reasons.

    Reasons that differ in the number of a layer alone are one, of layers called ``layers.*``; so
    are those that differ in the scheme's name.

    Args:
        refusals: Fusion group or cache, scheme, and why that does not get it.

    Returns:
        One entry for each reason, in the order in which they come first.
    """
    reasons: dict[str, set[str]] = {}
    schemes: dict[str, dict[str, None]] = {}
    groups: dict[str, set[str]] = {}
    for group, scheme, reason in refusals:
        general = reason
        if not is_cache_scheme(scheme):
            name = format_name(parse_scheme(scheme))
            general = reason = reason.replace(f" in {name}", " in these formats")
        general = _NUMBER.sub("*", general)
        reasons.setdefault(general, set()).add(reason)
        schemes.setdefault(general, {})[scheme] = None
        groups.setdefault(general, set()).add(group)
    return tuple(
        Refused(
            tuple(schemes[general]),
            len(groups[general]),
            general if len(exact) > 1 else next(iter(exact)),
        )
        for general, exact in reasons.items()
    )
