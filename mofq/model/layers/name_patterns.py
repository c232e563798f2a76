"""What names of tensors and keys of configs mean, of any type that has no rules."""

from __future__ import annotations

import re

EXPERT = re.compile(r"(?P<at>.*)\bexperts\.(?P<expert>[0-9]{1,6})\.(?P<word>\w+)\.weight")
FUSED = re.compile(r"(?P<at>.*)\bexperts\.(?P<half>gate_up|down)_proj")

_ROUTER = "a router: which experts run is decided, not computed"
_SHARE = "a gate: what the shared expert counts for a token, one number"
_TIME_STEP = "the time steps of a scan, which engines keep as they are"
#: Paths of matrices that stay as they are -> why.
KEPT: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(?!.*att)(.*\.)?(gate|gating|\w*router)(\.\w+)*"), _ROUTER),
    (re.compile(r".*shared_expert_gate\.weight"), _SHARE),
    (re.compile(r".*\bdt_proj\.weight"), _TIME_STEP),
    (
        re.compile(r".*\b(indexer\..*|index_[qk]_proj\.weight)"),
        "an indexer: what is attended to is decided, not computed",
    ),
    (re.compile(r".*(hyper_connection\.\w+|\w+_coefs)\.weight"), "mixes a few residual streams"),
)
NOT_LINEAR: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r".*conv\w*\.weight"), "a convolution"),
    (re.compile(r".*(_decay|slope_rate)"), "computed from the config"),
    (re.compile(r".*(norm|ln_\w+|ln)\.\w+(\.weight)?"), "a part of a norm"),
    (re.compile(r".*embed\w*(\.\w+)*\.weight"), "a table that is looked up"),
    (re.compile(r".*(rel_pos|relative_attention_bias|rel_)\w*(\.weight)?"), "positions"),
    (re.compile(r".*att\w*\.(masked_)?bias"), "a mask of attention"),
    (re.compile(r".*bias"), "a bias"),
)
#: Types that cannot be supported whatever their tensors are called -> why.
REFUSED = {"reformer": "transformers computes its gradients in training mode only"}
OWN_PARAMETER = "no weight of a linear layer: a parameter of its own"

#: Words of a stack's name that is no language model's.
TOWERS = re.compile(
    r"vision|visual|image|img|audio|speech|sound|tower|video|patch|projector|resampler|mtp|nextn"
    r"|moe_vision|tokenizer|codec|diffusion|talker|qformer|q_former|perceiver|git\.image"
)
STACK = re.compile(r"(?P<stack>(?:[^.]+\.)*?[^.\d][^.]*)\.(?P<index>[0-9]{1,6})\.(?P<path>.+)")
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "decoder_layers", "n_layers")
EXPERT_COUNTS = ("moe_num_experts", "num_experts", "num_local_experts", "n_routed_experts")
#: After the layers that are counted, and left out by transformers.
LAYERS_AHEAD = ("num_nextn_predict_layers", "mtp_num_hidden_layers")
HIDDEN_SIZES = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim")
EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "embed_in",
    "embed",
    "tok_embeddings",
    "embeddings",
)
