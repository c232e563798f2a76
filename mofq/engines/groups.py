"""What a rule or a time depends on of a fusion group: names and shapes, and no weights.

`FusionGroup`, of a model's headers, and `TableGroup`, of a table, both are such groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from mofq.model.layers import FUSION_RULES, AnyGroup

#: What the names of layers begin with that are stored as [in_features, out_features].
_TRANSPOSED = tuple(
    f"{family.body}{family.decoder}." for family in FUSION_RULES.values() if family.transposed
)


def is_experts(group: AnyGroup) -> bool:
    """Whether the layers are the experts of a mixture."""
    return group.layers[0].module.startswith("experts.")


def embedding_role(group: AnyGroup) -> str | None:
    """``"lookup"`` of an embedding, ``"tied"`` of one that is the lm_head too; None of others."""
    role = group.layers[0].role
    return role if role in ("lookup", "tied") else None


def transposed_layer(group: AnyGroup) -> str | None:
    """The first layer of a group whose weights are stored as [in, out] (a Conv1D), or None."""
    first = group.layers[0]
    if getattr(first, "expert", None) is not None:
        return None  # experts in one tensor are written one by one, as they are multiplied
    # A table does not say it: there the names of GPT-2 do.
    by_name = first.name.startswith(_TRANSPOSED) and first.name.rpartition(".")[2].startswith("c_")
    return first.name if getattr(first, "transposed", by_name) else None


def experts_apart(groups: Iterable[AnyGroup]) -> bool:
    """Whether the experts of some decoder layer are in several groups, which no engine serves."""
    counts = Counter(
        group.layers[0].name.partition(".experts.")[0] for group in groups if is_experts(group)
    )
    return any(count > 1 for count in counts.values())
