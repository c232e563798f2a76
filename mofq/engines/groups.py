"""What a rule or a time depends on of a fusion group: names and shapes, and no weights.

`FusionGroup`, of a model's headers, and `TableGroup`, of a table, both are such groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from mofq.model.layers import AnyGroup


def is_experts(group: AnyGroup) -> bool:
    """Whether the layers are the experts of a mixture."""
    return group.layers[0].module.startswith("experts.")


def embedding_role(group: AnyGroup) -> str | None:
    """``"lookup"`` of an embedding, ``"tied"`` of one that is the lm_head too; None of others."""
    role = group.layers[0].role
    return role if role in ("lookup", "tied") else None


def experts_apart(groups: Iterable[AnyGroup]) -> bool:
    """Whether the experts of some decoder layer are in several groups, which no engine serves."""
    counts = Counter(
        group.layers[0].name.partition(".experts.")[0] for group in groups if is_experts(group)
    )
    return any(count > 1 for count in counts.values())
