"""Writes down what an engine's loaders read of exported mixtures: ``mofq/engines/facts/loading``.

    python -m scripts.engines.loading vllm==0.33.0

Tiny checkpoints of every family with experts, and of GPT-2, are exported, and the engine builds the
model of each folder and loads it (`ask_vllm_loading.py`, `ask_sglang_loading.py`), where
`selection.py` asks for schemes. ``README.md`` here says what that executes.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from scripts.engines.selection import (
    HERE,
    fetch_wheels,
    make_venv,
    parse_requirement,
    run,
    shorten,
    write_facts,
)

sys.path.insert(0, str(HERE.parents[1] / "tests" / "support"))

from loading_cases import CHOICES, VARIANTS, digest, export_choice, merged, write_variant

#: Of the GPU that the engine believes to run on: Hopper's.
CAPABILITY = [9, 0]


def main() -> None:
    """Let the engine load every export, and write what it did."""
    name, version = parse_requirement(__doc__)
    wheels = fetch_wheels(name, version)
    with tempfile.TemporaryDirectory() as scratch:
        rows, folders = [], []
        for number, variant in enumerate(VARIANTS):
            model = write_variant(variant, Path(scratch) / f"model-{number}")
            for choice in CHOICES:
                folders.append(f"{scratch}/export-{len(folders)}")
                exported = export_choice(model, choice, Path(folders[-1]))
                rows.append({"variant": variant, "choice": choice, "export": digest(exported)})
        request = {
            "compiled": json.loads((wheels[0] / "compiled.json").read_text("utf-8")),
            "platforms": [{"capability": CAPABILITY}],
            "folders": folders,
        }
        (answers,) = run(HERE / f"ask_{name}_loading.py", make_venv(), wheels, request)
    found = [row | outcome(answer) for row, answer in zip(rows, answers, strict=True)]
    write_facts("loading", name, version, found, beside=wheels[1:])


def outcome(answer: Mapping[str, Any]) -> dict[str, Any]:
    """One answer with the names that go into each parameter side by side.

    Args:
        answer: Of `ask_vllm_loading.py`.

    Returns:
        ``error``, or ``read`` (each ``PARAMETER <- NAMES``), ``unread`` (names) and ``unfilled``
        (parameters, of which at least an element was not written).
    """
    if "error" in answer:
        return {"error": shorten(answer["error"])}
    into: dict[str, list[str]] = defaultdict(list)
    for name, parameters in answer["read"].items():
        for parameter in parameters:
            into[parameter].append(name)
    pairs = (f"{parameter} <- {' '.join(merged(into[parameter], 'experts'))}" for parameter in into)
    return {
        "read": same_layers(pairs),
        "unread": same_layers(merged(answer["unread"], "experts")),
        "unfilled": same_layers(answer["unfilled"]),
    }


def same_layers(lines: Iterable[str]) -> list[str]:
    """Lines that are the same of several decoder layers, once: ``layers.{0,1}.``."""
    found: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        number = re.search(r"\b(?:layers|h)\.(\d+)\.", line)
        found[re.sub(r"\b(layers|h)\.\d+\.", r"\1.#.", line)].append(number[1] if number else "")
    return sorted(line.replace("#", f"{{{','.join(n)}}}") for line, n in found.items())


if __name__ == "__main__":
    main()
