"""Run the whole flow on a tiny model of every causal and multimodal type that transformers has.

    python -m scripts.make.families --work families            # some eight minutes
    python -m scripts.make.families --work families mamba2 lfm2

Writes ``mofq/model/layers/facts``, what transformers does with the tensors of each type, and then
``docs/reference/families.md``. With types as arguments, their results are printed and nothing is
written,
unless all others were run into the same folder before.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from mofq.exceptions import MofqError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import FUSION_RULES, ModelLayers, find_layers
from mofq.model.loading import load_model
from scripts.shared.command import script_parser

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))

from families import write_byte_tokenizer
from tiny_types import CAUSAL_TYPES, IMAGE_TYPES, MULTIMODAL_TYPES, build_type
from type_facts import find_facts, join_facts
from type_flow import FlowError, run_flow, write_processor

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "families.md"
FACTS = ROOT / "mofq" / "model" / "layers" / "facts"
JOINED = ROOT / "mofq" / "engines" / "facts" / "joined" / "vllm-0.33.0.json"

_HEAD = """\
<!-- Made by scripts/make/families.py; a change here is lost. -->

# Model types

For each causal type of transformers {version}, and each that reads images or sounds and writes
text, a tiny model (seeded random weights, biases and norms, hidden size 64) went through the whole
flow on text: its logits are those of transformers' own class; `inspect`, `measure` without and with
statistics, `calibrate`, `search`, `validate` in memory, `export --to compressed-tensors`, and
`validate` of the exported folder, whose KL must be the same to the last bit.

- Causal: {causal}.
- Images and text: {images}.
- With those of sounds, all multimodal types: {others}.

Of a multimodal model the language model is decided. Towers and projectors stay as they are, and so
do the files of its processor.

*Passes* says that structure, arithmetic and files agree with transformers. It says nothing of
quality, which random weights do not have, and nothing of engines: the last column is the class
that vLLM 0.33.0 lists for the architecture, read in its sources, as are the layers that the class
joins. *As it loads* says that vLLM finds out what to join from the model of transformers, *nothing*
that it joins nothing that a checkpoint has apart, and *of its language model* that it depends on
which one a checkpoint has. Only of mixtures with [rules](../architecture.md#a-model-family) was it
executed that it reads every exported name. Which schemes an engine serves in which layers of a
model is what `mofq inspect MODEL --space serving --engine vllm-hopper` says, from headers alone.
Devices that share layers and `rewrite` are for types with rules, which are in bold.

Where *KV cache* says *decided*, its format went through the flow too: every `self_attn` of the
model caches keys and values by head, of one shape ({cached} causal and {cached_multimodal}
multimodal types). Of the others `--kv-cache` is refused: they cache something else, as latent
vectors or states; or layers share one attention (`zamba`); or heads have two sizes (`gemma4`); or
attention has another name.

The towers of `fast_vlm`, `gemma3n` and `perception_lm` are models of timm. Where it is not
installed, a stand-in with names of the same kind takes their place: nothing of towers is decided.

A fusion group is one choice: [engines](engines.md) concatenate its layers. What a type has beside
its groups stays as it is, and `inspect --json` says why of every matrix (`left_out`).

Experts that a checkpoint has in one tensor (`aria`, `gpt_oss`, `granitemoe` and its relatives,
`hy_v4`, `llama4`, `zaya` …) are exported one by one, as `experts.0.gate_proj`. vLLM 0.33.0 was run
on exports of `llama4_text` and `granitemoe` and reads every tensor. Of `gpt_oss` it reads MXFP4
experts from OpenAI's own layout alone, beside which it quantizes no other layer: no export is
better than the original there, so that none of its quantized experts are offered for vLLM.
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the flow went on one type."""

    kind: str  #: the class
    groups: tuple[str, ...]  #: of any decoder layer
    has_caches: bool  #: whether the KV cache was decided too
    problem: str | None


@dataclass(slots=True)
class Matrix:
    """Types, and what became of each."""

    types: Sequence[str]
    not_built: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether every type was run, now or before."""
        return {*self.not_built, *self.outcomes} == set(self.types)


def main() -> None:
    """Build, read, run, write."""
    parser = script_parser(__doc__)
    parser.add_argument("types", nargs="*", help="model types; all, if none is given")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything made")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.work.mkdir(parents=True, exist_ok=True)
    matrices = {"causal": Matrix(CAUSAL_TYPES), "multimodal": Matrix(MULTIMODAL_TYPES)}
    facts = _read_before(options.work / _BEFORE, matrices) if options.types else {}
    kinds: dict[tuple[str, str], str] = {}
    for of, write in (("causal", _write_causal), ("multimodal", _write_multimodal)):
        for name in matrices[of].types:
            if options.types and name not in options.types:
                continue
            matrices[of].not_built.pop(name, None)
            matrices[of].outcomes.pop(name, None)
            try:
                kinds[of, name], found = write(name, options.work / of / name)
            except Exception as error:  # transformers raises anything for a config it cannot take
                matrices[of].not_built[name] = " ".join(str(error).split())
                print(name, "not built:", matrices[of].not_built[name][:300], flush=True)
                continue
            facts |= found
    if not options.types or all(matrix.outcomes for matrix in matrices.values()):
        _write_facts(facts)
    for (of, name), kind in kinds.items():
        one = matrices["causal"].outcomes.get(name)
        if one is None or one.kind != kind:
            one = _run(options.work / of / name, kind, options.work)
            print(name, kind, one.problem or "passes", flush=True)
        matrices[of].outcomes[name] = one
    _write_before(options.work / _BEFORE, matrices, facts)
    if all(matrix.is_complete for matrix in matrices.values()):
        PAGE.write_text("\n".join(_page(*matrices.values())), "utf-8")


#: In the work folder: what came of every type.
_BEFORE = "outcomes.json"


def _read_before(path: Path, matrices: Mapping[str, Matrix]) -> dict[str, Any]:
    """Fill in what came of types in an earlier run; returns its facts."""
    content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    for of, matrix in matrices.items():
        before = content.get(of, {"not_built": {}, "outcomes": {}})
        matrix.not_built |= before["not_built"]
        for name, one in before["outcomes"].items():
            matrix.outcomes[name] = Outcome(**{**one, "groups": tuple(one["groups"])})
    return dict(content.get("facts", {}))


def _write_before(path: Path, matrices: Mapping[str, Matrix], facts: Mapping[str, Any]) -> None:
    content = {of: asdict(matrix) for of, matrix in matrices.items()}
    path.write_text(json.dumps({**content, "facts": facts}), "utf-8")


def _write_causal(name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Write a tiny checkpoint; its class, and ``model_type`` -> facts."""
    model = build_type(name, multimodal=False)
    _save(model, folder)
    facts = find_facts(model, load_file(folder / "model.safetensors"))
    own = str(model.config.model_type)
    return type(model).__name__, {name: facts} if own in CAUSAL_TYPES else {name: facts, own: facts}


def _save(model: PreTrainedModel, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, save_original_format=True)
    write_byte_tokenizer(folder)
    write_processor(folder)


def _check_loaded(folder: Path, kind: str) -> None:
    """See that what is measured is what transformers computes, on text."""
    ids = torch.arange(32)[None] + 65
    with torch.inference_mode():
        loaded = load_model(folder)(input_ids=ids).logits
        own = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
        logits = own(input_ids=ids, use_cache=False).logits
    if not torch.allclose(logits, loaded, rtol=0, atol=1e-4 * float(logits.abs().max())):
        raise FlowError("the model that is loaded computes something else than its own class")


def _write_multimodal(name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """The same of a class with towers; where a type has two classes, the facts are of both."""
    model = build_type(name, multimodal=True)
    _save(model, folder)
    own = str(model.config.model_type)
    facts = find_facts(model, load_file(folder / "model.safetensors"))
    if own in CAUSAL_TYPES:
        alone = build_type(own, multimodal=False)
        if type(alone) is not type(model):
            _save(alone, folder / "alone")
            stored = load_file(folder / "alone" / "model.safetensors")
            shutil.rmtree(folder / "alone")
            facts = join_facts(find_facts(alone, stored), facts)
    return type(model).__name__, {own: facts}


def _write_facts(facts: Mapping[str, Any]) -> None:
    rows = ",\n".join(f" {json.dumps(key)}: {json.dumps(facts[key])}" for key in sorted(facts))
    version = transformers.__version__
    text = f'{{"transformers": "{version}", "types": {{\n{rows}\n}}}}\n'
    (FACTS / f"transformers-{version}.json").write_text(text, "utf-8")


def _run(folder: Path, kind: str, work: Path) -> Outcome:
    scratch = folder.with_suffix(".flow")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    groups: tuple[str, ...] = ()
    has_caches, problem = False, None
    try:
        layers = find_layers(open_checkpoint(str(folder)))
        groups, has_caches = _kinds_of_groups(layers), bool(layers.caches)
        _check_loaded(folder, kind)
        run_flow(folder, scratch, kv_cache=has_caches)
    except (FlowError, MofqError) as error:
        problem = _shorten(str(error), work)
    except Exception as error:  # what no message explains is told as it is
        problem = f"{type(error).__name__}: {_shorten(str(error), work)}"
    shutil.rmtree(scratch)
    return Outcome(kind, groups, has_caches, problem)


def _kinds_of_groups(layers: ModelLayers) -> tuple[str, ...]:
    names = (re.sub(r"^layers\.[0-9]+\.", "", group.name) for group in layers.groups)
    return tuple(dict.fromkeys(names))


def _shorten(message: str, work: Path) -> str:
    """A message without the paths of the machine, up to its first sentence."""
    text = re.sub(rf"{re.escape(str(work))}/\S+?(?=[:\s])", "…", " ".join(message.split()))
    text = re.sub(r"^(\w+: )?…: ", r"\1", text)
    return re.split(r"(?<=[a-z')\]])\. (?=[A-Z`])", text)[0].rstrip(".")[:300]


def _page(causal: Matrix, multimodal: Matrix) -> Iterator[str]:
    images = Matrix(
        IMAGE_TYPES,
        not_built={k: v for k, v in multimodal.not_built.items() if k in IMAGE_TYPES},
        outcomes={k: v for k, v in multimodal.outcomes.items() if k in IMAGE_TYPES},
    )
    yield _HEAD.format(
        version=transformers.__version__,
        causal=_counts(causal),
        images=_counts(images),
        others=_counts(multimodal),
        cached=_count_cached(causal),
        cached_multimodal=_count_cached(multimodal),
    )
    yield "## Causal types"
    yield ""
    yield from _table(causal)
    yield "## Types that read images, or sounds"
    yield ""
    yield from _table(multimodal)


def _count_cached(matrix: Matrix) -> int:
    return sum(one.has_caches and one.problem is None for one in matrix.outcomes.values())


def _counts(matrix: Matrix) -> str:
    passed = sum(outcome.problem is None for outcome in matrix.outcomes.values())
    return (
        f"{passed} of the {len(matrix.types)} types pass, {len(matrix.outcomes) - passed} are"
        f" refused, and {len(matrix.not_built)} could not be built from a shrunken config"
    )


def _served(architecture: str) -> str:
    """What vLLM has for an architecture, empty if nothing."""
    rows = json.loads(JOINED.read_text("utf-8"))["rows"]
    row = next((one for one in rows if one["architecture"] == architecture), None)
    if row is None:
        return ""
    if row["joined"]:
        return str(row["class"])
    if row["module"].endswith(".transformers"):
        return f"{row['class']}; joins as it loads"
    return f"{row['class']}; joins {'of its language model' if 'inner' in row else 'nothing'}"


def _table(matrix: Matrix) -> Iterator[str]:
    yield "| `model_type` | fusion groups of its decoder layers | result | KV cache | vLLM |"
    yield "| --- | --- | --- | --- | --- |"
    for name, one in sorted(matrix.outcomes.items()):
        shown = f"**`{name}`**" if name in FUSION_RULES else f"`{name}`"
        groups = " ".join(f"`{group}`" for group in one.groups)
        result = "passes" if one.problem is None else f"refused: {_cell(one.problem)}"
        cache = "decided" if one.has_caches and one.problem is None else ""
        yield f"| {shown} | {groups} | {result} | {cache} | {_served(one.kind)} |"
    yield ""
    yield "Not built from a shrunken config, with what this machine has installed:"
    yield ""
    kinds = {**MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    for name, problem in sorted(matrix.not_built.items()):
        served = _served(kinds[name])
        yield f"- `{name}`: {_cell(problem)[:160]}" + (f" (vLLM: {served})" if served else "")
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
