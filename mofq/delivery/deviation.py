"""What differs in a quantized model from what it should be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Deviation:
    """One way in which a model is not what its recipe makes of the original."""

    layer: str  #: or the name of another tensor, or a file and a key in it
    reason: str
