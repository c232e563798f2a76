"""Everything in a model folder but its weights: files to copy, and the model card."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from mofq import __version__
from mofq.decision.recipe import Recipe
from mofq.delivery.export.compressed_tensors.plan import ExportPlan
from mofq.exceptions import BackendError
from mofq.model.sizes import bits_per_weight, weights_of

#: The original weights in any format, and what the export writes itself.
_LEFT_OUT = (
    *("*.safetensors", "*.safetensors.index.json", "*.partial"),
    *("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx"),
    *("*.gguf", "*.npz", "*.tflite"),
    *("config.json", "recipe.yaml", "hf_quant_config.json", "quantize_config.json"),
)
_CARD = "README.md"
_ORIGINAL_CARD = "README.original.md"


def copy_other_files(source: Path, target: Path) -> None:
    """Copy tokenizer, generation config and every other file beside the weights.

    Links are followed as far as the folder itself, or the blobs of the hub's cache
    that it is a snapshot of; what is copied is always a file. Folders are not
    entered: hub repositories keep other formats of the same weights there.

    Args:
        source: The original model folder.
        target: An existing folder.

    Raises:
        BackendError: A link leads elsewhere; a checkpoint from a stranger could
            publish a private file that way.
    """
    allowed = [source.resolve()]
    if source.parent.name == "snapshots":
        allowed.append((source.parent.parent / "blobs").resolve())
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or any(path.match(pattern) for pattern in _LEFT_OUT):
            continue
        real = path.resolve()
        if path.is_symlink() and not any(real.is_relative_to(folder) for folder in allowed):
            raise BackendError(
                f"{path}: is a link to {real}, outside of the model's folder, and would be copied "
                f"into the export. Replace it by a file, or remove it."
            )
        if real.is_file():
            name = _ORIGINAL_CARD if path.name == _CARD else path.name
            shutil.copyfile(real, target / name)


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
