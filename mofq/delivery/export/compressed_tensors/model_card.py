"""The README of an exported checkpoint."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from mofq import __version__
from mofq.decision.recipe import Recipe
from mofq.delivery.export.compressed_tensors.plan import ExportPlan
from mofq.delivery.rewriting.write import rewritten_from
from mofq.model.checkpoint.headers import HUB_ID, Checkpoint
from mofq.model.sizes import bits_per_weight, weights_of

#: Of a source; the second where an earlier export or rewrite has kept it beside its own.
_CARDS = ("README.md", "README.original.md")
_METADATA = re.compile(r"\ufeff?---\n(.*?\n)---\s", re.DOTALL)
#: Characters of a card in which it is looked for.
_MOST_METADATA = 65_536
_LICENCE_KEYS = ("license", "license_name", "license_link")


def model_card(
    plan: ExportPlan,
    recipe: Recipe,
    name: str,
    *,
    serve_command: str | None,
    load_code: str | None,
    validation: str,
) -> str:
    """The README of an exported checkpoint: recipe, lineage, accuracy, how to serve it.

    Args:
        plan: Of the export.
        recipe: That was exported.
        name: Of the new model.
        serve_command: From ``serve_command``; None where the engine is no server.
        load_code: The line of Python that loads it then; None where it is served.
        validation: Markdown, may be empty.

    Returns:
        Markdown with a metadata block.
    """
    parts = [
        _metadata(plan.checkpoint, recipe),
        f"# {name}",
        f"{recipe.model_name} with the number format of every linear layer chosen by "
        f"mofq {__version__}.",
        _sizes(plan),
        "## Schemes\n\n" + _scheme_table(plan, recipe),
        "## Accuracy\n\n" + (validation or _predicted(recipe)),
        "" if serve_command is None else f"## Serving\n\n```bash\n{serve_command}\n```",
        "" if load_code is None else _loading(load_code),
        "## Lineage\n\n" + _lineage(plan.checkpoint, recipe),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(original: Checkpoint, recipe: Recipe) -> str:
    lines = ["---", "library_name: transformers", "tags: [mofq, compressed-tensors, quantized]"]
    names = (original.name, recipe.model_name, rewritten_from(original.folder) or "")
    if known := next((name for name in names if HUB_ID.fullmatch(name)), None):
        lines += [f"base_model: {known}", "base_model_relation: quantized"]
    if licence := _licence(original):
        lines += yaml.safe_dump(licence, sort_keys=False, allow_unicode=True).splitlines()
    return "\n".join([*lines, "---"])


def _licence(original: Checkpoint) -> dict[str, Any]:
    """What the metadata of the original's own card says of its licence, or else its config."""
    for card in _CARDS:
        stated = _metadata_of(original.folder / card)
        if "license" in stated:
            break
    else:
        stated = original.config
    found = {key: stated[key] for key in _LICENCE_KEYS if key in stated}
    return {key: value for key, value in found.items() if _is_text(value)}


def _is_text(value: object) -> bool:
    values = value if isinstance(value, list) else [value]
    return all(isinstance(one, str) for one in values) and values != []


def _metadata_of(card: Path) -> dict[str, Any]:
    """The block of YAML at the head of a card; empty where the hub would not read it either."""
    if not card.is_file():
        return {}
    with card.open(encoding="utf-8", errors="replace") as file:
        block = _METADATA.match(file.read(_MOST_METADATA))
    try:
        stated = yaml.safe_load(block[1]) if block else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return stated if isinstance(stated, dict) else {}


def _loading(load_code: str) -> str:
    module = load_code.partition(".")[0]
    return f"## Loading\n\n```python\nimport {module}\n\nmodel = {load_code}\n```"


def _sizes(plan: ExportPlan) -> str:
    weights = weights_of(plan.model_layers.groups)
    return (
        f"{bits_per_weight(plan.group_bytes, weights):.4f} bits per weight in the linear layers of "
        f"the decoder ({plan.group_bytes:,} bytes with scales and padding); "
        f"{plan.checkpoint_bytes:,} bytes in all tensors."
    )


def _scheme_table(plan: ExportPlan, recipe: Recipe) -> str:
    chosen = {planned.group.name: planned.scheme.name for planned in plan.quantized}
    groups: Counter[str] = Counter()
    layers: Counter[str] = Counter()
    for group in plan.model_layers.groups:
        scheme = chosen.get(group.name, "bf16")
        groups[scheme] += 1
        layers[scheme] += len(group.layers)
    rows = [f"| `{name}` | {count} | {layers[name]} |" for name, count in groups.most_common()]
    head = "| scheme | fusion groups | linear layers |\n| --- | --- | --- |\n"
    note = "`bf16` means left as it was."
    if plan.checkpoint.source_format is not None:
        note = (
            f"The original is quantized ({plan.checkpoint.source_format}); its weights are codes "
            f"times scales, and `bf16` means these products, rounded to bf16."
        )
    note = f"\n\n{note} The scheme of each layer is in `recipe.yaml`."
    return head + "\n".join(rows) + note + _caches(recipe) + _tuned(recipe)


def _caches(recipe: Recipe) -> str:
    if not recipe.kv_cache:
        return ""
    counts = Counter(cache.scheme for cache in recipe.kv_cache)
    named = ", ".join(f"`{name}` in {count}" for name, count in counts.most_common())
    return f"\n\nKV cache, of {len(recipe.kv_cache)} attention layers: {named}."


def _tuned(recipe: Recipe) -> str:
    if recipe.tuning is None:
        return ""
    return (
        f"\n\nAfter quantizing, by the divergence from the original: {recipe.tuning.what}. KL "
        f"divergence {recipe.tuning.gain}."
    )


def _predicted(recipe: Recipe) -> str:
    predicted = recipe.kl_nats_per_token
    if predicted is None:
        edited = " The recipe was edited after it was found." if recipe.is_edited else ""
        return f"Not measured.{edited}"
    before = "" if recipe.tuning is None else ", before it was tuned"
    return (
        f"Predicted KL divergence from the original: {predicted:.6f} nats per token{before}. Not "
        f"measured."
    )


def _lineage(original: Checkpoint, recipe: Recipe) -> str:
    lines = [f"- model: {recipe.model_name}, index_sha256 {recipe.index_sha256 or 'not stated'}"]
    if rewritten := rewritten_from(original.folder):
        lines.append(f"- which `mofq rewrite` made from: {rewritten}")
    lines += [f"- {key}: {value}" for key, value in recipe.made_by.items() if value is not None]
    return "\n".join(lines)
