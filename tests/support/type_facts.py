"""What transformers does with the tensors of a model type, found by running its own code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key
from transformers.pytorch_utils import Conv1D

from mofq.model.attention import pass_cache
from mofq.model.layers.name_patterns import TOWERS
from mofq.model.layers.names_in_memory import as_pattern
from mofq.model.modules import experts_problem, find_kind, is_plain_linear

_TOKENS = 24
_LISTS = {"odd", "odd_experts", "experts_after", "caches", "reused", "uncalled", "partly"}


def find_facts(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `mofq.model.layers.names_in_memory` keeps of a type.

    Args:
        model: A tiny one.
        stored: Its tensors, as it saves them in the layout of the hub.

    Returns:
        JSON of `KnownType`.
    """
    text = model.config.get_text_config()
    tied = getattr(model.config, "tie_word_embeddings", getattr(text, "tie_word_embeddings", False))
    facts: dict[str, Any] = {"class": type(model).__name__, "tied": bool(tied)}
    if problems := _experts(model):
        plain = "" in problems.values()
        facts["experts"] = "" if plain else max(problems.values())
        if odd := {path: why for path, why in problems.items() if why and plain}:
            facts["odd_experts"] = odd
    facts["names"], after = _names(model, stored)
    if after:
        facts["experts_after"] = after
    if swapped := _swapped(model, stored, facts["names"]):
        facts["swapped"] = swapped
    facts |= _fused_experts(model, facts["names"], stored)
    if (key := _key_of(text, model.config)) not in (None, "", "text_config"):
        facts["text"] = key
    try:
        facts |= _calls(model)
        if caches := _caches(model):
            facts["caches"] = caches
    except (TypeError, ValueError) as error:  # what it needs besides
        return {**facts, "names": {}, "needs": " ".join(str(error).split()).rstrip(".")}
    return of_text(facts)


def of_text(facts: dict[str, Any]) -> dict[str, Any]:
    """Facts without what they say of towers: nothing of these is decided."""
    stacks = tuple(f"{stack}." for stack in facts.get("stacks", ()))
    names = {key: one for key, one in facts["names"].items() if not TOWERS.search(key)}
    kept = {**facts, "names": names}
    for key in ("odd", "odd_experts", "experts_after"):
        found = facts.get(key, {}).items()
        kept[key] = {pattern: what for pattern, what in found if pattern.startswith(stacks)}
    if "swapped" in facts:
        kept["swapped"] = [pattern for pattern in facts["swapped"] if pattern in names]
    for key in ("caches", "reused", "uncalled", "partly"):
        kept[key] = [pattern for pattern in facts.get(key, ()) if pattern.startswith(stacks)]
    return {key: one for key, one in kept.items() if one or key in facts.keys() - _LISTS}


def _caches(model: PreTrainedModel) -> list[str]:
    """Attention modules that cache keys and values of heads as the config counts them.

    The last module on the way down that is given a cache must update it once, with keys and
    values of one shape.
    """
    text = model.config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    try:
        size = getattr(text, "head_dim", None) or (heads and text.hidden_size // heads)
    except RuntimeError:  # heads of two sizes, as of Gemma 4
        return []
    takes = {
        path: module
        for path, module in model.named_modules()
        if "past_key_values" in signature(type(module).forward).parameters
    }
    seen: dict[str, list[tuple[int, ...]]] = {}
    handles = []
    cache_more = set()
    for path, module in takes.items():
        if not path.endswith(".self_attn"):
            continue
        if any(name.startswith(f"{path}.") for name in takes):
            cache_more.add(as_pattern(path))
            continue
        shapes = seen.setdefault(path, [])

        def see(keys: Tensor, values: Tensor, shapes: Any = shapes) -> tuple[Tensor, Tensor]:
            shapes += [tuple(keys.shape), tuple(values.shape)]
            return keys, values

        handles.append(pass_cache(module, see))
    try:
        with torch.inference_mode():
            model(input_ids=torch.arange(_TOKENS)[None] + 65, use_cache=False)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        seen.clear()  # it asks more of a cache
    for handle in handles:
        handle.remove()
    found: dict[str, bool] = {}
    for path, shapes in seen.items():
        is_plain = len(shapes) == 2 and shapes[0] == shapes[1]
        is_plain = is_plain and shapes[0][2:] == (_TOKENS, size)
        pattern = as_pattern(path)
        found[pattern] = found.get(pattern, True) and (is_plain or not shapes)
    return sorted(pattern for pattern in found if found[pattern] and pattern not in cache_more)


def join_facts(alone: dict[str, Any], with_towers: dict[str, Any]) -> dict[str, Any]:
    """Of a type with two classes, whose tensors have different names.

    Args:
        alone: Of the language model alone.
        with_towers: Of the class that takes images too.
    """
    joined = {**with_towers, **alone, "with_towers": with_towers["stacks"]}
    for key in ("names", "odd", "odd_experts", "experts_after"):
        joined[key] = {**with_towers.get(key, {}), **alone.get(key, {})}
    for key in ("caches", "fused", "reused", "swapped", "uncalled", "partly"):
        joined[key] = sorted({*with_towers.get(key, ()), *alone.get(key, ())})
    return {
        key: value for key, value in joined.items() if value or key in ("tied", "names", "experts")
    }


def _key_of(text: PretrainedConfig, config: PretrainedConfig) -> str | None:
    """Where in a config another one is: "thinker_config.text_config"; "" for itself."""
    if text is config:
        return ""
    for key in config.sub_configs:
        part = getattr(config, key, None)
        inner = None if part is None else _key_of(text, part)
        if inner is not None:
            return f"{key}.{inner}".rstrip(".")
    return None


def _experts(model: nn.Module) -> dict[str, str]:
    """Pattern of a module of experts -> why it is not plain, or an empty reason."""
    found = {}
    for path, module in model.named_modules():
        names = {name for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
        if "down_proj" in names:
            found[as_pattern(path)] = experts_problem(module) or ""
    return found


def _fused_experts(
    model: nn.Module, names: dict[str, list[Any]], stored: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Where experts are one tensor on disk too; adds to ``names`` how engines call each of them.

    Source: vLLM 0.33.0 ``fused_moe/layer.py:125`` (``ckpt_names``) and ``routed_experts.py:1004``;
    ``models/gpt_oss.py:73``, which reads gates and ups as they are interleaved.
    """
    on_disk = {names.get(as_pattern(key), [as_pattern(key)])[0]: key for key in stored}
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if "down_proj" not in own or own["down_proj"].ndim != 3 or experts_problem(module):
            continue
        kind, at = find_kind(module), as_pattern(path)
        key = on_disk.get(f"{at}.down_proj")
        if key is None or own["down_proj"].shape != stored[key].shape:
            continue  # one by one
        found["fused"] = sorted({*found.get("fused", ()), at})
        found["transposed"] = kind.transposed
        before, has_experts, _ = key.rpartition(".experts.")
        before = before if has_experts else key.removesuffix(".weight").rpartition(".")[0]
        words: dict[str, list[str]] = {
            kind.first: ["gate_proj", "up_proj"],
            "down_proj": ["down_proj"],
        }
        if kind.first == "up_proj":
            words[kind.first] = ["up_proj"]
        if not getattr(module, "is_concatenated", True):
            words[kind.first] = [kind.first]
        for parameter, parts in words.items():
            for part, word in enumerate(parts):
                name = f"{as_pattern(before)}.experts.#.{word}.weight"
                names[name] = [f"{at}.{parameter}", part, len(parts)]
    return found


def _names(
    model: PreTrainedModel, stored: Mapping[str, Tensor]
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Pattern on disk -> pattern in memory, part, parts; of those that differ.

    And module of experts -> that of the experts which follow them in one list on disk.
    """
    transforms = get_model_conversion_mapping(model)
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    renamings = [one for one in transforms if not isinstance(one, WeightConverter)]
    loaded = dict(model.state_dict())
    names: dict[str, list[Any]] = {}
    after: dict[str, str] = {}
    for name, value in sorted(stored.items()):
        target, source = rename_source_key(
            name, renamings, converters, model.base_model_prefix, loaded
        )
        if target == name and source is None:
            continue
        key = as_pattern(name)
        if target not in loaded:
            names[key] = ["", 0, 1]  # converted in another way, or not loaded
            continue
        whole = loaded[target]
        index = _expert_of(key, as_pattern(target), name)
        if index is not None and index >= len(whole):
            following = _following(loaded, target, value, index - len(whole))
            if following is None:
                names[key] = ["", 0, 1]  # one list of experts for several mixtures
            else:
                own, other = (as_pattern(one).rpartition(".")[0] for one in (target, following))
                after[own] = other
            continue
        inside = whole if index is None else whole[index]
        found = _find_part(value, inside)
        entry = ["", 0, 1] if found is None else [as_pattern(target), *found]
        if names.setdefault(key, entry) != entry:
            names[key] = ["", 0, 1]
    return names, after


def _swapped(
    model: PreTrainedModel, stored: Mapping[str, Tensor], names: dict[str, list[Any]]
) -> list[str]:
    """Patterns of matrices on disk that are transposed in memory; adds where to ``names``."""
    transforms = get_model_conversion_mapping(model)
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    renamings = [one for one in transforms if not isinstance(one, WeightConverter)]
    loaded = dict(model.state_dict())
    found = set()
    for name, value in sorted(stored.items()):
        key = as_pattern(name)
        if value.ndim != 2 or names.get(key) != ["", 0, 1]:
            continue
        target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, loaded)
        whole = loaded.get(target)
        if whole is not None and whole.shape == value.T.shape and torch.equal(whole, value.T):
            names[key] = [as_pattern(target), 0, 1]
            found.add(key)
    return sorted(found)


def _following(loaded: Mapping[str, Tensor], target: str, value: Tensor, index: int) -> str | None:
    """The parameter of another mixture of the same layer that holds an expert of the list."""
    layer = re.match(r".*?\.[0-9]+\.", target)
    beside = {
        name: whole
        for name, whole in loaded.items()
        if layer is not None and name.startswith(layer[0]) and name != target and whole.ndim == 3
    }
    held = ((name, whole[index]) for name, whole in beside.items() if index < len(whole))
    return next((name for name, one in held if _find_part(value, one) is not None), None)


def _expert_of(key: str, target: str, name: str) -> int | None:
    numbers = re.findall(r"(?<![^.])[0-9]+(?![^.])", name)
    count = target.count("#")
    return int(numbers[count]) if key.count("#") > count else None


def _find_part(value: Tensor, inside: Tensor) -> tuple[int, int] | None:
    """Which of how many equal shares of the rows of ``inside`` a stored tensor is.

    Of all experts at once, the rows of each.
    """
    if value.shape == inside.shape:
        return (0, 1) if torch.equal(value, inside) else None
    if value.ndim == inside.ndim == 3 and value.shape[0] == inside.shape[0]:
        return _find_part(value.transpose(0, 1), inside.transpose(0, 1))
    if (
        not (value.ndim and inside.ndim)
        or value.shape[1:] != inside.shape[1:]
        or inside.shape[0] % len(value)
    ):
        return None
    parts = inside.shape[0] // value.shape[0]
    for part, share in enumerate(inside.chunk(parts)):
        if torch.equal(share, value):
            return part, parts
    return None


def _calls(model: PreTrainedModel) -> dict[str, Any]:
    """The list of decoder layers; linear modules that run twice for a token, or not at all."""
    calls: Counter[str] = Counter()
    hooks = []
    modules = dict(_linear_modules(model))
    for name, module in modules.items():
        hooks.append(module.register_forward_hook(lambda *_, name=name: calls.update([name])))
    with torch.inference_mode():
        model(input_ids=torch.arange(_TOKENS)[None] + 65, use_cache=False)
    for hook in hooks:
        hook.remove()
    holders = Counter(id(module.weight) for module in modules.values())
    reused = {
        as_pattern(name)
        for name, module in modules.items()
        if calls[name] > 1 or holders[id(module.weight)] > 1
    }
    idle = {as_pattern(name) for name in modules if not calls[name]}
    busy = {as_pattern(name) for name in modules if calls[name]}
    odd = {as_pattern(n): type(m).__name__ for n, m in modules.items() if not is_plain_linear(m)}
    odd |= {as_pattern(n): type(m).__name__ for n, m in model.named_modules() if _is_of_experts(m)}
    facts: dict[str, Any] = {
        "odd": odd,
        "stacks": sorted({name.partition(".#.")[0] for name in busy if ".#." in name}),
        "reused": sorted(reused),
        "uncalled": sorted(idle - busy),
        "partly": sorted((idle & busy) - reused),
    }
    return {key: value for key, value in facts.items() if value}


def _is_of_experts(module: nn.Module) -> bool:
    """Whether a module that is no convolution has a weight of three dimensions."""
    weight = getattr(module, "weight", None)
    is_conv = isinstance(module, nn.Conv1d | nn.ConvTranspose1d)
    return isinstance(weight, nn.Parameter) and weight.ndim == 3 and not is_conv


def _linear_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module
