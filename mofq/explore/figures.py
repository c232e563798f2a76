"""Figures for papers and READMEs, by matplotlib (the extra ``mofq[plot]``)."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mofq.decision import KL_UNIT, Problem
from mofq.decision.frontier import axis_value
from mofq.decision.problem import FloatArray
from mofq.exceptions import MofqError, how_to_install, option
from mofq.explore.drawing import Drawing
from mofq.explore.figure_weights import draw_weights
from mofq.explore.frontier_recipes import FrontierRecipe, frontier_recipes
from mofq.explore.page_data import element_name, map_places, scheme_order
from mofq.explore.reference_points import (
    ReferencePoint,
    greedy_points,
    measured_uniform,
    uniform_points,
)
from mofq.files.documents import write_beside_and_rename

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

#: Points of a drawn frontier: more cannot be told apart.
_POINTS = 60
#: Schemes that a figure of lines can tell apart.
_LINES = 12
_LONG_NAME = 32
#: Where a name may stand beside its point, the best first: offset [points] and alignments.
_SIDES = (
    ((5, 0), "left", "center"),
    ((-5, 0), "right", "center"),
    ((0, 5), "center", "bottom"),
    ((0, -5), "center", "top"),
    ((4, 4), "left", "bottom"),
    ((4, -4), "left", "top"),
    ((-4, 4), "right", "bottom"),
    ((-4, -4), "right", "top"),
)
#: Label, place on the axis, value, colour.
_Name = tuple[str, float, float, str]
_FORMATS = (".png", ".svg", ".pdf")
_STYLE: Any = {  # names that only matplotlib knows
    "font.size": 9,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e8e8e6",
}


def draw_figure(kind: str, drawing: Drawing, *, path: Path) -> None:
    """Draw one figure; the same inputs give the same bytes.

    Args:
        kind: A key of `FIGURES`.
        drawing: From `read_drawing`.
        path: Ends in ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        MofqError: There is no such format, matplotlib is missing, or the kind
            needs a recipe or a validation that is not given.
    """
    if path.suffix not in _FORMATS:
        raise MofqError(f"{path}: must end in one of {', '.join(_FORMATS)}.")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as problem:
        raise MofqError(
            f"figures need matplotlib, which is not installed. {how_to_install('plot')}"
        ) from problem
    # A seed of our own for the names in an SVG: the same figure, the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "mofq", **_STYLE}):
        figure = Figure(figsize=(7.2, 4.2), dpi=160, layout="constrained")
        FIGURES[kind](figure, drawing)
        metadata = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}[path.suffix]
        image = BytesIO()
        figure.savefig(image, format=path.suffix[1:], metadata=metadata)
    write_beside_and_rename(path, image.getvalue())


def _frontier(figure: Figure, drawing: Drawing) -> None:
    """Error against size: the frontier, uniform schemes, greedy and other recipes, measurements."""
    axes = figure.subplots()
    problem = drawing.problem
    points = frontier_recipes(drawing, most=_POINTS)
    at_K = np.array([_place(problem, axis_value(problem, one.choice_F)) for one in points])
    value_K = _results(points, "kl_nats_per_token" if problem.unit == KL_UNIT else "error")
    axes.plot(at_K, value_K, color="#0b62d6", label="frontier, predicted, 95 %")
    if problem.unit == KL_UNIT:
        stderr_K = _results(points, "kl_stderr")
        low_K, high_K = value_K - 2 * stderr_K, value_K + 2 * stderr_K
        axes.fill_between(at_K, low_K, high_K, color="#0b62d6", alpha=0.18, lw=0)
    uniforms = [
        one
        for one in uniform_points(drawing.table, problem, drawing.request)
        if one.label != "bf16"
    ]
    greedy = greedy_points(problem, uniforms, drawing.other_budgets)
    names = _measurements(axes, drawing, uniforms)
    names += _mark(
        axes, problem, drawing.recipes, style=("^", "#b3420a"), label="recipe, predicted"
    )
    plain = _mark(
        axes, problem, uniforms, style=("D", "#1c1c1e"), label="one scheme for every layer"
    )
    # Drawn over the uniform ones, and named before them.
    names += _mark(axes, problem, greedy, style=("s", "#7a3fb8"), label="greedy, predicted") + plain
    axes.set_yscale("log")
    if uniforms:
        most = max(_place(problem, one.at or 0.0) for one in uniforms)
        margin = 0.02 * (most - min(at_K)) if problem.kv_tokens else 0.15
        _limit(axes, at_K, value_K, most, margin)
    _write_decimals(axes.yaxis)
    axes.set(xlabel=_axis(problem), ylabel=_quantity(problem))
    axes.set_title(drawing.table.header.model_name, parse_math=False)
    axes.legend(frameon=False)
    _write_names(figure, axes, names)


def _write_decimals(axis: Axis) -> None:
    """Plain decimals beside a logarithmic axis of errors, whose limits are set."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    least, most = axis.get_view_interval()
    steps = (1.0, 2.0, 5.0) if most < least * 300 else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(
        FuncFormatter(
            lambda value, _: np.format_float_positional(
                value, precision=3, fractional=False, trim="-"
            )
        )
    )
    axis.set_minor_formatter(NullFormatter())


def _quantity(problem: Problem) -> str:
    """Of the errors, with their unit."""
    return "KL [nats per token]" if problem.unit == KL_UNIT else problem.unit.replace("_", " ")


def _axis(problem: Problem) -> str:
    """Of the frontier, with its unit."""
    if problem.kv_tokens:
        return f"checkpoint and KV cache of {problem.kv_tokens:,} tokens [MB]"
    return "true bits per weight"


def _place(problem: Problem, at: float) -> float:
    """A place on the axis in its unit."""
    return at / 1e6 if problem.kv_tokens else at


def _limit(axes: Axes, at_K: FloatArray, value_K: FloatArray, most: float, margin: float) -> None:
    """As far as something is to be compared."""
    least = min(at_K)
    axes.set_xlim(least - margin, min(most + max(0.5, (most - least) / 4), max(at_K)))
    visible = value_K[(at_K <= axes.get_xlim()[1]) & (value_K > 0)]
    axes.set_ylim(bottom=0.7 * min(visible))


def _results(points: Sequence[FrontierRecipe], key: str) -> np.ndarray:
    values = [getattr(point.recipe.result, key) for point in points]
    return np.array([0.0 if value is None else value for value in values], dtype=np.float64)


def _measurements(axes: Axes, drawing: Drawing, uniforms: Sequence[ReferencePoint]) -> list[_Name]:
    problem = drawing.problem
    drawn = [(_place(problem, one.at), one) for one in drawing.measured if one.at is not None]
    for number, (at, one) in enumerate(drawn):
        axes.errorbar(
            at,
            one.kl_nats_per_token,
            2 * (one.kl_stderr or 0.0),
            fmt="o",
            ms=4,
            color="#0a7a4b",
            label="_" if number else "measured",
        )
    # What is drawn with its recipe, or as a uniform scheme, is named at its prediction.
    return [
        (one.label, at, one.kl_nats_per_token, "#0a7a4b")
        for at, one in drawn
        if one.recipe is None and measured_uniform(one, uniforms) is None
    ]


def _mark(
    axes: Axes,
    problem: Problem,
    points: Sequence[ReferencePoint],
    *,
    style: tuple[str, str],
    label: str,
) -> list[_Name]:
    marker, colour = style
    names = [
        (one.label, _place(problem, one.at), one.value, colour)
        for one in points
        if one.value is not None and one.at is not None
    ]
    if names:
        _, at, values, _ = zip(*names, strict=True)
        axes.plot(at, values, marker, color=colour, ms=4, label=label)
    return names


def _write_names(figure: Figure, axes: Axes, names: Sequence[_Name]) -> None:
    """Names beside their points, inside the axes; what would cover another is left out.

    Names of one colour at one place stand together. Everything else must be drawn already.
    """
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # where the axes are, is known from then on
    frame = axes.get_window_extent()
    per_point = figure.dpi / 72
    together: dict[tuple[int, int, str], list[_Name]] = {}
    taken = []
    for one in names:
        _, at, value, colour = one
        x, y = axes.transData.transform((at, value))
        together.setdefault((round(x), round(y), colour), []).append(one)
        side = 6 * per_point  # of the point's marker
        taken.append(Bbox.from_bounds(x - side / 2, y - side / 2, side, side))
    legend = axes.get_legend()
    if legend is not None:
        taken.append(legend.get_window_extent())
    for some in together.values():
        _, at, value, colour = some[0]
        name = axes.annotate(
            ", ".join(label for label, *_ in some),
            (at, value),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=6,
            color=colour,
            parse_math=False,
            path_effects=[withStroke(linewidth=1.5, foreground="white")],
        )
        for offset, across, up in _SIDES:
            name.set(position=offset, horizontalalignment=across, verticalalignment=up)
            box = name.get_window_extent()
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
            inside = inside and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
        else:
            name.remove()


def _map(figure: Figure, drawing: Drawing) -> None:
    """Decoder layer by module, one panel for each recipe, coloured by scheme."""
    if not drawing.recipes:
        raise MofqError("a map shows recipes; name one after the table.")
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    places = [(layer or 0, module) for layer, module in _places(drawing)]
    modules = list(dict.fromkeys(module for _, module in places))
    layers = sorted({layer for layer, _ in places})
    order = scheme_order(drawing.problem, drawing.recipes)
    colours = _colours(order)
    figure.set_size_inches(7.2, (0.32 * len(modules) + 0.6) * len(drawing.recipes) + 0.7)
    rows = figure.subplots(len(drawing.recipes), squeeze=False)
    for axes, recipe in zip(rows[:, 0], drawing.recipes, strict=True):
        picture = np.full((len(modules), len(layers)), np.nan)
        for (layer, module), scheme in zip(places, recipe.schemes, strict=False):
            picture[modules.index(module), layers.index(layer)] = order.index(scheme)
        axes.pcolormesh(
            picture,
            cmap=ListedColormap(colours),
            vmin=-0.5,
            vmax=len(order) - 0.5,
            edgecolors="white",
            linewidth=0.6,
        )
        axes.grid(visible=False)
        axes.invert_yaxis()
        axes.set_yticks(np.arange(len(modules)) + 0.5, modules)
        step = max(1, len(layers) // 15)
        axes.set_xticks(np.arange(0, len(layers), step) + 0.5, [str(n) for n in layers[::step]])
        bits = "" if recipe.bits_per_weight is None else f", {recipe.bits_per_weight:.3f} bits"
        axes.set_title(f"{recipe.label}{bits}", fontsize=9, loc="left", parse_math=False)
    rows[-1, 0].set_xlabel("decoder layer")
    used = [name for name in order if any(name in recipe.schemes for recipe in drawing.recipes)]
    patches = [Patch(color=colours[order.index(name)], label=name) for name in used]
    columns = 4 if max(map(len, used)) <= _LONG_NAME else 2
    figure.legend(
        handles=patches, loc="outside lower center", ncols=columns, frameon=False, fontsize=7
    )


def _places(drawing: Drawing) -> list[tuple[int | None, str]]:
    """The groups of the map; caches, which come last, where a recipe quantizes any."""
    places = map_places(drawing.table, drawing.problem)
    layers = len(drawing.table.header.groups)
    quantized = any(set(recipe.schemes[layers:]) - {"bf16"} for recipe in drawing.recipes)
    return places if quantized else places[:layers]


def _colours(schemes: Sequence[str]) -> list[tuple[float, float, float]]:
    """A hue for each element format, a lightness for each of its schemes."""
    elements = list(dict.fromkeys(element_name(name) for name in schemes if name != "bf16"))
    hues = (0.6, 0.07, 0.38, 0.86, 0.15, 0.5, 0.74, 0.0)
    colours = []
    for name in schemes:
        if name == "bf16":
            colours.append((0.25, 0.25, 0.25))
            continue
        members = [one for one in schemes if element_name(one) == element_name(name)]
        place = (members.index(name) + 0.5) / len(members)
        hue = hues[elements.index(element_name(name)) % len(hues)]
        colours.append(colorsys.hls_to_rgb(hue, 0.8 - 0.5 * place, 0.75))
    return colours


def _sensitivity(figure: Figure, drawing: Drawing) -> None:
    """The error that each scheme makes in each decoder layer, summed over its fusion groups.

    Of many schemes the best of each element format stands for the others.
    """
    axes = figure.subplots()
    problem = drawing.problem
    places = [layer or 0 for layer, _ in map_places(drawing.table, problem)]
    layers = sorted(set(places))
    order = [name for name in scheme_order(problem, ()) if name != "bf16"]
    cost_P = problem.cost_PK.max(axis=1)
    if len(order) > _LINES:
        order = _best_of_each_element(problem, cost_P, order)
    for name, colour in zip(order, _colours(order), strict=True):
        total: dict[int, float] = {}
        for p, scheme in enumerate(problem.schemes):
            if scheme == name:
                layer = places[int(problem.group_P[p])]
                total[layer] = total.get(layer, 0.0) + float(cost_P[p])
        drawn = [layer for layer in layers if total.get(layer, 0.0) > 0]
        axes.plot(drawn, [total[n] for n in drawn], "-o", ms=2.5, lw=1.2, color=colour, label=name)
    axes.set_yscale("log")
    _write_decimals(axes.yaxis)
    axes.set(xlabel="decoder layer", ylabel=_quantity(drawing.problem))
    axes.set_title(drawing.table.header.model_name, parse_math=False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=7)


def _best_of_each_element(problem: Problem, cost_P: FloatArray, names: list[str]) -> list[str]:
    mean = {
        name: np.mean([cost_P[p] for p, one in enumerate(problem.schemes) if one == name])
        for name in names
    }
    by_element: dict[str, list[str]] = {}
    for name in names:
        by_element.setdefault(element_name(name), []).append(name)
    return [min(some, key=lambda name: float(mean[name])) for some in by_element.values()]


def undrawn_predictions(drawing: Drawing) -> list[str]:
    """Of the measurements that a figure of predictions leaves out: how many, which, and why."""
    without, at_zero = [], []
    for one in drawing.measured:
        if one.predicted is None:
            without.append(one.label)
        elif min(one.predicted, one.kl_nats_per_token) <= 0:
            at_zero.append(one.label)
    reasons = {
        "no prediction is known, as of edited and tuned recipes and those without a table in "
        "nats": without,
        "a KL of 0, predicted or measured, has no place on a logarithmic axis": at_zero,
    }
    total = len(drawing.measured)
    return [
        f"{len(labels)} of {total} validations not drawn ({', '.join(labels)}): {reason}."
        for reason, labels in reasons.items()
        if labels
    ]


def _prediction(figure: Figure, drawing: Drawing) -> None:
    """Measured against predicted."""
    known = [
        (one, one.predicted)
        for one in drawing.measured
        if one.predicted is not None and min(one.predicted, one.kl_nats_per_token) > 0
    ]
    if not known:
        needed = f"a figure of predictions needs {option('validations')} of recipes that have one."
        raise MofqError(" ".join([needed, *undrawn_predictions(drawing)]))
    figure.set_size_inches(4.6, 4.4)
    axes = figure.subplots()
    for one, predicted in known:
        axes.errorbar(
            predicted,
            one.kl_nats_per_token,
            2 * (one.kl_stderr or 0.0),
            xerr=2 * (one.predicted_stderr or 0.0),
            fmt="o",
            ms=4,
            color="#0b62d6",
        )
    values = [value for one, predicted in known for value in (predicted, one.kl_nats_per_token)]
    ends = [min(values) / 1.5, max(values) * 1.5]
    axes.plot(ends, ends, "--", lw=1, color="#66666b")
    axes.set(xscale="log", yscale="log", xlabel="predicted KL [nats per token]")
    axes.set_ylabel("measured KL [nats per token]")
    for axis in (axes.xaxis, axes.yaxis):
        _write_decimals(axis)
    axes.set_title(drawing.table.header.model_name, parse_math=False)
    _write_names(
        figure,
        axes,
        [(p.label, predicted, p.kl_nats_per_token, "#1c1c1e") for p, predicted in known],
    )


FIGURES = {
    "frontier": _frontier,
    "map": _map,
    "sensitivity": _sensitivity,
    "prediction": _prediction,
    "weights": draw_weights,
}
