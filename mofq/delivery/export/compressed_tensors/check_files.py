"""Compares the files beside the weights of an exported folder with those of the original."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mofq.delivery.deviation import Deviation
from mofq.exceptions import CheckpointError
from mofq.files.documents import parse_json, shown
from mofq.model.checkpoint.headers import INDEX_FILE, Checkpoint
from mofq.model.checkpoint.writer import WEIGHT_FILES, find_other_files

#: What tokenizers and engines read beside the config and the weights.
#: Source: vLLM 0.32.0 transformers_utils/config.py, tokenizers/registry.py; transformers 5.23.0.
_READ = (
    *("generation_config.json", "*token*.json", "vocab*", "merges.txt", "tekken.json", "*.spm"),
    *("*.model", "tokenizer.model.*", "*.tiktoken", "*.jinja", "chat_template*"),
    "*processor_config.json",
    # Other configs: of quantization where config.json has none, of Mistral's own format, of an
    # adapter, of what sentence-transformers runs after the model.
    *("*quant*_config.json", "params.json", "adapter_config.json", "modules.json"),
    *("*sentence_*.json", "sparse_attention_config.json"),
)
#: What vLLM takes for a checkpoint in Mistral's format, and then reads alone.
_OF_MISTRAL = "consolidated*"
#: Differences of one file that are named: two vocabularies may differ in every line.
_MOST_DIFFERENCES = 20


def find_file_deviations(checkpoint: Checkpoint, exported: Checkpoint) -> Iterator[Deviation]:
    """Where tokenizer, generation config and chat template are not the original's.

    JSON is compared by its content, every other file byte for byte.

    Args:
        checkpoint: The original.
        exported: The folder that was exported from it.

    Yields:
        Files, and keys in them, that are missing, new or different; files of weights that are not
        those of the checkpoint.
    """
    folder = exported.folder
    shards = {info.file.name for info in exported.tensors.values()}
    for name in sorted(shards):
        if not name.endswith(".safetensors") or Path(name).match(_OF_MISTRAL):
            yield Deviation(
                name, "holds weights under a name where engines look for none; export again"
            )
    for name in sorted(_matching(folder, WEIGHT_FILES) - shards - {INDEX_FILE}):
        yield Deviation(
            name, "is a file of weights that the checkpoint does not name; engines may load it"
        )
    needed, found = find_other_files(checkpoint.folder), find_other_files(folder)
    patterns = _READ + (("*.py",) if _has_code(checkpoint.folder) else ())
    names = needed.keys() | found.keys() | _matching(folder, patterns)
    # Of the folders that belong to a model all files are read.
    for name in sorted(one for one in names if "/" in one or _matches(one, patterns)):
        theirs = folder / name
        if not theirs.is_file():
            yield Deviation(name, "is missing, and the original has it")
        elif name not in needed:
            yield Deviation(name, "is not among the original's files, and is read when served")
        elif (ours := needed[name].read_bytes()) != (read := theirs.read_bytes()):
            yield from islice(_file_differences(name, ours, read), _MOST_DIFFERENCES)


def json_differences(needed: Any, found: Any, where: str) -> Iterator[Deviation]:
    """Every key under which two JSON values differ.

    Args:
        needed: The value as it should be.
        found: The value to compare.
        where: File and key of both.

    Yields:
        The innermost key, with both values.
    """
    if isinstance(needed, dict) and isinstance(found, dict):
        for key in [*needed, *(key for key in found if key not in needed)]:
            inner = f"{where}: {key}"
            if key not in found:
                yield Deviation(inner, f"is missing, needed {shown(needed[key])}")
            elif key not in needed:
                yield Deviation(inner, f"is not known here, found {shown(found[key])}")
            else:
                yield from json_differences(needed[key], found[key], inner)
    elif isinstance(needed, list) and isinstance(found, list) and len(needed) == len(found):
        for number, (left, right) in enumerate(zip(needed, found, strict=True)):
            yield from json_differences(left, right, f"{where}: {number}")
    elif reason := _names_difference(needed, found):
        yield Deviation(where, reason)
    # 1, 1.0 and true are equal in Python, and not to whoever reads the file.
    elif type(needed) is not type(found) or needed != found:
        yield Deviation(where, f"needed {shown(needed)}, found {shown(found)}")


def _names_difference(needed: Any, found: Any) -> str:
    """What one of two lists of names lacks and has besides; empty where that says nothing."""
    if not all(
        isinstance(names, list) and all(isinstance(one, str) for one in names)
        for names in (needed, found)
    ):
        return ""
    lacking = [name for name in needed if name not in found]
    besides = [name for name in found if name not in needed]
    told = []
    if lacking:
        told.append(f"lacks {len(lacking)} of {len(needed)} names, such as {lacking[0]}")
    if besides:
        told.append(f"has {len(besides)} that are not known here, such as {besides[0]}")
    return ", and ".join(told)


def _matching(folder: Path, patterns: Iterable[str]) -> set[str]:
    return {
        path.name for path in folder.iterdir() if path.is_file() and _matches(path.name, patterns)
    }


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(Path(name).match(pattern) for pattern in patterns)


def _has_code(folder: Path) -> bool:
    """Whether the config or the tokenizer names Python files beside it (``auto_map``)."""
    configs = (folder / "config.json", folder / "tokenizer_config.json")
    return any(path.is_file() and b'"auto_map"' in path.read_bytes() for path in configs)


def _file_differences(name: str, needed: bytes, found: bytes) -> Iterator[Deviation]:
    if not name.endswith(".json"):
        yield Deviation(name, "is not the original's")
        return
    try:
        # Of a key that stands twice, readers take the first, the last, or neither.
        ours, theirs = (
            parse_json(content, name, CheckpointError, finite=False) for content in (needed, found)
        )
    except CheckpointError as error:
        yield Deviation(name, f"is not the original's, and cannot be compared: {error}")
        return
    yield from json_differences(ours, theirs, name)
