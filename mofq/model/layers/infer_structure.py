"""Infers the structure of a decoder from the names and shapes of its tensors.

For model types without a row in `families`. Needs headers and the config, no torch. Coverage is
total: every matrix of a decoder layer is in a fusion group, or listed with the reason why not. What
the names do not decide is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mofq.exceptions import CheckpointError, option
from mofq.model.checkpoint.headers import CONFIG_FILE, Checkpoint, TensorInfo
from mofq.model.layers.joining import Matrix, join
from mofq.model.layers.left_out import (
    explain_outside,
    is_embedding,
    kept_reason,
    layer_index,
    no_linear_reason,
)
from mofq.model.layers.linear import LoadedWeight
from mofq.model.layers.name_patterns import (
    EXPERT,
    EXPERT_COUNTS,
    FUSED,
    HIDDEN_SIZES,
    LAYER_COUNTS,
    LAYERS_AHEAD,
    OWN_PARAMETER,
    REFUSED,
    STACK,
    TOWERS,
)
from mofq.model.layers.names_in_memory import (
    KnownType,
    Place,
    as_pattern,
    find_in_memory,
    find_stored,
    find_stored_name,
    has_stored_names,
    is_fused,
    is_swapped,
    known_type,
)
from mofq.model.layers.stated_layers import StatedLayers, path_of

#: Dimensions of a tensor that holds a matrix for each expert.
_OF_EXPERTS = 3


@dataclass(slots=True)
class Structure:
    """What was inferred of a decoder."""

    stack: str  #: name of the list of decoder layers on disk: ``model.layers``
    layers: int
    groups: list[list[tuple[str, list[Matrix]]]]  #: of each layer: name, members
    unquantized: list[Matrix] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)  #: tensor -> why it is in no group
    embedding: TensorInfo | None = None
    has_stored_names: bool = False  #: tensors have the names of the hub

    @property
    def matrices(self) -> Iterator[Matrix]:
        """Of all groups, and those that stay unquantized."""
        for groups in self.groups:
            for _, members in groups:
                yield from members
        yield from self.unquantized

    @property
    def body(self) -> str:
        """The prefix of the stack."""
        return self.stack.rpartition(".")[0] + "." if "." in self.stack else ""


def infer_structure(
    checkpoint: Checkpoint,
    architecture: str,
    config: Mapping[str, Any],
    stated: StatedLayers | None = None,
) -> Structure:
    """Find the decoder's matrices and what engines join of them.

    Args:
        checkpoint: Of a type without rules.
        architecture: Its ``model_type``.
        config: Of the language model.
        stated: What the user says of it.

    Raises:
        CheckpointError: Something is not certain; the message says what.
    """
    stated = StatedLayers() if stated is None else stated
    if architecture in REFUSED:
        raise CheckpointError(
            f"{checkpoint.folder}: model_type {architecture!r}: {REFUSED[architecture]}."
        )
    known = known_type(architecture)
    if known is not None and known.needs:
        raise CheckpointError(
            f"{checkpoint.folder}: transformers does not run a {architecture!r} on text alone, with"
            f" which it would be measured: {known.needs}."
        )
    stack, indices = _find_stack(checkpoint, architecture, config, stated.stack)
    count = _stated(config, LAYER_COUNTS) or max(indices) + 1
    structure = Structure(
        stack,
        count,
        [[] for _ in range(count)],
        has_stored_names=has_stored_names(checkpoint.tensors, architecture),
    )
    inferrer = _Inferrer(checkpoint, architecture, config, structure, stated)
    for index in range(count):
        inferrer.infer_layer(index)
    if unknown := set(stated.paths) - inferrer.settled:
        raise CheckpointError(
            f"{option('layers')}: no decoder layer of {checkpoint.folder} has {min(unknown)!r}."
            " Paths are those of modules inside a decoder layer, with # for numbers."
        )
    structure.reasons |= explain_outside(checkpoint, stack, count)
    tensors = checkpoint.tensors.items()
    outside = (info for name, info in tensors if layer_index(name, stack) is None)
    structure.embedding = next((info for info in outside if is_embedding(info.name)), None)
    if not any(structure.groups):
        raise CheckpointError(
            f"{checkpoint.folder}: model_type {architecture!r}: no linear layer of the decoder can"
            f" be quantized. {_few_reasons(structure.reasons)}"
        )
    return structure


def _find_stack(
    checkpoint: Checkpoint, architecture: str, config: Mapping[str, Any], wanted: str | None
) -> tuple[str, set[int]]:
    """The name of the list of decoder layers, and its indices."""
    stacks: dict[str, set[int]] = {}  # on disk
    in_memory: dict[str, str] = {}
    for name, info in checkpoint.tensors.items():
        match = STACK.fullmatch(name)
        if match is not None and len(info.shape) >= 2:
            stack, index = match["stack"], match["index"]
            if not in_memory.get(stack):
                own = find_in_memory(name, architecture).name
                in_memory[stack] = own.partition(f".{index}.")[0]
            stacks.setdefault(stack, set()).add(int(index))
    count, known = _stated(config, LAYER_COUNTS), known_type(architecture)
    found: Mapping[str, set[int]]
    if wanted is not None:
        found = {name: at for name, at in stacks.items() if name == wanted}
        needed = f"the list of decoder layers {wanted!r} of {option('layers')}"
    elif known is not None and known.stacks:
        found = {
            name: at
            for name, at in stacks.items()
            if in_memory[name] in (*known.stacks, *known.with_towers)
        }
        named = " and ".join(map(repr, known.stacks))
        if len(known.stacks) > 1:
            raise CheckpointError(
                f"{checkpoint.folder}: a {architecture!r} has {named}, and what has more than one"
                " list of decoder layers is not supported."
            )
        needed = f"one list of decoder layers, {named} of a {architecture!r}"
    else:
        found = _guess_stack(stacks, count)
        needed = "one list of decoder layers"
    if len(found) != 1:
        stated = ", ".join(
            f"{name}.0…{max(at)}" for name, at in list((found or stacks).items())[:4]
        )
        raise CheckpointError(
            f"{checkpoint.folder}: needed {needed}, found {stated or 'none'}. Config and weights"
            " are of different models, or it is not certain which of them is the language model:"
            f" then a file for {option('layers')} says it, e.g. `stack: {min(stacks, default='')}`."
        )
    ((name, indices),) = found.items()
    ahead = _stated(config, LAYERS_AHEAD) or 0
    indices |= _empty_blocks(config)
    if count is not None and (not _covers(indices, count) or max(indices) >= count + ahead):
        raise CheckpointError(
            f"{checkpoint.folder / CONFIG_FILE}: needed {count} decoder layers as the config says,"
            f" found {len(indices)} in the tensors (highest index {max(indices)}). Config and"
            " weights are of different models, or a shard is missing."
        )
    return name, indices


def _empty_blocks(config: Mapping[str, Any]) -> set[int]:
    """Decoder layers that an architecture search left nothing in.

    Source: ``block_configs`` of Llama-3.1-Nemotron-Ultra's ``block_config.py``; vLLM 0.33.0
    ``models/nemotron_nas.py``.
    """
    blocks = config.get("block_configs")
    return {
        index
        for index, block in enumerate(blocks if isinstance(blocks, list) else ())
        if isinstance(block, dict)
        and all(_is_no_op(block.get(key)) for key in ("attention", "ffn"))
    }


def _is_no_op(part: Any) -> bool:
    return isinstance(part, dict) and part.get("no_op") is True


def _covers(indices: set[int], count: int) -> bool:
    """Whether the first ``count`` are there; a config may say any number."""
    return sum(index < count for index in indices) == count


def _guess_stack(stacks: Mapping[str, set[int]], count: int | None) -> Mapping[str, set[int]]:
    """Of a type that is not known: by the words in names, and by the number of layers."""
    found = {name: at for name, at in stacks.items() if not TOWERS.search(name)} or stacks
    if len(found) > 1 and count is not None:
        found = {n: at for n, at in found.items() if _covers(at, count)} or found
    if len(found) > 1:
        decoders = {n: at for n, at in found.items() if re.search(r"decoder|language|text", n)}
        found = decoders or found
    return found


class _Inferrer:
    """Goes through the tensors of a checkpoint once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: str,
        config: Mapping[str, Any],
        structure: Structure,
        stated: StatedLayers,
    ) -> None:
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.known: KnownType | None = known_type(architecture)
        self.hidden = _stated(config, HIDDEN_SIZES)
        self.experts = _stated(config, EXPERT_COUNTS)
        self.structure = structure
        self.stated = stated
        self.settled: set[str] = set()  #: paths that were found
        self.tensors: dict[int, list[tuple[str, TensorInfo]]] = {}
        for name, info in checkpoint.tensors.items():
            if (index := layer_index(name, structure.stack)) is not None:
                path = name.removeprefix(f"{structure.stack}.{index}.")
                self.tensors.setdefault(index, []).append((path, info))
        names = (find_in_memory(name, architecture).name for name in checkpoint.tensors)
        before = (name.partition(".experts.") for name in names)
        self.mixtures = {place for place, has_experts, _ in before if has_experts}
        self.idle = {
            index
            for index, tensors in self.tensors.items()
            if any(self._is_uncalled(info) for _, info in tensors)
        }
        self.transposed = self._is_transposed()
        self.swaps_experts = self.known is not None and self.known.transposed

    def infer_layer(self, index: int) -> None:
        """Divide the matrices of one decoder layer."""
        found: list[Matrix] = []
        alike: dict[tuple[object, ...], Matrix] = {}
        for _, info in self.tensors.get(index, ()):
            if len(info.shape) < 2:
                continue
            head, _, tail = info.name.partition(".experts.")
            number, _, word = tail.partition(".")
            key = (head, word, info.shape, info.dtype)
            if word and key in alike and not self._is_after(info):  # tens of thousands of them
                found.append(_like(alike[key], info, int(number)))
                continue
            made = list(self._read(index, info))
            found += made
            if len(made) == 1 and _has_own_name(made[0]):
                alike[key] = made[0]
        self.structure.groups[index] = [
            (f"layers.{index}.{name}", members)
            for name, members in join(found, self.architecture, self.stated.joined)
        ]

    def _read(self, index: int, info: TensorInfo) -> Iterator[Matrix]:
        """The linear layers in a tensor; others are noted with their reason."""
        key = path_of(info.name, index)
        self.settled.add(key)
        if key in self.stated.left:
            self.structure.reasons[info.name] = self.stated.left[key]
            return
        if self._is_after(info):
            self.structure.reasons[info.name] = "an expert of images, which text does not run"
            return
        own = find_in_memory(info.name, self.architecture)
        inside = own.name.partition(f".{index}.")[2]
        fused = len(info.shape) == _OF_EXPERTS and own.expert is None and FUSED.fullmatch(inside)
        if fused and (self.known is None or self.known.experts is None):
            raise self._uncertain(info, "in which order it has gates, ups, inputs and outputs")
        if fused and self.known is not None and self.known.experts:
            raise CheckpointError(
                f"{self.checkpoint.folder}: {info.name!r}: {self.known.experts}, are not supported:"
                " no stage reads their layout yet."
            )
        whole = own.name if is_fused(own.name, self.known) else info.name
        stored = find_stored(whole, self.architecture)
        one_by_one = [one for one in stored if one.expert is not None or not fused]
        is_merged = len(one_by_one) > 1 or any(EXPERT.fullmatch(one.name) for one in one_by_one)
        is_part = own.expert is not None or (not fused and self._is_stored_name(info.name))
        if is_merged and not is_part:
            held = one_by_one if own.parts == 1 else [one_by_one[own.part]]
            yield from self._read_in_memory(index, info, own, [one.name for one in held])
            return
        name = info.name
        if not self.structure.has_stored_names:
            name = find_stored_name(name, self.architecture)
        path = name.partition(f".{index}.")[2]
        is_stated = key in (*self.stated.linear, *self.stated.transposed)
        reason = None if is_stated else self._reason(path, info, index)
        if reason is not None:
            self.structure.reasons[info.name] = reason
            is_named = path.endswith(".weight") and own.name != ""
            if not is_named or len(info.shape) != 2 or _is_no_linear(path):
                return
        elif len(info.shape) != 2 or not path.endswith(".weight"):
            raise self._uncertain(info, "whether it is the weight of a linear layer")
        matrix = self._matrix(index, name.removesuffix(".weight"), info)
        if reason is None:
            yield matrix
        else:
            self.structure.unquantized.append(matrix)

    def _is_after(self, info: TensorInfo) -> bool:
        """Whether it is of the experts that follow those which text runs, in one list on disk."""
        if self.known is None or not self.known.experts_after:
            return False
        own = find_in_memory(info.name, self.architecture)
        module = as_pattern(own.name).rpartition(".")[0]
        if module not in self.known.experts_after:
            return self._is_after_module(module)
        if self.experts is None:
            raise self._uncertain(info, "whether text or images run this expert")
        return own.expert is not None and own.expert >= self.experts

    def _is_after_module(self, path: str) -> bool:
        """Whether a module of the loaded model has those experts."""
        return self.known is not None and as_pattern(path) in self.known.experts_after.values()

    def _is_uncalled(self, info: TensorInfo) -> bool:
        loaded = find_in_memory(info.name, self.architecture).name.removesuffix(".weight")
        return self.known is not None and as_pattern(loaded) in self.known.uncalled

    def _is_stored_name(self, name: str) -> bool:
        return self.known is not None and as_pattern(name) in self.known.names

    def _matrix(self, index: int, name: str, info: TensorInfo) -> Matrix:
        own = find_in_memory(info.name, self.architecture)
        if not own.name:
            raise CheckpointError(
                f"{self.checkpoint.folder}: {info.name!r}: transformers makes other tensors of it"
                " as it loads it, and what is not the same matrix on disk and in the loaded model"
                f" is not supported. A file for {option('layers')} may leave it as it is: `left:"
                f" {{{path_of(info.name, index)}: why it stays}}`."
            )
        at = EXPERT.fullmatch(f"{name}.weight")
        transposed = self.transposed and name.rpartition(".")[2].startswith("c_")
        transposed |= path_of(info.name, index) in self.stated.transposed
        on_disk = is_swapped(info.name, self.architecture)
        out, wide = info.shape[::-1] if transposed or on_disk else info.shape
        swapped = transposed or (self.swaps_experts and is_fused(own.name, self.known))
        loaded = LoadedWeight(own.name, own.expert, own.part * out, swapped)
        place = None if at is None else (at["at"].partition(f".{index}.")[2], int(at["expert"]))
        return Matrix(
            name,
            index,
            info,
            out,
            wide,
            loaded,
            transposed=transposed or on_disk,
            of_expert=place and (place[0].rstrip("."), place[1]),
        )

    def _read_in_memory(
        self, index: int, info: TensorInfo, own: Place, names: list[str]
    ) -> Iterator[Matrix]:
        """The layers in a parameter that is stored as the loaded model has it, or in a share."""
        parameter = own.name
        paths = [name.partition(f".{index}.")[2] for name in names]
        experts = info.shape[0] if len(info.shape) == _OF_EXPERTS else None
        *_, rows, columns = info.shape
        transposed = self.swaps_experts and is_fused(parameter, self.known)
        if transposed:
            rows, columns = columns, rows
        out = rows // len(paths)
        if (reason := self._reason(paths[0], info, index)) is not None:
            self.structure.reasons[info.name] = reason
            if len(info.shape) != 2 or not paths[0].endswith(".weight") or _is_no_linear(paths[0]):
                return
        for expert in range(experts or 1):
            for part in range(len(paths)):
                name = names[part].removesuffix(".weight")
                at = EXPERT.fullmatch(names[part])
                if at is not None and experts is not None:
                    name = f"{at['at']}experts.{expert}.{at['word']}"
                number = None if experts is None else expert
                loaded = LoadedWeight(parameter, number, (own.part + part) * out, transposed)
                place = None if at is None else at["at"].partition(f".{index}.")[2].rstrip(".")
                matrix = Matrix(
                    name,
                    index,
                    info,
                    out,
                    columns,
                    loaded,
                    expert=number,
                    row_start=part * out,
                    transposed=transposed,
                    of_expert=None if place is None else (place, expert),
                )
                if reason is None:
                    yield matrix
                else:
                    self.structure.unquantized.append(matrix)

    def _reason(self, path: str, info: TensorInfo, index: int) -> str | None:
        """Why a tensor of two or more dimensions is in no fusion group."""
        own = find_in_memory(info.name, self.architecture)
        loaded = own.name.removesuffix(".weight")
        is_matrix = own.expert is None and len(info.shape) == 2
        if own.parts > 1 and is_matrix and path.endswith("_proj.weight"):
            return "transformers holds it and others in one matrix, of which no part is quantized"
        if self.known is not None:
            pattern = as_pattern(loaded)
            if (why := self.known.odd_experts.get(pattern.rpartition(".")[0])) is not None:
                return f"{why}: no stage runs them one by one"
            if pattern in self.known.odd and len(info.shape) == _OF_EXPERTS:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {info.name!r} of shape {list(info.shape)}: it has"
                    f" the experts of a {self.known.odd[pattern]}, which no stage runs one by one."
                    f" A file for {option('layers')} may leave them as they are: `left:"
                    f" {{{path_of(info.name, index)}: why it stays as it is}}`."
                )
            if pattern in self.known.partly:
                if not self.idle:
                    raise CheckpointError(
                        f"{self.checkpoint.folder}: {info.name!r}: on text, transformers runs it in"
                        " some decoder layers and not in others, and in which, its tensors do not"
                        " say."
                    )
                if index in self.idle:
                    return "transformers does not run its decoder layer on text"
            if pattern in self.known.reused:
                return "its weight is used more than once for a token, so one error counts often"
            if pattern in self.known.odd and not kept_reason(path):
                return (
                    f"transformers computes more with it than a product: {self.known.odd[pattern]}"
                )
            if self._is_uncalled(info) and not kept_reason(path):
                return "transformers does not run it on text"
        if (reason := kept_reason(path)) is not None:
            # A gated MLP may call its first matrix so.
            place, _, rest = f"{loaded}.weight".rpartition(".gate.")
            is_of_mixture = place in self.mixtures or self._is_after_module(f"{place}.experts")
            if rest == "weight" and not is_of_mixture and "router" not in path:
                raise self._uncertain(info, "whether it is a router or a gate of an MLP")
            return reason
        if (reason := no_linear_reason(path)) is not None:
            return reason
        if info.dtype not in ("BF16", "F16", "F32") and not info.decoded:
            return f"a table of {info.dtype}"
        is_weight = path.endswith(".weight") and len(info.shape) == 2
        if is_weight:
            return None
        if self.hidden is None:
            return None
        is_flat = len(info.shape) == 2 and min(info.shape) < self.hidden
        return OWN_PARAMETER if is_flat or math.prod(info.shape) < self.hidden**2 else None

    def _is_transposed(self) -> bool:
        """Whether the layers named ``c_…`` are GPT-2's, which store [in, out]."""
        for paths in self.tensors.values():
            for path, info in paths:
                if path.endswith((".c_attn.weight", ".c_fc.weight")) and len(info.shape) == 2:
                    return info.shape[0] == self.hidden != info.shape[1]
        return False

    def _uncertain(self, info: TensorInfo, what: str) -> CheckpointError:
        path = as_pattern(info.name.removeprefix(f"{self.structure.stack}."))
        path = path.removeprefix("#.").removesuffix(".weight")
        linear = f"`linear: [{path}]` or " if len(info.shape) == 2 else ""
        return CheckpointError(
            f"{self.checkpoint.folder}: {info.name!r} of shape {list(info.shape)}: {what} is not"
            f" certain for model_type {self.architecture!r}. Say it in a file for"
            f" {option('layers')}: {linear}`left: {{{path}: why it stays as it is}}`."
        )


def _has_own_name(matrix: Matrix) -> bool:
    """Whether a matrix is an expert's own tensor, and nothing but numbers differ in the next's."""
    is_same = matrix.loaded.expert is not None or matrix.loaded.name == matrix.info.name
    return matrix.of_expert is not None and is_same and f"{matrix.name}.weight" == matrix.info.name


def _like(first: Matrix, info: TensorInfo, number: int) -> Matrix:
    """The matrix of another expert."""
    assert first.of_expert is not None
    own = first.loaded
    loaded = (
        LoadedWeight(info.name)
        if own.expert is None
        else LoadedWeight(own.name, number, own.row_start)
    )
    return Matrix(
        info.name.removesuffix(".weight"),
        first.layer,
        info,
        first.out_features,
        first.in_features,
        loaded,
        of_expert=(first.of_expert[0], number),
    )


def _is_no_linear(path: str) -> bool:
    return kept_reason(path) is None and no_linear_reason(path) is not None


def _stated(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    values = (config.get(key) for key in keys)
    return next((v for v in values if type(v) is int and 0 < v < 2**31), None)


def _few_reasons(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name!r}: {why}" for name, why in list(reasons.items())[:2])
