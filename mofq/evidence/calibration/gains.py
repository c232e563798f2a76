"""How strongly a layer answers in one sequence: three numbers, kept of all sequences that are run.

Inputs and gradients of a sequence are large, so they are kept of a few sequences. What those
say depends on which text and which random draws they happened to be. Three numbers for each layer
follow both closely and take no space, and are kept of every sequence that is run:

``weight``
    ``|| sum_t g_t x_t^T ||^2``: what noise of one size in every weight would cost.
``input``
    ``sum_t |W^T g_t|^2 max|x_t|^2``: what noise in proportion to each token's largest
    magnitude would cost in the inputs.
``scaling``
    ``sum_t g_t . W x_t``, signed: what a change of the size of all its weights would do. Rounding
    to few bits makes weights smaller, all rows and layers at once.

`mofq.evidence.measure.gain_correction` corrects the few by the many. One file for each sequence,
``gains-00000.json``: for each layer a list over draws; a layer without a token has zeros.

Source: double sampling with a ratio estimate, W. G. Cochran, "Sampling Techniques", 3rd ed.,
1977, chapter 12.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NoReturn

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from mofq.evidence.calibration.capture import Captured
from mofq.evidence.calibration.sequence_file import (
    check_gradients,
    layer_gradients,
    sequence_written,
    stack_gradients,
)
from mofq.exceptions import StatsError
from mofq.files.documents import load_json
from mofq.files.validated import NotNegative, Number, Text, only_these_keys, validate

_Numbers = Annotated[tuple[NotNegative, ...], Field(min_length=1)]
#: Three numbers for each of 100,000 layers and 32 draws.
_MAX_BYTES = 256_000_000


@only_these_keys
@dataclass(frozen=True, slots=True)
class Gains:
    """Of one layer in one sequence, a number for each draw."""

    weight: _Numbers
    input: _Numbers
    scaling: tuple[Number, ...] = ()  #: none in statistics of before it was kept


_GAINS = TypeAdapter(dict[Text, Gains])


def gains_path(folder: Path, corpus: str, index: int) -> Path:
    """Where a sequence's gains are kept."""
    return folder / corpus / f"gains-{index:05d}.json"


def write_gains(path: Path, captured: Captured, layer_names: Sequence[str]) -> None:
    """Compute a sequence's gains and write them beside their final name, then rename.

    Args:
        path: Final name.
        captured: After the last backward pass, with the gains of inputs.
        layer_names: All layers.

    Raises:
        StatsError: A gradient is missing or not finite, or the file cannot be written.
    """
    draws = len(next(iter(captured.input_gains.values())))
    write_content(path, gains_of(captured, layer_names, path, draws=draws))


def gains_of(
    captured: Captured, layer_names: Sequence[str], path: Path, *, draws: int
) -> dict[str, dict[str, Sequence[float]]]:
    """The gains of some layers, as they stand in the file.

    Args:
        captured: After the last backward pass.
        layer_names: Of any layers.
        path: Of the file, for messages.
        draws: How many numbers each list has.

    Raises:
        StatsError: A gradient is missing or not finite.
    """
    weight, zeros = _weight_gains(captured, layer_names, path), [0.0] * draws
    found = {
        name: {
            "weight": weight.get(name, []),
            "input": captured.input_gains.get(captured.source.get(name, ""), []),
            "scaling": _scaling(captured, name, path),
        }
        for name in layer_names
    }
    flat = [one for gains in found.values() for values in gains.values() for one in values]
    numbers = iter(numbers_of(flat))
    taken: dict[str, dict[str, Sequence[float]]] = {
        name: {kind: [next(numbers) for _ in values] or zeros for kind, values in gains.items()}
        for name, gains in found.items()
    }
    for name, gains in taken.items():
        if not all(math.isfinite(one) for numbers in gains.values() for one in numbers):
            _refuse(captured, name, path)
    return taken


def _refuse(captured: Captured, name: str, path: Path) -> NoReturn:
    """Say why the gains of a layer are not finite."""
    looked_up = captured.looked_up.get(name)
    for grads in (captured.grads.get(name), looked_up and looked_up.grads):
        if grads:
            check_gradients({name: stack_gradients(grads, name, path)}, path)
    raise StatsError(
        f"{name}: its gradients are finite in {path.name}, and sums of their products with its "
        f"inputs are not. Look for broken weights in this layer and those before it."
    )


def numbers_of(values: Sequence[Tensor]) -> list[float]:
    """What some sums are, float64, in their order; each device that has any is waited for once."""
    places: dict[torch.device, list[int]] = {}
    for place, one in enumerate(values):
        places.setdefault(one.device, []).append(place)
    numbers = [0.0] * len(values)
    for here in places.values():
        found: list[float] = torch.stack([values[place] for place in here]).tolist()
        for place, number in zip(here, found, strict=True):
            numbers[place] = number
    return numbers


def write_content(path: Path, content: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Write the gains of all layers beside their final name, then rename.

    Raises:
        StatsError: The file cannot be written.
    """
    with sequence_written(path) as temporary:
        temporary.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def _scaling(captured: Captured, name: str, path: Path) -> list[Tensor]:
    """Of a layer; none of cached keys and values, which no layer puts out, and unseen experts."""
    looked_up = captured.looked_up.get(name)
    of_rows = [] if looked_up is None else looked_up.scaling
    if name not in captured.y:
        return of_rows
    y_TO = captured.y[name].to(captured.device).float()
    grad_DTO = layer_gradients(captured, name, path).to(captured.device)
    found = [(grad_TO.float() * y_TO).sum(dtype=torch.float64) for grad_TO in grad_DTO]
    return [one + of_row for one, of_row in zip(found, of_rows, strict=True)] if of_rows else found


def _weight_gains(
    captured: Captured, layer_names: Sequence[str], path: Path
) -> dict[str, list[Tensor]]:
    """Through the tokens' own products: ``sum_st (g_s . g_t) (x_s . x_t)``, float64."""
    found: dict[str, list[Tensor]] = {}
    gram_of = ("", torch.empty(0))
    for name in layer_names:
        source = captured.source.get(name)
        if source is None:
            continue
        if name in captured.looked_up:
            found[name] = _lookup_gains(captured, name, path)
            continue
        if gram_of[0] != source:
            gram_of = source, _gram(captured.x[source].to(captured.device).float())
        grad_DTO = layer_gradients(captured, name, path).to(captured.device)
        found[name] = [
            (gram_of[1] * _gram(grad_TO.float())).sum(dtype=torch.float64).clamp(min=0)
            for grad_TO in grad_DTO
        ]
    return found


def _lookup_gains(captured: Captured, name: str, path: Path) -> list[Tensor]:
    """Of an embedding: a lookup is a product with ``onehot(row)``, and its gradient with a row.

    So ``G = sum_t g_t x_t^T + sum_t onehot(row_t) e_t^T``, without the first where nothing is
    multiplied by it.
    """
    device, looked_up = captured.device, captured.looked_up[name]
    row_T = looked_up.row_T.to(device)
    e_DTI = stack_gradients(looked_up.grads, name, path).to(device)
    found = [_lookup_gain(row_T, e_TI) for e_TI in e_DTI]
    if name in captured.x:
        x_TI = captured.x[name].to(device).float()
        gram_TT = _gram(x_TI)
        for draw, grad_TO in enumerate(layer_gradients(captured, name, path).to(device)):
            g_TO, e_TI = grad_TO.float(), e_DTI[draw].float()
            found[draw] += (gram_TT * _gram(g_TO)).sum(dtype=torch.float64)
            cross_TT = g_TO[:, row_T] * (x_TI @ e_TI.T)
            found[draw] += 2 * cross_TT.sum(dtype=torch.float64)
    return [one.clamp(min=0) for one in found]


def lookup_gain(captured: Captured, embedding: str, grad_TI: Tensor) -> Tensor:
    """``|| sum_t onehot(row_t) e_t^T ||^2`` of any gradient of an embedding's rows, float64."""
    row_T = captured.looked_up[embedding].row_T.to(captured.device)
    return _lookup_gain(row_T, grad_TI.to(captured.device)).clamp(min=0)


def _lookup_gain(row_T: Tensor, grad_TI: Tensor) -> Tensor:
    same_TT = (row_T[:, None] == row_T).float()
    return (same_TT * _gram(grad_TI.float())).sum(dtype=torch.float64)


def weight_gain(captured: Captured, layer: str, grad_TO: Tensor) -> Tensor:
    """``|| sum_t g_t x_t^T ||^2`` of any gradient of a layer's output, float64."""
    x_TI = captured.x[captured.source[layer]].to(captured.device).float()
    gram_TT = _gram(x_TI) * _gram(grad_TO.to(captured.device).float())
    return gram_TT.sum(dtype=torch.float64).clamp(min=0)


def _gram(value_TI: Tensor) -> Tensor:
    return value_TI @ value_TI.T


def read_gains(path: Path) -> dict[str, Gains]:
    """Read a sequence's gains.

    Raises:
        StatsError: The file is missing, damaged, or holds a number that is not finite.
    """
    content = load_json(path, StatsError, _MAX_BYTES)
    return validate(_GAINS, content, str(path), StatsError)
