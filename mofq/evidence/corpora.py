"""Text for calibration and validation, and its cut into windows of tokens."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mofq.exceptions import CorpusError, first_line, option

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

#: A corpus is a folder inside the stats folder, and nothing else.
CORPUS_NAME = r"^[^/\\.\x00-\x1f][^/\\\x00-\x1f]*$"

#: Whether windows begin with BOS: where the tokenizer adds it by itself, always, or never.
Bos = Literal["auto", "always", "never"]

#: File names of these kinds hold rows, read by these builders of `datasets` …
_ROW_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
#: … or between these delimiters; every other file is plain text.
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")

#: A hub data set is streamed, and reading stops after this many characters: the
#: text, and so its hash, do not depend on how many tokens are asked for.
HUB_CHARACTERS = 20_000_000

_KINDS = ".txt, .jsonl, .parquet, .csv or .tsv"

_HUB_SOURCE = re.compile(
    r"(?P<id>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?(:(?P<column>\w+))?"
)

#: Of the tokens of a text that a tokenizer has no words for, from which on it is told.
_UNKNOWN_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Corpus:
    """One text under a name."""

    name: str
    source: str  #: as the user wrote it
    text: str  #: of conversations, the messages of each as JSON on a line
    sha256: str  #: of the text's UTF-8 bytes
    is_conversations: bool = False  #: which the model's chat template turns into text
    skipped: int = 0  #: rows without text, which are left out

    def remarks(self) -> list[str]:
        """What a user should know of how it was read."""
        if not self.skipped:
            return []
        rows = "row" if self.skipped == 1 else "rows"
        return [f"text {self.source!r}: {self.skipped:,} {rows} without text left out."]


@dataclass(frozen=True, slots=True)
class _Content:
    """What a source holds."""

    text: str
    is_conversations: bool = False
    skipped: int = 0


def load_text(source: str, *, name: str | None = None) -> Corpus:
    """Read a text.

    Args:
        source: The name of a bundled text (``demo-en``); a local file, plain
            UTF-8 text or rows (``.jsonl``, ``.parquet``, ``.csv`` or ``.tsv`` with a
            header), whose column follows a colon (``notes.csv:body``; ``text``
            where none is named); or a hub
            data set, ``org/name[/config][:split][:column]``, of which the
            ``train`` split is read where none is named. Only a hub data set
            needs a network, and a local file always wins over it. Rows may also
            be conversations: lists of messages, each with ``role`` and ``content``,
            in the column ``messages`` where there is no ``text``.
        name: Of the corpus; the file's or data set's own where None.

    Returns:
        The text. Plain text is exactly the file's. Rows follow one another, a
        newline after each that does not end in one; a row without text (null, or an
        empty cell of a ``.csv``) is left out and counted.

    Raises:
        CorpusError: There is no such source, its bytes are not text, a column
            is missing or a row of it is neither text nor a conversation, or the text is empty.
    """
    if source in BUNDLED_TEXT:
        path, column, default_name = BUNDLED_TEXT[source], None, source
        content = _read_file(path, column)
    elif (local := _split_column(source)) is not None:
        path, column = local
        default_name = path.stem
        content = _read_file(path, column)
    elif (match := _HUB_SOURCE.fullmatch(source)) and not _names_file(source):
        default_name = match["id"].partition("/")[2]
        content = _read_hub(source, match)
    elif any(character in source for character in "*?["):
        raise CorpusError(
            f"text {source!r}: there is no such file, and a pattern of names is not expanded. "
            f"Join the files into one and give that."
        )
    else:
        raise CorpusError(
            f"text {source!r}: there is no such file. Give a {_KINDS} file, "
            f"a hub data set as org/name, or bundled text ({', '.join(BUNDLED_TEXT)})."
        )
    text = content.text
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
        is_conversations=content.is_conversations,
        skipped=content.skipped,
    )


def leading_tokens(tokenizer: Any, bos: Bos) -> tuple[int, ...]:
    """The tokens that every window begins with, as every prompt does in an engine.

    Args:
        tokenizer: A Hugging Face tokenizer.
        bos: ``auto``: what ``tokenizer(text)`` puts before a text, which is BOS or nothing for
            most; ``always``: that, and BOS where it puts nothing; ``never``: none.

    Returns:
        Token ids.

    Raises:
        CorpusError: BOS is asked for, and the tokenizer has none.
    """
    if bos == "never":
        return ()
    bare, full = _encode("a", tokenizer), _encode("a", tokenizer, add_special_tokens=True)
    starts = (at for at in range(len(full)) if full[at : at + len(bare)] == bare)
    added = tuple(full[: next(starts, 0)])
    if bos == "auto" or added:
        return added
    if tokenizer.bos_token_id is None:
        raise CorpusError(
            f"{option('bos', 'always')}: the tokenizer has no BOS token, which is `bos_token` in "
            f"tokenizer_config.json. Use {option('bos', 'auto')}."
        )
    return (int(tokenizer.bos_token_id),)


def differing_bos(*, windows: bool) -> str:
    """What is said where windows begin with BOS, or without, and those calibrated on did not."""
    ours, theirs = ("with", "without") if windows else ("without", "with")
    return (
        f"The windows begin {ours} BOS, and the calibration's {theirs}: what it predicts, and "
        f"static scales, are of another distribution. Begin both alike."
    )


def tokenize(
    corpus: Corpus,
    tokenizer: Any,
    *,
    tokens: int,
    sequence_length: int,
    leading: Sequence[int] = (),
    vocabulary_size: int | None = None,
) -> Tensor:
    """Windows of tokens to predict, spread evenly over a text: see ``spread_windows``.

    Neighbouring windows are much alike: a mean over the beginning of a text says less of
    the text than its standard error claims. A text of fewer than ``tokens`` tokens gives as
    many whole windows as it has.

    Args:
        corpus: The text.
        tokenizer: A Hugging Face tokenizer.
        tokens: How many tokens to use, at most.
        sequence_length: Tokens of one window, T.
        leading: Token ids that each window begins with, of ``leading_tokens``.
        vocabulary_size: Rows of the model's embedding, to check the tokens
            against.

    Returns:
        Windows ``[N, T]``, int64; ``N * T`` is the number of tokens used.

    Raises:
        CorpusError: There is not one whole window, a token is outside the
            model's vocabulary, or conversations cannot be turned into text.
    """
    if sequence_length < 2:
        raise CorpusError(
            f"{option('sequence_length', sequence_length)}: predicts nothing. Give 2 or more."
        )
    if tokens < sequence_length:
        raise CorpusError(
            f"{option('tokens', tokens)}: does not fill one window of {sequence_length}. Give "
            f"{option('tokens', sequence_length)} or more, or a shorter "
            f"{option('sequence_length')}."
        )
    windows_NT = spread_windows(
        corpus,
        tokenizer,
        sequences=tokens // sequence_length,
        sequence_length=sequence_length,
        leading=leading,
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
    leading: Sequence[int] = (),
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
        leading: Token ids that each window begins with, of ``leading_tokens``; the rest of
            its T tokens are the text's. Where the text itself begins with them there, as
            chat templates write BOS, they are not put before it again.
        or_fewer: Of a shorter text take as many windows as it holds.

    Returns:
        ``[N, T]``, int64. The windows do not overlap.

    Raises:
        CorpusError: The text is too short for so many windows, or conversations cannot be
            turned into text.
    """
    import torch

    if sequence_length <= len(leading):
        raise CorpusError(
            f"{option('sequence_length', sequence_length)}: holds no text behind the "
            f"{len(leading)} tokens that the tokenizer puts first. Give more."
        )
    text, needed = _text_of(corpus, tokenizer), sequences * sequence_length
    if len(text) > 64 * needed:
        starts = [len(text) * i // sequences for i in range(sequences)]
        excerpts = [text[start : start + 64 * sequence_length] for start in starts]
        windows = [_encode(excerpt, tokenizer)[:sequence_length] for excerpt in excerpts]
        if all(len(window) == sequence_length for window in windows):
            return torch.tensor([_begun(window, leading) for window in windows])
    ids = _encode(text, tokenizer)
    if or_fewer:
        sequences = min(sequences, max(1, len(ids) // sequence_length))
    needed = sequences * sequence_length
    if len(ids) < needed:
        raise CorpusError(
            f"text {corpus.source!r} has {len(ids)} tokens, and {sequences} × {sequence_length} "
            f"are needed. Give a longer text, fewer windows, or a shorter "
            f"{option('sequence_length')}."
        )
    starts = [(len(ids) - sequence_length) * i // max(sequences - 1, 1) for i in range(sequences)]
    windows = [ids[start : start + sequence_length] for start in starts]
    return torch.tensor([_begun(window, leading) for window in windows])


def windows_between(
    corpus: Corpus,
    tokenizer: Any,
    *,
    sequences: int,
    sequence_length: int,
    leading: Sequence[int] = (),
    every: int,
) -> Tensor | None:
    """Other windows of a text than `spread_windows` gives, each in the middle between two of those.

    Args:
        corpus: The text.
        tokenizer: A Hugging Face tokenizer.
        sequences: How many windows those are, at least 2.
        sequence_length: Tokens of one window, T.
        leading: As there.
        every: Behind one of so many of those there is one of these.

    Returns:
        ``[sequences // every, T]``, int64; None where they would overlap with those.

    Raises:
        CorpusError: Conversations cannot be turned into text.
    """
    import torch

    text = _text_of(corpus, tokenizer)
    behind = [every * n + every // 2 for n in range(sequences // every)]
    if len(text) > 64 * sequences * sequence_length:
        halves = [len(text) * (2 * i + 1) // (2 * sequences) for i in behind]
        windows = [
            _encode(text[start : start + 64 * sequence_length], tokenizer)[:sequence_length]
            for start in halves
        ]
        if all(len(window) == sequence_length for window in windows):
            return torch.tensor([_begun(window, leading) for window in windows])
    ids = _encode(text, tokenizer)
    apart = (len(ids) - sequence_length) / max(sequences - 1, 1)
    if apart < 2 * sequence_length + 1:
        return None
    starts = [int(apart * (i + 0.5)) for i in behind]
    return torch.tensor([_begun(ids[start : start + sequence_length], leading) for start in starts])


def unknown_words(tokenizer: Any, windows: Mapping[str, Tensor]) -> list[str]:
    """Sentences on texts that the tokenizer has no words for, as WikiText writes ``<unk>``.

    Its token for that is one that a model is hardly trained on, unless its name says that it is
    another, as the end of a text, which some tokenizers name here.

    Args:
        tokenizer: A Hugging Face tokenizer.
        windows: What a text is to the reader, as ``corpus en`` -> token ids.
    """
    word, unknown = tokenizer.unk_token, tokenizer.unk_token_id
    if word is None or "unk" not in word.lower():
        return []
    shares = {name: float((some == unknown).float().mean()) for name, some in windows.items()}
    return [
        f"{name}: {share:.1%} of its tokens are {word!r}, which models are hardly trained "
        f"on: what errors cost there says little of other text. Take the word out of the text, or "
        f"give another text."
        for name, share in shares.items()
        if share >= _UNKNOWN_SHARE
    ]


def check_context(model: PreTrainedModel, sequence_length: int) -> None:
    """Refuse windows longer than what a model was made for.

    Raises:
        CorpusError: They are.
    """
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        raise CorpusError(
            f"{option('sequence_length', sequence_length)}: the model's context is {longest}. "
            f"Give {option('sequence_length', longest)} or less."
        )


def _begun(window: list[int], leading: Sequence[int]) -> list[int]:
    """A window of the same length that begins with the leading tokens, once."""
    if window[: len(leading)] == list(leading):
        return window
    return [*leading, *window][: len(window)]


def _encode(text: str, tokenizer: Any, *, add_special_tokens: bool = False) -> list[int]:
    # verbose=False: a text longer than the model's context is expected here.
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
    ids: list[int] = encoded["input_ids"]
    return ids


def _text_of(corpus: Corpus, tokenizer: Any) -> str:
    """The text itself; conversations one after the other, as the chat template writes them."""
    if not corpus.is_conversations:
        return corpus.text
    if not tokenizer.chat_template:
        raise CorpusError(
            f"text {corpus.source!r} holds conversations, and the model's tokenizer has no chat "
            f"template to turn them into text. Give plain text, as a base model needs, or put the "
            f"template into the model's folder as chat_template.jinja."
        )
    parts = []
    for number, line in enumerate(corpus.text.removesuffix("\n").split("\n"), start=1):
        try:
            parts.append(tokenizer.apply_chat_template(json.loads(line), tokenize=False))
        except Exception as error:  # jinja2's own kinds, and any that a template raises
            raise CorpusError(
                f"text {corpus.source!r}: the model's chat template refuses conversation "
                f"{number}: {str(error).rstrip('.')}. Change it, or remove it."
            ) from error
    return "".join(parts)


def _names_file(source: str) -> bool:
    """Whether a source can only mean a file: a misspelt path must not reach for the network."""
    suffix = Path(source.partition(":")[0]).suffix.lower()
    return suffix in (".txt", ".md", *_ROW_BUILDERS, *_DELIMITERS, *_COMPRESSED)


def _split_column(source: str) -> tuple[Path, str | None] | None:
    """The local file that a source names and the column behind its colon."""
    if Path(source).exists():
        return Path(source), None
    file, colon, column = source.rpartition(":")
    if colon and file and Path(file).exists():
        return Path(file), column
    return None


def _read_file(path: Path, column: str | None) -> _Content:
    suffix = path.suffix.lower()
    try:
        if path.is_dir():
            raise CorpusError(
                f"text {path}: this is a folder. Join its files into one, and give that: "
                f"a {_KINDS} file."
            )
        if suffix in _COMPRESSED:
            raise CorpusError(f"text {path}: is compressed. Unpack it, and give what was in it.")
        if path.stat().st_size == 0:
            return _Content("")
        if suffix in _ROW_BUILDERS:
            rows = _dataset_rows(
                str(path), _ROW_BUILDERS[suffix], data_files=str(path), split="train"
            )
            return _joined(str(path), rows, column)
        if suffix in _DELIMITERS:
            # utf-8-sig: spreadsheets write a byte-order mark, which would be in the first name.
            text = path.read_bytes().decode("utf-8-sig")
            return _joined(str(path), _cells(path, text, _DELIMITERS[suffix]), column)
        if column is not None:
            raise CorpusError(
                f"text {path}: plain text has no column {column!r}. "
                f"Columns belong to .jsonl, .parquet, .csv and .tsv files."
            )
        return _Content(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"text {path}: byte {error.start} is not UTF-8 ({error.reason}). "
            f"Convert the file to UTF-8 text."
        ) from error
    except OSError as error:
        raise CorpusError(f"text {path} cannot be read: {error.strerror or error}.") from error


def _read_hub(source: str, match: re.Match[str]) -> _Content:
    rows = _dataset_rows(source, match["id"], name=match["config"], split=match["split"] or "train")
    return _joined(source, rows, match["column"], most=HUB_CHARACTERS)


def _joined(
    source: str, rows: Iterable[Mapping[str, Any]], column: str | None, *, most: float = math.inf
) -> _Content:
    """One column of rows, up to a number of characters, as one text."""
    parts, is_conversations, characters, skipped = [], False, 0, 0
    for number, row in enumerate(rows, start=1):
        part = _row_text(source, number, row, column)
        if part is None:
            skipped += 1
            continue
        parts.append(part.text)
        is_conversations |= part.is_conversations
        characters += len(part.text)
        if characters >= most:
            break
    return _Content("".join(parts), is_conversations, skipped)


def _dataset_rows(source: str, path: str, **options: Any) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set, as the library gives them one by one."""
    import datasets

    number = 0
    try:
        with _quiet("datasets"):
            for row in datasets.load_dataset(path, streaming=True, **options):
                number += 1
                yield row
    except Exception as error:  # the library raises dozens of kinds for a broken source
        remedy = (
            "The file is damaged or of another kind: make it again."
            if "data_files" in options
            else "Give a local file, or a data set of the hub where there is a network."
        )
        raise CorpusError(
            f"text {source!r} cannot be read after row {number}: {first_line(error)}. {remedy}"
        ) from error


def _cells(path: Path, text: str, delimiter: str) -> Iterator[Mapping[str, str | None]]:
    """The rows of a table with a header (RFC 4180); None for cells that are empty or not there."""
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(sys.maxsize)  # of a cell, 131,072 by default: less than a book
    number = 0
    try:
        for row in rows:
            if None in row:
                raise csv.Error("more cells than the header has")
            number += 1
            yield {name: cell or None for name, cell in row.items()}
    except csv.Error as error:
        raise CorpusError(
            f"text {path}: cannot be read after row {number}: {error}. "
            f'Write cells that hold a delimiter, a line break or a " between "…", each " in '
            f"them twice."
        ) from error
    finally:
        csv.field_size_limit(limit)


def _row_text(
    source: str, number: int, row: Mapping[str, Any], column: str | None
) -> _Content | None:
    """The text of a row, or its conversation as JSON; None where it has neither."""
    chats = [name for name in ("messages", "conversations") if name in row and "text" not in row]
    column = column or next(iter(chats), "text")
    if column not in row:
        raise CorpusError(
            f"text {source!r} has no column {column!r}; it has {', '.join(map(repr, row))}. "
            f"Name the one with the text behind a colon."
        )
    value = row[column]
    if value is None:
        return None
    where = f"text {source!r}: row {number} of column {column!r}"
    if isinstance(value, list):
        # A column of a data set has one type: where a row is a conversation, all are.
        return _Content(json.dumps(_messages(where, value), ensure_ascii=False) + "\n", True)
    if not isinstance(value, str):
        raise CorpusError(
            f"{where} holds {type(value).__name__}, "
            f"not text. Remove the row, or name another column behind a colon."
        )
    return _Content(value if value.endswith("\n") else value + "\n")


def _messages(where: str, value: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages of a conversation, without the keys that only other rows have."""
    messages = [
        {key: one for key, one in message.items() if one is not None}
        for message in value
        if isinstance(message, Mapping)
    ]
    texts = ("role", "content")
    is_chat = all(isinstance(one.get(key), str) for one in messages for key in texts)
    if not messages or len(messages) < len(value) or not is_chat:
        raise CorpusError(
            f"{where} is no conversation: needed a list of messages, each with `role` and "
            f"`content`, both text. Write it so, or name a column of text behind a colon."
        )
    return messages


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
