"""The rules of engines against what the engines' own code selects: ``mofq/engines/facts``.

Python of the engines made the facts (`scripts/engines/selection.py`); nothing here is transcribed.
A rule that serves a scheme must be met by a kernel that quantizes its activations if, and only if,
the scheme does; a rule that refuses one must refuse what the engine cannot serve as measured, or
name a reason that selection does not show (``NOT_SHOWN``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import mofq.engines
from mofq.engines import ENGINES, Engine, legality, matching_rule
from mofq.numbers.schemes import Scheme, parse_scheme
from scripts.engines.schemes import LAYERS, SCHEMES, fusion_group

FACTS = sorted((Path(mofq.engines.__file__).parent / "facts").glob("*.json"))
#: Words of a rule's kernel, and what names of kernels in the engine hold.
FAMILIES = ("Marlin", "Machete", "Humming", "Cutlass", "Triton", "FlashInfer", "DeepGemm")


@dataclass(frozen=True)
class Exception_:
    """Contradictions with a reason: each pattern matches a whole word of the contradiction."""

    version: str  #: of the facts, "vllm 0.33.0"
    engine: str
    schemes: str
    layers: str
    reason: str

    def matches(self, version: str, engine: str, scheme: str, layer: str) -> bool:
        """Whether it excuses that case."""
        words = ((self.version, version), (self.engine, engine), (self.schemes, scheme))
        return all(re.fullmatch(*word) for word in (*words, (self.layers, layer)))


def read_facts(path: Path) -> tuple[str, dict[tuple[str, str, str], dict[str, Any]]]:
    """Engine and version; and the answer for each scheme, layer and device."""
    facts = json.loads(path.read_text("utf-8"))
    answers = {
        (scheme, layer, device): {
            key: value for key, value in row.items() if key not in ("schemes", "layers", "devices")
        }
        for row in facts["rows"]
        for scheme in row["schemes"]
        for layer in row["layers"]
        for device in row["devices"]
    }
    return f"{facts['engine']} {facts['version']}", answers


def devices_of(engine: Engine, settings: tuple[str, ...]) -> list[str]:
    """The devices of the facts that an engine stands for, under the settings of a rule."""
    if engine.capability is None:
        names = ["cpu", "cpu-amx"]
    else:
        names = ["{}.{}".format(*engine.capability)]
    return [" ".join([name, *settings]) for name in names]


def is_as_measured(scheme: Scheme, answer: Mapping[str, Any]) -> bool:
    """Whether the selected kernel computes what the scheme's name says."""
    wanted = "kept" if scheme.activation is None else "quantized"
    return answer.get("activations") == wanted and "scales" not in answer


def describe(answer: Mapping[str, Any]) -> str:
    """An answer in a few words."""
    if "error" in answer:
        return str(answer["error"])
    words = f"{answer['scheme_class']}, {answer['kernel']}, activations {answer['activations']}"
    return f"{words}, scales {answer['scales']}" if "scales" in answer else words


def contradictions(path: Path) -> Iterator[tuple[tuple[str, str, str, str], str]]:
    """Where rules and engine disagree: version, engine, scheme, layer; and both sides."""
    version, answers = read_facts(path)
    family = version.partition(" ")[0]
    for engine in (e for e in ENGINES.values() if e.name.startswith(family)):
        for scheme, layer in ((parse_scheme(s), layer) for s in SCHEMES for layer in LAYERS):
            group = fusion_group(layer)
            rule = matching_rule(engine, scheme, group)
            devices = devices_of(engine, rule.settings if rule else ())
            found = [answers[key] for d in devices if (key := (scheme.name, layer, d)) in answers]
            refused = legality(engine.name)(scheme, group)
            if refused is None:
                wrong = [a for a in found if not is_as_measured(scheme, a)] or [
                    {"error": "was not asked"} for _ in range(not found)
                ]
                ours = f"is served by {rule.kernel}" if rule else ""
            else:
                is_served = bool(found) and all(is_as_measured(scheme, a) for a in found)
                wrong = found if is_served else []
                ours = f"is refused ({refused})"
            if wrong:
                case = (version, engine.name, scheme.name, layer)
                yield case, f"{' '.join(case)}: {ours}; selected: {describe(wrong[0])}"


#: Refused for what selection does not show. Read in the engine's source, as each rule's own says.
NOT_SHOWN: tuple[Exception_, ...] = ()

#: Rules that an engine contradicts. To be empty.
KNOWN_STALE: tuple[Exception_, ...] = ()


@pytest.mark.parametrize("path", FACTS, ids=lambda path: path.stem)
def test_no_rule_contradicts_what_the_engine_selects(path: Path) -> None:
    excused = (*NOT_SHOWN, *KNOWN_STALE)
    wrong = [
        text
        for case, text in contradictions(path)
        if not any(one.matches(*case) for one in excused)
    ]
    assert wrong == [], "\n".join(wrong)
