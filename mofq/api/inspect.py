"""What a model is made of, from headers alone, and what an engine serves of a search space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mofq.api.inputs import open_layers
from mofq.api.options import Engine, LayersFile, Model, Option, Vocabulary, documented
from mofq.api.preconditions import check_engine, vocabulary_problems

if TYPE_CHECKING:
    from mofq.evidence.constraints import Selection
    from mofq.evidence.spaces import Offer
    from mofq.model.checkpoint.headers import Checkpoint
    from mofq.model.layers import LinearLayer, ModelLayers

#: The search space whose schemes are looked at where only an engine is named: that of `run`.
DEFAULT_SPACE = "serving"


@dataclass(frozen=True, slots=True)
class InspectResult:
    """A model's layers and fusion groups."""

    model: str  #: as it was given
    checkpoint: Checkpoint
    layers: ModelLayers
    engine: str | None
    space: str | Path
    offers: tuple[Offer, ...] | None  #: what each group may have; None: nothing was asked for
    notes: tuple[str, ...] = ()  #: what is unusual about the model
    #: Of the lm_head and the embedding, what gets no scheme here -> why, and what to do
    left_alone: Mapping[str, str] = field(default_factory=dict)
    selections: tuple[Selection, ...] = ()  #: how many layers each selector of the space names

    def to_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        from mofq.model.sizes import source_bytes, weights_of

        layers, groups = self.layers, self.layers.groups
        content = {
            "model": self.checkpoint.name,
            "index_sha256": self.checkpoint.index_sha256,
            "architecture": layers.architecture,
            "linear_layers": sum(len(group.layers) for group in groups),
            "weights": weights_of(groups),
            "tied_lm_head": layers.tied_lm_head,
            "other_bytes": layers.other_bytes,
            "source_format": self.checkpoint.source_format,
            "source_bytes": sum(map(source_bytes, groups)),
            "groups": [
                {"name": group.name, "layers": list(map(_layer_json, group.layers))}
                for group in groups
            ],
            "unquantized": list(map(_layer_json, layers.unquantized)),
            "left_out": dict(layers.left_out),
            "notes": list(self.notes),
        }
        if self.offers is not None:
            content["offers"] = {
                one.group.name: {
                    "schemes": [scheme.name for scheme in one.schemes],
                    "rejected": one.rejected,
                    "barred": dict(one.barred),
                }
                for one in self.offers
            }
            content["selections"] = [asdict(one) for one in self.selections]
            content["left_alone"] = dict(self.left_alone)
        return content


@documented
def inspect(
    model: Model,
    *,
    engine: Engine = None,
    space: Annotated[
        str | Path | None,
        Option(
            "A search space, e.g. serving: which of its schemes fit, and are served.", read_as=str
        ),
    ] = None,
    layers: LayersFile = None,
    vocabulary: Vocabulary = Vocabulary(),
) -> InspectResult:
    """List linear layers and fusion groups, from headers alone.

    Returns:
        Layers, groups and offers.

    Raises:
        MofqError: The model, the engine or the search space is not valid.
    """
    from mofq.engines import legality
    from mofq.evidence.spaces import (
        load_search_space,
        offer_schemes,
        selected_layers,
        with_stored,
    )
    from mofq.model.checkpoint.headers import open_checkpoint
    from mofq.model.checkpoint_notes import notes_on

    checkpoint = open_checkpoint(str(model))
    loaded = None
    if space is not None or engine is not None:
        loaded = load_search_space(space or DEFAULT_SPACE)
        vocabulary = vocabulary.and_of(loaded)
    found = open_layers(checkpoint, vocabulary, layers)
    check_engine(engine, found)
    offers = None
    selections: tuple[Selection, ...] = ()
    left_alone: Mapping[str, str] = {}
    if loaded is not None:
        loaded = with_stored(loaded, checkpoint, found.groups)
        selections = selected_layers(loaded, found)
        offers = tuple(
            offer_schemes(
                loaded,
                found.groups,
                legality=None if engine is None else legality(engine, found.architecture),
                has_stats=True,
            )
        )
        left_alone = vocabulary_problems(offers, loaded)
    return InspectResult(
        str(model),
        checkpoint,
        found,
        engine,
        space or DEFAULT_SPACE,
        offers,
        notes_on(checkpoint, found),
        left_alone,
        selections,
    )


def _layer_json(layer: LinearLayer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "out_features": layer.out_features,
        "in_features": layer.in_features,
        "dtype": layer.dtype,
        "decoder_layer": layer.decoder_layer,
        "module": layer.module,
    }
