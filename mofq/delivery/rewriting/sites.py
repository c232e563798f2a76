"""Where a scale can move between the tensors of a model without changing its outputs.

A site is the input of a fusion group: input channel i is divided by ``s_i`` where it is made and
the group's weights are multiplied by ``s_i`` where it is read. It is made either by a norm, whose
weight (and bias) is divided, or by a linear layer, whose row (and bias) is:

========================  ==================================================================
norm -> q, k, v           every channel by itself
norm -> gate, up          likewise
v -> o                    attention mixes tokens and not channels, so a row of v passes through;
                          query heads that share a key-value head share the scale too
up -> down                ``act(gate) * up`` is linear in up
========================  ==================================================================

Left out: norms that multiply by ``1 + weight`` (Gemma), where dividing would cost precision that
the checkpoint's dtype has not got; norms that a router reads as well, and experts; producers that
are stored joined with others (Phi-3); families that are not in ``NORMS``.

Source: SmoothQuant, arXiv:2211.10438, ``smooth.py`` (norms); AWQ, arXiv:2306.00978,
``auto_scale.py`` (norms, v -> o where no heads are shared, up -> down).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mofq.exceptions import RewriteError
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import FusionGroup, LinearLayer, ModelLayers

#: Path of a fusion group's first layer inside a decoder layer -> the norm before it.
_LLAMA = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.qkv_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.gate_up_proj": "post_attention_layernorm",
}
_ATTENTION = {"self_attn.q_proj": "input_layernorm"}
#: model_type -> norms that can be divided.
NORMS: dict[str, Mapping[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "qwen3_moe"), _LLAMA),
    **dict.fromkeys(("granite", "smollm3", "ernie4_5", "seed_oss", "glm4"), _LLAMA),
    "starcoder2": {
        "self_attn.q_proj": "input_layernorm",
        "mlp.c_fc": "post_attention_layernorm",
    },
    **dict.fromkeys(("mixtral", "qwen2_moe", "olmoe"), _ATTENTION),
    "glm4_moe": _LLAMA,
    "deepseek_v3": {
        "self_attn.q_a_proj": "input_layernorm",
        "self_attn.q_b_proj": "self_attn.q_a_layernorm",
        "self_attn.kv_b_proj": "self_attn.kv_a_layernorm",
        "mlp.gate_proj": "post_attention_layernorm",
    },
    # One norm before attention and MLP alike, or norms after them alone.
    "cohere2": {},
    "olmo2": {},
    "olmo3": {},
    "exaone4": {},
    "gemma": {},
    "gemma2": {},
    "gemma3": {},
    "gemma3_text": {},
}
#: Path of a layer inside a decoder layer -> the layer whose outputs it reads.
PRODUCERS = {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.up_proj"}


@dataclass(frozen=True, slots=True)
class Site:
    """One place where a scale can move; its free scales are P, one for each norm channel or row."""

    group: str  #: fusion group that reads the input
    consumers: tuple[LinearLayer, ...]
    divided: tuple[str, ...]  #: tensors that are divided along their first dimension: [P, …]
    producer: LinearLayer | None  #: whose weight is the first of ``divided``; None: a norm
    scale_of_I: tuple[int, ...]  #: input channel -> which of the P scales it has

    @property
    def scales(self) -> int:
        """How many scales there are, P."""
        return max(self.scale_of_I) + 1


def find_sites(checkpoint: Checkpoint, layers: ModelLayers) -> tuple[Site, ...]:
    """Every site of a model, in the order of its fusion groups.

    Args:
        checkpoint: The model.
        layers: Its layers.

    Raises:
        RewriteError: Nothing is known of the family, or it has no site.
    """
    norms = NORMS.get(layers.architecture)
    if norms is None:
        raise RewriteError(
            f"{checkpoint.folder}: where a scale can move in a {layers.architecture!r} is not "
            f"known; it is for {', '.join(NORMS)}."
        )
    by_name = {layer.name: layer for layer in layers.grouped_layers}
    sites = []
    for group in layers.groups:
        first = group.layers[0]
        if any(layer.expert is not None or ".experts." in layer.name for layer in group.layers):
            continue
        for path, norm in norms.items():
            if first.name.endswith(f".{path}"):
                beside = first.tensor.removesuffix(f"{path}.weight")  # as the checkpoint names it
                sites.append(_norm_site(group, beside + norm, checkpoint))
        for path, producer in PRODUCERS.items():
            name = first.name.removesuffix(path) + producer
            if first.name.endswith(f".{path}") and name in by_name:
                sites.append(_linear_site(group, by_name[name], checkpoint))
    if not sites:
        raise RewriteError(
            f"{checkpoint.folder}: has no place where a scale can move. Quantize it as it is."
        )
    return tuple(sites)


def _norm_site(group: FusionGroup, norm: str, checkpoint: Checkpoint) -> Site:
    in_features = group.layers[0].in_features
    tensors = [f"{norm}.weight", f"{norm}.bias"]
    divided = tuple(name for name in tensors if name in checkpoint.tensors)
    if f"{norm}.weight" not in divided or checkpoint.tensors[divided[0]].shape != (in_features,):
        raise RewriteError(
            f"{checkpoint.folder}: needed a norm {norm!r} of {in_features} channels before "
            f"{group.name}. The model is not built as its family is."
        )
    return Site(group.name, group.layers, divided, None, tuple(range(in_features)))


def _linear_site(group: FusionGroup, producer: LinearLayer, checkpoint: Checkpoint) -> Site:
    (layer,) = group.layers
    bias = producer.tensor.removesuffix("weight") + "bias"
    divided = (producer.tensor, *((bias,) if bias in checkpoint.tensors else ()))
    scale_of_I: Sequence[int] = range(layer.in_features)
    if producer.out_features != layer.in_features:  # heads of the queries share those of the values
        config = checkpoint.config.get("text_config") or checkpoint.config
        head = layer.in_features // int(config["num_attention_heads"])
        shared = layer.in_features // producer.out_features
        scale_of_I = [i // head // shared * head + i % head for i in scale_of_I]
    return Site(group.name, group.layers, divided, producer, tuple(scale_of_I))
