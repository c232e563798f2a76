"""What a rule or a time depends on of a fusion group: names and shapes, and no weights.

`FusionGroup`, of a model's headers, and `TableGroup`, of a table, both are such groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from mofq.model.sizes import Matrix


class ServedLayer(Matrix, Protocol):
    """A linear layer."""

    @property
    def module(self) -> str:
        """Last words of the name, e.g. ``"q_proj"``, ``"experts.down_proj"``."""
        ...

    @property
    def role(self) -> str | None:
        """``"lookup"`` or ``"tied"`` of an embedding; anything else of other layers."""
        ...

    @property
    def weights(self) -> int:
        """Number of weights."""
        ...


class ServedGroup(Protocol):
    """Layers that are multiplied by one kernel."""

    @property
    def name(self) -> str:
        """E.g. ``"layers.0.attn.qkv"``."""
        ...

    @property
    def layers(self) -> Sequence[ServedLayer]:
        """In the order in which an engine concatenates them."""
        ...


def is_experts(group: ServedGroup) -> bool:
    """Whether the layers are the experts of a mixture."""
    return group.layers[0].module.startswith("experts.")


def embedding_role(group: ServedGroup) -> str | None:
    """``"lookup"`` of an embedding, ``"tied"`` of one that is the lm_head too; None of others."""
    role = group.layers[0].role
    return role if role in ("lookup", "tied") else None


def experts_apart(groups: Iterable[ServedGroup]) -> bool:
    """Whether the experts of some decoder layer are in several groups, which no engine serves."""
    counts = Counter(
        group.layers[0].name.partition(".experts.")[0] for group in groups if is_experts(group)
    )
    return any(count > 1 for count in counts.values())
