"""Cuts the calibration text into the windows that every peer is given."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from safetensors.torch import save_file

from mofq.evidence.corpora import leading_tokens, load_text, spread_windows
from mofq.model.loading import load_tokenizer
from scripts.reproduce.peers.handover import TEXTS, WINDOWS

#: A text that is tokenized again may give fewer tokens at its ends; peers cut what is more.
_EXTRA = 16


def write_windows(
    model: str, text: str, folder: Path, *, windows: int, sequence_length: int
) -> None:
    """Write windows spread over a text, as token ids and as texts.

    Args:
        model: Folder, whose tokenizer says whether windows begin with BOS.
        text: A file.
        folder: Is made.
        windows: How many.
        sequence_length: Tokens of each, BOS included.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(Path(model))
    corpus, leading = load_text(text), leading_tokens(tokenizer, "auto")
    cut = partial(spread_windows, corpus, tokenizer, sequences=windows)
    tokens_NT = cut(sequence_length=sequence_length, leading=leading)
    longer_NT = cut(sequence_length=sequence_length + _EXTRA)
    save_file({"tokens": tokens_NT}, folder / WINDOWS)
    texts = [tokenizer.decode(window_T) for window_T in longer_NT]
    (folder / TEXTS).write_text(json.dumps(texts, ensure_ascii=False), "utf-8")
