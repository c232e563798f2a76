"""Rounds column by column, each column compensating the errors of those before it: ``~gptq``.

A row ``w`` that is rounded to ``q`` changes the layer's outputs by ``(w - q) H (w - q)^T``,
with a Hessian ``H = sum_t c_t x_t x_t^T`` over the inputs of calibration (``c_t``, what a token
counts: ``mofq.evidence.fits``). Let ``H = N D N^T``, ``N`` upper triangular with ones on its
diagonal, ``D`` diagonal. Columns are rounded from the first
to the last, each after it has taken over the errors of those before it:

    a_j = w_j + sum_{k<j} (w_k - q_k) N_kj        q_j = round(a_j)

so that the change is ``sum_j D_j (a_j - q_j)^2``, and no column can compensate more than that.
This is GPTQ, with one factorisation and no inverse. 10 % of the mean of its diagonal is added
to that of ``H`` (GPTQ: 1 %); columns stay in their order ("act-order" is not used).

A scale is found when the first column of its tile is reached, from the tile as the errors
have left it, by the scheme's own rule: groups lie in the checkpoint like any others, and every
grid, granularity and rule can be had. The rule ``nats`` weighs the error of column j by
``D_j``, which is what it costs here.

The numbers do not depend on how many rows, threads or devices work on them. Feedback within a
batch of columns is elementwise; what a batch sends to later columns is a sum of at most 128
products of integers below 2**22 in float64, which is exact in any order; ``N`` is kept to 22
bits. The factorisation is LAPACK's, in float64: of a whole matrix on one thread, or, where it is
wide, of tiles of a fixed size, each on one thread, in an order that no number of threads changes.

How tokens and damping were chosen is measured in docs/rounding-and-rewrites.md.

Source: GPTQ, arXiv:2210.17323, and its repository's ``gptq.py`` (damping, lazy batches); the
form without an inverse is LDLQ of QuIP, arXiv:2307.13304.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mofq.exceptions import SchemeError
from mofq.numbers.quantize.descent import descend
from mofq.numbers.quantize.exact_sums import SUMMED, as_float32, send, to_22_bits
from mofq.numbers.quantize.scale_rules import tile_scales
from mofq.numbers.quantize.scales import Scales, join_scales
from mofq.numbers.quantize.tiles import decode_tiles, encode_tiles, row_scales, to_tiles
from mofq.numbers.schemes import TensorScheme

#: Share of the mean of the Hessian's diagonal that is added to it.
DAMPING = 0.1
#: Fewest columns whose errors are sent on together where groups are smaller.
_SMALL_BATCH = 64
#: Inputs from which on a Hessian is factorised in tiles, and rows and columns of a tile.
_WIDE, _TILE = 4096 + 1, 1024


@dataclass(frozen=True, slots=True)
class Feedback:
    """A factorised Hessian."""

    passed_II: Tensor  #: N: how much of a row's error each column takes over, float32
    cost_I: Tensor  #: D relative to its largest, float32
    hessian_II: Tensor | None = None  #: H itself, damped, float32; kept for ``~descent`` alone

    def to(self, device: str | torch.device) -> Feedback:
        """The same on a device."""
        hessian_II = None if self.hessian_II is None else self.hessian_II.to(device)
        return Feedback(self.passed_II.to(device), self.cost_I.to(device), hessian_II)


def factorise_hessian(hessian_II: Tensor, *, name: str = "weight", keep: bool = False) -> Feedback:
    """Factorise a Hessian for rounding with feedback.

    Args:
        hessian_II: ``sum c x x^T``, [in_features, in_features], float64; its scale
            does not matter. All zeros (an expert that no token reached) give
            rounding to nearest.
        name: Of the layer, for messages.
        keep: The Hessian itself too, which ``~descent`` needs.

    Returns:
        The factors, on the CPU.

    Raises:
        SchemeError: The matrix is not finite, or not positive definite even when damped.
    """
    whole_II = hessian_II.detach().to("cpu", torch.float64)
    return factorise_flipped(whole_II.flip(0, 1), name=name, keep=keep)


#: Does all of some work, side by side or not.
RunAll = Callable[[Iterable[Callable[[], None]]], None]


def run_in_turn(work: Iterable[Callable[[], None]]) -> None:
    """Run all of some work, one after the other."""
    for one in work:
        one()


def fit_bytes(columns: int) -> int:
    """Memory that a layer's Hessian takes while it is factorised, the results included."""
    return columns**2 * (8 + 4 + 4 if columns >= _WIDE else 8 + 8 + 4 + 4)


def factorise_flipped(
    flipped_II: Tensor,
    *,
    name: str = "weight",
    run_all: RunAll = run_in_turn,
    keep: bool = False,
) -> Feedback:
    """As `factorise_hessian`, of a Hessian whose columns and rows come from the last to the first.

    Of a wide one the factor takes the place; of another it is held beside it. The result takes
    half of its memory.

    Args:
        flipped_II: [in_features, in_features], float64, on the CPU. Only its lower triangle is
            read; it is changed.
        name: Of the layer, for messages.
        run_all: Runs the work on the tiles of a wide one, on any number of threads.
        keep: As for `factorise_hessian`.

    Raises:
        SchemeError: As `factorise_hessian`.
    """
    damping = DAMPING * float(flipped_II.diagonal().flip(0).mean())
    flipped_II.diagonal().add_(damping if damping > 0 else 1.0)
    hessian_II = _unflipped(flipped_II) if keep else None
    with one_thread():
        if len(flipped_II) < _WIDE:
            lower_II, info = torch.linalg.cholesky_ex(flipped_II)
            failed = bool(info)
        else:
            lower_II, failed = flipped_II, not _factorise_tiles(flipped_II, run_all)
    root_I = lower_II.diagonal().flip(0)
    if failed or not bool(torch.isfinite(root_I).all()):
        raise SchemeError(
            f"{name}: the Hessian of its inputs is not positive definite, so ~gptq cannot round "
            f"by it. Calibrate again, on more text."
        )
    columns = len(root_I)
    passed_II = torch.empty(columns, columns)
    for start in range(0, columns, SUMMED):
        stop = min(start + SUMMED, columns)
        upper_IB = lower_II[:, columns - stop : columns - start].flip(0, 1)
        passed_II[:, start:stop] = to_22_bits(upper_IB / root_I[start:stop], 0)
    cost_I = root_I.square()
    return Feedback(passed_II, (cost_I / cost_I.max()).float(), hessian_II)


def damped_hessian(hessian_II: Tensor) -> Tensor:
    """Damp a Hessian as `factorise_hessian` does, and keep it as ``~descent`` needs it.

    Args:
        hessian_II: ``sum c x x^T``, [in_features, in_features], float64, finite. It is changed.

    Returns:
        Relative to a power of two, float32, in 22 bits by column.
    """
    damping = DAMPING * float(hessian_II.diagonal().mean())
    hessian_II.diagonal().add_(damping if damping > 0 else 1.0)
    unit = 2.0 ** math.frexp(float(hessian_II.diagonal().max()))[1]
    return to_22_bits(hessian_II / unit, 0).float()


def _unflipped(flipped_II: Tensor) -> Tensor:
    """The whole of a Hessian from the lower triangle of the flipped one, in 22 bits by column."""
    columns = len(flipped_II)
    largest = float(flipped_II.diagonal().max())
    if not 0 < largest < math.inf:  # the factorisation says what is wrong
        return torch.zeros(columns, columns)
    unit = 2.0 ** math.frexp(largest)[1]  # float32 holds no large numbers
    hessian_II = torch.empty(columns, columns)
    for start in range(0, columns, SUMMED):
        stop = min(start + SUMMED, columns)
        strip = slice(columns - stop, columns - start)
        square_BB = flipped_II[strip, strip].tril()
        square_BB = square_BB + square_BB.tril(-1).T
        above_IB, below_BI = (
            flipped_II[columns - start :, strip],
            flipped_II[strip, : columns - stop],
        )
        whole_IB = torch.cat([below_BI.T, square_BB, above_IB]).flip(0, 1)
        hessian_II[:, start:stop] = to_22_bits(whole_IB / unit, 0)
    return hessian_II


def _factorise_tiles(matrix_II: Tensor, run_all: RunAll) -> bool:
    """Put the lower factor of a symmetric matrix in its place, tile by tile.

    Each tile takes what the columns of tiles before it say of it, one after the other. An update
    of one tile depends on no other of the same column, so they may run side by side.

    Args:
        matrix_II: float64; its lower triangle is read.
        run_all: Runs work on tiles.

    Returns:
        Whether it is positive definite.

    Source: the right-looking form of LAPACK's ``dpotrf``.
    """
    starts = range(0, len(matrix_II), _TILE)
    for k in starts:
        own = slice(k, k + _TILE)
        pivot_TT, failed = torch.linalg.cholesky_ex(matrix_II[own, own])
        if int(failed):
            return False
        matrix_II[own, own] = pivot_TT
        below = [slice(i, i + _TILE) for i in starts if i > k]
        run_all(partial(_solve_tile, matrix_II[rows, own], pivot_TT) for rows in below)
        run_all(
            partial(_update_tile, matrix_II[rows, of], matrix_II[rows, own], matrix_II[of, own])
            for of in below
            for rows in below
            if rows.start >= of.start
        )
    matrix_II.tril_()
    return True


def _solve_tile(tile_RT: Tensor, pivot_TT: Tensor) -> None:
    tile_RT.copy_(torch.linalg.solve_triangular(pivot_TT.T, tile_RT, upper=True, left=False))


def _update_tile(tile_RS: Tensor, row_RT: Tensor, column_ST: Tensor) -> None:
    tile_RS.addmm_(row_RT, column_ST.T, alpha=-1)


@contextmanager
def one_thread() -> Iterator[None]:
    """A sum that is split over threads is rounded differently for each number of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def round_with_feedback(
    weight_OI: Tensor,
    scheme: TensorScheme,
    feedback: Feedback,
    *,
    tile: tuple[int, int],
    amax: Tensor | None = None,
) -> tuple[Tensor, Scales | None]:
    """Round rows of a weight, every column after it took over the errors of those before.

    Args:
        weight_OI: Whole tiles, float32, finite.
        scheme: Whose grid, granularity and scale rule are used.
        feedback: Of the layer.
        tile: Rows and columns that share a scale.
        amax: Of the whole tensor, float32 scalar; needed if ``scheme.needs_tensor_amax``.

    Returns:
        Codes as ``encode_tiles`` gives them, [out_features, in_features], and the
        scales of all tiles, or None where the scheme is unscaled.
    """
    rows, columns = min(tile[0], len(weight_OI)), tile[1]
    # Columns are lines here: each is worked on by itself.
    weight_IO = weight_OI.T.double().contiguous()
    adjusted_IO = weight_IO.clone()
    feedback = feedback.to(weight_OI.device)
    passed_II = feedback.passed_II
    cost_I = feedback.cost_I if scheme.scale_rule == "nats" else None
    codes: list[Tensor] = []
    found: list[Scales] = []
    scales: Scales | None = None
    for start, stop in _batches(len(weight_IO), columns):
        error_BO = torch.empty_like(weight_IO[start:stop])
        passed_BB = passed_II[start:stop, start:stop, None].double()
        for place, column in enumerate(range(start, stop)):
            if column % columns == 0:
                whole = slice(column, column + columns)
                x_OK = as_float32(adjusted_IO[whole]).T.contiguous()
                weigh = None if cost_I is None else cost_I[whole].reshape(1, 1, 1, -1)
                tiles = tile_scales(
                    to_tiles(x_OK, rows, columns), scheme, tensor_amax=amax, importance_ARGK=weigh
                )
                found += [] if tiles is None else [tiles]
                scales = row_scales(tiles, 0, rows)
            code_O = encode_tiles(as_float32(adjusted_IO[column]), scheme, scales)
            codes.append(code_O)
            error_BO[place] = weight_IO[column] - decode_tiles(code_O, scheme, scales)
            # Two operations and not a fused one, whose rounding is the machine's own affair.
            adjusted_IO[column + 1 : stop] += passed_BB[place, place + 1 :] * error_BO[place]
        send(error_BO, passed_II[start:stop, stop:], into_IO=adjusted_IO[stop:])
    codes_IO, joined = torch.stack(codes), join_scales(found, 2) if found else None
    if scheme.rounding == "descent":
        assert feedback.hessian_II is not None  # whoever asks for it had it kept
        codes_IO, joined = descend(
            weight_IO,
            codes_IO,
            joined,
            scheme=scheme,
            hessian_II=feedback.hessian_II,
            tile=(rows, columns),
        )
    return codes_IO.T.contiguous(), joined


def _batches(in_features: int, columns: int) -> Iterator[tuple[int, int]]:
    """Ranges of columns; each holds whole groups, or lies within one."""
    step = columns * max(1, _SMALL_BATCH // columns)
    for first in range(0, in_features, step):
        last = min(first + step, in_features)
        for start in range(first, last, SUMMED):
            yield start, min(start + SUMMED, last)
