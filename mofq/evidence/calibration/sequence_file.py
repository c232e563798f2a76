"""One sequence's samples in one file: ``sequence-00000.safetensors``.

``x/LAYER`` [T, in_features] and ``grad/LAYER`` [draws, T, out_features], bfloat16.
Layers that read the very same input share one ``x``; the metadata ``inputs`` says whose,
null where no token reached the layer. A layer of experts has only the tokens that were
routed to it, and ``tokens/LAYER`` [t] says which, in order. An embedding has ``rows/LAYER`` [T],
which rows its tokens looked up, and ``lookup/LAYER`` [draws, T, in_features], the gradients of
these; it has the others as well where the lm_head is tied to it. The version of the format is that
of the folder, in its ``plan.json`` and ``stats.json``.

Codes are fitted to the inputs, and to how much each token counts. Where these are kept of the
other sequences too, a file ``inputs-00001.safetensors`` has ``x/LAYER`` as above and, in the place
of gradients, their norm ``norm/LAYER`` [T], float32: about half of the size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mofq.evidence.calibration.capture import Captured
from mofq.exceptions import StatsError, option
from mofq.files.documents import parse_json, renamed_when_written
from mofq.files.validated import Text, validate
from mofq.model.checkpoint.safetensors_header import encode_header

_DTYPES = {torch.bfloat16: "BF16", torch.int64: "I64", torch.float32: "F32"}
_INPUTS = TypeAdapter(dict[Text, Text | None])


@dataclass(frozen=True, slots=True)
class LookupSamples:
    """Which rows of an embedding one sequence looked up."""

    row_T: Tensor  #: int64
    grad_DTI: Tensor  #: gradients of these rows, [draws, tokens, in_features], bfloat16


@dataclass(frozen=True, slots=True)
class LayerSamples:
    """What one layer saw in one sequence."""

    x_TI: Tensor  #: inputs, [tokens, in_features], bfloat16
    grad_DTO: Tensor  #: output gradients, [draws, tokens, out_features], bfloat16
    token_T: Tensor | None  #: position of each token where not all are here (experts), int64
    source: str = ""  #: the layer whose inputs these are, of those that read the very same
    lookup: LookupSamples | None = None  #: where it is an embedding; alone, there are no inputs


def sequence_path(folder: Path, corpus: str, index: int) -> Path:
    """Where a sequence's samples are kept."""
    return folder / corpus / f"sequence-{index:05d}.safetensors"


class WeightedInputs(NamedTuple):
    """What codes of a layer are fitted to, of one sequence."""

    x_TI: Tensor  #: bfloat16
    norm_T: Tensor  #: of the gradient at each token, over all draws, float64
    source: str  #: as in `LayerSamples`


def inputs_path(folder: Path, corpus: str, index: int) -> Path:
    """Where the inputs of a sequence are kept whose samples are not."""
    return folder / corpus / f"inputs-{index:05d}.safetensors"


#: Writes a file of a sequence beside its name, which it gets when it is whole.
sequence_written = partial(
    renamed_when_written,
    error=StatsError,
    remedy="The sequences before it are kept; free some space and run the same command again.",
)


class SequenceFile:
    """An open sequence; use it in a ``with`` statement."""

    def __init__(self, path: Path) -> None:
        """Open the file and read its header.

        Raises:
            StatsError: It is missing or cut short, or not a file of samples.
        """
        self.path = path
        try:
            self._file = cast(Any, safe_open(path, framework="pt"))
            metadata = self._file.metadata() or {}
        except (OSError, SafetensorError) as problem:
            raise _unreadable(path, problem) from None
        inputs = parse_json(metadata.get("inputs", ""), f"{path}: inputs", StatsError)
        #: Layer -> the layer whose ``x`` it reads; None where no token reached it.
        self.inputs = validate(_INPUTS, inputs, f"{path}: inputs", StatsError)
        self._keys = frozenset(self._file.keys())

    def __enter__(self) -> SequenceFile:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def read(self, layer: str) -> LayerSamples | None:
        """Read one layer's samples.

        Args:
            layer: Module name.

        Returns:
            The samples; None where no token reached the layer (an expert).

        Raises:
            StatsError: The file does not know the layer.
        """
        source = self._source(layer)
        if source is None:
            return None
        tokens = f"tokens/{layer}"
        try:
            lookup = self._lookup(layer)
            if lookup is not None and f"x/{source}" not in self._keys:
                draws, _, columns = lookup.grad_DTI.shape
                none = lookup.grad_DTI.new_empty
                return LayerSamples(
                    none(0, columns), none(draws, 0, 0), None, source=source, lookup=lookup
                )
            return LayerSamples(
                x_TI=self._file.get_tensor(f"x/{source}"),
                grad_DTO=self._file.get_tensor(f"grad/{layer}"),
                token_T=self._file.get_tensor(tokens) if tokens in self._keys else None,
                source=source,
                lookup=lookup,
            )
        except SafetensorError as problem:
            raise _unreadable(self.path, problem) from None

    def _lookup(self, layer: str) -> LookupSamples | None:
        if f"rows/{layer}" not in self._keys:
            return None
        return LookupSamples(
            self._file.get_tensor(f"rows/{layer}"), self._file.get_tensor(f"lookup/{layer}")
        )

    def weighted(self, layer: str) -> WeightedInputs | None:
        """Read what codes of one layer are fitted to; also of a file of inputs alone.

        Raises:
            StatsError: As `read`.
        """
        source = self._source(layer)
        if source is None:
            return None
        try:
            x_TI = self._file.get_tensor(f"x/{source}")
            if f"norm/{layer}" in self._keys:
                norm_T = self._file.get_tensor(f"norm/{layer}").double()
            else:
                norm_T = gradient_norms(self._file.get_tensor(f"grad/{layer}"))
        except SafetensorError as problem:
            raise _unreadable(self.path, problem) from None
        return WeightedInputs(x_TI, norm_T, source)

    def described(self) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Dtype and shape of every tensor, by its name in the file."""
        dtypes = {name: dtype for dtype, name in _DTYPES.items()}
        slices = {name: self._file.get_slice(name) for name in self._keys}
        return {n: (dtypes[one.get_dtype()], one.get_shape()) for n, one in slices.items()}

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name in the file.

        Raises:
            StatsError: It cannot be read.
        """
        try:
            return cast(Tensor, self._file.get_tensor(name))
        except SafetensorError as problem:
            raise _unreadable(self.path, problem) from None

    def _source(self, layer: str) -> str | None:
        if layer not in self.inputs:
            raise StatsError(
                f"{self.path}: has no layer {layer!r}. The stats are of another model; "
                f"calibrate this one."
            )
        return self.inputs[layer]

    def counts(self) -> dict[str, int]:
        """How many tokens came to each layer of an expert; no other layer is in it."""
        return {
            name: 0 if source is None else self._file.get_slice(f"tokens/{name}").get_shape()[0]
            for name, source in self.inputs.items()
            if source is None or f"tokens/{name}" in self._keys
        }


def _unreadable(path: Path, problem: Exception) -> StatsError:
    return StatsError(
        f"{path}: cannot be read: {problem}. Delete it and run the same `mofq calibrate` again: "
        f"it makes only this file."
    )


def is_complete(path: Path) -> bool:
    """Whether a sequence is there and as long as its header says."""
    if not path.exists():
        return False
    try:
        with SequenceFile(path):
            return True
    except StatsError:
        return False


def write_sequence(
    path: Path, captured: Captured, layer_names: Sequence[str], *, inputs_alone: bool = False
) -> None:
    """Write one sequence's samples beside its final name and rename it.

    Args:
        path: Final name.
        captured: After the last backward pass.
        layer_names: All layers; those without a token are noted as such.
        inputs_alone: Norms in the place of gradients.

    Raises:
        StatsError: A gradient is missing or not finite, or the file cannot be written.
    """
    inputs = {name: captured.source.get(name) for name in layer_names}
    tensors_of = input_tensors if inputs_alone else sequence_tensors
    write_samples(path, tensors_of(captured, layer_names, path), inputs)


def sequence_tensors(
    captured: Captured, layer_names: Sequence[str], path: Path
) -> dict[str, Tensor]:
    """What is kept of some layers, under the names that it has in the file.

    Args:
        captured: After the last backward pass.
        layer_names: Of any layers; those without a token have nothing.
        path: Of the file, for messages.

    Raises:
        StatsError: A gradient is missing or not finite.
    """
    tensors: dict[str, Tensor] = {}
    for name in layer_names:
        if name not in captured.source:
            continue
        if name in captured.looked_up:
            looked_up = captured.looked_up[name]
            tensors[f"rows/{name}"] = looked_up.row_T
            tensors[f"lookup/{name}"] = stack_gradients(looked_up.grads, name, path)
            check_gradients({name: tensors[f"lookup/{name}"]}, path)
        if captured.source[name] not in captured.x:  # an embedding that is looked up alone
            continue
        tensors[f"grad/{name}"] = layer_gradients(captured, name, path)
        if captured.source[name] == name:
            tensors[f"x/{name}"] = captured.x[name]
        if name in captured.tokens:
            tensors[f"tokens/{name}"] = captured.tokens[name]
    grads = {name: tensors[f"grad/{name}"] for name in layer_names if f"grad/{name}" in tensors}
    check_gradients(grads, path)
    return tensors


def gradient_norms(grad_DTO: Tensor) -> Tensor:
    """Of each token, over all draws, float64."""
    return grad_DTO.double().square().sum((0, 2)).sqrt()


def input_tensors(captured: Captured, layer_names: Sequence[str], path: Path) -> dict[str, Tensor]:
    """What is kept of some layers where gradients are not; arguments and errors as above."""
    tensors: dict[str, Tensor] = {}
    grads: dict[str, Tensor] = {}
    for name in layer_names:
        if captured.source.get(name) not in captured.x:  # unseen, or looked up alone
            continue
        grads[name] = layer_gradients(captured, name, path)
        tensors[f"norm/{name}"] = gradient_norms(grads[name]).float()
        if captured.source[name] == name:
            tensors[f"x/{name}"] = captured.x[name]
    check_gradients(grads, path)
    return tensors


def write_samples(
    path: Path, tensors: Mapping[str, Tensor], inputs: Mapping[str, str | None]
) -> None:
    """Write the tensors of one sequence beside its final name and rename it.

    Args:
        path: Final name.
        tensors: From `sequence_tensors` or `input_tensors`, of all layers.
        inputs: Layer -> the layer whose ``x`` it reads; None where no token reached it. In the
            order of the layers.

    Raises:
        StatsError: The file cannot be written.
    """
    described = {name: (one.dtype, one.shape) for name, one in tensors.items()}
    with sequence_written(path) as temporary:
        _write_tensors(temporary, described, tensors.__getitem__, inputs)


def copy_changed(source: Path, target: Path, change: Callable[[str, str, Tensor], Tensor]) -> None:
    """Write the tensors of a sequence's file anew; one of them is in memory at a time.

    Args:
        source: A file of samples, or of inputs alone.
        target: Final name.
        change: Called with what a tensor is (``x``, ``grad`` …), the layer, and the tensor; what it
            returns has the same shape, and is rounded to the same dtype.

    Raises:
        StatsError: The source cannot be read, or the target cannot be written.
    """
    with SequenceFile(source) as file, sequence_written(target) as temporary:
        described = file.described()

        def changed(name: str) -> Tensor:
            kind, _, layer = name.partition("/")
            return change(kind, layer, file.tensor(name)).to(described[name][0])

        _write_tensors(temporary, described, changed, file.inputs)


def _write_tensors(
    path: Path,
    described: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensor_of: Callable[[str], Tensor],
    inputs: Mapping[str, str | None],
) -> None:
    """Write a safetensors file: the same bytes every time, and on the disk when this returns.

    The library's own writer orders metadata differently from run to run, gives the file to its
    owner only, and when it is killed leaves a temporary file of another name.

    Source: https://huggingface.co/docs/safetensors, "Format".
    """
    # Widest first: every tensor begins at a multiple of its element's size.
    names = sorted(described, key=lambda name: (-described[name][0].itemsize, name))
    header = {name: (_DTYPES[described[name][0]], described[name][1]) for name in names}
    beginning, _ = encode_header(header, {"inputs": json.dumps(inputs)})
    with path.open("wb") as file:
        file.write(beginning)
        for name in names:
            flat = tensor_of(name).cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def layer_gradients(captured: Captured, name: str, path: Path) -> Tensor:
    """The gradients of one layer's output, [draws, tokens, out_features].

    Raises:
        StatsError: They are missing; ``path`` says of which sequence.
    """
    return stack_gradients(captured.grads.get(name), name, path)


def stack_gradients(grads: Sequence[Tensor] | None, name: str, path: Path) -> Tensor:
    """The gradients of several draws, [draws, tokens, channels]; raises as `layer_gradients`."""
    if not grads:
        raise StatsError(
            f"{name}: no gradient reached its output in {path.name}; it does not take part in "
            f"the model's prediction. List the layer under `exclude` and report the model."
        )
    return torch.stack(list(grads))


def check_gradients(grads: Mapping[str, Tensor], path: Path) -> None:
    """Refuse gradients that are not finite; a GPU is waited for once.

    Args:
        grads: Layer -> gradients of its output, or sums of them.
        path: Of the file, for messages.

    Raises:
        StatsError: One is not finite.
    """
    are_finite = [torch.isfinite(one).all() for one in grads.values()]
    for name, is_finite in zip(
        grads, torch.stack(are_finite).tolist() if grads else (), strict=True
    ):
        if not is_finite:
            raise StatsError(
                f"{name}: an output gradient is not finite in {path.name}. "
                f"Use {option('dtype', 'float32')}, or look for broken weights in this layer."
            )
