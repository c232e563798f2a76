"""Infers the structure of a decoder from the names and shapes of its tensors.

For model types without a row in `families`. Needs headers and the config, no torch. Coverage is
total: every matrix of a decoder layer is in a fusion group, or listed with the reason why not. What
the names do not decide is an error.

Which layers engines join is what vLLM 0.33 joins in any of its model classes (their
``packed_modules_mapping``, and ``fused_qkv_a_proj`` of latent attention); joining more than an
engine does gives up freedom, and never what it serves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mofq.exceptions import CheckpointError
from mofq.model.checkpoint.headers import CONFIG_FILE, Checkpoint, TensorInfo
from mofq.model.layers.families import ANY_HEADS
from mofq.model.layers.linear import LoadedWeight
from mofq.model.layers.names_in_memory import (
    KnownType,
    as_pattern,
    find_in_memory,
    find_stored,
    find_stored_name,
    known_type,
)

#: Layers beside each other that engines concatenate, and the name of the group; all must be there.
_JOINED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("q_proj", "k_proj", "v_proj"), "qkv"),
    (("query", "key", "value"), "qkv"),
    (("query_proj", "key_proj", "value_proj"), "qkv"),
    (("q_lin", "k_lin", "v_lin"), "qkv"),
    (("project_q", "project_k", "project_v"), "qkv"),
    (("Wq", "Wk", "Wv"), "qkv"),
    (("q", "k", "v"), "qkv"),
    (("q_proj", "k_proj"), "qkv"),
    (("q_a_proj", "kv_a_proj_with_mqa"), "latent"),
    (("wq_a", "wkv"), "latent"),
    (("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
    (("in_proj_b", "in_proj_a"), "in_proj_ba"),
    (("gate_proj", "up_proj"), "gate_up"),
    (("w1", "w3"), "gate_up"),
    (("w_0", "w_1"), "gate_up"),
    (("proj_up_gate", "proj_up"), "gate_up"),
)
#: The same where the module that they are in has a certain last word.
_JOINED_IN: Mapping[str, tuple[tuple[str, ...], str]] = {
    "linear_attn": (("q_proj", "k_proj", "v_proj", "g_proj"), "qkvg")
}
#: Last word of a path -> what the group of that layer alone is called.
_ALONE = {
    **dict.fromkeys(("o_proj", "out_proj", "dense", "Wo", "attention_out", "out_lin"), "o"),
    **dict.fromkeys(("qkv_proj", "query_key_value", "Wqkv", "c_attn", "qkv"), "qkv"),
    "kv_a_proj_with_mqa": "latent",
    "q_b_proj": "q",
    "wq_b": "q",
    "kv_b_proj": "kv",
}
_ALONE_IN_MLP = {
    **dict.fromkeys(("c_fc", "fc1", "fc_in", "dense_h_to_4h", "lin1", "layer_1"), "up"),
    **dict.fromkeys(("c_proj", "fc2", "fc_out", "dense_4h_to_h", "lin2", "layer_2", "w2"), "down"),
    **dict.fromkeys(("proj_down", "w_out"), "down"),
}
_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "multi_head_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
_SHARED = ("shared_expert", "shared_experts", "shared_mlp")
#: In this order within a module; others stand between by name.
_FIRST = ("qkvg", "qkv", "latent", "q", "kv")
_LAST = ("gate_up", "gate", "up", "o", "out", "down")

#: Experts as one tensor a matrix: gate, up, down; the first that occurs.
_EXPERT_WORDS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_EXPERT = re.compile(r"(?P<at>.*)\bexperts\.(?P<expert>[0-9]{1,6})\.(?P<word>\w+)\.weight")
_FUSED = re.compile(r"(?P<at>.*)\bexperts\.(?P<half>gate_up|down)_proj")

_ROUTER = "a router: which experts run is decided, not computed"
_TIME_STEP = "the time steps of a scan, which engines keep as they are"
#: Paths of matrices that stay as they are -> why.
_KEPT: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?!.*att)(.*\.)?(gate|\w*router)(\.\w+)*"), _ROUTER),
    (re.compile(r".*shared_expert_gate\.weight"), _ROUTER),
    (re.compile(r".*\bdt_proj\.weight"), _TIME_STEP),
    (re.compile(r".*\bindexer\..*"), "an indexer: what is attended to is decided, not computed"),
    (re.compile(r".*(hyper_connection\.\w+|\w+_coefs)\.weight"), "mixes a few residual streams"),
)
_NOT_LINEAR: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r".*conv\w*\.weight"), "a convolution"),
    (re.compile(r".*(_decay|slope_rate)"), "computed from the config"),
    (re.compile(r".*(norm|ln_\w+|ln)\.\w+(\.weight)?"), "a part of a norm"),
    (re.compile(r".*embed\w*(\.\w+)*\.weight"), "a table that is looked up"),
    (re.compile(r".*(rel_pos|relative_attention_bias|rel_)\w*(\.weight)?"), "positions"),
    (re.compile(r".*bias"), "a bias"),
)
_VECTORS = "no weight of a linear layer: a parameter of its own"

#: Words of a stack's name that is no language model's.
_TOWERS = re.compile(
    r"vision|visual|image|img|audio|speech|sound|tower|video|patch|projector|resampler|mtp|nextn"
    r"|moe_vision|tokenizer|codec|diffusion|talker|qformer|q_former|perceiver|git\.image"
)
_STACK = re.compile(r"(?P<stack>(?:[^.]+\.)*?[^.\d][^.]*)\.(?P<index>[0-9]{1,6})\.(?P<path>.+)")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "n_layers")
_HIDDEN = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "embed", "tok_embeddings")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix of a decoder layer, under the name by which engines' loaders know it."""

    name: str  #: without ``.weight``
    layer: int
    info: TensorInfo
    out_features: int
    in_features: int
    loaded: LoadedWeight
    expert: int | None = None
    row_start: int = 0
    transposed: bool = False

    @property
    def path(self) -> str:
        """The part of the name that is inside the decoder layer."""
        return self.name.partition(f".{self.layer}.")[2]

    @property
    def above(self) -> str:
        """The path of the module that it is a part of."""
        return self.path.rpartition(".")[0]

    @property
    def word(self) -> str:
        """The last word of the path."""
        return self.path.rpartition(".")[2]


@dataclass(slots=True)
class Structure:
    """What was inferred of a decoder."""

    stack: str  #: name of the list of decoder layers on disk: ``model.layers``
    layers: int
    groups: list[list[tuple[str, list[Matrix]]]]  #: of each layer: name, members
    unquantized: list[Matrix] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)  #: tensor -> why it is in no group
    embedding: TensorInfo | None = None

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
    checkpoint: Checkpoint, architecture: str, config: Mapping[str, Any]
) -> Structure:
    """Find the decoder's matrices and what engines join of them.

    Args:
        checkpoint: Of a type without rules.
        architecture: Its ``model_type``.
        config: Of the language model.

    Raises:
        CheckpointError: Something is not certain; the message says what.
    """
    stack, indices = _find_stack(checkpoint, config)
    count = _stated(config, _LAYER_COUNTS) or max(indices) + 1
    structure = Structure(stack, count, [[] for _ in range(count)])
    inferrer = _Inferrer(checkpoint, architecture, config, structure)
    for index in range(count):
        inferrer.infer_layer(index)
    inferrer.explain_outside()
    if not any(structure.groups):
        raise CheckpointError(
            f"{checkpoint.folder}: model_type {architecture!r}: no linear layer of the decoder can"
            f" be quantized. {_few_reasons(structure.reasons)}"
        )
    return structure


def _find_stack(checkpoint: Checkpoint, config: Mapping[str, Any]) -> tuple[str, set[int]]:
    """The name of the list of decoder layers, and its indices."""
    stacks: dict[str, set[int]] = {}
    for name, info in checkpoint.tensors.items():
        match = _STACK.fullmatch(name)
        if match is not None and len(info.shape) >= 2:
            stacks.setdefault(match["stack"], set()).add(int(match["index"]))
    count = _stated(config, _LAYER_COUNTS)
    found = {name: at for name, at in stacks.items() if not _TOWERS.search(name)} or stacks
    if len(found) > 1 and count is not None:
        found = {n: at for n, at in found.items() if at >= set(range(count))} or found
    if len(found) > 1:
        decoders = {n: at for n, at in found.items() if re.search(r"decoder|language|text", n)}
        found = decoders or found
    if len(found) != 1:
        stated = ", ".join(f"{name}.0…{max(at)}" for name, at in list(found.items())[:4])
        raise CheckpointError(
            f"{checkpoint.folder}: needed one list of decoder layers, found"
            f" {stated or 'none'}: which of them is the language model is not certain."
        )
    ((name, indices),) = found.items()
    if count is not None and not indices >= set(range(count)):
        raise CheckpointError(
            f"{checkpoint.folder / CONFIG_FILE}: needed {count} decoder layers as the config says,"
            f" found {len(indices)} in the tensors (highest index {max(indices)}). Config and"
            " weights are of different models, or a shard is missing."
        )
    return name, indices


class _Inferrer:
    """Goes through the tensors of a checkpoint once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: str,
        config: Mapping[str, Any],
        structure: Structure,
    ) -> None:
        self.checkpoint = checkpoint
        self.architecture = architecture
        self.known: KnownType | None = known_type(architecture)
        self.hidden = _stated(config, _HIDDEN)
        self.structure = structure
        self.tensors: dict[int, list[tuple[str, TensorInfo]]] = {}
        prefix = f"{structure.stack}."
        for name, info in checkpoint.tensors.items():
            index, dot, path = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and dot and index.isascii() and index.isdigit():
                self.tensors.setdefault(int(index), []).append((path, info))
        self.transposed = self._is_transposed()

    def infer_layer(self, index: int) -> None:
        """Divide the matrices of one decoder layer."""
        found = [
            matrix
            for _, info in self.tensors.get(index, ())
            if len(info.shape) >= 2
            for matrix in self._read(index, info)
        ]
        self.structure.groups[index] = [
            (f"layers.{index}.{name}", members) for name, members in _join(found)
        ]

    def _read(self, index: int, info: TensorInfo) -> Iterator[Matrix]:
        """The linear layers in a tensor; others are noted with their reason."""
        stored = find_stored(info.name, self.architecture)
        own = find_in_memory(info.name, self.architecture)
        is_merged = len(stored) > 1 or any(_EXPERT.fullmatch(one.name) for one in stored)
        if is_merged and not self._is_stored_name(info.name):
            yield from self._read_in_memory(index, info, [one.name for one in stored])
            return
        name = find_stored_name(info.name, self.architecture)
        inside = own.name.partition(f".{index}.")[2]
        if len(info.shape) == 3 and _FUSED.fullmatch(inside):
            before = name.partition(f".{index}.")[0]
            yield from self._read_fused(index, f"{before}.{index}.{inside}", info)
            return
        path = name.partition(f".{index}.")[2]
        reason = self._reason(path, info)
        if reason is not None:
            self.structure.reasons[info.name] = reason
            if not path.endswith(".weight") or len(info.shape) != 2 or _is_no_linear(path):
                return
        elif len(info.shape) != 2 or not path.endswith(".weight"):
            raise self._uncertain(info, "whether it is the weight of a linear layer")
        matrix = self._matrix(index, name.removesuffix(".weight"), info)
        if reason is None:
            yield matrix
        else:
            self.structure.unquantized.append(matrix)

    def _is_stored_name(self, name: str) -> bool:
        return self.known is not None and as_pattern(name) in self.known.names

    def _matrix(self, index: int, name: str, info: TensorInfo) -> Matrix:
        own = find_in_memory(info.name, self.architecture)
        if not own.name:
            raise self._uncertain(info, "where the loaded model has it")
        transposed = self.transposed and name.rpartition(".")[2].startswith("c_")
        shape = info.shape[::-1] if transposed else info.shape
        out, wide = shape
        loaded = LoadedWeight(own.name, own.expert, own.part * out, transposed)
        return Matrix(name, index, info, out, wide, loaded, transposed=transposed)

    def _read_in_memory(self, index: int, info: TensorInfo, names: list[str]) -> Iterator[Matrix]:
        """The layers in a parameter that was stored as the loaded model has it."""
        paths = [name.partition(f".{index}.")[2] for name in names]
        experts = info.shape[0] if len(info.shape) == 3 else None
        *_, rows, columns = info.shape
        out = rows // len(paths)
        if (reason := self._reason(paths[0], info)) is not None:
            self.structure.reasons[info.name] = reason
            if len(info.shape) != 2 or not paths[0].endswith(".weight") or _is_no_linear(paths[0]):
                return
        for expert in range(experts or 1):
            for part in range(len(paths)):
                name = names[part].removesuffix(".weight")
                at = _EXPERT.fullmatch(names[part])
                if at is not None and experts is not None:
                    name = f"{at['at']}experts.{expert}.{at['word']}"
                number = None if experts is None else expert
                loaded = LoadedWeight(info.name, number, part * out, transposed=False)
                matrix = Matrix(
                    name, index, info, out, columns, loaded, expert=number, row_start=part * out
                )
                if reason is None:
                    yield matrix
                else:
                    self.structure.unquantized.append(matrix)

    def _read_fused(self, index: int, name: str, info: TensorInfo) -> Iterator[Matrix]:
        """Experts that even the hub's checkpoints store as one tensor."""
        if self.known is None or self.known.experts is None:
            raise self._uncertain(info, "in which order it has gates, ups, inputs and outputs")
        if self.known.experts:
            raise CheckpointError(
                f"{self.checkpoint.folder}: {info.name!r}: {self.known.experts}, are not supported:"
                " no stage reads their layout yet."
            )
        match = _FUSED.fullmatch(name)
        assert match is not None
        own = find_in_memory(info.name, self.architecture)
        words = _EXPERT_WORDS[1] if "block_sparse_moe" in name else _EXPERT_WORDS[0]
        halves = words[:2] if match["half"] == "gate_up" else words[2:]
        count, rows, columns = info.shape
        out = rows // len(halves)
        for expert in range(count):
            for part, word in enumerate(halves):
                yield Matrix(
                    f"{match['at']}experts.{expert}.{word}",
                    index,
                    info,
                    out,
                    columns,
                    LoadedWeight(own.name, expert, part * out, transposed=False),
                    expert=expert,
                    row_start=part * out,
                )

    def _reason(self, path: str, info: TensorInfo) -> str | None:
        """Why a tensor of two or more dimensions is in no fusion group."""
        loaded = find_in_memory(info.name, self.architecture).name.removesuffix(".weight")
        if self.known is not None:
            pattern = as_pattern(loaded)
            if pattern in self.known.partly:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {info.name!r}: on text, transformers runs it in"
                    " some decoder layers and not in others, which is not supported: nothing could"
                    " be measured of the others."
                )
            if pattern in self.known.reused:
                return "its weight is used more than once for a token, so one error counts often"
            if pattern in self.known.uncalled and not _kept_reason(path):
                return "transformers does not run it on text"
        if (reason := _kept_reason(path)) is not None:
            return reason
        for rule, why in _NOT_LINEAR:
            if rule.fullmatch(path):
                return why
        if info.dtype not in ("BF16", "F16", "F32") and not info.decoded:
            return f"a table of {info.dtype}"
        is_weight = path.endswith(".weight") and len(info.shape) == 2
        if is_weight:
            return None
        if self.hidden is None:
            return None
        is_flat = len(info.shape) == 2 and min(info.shape) < self.hidden
        return _VECTORS if is_flat or math.prod(info.shape) < self.hidden**2 else None

    def _is_transposed(self) -> bool:
        """Whether the layers named ``c_…`` are GPT-2's, which store [in, out]."""
        for paths in self.tensors.values():
            for path, info in paths:
                if path.endswith((".c_attn.weight", ".c_fc.weight")) and len(info.shape) == 2:
                    return info.shape[0] == self.hidden != info.shape[1]
        return False

    def explain_outside(self) -> None:
        """Say of matrices outside of the decoder layers what they are; find the embedding."""
        prefix = f"{self.structure.stack}."
        for name, info in self.checkpoint.tensors.items():
            if name.startswith(prefix) or len(info.shape) < 2:
                continue
            above, _, _ = name.removesuffix(".weight").rpartition(".")
            word = name.removesuffix(".weight").rpartition(".")[2]
            if word in _EMBEDDINGS and not _TOWERS.search(name) and name.endswith(".weight"):
                self.structure.embedding = self.structure.embedding or info
                self.structure.reasons[name] = "the embedding"
            elif name.removesuffix(".weight") in ANY_HEADS:
                self.structure.reasons[name] = "the lm_head"
            elif _TOWERS.search(above):
                self.structure.reasons[name] = (
                    "of another tower, or of what predicts further tokens"
                )
            else:
                self.structure.reasons[name] = "outside of the decoder layers"

    def _uncertain(self, info: TensorInfo, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoint.folder}: {info.name!r} of shape {list(info.shape)}: {what} is not"
            f" certain for model_type {self.architecture!r}."
        )


def _join(found: Sequence[Matrix]) -> Iterator[tuple[str, list[Matrix]]]:
    """The fusion groups of a decoder layer, in order."""
    experts = [matrix for matrix in found if _is_expert(matrix.path)]
    by_parent: dict[str, dict[str, Matrix]] = {}
    for matrix in found:
        if not _is_expert(matrix.path):
            by_parent.setdefault(matrix.above, {})[matrix.word] = matrix
    groups: list[tuple[tuple[Any, ...], str, list[Matrix]]] = []
    names: set[str] = set()
    for parent, words in by_parent.items():
        for name, members in _join_beside(parent, words):
            full = _group_name(parent, name)
            if full in names:
                full = f"{parent}.{name}" if parent else name
            names.add(full)
            groups.append((_rank(parent, name), full, members))
    for _, name, members in sorted(groups, key=lambda group: group[0]):
        yield name, members
    places = sorted({_expert_place(matrix.path) for matrix in experts})
    for place in places:
        members = [matrix for matrix in experts if _expert_place(matrix.path) == place]
        name = "moe.experts" if len(places) == 1 else f"{place}.experts"
        yield name, sorted(members, key=_expert_order)


def _join_beside(parent: str, words: Mapping[str, Matrix]) -> Iterator[tuple[str, list[Matrix]]]:
    left, last = dict(words), parent.rpartition(".")[2]
    rules = (_JOINED_IN[last], *_JOINED) if last in _JOINED_IN else _JOINED
    for joined, name in rules:
        members = [left[word] for word in joined if word in left]
        if len(members) == len(joined) and len({m.in_features for m in members}) == 1:
            yield name, members
            for word in joined:
                del left[word]
    for word, matrix in left.items():
        plain = word.removesuffix("_proj")
        if last in (*_MLP, *_SHARED) or word in ("fc1", "fc2"):
            yield _ALONE_IN_MLP.get(word, plain), [matrix]
        elif "att" in parent and "linear" not in parent:
            yield ("o" if word == "c_proj" else _ALONE.get(word, plain)), [matrix]
        else:
            yield plain, [matrix]


def _group_name(parent: str, name: str) -> str:
    above, _, last = parent.rpartition(".")
    if parent in _ATTENTION:
        return f"attn.{name}"
    if parent in _MLP or (not parent and name in _ALONE_IN_MLP.values()):
        return f"mlp.{name}"
    if last in _SHARED and above in _MLP:
        return f"mlp.shared_{name}"
    return f"{parent}.{name}" if parent else name


def _rank(parent: str, name: str) -> tuple[Any, ...]:
    last = parent.rpartition(".")[2]
    if last in _SHARED:
        section = 3
    elif parent in _MLP or not parent:
        section = 2
    else:
        section = 0 if "att" in parent else 1
    if name in _FIRST:
        return section, parent, _FIRST.index(name), name
    return section, parent, len(_FIRST) + 1 + (_LAST.index(name) if name in _LAST else -1), name


def _is_expert(path: str) -> bool:
    return _EXPERT.fullmatch(f"{path}.weight") is not None


def _expert_place(path: str) -> str:
    return path.partition("experts.")[0].rstrip(".")


def _expert_order(matrix: Matrix) -> tuple[int, int, str]:
    match = _EXPERT.fullmatch(f"{matrix.path}.weight")
    assert match is not None
    order = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2}
    return int(match["expert"]), order.get(match["word"], 3), match["word"]


def _kept_reason(path: str) -> str | None:
    return next((why for rule, why in _KEPT if rule.fullmatch(path)), None)


def _is_no_linear(path: str) -> bool:
    return _kept_reason(path) is None and any(rule.fullmatch(path) for rule, _ in _NOT_LINEAR)


def _stated(config: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    values = (config.get(key) for key in keys)
    return next((v for v in values if type(v) is int and 0 < v < 2**31), None)


def _few_reasons(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name!r}: {why}" for name, why in list(reasons.items())[:2])
