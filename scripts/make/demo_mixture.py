"""The mixture of experts beside the demonstration model: its shape, its loss, its card.

`scripts/make/train_demo_model.py --mixture` trains it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

LAYERS = 4
EXPERTS = 8
ACTIVE = 2
#: It learns the text by heart in fewer steps than the dense model.
STEPS = 1000
#: Of the loss that keeps all experts in use, for each decoder layer.
BALANCE = 0.01
SHAPE = (
    f"{EXPERTS} experts of intermediate 128, {ACTIVE} of them active, hidden 128, "
    "4 query heads and 1 key-value head of 32"
)


def build(*, vocabulary: int, context: int, seed: int) -> PreTrainedModel:
    """An untrained Qwen3-MoE below 4 MB, whose every in_features is a multiple of 128."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        norm_topk_prob=True,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
        output_router_logits=True,
    )
    model = Qwen3MoeForCausalLM(config)
    for layer in model.model.layers:  # keeps the residual stream's scale independent of depth
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.experts.down_proj):
            weight.data /= math.sqrt(2 * LAYERS)
    return model


def imbalance(output: Any) -> Tensor | float:
    """What is added to the loss of a mixture, so that every expert of every layer is used; else 0.

    Args:
        output: Of the model, with `router_logits` of each decoder layer [T, E] if it is a mixture.

    Source:
        Switch Transformers, https://huggingface.co/papers/2101.03961, equations 4 to 6; of each
        layer by itself, where transformers takes all layers' tokens together.
    """
    layers = getattr(output, "router_logits", None) or ()
    losses = [load_balancing_loss_func((logits_TE,), EXPERTS, ACTIVE) for logits_TE in layers]
    return BALANCE * sum(losses)


@torch.no_grad()
def token_shares(model: PreTrainedModel, ids_T: Tensor, context: int) -> Tensor:
    """The share of tokens that visit each expert, [layers, EXPERTS]; each row adds up to ACTIVE."""
    counts_LE = torch.zeros(LAYERS, EXPERTS)
    for window_T in ids_T.split(context):
        for layer, logits_TE in enumerate(_router_logits(model, window_T)):
            chosen_TK = logits_TE.topk(ACTIVE).indices
            counts_LE[layer] += torch.bincount(chosen_TK.flatten(), minlength=EXPERTS)
    return counts_LE / len(ids_T)


def _router_logits(model: PreTrainedModel, ids_T: Tensor) -> tuple[Tensor, ...]:
    """Of each decoder layer, [T, E]."""
    logits: tuple[Tensor, ...] = model(ids_T[None], output_router_logits=True).router_logits
    return logits


def shares_table(shares_LE: Tensor) -> str:
    """The shares as a table of the card, in percent."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    head = line(["decoder layer", *(f"expert {i}" for i in range(EXPERTS))])
    rows = [
        line([str(layer), *(f"{share:.1%}" for share in row_E.tolist())])
        for layer, row_E in enumerate(shares_LE)
    ]
    return "\n".join([head, line(["---"] * (EXPERTS + 1)), *rows])
