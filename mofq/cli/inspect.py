"""``mofq inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mofq.cli.checks import check_engine
from mofq.cli.terminal import note, print_json, print_table, short_bytes
from mofq.engines import legality
from mofq.evidence.spaces import Offer, load_search_space, offer_schemes
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.layers import FusionGroup, ModelLayers, find_layers
from mofq.model.sizes import group_bytes, source_bytes, weights_of
from mofq.numbers.schemes import parse_scheme


def run_inspect(
    model: str, *, engine: str | None, space: str | None, include_lm_head: bool, as_json: bool
) -> None:
    """Print layers and fusion groups, and what an engine can serve of a search space."""
    checkpoint = open_checkpoint(model)
    layers = find_layers(checkpoint, include_lm_head=include_lm_head)
    check_engine(engine, layers)
    check = None if engine is None else legality(engine)
    offers = None
    if space is not None or engine is not None:
        loaded = load_search_space(space or "w8a8")
        offers = offer_schemes(loaded, layers.groups, legality=check, has_stats=True)
    if as_json:
        content = _json(checkpoint, layers)
        if offers is not None:
            content["offers"] = {
                o.group.name: {"schemes": [s.name for s in o.schemes], "rejected": o.rejected}
                for o in offers
            }
        print_json(content)
        return
    _print_groups(checkpoint, layers)
    if offers is not None:
        _print_offers(f"search space {space or 'w8a8'}{f' on {engine}' if engine else ''}", offers)


def _json(checkpoint: Checkpoint, layers: ModelLayers) -> dict[str, Any]:
    def one(layer: Any) -> dict[str, Any]:
        return {
            "name": layer.name,
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "dtype": layer.dtype,
            "decoder_layer": layer.decoder_layer,
            "module": layer.module,
        }

    return {
        "model": checkpoint.name,
        "index_sha256": checkpoint.index_sha256,
        "architecture": layers.architecture,
        "linear_layers": sum(len(group.layers) for group in layers.groups),
        "weights": weights_of(layers.groups),
        "tied_lm_head": layers.tied_lm_head,
        "other_bytes": layers.other_bytes,
        "source_format": checkpoint.source_format,
        "source_bytes": sum(map(source_bytes, layers.groups)),
        "groups": [
            {"name": group.name, "layers": [one(layer) for layer in group.layers]}
            for group in layers.groups
        ],
        "unquantized": [one(layer) for layer in layers.unquantized],
    }


def _print_groups(checkpoint: Checkpoint, layers: ModelLayers) -> None:
    kinds: dict[tuple[str, str], list[FusionGroup]] = {}
    for group in layers.groups:
        kinds.setdefault(_kind(group), []).append(group)
    rows = [
        [
            name,
            str(len(groups)),
            shapes,
            f"{weights_of(groups) / 1e6:.2f} M",
            short_bytes(sum(map(source_bytes, groups))),
        ]
        for (name, shapes), groups in kinds.items()
    ]
    alone = Counter((_pattern(layer.name), _shape(layer)) for layer in layers.unquantized)
    rows += [
        [f"{name} (left alone)", str(count), shape, "", ""]
        for (name, shape), count in alone.items()
    ]
    title = f"{checkpoint.name}: {layers.architecture}, {len(layers.groups)} fusion groups"
    print_table(title, ["fusion group", "count", "layers [out, in]", "weights", "size"], rows)
    if layers.tied_lm_head:
        note("The lm_head is tied to the embeddings and left alone.")
    total = layers.other_bytes + sum(map(source_bytes, layers.groups))
    note(f"{short_bytes(total)} in all, {short_bytes(layers.other_bytes)} outside of the groups.")
    if checkpoint.source_format is not None:
        kept = sum(group_bytes(group, parse_scheme("bf16")) for group in layers.groups)
        note(
            f"The source is FP8 ({checkpoint.source_format}); sizes of groups are with its scales. "
            f"Every error is measured against codes times scales. A layer left at bf16 is written "
            f"in bf16: all groups would take {short_bytes(kept)}."
        )


def _print_offers(title: str, offers: Sequence[Offer]) -> None:
    offered = Counter(scheme.name for offer in offers for scheme in offer.schemes)
    rows = [[name, f"{count} of {len(offers)}"] for name, count in offered.items()]
    print_table(title, ["scheme", "fusion groups that may have it"], rows)
    reasons = {name: why for offer in offers for name, why in offer.rejected.items()}
    refused: dict[str, list[str]] = {}
    for name, why in reasons.items():
        refused.setdefault(why, []).append(name)
    if refused:
        counts = Counter(name for offer in offers for name in offer.rejected)
        rows = [
            [", ".join(names), f"{max(counts[name] for name in names)}", why]
            for why, names in refused.items()
        ]
        print_table("refused", ["scheme", "groups", "why, e.g."], rows)


def _kind(group: FusionGroup) -> tuple[str, str]:
    if len(group.layers) > 6:
        first, last = group.layers[0], group.layers[-1]
        shapes = f"{len(group.layers)} layers, {_shape(first)} … {_shape(last)}"
    else:
        shapes = ", ".join(f"{la.module} {_shape(la)}" for la in group.layers)
    return _pattern(group.name), shapes


def _pattern(name: str) -> str:
    """A name with a star for the number of its decoder layer."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _shape(layer: Any) -> str:
    return f"[{layer.out_features}, {layer.in_features}]"
