"""Windows of a text as `mofq calibrate` cuts them, for scripts that run a model themselves."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mofq.evidence.corpora import Corpus, leading_tokens, spread_windows


def model_windows(
    tokenizer: PreTrainedTokenizerBase, text: Corpus, *, windows: int, sequence_length: int
) -> Tensor:
    """Windows spread over a text, which begin with BOS where the tokenizer puts it first.

    Without the BOS that a model was trained with the same errors may cost several times as much.

    Args:
        tokenizer: Of the model.
        text: To cut.
        windows: How many.
        sequence_length: Tokens of each, BOS included.

    Returns:
        Token ids, [windows, sequence_length].
    """
    return spread_windows(
        text,
        tokenizer,
        sequences=windows,
        sequence_length=sequence_length,
        leading=leading_tokens(tokenizer, "auto"),
    )
