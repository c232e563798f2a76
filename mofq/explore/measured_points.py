"""Measurements beside the frontier: what `mofq validate` found of quantized models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mofq.evidence.table import TableHeader
from mofq.exceptions import MofqError
from mofq.files.documents import load_json, shown

#: Of validation.json; what else it holds is not drawn.
_VALIDATION_VERSION = 1


@dataclass(frozen=True, slots=True)
class MeasuredPoint:
    """The KL of a quantized model as `mofq validate` measured it."""

    label: str
    text: str
    bits_per_weight: float
    at: float | None  #: on the axis of the frontier; None: the file does not say
    kl_nats_per_token: float
    kl_stderr: float | None
    predicted: float | None  #: None too of a tuned recipe, of which no prediction knows
    predicted_stderr: float | None
    recipe_sha256: str | None  #: of the text of the recipe that was measured
    recipe: int | None = None  #: its place among the recipes that are drawn


def measured_points(path: Path, header: TableHeader) -> tuple[MeasuredPoint, ...]:
    """What is drawn of a ``validation.json``.

    Args:
        path: From `mofq validate -o`, or of a run.
        header: Of the table that it is drawn with.

    Returns:
        The point at its bits per weight, and those of what a run measured beside it.

    Raises:
        MofqError: The file is not such a file, or of another model, or another training of it.
    """
    content = load_json(path, MofqError, kind="validation")
    point = _point(content, path, header, label=None)
    others = content.get("alternatives", {})
    if not isinstance(others, dict):
        raise MofqError(f"{path}: alternatives must be a mapping, found {shown(others)}.")
    return (point, *(_point(one, path, header, label=name) for name, one in others.items()))


def _point(content: Any, path: Path, header: TableHeader, *, label: str | None) -> MeasuredPoint:
    """A measurement; its label None: that of what was validated."""
    if not isinstance(content, dict) or content.get("version") != _VALIDATION_VERSION:
        raise MofqError(
            f"{path}: is no validation of version {_VALIDATION_VERSION}. Take the file that "
            f"`mofq validate -o` wrote."
        )
    for key, ours in (
        ("index_sha256", header.index_sha256),
        ("weights_sha256", header.weights_sha256),
    ):
        found = content.get(key)
        is_older = key == "weights_sha256" and None in (found, ours)  # before it was noted
        if found != ours and not is_older:
            raise MofqError(
                f"{path}: is of a model with {key} {found}, and the table of one with {ours}. "
                f"Take validations of the table's model."
            )
    bits_per_weight = _needed(content, "bits_per_weight", path)
    predicted = _number(content, "predicted_kl_nats_per_token", path)
    return MeasuredPoint(
        label=label or Path(str(content.get("candidate", path.stem))).stem,
        text=Path(str(content.get("text", ""))).name,
        bits_per_weight=bits_per_weight,
        at=bits_per_weight,
        kl_nats_per_token=_needed(content, "kl_nats_per_token", path),
        kl_stderr=_number(content, "kl_stderr", path),
        predicted=None if content.get("is_tuned") else predicted,
        predicted_stderr=_number(content, "predicted_kl_stderr", path),
        recipe_sha256=content.get("recipe_sha256"),
    )


def _needed(content: Mapping[str, Any], key: str, path: Path) -> float:
    value = _number(content, key, path)
    if value is None:
        raise MofqError(f"{path}: has no {key}. Take the file that `mofq validate -o` wrote.")
    return value


def _number(content: Mapping[str, Any], key: str, path: Path) -> float | None:
    value = content.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MofqError(f"{path}: {key} must be a number, found {value!r}.")
    return float(value)
