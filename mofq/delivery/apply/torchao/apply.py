"""Puts TorchAO's kernels into a model in memory, layer by layer as a recipe says."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mofq.decision.recipe import Recipe
from mofq.delivery.apply import emulate as emulation
from mofq.delivery.apply.loaded_model import module_path, replace_module
from mofq.delivery.apply.torchao.linear import TorchaoLinear
from mofq.delivery.apply.torchao.weights import Target, make_weight
from mofq.delivery.recipe_fits import check_fits
from mofq.delivery.recipe_layers import static_amax
from mofq.engines import ENGINES, Engine, matching_rule, rule_refusal
from mofq.evidence.code_changes import CodeChanges
from mofq.evidence.fits import Fits
from mofq.evidence.layer_codes import layer_codes
from mofq.exceptions import BackendError, how_to_install
from mofq.files.progress import Progress
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.layers import FusionGroup
from mofq.numbers.schemes import Scheme


def apply(
    model: PreTrainedModel,
    recipe: Recipe,
    *,
    checkpoint: Checkpoint | None = None,
    fits: Fits | None = None,
    progress: Progress | None = None,
    emulate: Collection[str] = (),
) -> PreTrainedModel:
    """Put TorchAO's kernels in, in place.

    Args:
        model: As transformers loads it, on a CPU or a CUDA device. It is left as it
            was if any layer has no kernel.
        recipe: Covers every linear layer of the model.
        checkpoint: Where the weights to quantize are read; by default they are the
            model's own.
        fits: Of the recipe's own stats; where a scheme is fitted.
        progress: Called with ``"torchao"``, fusion groups done, and all of them.
        emulate: Names of layers, or patterns such as ``*.down_proj`` or ``*``, that are
            emulated where no kernel fits them.

    Returns:
        The model. Each layer with a scheme is a ``TorchaoLinear`` now, or emulated; it can be run
        and not be saved.

    Raises:
        BackendError: TorchAO is not installed, or no kernel fits a layer, which the
            message names with the reason; or a layer is quantized already.
        RecipeError: As ``mofq.delivery.apply.emulate.apply``.
        SchemeError: A weight is not finite.
        StatsError: A scheme is fitted to statistics, and there are none.
    """
    _require_torchao()
    engine = device_engine(model.device)
    applied = emulation.apply_groups(
        model,
        recipe,
        partial(_apply_group, engine=engine, fits=fits),
        check=partial(_check_group, model, engine=engine, fits=fits, emulate=emulate),
        checkpoint=checkpoint,
        progress=progress,
        stage="torchao",
    )
    applied.save_pretrained = _refuse_to_save
    return applied


def _refuse_to_save(*_arguments: object, **_options: object) -> NoReturn:
    raise BackendError(
        "save_pretrained: the recipe is applied to this model in memory, and transformers has no "
        "format for its layers. Write a checkpoint with `mofq export MODEL RECIPE -o FOLDER`, or "
        "the config by which transformers quantizes with TorchAO, and saves, with "
        "`mofq export MODEL RECIPE --to torchao -o FILE`."
    )


def device_engine(device: torch.device) -> Engine:
    """What is known of TorchAO on a device.

    Args:
        device: Of the model's weights.

    Returns:
        An entry of ``mofq.engines``: the newest generation that the device is not older than.

    Raises:
        BackendError: Nothing is known of it.
    """
    if device.type == "cpu":
        return ENGINES["torchao-cpu"]
    known = [each for each in ENGINES.values() if each.reads == "torchao" and each.capability]
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        older = [each for each in known if (each.capability or (0, 0)) <= capability]
        if older:
            return max(older, key=lambda each: each.capability or (0, 0))
    raise BackendError(
        f"needed a CPU, or a GPU of compute capability 8.0, for TorchAO's kernels; the model is on "
        f"{device}. Use the backend 'emulate', which runs anywhere."
    )


def make_target(
    scheme: Scheme,
    group: FusionGroup,
    *,
    engine: Engine,
    dtype: torch.dtype,
    static_amax: float | None,
) -> Target:
    """What the weights of a fusion group are made for.

    Args:
        scheme: That the engine has a kernel for.
        group: Of the layers.
        engine: From ``device_engine``.
        dtype: Of the layers' inputs.
        static_amax: Largest magnitude of the inputs, where the scheme has static ones.

    Returns:
        For ``make_weight``.
    """
    rule = matching_rule(engine, scheme, group)
    assert rule is not None
    kernel, _, how = rule.kernel.partition(", ")
    return Target(kernel, dtype, "EMULATED" in how, static_amax)


def kernel_refusal(
    scheme: Scheme, group: FusionGroup, *, engine: Engine, dtype: torch.dtype
) -> str | None:
    """Why TorchAO has no kernel for a fusion group in a scheme, or None."""
    if reason := rule_refusal(engine, scheme, group):
        return reason
    rule = matching_rule(engine, scheme, group)
    kernel = "" if rule is None else rule.kernel
    if dtype is torch.float16 and not kernel.startswith(("Int8", "Intx")):
        return f"{kernel} needs a model in bfloat16 or float32; this one is in float16"
    if kernel.endswith("torch._scaled_mm") and engine.capability and dtype is not torch.bfloat16:
        return f"{kernel} on a GPU needs a model in bfloat16; this one is in {dtype}"
    return None


def _check_group(
    model: PreTrainedModel,
    group: FusionGroup,
    scheme: Scheme,
    *,
    engine: Engine,
    fits: Fits | None,
    emulate: Collection[str],
) -> None:
    check_fits(fits, group, scheme)
    reason = kernel_refusal(scheme, group, engine=engine, dtype=_dtype(model, group))
    if reason is None:
        return
    for layer in group.layers:
        if not any(fnmatchcase(layer.name, pattern) for pattern in emulate):
            raise BackendError(
                f"{layer.name} in {scheme.name}: {reason}. Give emulate=({layer.name!r},) to "
                f"emulate the layer, or '*' for all such layers."
            )


def _apply_group(
    model: nn.Module,
    group: FusionGroup,
    scheme: Scheme,
    *,
    sources: Mapping[str, Tensor],
    recipe: Recipe,
    engine: Engine,
    fits: Fits | None,
    changes: Mapping[str, CodeChanges],
) -> None:
    dtype = _dtype(model, group)
    if kernel_refusal(scheme, group, engine=engine, dtype=dtype) is not None:
        emulation.apply_group(
            model, group, scheme, sources=sources, recipe=recipe, fits=fits, changes=changes
        )
        return
    weight = scheme.quantized_weight
    amax = emulation.weight_amax(group, scheme, sources)
    inputs = static_amax(group, scheme, recipe)
    for layer in group.layers:
        path = module_path(layer)
        linear = model.get_submodule(path)
        weight_OI = sources[layer.name].to(linear.get_parameter("weight").device)
        codes = layer_codes(
            fits,
            layer,
            weight,
            partial(emulation.rows_of, weight_OI),
            tensor_amax=amax.get(layer.name),
            changes=changes.get(layer.name),
        )
        quantized = codes.rows(0, len(weight_OI))
        target = make_target(
            scheme, group, engine=engine, dtype=dtype, static_amax=inputs.get(layer.name)
        )
        made = make_weight(quantized, scheme, target)
        layer_made = TorchaoLinear.from_linear(
            linear, scheme, weight_OI=made, target=target, name=layer.name
        )
        replace_module(model, path, layer_made)


def _dtype(model: nn.Module, group: FusionGroup) -> torch.dtype:
    return model.get_parameter(group.layers[0].tensor).dtype


def _require_torchao() -> None:
    from importlib.util import find_spec

    if find_spec("torchao") is None:
        raise BackendError(
            "the backend 'torchao' needs the package torchao, which is not installed. "
            f"{how_to_install('torchao')}"
        )
