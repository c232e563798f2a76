"""Writes the ``--tensor-type`` arguments of llama.cpp's ``llama-quantize``: the nearest types.

GGUF has types and not schemes, so something is always lost; the file says what,
line by line. Activations are quantized there as llama.cpp does it, whatever
the recipe says. The file is made of arguments and comments, for
``llama-quantize $(grep -v '^#' FILE) in.gguf out.gguf Q8_0``.

Source: llama.cpp, ``tools/quantize/quantize.cpp`` and ``ggml-common.h`` (blocks:
Q8_0, Q5_0, Q4_0: 32 codes under one f16 scale; Q4_1, Q5_1: and a minimum;
K types: 256 codes in two levels); ``gguf-py/gguf/tensor_mapping.py`` for names.
"""

from __future__ import annotations

import re

from mofq.decision.recipe import Recipe
from mofq.delivery.recipe_layers import checked_layers
from mofq.exceptions import BackendError, option
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import FUSION_RULES, LinearLayer
from mofq.numbers.formats import IntFormat
from mofq.numbers.schemes import Scheme, parse_scheme

_BLOCK = 32
_K_BLOCK = 256

_GATED = ("gate", "up", "down")
#: Last words of a layer's name -> GGUF's name of the tensor.
TENSORS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    **{f"mlp.shared_{e}.{w}_proj": f"ffn_{w}_shexp" for e in ("expert", "experts") for w in _GATED},
    # Not kv_b_proj, which llama.cpp's conversion cuts into two tensors.
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
}
_EXPERTS = {
    **{"gate_proj": "ffn_gate_exps", "w1": "ffn_gate_exps"},
    **{"up_proj": "ffn_up_exps", "w3": "ffn_up_exps"},
    **{"down_proj": "ffn_down_exps", "w2": "ffn_down_exps"},
}
#: Integer bits -> type of symmetric and of asymmetric codes.
_INTEGERS = {
    8: ("q8_0", "q8_0"),
    7: ("q8_0", "q8_0"),
    6: ("q6_k", "q6_k"),
    5: ("q5_0", "q5_1"),
    4: ("q4_0", "q4_1"),
    3: ("q3_k", "q3_k"),
    2: ("q2_k", "q2_k"),
}
_FLOATS = {
    "fp8_e4m3": "q8_0",
    "fp8_e5m2": "q8_0",
    "fp6_e3m2": "q6_k",
    "fp6_e2m3": "q6_k",
    "fp4_e2m1": "iq4_nl",
    "fp4_e2m1_ieee": "iq4_nl",
    "nf4": "iq4_nl",
}


def llama_cpp_arguments(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """The arguments, one tensor a line.

    Args:
        checkpoint: The model.
        recipe: Of that model.

    Returns:
        The text of the file.

    Raises:
        BackendError: A layer, or its type, has no name in GGUF that is known here.
        RecipeError: The recipe is not for this model.
    """
    layers = checked_layers(checkpoint, recipe, experts_apart=True)
    if layers.architecture not in FUSION_RULES:
        raise BackendError(
            f"{checkpoint.folder}: what llama.cpp calls the tensors of a {layers.architecture!r} "
            "is not known, and it leaves out what it does not find. Known are: "
            f"{', '.join(FUSION_RULES)}."
        )
    schemes = recipe.schemes
    lines: dict[str, tuple[str, str]] = {}
    for layer in layers.grouped_layers:
        name, kind = _tensor_name(layer), nearest_type(parse_scheme(schemes[layer.name]), layer)
        if lines.setdefault(name, kind) != kind:
            raise BackendError(
                f"{name}: holds this part of all experts of a decoder layer in one type, and the "
                f"recipe has {lines[name][0]} and {kind[0]} for it ({layer.name}). Measure with "
                f"{option('experts', 'projection')}, which gives them one scheme."
            )
    text = [f"# {recipe.model_name}: the nearest llama.cpp types, and what each loses."]
    for name, (type_name, loss) in lines.items():
        # Searched for anywhere in a name, and the last that is found counts: attn_output.weight.
        escaped = ("" if name.startswith("blk.") else "^") + name.replace(".", r"\.")
        text += [f"# {name}: {loss}", f"--tensor-type {escaped}={type_name}"]
    return "\n".join(text) + "\n"


def nearest_type(scheme: Scheme, layer: LinearLayer) -> tuple[str, str]:
    """The GGUF type nearest to a scheme, and what is lost.

    Args:
        scheme: Of the layer.
        layer: Whose shape must hold the type's blocks.

    Returns:
        Type and loss.
    """
    if scheme.weight is None:
        return "bf16", "nothing"
    element = scheme.weight.element
    if isinstance(element, IntFormat):
        kind = _INTEGERS[element.bits][0 if scheme.weight.symmetric else 1]
    else:
        if element.name not in _FLOATS:
            raise BackendError(
                f"{layer.name}: llama.cpp has no type near {element.name} of {scheme.name!r}. "
                f"Search with other formats."
            )
        kind = _FLOATS[element.name]
    losses = [_loss(scheme, kind)]
    if kind.endswith("_k") and layer.in_features % _K_BLOCK:
        wider = {"q6_k": "q8_0", "q3_k": "q4_0", "q2_k": "q4_0"}[kind]
        losses.append(f"in_features % {_K_BLOCK} != 0, so {wider} in place of {kind}")
        kind = wider
    if layer.in_features % _BLOCK:
        return "f16", f"in_features % {_BLOCK} != 0, so it is not quantized"
    if scheme.activation is not None:
        losses.append("activations as llama.cpp quantizes them")
    return kind, "; ".join(losses)


def _loss(scheme: Scheme, kind: str) -> str:
    weight = scheme.quantized_weight
    written = f"{weight.element.name}.{weight.granularity.name} with {weight.scale.name} scales"
    if kind.endswith("_k"):
        return f"{written} becomes blocks of {_K_BLOCK} with two levels of scales"
    return f"{written} becomes {kind}: {_BLOCK} codes under an f16 scale, chosen by llama.cpp"


def _tensor_name(layer: LinearLayer) -> str:
    if layer.role != "linear":  # of a tied one, llama.cpp multiplies by the same tensor
        return "token_embd.weight"
    if layer.name.endswith("lm_head"):
        return "output.weight"
    match = re.search(r"layers\.(\d+)\.(.+)$", layer.name)
    path = match[2] if match else layer.name
    word = _EXPERTS.get(path.rpartition(".")[2]) if ".experts." in path else TENSORS.get(path)
    if match is None or word is None:
        raise BackendError(
            f"{layer.name}: has no name in GGUF that is known here. Known: {', '.join(TENSORS)}."
        )
    return f"blk.{match[1]}.{word}.weight"
