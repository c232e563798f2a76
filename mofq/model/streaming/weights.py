"""A model without its weights, and what reads those of one module when its turn comes.

transformers' own loader converts names, fuses experts and chooses dtypes, of a part of the
checkpoint as of the whole. The modules whose weights come and go are called units here: what
lies in lists of modules (decoder layers, of every tower), embeddings, and the head. All else
(norms, rotary tables) stays.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dot_natural_key,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from mofq.exceptions import StreamingError
from mofq.model.checkpoint.headers import TensorInfo, open_checkpoint
from mofq.model.checkpoint.tensors import read_rows, read_tensor
from mofq.model.loading import Lazy, build_model, load_model, plain_config
from mofq.model.streaming.send_to_device import send
from mofq.numbers.quantize.tiles import row_blocks

#: Of two tensors that may be copies, compared at once.
_COMPARED_ELEMENTS = 2**24
#: Weights of a unit from which on it pays to give back what was freed on the way to them.
_TRIMMED_BYTES = 2**28

Readers = Mapping[str, Callable[[], Tensor]]


class _Absent:
    """Takes the place of a checkpoint's tensor that is not read: only its shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape

    def __getitem__(self, _key: object) -> _Absent:
        return self

    def to(self, *, device: object = None, dtype: torch.dtype | None = None) -> Tensor:
        """On no device, whatever is asked for."""
        del device
        return torch.empty(self._shape, dtype=dtype, device="meta")


@dataclass(slots=True)
class UnitWeights:
    """Reads the weights of one unit after the other, the next one ahead; close it after use.

    On a GPU the next unit is copied there too while this one computes, on a stream of its own: two
    units are on the device at a time.
    """

    model: PreTrainedModel
    units: Mapping[str, nn.Module]  #: path -> module, in the order of the model
    head: str  #: path of the unit that computes logits
    bytes: Mapping[str, int]  #: of each unit's weights in the model's dtype
    device: torch.device
    outside: frozenset[str]  #: tensors of the checkpoint that no unit is made of
    _readers: Mapping[str, Readers]  #: unit -> tensors of the checkpoint
    _sources: Mapping[str, Mapping[str, str]]  #: unit -> tensor of the model -> where it is read
    _shadow: PreTrainedModel  #: never runs: what is read ahead lies in it
    _config: LoadStateDictConfig
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _ahead: dict[str, Future[dict[str, Tensor]]] = field(default_factory=dict)
    _stream: torch.cuda.Stream | None = None  #: that weights are copied on

    def __enter__(self) -> UnitWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(cancel_futures=True)

    @contextmanager
    def loaded(
        self, unit: str, *, ahead: str | None = None, beside: str | None = None
    ) -> Iterator[nn.Module]:
        """Have a unit's weights in the model for as long as the context lasts.

        Args:
            unit: Its path.
            ahead: Another unit, which is read meanwhile, unless the two are larger than any two
                decoder layers: beside an embedding or a head of a large vocabulary nothing is.
            beside: Another unit whose weights are there too; what the two have in common is one
                parameter, as in a model that is loaded whole.

        Raises:
            CheckpointError: A file got shorter.
        """
        reading = self._ahead.pop(unit, None) or self._pool.submit(self._read, unit)
        weights = reading.result()
        if beside is not None:
            weights |= self._read_beside(unit, beside, weights)
        self._ahead.clear()
        if ahead is not None and ahead != unit and self._fits_beside(unit, ahead):
            self._ahead[ahead] = self._pool.submit(self._read, ahead)
        before = {name: _get(self.model, name) for name in weights}
        for name in list(weights):
            tensor = weights.pop(name)
            if tensor.is_cuda:  # its memory was taken on another stream than it is used on
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
            _put(self.model, name, tensor)
        try:
            yield self.units[unit]
        finally:
            for name, tensor in before.items():
                _put(self.model, name, tensor)

    def _fits_beside(self, unit: str, other: str) -> bool:
        """Whether two units are no larger than two of those that lie in lists."""
        listed = (
            self.bytes[name]
            for name, module in self.units.items()
            if name != self.head and not isinstance(module, nn.Embedding)
        )
        return self.bytes[unit] + self.bytes[other] <= 2 * max(listed, default=0)

    def _read_beside(self, unit: str, other: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of another unit; those that are the first one's become its parameters."""
        sources = self._sources[other]
        ours = {source: name for name, source in self._sources[unit].items()}
        shared = {name: ours[source] for name, source in sources.items() if source in ours}
        for ours_name in shared.values():
            weights[ours_name] = nn.Parameter(weights[ours_name], requires_grad=False)
        read = {} if len(shared) == len(sources) else self._read(other)
        return read | {name: weights[ours_name] for name, ours_name in shared.items()}

    def keep_tied(self) -> None:
        """Read what is a unit's tensor under another name, outside of it: it stays."""
        if self._sources[""]:
            for name, tensor in self._read("").items():
                _put(self.model, name, tensor)

    def _read(self, unit: str) -> dict[str, Tensor]:
        """Model's tensor -> its values, of a unit, on the device."""
        lazy: dict[str, Any] = {name: Lazy(read) for name, read in self._readers[unit].items()}
        sources = self._sources[unit]
        before = {source: _get(self._shadow, source) for source in sources.values()}
        convert_and_load_state_dict_in_model(self._shadow, lazy, self._config)
        found = {name: _get(self._shadow, source) for name, source in sources.items()}
        for source, tensor in before.items():
            _put(self._shadow, source, tensor)
        if sum(tensor.nbytes for tensor in found.values()) >= _TRIMMED_BYTES:
            give_back_freed_memory()
        return self._send({name: one.detach() for name, one in found.items()})

    def _send(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to the device, and wait for that alone."""
        if self.device.type != "cuda":
            return {name: one.to(self.device) for name, one in tensors.items()}
        if self._stream is None:
            # Always the same: memory that was taken on one is not used again on another.
            self._stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            sent = {name: send(one, self.device) for name, one in tensors.items()}
        # Here, in the reading thread: whoever takes the tensors need not wait for the stream.
        self._stream.synchronize()
        return sent


def give_back_freed_memory() -> None:
    """Have the C library give the system what is free in its heaps, where it can be asked to.

    The experts of a mixture are read one by one, on threads of transformers' loader, and fused:
    what they were read into is freed, and glibc keeps it, as much as a decoder layer of 5 GB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def open_unit_weights(
    folder: Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    tensors: Readers | None = None,
) -> UnitWeights:
    """A model whose units have no weights yet.

    Args:
        folder: As `load_model` has it, and so have ``dtype``, ``device`` and ``tensors``.
        dtype: Of the arithmetic.
        device: Where it runs.
        tensors: Name -> what reads it, in place of the folder's own.

    Raises:
        CheckpointError: As `load_model`.
        StreamingError: The model's weights cannot be told apart by its modules.
    """
    checkpoint = open_checkpoint(str(folder)) if tensors is None else None
    if checkpoint is not None:
        tensors = {name: partial(read_tensor, info) for name, info in checkpoint.tensors.items()}
    assert tensors is not None
    shapes = _shapes(tensors)
    with torch.device("meta"):
        config = plain_config(folder)
        outline = build_model(config)
    outline.tie_weights()
    units, head = find_units(outline)
    copies = _copies(outline, tensors)
    tensors = {name: read for name, read in tensors.items() if name not in copies}
    owners = _owners(outline, list(tensors))
    keys = _keys_of_units(outline, units, owners)
    absent = {key for unit in keys.values() for key in unit}
    kept: dict[str, Any] = {name: Lazy(read) for name, read in tensors.items()}
    nothing = dict(kept)
    for name in tensors:
        nothing[name] = _Absent(shapes[name])
        if name in absent:
            kept[name] = nothing[name]
    model = load_model(folder, dtype=dtype, device=device, lazy=kept)
    shadow = load_model(folder, dtype=dtype, device="meta", lazy=nothing)
    found, _ = find_units(model)
    loading = LoadStateDictConfig(
        dtype=getattr(torch, dtype),
        dtype_plan=shadow._get_dtype_plan(getattr(torch, dtype)),
        weight_mapping=get_model_conversion_mapping(shadow),
    )
    where = torch.device(device)
    sources = {unit: _sources(model, unit, owners) for unit in found}
    for unit, module in found.items():
        for name in sources[unit]:
            if isinstance(module, nn.Embedding) or unit == head:
                # Of no size, but with a device, which models ask for.
                _put(model, name, _not_a_number(_get(model, name), where))
    left = {
        name: _source(model, name, owners)
        for name, tensor in model.state_dict().items()
        if tensor.is_meta and not name.startswith(tuple(f"{unit}." for unit in found))
    }
    weights = UnitWeights(
        model=model,
        units=found,
        head=head,
        bytes={unit: sum(_get(model, name).nbytes for name in sources[unit]) for unit in found},
        device=where,
        outside=frozenset(tensors.keys() - absent),
        _readers={
            **{unit: {key: tensors[key] for key in keys[unit]} for unit in found},
            "": {key: tensors[key] for one in left.values() for key in owners.get(one, ())},
        },
        _sources={**sources, "": left},
        _shadow=shadow,
        _config=loading,
    )
    weights.keep_tied()
    return weights


def find_units(model: PreTrainedModel) -> tuple[dict[str, nn.Module], str]:
    """The modules whose weights come and go, and the path of the head.

    Args:
        model: On any device.

    Returns:
        Path -> module with parameters: those in lists of modules, none in another, then
        embeddings outside of them, and the head; in the order of the model.

    Raises:
        StreamingError: The model has no head.
    """
    head = model.get_output_embeddings()
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, path: str, *, in_list: bool) -> None:
        is_list = isinstance(module, nn.ModuleList | nn.ModuleDict)
        if (in_list and not is_list) or isinstance(module, nn.Embedding) or module is head:
            if any(True for _ in module.parameters()):
                found[path] = module
            return
        for name, child in module.named_children():
            visit(child, f"{path}.{name}" if path else name, in_list=is_list)

    visit(model, "", in_list=False)
    heads = [path for path, module in found.items() if module is head]
    if not heads:
        raise StreamingError(f"{type(model).__name__} has no module that computes its logits")
    return found, heads[0]


def _shapes(tensors: Readers) -> dict[str, tuple[int, ...]]:
    """Of every tensor; those that only reading tells are read."""
    found = {}
    for name, read in tensors.items():
        info = _stored(read)
        found[name] = tuple(read().shape) if info is None else info.shape
    return found


def _stored(read: Callable[[], Tensor]) -> TensorInfo | None:
    """The tensor in a file that a function reads; None where it is another function."""
    if isinstance(read, partial) and read.func is read_tensor:
        info: TensorInfo = read.args[0]
        return info
    return None


def _owners(model: PreTrainedModel, names: list[str]) -> dict[str, list[str]]:
    """Tensor of the model -> the checkpoint's tensors that it is made of.

    A conversion that makes several tensors is noted under the first.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=dot_natural_key):
        renamed, _ = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, _ = rename_source_key(name, [], [], prefix, state)
        found.setdefault(renamed, []).append(name)
    return found


def _copies(model: PreTrainedModel, tensors: Readers) -> set[str]:
    """What the checkpoint holds twice although the model ties it, as transformers compares it."""
    owners = _owners(model, list(tensors))
    found = set()
    for target, source in model.all_tied_weights_keys.items():
        ours, theirs = owners.get(target, []), owners.get(source, [])
        if len(ours) == len(theirs) == 1 and _is_same(tensors[ours[0]], tensors[theirs[0]]):
            found.add(ours[0])
    return found


def _is_same(one: Callable[[], Tensor], other: Callable[[], Tensor]) -> bool:
    """Whether two tensors are equal; of those in files, a block of rows at a time."""
    first, second = _stored(one), _stored(other)
    if first is None or second is None or len(first.shape) != 2 or len(second.shape) != 2:
        return torch.equal(one(), other())
    return first.shape == second.shape and all(
        torch.equal(read_rows(first, *rows), read_rows(second, *rows))
        for rows in row_blocks(*first.shape, elements=_COMPARED_ELEMENTS)
    )


def _keys_of_units(
    model: PreTrainedModel, units: Collection[str], owners: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """Unit -> the checkpoint's tensors that its weights are made of, tied ones included."""
    found = {}
    for unit in units:
        sources = set(_sources(model, unit, owners).values())
        found[unit] = [
            key
            for renamed, keys in owners.items()
            for key in keys
            if renamed in sources or renamed.startswith(f"{unit}.")
        ]
    return found


def _sources(model: PreTrainedModel, unit: str, owners: Mapping[str, list[str]]) -> dict[str, str]:
    """Tensor of a unit -> the tensor of the model under whose name the checkpoint has it."""
    state = model.get_submodule(unit).state_dict(keep_vars=True)
    return {f"{unit}.{name}": _source(model, f"{unit}.{name}", owners) for name in state}


def _source(model: PreTrainedModel, name: str, owners: Mapping[str, list[str]]) -> str:
    tied: Mapping[str, str] = model.all_tied_weights_keys
    first = tied.get(name, name)
    same = (name, first, *(one for one, other in tied.items() if other == first))
    return next((one for one in same if one in owners), name)


def _get(model: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), last)
    return tensor


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if last in module._buffers:
        module._buffers[last] = tensor
    elif isinstance(tensor, nn.Parameter):
        module._parameters[last] = tensor
    else:
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor of a model has its values now, and does not stand for them."""
    return not tensor.is_meta and (tensor.numel() < 2 or any(tensor.stride()))


def _not_a_number(like: Tensor, device: torch.device) -> Tensor:
    value = math.nan if like.dtype.is_floating_point else 0
    return torch.full((), value, dtype=like.dtype, device=device).expand(like.shape)
