"""Joins the matrices of a decoder layer into fusion groups, by their names.

Which layers engines join is what vLLM 0.32 and 0.33 join in any of their model classes
(``mofq/engines/facts/joined``; a test compares). Joining more than an engine does gives up freedom,
and nothing that it serves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mofq.model.checkpoint.headers import TensorInfo
from mofq.model.layers.linear import LoadedWeight
from mofq.model.layers.names_in_memory import as_pattern

#: Layers beside each other that engines concatenate, and the name of the group; all must be there.
JOINED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("q_proj", "k_proj", "v_proj"), "qkv"),
    (("query", "key", "value"), "qkv"),
    (("query_proj", "key_proj", "value_proj"), "qkv"),
    (("q_lin", "k_lin", "v_lin"), "qkv"),
    (("project_q", "project_k", "project_v"), "qkv"),
    (("Wq", "Wk", "Wv"), "qkv"),
    (("q", "k", "v"), "qkv"),
    (("to_q", "to_k", "to_v"), "qkv"),
    (("q_proj", "k_proj"), "qkv"),
    (("q_a_proj", "kv_a_proj_with_mqa"), "latent"),
    (("wq_a", "wkv"), "latent"),
    (("wkv", "wgate"), "wkv_wgate"),
    (("key_proj", "value_proj"), "kv"),
    (("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
    (("in_proj_b", "in_proj_a"), "in_proj_ba"),
    (("gate_proj", "up_proj"), "gate_up"),
    (("linear_gate", "up_proj"), "gate_up"),
    (("w1", "w3"), "gate_up"),
    (("c_fc_0", "c_fc_1"), "gate_up"),
    (("w_0", "w_1"), "gate_up"),
    (("proj_up_gate", "proj_up"), "gate_up"),
)
#: The same of one model type alone: in others, layers of these names stay apart.
JOINED_OF_TYPE: Mapping[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    **dict.fromkeys(
        ("beam", "muse_spark"), ((("q_proj", "k_proj", "v_proj", "gate_proj"), "qkvg"),)
    ),
    "glm5_next": ((("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "g_a_proj"), "qkvbfg"),),
    "kimi_linear": (
        (("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "g_proj"), "qkvbfg"),
        (("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj"), "qkvbf"),
        (("q_a_proj", "kv_a_proj_with_mqa", "g_proj"), "latent"),
    ),
}
#: The same where the module that they are in has a certain last word.
JOINED_IN: Mapping[str, tuple[tuple[str, ...], str]] = {
    "linear_attn": (("q_proj", "k_proj", "v_proj", "g_proj"), "qkvg"),
    "attention": (("q_proj", "k_proj", "v_proj", "b_proj"), "qkvb"),
}
#: Last word of a path -> what the group of that layer alone is called.
_ALONE = {
    **dict.fromkeys(
        ("o_proj", "out_proj", "dense", "Wo", "attention_out", "out_lin", "to_out"), "o"
    ),
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
_FIRST = ("qkvbfg", "qkvbf", "qkvg", "qkvb", "qkv", "latent", "q", "kv")
_EXPERT_ORDER = {
    **dict.fromkeys(("gate_proj", "w1", "gate_up_proj"), 0),
    **dict.fromkeys(("up_proj", "w3"), 1),
    **dict.fromkeys(("down_proj", "w2"), 2),
}
_LAST = ("gate_up", "gate", "up", "o", "out", "down")


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
    of_expert: tuple[str, int] | None = None  #: path of the mixture, and which of its experts

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


def join(
    found: Sequence[Matrix],
    model_type: str | None = None,
    stated: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[tuple[str, list[Matrix]]]:
    """The fusion groups of a decoder layer, in order.

    Args:
        found: Its matrices.
        model_type: Of the model.
        stated: Name of a group -> paths of its matrices, of `StatedLayers`.
    """
    left = {as_pattern(matrix.path): matrix for matrix in found if matrix.of_expert is None}
    for name, paths in (stated or {}).items():
        members = [left[path] for path in paths if path in left]
        if members:
            yield name, members
            found = [matrix for matrix in found if matrix not in members]
    experts: dict[str, list[Matrix]] = {}
    by_parent: dict[str, dict[str, Matrix]] = {}
    for matrix in found:
        if matrix.of_expert is not None:
            experts.setdefault(matrix.of_expert[0], []).append(matrix)
        else:
            by_parent.setdefault(matrix.above, {})[matrix.word] = matrix
    groups: list[tuple[tuple[Any, ...], str, list[Matrix]]] = []
    names: set[str] = set()
    for parent, words in by_parent.items():
        for name, members in _join_beside(parent, words, model_type):
            full = _group_name(parent, name)
            if full in names:
                full = f"{parent}.{name}" if parent else name
            names.add(full)
            groups.append((_rank(parent, name), full, members))
    for _, name, members in sorted(groups, key=lambda group: group[0]):
        yield name, members
    for place in sorted(experts):
        name = "moe.experts" if len(experts) == 1 else f"{place}.experts"
        yield name, sorted(experts[place], key=_expert_order)


def joined_apart(
    groups: Mapping[str, Iterable[tuple[str, int]]], model_type: str | None
) -> tuple[str, ...]:
    """Layers beside each other that are in different fusion groups, and would be joined here.

    Args:
        groups: Name -> name and in_features of each layer, as an earlier version joined them.
        model_type: Of the model.

    Returns:
        The names of the first such layers; none where there are none.
    """
    by_parent: dict[str, dict[str, tuple[int, str]]] = {}
    for group, layers in groups.items():
        for name, in_features in layers:
            parent, _, word = name.rpartition(".")
            by_parent.setdefault(parent, {})[word] = (in_features, group)
    for parent, words in by_parent.items():
        left = dict(words)
        for joined, _ in _joined_in(parent, model_type):
            members = [left[word] for word in joined if word in left]
            if len(members) == len(joined) and len({inputs for inputs, _ in members}) == 1:
                if len({group for _, group in members}) > 1:
                    return tuple(f"{parent}.{word}" for word in joined)
                for word in joined:
                    del left[word]
    return ()


def _joined_in(parent: str, model_type: str | None) -> tuple[tuple[tuple[str, ...], str], ...]:
    """What is joined in a module, and its name; the first that is there counts."""
    last = parent.rpartition(".")[2]
    of_module = (JOINED_IN[last],) if last in JOINED_IN else ()
    return (*JOINED_OF_TYPE.get(model_type or "", ()), *of_module, *JOINED)


def _join_beside(
    parent: str, words: Mapping[str, Matrix], model_type: str | None
) -> Iterator[tuple[str, list[Matrix]]]:
    left, last = dict(words), parent.rpartition(".")[2]
    for joined, name in _joined_in(parent, model_type):
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


def _expert_order(matrix: Matrix) -> tuple[int, int, str]:
    assert matrix.of_expert is not None
    word = matrix.name.rpartition(".")[2]
    return matrix.of_expert[1], _EXPERT_ORDER.get(word, len(_EXPERT_ORDER)), word
