"""The codes of one layer under its scheme; those that are fitted are found once, and kept.

Fitting takes most of the time of whatever applies, checks or exports a recipe with ``@nats`` or
``~gptq``, and all of them need the same codes. So the first that fits a layer keeps its codes and
scales in the stats folder:

``.codes/LAYER/KEY-SHA256.safetensors``
    ``LAYER`` stands for the layer's name. ``KEY`` is the hash of all that decides the codes: the
    layer's name and weights, the statistics, the scheme, the magnitude behind a global scale and
    the numerics; codes that were kept under earlier numerics which fit alike are taken too.
    ``SHA256`` is the hash of the file itself.

A file is read whole and its hash compared with its name before it is used: one that is damaged,
or was changed, is deleted and fitted again. (Whoever may write to the folder can write another
file with a right name; so they can with the statistics.) Codes that are read are those that are
fitted, in every bit, so that the folder may be deleted at any time. Of each layer the sets that
were used last are there, as many as `_SETS`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import disk_usage

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mofq.evidence.calibration.stats import Stats
from mofq.evidence.code_changes import CodeChanges
from mofq.evidence.fits import FitArguments, Fits, needs_stats
from mofq.evidence.measure.worker_threads import worker_threads
from mofq.model.checkpoint.tensors import RowReader
from mofq.model.layers import LinearLayer
from mofq.numbers.numerics import EARLIER_FITTED_CODES, NUMERICS
from mofq.numbers.quantize import QuantizedWeight, dequantize_weight, quantize_weight
from mofq.numbers.quantize.tiles import row_blocks
from mofq.numbers.schemes import TensorScheme

FOLDER = ".codes"
#: Sets of codes of a layer: of a recipe, and of what it is compared with.
_SETS = 3
#: Files are not kept where fewer of their size have room.
_SPARE = 16
#: Rows that are fitted at once: one column costs about the same for any number of them.
_ROWS, _GPU_ROWS = 1024, 16384
#: Elements that are hashed at once.
_HASH_ELEMENTS = 2**20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LayerCodes:
    """Gives the codes of any rows of a layer's weight."""

    layer: LinearLayer
    scheme: TensorScheme
    read_rows: RowReader
    tensor_amax: float | Tensor | None = None
    kept: QuantizedWeight | None = None  #: of the whole layer, where the scheme is fitted
    device: str | torch.device = "cpu"  #: of the weight, where the codes are kept
    changes: CodeChanges | None = None  #: that were learned after the scheme rounded the weight

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """The codes of some rows, which begin and end between tiles; see ``quantize_weight``.

        Raises:
            SchemeError: A weight is not finite.
        """
        found = self._as_rounded(start, stop)
        if self.changes is None:
            return found
        return self.changes.apply(
            found,
            start,
            tile_rows=self.scheme.granularity.rows,
            columns=self.layer.in_features,
        )

    def _as_rounded(self, start: int, stop: int) -> QuantizedWeight:
        if self.kept is None:
            weight_OI = self.read_rows(start, stop)
            return quantize_weight(
                weight_OI, self.scheme, tensor_amax=self.tensor_amax, name=self.layer.name
            )
        tile = self.scheme.granularity.rows
        down = slice(start // tile, -(-stop // tile)) if tile else slice(None)
        scale, point, whole = self.kept.scale, self.kept.zero_point, self.kept.global_scale
        codes_OI = self.kept.codes_OI[start:stop].to(self.device)
        return QuantizedWeight(
            codes_OI.float() if codes_OI.is_floating_point() else codes_OI,
            None if scale is None else scale[down].to(self.device),
            None if point is None else point[down].to(self.device),
            None if whole is None else whole.to(self.device),
        )

    def decoded(self, start: int, stop: int) -> Tensor:
        """What some rows are computed with, [rows, in_features], float32."""
        return dequantize_weight(self.rows(start, stop), self.scheme)


def layer_codes(
    fits: Fits | None,
    layer: LinearLayer,
    scheme: TensorScheme,
    read_rows: RowReader,
    *,
    tensor_amax: float | Tensor | None = None,
    changes: CodeChanges | None = None,
) -> LayerCodes:
    """The codes of a layer under a scheme; where it is fitted, all of them are found now.

    Args:
        fits: Of the statistics; may be None where the scheme is not fitted.
        layer: The layer.
        scheme: Of its weight.
        read_rows: Gives rows of the weight, of any floating dtype.
        tensor_amax: As for ``quantize_weight``.
        changes: That were learned after the scheme rounded the layer.

    Raises:
        StatsError: The scheme is fitted and there are no statistics, or not of this layer.
        SchemeError: A weight is not finite, or cannot be fitted.
    """
    found = LayerCodes(layer, scheme, read_rows, tensor_amax, changes=changes)
    if not scheme.is_fitted:
        return found
    if fits is None:
        raise needs_stats(layer.name)
    if not scheme.needs_tensor_amax:
        tensor_amax = None
    weight_sha256, device = _hash_rows(layer, read_rows)
    parts = [fits.stats.sha256, layer.name, weight_sha256, repr(scheme)]
    amax = None if tensor_amax is None else float(tensor_amax)
    keys = [_key(*parts, numerics, amax) for numerics in (NUMERICS, *EARLIER_FITTED_CODES)]
    store = _folder(fits.stats, layer)
    kept = next((one for key in keys if (one := _read(store, key)) is not None), None)
    if kept is None:
        kept = _fit(fits, found, device)
        _write(store, keys[0], kept)
    return replace(found, kept=kept, device=device)


def _key(*parts: str | int | float | None) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _folder(stats: Stats, layer: LinearLayer) -> Path:
    # Names of a checkpoint's tensors may hold anything, and be of any length.
    return stats.folder / FOLDER / hashlib.sha256(layer.name.encode()).hexdigest()[:32]


def _hash_rows(layer: LinearLayer, read_rows: RowReader) -> tuple[str, torch.device]:
    """The hash of a weight's values, whatever dtype holds them, and where it lies."""
    digest, device = hashlib.sha256(), torch.device("cpu")
    for start, stop in row_blocks(layer.out_features, layer.in_features, elements=_HASH_ELEMENTS):
        rows_RI = read_rows(start, stop)
        device = rows_RI.device
        digest.update(rows_RI.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest(), device


def _fit(fits: Fits, codes: LayerCodes, device: torch.device) -> QuantizedWeight:
    """Fit a layer, block of rows by block of rows on all threads."""
    fit = fits.of(codes.layer, [codes.scheme]).to(str(device)).arguments(codes.scheme)
    return fit_rows(
        *(codes.layer, codes.scheme, codes.read_rows, fit),
        tensor_amax=codes.tensor_amax,
        device=device,
    )


def fit_rows(
    layer: LinearLayer,
    scheme: TensorScheme,
    read_rows: RowReader,
    fit: FitArguments,
    *,
    tensor_amax: float | Tensor | None,
    device: torch.device,
) -> QuantizedWeight:
    """Codes of a weight, block of rows by block of rows on all threads.

    Args:
        layer: Whose shape and name it has.
        scheme: That it gets.
        read_rows: Its rows, on the device.
        fit: What they are fitted to.
        tensor_amax: As for `quantize_weight`.
        device: Where they are.

    Returns:
        Codes and scales, narrow, on the CPU.

    Raises:
        SchemeError: As `quantize_weight`.
    """

    def quantize(block: tuple[int, int]) -> QuantizedWeight:
        found = quantize_weight(
            read_rows(*block), scheme, tensor_amax=tensor_amax, name=layer.name, **fit
        )
        return narrow(found)

    rows = _ROWS if device.type == "cpu" else _GPU_ROWS
    blocks = row_blocks(
        layer.out_features,
        layer.in_features,
        elements=rows * layer.in_features,
        tile_rows=scheme.granularity.rows,
    )
    with worker_threads(device.type) as workers:
        parts = list(workers.executor.map(quantize, blocks))
    first = parts[0]
    is_one_scale = scheme.granularity.kind == "tensor"
    scales = [part.scale for part in parts if part.scale is not None]
    points = [part.zero_point for part in parts if part.zero_point is not None]
    return QuantizedWeight(
        torch.cat([part.codes_OI for part in parts]),
        first.scale if is_one_scale or not scales else torch.cat(scales),
        torch.cat(points) if points else None,
        first.global_scale,
    )


def narrow(found: QuantizedWeight) -> QuantizedWeight:
    """The same on the CPU, codes in one byte where it holds them."""
    codes_OI = found.codes_OI.cpu()
    if codes_OI.is_floating_point():
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16):
            narrow_OI = codes_OI.to(dtype)
            # Signs of zeros are codes too, and are kept by all of these.
            if torch.equal(narrow_OI.float(), codes_OI):
                codes_OI = narrow_OI
                break
    scale, point, whole = found.scale, found.zero_point, found.global_scale
    return QuantizedWeight(
        codes_OI,
        None if scale is None else scale.cpu(),
        None if point is None else point.cpu(),
        None if whole is None else whole.cpu(),
    )


def _read(store: Path, key: str) -> QuantizedWeight | None:
    """What is kept under a key; None where nothing is, or where it is not what was written."""
    try:
        paths = sorted(store.glob(f"{key}-*.safetensors"))
    except OSError:
        return None
    for path in paths:
        try:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == path.stem.partition("-")[2]:
                tensors = load(data)
                os.utime(path)
                return QuantizedWeight(
                    tensors["codes"],
                    tensors.get("scale"),
                    tensors.get("zero_point"),
                    tensors.get("global_scale"),
                )
        except (OSError, SafetensorError, KeyError):
            pass
        _log.warning(
            f"{path}: changed since it was written; the codes of this layer are fitted again."
        )
        with suppress(OSError):  # of a folder that is only read
            path.unlink()
    return None


def _write(store: Path, key: str, found: QuantizedWeight) -> None:
    """Keep codes, where there is room for them."""
    tensors = {
        "codes": found.codes_OI,
        "scale": found.scale,
        "zero_point": found.zero_point,
        "global_scale": found.global_scale,
    }
    data = save({name: one.contiguous() for name, one in tensors.items() if one is not None})
    path = store / f"{key}-{hashlib.sha256(data).hexdigest()}.safetensors"
    temporary = path.with_suffix(f".{os.getpid()}.part")
    try:
        store.mkdir(parents=True, exist_ok=True)
        if disk_usage(store).free < _SPARE * len(data):
            return
        temporary.write_bytes(data)
        os.replace(temporary, path)
        used = sorted(store.glob("*.safetensors"), key=lambda one: one.stat().st_mtime_ns)
        for old in used[:-_SETS]:
            old.unlink(missing_ok=True)
    except OSError as problem:
        with suppress(OSError):
            temporary.unlink()
        _log.warning(f"{store}: fitted codes are not kept: {problem.strerror}.")
