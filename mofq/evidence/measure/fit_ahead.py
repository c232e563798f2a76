"""Fits the layers that come next on the workers' threads, as many at once as memory allows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from mofq.evidence.fits import Fits, LayerFit, Part
from mofq.evidence.measure.worker_threads import Workers, run_all
from mofq.model.layers import LinearLayer
from mofq.numbers.quantize.gptq import fit_bytes
from mofq.numbers.schemes import TensorScheme

#: Memory of all fits that are made at once, unless one alone takes more [bytes].
_FIT_BYTES = 2_000_000_000


class Asked(NamedTuple):
    """What a layer is fitted to, and for what."""

    layer: LinearLayer
    weights: tuple[TensorScheme, ...]
    part: Part


class FitsAhead:
    """Gives the fits that are asked for, in the order in which they were announced.

    Those of which as many as there are workers fit into the memory are made side by side, one on
    each thread. A wider one is made when its turn comes, on all threads. Both give the same bits.
    """

    def __init__(self, fits: Fits, asked: Iterable[Asked], *, workers: Workers) -> None:
        """Fit nothing yet.

        Args:
            fits: Of the statistics.
            asked: All fits, in order.
            workers: Whose threads make them; `of` is not called on one of these.
        """
        self._fits = fits
        self._workers = workers
        self._asked = deque(asked)
        self._coming: deque[tuple[Asked, Future[LayerFit] | None]] = deque()

    def of(self, layer: LinearLayer, weights: Iterable[TensorScheme], *, part: Part) -> LayerFit:
        """The next fit; arguments, result and errors as `Fits.of`."""
        self._begin()
        asked, future = self._coming.popleft()
        assert asked == Asked(layer, tuple(weights), part)
        if future is not None:
            return future.result()
        return self._fits.of(
            layer, asked.weights, part=part, run_all=partial(run_all, self._workers)
        )

    def close(self) -> None:
        """Begin no fit that has not begun."""
        for _, future in self._coming:
            if future is not None:
                future.cancel()

    def _begin(self) -> None:
        while self._asked and (not self._coming or self._has_room()):
            asked = self._asked.popleft()
            future = None
            if _bytes(asked) * self._workers.threads <= _FIT_BYTES:
                future = self._workers.executor.submit(
                    self._fits.of, asked.layer, asked.weights, part=asked.part
                )
            self._coming.append((asked, future))

    def _has_room(self) -> bool:
        if any(future is None for _, future in self._coming):
            return False
        total = sum(_bytes(asked) for asked, _ in self._coming) + _bytes(self._asked[0])
        return len(self._coming) < self._workers.threads and total <= _FIT_BYTES


def _bytes(asked: Asked) -> int:
    """Memory that a fit takes while it is made."""
    layer = asked.layer
    by_feedback = [weight.rounds_by_hessian for weight in asked.weights]
    hessian_bytes = fit_bytes(layer.in_features) if any(by_feedback) else 0
    if all(by_feedback):
        return hessian_bytes
    # Importance is found by the gradient of the whole weight, and its squares, in float64.
    return max(hessian_bytes, 2 * 8 * layer.out_features * layer.in_features)
