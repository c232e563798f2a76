"""Cuts a text into the windows that an original and its candidates are compared on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mofq.evidence.corpora import (
    Bos,
    Corpus,
    check_context,
    leading_tokens,
    tokenize,
    unknown_words,
)
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.loading import load_tokenizer


@dataclass(frozen=True, slots=True)
class Windows:
    """A text in windows, by the tokenizer of the original."""

    tokens_NT: Tensor
    leading: tuple[int, ...]  #: token ids that each begins with
    tokenizer: PreTrainedTokenizerBase
    cut_by: Callable[[PreTrainedTokenizerBase], Tensor]  #: the same text by another tokenizer

    def tell_unknown(self, text: Corpus, tell: Callable[[str], None] | None) -> None:
        """Say where the tokenizer has no words for much of the text."""
        if tell is not None:
            for remark in unknown_words(self.tokenizer, {f"text {text.name}": self.tokens_NT}):
                tell(remark)


def cut_windows(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    text: Corpus,
    *,
    tokens: int,
    sequence_length: int,
    bos: Bos,
) -> Windows:
    """Cut a text into windows for a model.

    Args:
        checkpoint: With the tokenizer.
        model: That is to run them; it may be without weights.
        text: To predict.
        tokens: How many to use, at most, in windows spread over the text.
        sequence_length: Tokens of a window.
        bos: Whether windows begin with BOS, as in ``leading_tokens``.

    Raises:
        MofqError: A window is longer than the model's context, the text fills no window, or the
            tokenizer has tokens that the model does not know.
    """
    check_context(model, sequence_length)
    tokenizer = load_tokenizer(checkpoint.folder)
    leading = leading_tokens(tokenizer, bos)
    cut_by = partial(
        tokenize,
        text,
        tokens=tokens,
        sequence_length=sequence_length,
        leading=leading,
        vocabulary_size=model.get_input_embeddings().weight.shape[0],
    )
    return Windows(cut_by(tokenizer), leading, tokenizer, cut_by)
