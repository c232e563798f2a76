"""What names do not say of a model's layers, said by the user: ``--layers FILE``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from mofq.exceptions import CheckpointError
from mofq.files.documents import parse_yaml, read_text
from mofq.files.validated import Name, Names, SomeNames, Text, check_version, only_these_keys
from mofq.files.validated import validate as validate_value
from mofq.model.layers.names_in_memory import as_pattern

#: The key of an export's ``config.json`` with what its layers were found by.
CONFIG_KEY = "mofq_layers"


@only_these_keys
@dataclass(frozen=True, slots=True, kw_only=True)
class StatedLayers:
    """What is inferred of a model otherwise, or refused.

    Paths are those of modules inside a decoder layer, as the checkpoint calls them, with ``#`` for
    numbers: ``mixer.router``, ``mlps.#.gate``.
    """

    version: Literal[1] = 1
    stack: Name | None = None  #: the list of decoder layers: ``model.layers``
    linear: Names = ()  #: of linear layers, whose weights are [out, in]
    transposed: Names = ()  #: of linear layers, whose weights are [in, out]
    left: dict[Text, Text] = field(default_factory=dict)  #: path -> why it stays as it is
    #: Fusion group -> the layers that an engine joins: ``attn.qkv: [mixer.wq, mixer.wkv]``
    joined: dict[Text, SomeNames] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """All that are named."""
        members = (path for paths in self.joined.values() for path in paths)
        return (*self.linear, *self.transposed, *self.left, *members)

    def to_json(self) -> dict[str, Any]:
        """As the file has it; what it does not say is left out."""
        content = _STATED.dump_python(self, mode="json", exclude_defaults=True)
        return {"version": self.version, **content}


_STATED = TypeAdapter(StatedLayers)


def load_layers(path: str | Path) -> StatedLayers:
    """Read a file of layers.

    Raises:
        CheckpointError: It is missing or not valid.
    """
    where = str(path)
    value = parse_yaml(read_text(Path(path), CheckpointError), where, CheckpointError)
    check_version(value, 1, where, CheckpointError)
    return validate_value(_STATED, value, where, CheckpointError)


def layers_of_config(config: Mapping[str, Any], where: str) -> StatedLayers | None:
    """What an exported folder says of its layers, or None.

    Raises:
        CheckpointError: It is not valid.
    """
    value = config.get(CONFIG_KEY)
    return None if value is None else validate_value(_STATED, value, where, CheckpointError)


def path_of(name: str, layer: int) -> str:
    """How a file calls a tensor of a decoder layer."""
    path = name.partition(f".{layer}.")[2].removesuffix(".weight")
    return as_pattern(path)
