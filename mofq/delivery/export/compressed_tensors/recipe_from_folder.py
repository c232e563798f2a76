"""Makes a recipe from a compressed-tensors checkpoint, whichever tool wrote it.

The scheme of each layer is what its config group and the stored scales say.
How its scales were chosen and its codes rounded is not on record: every scheme
is written without a rule. Targets are matched as transformers does: an exact
name before a regular expression (from its beginning) before the class name.

Source: compressed-tensors 0.20.0, ``utils/match.py``; transformers 5.23.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mofq.decision.make_recipe import sizes_by_shape
from mofq.decision.recipe import Recipe, RecipeGroup
from mofq.delivery.export.compressed_tensors.kv_cache import read_caches
from mofq.engines import is_read_transposed
from mofq.exceptions import BackendError, SchemeError
from mofq.files.documents import shown
from mofq.model.checkpoint.headers import CONFIG_FILE, Checkpoint, TensorInfo, open_stored
from mofq.model.checkpoint.tensors import read_tensor
from mofq.model.layers import FusionGroup, LinearLayer, ModelLayers, find_layers, included
from mofq.numbers.schemes import Scheme, parse_scheme

#: Last words of the tensors of a quantized layer or cache, but for ``weight`` itself.
STORED_PARTS = (
    *("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    *("weight_global_scale", "weight_g_idx", "input_scale", "input_zero_point"),
    "input_global_scale",
    *(f"{part}_{word}" for part in "qkv" for word in ("scale", "zero_point")),
)
_SCALES = {"BF16": "", "F32": ".s-f32"}
#: (strategy, group size) of four-bit floats, (strategy, group size, bits) under E8M0 scales.
_NAMED: dict[tuple[Any, ...], str] = {
    ("tensor_group", 16): "nvfp4",
    ("group", 32): "mxfp4",
    ("group", 32, 8): "mxfp8",
}
QUANTIZATION_KEY = "quantization_config"


def _equivalent_recipe(config: object) -> str:
    """A hint: the recipe with the scheme of a GPTQ or AWQ checkpoint, whose codes are not read."""
    if not isinstance(config, dict) or config.get("quant_method") not in ("gptq", "awq"):
        return ""
    bits, size = config.get("bits"), config.get("group_size")
    symmetric = config.get("sym", not config.get("zero_point", False))
    if type(bits) is not int or type(size) is not int or not 2 <= bits <= 8:
        return ""
    granularity = "channel" if size <= 0 else f"g{size}"
    scheme = f"int{bits}.{granularity}{'' if symmetric else '.asym'}"
    return (
        f" For its scheme with mofq's codes: `mofq recipe uniform MODEL {scheme} -o recipe.yaml`."
    )


def recipe_from_compressed_tensors(folder: str | Path) -> Recipe:
    """The recipe that a compressed-tensors checkpoint follows.

    Args:
        folder: Of the quantized model.

    Returns:
        A recipe for the original of that model. It carries no hash: the original
        is not known.

    Raises:
        BackendError: It is not in that format, has a scheme that mofq has no name
            for, or gives the layers of one fusion group different schemes.
        CheckpointError: No model, or one of an unknown family.
    """
    stored = open_stored(str(folder))
    config = stored.config.get(QUANTIZATION_KEY)
    if not isinstance(config, dict) or config.get("quant_method") != "compressed-tensors":
        method = config.get("quant_method") if isinstance(config, dict) else config
        found = "one that is not quantized" if config is None else f"quant_method {method!r}"
        raise BackendError(
            f"{stored.folder}: needed a compressed-tensors checkpoint, found {found}. Give a "
            f"folder that `mofq export` or llm-compressor wrote."
            f"{_equivalent_recipe(config)}"
        )
    if (fault := config_fault(config)) is not None:
        raise BackendError(f"{stored.folder / CONFIG_FILE}: {QUANTIZATION_KEY}: {fault}.")
    for key in ("transform_config", "sparsity_config"):
        if config.get(key):
            raise BackendError(
                f"{stored.folder}: has a {key}, so its weights are not those of the original, for "
                f"which mofq has no scheme. Give a folder that was quantized without it."
            )
    layers = find_stored_layers(stored)
    groups = tuple(_read_group(stored, config, group) for group in layers.groups)
    for layer in layers.unquantized:
        if config_group(config, layer.name) is not None and _is_quantized(stored, layer.name):
            raise BackendError(
                f"{layer.name}: is quantized, and is not part of the decoder's linear layers, "
                f"which is all that this recipe would hold. Give a folder where it is not."
            )
    recipe = Recipe(
        stored.name,
        None,
        groups,
        tuple(layer.name for layer in layers.unquantized),
        layers=layers.stated,
        kv_cache=read_caches(stored, config.get("kv_cache_scheme"), layers.caches),
        made_by={"note": f"read from {stored.name}"},
    )
    # Of the original's other tensors nothing is known.
    sizes = replace(sizes_by_shape(layers, recipe.schemes), checkpoint_bytes=None)
    return replace(recipe, result=sizes)


def find_stored_layers(stored: Checkpoint) -> ModelLayers:
    """The linear layers of a compressed-tensors checkpoint, by its headers.

    Args:
        stored: The quantized checkpoint.

    Returns:
        What ``find_layers`` finds in the model before it was quantized, with lm_head and
        embedding in fusion groups where they are quantized; the tensors of quantized layers are
        not those on disk.

    Raises:
        CheckpointError: The model is of an unknown family.
    """
    names = {name.rpartition(".")[0] for name in stored.tensors}
    quantized = (name for name in names if _is_quantized(stored, name))
    asked = included(quantized, str(stored.config.get("model_type")))
    return find_layers(_without_quantization(stored), **asked)


def _without_quantization(stored: Checkpoint) -> Checkpoint:
    """The headers as they were before quantization, for ``find_layers``."""
    tensors: dict[str, TensorInfo] = {}
    for name, info in stored.tensors.items():
        parent, _, word = name.rpartition(".")
        if word == "weight_packed":
            shape = _packed_shape(stored, parent, info)
            if is_read_transposed(parent, stored.config.get("model_type")):
                shape = shape[::-1]  # as the original has its weight
            tensors[f"{parent}.weight"] = _as_bf16(info, f"{parent}.weight", shape)
        elif word == "weight" and _is_quantized(stored, parent):
            tensors[name] = _as_bf16(info, name, info.shape)
        elif word not in STORED_PARTS:
            tensors[name] = info
    config = {key: value for key, value in stored.config.items() if key != QUANTIZATION_KEY}
    return replace(stored, tensors=tensors, config=config)


def _as_bf16(info: TensorInfo, name: str, shape: tuple[int, ...]) -> TensorInfo:
    rows, columns = shape
    return TensorInfo(name, "BF16", (rows, columns), info.file, 0, 2 * rows * columns)


def _packed_shape(stored: Checkpoint, layer: str, info: TensorInfo) -> tuple[int, ...]:
    shape = stored.tensors.get(f"{layer}.weight_shape")
    if shape is not None:
        return tuple(int(size) for size in read_tensor(shape).tolist())
    return info.shape[0], 2 * info.shape[1]


def _is_quantized(stored: Checkpoint, layer: str) -> bool:
    return f"{layer}.weight_scale" in stored.tensors


def _read_group(stored: Checkpoint, config: Mapping[str, Any], group: FusionGroup) -> RecipeGroup:
    schemes = {layer.name: _read_scheme(stored, config, layer.name) for layer in group.layers}
    first = group.layers[0].name
    for name, scheme in schemes.items():
        if scheme != schemes[first]:
            raise BackendError(
                f"{stored.folder}: {group.name} is served as one matrix, but {first} has "
                f"{schemes[first].name} and {name} has {scheme.name}. Engines load this without "
                f"a warning and compute something else. Quantize it with one scheme for both."
            )
    static = {layer.name: _static_amax(stored, layer, schemes[first]) for layer in group.layers}
    known = {name: amax for name, amax in static.items() if amax is not None}
    names = tuple(layer.name for layer in group.layers)
    return RecipeGroup(group.name, schemes[first].name, names, known or None)


def _read_scheme(stored: Checkpoint, config: Mapping[str, Any], layer: str) -> Scheme:
    if not _is_quantized(stored, layer):
        return parse_scheme("bf16")
    group = config_group(config, layer)
    if group is None:
        raise BackendError(
            f"{stored.folder}: {layer!r} has scales and no config group targets it, so engines "
            f"take its codes for weights. Have the tool that wrote the folder write it again."
        )
    if f"{layer}.weight_g_idx" in stored.tensors:
        raise BackendError(
            f"{stored.folder}: {layer!r}: its columns are grouped in an order of their own "
            f"(weight_g_idx), for which mofq has no scheme. Quantize it without activation order."
        )
    scale = stored.tensors[f"{layer}.weight_scale"]
    try:
        name = _operand(group["weights"], scale.dtype)
        if group.get("input_activations"):
            name += "+" + _operand(group["input_activations"], None)
        return parse_scheme(name)
    except (SchemeError, KeyError, TypeError, ValueError) as error:
        raise BackendError(
            f"{stored.folder}: {layer!r}: mofq has no scheme for {group.get('weights')} with "
            f"{scale.dtype} scales and inputs {group.get('input_activations')}: {error}"
        ) from error


def _operand(arguments: Mapping[str, Any], scale_dtype: str | None) -> str:
    """One operand's scheme, from its ``QuantizationArgs`` and the dtype of its scales."""
    bits, kind = arguments.get("num_bits", 8), arguments.get("type", "int")
    size, strategy = arguments.get("group_size"), _strategy(arguments)
    if kind == "float" and bits == 4:
        return _NAMED[strategy, size]
    if kind == "float" and (scale_dtype == "U8" or arguments.get("scale_dtype") == "torch.uint8"):
        return _NAMED[strategy, size, bits]
    element = f"int{bits}" if kind == "int" else {8: "fp8_e4m3"}[bits]
    if strategy == "group":
        tile = f"g{size}"
    elif strategy == "block":
        rows, columns = arguments["block_structure"]
        tile = f"block{rows}x{columns}" if rows != columns else f"block{rows}"
    else:
        tile = strategy
    asymmetric = "" if arguments.get("symmetric", True) else ".asym"
    scale = "" if scale_dtype is None else _SCALES[scale_dtype]
    return f"{element}.{tile}{asymmetric}{scale}"


def _strategy(arguments: Mapping[str, Any]) -> str:
    """The strategy, inferred from the group size where it is not given."""
    stated, size = arguments.get("strategy"), arguments.get("group_size")
    if stated is not None:
        return str(stated)
    if size is None:
        return "tensor"
    return "channel" if size == -1 else "group"


def _static_amax(stored: Checkpoint, layer: LinearLayer, scheme: Scheme) -> float | None:
    activation = scheme.activation
    if activation is None or not activation.needs_tensor_amax:
        return None
    largest = float(activation.element.max)
    if activation.scale.global_scale_bits:
        divisor = float(read_tensor(stored.tensors[f"{layer.name}.input_global_scale"]).max())
        return 448.0 * largest / divisor
    return largest * float(read_tensor(stored.tensors[f"{layer.name}.input_scale"]).max())


def config_fault(config: object) -> str | None:
    """What in a ``quantization_config`` is of no type that engines understand, if anything is.

    ``ignore: "re:.*"`` is a text to one reader and six names of one letter to another.
    """
    if not isinstance(config, dict):
        return f"needed a mapping, found {shown(config)}"
    groups = config.get("config_groups") or {}
    names = {"ignore": config.get("ignore") or []}
    mappings = {"config_groups": groups, "kv_cache_scheme": config.get("kv_cache_scheme") or {}}
    for name, group in groups.items() if isinstance(groups, dict) else ():
        where = f"config_groups: {name}"
        mappings[where] = group
        if isinstance(group, dict):
            names[f"{where}: targets"] = group.get("targets")
            for operand in ("weights", "input_activations"):
                mappings[f"{where}: {operand}"] = group.get(operand) or {}
    for where, value in mappings.items():
        if not isinstance(value, dict):
            return f"{where}: needed a mapping, found {shown(value)}"
    for where, value in names.items():
        if not _is_names(value):
            return f"{where}: needed a list of names and expressions, found {shown(value)}"
    return None


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(name, str) and _is_expression(name.removeprefix("re:")) for name in value
    )


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def config_group(config: Mapping[str, Any], layer: str) -> Mapping[str, Any] | None:
    """The config group that targets a linear layer.

    Args:
        config: A ``quantization_config`` without a ``config_fault``.
        layer: Its name.

    Returns:
        The group; None where the layer is ignored, or no group targets it.
    """
    ignore = config.get("ignore") or []
    if any(_matches(layer, name) for name in ignore):
        return None
    groups: list[Mapping[str, Any]] = list((config.get("config_groups") or {}).values())
    exact = [group for group in groups if layer in group["targets"]]
    by_pattern = [group for group in groups if any(_matches(layer, t) for t in group["targets"])]
    by_class = [group for group in groups if "Linear" in group["targets"]]
    return next(iter([*exact, *by_pattern, *by_class]), None)


def _matches(layer: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), layer) is not None
    return target == layer
