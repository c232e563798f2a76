"""Names, dtypes, shapes and byte ranges of a checkpoint's tensors. Reads no weight, needs no torch.

A checkpoint is untrusted input: files, shards and links that do not fit its index are refused.
The hub's client fetches a model, and does not check a folder's shards against their index.

Source: the safetensors format, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mofq.exceptions import CheckpointError, first_line
from mofq.files.documents import shown
from mofq.model.checkpoint.fp8 import (
    find_left_over,
    is_of_activations,
    read_fp8,
    stated_quantization,
    without_quantization,
)
from mofq.model.checkpoint.packed import read_packed
from mofq.model.checkpoint.safetensors_header import (
    AGAIN,
    DTYPE_BITS,
    TensorInfo,
    read_header,
    read_json,
)

__all__ = [
    "CONFIG_FILE",
    "DTYPE_BITS",
    "INDEX_FILE",
    "SINGLE_FILE",
    "Checkpoint",
    "TensorInfo",
    "find_model_folders",
    "have_same_values",
    "open_checkpoint",
    "open_stored",
    "read_header",
    "read_json",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
_COMPARED_BYTES = 16 * 2**20
#: Buffers that older checkpoints list in their index, and every model computes by itself.
_COMPUTED = ".rotary_emb.inv_freq"

_GGUF = (
    "GGUF is what llama.cpp runs, quantized already or not. Give the Hugging Face folder that it"
    " was converted from; `mofq export --to llama.cpp` makes types for llama-quantize of a recipe."
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: By which sentence-transformers knows its models: which folders hold what comes after them.
MODULES_FILE = "modules.json"
_TEMPLATES_FOLDER = "additional_chat_templates"
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder, known by its config and the headers of its shards."""

    folder: Path
    name: str  #: hub id, or the folder's own name
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    index_sha256: str  #: of every stored tensor's name, dtype and shape, and of the stored config
    #: Scales and codes of a quantized source, which are no tensors of the model.
    consumed: dict[str, TensorInfo] = field(default_factory=dict)
    source_format: str | None = None  #: of a quantized source; None: the weights are as they are
    left_over: str | None = None  #: a key of its config: a quantization that it has not got


def open_checkpoint(model: str) -> Checkpoint:
    """Read the config and all headers of a model that is to be quantized.

    The weights of a checkpoint of a known quantization know their scales, and are read as the
    float32 values that they stand for; its scales are no tensors of the model, and its config
    says nothing of a quantization. Nor does that of a checkpoint whose tensors are not
    quantized, where a tool left such a config behind.

    Args:
        model: A folder with ``config.json`` and safetensors weights (one file, or
            shards and their index), or a hub id such as ``"Qwen/Qwen3-0.6B"``,
            which is fetched into the hub's cache. An existing path wins.

    Returns:
        The checkpoint. Quantized ones of other kinds open too; ``find_layers`` refuses them.

    Raises:
        CheckpointError: No such folder, a file is missing or damaged, the shards
            disagree with their index, or a quantized weight has no scale that fits it.
    """
    stored = open_stored(model)
    stated, _ = stated_quantization(stored.folder, stored.config)
    packed = None
    if isinstance(stated, dict):
        packed = read_packed(stored.folder, stated, stored.tensors)
    tensors, consumed, formats = stored.tensors, {}, []
    if packed is not None:
        consumed = packed.consumed
        consumed |= {n: info for n, info in packed.tensors.items() if is_of_activations(n)}
        tensors = {n: info for n, info in packed.tensors.items() if n not in consumed}
        formats.append(packed.description)
    fp8 = read_fp8(stored.folder, stored.config, tensors)
    if fp8 is not None:
        tensors, consumed = fp8.tensors, {**consumed, **fp8.consumed}
        formats.append(fp8.description)
    if not formats:
        left_over = find_left_over(stored.config, stored.tensors)
        if left_over is None:
            return stored
        return replace(stored, config=without_quantization(stored.config), left_over=left_over)
    return replace(
        stored,
        config=without_quantization(stored.config),
        tensors=tensors,
        consumed=consumed,
        source_format=" and ".join(formats),
    )


def open_stored(model: str) -> Checkpoint:
    """Read the config and all headers of a checkpoint, every tensor as it is stored.

    Args:
        model: As for `open_checkpoint`.

    Returns:
        The checkpoint, whether it is quantized or not.

    Raises:
        CheckpointError: No such folder, a file is missing or damaged, or the
            shards disagree with their index.
    """
    path = Path(model).expanduser()
    if os.path.isdir(path):
        folder, name = path, path.resolve().name
    elif os.path.exists(path):
        raise CheckpointError(
            f"{model}: needed the folder of a model, found a file."
            + (f" {_GGUF}" if path.suffix == ".gguf" else f" Give {str(path.parent)!r}.")
        )
    elif HUB_ID.fullmatch(model):
        folder, name = _fetch_from_hub(model), model
    else:
        raise CheckpointError(f"{model}: no such folder.{_nearest_folder(path)}")
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder}: needed {CONFIG_FILE}, found none.{_model_folder_inside(folder)}"
            f" {_what_else(folder)}"
        )
    _check_links(folder)
    config = read_json(folder / CONFIG_FILE)
    tensors = _read_all_headers(folder)
    return Checkpoint(folder, name, config, tensors, _hash_index(config, tensors))


def have_same_values(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors are of one dtype and shape, and the same byte for byte.

    Raises:
        CheckpointError: A file cannot be read.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.nbytes != other.nbytes or not one.nbytes:  # nothing: a model in memory
        return one.nbytes == other.nbytes
    try:
        with one.file.open("rb") as first, other.file.open("rb") as second:
            first.seek(one.start)
            second.seek(other.start)
            for done in range(0, one.nbytes, _COMPARED_BYTES):
                size = min(_COMPARED_BYTES, one.nbytes - done)
                if first.read(size) != second.read(size):
                    return False
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}.") from error
    return True


def find_model_folders(folder: Path) -> list[str]:
    """The folders inside a model's folder that belong to the model.

    Args:
        folder: Of the model.

    Returns:
        Plain names: of further chat templates, and of the modules that sentence-transformers
        runs after the model, such as ``1_Pooling``.
    """
    names = [_TEMPLATES_FOLDER, *_modules(folder)]
    return [name for name in dict.fromkeys(names) if (folder / name).is_dir()]


def _modules(folder: Path) -> list[str]:
    """The folders that ``modules.json`` names, by their plain names."""
    try:
        modules = json.loads((folder / MODULES_FILE).read_bytes())
    except (OSError, ValueError, RecursionError):  # none, or none of sentence-transformers
        return []
    paths = [one.get("path") for one in modules if isinstance(one, dict)]
    return [path for path in paths if isinstance(path, str) and re.fullmatch(r"\w[\w.-]*", path)]


def _check_links(folder: Path) -> None:
    """Refuse files of a model that lie elsewhere, other than in the hub's cache."""
    real = folder.resolve()
    for path in sorted(folder.iterdir()):
        if not path.is_symlink() or not any(path.match(each) for each in _HUB_PATTERNS):
            continue
        target = path.resolve()
        if not target.is_relative_to(real) and target.parent.name != "blobs":
            raise CheckpointError(
                f"{path}: is a link to {target}, outside of the model's folder, and what lies"
                " there is not read. Put the file itself into the folder."
            )


def _read_all_headers(folder: Path) -> dict[str, TensorInfo]:
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if index.exists():
        return _read_shards(index)
    if single.exists():
        return read_header(single)
    raise CheckpointError(
        f"{folder}: needed {SINGLE_FILE} or {INDEX_FILE}, found neither. {_instead(folder)}"
    )


def _instead(folder: Path) -> str:
    """What to do about a folder whose weights have no name under which they are looked for."""
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if len(others) == 1:
        return (
            f"If {others[0]!r} holds all weights, name it {SINGLE_FILE}; else fetch {INDEX_FILE}."
        )
    if others:
        return f"{others[0]!r} is one of {len(others)} shards; fetch {INDEX_FILE} too."
    if pickled:
        return (
            f"{pickled[0]} is a pickle, which can run code and is never read here: have it"
            " converted to safetensors first."
        )
    return AGAIN


def _read_shards(index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index}: needed a 'weight_map' of tensor names, found none. {AGAIN}"
        )
    shards = sorted({_shard_name(index, key, file) for key, file in weight_map.items()})
    if shards != [SINGLE_FILE] and (index.parent / SINGLE_FILE).exists():
        raise CheckpointError(
            f"{index.parent}: found both {SINGLE_FILE} and {INDEX_FILE}, which names other files;"
            " engines differ in which they load. Remove the one that is not meant."
        )
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        path = index.parent / shard
        if not path.is_file():
            raise CheckpointError(
                f"{path}: {INDEX_FILE} needs this shard, and it is missing. Fetch it again."
            )
        # Readers take all that a shard holds, wherever the index places it.
        for name, info in read_header(path).items():
            if name in tensors and not have_same_values(info, tensors[name]):
                raise CheckpointError(
                    f"{path}: holds tensor {name!r}, and {tensors[name].file.name} another one of"
                    " this name; engines take the one that they read last. Remove the one that is"
                    " not meant."
                )
            tensors.setdefault(name, info)
    for name, shard in weight_map.items():
        if name not in tensors and not name.endswith(_COMPUTED):
            raise CheckpointError(
                f"{index}: tensor {name!r} is needed in {shard!r}, and is not there. {AGAIN}"
            )
    return tensors


def _shard_name(index: Path, key: str, file: object) -> str:
    """A plain file name: an index must not lead out of its folder."""
    plain = isinstance(file, str) and file not in ("", ".", "..")
    if not plain or re.search(r"[/\\:\x00]", str(file)):
        raise CheckpointError(
            f"{index}: tensor {key!r} is said to be in {shown(file)}; needed the plain name of"
            " a file in the same folder. Do not trust this checkpoint."
        )
    return str(file)


def _hash_index(config: dict[str, Any], tensors: dict[str, TensorInfo]) -> str:
    rows = [[info.name, info.dtype, info.shape] for _, info in sorted(tensors.items())]
    text = json.dumps({"config": config, "tensors": rows}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _fetch_from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Weights, config and tokenizer at the top level; no pickles, no second formats.
        folder = snapshot_download(
            model, allow_patterns=_HUB_PATTERNS, ignore_patterns=["*/*", "consolidated*"]
        )
        if further := [f"{name}/*" for name in _modules(Path(folder))]:
            snapshot_download(model, allow_patterns=further, ignore_patterns=["*.bin"])
    except Exception as error:  # whatever the client raises, the model cannot be had
        raise CheckpointError(
            f"{model}: no such folder, and as a hub id it cannot be fetched: {first_line(error)}."
            f"{_nearest_folder(Path(model))} Check the spelling and the network, or give a folder."
        ) from error
    return Path(folder)


def _nearest_folder(path: Path) -> str:
    """``" Did you mean …?"`` for the first part of the path that does not exist."""
    missing = path.absolute()
    while not os.path.exists(missing.parent):
        missing = missing.parent
    try:
        siblings = [entry.name for entry in os.scandir(missing.parent) if entry.is_dir()]
    except OSError as error:
        return f" {missing.parent}: {error.strerror}."
    near = get_close_matches(missing.name, siblings, n=1, cutoff=0.5)
    if near:
        return f" Did you mean {str(missing.parent / near[0])!r}?"
    return f" {missing.parent} has no folder {missing.name!r}."


def _what_else(folder: Path) -> str:
    """What a folder without config.json is, and what to give instead."""
    if (folder / "adapter_config.json").is_file():
        stated = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        base = shown(stated) if isinstance(stated, str) else "its base model"
        return (
            f"It is an adapter of {base}: merge the two (peft: merge_and_unload, then"
            " save_pretrained), and give the merged folder."
        )
    if any(folder.glob("*.gguf")):
        return _GGUF
    if (folder / "params.json").is_file():
        return "It is in Meta's or Mistral's own layout. Give the version for transformers."
    return "Give the folder that holds config.json and the safetensors files."


def _model_folder_inside(folder: Path) -> str:
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG_FILE}"))
    return f" Did you mean {str(inside[0])!r}?" if inside else ""
