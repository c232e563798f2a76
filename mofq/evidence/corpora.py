"""Text for calibration and validation, and its cut into windows of tokens."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mofq.exceptions import CorpusError, nearest_name

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_TEXTS = Path(__file__).parent.parent / "demo" / "texts"

#: Text that ships with the package: held-out, and part of what the demo model was trained on.
BUNDLED_TEXT = {
    "demo-en": _TEXTS / "heldout-en.txt",
    "demo-pt": _TEXTS / "heldout-pt.txt",
    "demo-en-calibration": _TEXTS / "calibration-en.txt",
    "demo-pt-calibration": _TEXTS / "calibration-pt.txt",
}

#: File names of these kinds hold rows; every other file is plain text.
_ROW_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}

#: A hub data set is streamed, and reading stops after this many characters: the
#: text, and so its hash, do not depend on how many tokens are asked for.
HUB_CHARACTERS = 20_000_000

_HUB_SOURCE = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?(:(?P<column>\w+))?"
)


@dataclass(frozen=True, slots=True)
class Corpus:
    """One text under a name."""

    name: str
    source: str  #: as the user wrote it
    text: str
    sha256: str  #: of the text's UTF-8 bytes


def load_text(source: str, *, name: str | None = None) -> Corpus:
    """Read a text.

    Args:
        source: The name of a bundled text (``demo-en``); a local file, plain
            UTF-8 text or ``.jsonl``/``.parquet`` rows, whose column follows a
            colon (``notes.jsonl:body``; ``text`` where none is named); or a hub
            data set, ``org/name[/config][:split][:column]``, of which the
            ``train`` split is read where none is named. Only a hub data set
            needs a network, and a local file always wins over it.
        name: Of the corpus; the file's or data set's own where None.

    Returns:
        The text. Plain text is exactly the file's. Rows follow one another, a
        newline after each that does not end in one.

    Raises:
        CorpusError: There is no such source, its bytes are not text, a column
            is missing or a row of it is not text, or the text is empty.
    """
    if source in BUNDLED_TEXT:
        path, column, default_name = BUNDLED_TEXT[source], None, source
        text = _read_file(path, column)
    elif (local := _split_column(source)) is not None:
        path, column = local
        default_name = path.stem
        text = _read_file(path, column)
    elif (match := _HUB_SOURCE.fullmatch(source)) and not _names_file(source):
        default_name = match["id"].partition("/")[2]
        text = _read_hub(source, match)
    else:
        raise CorpusError(
            f"text {source!r}: there is no such file. Give a .txt, .jsonl or .parquet file, "
            f"a hub data set as org/name, or bundled text ({', '.join(BUNDLED_TEXT)})."
        )
    if not text.strip():
        raise CorpusError(f"text {source!r} is empty. Give a file that has some text.")
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"text {source!r}: character {error.start} is half of a surrogate pair, which is not "
            f"text. Remove it."
        ) from error
    return Corpus(
        name=name or default_name,
        source=source,
        text=text,
        sha256=hashlib.sha256(encoded).hexdigest(),
    )


def tokenize(
    corpus: Corpus,
    tokenizer: Any,
    *,
    tokens: int,
    sequence_length: int,
    vocabulary_size: int | None = None,
) -> Tensor:
    """Windows of tokens to predict, spread evenly over a text: see ``spread_windows``.

    Neighbouring windows are much alike: a mean over the beginning of a text says less of
    the text than its standard error claims. No special token is added. A text of fewer
    than ``tokens`` tokens gives as many whole windows as it has.

    Args:
        corpus: The text.
        tokenizer: A Hugging Face tokenizer.
        tokens: How many tokens to use, at most.
        sequence_length: Tokens of one window, T.
        vocabulary_size: Rows of the model's embedding, to check the tokens
            against.

    Returns:
        Windows ``[N, T]``, int64; ``N * T`` is the number of tokens used.

    Raises:
        CorpusError: There is not one whole window, or a token is outside the
            model's vocabulary.
    """
    if sequence_length < 2:
        raise CorpusError(
            f"a sequence length of {sequence_length} predicts nothing; give 2 or more."
        )
    if tokens < sequence_length:
        raise CorpusError(
            f"{tokens} tokens do not fill one window of {sequence_length}. "
            f"Ask for more tokens, or for a shorter sequence length."
        )
    windows_NT = spread_windows(
        corpus,
        tokenizer,
        sequences=tokens // sequence_length,
        sequence_length=sequence_length,
        or_fewer=True,
    )
    if vocabulary_size is not None and int(windows_NT.max()) >= vocabulary_size:
        raise CorpusError(
            f"text {corpus.source!r}: the tokenizer gives token {int(windows_NT.max())}, but the "
            f"model's vocabulary has {vocabulary_size}. Use the model's own tokenizer."
        )
    return windows_NT


def spread_windows(
    corpus: Corpus,
    tokenizer: Any,
    *,
    sequences: int,
    sequence_length: int,
    or_fewer: bool = False,
) -> Tensor:
    """Windows of tokens spread evenly over a whole text; the first starts at its beginning.

    A text of many megabytes is cut into as many excerpts first, and only those are
    tokenized.

    Args:
        corpus: The text.
        tokenizer: A Hugging Face tokenizer.
        sequences: How many windows, N.
        sequence_length: Tokens of one window, T.
        or_fewer: Of a shorter text take as many windows as it holds.

    Returns:
        ``[N, T]``, int64. The windows do not overlap.

    Raises:
        CorpusError: The text is too short for so many windows.
    """
    import torch

    needed = sequences * sequence_length
    if len(corpus.text) > 64 * needed:
        starts = [len(corpus.text) * i // sequences for i in range(sequences)]
        excerpts = [corpus.text[start : start + 64 * sequence_length] for start in starts]
        windows = [_encode(excerpt, tokenizer)[:sequence_length] for excerpt in excerpts]
        if all(len(window) == sequence_length for window in windows):
            return torch.tensor(windows, dtype=torch.int64)
    ids = _encode(corpus.text, tokenizer)
    if or_fewer:
        sequences = min(sequences, max(1, len(ids) // sequence_length))
    needed = sequences * sequence_length
    if len(ids) < needed:
        raise CorpusError(
            f"text {corpus.source!r} has {len(ids)} tokens, and windows of {sequence_length} "
            f"tokens, {sequences} in number, need {needed}. Give a longer text, or ask for fewer "
            f"or shorter windows."
        )
    starts = [(len(ids) - sequence_length) * i // max(sequences - 1, 1) for i in range(sequences)]
    return torch.tensor([ids[start : start + sequence_length] for start in starts])


def check_context(model: PreTrainedModel, sequence_length: int) -> None:
    """Refuse windows longer than what a model was made for.

    Raises:
        CorpusError: They are.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise CorpusError(
            f"a sequence length of {sequence_length} is more than the model's context of "
            f"{longest}. Give a shorter one."
        )


def _encode(text: str, tokenizer: Any) -> list[int]:
    # verbose=False: a text longer than the model's context is expected here.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _names_file(source: str) -> bool:
    """Whether a source can only mean a file: a misspelt path must not reach for the network."""
    return Path(source.partition(":")[0]).suffix.lower() in (".txt", ".md", *_ROW_BUILDERS)


def _split_column(source: str) -> tuple[Path, str | None] | None:
    """The local file that a source names and the column behind its colon."""
    if Path(source).exists():
        return Path(source), None
    file, colon, column = source.rpartition(":")
    if colon and file and Path(file).exists():
        return Path(file), column
    return None


def _read_file(path: Path, column: str | None) -> str:
    builder = _ROW_BUILDERS.get(path.suffix.lower())
    try:
        if path.is_dir():
            raise CorpusError(
                f"text {path}: this is a folder. Give a .txt, .jsonl or .parquet file."
            )
        if builder is None and column is not None:
            raise CorpusError(
                f"text {path}: plain text has no column {column!r}. "
                f"Columns belong to .jsonl and .parquet files."
            )
        if builder is None:
            return path.read_bytes().decode("utf-8")
        if path.stat().st_size == 0:
            return ""
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"text {path}: byte {error.start} is not UTF-8 ({error.reason}). "
            f"Convert the file to UTF-8 text."
        ) from error
    except OSError as error:
        raise CorpusError(f"text {path} cannot be read: {error.strerror or error}.") from error
    rows = _row_texts(str(path), builder, column, data_files=str(path), split="train")
    return "".join(rows)


def _read_hub(source: str, match: re.Match[str]) -> str:
    rows = _row_texts(
        source, match["id"], match["column"], name=match["config"], split=match["split"] or "train"
    )
    parts = []
    characters = 0
    for part in rows:
        parts.append(part)
        characters += len(part)
        if characters >= HUB_CHARACTERS:
            break
    return "".join(parts)


def _row_texts(source: str, path: str, column: str | None, **options: Any) -> Iterator[str]:
    import datasets

    number = 0
    try:
        with _quiet("datasets"):
            for row in datasets.load_dataset(path, streaming=True, **options):
                number += 1
                yield _row_text(source, number, row, column or "text")
    except CorpusError:
        raise
    except Exception as error:  # the library raises dozens of kinds for a broken source
        reason = str(error).partition("\n")[0] or type(error).__name__
        remedy = (
            "The file is damaged or of another kind: make it again."
            if "data_files" in options
            else "Give a local file, or a data set of the hub where there is a network."
        )
        raise CorpusError(
            f"text {source!r} cannot be read after row {number}: {reason.rstrip('.')}. {remedy}"
        ) from error


def _row_text(source: str, number: int, row: Mapping[str, Any], column: str) -> str:
    chat = next((name for name in ("messages", "conversations") if name in row), None)
    if chat is not None and column in (chat, "text") and not isinstance(row.get(column), str):
        raise CorpusError(
            f"text {source!r}: column {chat!r} holds chats, which only a model's template turns "
            f"into text. Write them to a .txt file with tokenizer.apply_chat_template(messages, "
            f"tokenize=False) (docs/how-to/recipe.md)."
        )
    if column not in row:
        raise CorpusError(
            f"text {source!r} has no column {column!r}.{nearest_name(column, row)} "
            f"Name it behind a colon."
        )
    value = row[column]
    if not isinstance(value, str):
        raise CorpusError(
            f"text {source!r}: row {number} of column {column!r} holds {type(value).__name__}, "
            f"not text. Remove the row, or name another column behind a colon."
        )
    return value if value.endswith("\n") else value + "\n"


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keep a library from logging an error that is raised, and reported, anyway."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
