"""Tensors in nested values: what a module is called with, what it returns and what it changes.

Values are tensors, None, numbers and texts, in tuples, lists and mappings. Other objects are
passed on as they are; what a module returns must not hold any.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mofq.exceptions import StreamingError

_PLAIN = (type(None), bool, int, float, str)
#: Keys and indices, from the outermost container to a place in the innermost.
Path = tuple[Any, ...]


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a value and of its containers, with other tensors.

    Args:
        value: Any.
        change: Of each tensor; called once for a tensor that occurs several times.
    """
    return _map(value, change, {})


def _map(value: Any, change: Callable[[Tensor], Tensor], done: dict[int, Any]) -> Any:
    if id(value) in done:
        return done[id(value)]
    new = value
    if isinstance(value, Tensor):
        new = change(value)
    elif type(value) in (tuple, list):
        new = type(value)(_map(one, change, done) for one in value)
    elif isinstance(value, MutableMapping):
        new = copy.copy(value)
        for key, one in value.items():
            new[key] = _map(one, change, done)
    done[id(value)] = new
    return new


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a value, in a fixed order; one that occurs twice, twice."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (tuple, list):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)


@dataclass(frozen=True, slots=True)
class Packed:
    """A value, taken apart into its tensors and what JSON can say of the rest."""

    form: Any
    tensors: list[Tensor]


def pack(value: Any, *, where: str) -> Packed:
    """Take a value apart.

    Args:
        value: Of tuples, lists, dictionaries, tensors and plain values.
        where: For messages.

    Raises:
        StreamingError: It holds something else.
    """
    tensors: list[Tensor] = []
    return Packed(_form(value, tensors, where), tensors)


def _form(value: Any, tensors: list[Tensor], where: str) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, _PLAIN):
        return {"value": value}
    if type(value) in (tuple, list):
        return {type(value).__name__: [_form(one, tensors, where) for one in value]}
    if type(value) is dict:
        pairs = [[_form(k, [], where), _form(one, tensors, where)] for k, one in value.items()]
        return {"dict": pairs}
    raise StreamingError(f"{where} returns an object of class {type(value).__name__}")


def unpack(form: Any, tensors: Sequence[Tensor]) -> Any:
    """The value that was packed, with the tensors in the place of its own."""
    ((kind, content),) = form.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "value":
            return content
        case "dict":
            return {unpack(key, ()): unpack(one, tensors) for key, one in content}
        case _:
            parts = [unpack(one, tensors) for one in content]
            return tuple(parts) if kind == "tuple" else parts


class Watched:
    """What a module is given, to see afterwards what it changed in it."""

    def __init__(self, given: Any) -> None:
        """Note every entry of every container that can be changed.

        Args:
            given: Arguments, in a tuple.
        """
        self._given = given
        self._entries = {path: dict(_items(one)) for path, one in _mutable(given)}
        self._versions = [(one, one._version) for one in tensors_in(given)]

    def changes(self, *, where: str) -> list[tuple[list[Any], Any]]:
        """The entries that are others now, each as its path and its new value.

        Raises:
            StreamingError: A tensor was changed in place.
        """
        if any(one._version != version for one, version in self._versions):
            raise StreamingError(f"{where} changes a tensor that it is given")
        found = []
        for path, container in _mutable(self._given):
            before = self._entries.get(path, {})
            for key, value in _items(container):
                if key not in before or before[key] is not value:
                    found.append(([*path, key], value))
        return found


def put_changes(given: Any, changes: Sequence[tuple[Sequence[Any], Any]]) -> None:
    """Change what a module is given as it was seen to do."""
    for path, value in changes:
        container = given
        for key in path[:-1]:
            container = container[key]
        if isinstance(container, MutableSequence) and path[-1] == len(container):
            container.append(value)
        else:
            container[path[-1]] = value


def _items(container: Any) -> Iterator[tuple[Any, Any]]:
    yield from container.items() if isinstance(container, Mapping) else enumerate(container)


def _mutable(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The containers in a value that can be changed, with where they are."""
    if isinstance(value, list | MutableMapping):
        yield path, value
    if type(value) in (tuple, list) or isinstance(value, MutableMapping):
        for key, one in _items(value):
            yield from _mutable(one, (*path, key))
