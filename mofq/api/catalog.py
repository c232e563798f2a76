"""What mofq knows: search spaces, formats, serving engines and devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mofq.engines.devices import DeviceModel
    from mofq.engines.rules import Engine
    from mofq.evidence.spaces import SearchSpace
    from mofq.numbers.formats import ElementFormat, ScaleFormat


@dataclass(frozen=True, slots=True)
class SpacesResult:
    """The search spaces that come with mofq, by name."""

    spaces: Mapping[str, SearchSpace]

    def to_json(self) -> dict[str, Any]:
        """Each one's description and schemes."""
        return {
            name: {
                "description": one.description,
                "schemes": [scheme.name for scheme in one.schemes],
            }
            for name, one in self.spaces.items()
        }


@dataclass(frozen=True, slots=True)
class FormatsResult:
    """Formats of values and of scales, and the names of published combinations."""

    elements: Mapping[str, ElementFormat]
    scales: Mapping[str, ScaleFormat]
    aliases: Mapping[str, str]  #: name -> the scheme that it stands for

    def to_json(self) -> dict[str, Any]:
        """All of them."""
        return {
            "elements": {name: asdict(one) for name, one in self.elements.items()},
            "scales": {name: asdict(one) for name, one in self.scales.items()},
            "aliases": dict(self.aliases),
        }


@dataclass(frozen=True, slots=True)
class EnginesResult:
    """Serving engines by name, and what they serve."""

    engines: Mapping[str, Engine]

    def to_json(self) -> dict[str, Any]:
        """All of them."""
        return {name: asdict(one) for name, one in self.engines.items()}


@dataclass(frozen=True, slots=True)
class DevicesResult:
    """Device models by name: what times rest on."""

    devices: Mapping[str, DeviceModel]

    def to_json(self) -> dict[str, Any]:
        """All of them."""
        return {name: asdict(one) for name, one in self.devices.items()}


def spaces() -> SpacesResult:
    """List the search spaces that come with mofq."""
    from mofq.evidence.spaces import find_search_spaces, load_search_space

    return SpacesResult({name: load_search_space(name) for name in find_search_spaces()})


def formats() -> FormatsResult:
    """List element and scale formats."""
    from mofq.numbers.formats import ELEMENT_FORMATS, SCALE_FORMATS
    from mofq.numbers.schemes import ALIASES

    return FormatsResult(ELEMENT_FORMATS, SCALE_FORMATS, ALIASES)


def engines() -> EnginesResult:
    """List serving engines and what they serve."""
    from mofq.engines import ENGINES

    return EnginesResult(ENGINES)


def devices() -> DevicesResult:
    """List device models: what times rest on."""
    from mofq.engines.devices import DEVICE_MODELS

    return DevicesResult(DEVICE_MODELS)
