"""What transformers calls a checkpoint's tensors in the model that it builds: data with a version.

``facts/transformers-VERSION.json`` was written by transformers' own code: a tiny model of every
causal type was saved, and each stored name given to the function that its loader renames with
(`scripts/make/families.py`). It holds the names that differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_FACTS = Path(__file__).parent / "facts" / "transformers-5.23.0.json"
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")


@dataclass(frozen=True, slots=True)
class InMemory:
    """Where a stored tensor lies in the loaded model."""

    name: str  #: of the parameter
    expert: int | None = None  #: index into it
    part: int = 0  #: which of ``parts`` equal shares of its rows
    parts: int = 1


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a checkpoint of the hub has it, inside a parameter of the loaded model."""

    name: str
    expert: int | None
    part: int
    parts: int


@dataclass(frozen=True, slots=True)
class KnownType:
    """What transformers does with a ``model_type``."""

    kind: str  #: the class that it builds
    tied: bool  #: what it assumes where the config does not say
    stacks: tuple[str, ...]  #: the lists of layers that run on text: "model.layers"
    experts: str | None  #: why its fused experts cannot be run one by one; "" where they can
    fused: tuple[str, ...]  #: modules of experts that even the hub stores as they are in memory
    transposed: bool  #: these hold [E, in, out]
    names: Mapping[str, tuple[str, int, int]]  #: pattern on disk -> pattern in memory, part, parts
    reused: tuple[str, ...]  #: patterns of modules that run more than once for a token
    odd: Mapping[str, str]  #: pattern of a linear module with a forward of its own -> its class
    uncalled: tuple[str, ...]  #: of linear modules that do not run on text
    partly: tuple[str, ...]  #: of linear modules that run in some decoder layers only
    #: Attention modules that cache keys and values of heads as the config counts them.
    caches: tuple[str, ...]
    with_towers: tuple[str, ...]  #: as ``stacks``, of a second class, which reads images too
    text: str  #: the key of the config that describes the language model, if it is one of several
    needs: str | None  #: why its class does not run on text alone


@cache
def known_types() -> Mapping[str, KnownType]:
    """``model_type`` -> what transformers does with it."""
    content = json.loads(_FACTS.read_text("utf-8"))
    return {
        name: KnownType(
            kind=one.get("class", ""),
            tied=one["tied"],
            stacks=tuple(one.get("stacks", ())),
            experts=one.get("experts"),
            fused=tuple(one.get("fused", ())),
            transposed=one.get("transposed", False),
            names={key: (value[0], value[1], value[2]) for key, value in one["names"].items()},
            reused=tuple(one.get("reused", ())),
            odd=one.get("odd", {}),
            uncalled=tuple(one.get("uncalled", ())),
            partly=tuple(one.get("partly", ())),
            caches=tuple(one.get("caches", ())),
            with_towers=tuple(one.get("with_towers", ())),
            text=one.get("text", "text_config"),
            needs=one.get("needs"),
        )
        for name, one in content["types"].items()
    }


def known_type(architecture: str) -> KnownType | None:
    """What transformers does with a ``model_type``, or None for one that it did not have."""
    return known_types().get(architecture)


def find_in_memory(name: str, architecture: str) -> InMemory:
    """Where the loaded model has a tensor of a checkpoint in the hub's layout.

    Args:
        name: Of the tensor.
        architecture: The config's ``model_type``.

    Returns:
        The parameter; under the same name where nothing else is known.
    """
    known = known_type(architecture)
    entry = None if known is None else known.names.get(as_pattern(name))
    if entry is None:
        return InMemory(_with_body(name, known))
    pattern, part, parts = entry
    numbers = _NUMBER.findall(name)
    count = pattern.count("#")
    expert = int(numbers[count]) if len(numbers) > count else None
    return InMemory(_fill(pattern, numbers[:count]), expert, part, parts)


def find_stored(name: str, architecture: str) -> tuple[Stored, ...]:
    """What a checkpoint in the hub's layout calls a parameter of the loaded model.

    Args:
        name: Of the parameter.
        architecture: The config's ``model_type``.

    Returns:
        The tensors that it is made of, in order of their rows, of the first expert where it
        holds experts; none where nothing else than the name itself is known.
    """
    known = known_type(architecture)
    if known is None:
        return ()
    numbers = _NUMBER.findall(name)
    return tuple(
        Stored(
            _fill(pattern, [*numbers, *["0"] * (pattern.count("#") - len(numbers))]),
            0 if pattern.count("#") > len(numbers) else None,
            part,
            parts,
        )
        for pattern, part, parts in _reversed(architecture).get(as_pattern(name), ())
    )


def find_stored_name(name: str, architecture: str) -> str:
    """What a checkpoint in the hub's layout calls a tensor that is no part of a larger one.

    Args:
        name: Of a tensor of a checkpoint, in that layout or as the loaded model has it.
        architecture: The config's ``model_type``.
    """
    known = known_type(architecture)
    stored = find_stored(name, architecture)
    if known is None or as_pattern(name) in known.names or len(stored) != 1:
        return name
    return name if stored[0].expert is not None else stored[0].name


def is_fused(parameter: str, known: KnownType | None) -> bool:
    """Whether all experts are in a parameter of the loaded model, and on disk too."""
    module = as_pattern(parameter).rpartition(".")[0]
    return known is not None and module in known.fused


def _with_body(name: str, known: KnownType | None) -> str:
    """The name with what a class without a head, such as ``Qwen3Model``, leaves out."""
    for stack in () if known is None else (*known.stacks, *known.with_towers):
        body, _, rest = stack.partition(".")
        if rest and name.startswith(f"{rest}."):
            return f"{body}.{name}"
    return name


@cache
def _reversed(architecture: str) -> Mapping[str, tuple[tuple[str, int, int], ...]]:
    found: dict[str, list[tuple[str, int, int]]] = {}
    known = known_type(architecture)
    for stored, (pattern, part, parts) in () if known is None else known.names.items():
        found.setdefault(pattern, []).append((stored, part, parts))
    return {name: tuple(sorted(rows, key=lambda row: row[1])) for name, rows in found.items()}


def as_pattern(name: str) -> str:
    """A name with ``#`` for every number that is a word of its own."""
    return _NUMBER.sub("#", name)


def _fill(pattern: str, numbers: list[str]) -> str:
    left = iter(numbers)
    return re.sub("#", lambda _: next(left), pattern)
