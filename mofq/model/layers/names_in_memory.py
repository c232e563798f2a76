"""What transformers calls a checkpoint's tensors in the model that it builds: data with a version.

``facts/transformers-VERSION.json`` was written by transformers' own code: a tiny model of every
causal type was saved, and each stored name given to the function that its loader renames with
(`scripts/make/families.py`). It holds the names that differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

_FACTS = Path(__file__).parent / "facts" / "transformers-5.23.0.json"
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter of the loaded model that a tensor lies in, or a tensor that lies in one."""

    name: str
    expert: int | None = None  #: index into the parameter
    part: int = 0  #: which of ``parts`` equal shares of its rows
    parts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownType:
    """What transformers does with a ``model_type``."""

    kind: Annotated[str, Field(alias="class")]  #: the class that it builds
    tied: bool  #: what it assumes where the config does not say
    stacks: tuple[str, ...] = ()  #: the lists of layers that run on text: "model.layers"
    experts: str | None = None  #: why its fused experts cannot be run one by one; "" where they can
    #: Modules of experts that are none to run one by one, beside others that are -> why.
    odd_experts: Mapping[str, str] = field(default_factory=dict)
    #: Module of experts -> that of those which follow them in one list on disk, for images.
    experts_after: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[str, ...] = ()  #: modules of experts that even the hub stores as in memory
    transposed: bool = False  #: these hold [E, in, out]
    names: Mapping[str, tuple[str, int, int]]  #: pattern on disk -> pattern in memory, part, parts
    swapped: tuple[str, ...] = ()  #: patterns on disk of matrices that it transposes
    reused: tuple[str, ...] = ()  #: patterns of modules that run more than once for a token
    #: Pattern of a linear module with a forward of its own, or of one with a weight of more than
    #: two dimensions -> its class.
    odd: Mapping[str, str] = field(default_factory=dict)
    uncalled: tuple[str, ...] = ()  #: of linear modules that do not run on text
    partly: tuple[str, ...] = ()  #: of linear modules that run in some decoder layers only
    #: Attention modules that cache keys and values of heads as the config counts them.
    caches: tuple[str, ...] = ()
    with_towers: tuple[str, ...] = ()  #: as ``stacks``, of a second class, which reads images too
    #: The key of the config that describes the language model, if it is one of several.
    text: str = "text_config"
    needs: str | None = None  #: why its class does not run on text alone


@cache
def known_types() -> Mapping[str, KnownType]:
    """``model_type`` -> what transformers does with it."""
    types = json.loads(_FACTS.read_text("utf-8"))["types"]
    return TypeAdapter(dict[str, KnownType]).validate_python(types)


def known_type(architecture: str) -> KnownType | None:
    """What transformers does with a ``model_type``, or None for one that it did not have."""
    return known_types().get(architecture)


def find_in_memory(name: str, architecture: str) -> Place:
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
        return Place(_with_body(name, known))
    pattern, part, parts = entry
    numbers = _NUMBER.findall(name)
    count = pattern.count("#")
    expert = int(numbers[count]) if len(numbers) > count else None
    return Place(_fill(pattern, numbers[:count]), expert, part, parts)


def find_stored(name: str, architecture: str) -> tuple[Place, ...]:
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
        Place(
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


def has_stored_names(names: Iterable[str], architecture: str) -> bool:
    """Whether a checkpoint is in the hub's layout, as tensors tell that have other names there.

    Names that both layouts have are then as they are: transformers may write one of them back
    under another name, as a dense MLP of Kimi Linear under that of its mixtures.

    Args:
        names: Of its tensors.
        architecture: The config's ``model_type``.
    """
    known = known_type(architecture)
    if known is None:
        return False
    in_memory = {pattern for pattern, _, _ in known.names.values()}
    told = {name for name, (pattern, _, _) in known.names.items() if pattern} - in_memory
    return any(as_pattern(name) in told for name in names)


def is_fused(parameter: str, known: KnownType | None) -> bool:
    """Whether all experts are in a parameter of the loaded model, and on disk too."""
    module = as_pattern(parameter).rpartition(".")[0]
    return known is not None and module in known.fused


def is_swapped(name: str, architecture: str) -> bool:
    """Whether a matrix of a checkpoint is transposed in the loaded model."""
    known = known_type(architecture)
    return known is not None and as_pattern(name) in known.swapped


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
