"""Runs two models over the same windows of text and compares what they predict."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mofq.evidence.metrics import cross_entropy, kl_divergence, top1_agreement
from mofq.exceptions import CheckpointError, MofqError, option
from mofq.files.progress import Progress, told


@dataclass(frozen=True, slots=True)
class WindowScore:
    """How a model predicts one window, sums over its positions."""

    kl_nats: float  #: KL(original || quantized) over all T positions
    cross_entropy_nats: float  #: of the T - 1 next tokens within the window
    agreements: int  #: positions where both have the same most probable token


class OriginalLogits:
    """What the original predicts, in an unnamed temporary file that vanishes with the process.

    So only one model is in memory at a time, and any number of quantized ones
    is compared with one run of the original.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (a resource itself)
        self._shape = (0, 0)

    def __enter__(self) -> OriginalLogits:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the logits."""
        self._file.close()

    def append(self, logits_TV: Tensor, *, windows_left: int) -> None:
        """Keep a window's logits; all windows have one shape.

        Raises:
            MofqError: There is no space for this and the windows left.
        """
        self._shape = (logits_TV.shape[0], logits_TV.shape[1])
        needed = (windows_left + 1) * logits_TV.numel() * 4
        try:
            if shutil.disk_usage(tempfile.gettempdir()).free < needed:
                raise OSError(errno.ENOSPC, "too little space is left")
            logits_TV.float().cpu().numpy().tofile(self._file)
        except OSError as error:
            raise MofqError(
                f"{tempfile.gettempdir()}: the original's logits need {needed:,} bytes here: "
                f"{error.strerror or error}. Set TMPDIR to a folder with more space, "
                f"or use fewer tokens."
            ) from error

    def read(self, window: int) -> Tensor:
        """The logits of a window, [T, V], float32, on the CPU."""
        count = self._shape[0] * self._shape[1]
        self._file.seek(4 * count * window)
        logits = np.fromfile(self._file, dtype=np.float32, count=count)
        return torch.from_numpy(logits).reshape(self._shape)


def run_original(
    model: PreTrainedModel,
    windows_NT: Tensor,
    *,
    into: OriginalLogits,
    progress: Progress | None = None,
) -> tuple[float, ...]:
    """Run the original over all windows and keep its logits.

    Args:
        model: The original, in eval mode.
        windows_NT: Token ids, ``[N, T]``, int64.
        into: Is filled.
        progress: Called with ``"original"``, windows done, and all of them.

    Returns:
        Cross entropy of each window, summed over its T - 1 next tokens [nats].

    Raises:
        MofqError: The logits are not finite, or there is no space for them.
    """
    entropies = []
    total = len(windows_NT)
    for index, window_T in enumerate(told(windows_NT, progress, "original", total=total)):
        logits_TV = _logits(model, window_T, what="the original model")
        into.append(logits_TV, windows_left=total - index - 1)
        entropies.append(next_token_entropy(logits_TV, window_T))
    return tuple(entropies)


def compare(
    model: PreTrainedModel,
    windows_NT: Tensor,
    *,
    original: OriginalLogits,
    progress: Progress | None = None,
) -> tuple[WindowScore, ...]:
    """Run a quantized model over the windows and compare it with the original.

    Args:
        model: In eval mode.
        windows_NT: As many, and as long, as were given to ``run_original``.
        original: Filled by it.
        progress: Called with ``"validate"``, windows done, and all of them.

    Returns:
        One score for each window.

    Raises:
        CheckpointError: The models' vocabularies differ in size.
        MofqError: The logits are not finite.
    """
    scores = compare_windows(model, windows_NT, original=original)
    return tuple(told(scores, progress, "validate", total=len(windows_NT)))


def compare_windows(
    model: PreTrainedModel, windows_NT: Tensor, *, original: OriginalLogits
) -> Iterator[WindowScore]:
    """As ``compare``, one window each time the next score is asked for."""
    for index, window_T in enumerate(windows_NT):
        logits_TV = _logits(model, window_T, what="the quantized model")
        yield score_window(original.read(index), logits_TV, window_T)


def score_window(reference_TV: Tensor, logits_TV: Tensor, window_T: Tensor) -> WindowScore:
    """How a model predicts one window.

    Args:
        reference_TV: The original's logits, [T, V].
        logits_TV: The other's.
        window_T: Token ids.

    Raises:
        CheckpointError: The models' vocabularies differ in size.
    """
    reference_TV = reference_TV.to(logits_TV.device)
    if reference_TV.shape != logits_TV.shape:
        raise CheckpointError(
            f"the original predicts {reference_TV.shape[1]} tokens and the other model "
            f"{logits_TV.shape[1]}. Give the original that it was made from."
        )
    return WindowScore(
        kl_nats=float(kl_divergence(reference_TV, logits_TV).sum()),
        cross_entropy_nats=next_token_entropy(logits_TV, window_T),
        agreements=int(top1_agreement(reference_TV, logits_TV).sum()),
    )


def _logits(model: PreTrainedModel, window_T: Tensor, *, what: str) -> Tensor:
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        logits_TV: Tensor = model(window_T[None].to(device)).logits[0]
    check_logits(logits_TV, what=what)
    return logits_TV


def check_logits(logits_TV: Tensor, *, what: str) -> None:
    """Refuse logits that are not finite; ``what`` says whose they are."""
    # Of both NaN is NaN, and nothing of the size of a vocabulary is made.
    if not bool(torch.isfinite(torch.stack(torch.aminmax(logits_TV))).all()):
        raise MofqError(
            f"{what} gives logits that are not finite. Use {option('dtype', 'float32')} or "
            f"bfloat16; if it already is, a scheme overflows."
        )


def next_token_entropy(logits_TV: Tensor, window_T: Tensor) -> float:
    """Cross entropy of a window, summed over its T - 1 next tokens [nats]."""
    targets_T = window_T[1:].to(logits_TV.device)
    return float(cross_entropy(logits_TV[:-1], targets_T).sum())
