"""Refuses at the start what would otherwise fail after the long work."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mofq.exceptions import EngineError, MofqError, Remark, first_line, option
from mofq.files.locks import check_replaceable

if TYPE_CHECKING:
    from mofq.evidence.spaces import Offer, SearchSpace
    from mofq.model.layers import ModelLayers
    from mofq.numbers.schemes import Scheme

_MODEL = "a model"


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
        raise MofqError(
            f"{option('device', device)}: no such device. Give cpu, cuda or cuda:1."
        ) from error
    try:
        float(torch.ones(1, device=device))
    except (RuntimeError, AssertionError) as error:
        raise MofqError(
            f"{option('device', device)}: cannot be used here ({first_line(error)}). Give cpu, "
            f"cuda or cuda:1."
        ) from error


def check_engine(engine: str | None, layers: ModelLayers) -> None:
    """Refuse an engine that is unknown, does not load the model in any format, or cannot cut it.

    Raises:
        EngineError: As said.
    """
    from mofq.engines import check_devices, find_engine, model_problem, storage_problem

    if engine is None:
        return
    found = find_engine(engine)
    check_devices(layers, found.devices)
    problem = model_problem(found, layers.architecture, layers.groups)
    for each in layers.groups:
        problem = problem or storage_problem(found, each, layers.architecture)
    if problem:
        raise EngineError(
            f"{problem}: nothing of this model can be exported for it. Leave {option('engine')} out"
            f" to measure, search and validate it, or name another engine."
        )


def vocabulary_problems(offers: Iterable[Offer], space: SearchSpace) -> dict[str, Remark]:
    """Why an lm_head or an embedding that is asked for may be nothing but left as it is.

    Args:
        offers: Of all fusion groups.
        space: What they are of.

    Returns:
        Fusion group -> why it may not have most of the schemes, of those that a matrix of the
        vocabulary can have where there are any, and what to do.
    """
    from mofq.model.layers import vocabulary_names
    from mofq.numbers.schemes import parse_scheme

    problems = {}
    for offer in offers:
        is_left = all(scheme.is_unquantized for scheme in offer.schemes)
        if is_left and offer.rejected and vocabulary_names([offer.group]):
            plain = [why for name, why in offer.rejected.items() if _is_plain(parse_scheme(name))]
            (reason, _), *_ = Counter(plain or offer.rejected.values()).most_common(1)
            problems[offer.group.name] = Remark(
                f"{offer.group.name}: may have no scheme of the search space {space.name}: "
                f"{reason}. Leave {option('lm_head')} and {option('embeddings')} (or the space's "
                f"keys of these names) out, or give another space or {option('engine')}."
            )
    return problems


def check_vocabulary(offers: Iterable[Offer], space: SearchSpace) -> None:
    """Refuse an lm_head or an embedding of which `vocabulary_problems` knows one.

    Raises:
        MofqError: As said.
    """
    for problem in vocabulary_problems(offers, space).values():
        raise MofqError(problem.template)


def _is_plain(scheme: Scheme) -> bool:
    """Whether weights are rounded, and neither fitted to products nor beside rounded inputs."""
    return scheme.activation is None and not scheme.is_fitted


def check_output(
    path: Path,
    *,
    files: Iterable[object] = (),
    folders: Iterable[object] = (),
    name: str = "output",
) -> None:
    """Refuse a file that cannot be written, or would take the place of an input or of a part of it.

    Args:
        path: To be written.
        files: What the stage reads and may be a file; what is no path of one is passed over.
        folders: What the stage reads and may be a folder, likewise.
        name: Of the option that names it.

    Raises:
        MofqError: It is no file, its folder is missing or may not be written to, or it is an
            input, or lies in one.
    """
    folder = path.parent
    check_replaceable(path, option(name, path))
    if not folder.is_dir():
        raise MofqError(
            f"{option(name, path)}: there is no folder {folder}. Make it, or name another file."
        )
    if not os.access(folder, os.W_OK):
        raise MofqError(f"{option(name, path)}: the folder {folder} may not be written to.")
    for file in (Path(one) for one in files if isinstance(one, str | Path)):
        if path.is_file() and file.is_file() and path.samefile(file):
            raise MofqError(
                f"{option(name, path)}: this command reads it, and it would be lost. Name another "
                f"file."
            )
    _check_outside(path, folders, name=name)
    if found := _artifact(folder):
        raise MofqError(
            f"{option(name, path)}: {folder} is the folder of {found}, to which nothing is added. "
            f"Name a file outside of it."
        )


def check_folder(path: Path, *, folders: Iterable[object]) -> None:
    """Refuse a folder that cannot be made or written to, or lies in an input.

    Args:
        path: To be made, or filled.
        folders: What the stage reads and may be a folder; what is no path of one is passed over.

    Raises:
        MofqError: It is a file or lies under one, may not be written to, or is a folder that the
            stage reads, or lies in one.
    """
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise MofqError(f"{option('output', path)}: needed a folder, but {existing} is a file.")
    if not os.access(existing, os.W_OK):
        raise MofqError(f"{option('output', path)}: the folder {existing} may not be written to.")
    _check_outside(path, folders, name="output")
    if _artifact(path) == _MODEL:
        raise MofqError(
            f"{option('output', path)}: is the folder of {_MODEL}. Name another folder."
        )


def _check_outside(path: Path, folders: Iterable[object], *, name: str) -> None:
    """Refuse an output in a folder that is read, by whatever name either is called."""
    # A link is written through by some stages and replaced by others: where it is counts too.
    places = [path.resolve()]
    if path.name not in ("", ".."):
        places.append(path.parent.resolve() / path.name)
    around = [one for place in places for one in (place, *place.parents) if os.path.isdir(one)]
    for folder in (Path(one).expanduser() for one in folders if isinstance(one, str | Path)):
        if os.path.isdir(folder) and any(folder.samefile(one) for one in around):
            raise MofqError(
                f"{option(name, path)}: lies in {folder}, which this command reads. Name a place "
                f"outside of it."
            )


def _artifact(folder: Path) -> str | None:
    """What a folder is that no other file belongs in; None where it is any folder."""
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors*")):
        return _MODEL
    if (folder / "plan.json").is_file() and (folder / "stats.json").is_file():
        return "statistics of `mofq calibrate`"
    return None
