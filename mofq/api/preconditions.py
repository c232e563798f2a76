"""Refuses at the start what would otherwise fail after the long work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from mofq.exceptions import EngineError, MofqError, nearest_name
from mofq.files.locks import check_replaceable

if TYPE_CHECKING:
    from mofq.model.layers import ModelLayers


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        MofqError: torch knows no such device, or cannot use it on this machine.
    """
    import torch

    if device == "cpu":
        return
    try:
        torch.device(device)
    except RuntimeError as error:
        raise MofqError(f"--device {device}: no such device. Give cpu, cuda or cuda:1.") from error
    try:
        float(torch.ones(1, device=device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise MofqError(
            f"--device {device}: cannot be used here ({reason}). Give cpu, cuda or cuda:1."
        ) from error


def check_dtype(dtype: str) -> None:
    """Refuse an unknown dtype.

    Raises:
        MofqError: As said.
    """
    from mofq.model.loading import DTYPES

    if dtype not in DTYPES:
        raise MofqError(f"--dtype {dtype}: not known." + nearest_name(dtype, DTYPES))


def check_engine(engine: str | None, layers: ModelLayers) -> None:
    """Refuse an engine that is unknown, reads no format that holds the model, or cannot cut it.

    Raises:
        EngineError: As said.
    """
    from mofq.engines import check_devices, find_engine, storage_problem

    if engine is None:
        return
    found = find_engine(engine)
    check_devices(layers, found.devices)
    for group in layers.groups:
        if problem := storage_problem(found, group):
            raise EngineError(
                f"{problem}: nothing of this model can be exported for it. Leave --engine out to"
                " measure, search and validate it."
            )


def check_output(path: Path, *reads: object) -> None:
    """Refuse a file that cannot be written, or that would take the place of an input.

    Args:
        path: To be written.
        reads: What the stage reads; what is no path of a file is passed over.

    Raises:
        MofqError: It is no file, its folder is missing or may not be written to, or it is
            an input.
    """
    folder = path.parent
    check_replaceable(path, "-o ")
    if not folder.is_dir():
        raise MofqError(f"-o {path}: there is no folder {folder}. Make it, or name another file.")
    if not os.access(folder, os.W_OK):
        raise MofqError(f"-o {path}: the folder {folder} may not be written to.")
    for read in (Path(one) for one in reads if isinstance(one, str | Path)):
        if path.is_file() and read.is_file() and path.samefile(read):
            raise MofqError(
                f"-o {path}: this command reads it, and it would be lost. Name another file."
            )


def check_folder(path: Path) -> None:
    """Refuse a folder that cannot be made or written to.

    Raises:
        MofqError: It is a file or lies under one, or may not be written to.
    """
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise MofqError(f"-o {path}: needed a folder, but {existing} is a file.")
    if not os.access(existing, os.W_OK):
        raise MofqError(f"-o {path}: the folder {existing} may not be written to.")
