"""What `mofq inspect` shows: fusion groups, and what an engine serves of a search space."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mofq.api.formatting import short_bytes
from mofq.cli.flags import default_flag
from mofq.cli.show.terminal import next_step, note, print_table

if TYPE_CHECKING:
    from mofq.api import InspectResult
    from mofq.evidence.spaces import Offer
    from mofq.model.checkpoint.headers import Checkpoint
    from mofq.model.layers import FusionGroup, LinearLayer, ModelLayers


def show_inspection(result: InspectResult) -> None:
    """Groups of one kind in one row, then what each scheme is offered to."""
    _print_groups(result.checkpoint, result.layers)
    for line in result.notes:
        note(line)
    if result.offers is not None:
        engine = f" on {result.engine}" if result.engine else ""
        _print_offers(f"search space {result.space}{engine}", result.offers)
        for selection in result.selections:
            note(selection.remark)
    for problem in result.left_alone.values():
        note(problem)
    from mofq.model.layers import vocabulary_names

    names = vocabulary_names(result.layers.groups)
    asked = [default_flag(name) for name in names if name not in result.left_alone]
    next_step("calibrate", result.model, "--corpus", "en=TEXT.txt", *asked, "-o", "stats")


def _print_groups(checkpoint: Checkpoint, layers: ModelLayers) -> None:
    from mofq.model.sizes import group_bytes, source_bytes, weights_of
    from mofq.numbers.schemes import parse_scheme

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
    if layers.tied_lm_head and not any(one.role == "tied" for one in layers.grouped_layers):
        note("The lm_head is tied to the embeddings and left alone.")
    total = layers.other_bytes + sum(map(source_bytes, layers.groups))
    note(f"{short_bytes(total)} in all, {short_bytes(layers.other_bytes)} outside of the groups.")
    if checkpoint.source_format is not None:
        kept = sum(group_bytes(group, parse_scheme("bf16")) for group in layers.groups)
        note(
            f"The source is quantized ({checkpoint.source_format}) and decoded; sizes of groups"
            f" are with its scales. Every error is measured against codes times scales. A layer"
            f" left at bf16 is written in bf16: all groups would take {short_bytes(kept)}."
        )


def _print_offers(title: str, offers: Sequence[Offer]) -> None:
    offered = Counter(scheme.name for offer in offers for scheme in offer.choices)
    rows = [[name, f"{count} of {len(offers)}"] for name, count in offered.items()]
    print_table(title, ["scheme", "fusion groups that may have it"], rows)
    from mofq.evidence.refusals import count_refusals

    refused = count_refusals(
        (offer.group.name, name, why)
        for offer in offers
        for name, why in {**offer.rejected, **offer.barred}.items()
    )
    if refused:
        rows = [[", ".join(one.schemes), str(one.groups), one.reason] for one in refused]
        print_table("refused", ["scheme", "groups", "why"], rows)


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


def _shape(layer: LinearLayer) -> str:
    return f"[{layer.out_features}, {layer.in_features}]"
