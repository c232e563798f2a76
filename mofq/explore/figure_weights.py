"""The figure of walls: how large weights and inputs are, layer by layer, channel by channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mofq.evidence.table import Extent, Profile
from mofq.exceptions import MofqError
from mofq.explore.drawing import Drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Decoder layer -> extent.
_Layers = Mapping[int, Extent]


def draw_weights(figure: Figure, drawing: Drawing) -> None:
    """Largest magnitude of every input channel over the layer's median one.

    One panel for each module, a row for each decoder layer: weights on the left; the inputs of
    the first corpus on the right, where there was a calibration.

    Raises:
        MofqError: The table has no profiles.
    """
    table = drawing.table
    if not table.profiles:
        raise MofqError(
            "the table says nothing of the size of weights: it is of an earlier mofq. Measure "
            "one search space, the smallest will do, into a new table."
        )
    layer_of = {group.name: group.layers[0].decoder_layer or 0 for group in table.header.groups}
    modules = list(dict.fromkeys(one.module for one in table.profiles))
    corpus = next((name for one in table.profiles for name in one.inputs), None)
    columns = ["weights"] if corpus is None else ["weights", f"inputs, {corpus}"]
    layers = sorted(set(layer_of.values()))
    height = min(1.2, max(0.5, 0.028 * len(layers)))
    figure.set_size_inches(7.2, len(modules) * (height + 0.28) + 1.0)
    grid = figure.subplots(len(modules), len(columns), squeeze=False)
    for column, title in enumerate(columns):
        panels = [
            _ratios(_of_module(table.profiles, module, layer_of, corpus if column else None))
            for module in modules
        ]
        drawn = _draw_column(list(grid[:, column]), panels, modules, layers)
        bar = figure.colorbar(
            drawn, ax=list(grid[:, column]), location="bottom", aspect=40, pad=0.02, shrink=0.8
        )
        ticks = [n for n in (1, 2, 4, 10, 30, 100, 300, 1000, 10000) if n <= drawn.norm.vmax]
        bar.set_ticks(ticks, labels=[f"{n}×" for n in ticks], minor=False)
        bar.minorticks_off()
        bar.set_label(f"{title}: largest of a channel, over the layer's median", fontsize=7)
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
    figure.suptitle(table.header.model_name, fontsize=9, parse_math=False)


def _of_module(
    profiles: Sequence[Profile], module: str, layer_of: Mapping[str, int], corpus: str | None
) -> _Layers:
    found: dict[int, Extent] = {}
    for one in profiles:
        extent = one.weight if corpus is None else one.inputs.get(corpus)
        if one.module == module and extent is not None:
            found[layer_of[one.group]] = extent
    return found


def _ratios(layers: _Layers) -> dict[int, np.ndarray]:
    ratios = {}
    for layer, extent in layers.items():
        amax = np.array(extent.amax)
        ratios[layer] = amax / (np.median(amax) or 1.0)
    return ratios


def _draw_column(
    column: Sequence[Axes],
    panels: Sequence[Mapping[int, np.ndarray]],
    modules: Sequence[str],
    layers: Sequence[int],
) -> Any:
    from matplotlib.colors import LogNorm

    most = max((ratio.max() for panel in panels for ratio in panel.values()), default=1.0)
    norm = LogNorm(1.0, max(4.0, float(most)))
    drawn = None
    for axes, panel, module in zip(column, panels, modules, strict=True):
        bins = max((len(ratio) for ratio in panel.values()), default=1)
        picture = np.full((len(layers), bins), np.nan)
        for layer, ratio in panel.items():
            if len(ratio) == bins:
                picture[layers.index(layer)] = np.maximum(ratio, 1.0)
        drawn = axes.imshow(
            picture,
            aspect="auto",
            interpolation="nearest",
            norm=norm,
            cmap="magma_r",
            extent=(0, 1, len(layers) - 0.5, -0.5),
        )
        axes.grid(visible=False)
        axes.set_xticks([])
        step = max(1, len(layers) // 3)
        axes.set_yticks(range(0, len(layers), step), [str(n) for n in layers[::step]], fontsize=6)
        axes.set_ylabel("layer", fontsize=6)
        axes.set_title(module, fontsize=7, loc="left", pad=2, parse_math=False)
    column[-1].set_xlabel("input channel", fontsize=7)
    return drawn
