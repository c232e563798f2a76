"""A search space with a fitted twin beside each scheme that rounds: the same bytes and kernels.

Of a scheme such as ``int4.g32@mse+int8.token`` the twin is ``int4.g32@nats~descent+int8.token``:
the engine that serves the one serves the other, and the codes are those that `mofq.evidence.fits`
fits to the calibration. `mofq run` decides where measuring a twin pays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mofq.evidence.spaces import Candidate, SearchSpace, space_digest
from mofq.exceptions import SchemeError
from mofq.numbers.schemes import Scheme, parse_scheme

#: What a space is called when it has the twins too.
FITTED_SUFFIX = "+fitted"
_FITTED = "@nats~descent"
#: How scales and codes of an operand are chosen, behind its format.
_CHOSEN_BY = re.compile(r"[@~].*")


@dataclass(frozen=True, slots=True)
class FittedSpace:
    """A search space with twins."""

    space: SearchSpace  #: all schemes, under a name of its own
    #: Twin -> the schemes of the space that it may take the place of. Only those that the space
    #: did not list itself.
    twins: Mapping[str, tuple[str, ...]]


def with_fitted(space: SearchSpace) -> FittedSpace:
    """Add the fitted twin of each scheme of a search space that has none yet.

    Args:
        space: Any.

    Returns:
        The space, its twins behind its own schemes; those of base schemes are base schemes.
    """
    known = {scheme.name for scheme in space.schemes}
    # Of a format that the space has fitted in any way there is no other twin.
    known |= {_twin_text(scheme.name) for scheme in space.schemes if scheme.is_fitted}
    rounded: dict[str, list[str]] = {}
    added: dict[tuple[Scheme, ...], Candidate] = {}
    for candidate in space.candidates:
        if candidate.groups is not None:  # what a source keeps, whose codes are there
            continue
        twins = tuple(map(fitted_twin, candidate.schemes))
        for scheme, twin in zip(candidate.schemes, twins, strict=True):
            if twin is not None and twin.name not in known:
                rounded.setdefault(twin.name, []).append(scheme.name)
        some = tuple(twin for twin in twins if twin is not None)
        if len(some) == len(twins) and any(twin.name not in known for twin in some):
            added.setdefault(some, Candidate(_twin_text(candidate.text), some))
    candidates = (*space.candidates, *added.values())
    of_base = {name for name, some in rounded.items() if set(some) & set(space.base)}
    base = (*space.base, *(name for name in rounded if name in of_base))
    with_twins = replace(space, name=space.name + FITTED_SUFFIX, candidates=candidates, base=base)
    return FittedSpace(
        replace(with_twins, sha256=space_digest(with_twins)),
        {name: tuple(dict.fromkeys(some)) for name, some in rounded.items()},
    )


def fitted_twin(scheme: Scheme) -> Scheme | None:
    """The scheme of the same format whose codes are fitted; None where there is none to be had."""
    if scheme.weight is None or scheme.is_fitted:
        return None
    try:
        return parse_scheme(_twin_text(scheme.name))
    except SchemeError:  # a format whose scales are not searched
        return None


def _twin_text(text: str) -> str:
    weight, plus, activation = text.partition("+")
    return _CHOSEN_BY.sub("", weight) + _FITTED + plus + activation
