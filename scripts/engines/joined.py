"""Writes down which layers vLLM's model classes join: ``mofq/engines/facts/joined``.

    python -m scripts.engines.joined vllm==0.33.0

Nothing is run: ``packed_modules_mapping`` and the registry are literals in the wheel's sources.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scripts.engines.selection import fetch_wheel, parse_requirement, write_facts

_REGISTRIES = ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS")
_MODELS = Path("vllm", "model_executor", "models")


def main() -> None:
    """Read the wheel, and write a row for every architecture that the engine has a class for."""
    name, version = parse_requirement(__doc__)
    models = fetch_wheel(f"{name}=={version}") / _MODELS
    classes = {name: found for path in sorted(models.glob("*.py")) for name, *found in _read(path)}
    rows = [
        {"architecture": architecture, "class": kind, "joined": _joined(kind, classes)}
        for architecture, kind in sorted(_registered(models / "registry.py"))
    ]
    write_facts("joined", name, version, rows)


def _read(path: Path) -> Iterator[tuple[str, list[str], dict[str, list[str]] | None]]:
    """Of each class in a file: its bases; joined module -> its parts, where it states that."""
    for kind in ast.parse(path.read_text("utf-8")).body:
        if not isinstance(kind, ast.ClassDef):
            continue
        joined: dict[str, list[str]] | None = None
        for line in kind.body:
            target, value = _assigned(line)
            if target == "packed_modules_mapping" and value is not None:
                joined = dict(_literal(value))
        yield kind.name, [base.id for base in kind.bases if isinstance(base, ast.Name)], joined


def _literal(value: Any) -> Iterator[tuple[str, list[str]]]:
    """The entries of a mapping that are written out, in whatever expression they stand."""
    for part in ast.walk(value):
        if isinstance(part, ast.Dict):
            for key, entry in zip(part.keys, part.values, strict=True):
                if key is not None:  # what is unpacked is another class's
                    yield ast.literal_eval(key), ast.literal_eval(entry)


def _joined(kind: str, classes: Mapping[str, list[Any]]) -> dict[str, list[str]]:
    """What a class joins, or the first of its bases that says it."""
    bases, joined = classes.get(kind, ([], None))
    if joined is not None:
        return dict(joined)
    return next((found for base in bases if (found := _joined(base, classes))), {})


def _registered(path: Path) -> Iterator[tuple[str, str]]:
    """Name in ``architectures`` -> the engine's class."""
    for line in ast.parse(path.read_text("utf-8")).body:
        target, value = _assigned(line)
        if target in _REGISTRIES and isinstance(value, ast.Dict):
            for key, entry in zip(value.keys, value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(entry, ast.Tuple):
                    yield str(key.value), str(ast.literal_eval(entry)[1])


def _assigned(line: ast.stmt) -> tuple[str, Any]:
    """Name and value of an assignment; empty of another statement."""
    if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
        return line.targets[0].id, line.value
    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
        return line.target.id, line.value
    return "", None


if __name__ == "__main__":
    main()
