"""Tiles of a matrix, and from tiles to codes and back under given scales."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mofq.exceptions import SchemeError
from mofq.numbers.formats import CodebookFormat, IntFormat
from mofq.numbers.quantize.rounding import (
    codebook_values,
    nearest_code,
    nearest_value,
    round_to_format,
    round_to_integer,
)
from mofq.numbers.quantize.scales import Scales, code_range
from mofq.numbers.schemes import Granularity, TensorScheme


def tile_shape(shape: tuple[int, int], granularity: Granularity, *, name: str) -> tuple[int, int]:
    """Rows and columns of a tile, all of them where the granularity says 0.

    Args:
        shape: Of the matrix.
        granularity: Any.
        name: Of the tensor, for the message.

    Returns:
        ``(rows, columns)``, dividing ``shape``.

    Raises:
        SchemeError: The tiles do not cover the matrix exactly.
    """
    sides = []
    labels = ("rows", "columns")
    for size, tile, label in zip(
        shape, (granularity.rows, granularity.columns), labels, strict=True
    ):
        if tile and size % tile:
            raise SchemeError(
                f"{name}: granularity {granularity.name!r} needs a number of {label} divisible by "
                f"{tile}, got {size}. Offer it a smaller group or block in the search space, or "
                f"list the layer under `exclude`."
            )
        sides.append(tile or size)
    return sides[0], sides[1]


def check_shared_scales(shape: tuple[int, int], scheme: TensorScheme, *, name: str) -> None:
    """Refuse a matrix whose columns the exponents that groups share do not cover exactly.

    Raises:
        SchemeError: They do not.
    """
    shared = scheme.scale.shared_columns
    if shared and shape[1] % shared:
        raise SchemeError(
            f"{name}: {scheme.scale.name} scales need columns divisible by {shared}, got "
            f"{shape[1]}. Offer it another scheme in the search space, or list the layer under "
            f"`exclude`."
        )


def row_blocks(
    rows: int, columns: int, *, elements: int, tile_rows: int = 1
) -> Iterator[tuple[int, int]]:
    """Cut the rows of a matrix into blocks of a bounded size, between tiles.

    Args:
        rows: Of the matrix.
        columns: Of the matrix.
        elements: Of a block, at most, unless one row of tiles has more.
        tile_rows: Rows of a tile, which no block cuts; 0 where one scale holds for all rows, so
            that they may be cut anywhere.

    Yields:
        First row, and one past the last.
    """
    unit = tile_rows or 1
    step = max(1, elements // max(1, columns) // unit) * unit
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def to_tiles(x: Tensor, rows: int, columns: int) -> Tensor:
    """View a matrix as tiles: [A*R, G*K] to [A, R, G, K]."""
    return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns)


def from_tiles(x_ARGK: Tensor) -> Tensor:
    """The matrix that tiles came from: [A, R, G, K] to [A*R, G*K]."""
    a, r, g, k = x_ARGK.shape
    return x_ARGK.reshape(a * r, g * k)


def row_scales(scales: Scales | None, tile: int, rows: int) -> Scales | None:
    """What each row is multiplied by within one of the tiles that lie beside each other, [O].

    Args:
        scales: Of all tiles.
        tile: Which.
        rows: Of a tile.
    """
    if scales is None:
        return None
    of_tile = Scales(scales.multiplier, scales.zero_point, None)
    return of_tile.map(lambda value_A1G1: value_A1G1[:, 0, tile].expand(-1, rows).reshape(-1))


def encode_tiles(x_ARGK: Tensor, scheme: TensorScheme, scales: Scales | None) -> Tensor:
    """Codes of all elements.

    Args:
        x_ARGK: Tiles, float32.
        scheme: What to round to.
        scales: One for each tile; None where the scheme is unscaled.

    Returns:
        Of the same shape. Integer formats: the code, as float32. Float formats:
        the value on the element's grid, float32. Codebooks: the index, uint8.
    """
    scaled = x_ARGK if scales is None else x_ARGK / scales.multiplier
    if isinstance(scheme.element, CodebookFormat):
        return nearest_code(scaled, scheme.element)
    if not isinstance(scheme.element, IntFormat):
        return round_to_format(scaled, scheme.element)
    low, high = code_range(scheme)
    if scales is None or scales.zero_point is None:
        return round_to_integer(scaled, low, high)
    middle = (high + 1) // 2
    centred = scaled + (scales.zero_point - middle)
    return round_to_integer(centred, low - middle, high - middle) + middle


def code_values(codes_ARGK: Tensor, scheme: TensorScheme, scales: Scales | None) -> Tensor:
    """What is multiplied by the scale: code minus zero point, or the codebook's value.

    Args:
        codes_ARGK: From ``encode_tiles``, or the same numbers in another dtype.
        scheme: What was rounded to.
        scales: As given to ``encode_tiles``.

    Returns:
        float32 of the same shape, exact.
    """
    if isinstance(scheme.element, CodebookFormat):
        return codebook_values(codes_ARGK, scheme.element)
    values = codes_ARGK.to(torch.float32)
    if scales is not None and scales.zero_point is not None:
        values = values - scales.zero_point
    return values


def round_tiles(x_ARGK: Tensor, scheme: TensorScheme, scales: Scales | None) -> Tensor:
    """What is multiplied by the scale, ``code_values(encode_tiles(…), …)``, without codes.

    Args:
        x_ARGK: Tiles, float32.
        scheme: What to round to.
        scales: One for each tile; None where the scheme is unscaled.

    Returns:
        float32 of the same shape, exact.
    """
    if isinstance(scheme.element, CodebookFormat):
        scaled = x_ARGK if scales is None else x_ARGK / scales.multiplier
        return nearest_value(scaled, scheme.element)
    return code_values(encode_tiles(x_ARGK, scheme, scales), scheme, scales)


def decode_tiles(codes_ARGK: Tensor, scheme: TensorScheme, scales: Scales | None) -> Tensor:
    """Codes back to numbers: ``value * multiplier``, rounded once to float32.

    Args:
        codes_ARGK: From ``encode_tiles``, or the same numbers in another dtype.
        scheme: What was rounded to.
        scales: As given to ``encode_tiles``.

    Returns:
        float32 of the same shape.
    """
    values = code_values(codes_ARGK, scheme, scales)
    return values if scales is None else values * scales.multiplier
