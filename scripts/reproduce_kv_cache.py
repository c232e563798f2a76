"""The format of the KV cache in nats: predicted, decided and measured, on a Llama model.

    python scripts/reproduce_kv_cache.py MODEL --stats STATS --text FILE --work FOLDER

What attention reads back are keys (after their rotation) and values, rounded. A rounding error
of a value is an error of the output of ``v_proj``, and one of a key, rotated back, of the output
of ``k_proj``: the same calibration and the same second order give its cost in nats per token
(docs/sensitivity.md, activations). So every decoder layer's keys and values are a decision each,
taken by the solver of the search under a budget of bits per cached number.

Scales are static for a tensor, as engines have them, or of each token and head. Emulated: vLLM
serves FP8 E4M3 for the whole model (``--kv-cache-dtype fp8``) with a scale for each layer's
keys and values or none (``unscaled``), and no mixture. The search of `mofq search` does not offer
the cache yet: this is a study of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from reproduction import (
    Measured,
    Version,
    arguments,
    measure_versions,
    print_markdown,
    with_error,
)
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mofq.calibration.stats import Stats, read_stats
from mofq.checkpoint.headers import open_checkpoint
from mofq.checkpoint.model import load_model
from mofq.measure.samples import ChunkedSamples, SampleReader
from mofq.quantize import fake_quantize_activation
from mofq.schemes import TensorScheme, parse_scheme
from mofq.solvers import Budgets, Option, ProblemGroup, build_problem, choose

#: Of one cached tensor: the name of the activation's half of a scheme.
FORMATS = (
    "fp8_e4m3.unscaled",
    "fp8_e4m3.tensor",
    "int8.tensor",
    "fp8_e4m3.token.s-bf16",
    "int8.token.s-bf16",
    "int6.token.s-bf16",
    "int4.token.s-bf16",
)
PARTS = ("k", "v")
BUDGETS = (5.0, 6.0, 7.0)
#: Numbers of one layer's keys or values that sizes are counted over; only ratios matter.
COUNTED = 2**16

#: Decoder layer, and keys or values.
Place = tuple[int, str]


@dataclass(frozen=True, slots=True)
class Cached:
    """What is known of one place of the cache."""

    amax: float  #: largest magnitude in calibration
    nats: Mapping[str, float]  #: format -> predicted cost per token


def tensor_scheme(name: str) -> TensorScheme:
    """The scheme of a cached tensor, whose rows are heads of tokens."""
    scheme = parse_scheme(f"bf16+{name}").activation
    assert scheme is not None
    return scheme


def bits(name: str, head_size: int) -> float:
    """True bits of a cached number."""
    scheme = tensor_scheme(name)
    scale = scheme.scale.bits / head_size if scheme.granularity.kind == "token" else 0.0
    return scheme.element.bits + scale


def predict(model: PreTrainedModel, stats: Stats) -> dict[Place, Cached]:
    """The cost of every format at every place."""
    found: dict[Place, Cached] = {}
    corpus = stats.plan.corpora[0].name
    with SampleReader(stats) as reader:
        for number, layer in enumerate(model.model.layers):
            for part in PARTS:
                linear = layer.self_attn.get_submodule(f"{part}_proj")
                name = f"model.layers.{number}.self_attn.{part}_proj"
                samples = reader.read(corpus, name)
                assert samples is not None
                found[number, part] = _predict_place(model, linear, samples, part)
    return found


def _predict_place(
    model: PreTrainedModel, linear: torch.nn.Module, samples: ChunkedSamples, part: str
) -> Cached:
    size = model.config.head_dim
    shape = (samples.sequences, -1, linear.weight.shape[0] // size, size)
    with torch.inference_mode():
        out = linear(samples.x_MCI.float()).reshape(shape).transpose(1, 2)
        grad = samples.grad_MCO.float().reshape(shape).transpose(1, 2)
        if part == "k":
            positions = torch.arange(out.shape[2])[None]
            cos, sin = model.model.rotary_emb(out, positions)
            out, grad = apply_rotary_pos_emb(out, grad, cos, sin)
    amax = float(out.abs().max())
    nats = {}
    for name in FORMATS:
        fake = fake_quantize_activation(out, tensor_scheme(name), static_amax=amax)
        token_NT = (grad * (fake - out)).sum((1, 3), dtype=torch.float64)
        nats[name] = float(token_NT.square().sum(1).mean() / (2 * samples.tokens))
    return Cached(amax, nats)


def decide(found: Mapping[Place, Cached], head_size: int, budget: float) -> dict[Place, str]:
    """The formats of least predicted cost within a budget of bits per cached number."""
    groups = []
    for place, one in found.items():
        options = [
            # The solver orders schemes by name; the cache's are halves of such names.
            Option(f"bf16+{name}", round(COUNTED * bits(name, head_size) / 8), (nats,))
            for name, nats in one.nats.items()
        ]
        options.append(Option("bf16", COUNTED * 2, (0.0,)))
        groups.append((ProblemGroup(_label(place), (_label(place),), COUNTED), options))
    problem = build_problem(groups)
    chosen = problem.schemes_of(choose(problem, Budgets(max_bits=budget), ties=False).choice_F)
    return {place: chosen[_label(place)].removeprefix("bf16+") for place in found}


def _label(place: Place) -> str:
    return f"layers.{place[0]}.{place[1]}"


def quantize_cache(
    model: PreTrainedModel, plan: Mapping[Place, str], found: Mapping[Place, Cached]
) -> PreTrainedModel:
    """Let attention read rounded keys and values, in place."""

    def rounded(place: Place, x: Tensor) -> Tensor:
        if plan[place] == "bf16":
            return x
        scheme = tensor_scheme(plan[place])
        return fake_quantize_activation(x, scheme, static_amax=found[place].amax)

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *more: object,
        **named: object,
    ) -> tuple[Tensor, Tensor | None]:
        layer = int(module.layer_idx)
        key, value = rounded((layer, "k"), key), rounded((layer, "v"), value)
        return sdpa_attention_forward(module, query, key, value, *more, **named)

    AttentionInterface.register("rounded_cache", attention)
    model.set_attn_implementation("rounded_cache")
    return model


def versions(
    found: Mapping[Place, Cached], head_size: int
) -> tuple[dict[str, Version], dict[str, dict[Place, str]]]:
    """Label -> version, and its plan."""
    plans = {f"`{name}`": dict.fromkeys(found, name) for name in FORMATS}
    for budget in BUDGETS:
        plans[f"search, {budget:g} bits"] = decide(found, head_size, budget)
    made = {
        label: Version(
            f"{sorted(plan.items())} {sorted((p, one.amax) for p, one in found.items())}",
            sum(16.0 if n == "bf16" else bits(n, head_size) for n in plan.values()) / len(plan),
            partial(quantize_cache, plan=plan, found=found),
        )
        for label, plan in plans.items()
    }
    return made, plans


def print_results(
    done: Mapping[str, Measured],
    plans: Mapping[str, Mapping[Place, str]],
    found: Mapping[Place, Cached],
) -> None:
    """Predicted beside measured."""
    rows = []
    for label, plan in plans.items():
        one = done[label]
        kl = sum(found[place].nats.get(name, 0.0) for place, name in plan.items())
        keys = sum(found[p].nats.get(n, 0.0) for p, n in plan.items() if p[1] == "k")
        share = f"{100 * keys / kl:.0f} %" if kl else "–"
        measured = with_error(one.kl, one.kl_stderr, digits=5)
        rows.append([label, f"{one.bits_per_weight:.2f}", f"{kl:.5f}", share, measured])
    columns = ["KV cache", "bits", "KL predicted", "of it keys", "KL measured [nats/token]"]
    print_markdown(columns, rows)


def main(given: Sequence[str] | None = None) -> None:
    """One table."""
    options = arguments(
        __doc__, given, ("--stats", "from `mofq calibrate`"), ("--text", "held-out text")
    )
    checkpoint = open_checkpoint(options.model)
    model = load_model(checkpoint.folder, dtype="float32", device="cpu")
    head_size = int(model.config.head_dim)
    found = predict(model, read_stats(Path(options.stats)))
    made, plans = versions(found, head_size)
    done = measure_versions(
        options.model,
        made,
        options.text,
        cache=options.work / "measured.jsonl",
        tokens=options.tokens,
    )
    print_results(done, plans, found)


if __name__ == "__main__":
    main()
