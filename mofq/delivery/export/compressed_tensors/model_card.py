"""The README of an exported checkpoint."""

from __future__ import annotations

from collections import Counter

from mofq import __version__
from mofq.decision.recipe import Recipe
from mofq.delivery.export.compressed_tensors.plan import ExportPlan
from mofq.model.sizes import bits_per_weight, weights_of


def model_card(
    plan: ExportPlan, recipe: Recipe, name: str, serve_command: str, validation: str
) -> str:
    """The README of an exported checkpoint: recipe, lineage, accuracy, how to serve it.

    Args:
        plan: Of the export.
        recipe: That was exported.
        name: Of the new model.
        serve_command: From ``serve_command``.
        validation: Markdown, may be empty.

    Returns:
        Markdown with a metadata block.
    """
    parts = [
        _metadata(recipe),
        f"# {name}",
        f"{recipe.model_name} with the number format of every linear layer chosen by "
        f"[mofq](https://pypi.org/project/mofq/) {__version__}.",
        _sizes(plan),
        "## Schemes\n\n" + _scheme_table(plan, recipe),
        "## Accuracy\n\n" + (validation or _predicted(recipe)),
        f"## Serving\n\n```bash\n{serve_command}\n```",
        "## Lineage\n\n" + _lineage(recipe),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(recipe: Recipe) -> str:
    lines = ["---", "library_name: transformers", "tags: [mofq, compressed-tensors, quantized]"]
    if recipe.model_name.count("/") == 1:
        lines += [f"base_model: {recipe.model_name}", "base_model_relation: quantized"]
    return "\n".join([*lines, "---"])


def _sizes(plan: ExportPlan) -> str:
    weights = weights_of(plan.model_layers.groups)
    total = sum(tensor.nbytes for tensor in plan.tensors.values())
    return (
        f"{bits_per_weight(plan.group_bytes, weights):.4f} bits per weight in the linear layers of "
        f"the decoder ({plan.group_bytes:,} bytes with scales and padding); "
        f"{total:,} bytes in all tensors."
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
            f"The original is FP8 ({plan.checkpoint.source_format}); its weights are codes times "
            f"scales, and `bf16` means these products, rounded to bf16."
        )
    note = f"\n\n{note} The scheme of each layer is in `recipe.yaml`."
    return head + "\n".join(rows) + note + _caches(recipe)


def _caches(recipe: Recipe) -> str:
    if not recipe.kv_cache:
        return ""
    counts = Counter(cache.scheme for cache in recipe.kv_cache)
    named = ", ".join(f"`{name}` in {count}" for name, count in counts.most_common())
    return f"\n\nKV cache, of {len(recipe.kv_cache)} attention layers: {named}."


def _predicted(recipe: Recipe) -> str:
    predicted = recipe.kl_nats_per_token
    if predicted is None:
        return "Not measured."
    return (
        f"Predicted KL divergence from the original: {predicted:.6f} nats per token. Not measured."
    )


def _lineage(recipe: Recipe) -> str:
    lines = [f"- model: {recipe.model_name}, index_sha256 {recipe.index_sha256 or 'not stated'}"]
    lines += [f"- {key}: {value}" for key, value in recipe.made_by.items() if value is not None]
    return "\n".join(lines)
