"""Write ``docs/reference`` from the code: commands, formats and schemes, engines, search spaces.

A test says when a page is behind; `python scripts/make/reference.py` brings it up to date.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from mofq.cli.commands import command as mofq_command
from mofq.cli.parsing import sections
from mofq.engines import ENGINES
from mofq.engines.rules import CacheRule, Engine, Rule, readable
from mofq.evidence.spaces import find_search_spaces, load_search_space
from mofq.numbers.formats import (
    ELEMENT_FORMATS,
    SCALE_FORMATS,
    ElementFormat,
    FloatFormat,
    IntFormat,
)
from mofq.numbers.schemes import ALIASES, ScaleRule

FOLDER = Path(__file__).parent.parent.parent / "docs" / "reference"
_MADE = "<!-- Made by scripts/make/reference.py; a change here is lost. -->\n\n"

#: What each rule for scales does; a test sees that none is missing.
RULES = {
    "absmax": "the largest magnitude becomes the largest code (not written in names)",
    "fullrange": "INT only: as absmax, with the code -2^(b-1) for the side that has the maximum",
    "mse": "searched: the scale with the least squared error of the values",
    "nats": "searched: the scale with the least cost in nats, by the calibration",
    "fouroversix": "NVFP4: the largest value of each group becomes 4 or 6, by the lower error",
    "stored": "of a quantized source of integers or NVFP4: the scale (and zero point) under which "
    "its values are codes",
}

_GRAMMAR = """\
A scheme says how the weights of a layer are stored and, after a `+`, how its inputs are rounded:

    element.granularity[.asym][.outN][.s-SCALE][@RULE][~ROUNDING]

Parts in brackets are optional. Without them codes are symmetric, scales are bf16 (f32 for inputs)
and chosen by the rule `absmax`, and values are rounded to nearest. `bf16` alone means that a layer
is not quantized.

| part | meaning |
| --- | --- |
| `element` | the format of one value, see below |
| granularity of weights | one scale for: `tensor`, `channel` (each output), `gN` (N neighbouring \
inputs of one output), `blockN` or `blockRxC` (a tile); `unscaled`: no scale |
| granularity of inputs | one scale for: `tensor` (static, from calibration), `token`, `gN`, \
`pegK` (K equal groups of the columns, sorted by their largest magnitude in the sequence); \
`unscaled`: no scale |
| `.asym` | INT with a zero point |
| `.outN` | inputs only: columns with a magnitude of N or more are not quantized |
| `.s-SCALE` | how scales are stored, see below |
| `@RULE` | how scales are chosen, see below |
| `~gptq` | rounding that compensates the errors of earlier columns, as GPTQ does |
| `~descent` | `~gptq`, then each scale and code in turn, beside the errors of all others |

Examples are `int8.channel+int8.token`, `fp4_e2m1.g32@mse` and `fp8_e4m3.block128+fp8_e4m3.g128`.
A name defines a scheme completely, and each scheme has one name.
"""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines
    )


def commands(command: Any, context: Any) -> Iterator[str]:
    """The section of a command, and of those under it."""
    for name, one in getattr(command, "commands", {}).items():
        inner = type(context)(one, info_name=name, parent=context)
        path = inner.command_path
        if hasattr(one, "commands"):
            yield from commands(one, inner)
            continue
        pieces = " ".join(one.collect_usage_pieces(inner))
        usage = f"{path} {re.sub(r'[{](.*?)[}]', lambda word: word[1].upper(), pieces)}"
        tables = (
            table([title, ""], [[f"`{what}`", _prose(text)] for what, text in records])
            for title, records in sections(one, inner).items()
        )
        text = _prose(" ".join((one.help or "").split()))
        yield f"## {path}\n\n{text}\n\n    {usage}\n\n" + "\n".join(tables)


def _prose(text: str) -> str:
    """Angle brackets are not markup."""
    return text.replace("<", "&lt;")


def command_page() -> str:
    """Every command with its arguments and options."""
    context = mofq_command.make_context("mofq", ["inspect"], resilient_parsing=True)
    return f"{_MADE}# Commands\n\n{mofq_command.help}\n\n" + "\n".join(
        commands(mofq_command, context)
    )


def format_page() -> str:
    """The grammar of scheme names and the formats that they are made of."""
    elements = [
        [f"`{name}`", str(one.bits), f"{one.max:g}", _values(one), one.source]
        for name, one in ELEMENT_FORMATS.items()
    ]
    scales = [
        [f"`{name}`", str(one.bits), _more_bits(one.global_scale_bits, one.shared_bits), one.source]
        for name, one in SCALE_FORMATS.items()
    ]
    parts = [
        f"{_MADE}# Schemes and formats\n\n{_GRAMMAR}",
        "\n## Elements\n\n",
        table(["name", "bits", "largest", "values", "source"], elements),
        "\n## Scales\n\n",
        table(["name", "bits", "and", "source"], scales),
        "\n## Rules for scales\n\n",
        table(
            ["rule", "the scale is"], [[f"`@{name}`", RULES[name]] for name in get_args(ScaleRule)]
        ),
        "\n## Published names\n\n",
        table(
            ["name", "stands for"], [[f"`{name}`", f"`{full}`"] for name, full in ALIASES.items()]
        ),
    ]
    return "".join(parts)


def _values(one: ElementFormat) -> str:
    if isinstance(one, IntFormat):
        return f"-{one.max} to {one.max}"
    if isinstance(one, FloatFormat):
        return f"{one.exponent_bits} exponent, {one.mantissa_bits} mantissa bits, bias {one.bias}"
    return f"{len(one.values)} of a table"


def _more_bits(whole: int, shared: int) -> str:
    parts = [f"{whole} bits for each tensor"] if whole else []
    return ", ".join([*parts, *([f"{shared} bits that neighbours share"] if shared else [])])


def engine_page() -> str:
    """What each engine serves, and where that is known from."""
    families: dict[str, list[Engine]] = {}
    for name, engine in ENGINES.items():
        chip = name.rpartition("-")[2] if "-" in name else ""
        families.setdefault(name.removesuffix(f"-{chip}"), []).append(engine)
    first = (
        "An engine is named after the chip that it runs on: `vllm-hopper`. Rules are tried from "
        "top to bottom, and the first that fits a scheme, a kind of layer and the chip holds; a "
        "scheme that none fits is refused. ✓ is served, ✗ refused; an empty cell says that the "
        "rule is for other chips. `N` is a number, `…` anything. `mofq inspect MODEL --engine "
        "NAME` tells what that means for a model. `NAME:tp=4` is the engine on 4 devices that "
        "share every layer ([what that refuses](../deploy.md#several-devices)), `NAME@VERSION` the "
        "engine in a version that is not the newest of those named below: a rule with a version "
        "after it holds for that alone."
    )
    sections = [_engine_section(name, engines) for name, engines in families.items()]
    return f"{_MADE}# Engines\n\n{first}\n\n" + "\n".join(sections)


def _engine_section(name: str, engines: Sequence[Engine]) -> str:
    """One engine on several chips, which are the columns of its table."""
    one = engines[0]
    chips = [engine.name.removeprefix(name).removeprefix("-") or "served" for engine in engines]
    capabilities = ", ".join(
        f"{engine.capability[0]}.{engine.capability[1]} ({chip})"
        for engine, chip in zip(engines, chips, strict=True)
        if engine.capability is not None
    )
    versions = one.versions or (one.version,)
    known = f"Version {' or '.join(versions)}"
    about = f"{known}; loads what `mofq export --to {one.reads}` writes."
    if capabilities:
        about += f" Compute capability: {capabilities}."
    rows = []
    held = [
        {*(rule for rule in engine.rules if rule.holds_on(engine.capability))}
        | {*engine.applicable_caches}
        for engine in engines
    ]
    for rule in _merged([(*engine.rules, *engine.caches) for engine in engines]):
        mark = "✗" if rule.refused else "✓"
        marks = [mark if rule in rules else "" for rules in held]
        how = rule.refused or (rule.kernel if isinstance(rule, Rule) else rule.how)
        # The version stands above the table; where there are several, the oldest is meant.
        source = re.sub(rf"(?<!\S)[\w-]+ {re.escape(versions[0])} ", "", rule.source)
        rows.append([f"`{readable(rule)}`", *marks, how, source])
    columns = ["schemes", *chips, "kernel, or why refused", "source"]
    models = "".join(
        f" Models of type {' and '.join(rule.model_types)}: it {rule.refused}; those that have "
        f"some are refused ({rule.source})."
        for rule in one.models
    )
    turned = one.transposed
    loaded = f"of {' and '.join(turned.model_types)} alone" if turned.model_types else "of no model"
    models += (
        f" Layers that are stored as [in, out] (the Conv1D of GPT-2) are loaded {loaded}: "
        f"{turned.refused} ({turned.source})."
    )
    return f"## {name}\n\n{about} {one.paths}{models}\n\n{table(columns, rows)}"


def _merged(lists: Sequence[Sequence[Rule | CacheRule]]) -> list[Rule | CacheRule]:
    """The rules of all lists, each once, in an order that keeps that of every list."""
    merged: list[Rule | CacheRule] = []
    for rules in lists:
        place = 0
        for rule in rules:
            if rule not in merged:
                merged.insert(place, rule)
            place = merged.index(rule) + 1
    return merged


def space_page() -> str:
    """The search spaces that come with mofq."""
    sections = []
    for name in find_search_spaces():
        space = load_search_space(name)
        schemes = ", ".join(f"`{scheme.name}`" for scheme in space.schemes)
        if space.kv_cache:
            schemes += "; KV cache: " + ", ".join(f"`{one.name}`" for one in space.kv_cache)
        sections.append(f"## {name}\n\n{space.description}.\n\n{schemes}.\n")
    first = (
        "`--space NAME` takes one of these, `--space FILE` one of your own "
        "([how to write one](../specifications/search-space.md))."
    )
    return f"{_MADE}# Search spaces\n\n{first}\n\n" + "\n".join(sections)


def reference_texts() -> dict[str, str]:
    """File name -> text of every page."""
    return {
        "commands.md": command_page(),
        "schemes.md": format_page(),
        "engines.md": engine_page(),
        "spaces.md": space_page(),
    }


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in reference_texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
