"""What a recipe says of a rewriting: its model is another one, rotated or with scales moved.

`mofq.delivery.rewriting` makes that model again from the original and its statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from mofq.files.validated import Count, Integer, Name, NotNegative, Sha256, Text, only_these_keys

#: The method of `mofq rewrite` that `RotatedModel` describes.
ROTATE = "rotate"


@only_these_keys
@dataclass(frozen=True, slots=True)
class SiteRewriting:
    """How far scales moved at the input of one fusion group."""

    method: Name  #: of `mofq rewrite`
    alpha: NotNegative  #: exponent of the input's range
    beta: NotNegative  #: exponent of the weights' range


@only_these_keys
@dataclass(frozen=True, slots=True)
class RotatedModel:
    """How a model was rotated, before scales moved in it."""

    seed: Annotated[Integer, Field(ge=0, le=2**63 - 1)]  #: of random signs
    hidden: Count  #: channels of the residual stream
    head: Count  #: channels of a head's values


@only_these_keys
@dataclass(frozen=True, slots=True)
class Rewriting:
    """From which model, by which statistics, and what was rotated and moved."""

    model: Name  #: the original
    index_sha256: Sha256
    weights_sha256: Sha256
    #: Of the original, from which scales follow; none where none moved.
    stats_sha256: Sha256 | None = None
    sites: Annotated[
        Mapping[Text, SiteRewriting],
        Field(description="fusion group -> what moved at its input; none at the others"),
    ] = field(default_factory=dict)
    rotation: Annotated[
        RotatedModel | None, Field(description="how the model was rotated before; none: it was not")
    ] = None
    inputs: Annotated[
        Literal["all", "kept"],
        Field(
            description="what codes are fitted to where scales moved: the inputs of all sequences, "
            "or of those whose samples are kept, as in recipes of versions before"
        ),
    ] = "kept"
