"""Windows of a text as `mofq calibrate` cuts them, for scripts that run a model themselves."""

from __future__ import annotations

from torch import Tensor

from mofq.evidence.corpora import Corpus, leading_tokens, spread_windows
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.loading import load_tokenizer


def model_windows(
    checkpoint: Checkpoint, text: Corpus, *, windows: int, sequence_length: int
) -> Tensor:
    """Windows spread over a text, which begin with BOS where the tokenizer puts it first.

    Without the BOS that a model was trained with the same errors may cost several times as much.

    Args:
        checkpoint: The model.
        text: To cut.
        windows: How many.
        sequence_length: Tokens of each, BOS included.

    Returns:
        Token ids, [windows, sequence_length].
    """
    tokenizer = load_tokenizer(checkpoint.folder)
    return spread_windows(
        text,
        tokenizer,
        sequences=windows,
        sequence_length=sequence_length,
        leading=leading_tokens(tokenizer, "auto"),
    )
