"""What a recipe says of a rewriting: the model that it is for is another one with scales moved.

`mofq.delivery.rewriting` makes that model again from the original and its statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from mofq.files.validated import Name, NotNegative, Sha256, Text, only_these_keys


@only_these_keys
@dataclass(frozen=True, slots=True)
class SiteRewriting:
    """How far scales moved at the input of one fusion group."""

    method: Name  #: of `mofq rewrite`
    alpha: NotNegative  #: exponent of the input's range
    beta: NotNegative  #: exponent of the weights' range


@only_these_keys
@dataclass(frozen=True, slots=True)
class Rewriting:
    """From which model, by which statistics, and what was moved."""

    model: Name  #: the original
    index_sha256: Sha256
    weights_sha256: Sha256
    stats_sha256: Sha256  #: of the original, from which scales follow
    sites: Annotated[
        Mapping[Text, SiteRewriting],
        Field(description="fusion group -> what moved at its input; none at the others"),
    ] = field(default_factory=dict)
