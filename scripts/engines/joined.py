"""Writes down which layers vLLM's model classes join: ``mofq/engines/facts/joined``.

    python -m scripts.engines.joined vllm==0.33.0

Nothing is run: what joins layers is a literal in the wheel's sources. From the class that the
registry names, every class, function and constant that it is made of is read: its bases, the
modules that it builds, and of classes that a package has once for each platform, all of them.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from scripts.engines.selection import fetch_wheel, parse_requirement, write_facts

_REGISTRIES = (
    "_TEXT_GENERATION_MODELS",
    "_MULTIMODAL_MODELS",
    "_TRANSFORMERS_SUPPORTED_MODELS",
)
_MODELS = "vllm.model_executor.models"
#: Packages with model classes. What all of them use joins nothing by itself.
_PACKAGES = (_MODELS, "vllm.models")
#: Its classes find out what to join from the model of transformers, as they load it.
_AS_IT_LOADS = f"{_MODELS}.transformers"
_USED_BY_ALL = tuple(f"{_MODELS}.{name}" for name in ("interfaces", "registry", "utils"))
#: Arguments of ``WeightsMapper`` that give a layer another name.
_RENAMING = ("orig_to_new_substr", "orig_to_new_suffix", "orig_to_new_prefix")
#: How a class says what it joins. A class that says it and joins nothing was not understood.
_JOINING = ("packed_modules_mapping", "stacked_params_mapping", "orig_to_new_stacked")

Joined = dict[str, list[list[str]]]  #: module -> its parts, in every way that it is said


@dataclass(slots=True)
class Found:
    """What the definitions say that a model is made of."""

    joined: dict[str, set[tuple[str, ...]]] = field(default_factory=lambda: defaultdict(set))
    renamed: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    plain: set[str] = field(default_factory=set)  #: built without the quantization
    inner: set[str] = field(default_factory=set)  #: architectures of models inside of it
    words: set[str] = field(default_factory=set)  #: of `_JOINING`
    classes: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Module:
    """A file of the engine: its definitions, and what it imports of other files."""

    name: str
    defined: Mapping[str, list[ast.stmt]]
    imported: Mapping[str, list[tuple[str, str]]]  #: name here -> module, name there


def main() -> None:
    """Read the wheel, and write a row for every architecture that the engine has a class for."""
    name, version = parse_requirement(__doc__)
    wheel = fetch_wheel(f"{name}=={version}")
    classes = dict(_registered(wheel))
    rows = [_row(wheel, classes, architecture) for architecture in sorted(classes)]
    write_facts("joined", name, version, rows)


def _row(wheel: Path, classes: Mapping[str, tuple[str, str]], architecture: str) -> dict[str, Any]:
    """What an architecture joins; with ``inner``, the models that it is built around."""
    module, kind = classes[architecture]
    if module == _AS_IT_LOADS:
        return {"architecture": architecture, "class": kind, "joined": {}, "module": module}
    found, inner = _read(wheel, module, kind), {architecture}
    while new := (found.inner & classes.keys()) - inner:
        inner |= new
        for one in new:
            _merge(found, _read(wheel, *classes[one]))
    joined = _in_checkpoints(found)
    if not found.classes or (found.words and not joined):
        said = ", ".join(sorted(found.words)) or "its class"
        raise SystemExit(f"{architecture} ({module}.{kind}): {said} was not understood.")
    row = {"architecture": architecture, "class": kind, "joined": joined, "module": module}
    if found.inner:
        row["inner"] = sorted(found.inner)
    if found.plain:
        row["plain"] = sorted(found.plain)
    return row


def _merge(found: Found, other: Found) -> None:
    for module, parts in other.joined.items():
        found.joined[module] |= parts
    for name, names in other.renamed.items():
        found.renamed[name] |= names
    found.plain |= other.plain
    found.inner |= other.inner
    found.words |= other.words
    found.classes |= other.classes


def _in_checkpoints(found: Found) -> Joined:
    """The joined layers by the words of the class, and by those of checkpoints it renames."""
    joined: Joined = {}
    for module in sorted(found.joined):
        added = {parts for parts in found.joined[module] if len(parts) == 1 and parts != (module,)}
        ways = found.joined[module] - added
        for (part,) in added:  # under a condition, behind the others
            ways |= {(*parts, part) for parts in ways or {()} if part not in parts}
        for parts in tuple(ways):
            known = [sorted(found.renamed.get(part, ())) for part in parts]
            for place in range(max(map(len, known))):
                named = zip(known, parts, strict=True)
                ways.add(tuple(one[place] if place < len(one) else p for one, p in named))
        joined[module] = [list(parts) for parts in sorted(ways)]
    return joined


def _read(wheel: Path, module: str, kind: str) -> Found:
    """Everything that a class refers to, from file to file."""
    found, seen = Found(), set()
    left = [(module, kind)]
    while left:
        at = left.pop()
        if at in seen:
            continue
        seen.add(at)
        file = _module(wheel, at[0])
        if file is None:
            continue
        definitions = file.defined.get(at[1], [])
        for definition in definitions:
            _read_definition(definition, found)
            left += _references(wheel, definition, file)
        left += [(path, name) for path, name in file.imported.get(at[1], ()) if _is_model(path)]
    return found


def _is_model(path: str) -> bool:
    inside = any(path == one or path.startswith(f"{one}.") for one in _PACKAGES)
    return inside and path not in _USED_BY_ALL


def _references(wheel: Path, node: ast.AST, file: Module) -> Iterator[tuple[str, str]]:
    """The names in a definition that are defined in the engine's models, and where."""
    for one in ast.walk(node):
        if isinstance(one, ast.Name):
            if one.id in file.defined:
                yield file.name, one.id
            for path, name in file.imported.get(one.id, ()):
                if _is_model(path):
                    yield path, name
        elif isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name):
            for path, name in file.imported.get(one.value.id, ()):  # of an imported module
                if _is_model(f"{path}.{name}") and _module(wheel, f"{path}.{name}") is not None:
                    yield f"{path}.{name}", one.attr


def _read_definition(definition: ast.stmt, found: Found) -> None:
    within = definition.name if isinstance(definition, ast.ClassDef) else ""
    found.classes |= {within} - {""}
    for node in ast.walk(definition):
        for target, value in _assigned(node):
            found.words |= {target} & {*_JOINING}
            if target == "quant_config" and _is_none(value) and not _is_own(node):
                found.plain.add(within)
            if "packed_modules_mapping" in target.lower():
                _read_packed(target, value, found)
            elif target.endswith("params_mapping"):
                _read_stacked(value, found)
        if isinstance(node, ast.Call):
            _read_call(node, within, found)


def _read_packed(target: str, value: ast.expr, found: Found) -> None:
    """``{"qkv_proj": ["q_proj", …]}`` in any expression, or what is set under one key of it."""
    _, bracket, key = target.partition("[")
    pairs = [(key, value)] if bracket else []
    for part in ast.walk(value):
        if isinstance(part, ast.Dict):
            keys = zip(part.keys, part.values, strict=True)
            pairs += [(_text(one), entry) for one, entry in keys if one is not None]
    for module, entry in pairs:
        parts = [_text(one) for one in getattr(entry, "elts", [])]
        if module and parts and all(parts):
            found.joined[module].add(tuple(parts))


def _read_stacked(value: ast.AST, found: Found) -> None:
    """``[("qkv_proj", "q_proj", "q"), …]``: a module, a part of it and which one."""
    rows = [
        (_text(one.elts[0]), _text(one.elts[1]))
        for one in ast.walk(value)
        if isinstance(one, ast.Tuple) and len(one.elts) == 3
    ]
    _add_stacked([row for row in rows if all(row)], found)


def _add_stacked(rows: list[tuple[str, str]], found: Found) -> None:
    parts: dict[str, list[str]] = defaultdict(list)
    for module, part in rows:
        place, _, word = _layer(module).rpartition(".")
        own = _layer(part).removeprefix(f"{place}." if place else "")
        if own not in parts[word]:
            parts[word].append(own)
    for module, names in parts.items():
        found.joined[module].add(tuple(names))


def _layer(name: str) -> str:
    return name.removesuffix(".weight").strip(".")


def _read_call(call: ast.Call, within: str, found: Found) -> None:
    named = {one.arg: one.value for one in call.keywords}
    function = call.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    for key, value in named.items():
        if key == "orig_to_new_stacked" and isinstance(value, ast.Dict):
            found.words.add(key)
            pairs = zip(value.keys, value.values, strict=True)
            rows = [
                (_text(to.elts[0]), _text(part))
                for part, to in pairs
                if part is not None and isinstance(to, ast.Tuple)
            ]
            _add_stacked([row for row in rows if all(row)], found)
        elif key in _RENAMING and isinstance(value, ast.Dict):
            for part, to in zip(value.keys, value.values, strict=True):
                old, new = (_layer(_text(one)).rpartition(".")[2] for one in (part, to))
                if old and new and old != new:
                    found.renamed[new].add(old)
    if called in ("append", "extend") and isinstance(function, ast.Attribute):
        holder = function.value
        if isinstance(holder, ast.Name) and holder.id.endswith("params_mapping"):
            for argument in call.args:
                _read_stacked(argument, found)
    if called == "init_vllm_registered_model":
        names = getattr(named.get("architectures"), "elts", [])
        found.inner |= {_text(one) for one in names} or {"of its config"}
    _, _, built = _ending(named.get("prefix")).rpartition(".")
    is_plain = _is_none(named.get("quant_config"))
    is_layer = called.endswith("Linear") or called == "ParallelLMHead"
    if built and (is_plain or (is_layer and "quant_config" not in named and None not in named)):
        found.plain.add(f"{within}.{built}" if within else built)


def _ending(prefix: ast.expr | None) -> str:
    """The end of ``f"{prefix}.q_proj"`` or of ``maybe_prefix(prefix, "lm_head")``."""
    if isinstance(prefix, ast.JoinedStr) and prefix.values:
        return _text(prefix.values[-1])
    if isinstance(prefix, ast.Call) and prefix.args:
        return _text(prefix.args[-1])
    return _text(prefix)


def _is_none(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_own(node: ast.AST) -> bool:
    """Whether an assignment is to an attribute of ``self``, or to a name."""
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return not isinstance(target, ast.Attribute) or _text_of_name(target.value) == "self"


def _text_of_name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _text(node: Any) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _assigned(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """What an assignment is to, as ``name`` or ``name[key]`` of the last word, and its value."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    value = getattr(node, "value", None)
    for target in targets:
        key = ""
        if isinstance(target, ast.Subscript):
            key, target = f"[{_text(target.slice)}", target.value
        name = target.attr if isinstance(target, ast.Attribute) else getattr(target, "id", "")
        if name and value is not None:
            yield name + key, value


@cache
def _module(wheel: Path, name: str) -> Module | None:
    """A file of the engine, or None of what is no file of it."""
    path = wheel.joinpath(*name.split("."))
    package = path.is_dir()
    path = path / "__init__.py" if package else path.with_suffix(".py")
    if not path.is_file():
        return None
    defined: dict[str, list[ast.stmt]] = defaultdict(list)
    imported: dict[str, list[tuple[str, str]]] = defaultdict(list)
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            parts = name.split(".")
            above = parts[: len(parts) - node.level + package] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                imported[alias.asname or alias.name].append((source, alias.name))
    for line in _lines(tree.body):
        if isinstance(line, ast.ClassDef | ast.FunctionDef):
            defined[line.name].append(line)
        for target, _ in _assigned(line):
            defined[target.partition("[")[0]].append(line)
    return Module(name, defined, imported)


def _lines(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a file, also those under a condition."""
    for line in body:
        yield line
        if isinstance(line, ast.If | ast.Try):
            yield from _lines([*line.body, *line.orelse])


def _registered(wheel: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """Name in ``architectures`` -> module and class of the engine."""
    registry = _module(wheel, f"{_MODELS}.registry")
    assert registry is not None
    for table in _REGISTRIES:
        for line in registry.defined[table]:
            for _, value in _assigned(line):
                assert isinstance(value, ast.Dict)
                for key, entry in zip(value.keys, value.values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(entry, ast.Tuple):
                        module, kind = ast.literal_eval(entry)
                        full = module if module.startswith("vllm.") else f"{_MODELS}.{module}"
                        yield str(key.value), (full, kind)


if __name__ == "__main__":
    main()
