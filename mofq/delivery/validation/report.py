"""``validation.json``: what a quantized model is and does, beside what was predicted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from mofq.decision.prediction import INTERVAL_STDERRS
from mofq.delivery.deviation import Deviation
from mofq.delivery.validation.divergence import WindowScore
from mofq.delivery.validation.tasks import TaskResult
from mofq.evidence.standard_error import standard_error
from mofq.exceptions import MofqError
from mofq.files.documents import load_json, write_beside_and_rename
from mofq.files.validated import validate

VALIDATION_VERSION = 1


@dataclass(frozen=True, slots=True)
class Lineage:
    """What was compared, and on what."""

    mofq: str  #: version
    model: str
    index_sha256: str  #: of the original checkpoint
    weights_sha256: str  #: of samples of its weights
    candidate: str  #: the recipe or folder
    recipe_sha256: str | None  #: of the recipe's text; None where there is no recipe
    folder_index_sha256: str | None  #: None where there is no folder
    text: str
    text_sha256: str
    dtype: str  #: of both models' arithmetic
    device: str
    backend: str  #: that applied the recipe
    sequence_length: int  #: tokens of a window
    bos: bool = False  #: whether every window begins with it
    stats_bos: bool | None = None  #: whether the recipe's calibration did; None: it had none
    stats_sequence_length: int | None = None  #: tokens of a sequence of it; None: not known
    #: What the recipe was made with this very text for: calibrated or searched; None: nothing
    #: that it says.
    text_use: str | None = None

    @property
    def differs_in_bos(self) -> bool:
        """Whether the recipe was calibrated on sequences that begin otherwise."""
        return self.stats_bos not in (None, self.bos)

    @property
    def is_longer_than_calibration(self) -> bool:
        """Whether windows have more tokens than the sequences that the recipe was calibrated on."""
        calibrated = self.stats_sequence_length
        return calibrated is not None and self.sequence_length > calibrated


@dataclass(frozen=True, slots=True)
class Validation:
    """A quantized model against the original on one text."""

    lineage: Lineage
    tokens: int  #: positions compared: windows times sequence length
    kl_nats_per_token: float  #: KL(original || quantized), mean over all positions
    kl_stderr: float | None  #: over windows; None where there is only one
    predicted_kl_nats_per_token: float | None  #: the recipe's; None where it is not in nats
    predicted_kl_stderr: float | None
    kl_budget_nats_per_token: float | None  #: the accuracy that the recipe was asked for
    within_kl_budget: bool | None  #: with two standard errors, as a budget is proved
    perplexity: float  #: of the next tokens within the windows
    perplexity_original: float
    top1_agreement: float  #: 0 to 1, share of positions
    bits_per_weight: float  #: counted anew from shapes and schemes
    enforced: bool | None  #: None where there is no recipe to enforce
    deviations: tuple[Deviation, ...]  #: empty where enforced
    windows: tuple[float, ...]  #: KL of each window [nats per token]
    seconds: float  #: to apply, enforce and run the quantized model
    seconds_original: float  #: to run the original, once for all that is compared with it
    tasks: tuple[TaskResult, ...] = ()  #: by lm-eval, where any were asked for
    #: Of the prediction's 95 % interval; None where the recipe has none, as those of before.
    predicted_kl_low: float | None = None
    predicted_kl_high: float | None = None
    is_tuned: bool = False  #: after it was found, which no prediction knows of

    @property
    def kl_upper(self) -> float:
        """What is held against a budget: measured KL and two standard errors [nats per token]."""
        return self.kl_nats_per_token + INTERVAL_STDERRS * (self.kl_stderr or 0.0)

    @property
    def within_prediction(self) -> bool | None:
        """Whether the measured KL is inside of the predicted interval; None: there is none of it.

        The interval is of what is measured on much text; what was measured on this one has noise
        of its own, of which two standard errors are added to both ends.
        """
        low, high = self.predicted_kl_low, self.predicted_kl_high
        predicted = self.predicted_kl_nats_per_token
        if low is None or high is None or predicted is None or self.is_tuned:
            return None
        noise = INTERVAL_STDERRS * (self.kl_stderr or 0.0)
        below, above = (math.hypot(end - predicted, noise) for end in (low, high))
        return predicted - below <= self.kl_nats_per_token <= predicted + above

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``validation.json``."""
        content = asdict(self)
        lineage = content.pop("lineage")
        if not self.lineage.differs_in_bos:
            del lineage["stats_bos"]
            if not self.lineage.bos:  # as before it was an option
                del lineage["bos"]
        if self.lineage.stats_sequence_length is None:
            del lineage["stats_sequence_length"]
        if self.lineage.text_use is None:
            del lineage["text_use"]
        if self.predicted_kl_low is None or self.predicted_kl_high is None:
            del content["predicted_kl_low"], content["predicted_kl_high"]
        if not self.is_tuned:
            del content["is_tuned"]
        return {"version": VALIDATION_VERSION, **lineage, **content}


_VALIDATION = TypeAdapter(Validation)


@dataclass(frozen=True, slots=True)
class Agreement:
    """The numbers that follow from the scores of windows."""

    kl_nats_per_token: float
    kl_stderr: float | None
    perplexity: float
    perplexity_original: float
    top1_agreement: float
    windows: tuple[float, ...]


def summarize(
    scores: Sequence[WindowScore], entropies_original: Sequence[float], *, sequence_length: int
) -> Agreement:
    """Means over windows of one length.

    Args:
        scores: Of the quantized model.
        entropies_original: Cross entropies of the original, summed over each window [nats].
        sequence_length: Tokens of each window.

    Returns:
        KL over all positions, perplexities over all next tokens within the windows.
    """
    windows = tuple(score.kl_nats / sequence_length for score in scores)
    predictions = len(windows) * (sequence_length - 1)
    return Agreement(
        kl_nats_per_token=math.fsum(windows) / len(windows),
        kl_stderr=standard_error(np.asarray(windows)),
        perplexity=_perplexity([s.cross_entropy_nats for s in scores], predictions),
        perplexity_original=_perplexity(entropies_original, predictions),
        top1_agreement=sum(s.agreements for s in scores) / (len(windows) * sequence_length),
        windows=windows,
    )


def write_validation(
    validation: Validation,
    path: str | Path,
    *,
    alternatives: Mapping[str, Validation] | None = None,
) -> None:
    """Write ``validation.json``: beside its final name, then renamed.

    Args:
        validation: Of the quantized model.
        path: Of the file.
        alternatives: Name -> what else was measured beside it on the same windows.

    Raises:
        MofqError: The file cannot be written.
    """
    content = validation.to_json()
    if alternatives:
        content["alternatives"] = {name: one.to_json() for name, one in alternatives.items()}
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    write_beside_and_rename(Path(path), text + "\n")


def read_validation(path: str | Path) -> Validation:
    """Read a ``validation.json``.

    Raises:
        MofqError: The file is missing or no such file.
    """
    where = str(path)
    content = load_json(Path(path), MofqError, kind="validation")
    if not isinstance(content, dict) or content.pop("version", None) != VALIDATION_VERSION:
        raise MofqError(
            f"{where}: is no validation of version {VALIDATION_VERSION}. Take the file that "
            f"`mofq validate -o` wrote."
        )
    names = {one.name for one in fields(Lineage)}
    lineage = {key: value for key, value in content.items() if key in names}
    others = {key: value for key, value in content.items() if key not in names}
    return validate(_VALIDATION, others | {"lineage": lineage}, where, MofqError)


def _perplexity(entropies: Sequence[float], predictions: int) -> float:
    mean = math.fsum(entropies) / predictions
    if mean > 700:
        raise MofqError(f"perplexity: e**{mean:.0f} is no number. The model predicts nothing.")
    return math.exp(mean)
