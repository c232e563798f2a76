"""Which tensors of a model read its residual stream, write it, or hold values of attention heads.

With ``Q`` orthogonal, a decoder computes the same when its residual stream ``h`` is ``h Q``
throughout:

- what writes it (the embedding, o, down) is multiplied by ``Q`` at its outputs, biases too;
- an RMS norm divides by ``|h|``, which stays; its gain does not commute with ``Q`` and is folded
  into the layers behind it;
- what reads it (q, k, v, gate, up, routers, the lm_head) is multiplied by ``Q`` at its inputs.

Attention mixes tokens and not channels of a value, so each head's values can be rotated too: v at
its outputs, and o at its inputs. Scalars that a family multiplies by (Granite's multipliers)
commute.

Refused, with the reason: norms that subtract a mean, whose direction ``Q`` turns; norms of what
attention or MLP gives, whose gains stand before the residual stream and cannot be folded; and a
model that stores anything of which it is not known what it does to the residual stream.

Source: SliceGPT, arXiv:2401.15024; QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mofq.exceptions import RewriteError
from mofq.model.checkpoint.headers import CONFIG_FILE, MODULES_FILE, Checkpoint
from mofq.model.layers import ModelLayers
from mofq.model.layers.families import Family, family_of, read_sizes
from mofq.model.layers.make_layers import text_config
from mofq.model.layers.model_class import computes_hidden_states

_ROTATABLE = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3", "ernie4_5", "seed_oss"),
    *("mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "glm4_moe", "deepseek_v3"),
)
_NORMS_OF_OUTPUTS = (
    "it norms what attention and MLP give before it is added to the residual stream. A gain "
    "there stands between channels that a rotation mixes, and no layer behind it can take it"
)
_MEANS = "its norms subtract the mean of all channels, which a rotation changes"
_EMBEDDING_MODEL = (
    "an embedding model: engines serve its hidden states, which a rotation changes. A model whose "
    "lm_head is served can be rotated."
)
#: vLLM's ``gemma.py`` asserts that the two are tied.
_ALWAYS_TIED = (
    "engines take its lm_head from its embedding, whatever its config says. The gain of the last "
    "norm is folded into the one and not into the other"
)
_REFUSED: Mapping[str, str] = {
    "gemma": _ALWAYS_TIED,
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), _NORMS_OF_OUTPUTS),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4", "glm4"), _NORMS_OF_OUTPUTS),
    **dict.fromkeys(("cohere2", "starcoder2", "opt", "gpt2"), _MEANS),
}
_FINAL_NORM = "norm"
_ATTENTION_NORM, _MLP_NORM = "input_layernorm", "post_attention_layernorm"
#: In a decoder layer, not of the residual stream: norms of queries, keys and latent vectors,
#: what is added to the scores of a router, and tables that old checkpoints hold.
_INSIDE = (
    r"self_attn\.(q_norm|k_norm|q_a_layernorm|kv_a_layernorm)\.weight"
    r"|mlp\.gate\.e_score_correction_bias|self_attn\.rotary_emb\.inv_freq"
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor [..., rows, columns] touches what is rotated; a bias has rows alone."""

    reads: bool = False  #: its columns are channels of the residual stream
    writes: bool = False  #: its rows are
    norm: str | None = None  #: the tensor whose gain is folded into the columns
    reads_values: bool = False  #: its columns are values of heads, one head after the other
    #: From and to which rows there are values, of one head or of several.
    values: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream of a model, and the values of its heads."""

    hidden: int  #: channels of the residual stream
    head: int  #: channels of a head's values
    places: Mapping[str, Place]  #: tensor -> what it touches
    norms: tuple[str, ...]  #: tensors whose gains are folded
    embedding: str
    lm_head: str  #: its tensor, which is stored only after the rotation where it is tied
    is_tied: bool


def find_stream(checkpoint: Checkpoint, layers: ModelLayers) -> Stream:
    """What each tensor of a model has to do with its residual stream.

    Args:
        checkpoint: The model.
        layers: Its layers.

    Raises:
        RewriteError: A rotation would not be exact, or nothing is known of the family or of
            a tensor.
    """
    where, architecture = checkpoint.folder, layers.architecture
    if architecture in _REFUSED:
        raise RewriteError(f"{where}: a {architecture!r} is not rotated: {_REFUSED[architecture]}.")
    if layers.stated is not None:
        raise RewriteError(
            f"{where}: says which layers it has, and so it does not say where its residual stream "
            f"goes. A model is rotated by the rules of its family alone."
        )
    if architecture not in _ROTATABLE:
        raise RewriteError(
            f"{where}: where the residual stream of a {architecture!r} goes is not known; "
            f"it is for {', '.join(_ROTATABLE)}."
        )
    config = text_config(checkpoint)
    _check_config(checkpoint, config)
    family = family_of(architecture, config)
    sizes = read_sizes(config, family, where=str(where / CONFIG_FILE))
    embedding, final = (f"{layers.body}{name}" for name in (family.embedding, _FINAL_NORM))
    stored = [
        f"{name}.weight" for name in family.lm_heads if f"{name}.weight" in checkpoint.tensors
    ]
    lm_head = stored[0] if stored else f"{family.lm_heads[0]}.weight"
    if not stored and not layers.tied_lm_head:
        raise RewriteError(f"{where}: has no lm_head, into which the last norm could be folded.")
    places = {
        f"{embedding}.weight": Place(reads=True),  # a row of it is a vector of the stream
        lm_head: Place(reads=True, norm=f"{final}.weight"),
    }
    for layer in layers.linear_layers:
        if layer.decoder_layer is not None:
            at = f"{family.decoder}.{layer.decoder_layer}."
            path = layer.name.removeprefix(family.body + at)
            places[layer.tensor] = _place(path, layers.body + at, family, sizes)
    norms = tuple(dict.fromkeys(place.norm for place in places.values() if place.norm))
    places |= _bias_places(checkpoint, places)
    _check_known(checkpoint, {*places, *norms}, decoder=layers.body + family.decoder, sizes=sizes)
    for name in norms:
        if name not in checkpoint.tensors or checkpoint.tensors[name].shape != (sizes["hidden"],):
            raise RewriteError(
                f"{where}: needed a norm {name!r} of {sizes['hidden']} channels. The model is not "
                f"built as its family is."
            )
    return Stream(
        hidden=sizes["hidden"],
        head=sizes.get("latent_o", sizes["q"]) // sizes["heads"],
        places=places,
        norms=norms,
        embedding=f"{embedding}.weight",
        lm_head=lm_head,
        is_tied=layers.tied_lm_head,
    )


def _check_config(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Refuse what tensors do not show."""
    where = checkpoint.folder / CONFIG_FILE
    if computes_hidden_states(checkpoint.config):
        raise RewriteError(f"{where}: 'architectures' names {_EMBEDDING_MODEL}")
    modules = checkpoint.folder / MODULES_FILE  # Qwen3-Embedding is a ``ForCausalLM`` too
    if modules.is_file():
        raise RewriteError(f"{modules}: is of {_EMBEDDING_MODEL}")
    if config.get("clip_qkv") is not None:  # OLMoE
        raise RewriteError(
            f"{where}: 'clip_qkv' clips each channel of the values of attention, which a rotation "
            f"mixes. Such a model is not rotated."
        )


def _bias_places(checkpoint: Checkpoint, places: Mapping[str, Place]) -> dict[str, Place]:
    """Those of the biases: what the rows of the weight beside them touch."""
    found = {}
    for name, place in places.items():
        bias = name.removesuffix("weight") + "bias"
        if bias in checkpoint.tensors:
            found[bias] = Place(writes=place.writes, values=place.values)
    return found


def _check_known(
    checkpoint: Checkpoint, known: Collection[str], *, decoder: str, sizes: Mapping[str, int]
) -> None:
    """Refuse a tensor that may touch the residual stream in a way that is not known."""
    numbers = "|".join(map(str, range(sizes["decoder_layers"])))  # those behind predict ahead
    inside = re.compile(rf"{re.escape(decoder)}\.({numbers})\.({_INSIDE})")
    for name in checkpoint.tensors:
        if name not in known and not inside.fullmatch(name):
            raise RewriteError(
                f"{checkpoint.folder}: {name!r} may read or write the residual stream, and how is "
                f"not known. A model with such a tensor is not rotated."
            )


def _place(path: str, beside: str, family: Family, sizes: Mapping[str, int]) -> Place:
    """What a linear layer touches.

    Args:
        path: Of the layer in its decoder layer.
        beside: Before the names of tensors of this decoder layer.
        family: Of the model.
        sizes: Of the model.
    """
    out_size, in_size = _named_shape(path, family)
    norm = _ATTENTION_NORM if path.startswith("self_attn.") else _MLP_NORM
    values: tuple[tuple[int, int], ...] = ()
    if out_size == "qkv":
        values = ((sizes["q"] + sizes["kv"], sizes["qkv"]),)
    elif path == "self_attn.v_proj":
        values = ((0, sizes["kv"]),)
    elif out_size == "latent_kv":  # of each head a part of its keys, and its values
        one = sizes["nope"] + sizes["v_head"]
        starts = range(0, sizes["latent_kv"], one)
        values = tuple((start + sizes["nope"], start + one) for start in starts)
    return Place(
        reads=in_size == "hidden",
        writes=out_size == "hidden",
        norm=f"{beside}{norm}.weight" if in_size == "hidden" else None,
        reads_values=path == "self_attn.o_proj",
        values=values,
    )


def _named_shape(path: str, family: Family) -> tuple[str, str]:
    """Output and input features of a linear layer, as sizes of its family are named."""
    for rule in (*family.rules.values(), *family.shared.values(), family.gates):
        if path in rule:
            return rule[path]
    experts = family.experts
    assert experts is not None
    if ".experts." not in path:  # the router
        return ("experts", "hidden")
    is_down = path.rpartition(".")[2] == experts.down
    return ("hidden", experts.out) if is_down else (experts.out, "hidden")
