"""The matrices [vocabulary, hidden]: the lm_head, the embedding, or one that is both.

They are left as they are unless they are asked for. Then each is a fusion group of its own,
``lm_head`` and ``embeddings``. An embedding that the lm_head is tied to is one matrix with two
roles, a lookup and a product: one group, ``embeddings``, whichever of the two is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypedDict

from mofq.exceptions import CheckpointError
from mofq.model.layers.families import lm_heads_of
from mofq.model.layers.linear import FusionGroup, LinearLayer, Role
from mofq.model.layers.name_patterns import EMBEDDINGS as EMBEDDING_WORDS
from mofq.numbers.schemes import Scheme

LM_HEAD = "lm_head"
EMBEDDINGS = "embeddings"


def vocabulary_groups(
    head: LinearLayer | None,
    find_embedding: Callable[[Role], LinearLayer],
    *,
    is_tied: bool,
    include_lm_head: bool,
    include_embeddings: bool,
    where: str,
) -> Iterator[FusionGroup]:
    """The fusion groups of those matrices that are asked for, the lm_head first.

    Args:
        head: The lm_head that has a weight of its own, if there is one.
        find_embedding: Gives the embedding as a layer of a role; called where it is asked for.
        is_tied: Whether the embedding is the lm_head too.
        include_lm_head: Whether the lm_head is asked for.
        include_embeddings: Whether the embedding is.
        where: The checkpoint, for messages.

    Raises:
        CheckpointError: The lm_head is asked for, and there is none; or `find_embedding` raises.
    """
    if include_lm_head and head is not None:
        yield FusionGroup(LM_HEAD, (head,))
    elif include_lm_head and not is_tied:
        raise CheckpointError(
            f"{where}: the lm_head has no weight of its own to quantize. Leave it out."
        )
    if include_embeddings or (include_lm_head and is_tied):
        yield FusionGroup(EMBEDDINGS, (find_embedding("tied" if is_tied else "lookup"),))


class Included(TypedDict):
    """What `find_layers` is told of these matrices."""

    include_lm_head: bool
    include_embeddings: bool


def included(layer_names: Iterable[str], architecture: str) -> Included:
    """What `find_layers` is told, so that layers of these names are in fusion groups.

    Args:
        layer_names: Of a recipe's or an export's layers that have schemes.
        architecture: ``model_type`` of the config.
    """
    names = set(layer_names)
    return {
        "include_lm_head": not names.isdisjoint(lm_heads_of(architecture)),
        "include_embeddings": any(name.rpartition(".")[2] in EMBEDDING_WORDS for name in names),
    }


def included_groups(names: Iterable[str]) -> Included:
    """The same, from the names of fusion groups."""
    known = set(names)
    return {"include_lm_head": LM_HEAD in known, "include_embeddings": EMBEDDINGS in known}


def vocabulary_names(groups: Iterable[FusionGroup]) -> tuple[str, ...]:
    """Of some fusion groups, the names of those that are matrices of the vocabulary."""
    return tuple(group.name for group in groups if group.name in (LM_HEAD, EMBEDDINGS))


def vocabulary_rejection(scheme: Scheme, layer: LinearLayer) -> str | None:
    """Why a matrix of the vocabulary cannot have a scheme; None where it can, or is another one.

    A row of it is a word: what lookups and logits need is the row's own numbers and scales, and no
    input is rounded.
    """
    if layer.module not in (LM_HEAD, EMBEDDINGS):
        return None
    weight = scheme.weight
    if scheme.activation is not None:
        reason = "has its weights rounded alone; take a scheme without activations"
    elif weight is not None and weight.granularity.kind not in ("channel", "group"):
        reason = "takes scales per channel or group of a row"
    elif weight is not None and scheme.is_fitted and layer.role != "linear":
        reason = "is looked up, and a fit minimises an error of products; take one that is not"
    else:
        return None
    return f"{layer.name}: {reason}"
