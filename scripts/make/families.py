"""Run the whole flow on a tiny model of every causal type that transformers has.

    python -m scripts.make.families --work families            # some ten minutes
    python -m scripts.make.families --work families mamba2 lfm2

Writes ``mofq/model/layers/facts``, what transformers does with the tensors of each type, and then
``docs/reference/families.md``. With types as arguments, their results are printed and nothing is
written.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file

from mofq.exceptions import MofqError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import ModelLayers, find_layers
from scripts.shared.command import script_parser

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))

from families import write_byte_tokenizer
from tiny_types import CAUSAL_TYPES, build_type
from type_facts import find_facts
from type_flow import FlowError, run_flow

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "families.md"
FACTS = ROOT / "mofq" / "model" / "layers" / "facts"
JOINED = ROOT / "mofq" / "engines" / "facts" / "joined" / "vllm-0.33.0.json"

_HEAD = """\
<!-- Made by scripts/make/families.py; a change here is lost. -->

# Model types

For each causal type of transformers {version}, a tiny model (seeded random weights, biases and
norms, hidden size 64) went through the whole flow: `inspect`, `measure` without and with
statistics, `calibrate`, `search`, `validate` in memory, `export --to compressed-tensors`, and
`validate` of the exported folder, whose KL must be the same to the last bit.

{counts}

*Passes* says that structure, arithmetic and files agree with transformers. It says nothing of
quality, which random weights do not have, and nothing of engines: the last column is the class
that vLLM 0.33.0 lists for the architecture, and only of mixtures with
[rules](../architecture.md#a-model-family) was it executed that it reads every exported name. KV
caches, devices that share layers and `rewrite` are for types with rules, which are in bold.

A fusion group is one choice: [engines](engines.md) concatenate its layers. What a type has beside
its groups stays as it is, and `inspect --json` says why of every matrix (`left_out`). So do the
experts of types whose checkpoints have one tensor for all of them (`granitemoe` and its relatives,
`hy_v4`, `minimax_m3_vl_text`, `zaya`): under which names engines would read them quantized is not
known.
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the flow went on one type."""

    kind: str  #: the class
    groups: tuple[str, ...]  #: of any decoder layer
    problem: str | None


def main() -> None:
    """Build, read, run, write."""
    parser = script_parser(__doc__)
    parser.add_argument("types", nargs="*", help="model types; all, if none is given")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything made")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    options.work.mkdir(parents=True, exist_ok=True)
    wanted: Sequence[str] = options.types or CAUSAL_TYPES
    kinds, not_built, facts = {}, {}, {}
    for name in wanted:
        try:
            kinds[name], found = _write(name, options.work / name)
        except Exception as error:  # transformers raises anything for a config that it cannot take
            not_built[name] = " ".join(str(error).split())
            continue
        for key, one in found.items():
            facts.setdefault(key, one)
    if not options.types:
        _write_facts(facts)
    outcomes = {}
    for name, kind in kinds.items():
        outcomes[name] = _run(name, kind, options.work)
        print(name, outcomes[name].problem or "passes", flush=True)
    if not options.types:
        PAGE.write_text("\n".join(_page(outcomes, not_built)), "utf-8")


def _write(name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Write a tiny checkpoint; its class, and ``model_type`` -> facts."""
    model = build_type(name)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, save_original_format=True)
    write_byte_tokenizer(folder)
    facts = find_facts(model, load_file(folder / "model.safetensors"))
    own = str(model.config.model_type)
    return type(model).__name__, {name: facts} if own in CAUSAL_TYPES else {name: facts, own: facts}


def _write_facts(facts: Mapping[str, Any]) -> None:
    rows = ",\n".join(f" {json.dumps(key)}: {json.dumps(facts[key])}" for key in sorted(facts))
    version = transformers.__version__
    text = f'{{"transformers": "{version}", "types": {{\n{rows}\n}}}}\n'
    (FACTS / f"transformers-{version}.json").write_text(text, "utf-8")


def _run(name: str, kind: str, work: Path) -> Outcome:
    folder, scratch = work / name, work / f"{name}.flow"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    groups: tuple[str, ...] = ()
    problem = None
    try:
        groups = _kinds_of_groups(find_layers(open_checkpoint(str(folder))))
        run_flow(folder, scratch)
    except (FlowError, MofqError) as error:
        problem = _shorten(str(error), work)
    except Exception as error:  # what no message explains is told as it is
        problem = f"{type(error).__name__}: {_shorten(str(error), work)}"
    shutil.rmtree(scratch)
    return Outcome(kind, groups, problem)


def _kinds_of_groups(layers: ModelLayers) -> tuple[str, ...]:
    names = (re.sub(r"^layers\.[0-9]+\.", "", group.name) for group in layers.groups)
    return tuple(dict.fromkeys(names))


def _shorten(message: str, work: Path) -> str:
    """A message without the paths of the machine, up to its first sentence."""
    text = re.sub(rf"{re.escape(str(work))}/\S+?(?=[:\s])", "…", " ".join(message.split()))
    text = re.sub(r"^(\w+: )?…: ", r"\1", text)
    return re.split(r"(?<=[a-z')\]])\. (?=[A-Z`])", text)[0].rstrip(".")[:300]


def _page(outcomes: Mapping[str, Outcome], not_built: Mapping[str, str]) -> Iterator[str]:
    from mofq.model.layers import FUSION_RULES

    served = {row["architecture"]: row["class"] for row in json.loads(JOINED.read_text())["rows"]}
    passed = sum(outcome.problem is None for outcome in outcomes.values())
    refused = len(outcomes) - passed
    yield _HEAD.format(
        version=transformers.__version__,
        counts=(
            f"{passed} of the {len(CAUSAL_TYPES)} types pass, {refused} are refused, and"
            f" {len(not_built)} could not be built from a shrunken config."
        ),
    )
    yield "| `model_type` | fusion groups of its decoder layers | result | vLLM |"
    yield "| --- | --- | --- | --- |"
    for name, one in sorted(outcomes.items()):
        shown = f"**`{name}`**" if name in FUSION_RULES else f"`{name}`"
        groups = " ".join(f"`{group}`" for group in one.groups)
        result = "passes" if one.problem is None else f"refused: {_cell(one.problem)}"
        yield f"| {shown} | {groups} | {result} | {served.get(one.kind, '')} |"
    yield ""
    yield "## Not built"
    yield ""
    yield "From a shrunken config, with what this machine has installed:"
    yield ""
    for name, problem in sorted(not_built.items()):
        yield f"- `{name}`: {_cell(problem)[:160]}"
    yield ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    main()
