"""Compares the files beside the weights of an exported folder with those of the original."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mofq.delivery.deviation import Deviation
from mofq.files.documents import shown
from mofq.model.checkpoint.headers import INDEX_FILE, Checkpoint
from mofq.model.checkpoint.writer import WEIGHT_FILES

#: What tokenizers and engines read beside the config and the weights.
_READ = (
    *("generation_config.json", "*token*.json", "vocab*", "merges.txt", "tekken.json"),
    *("*.model", "*.tiktoken", "*.jinja", "chat_template*", "*processor_config.json"),
)
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
    own = {INDEX_FILE, *(info.file.name for info in exported.tensors.values())}
    for name in sorted(_files(folder, WEIGHT_FILES) - own):
        yield Deviation(
            name, "is a file of weights that the checkpoint does not name; engines may load it"
        )
    for name in sorted(_files(checkpoint.folder, _READ) | _files(folder, _READ)):
        ours, theirs = checkpoint.folder / name, folder / name
        if not theirs.is_file():
            yield Deviation(name, "is missing, and the original has it")
        elif not ours.is_file():
            yield Deviation(name, "is not among the original's files, and is read when served")
        elif (needed := ours.read_bytes()) != (found := theirs.read_bytes()):
            yield from islice(_file_differences(name, needed, found), _MOST_DIFFERENCES)


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


def _files(folder: Path, patterns: Iterable[str]) -> set[str]:
    return {
        path.name
        for path in folder.iterdir()
        if path.is_file() and any(path.match(pattern) for pattern in patterns)
    }


def _file_differences(name: str, needed: bytes, found: bytes) -> Iterator[Deviation]:
    if not name.endswith(".json"):
        yield Deviation(name, "is not the original's")
        return
    try:
        yield from json_differences(json.loads(needed), json.loads(found), name)
    except ValueError:
        yield Deviation(name, "is not the original's, and no valid JSON")
