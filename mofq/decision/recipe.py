"""Recipes: what was decided for every linear layer, and from which inputs.

``recipe.yaml`` is written by ``mofq search`` and may be edited by hand; it is
checked in full when it is read, and against the model before it is used.
``RECIPE_SCHEMA`` specifies the keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mofq.evidence.spaces import shape_rejection
from mofq.exceptions import RecipeError, SchemeError, nearest_name
from mofq.files.documents import (
    check_document,
    parse_yaml,
    read_text,
    strict_object,
    write_beside_and_rename,
    yaml_scalar,
)
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.kv_schemes import (
    CacheScheme,
    cache_bits,
    cache_rejection,
    parse_cache_scheme,
    static_keys,
)
from mofq.model.layers import CacheLayer, FusionGroup, ModelLayers
from mofq.numbers.schemes import parse_scheme

RECIPE_VERSION = 1
#: A hash may be shortened by hand, but not to nothing.
_SHORTEST_HASH = 8

Scalar = str | int | float | bool | None

_NAME = {"type": "string", "pattern": "."}
_TEXT = {"type": ["string", "null"]}
_HASH = {"type": "string", "pattern": f"^[0-9a-f]{{{_SHORTEST_HASH},64}}$"}
_NUMBER = {"type": ["number", "null"], "minimum": 0}
_COUNT = {"type": ["integer", "null"], "minimum": 0}
_SHARE = {**_NUMBER, "description": "0 to 1"}

#: What may be said of how a recipe came about. Nothing of it is needed to apply it.
MADE_BY_KEYS: dict[str, dict[str, Any]] = {
    "mofq": _NAME,
    # of the table's errors and of fitted codes, see mofq.numbers.numerics
    "numerics": {"type": ["integer", "null"], "minimum": 1},
    "solver": _NAME,
    "seed": {"type": ["integer", "null"]},
    "objective": _TEXT,  # what was minimised
    "unit": _TEXT,  # of the table's rows
    "corpus": _TEXT,
    "tie_rule": _TEXT,
    "engine": _TEXT,
    "space": _TEXT,
    "space_sha256": _HASH,
    "table_sha256": _HASH,
    "stats_sha256": _HASH,
    "bos": {"type": ["boolean", "null"]},  # whether the sequences of the statistics begin with it
    "text_sha256": _HASH,  # of the text that a measured objective used
    "trials": _COUNT,
    "note": _TEXT,
}
#: Limits that the recipe was asked to keep.
BUDGET_KEYS: dict[str, dict[str, Any]] = {
    "bits_per_weight": _NUMBER,
    "checkpoint_bytes": _COUNT,  # of all tensors, not of the quantized layers alone
    "kl_nats_per_token": _NUMBER,
    "finer_fraction": _SHARE,
    "seconds": _NUMBER,
    "device": _TEXT,
    "workload": _TEXT,
    "kv_bits": _NUMBER,
    "kv_tokens": _COUNT,  # of context, counted into the size
}
#: What the recipe costs and is predicted to do; null where the table is not in nats.
RESULT_KEYS: dict[str, dict[str, Any]] = {
    "bits_per_weight": _NUMBER,
    "bytes": _COUNT,  # of the fusion groups' tensors
    "checkpoint_bytes": _COUNT,
    "error": _NUMBER,  # summed, in the unit of made_by
    "kl_nats_per_token": _NUMBER,
    "kl_stderr": _NUMBER,
    # Read from older recipes and no longer written: the prediction with interactions of layers.
    "kl_joint": _NUMBER,
    "kl_joint_stderr": _NUMBER,
    "kl_measured": _NUMBER,  # where the objective was measured
    "kl_measured_stderr": _NUMBER,
    "finer_fraction": _SHARE,  # of linear layers
    "finer_weight_fraction": _SHARE,  # of weights
    "gap": _NUMBER,  # to the bound, in the unit of the objective
    "seconds": _NUMBER,  # predicted time on the budget's device
    "kv_bits": _NUMBER,  # per cached number, dynamic scales among them
    "kv_bytes_per_token": _NUMBER,  # of all layers
    "uniform_scheme": _TEXT,  # the best uniform scheme of at most these bits
    "uniform_bits_per_weight": _NUMBER,
    "uniform_kl_nats_per_token": _NUMBER,
}
_GROUP_SCHEMA = strict_object(
    {
        "scheme": _NAME,
        "layers": {"type": "array", "minItems": 1, "items": _NAME},
        "static_amax": {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": 0},
            "description": "layer -> largest |input|, where activations have a static scale",
        },
    },
    optional=("static_amax",),
)
_CACHE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "description": "attention layer -> how its keys and values are kept; all of them, or none",
    "additionalProperties": strict_object(
        {
            "scheme": {"type": "string", "pattern": "."},
            "static_amax": {
                "type": "object",
                "additionalProperties": {"type": "number", "minimum": 0},
                "description": "k, v, or each head's k.0, k.1 … -> largest magnitude cached, "
                "where a scale is static",
            },
        },
        optional=("static_amax",),
    ),
}
RECIPE_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "A mofq recipe (recipe.yaml)",
    **strict_object(
        {
            "version": {"const": RECIPE_VERSION},
            "model": strict_object(
                {"name": _NAME, "index_sha256": _HASH, "weights_sha256": _HASH},
                optional=("index_sha256", "weights_sha256"),
            ),
            "made_by": strict_object(MADE_BY_KEYS, optional=tuple(MADE_BY_KEYS)),
            "budget": strict_object(BUDGET_KEYS, optional=tuple(BUDGET_KEYS)),
            "result": strict_object(RESULT_KEYS, optional=tuple(RESULT_KEYS)),
            "groups": {"type": "object", "additionalProperties": _GROUP_SCHEMA},
            "unquantized": {"type": "array", "items": _NAME},
            "kv_cache": _CACHE_SCHEMA,
        },
        optional=("made_by", "budget", "result", "unquantized", "kv_cache"),
    ),
}


@dataclass(frozen=True, slots=True)
class RecipeGroup:
    """The scheme of one fusion group."""

    name: str
    scheme: str  #: canonical scheme name
    layers: tuple[str, ...]
    static_amax: dict[str, float] | None = None  #: layer -> largest |input|


@dataclass(frozen=True, slots=True)
class RecipeCache:
    """The scheme of one attention layer's cache."""

    name: str  #: of the `CacheLayer`
    scheme: str  #: canonical
    static_amax: dict[str, float] | None = None

    @property
    def parsed(self) -> CacheScheme:
        """The scheme itself."""
        return parse_cache_scheme(self.scheme)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One scheme for every linear layer of a model."""

    model_name: str
    #: Of the checkpoint; None: written by hand for any model of this shape.
    index_sha256: str | None
    groups: tuple[RecipeGroup, ...]
    unquantized: tuple[str, ...] = ()  #: linear layers outside of the fusion groups
    made_by: Mapping[str, Scalar] = field(default_factory=dict)  #: see `MADE_BY_KEYS`
    budget: Mapping[str, Scalar] = field(default_factory=dict)  #: see `BUDGET_KEYS`
    result: Mapping[str, Scalar] = field(default_factory=dict)  #: see `RESULT_KEYS`
    version: int = RECIPE_VERSION
    #: Of samples of the checkpoint's weights; None: for any weights of this shape.
    weights_sha256: str | None = None
    kv_cache: tuple[RecipeCache, ...] = ()  #: of every attention layer; empty: as it is

    @property
    def schemes(self) -> dict[str, str]:
        """Layer name -> scheme name, the unquantized layers included (``"bf16"``)."""
        chosen = {layer: group.scheme for group in self.groups for layer in group.layers}
        return chosen | dict.fromkeys(self.unquantized, "bf16")

    @property
    def scheme_of_group(self) -> dict[str, str]:
        """Fusion group, or attention layer whose cache is spoken of -> scheme name."""
        schemes = {group.name: group.scheme for group in self.groups}
        return schemes | {cache.name: cache.scheme for cache in self.kv_cache}

    @property
    def static_amax(self) -> dict[str, float]:
        """Layer name -> largest magnitude of its input, where a scheme needs it."""
        return {
            layer: amax
            for group in self.groups
            for layer, amax in (group.static_amax or {}).items()
        }

    @property
    def bits_per_weight(self) -> float | None:
        """As ``result`` says; None where it does not."""
        return _number(self.result, "bits_per_weight")

    @property
    def kl_nats_per_token(self) -> float | None:
        """Predicted; None where the recipe does not rest on a table in nats."""
        return _number(self.result, "kl_nats_per_token")


def _number(values: Mapping[str, Scalar], key: str) -> float | None:
    value = values.get(key)
    return float(value) if isinstance(value, int | float) else None


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe and check all that can be checked without the model.

    Args:
        path: A ``recipe.yaml``.

    Returns:
        The recipe, scheme names canonical.

    Raises:
        RecipeError: The file is missing or not valid, of another version, has an
            unknown key or scheme, or names a layer twice.
    """
    path = Path(path)
    return parse_recipe(read_text(path, RecipeError), where=str(path))


def parse_recipe(text: str, *, where: str = "recipe") -> Recipe:
    """A recipe from the text of its file; see `load_recipe`."""
    value = parse_yaml(text, where, RecipeError)
    if isinstance(value, dict) and value.get("version", RECIPE_VERSION) != RECIPE_VERSION:
        raise RecipeError(
            f"{where}: has version {value['version']!r}, "
            f"and this mofq reads version {RECIPE_VERSION}."
        )
    check_document(value, RECIPE_SCHEMA, where, RecipeError)
    recipe = Recipe(
        value["model"]["name"],
        value["model"].get("index_sha256"),
        groups=tuple(_group(name, group, where) for name, group in value["groups"].items()),
        unquantized=tuple(value.get("unquantized", ())),
        made_by=value.get("made_by", {}),
        budget=value.get("budget", {}),
        result=value.get("result", {}),
        weights_sha256=value["model"].get("weights_sha256"),
        kv_cache=_caches(value.get("kv_cache", {}), where),
    )
    _check_layers_once(recipe, where)
    return recipe


def _group(name: str, value: dict[str, Any], where: str) -> RecipeGroup:
    try:
        scheme = parse_scheme(value["scheme"])
    except SchemeError as problem:
        raise RecipeError(f"{where}: groups: {name}: {problem}") from problem
    static_amax, layers = value.get("static_amax"), tuple(value["layers"])
    needs_amax = scheme.activation is not None and scheme.activation.needs_tensor_amax
    if (static_amax is not None) != needs_amax or set(static_amax or layers) != set(layers):
        raise RecipeError(
            f"{where}: groups: {name}: static_amax must name exactly the layers of the group "
            f"where the activations have a static scale, and be absent elsewhere; "
            f"the scheme is {scheme.name}."
        )
    amax = {layer: float(static_amax[layer]) for layer in layers} if static_amax else None
    return RecipeGroup(name, scheme.name, layers=layers, static_amax=amax)


def _caches(value: Mapping[str, Any], where: str) -> tuple[RecipeCache, ...]:
    caches = []
    for name, one in value.items():
        try:
            scheme = parse_cache_scheme(one["scheme"])
        except SchemeError as problem:
            raise RecipeError(f"{where}: kv_cache: {name}: {problem}") from problem
        amax = one.get("static_amax")
        amax = None if amax is None else {key: float(number) for key, number in amax.items()}
        caches.append(RecipeCache(name, scheme.name, amax))
    return tuple(caches)


def _check_layers_once(recipe: Recipe, where: str) -> None:
    place: dict[str, str] = {}
    listed = [(layer, f"groups: {group.name}") for group in recipe.groups for layer in group.layers]
    for layer, here in [*listed, *((layer, "unquantized") for layer in recipe.unquantized)]:
        if layer in place:
            raise RecipeError(
                f"{where}: the layer {layer!r} stands in {place[layer]} and in {here}; keep one."
            )
        place[layer] = here


def write_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe: beside its final name, then renamed. Equal recipes give equal bytes.

    Raises:
        RecipeError: The recipe would not be read back as it is.
        MofqError: The file cannot be written.
    """
    text = recipe_text(recipe)
    if parse_recipe(text, where=str(path)) != recipe:
        raise RecipeError(f"{path}: the recipe holds values that its file format cannot keep.")
    write_beside_and_rename(Path(path), text)


def recipe_text(recipe: Recipe) -> str:
    """The YAML of a recipe."""
    model: dict[str, Scalar] = {"name": recipe.model_name}
    if recipe.index_sha256 is not None:
        model["index_sha256"] = recipe.index_sha256
    if recipe.weights_sha256 is not None:
        model["weights_sha256"] = recipe.weights_sha256
    lines = [
        "# A recipe of mofq. It may be edited by hand, and is checked in full when it is read.",
        f"version: {recipe.version}",
        f"model: {_flow(model)}",
    ]
    for name, values in (
        ("made_by", recipe.made_by),
        ("budget", recipe.budget),
        ("result", recipe.result),
    ):
        if values:
            lines.append(f"{name}: {_flow(values)}")
    lines.append("groups:  # one scheme per fusion group" if recipe.groups else "groups: {}")
    for group in recipe.groups:
        lines.append(f"  {yaml_scalar(group.name)}:")
        lines.append(f"    scheme: {yaml_scalar(group.scheme)}")
        lines.append(f"    layers: {_names(group.layers)}")
        if group.static_amax is not None:
            lines.append(f"    static_amax: {_flow(group.static_amax)}")
    lines.append(f"unquantized: {_names(recipe.unquantized)}  # nothing else is left out")
    return "\n".join(lines + cache_lines(recipe.kv_cache)) + "\n"


def cache_lines(caches: Sequence[RecipeCache]) -> list[str]:
    """The YAML of the section; nothing where the recipe says nothing of the cache."""
    if not caches:
        return []
    lines = ["kv_cache:  # how each attention layer keeps its keys and values"]
    for cache in caches:
        lines.append(f"  {yaml_scalar(cache.name)}:")
        lines.append(f"    scheme: {yaml_scalar(cache.scheme)}")
        if cache.static_amax is not None:
            lines.append(f"    static_amax: {_flow(cache.static_amax)}")
    return lines


def _flow(values: Mapping[str, Scalar]) -> str:
    return (
        "{"
        + ", ".join(f"{yaml_scalar(key)}: {yaml_scalar(value)}" for key, value in values.items())
        + "}"
    )


def _names(names: tuple[str, ...]) -> str:
    return "[" + ", ".join(map(yaml_scalar, names)) + "]"


def check_recipe(
    recipe: Recipe, model_layers: ModelLayers, *, index_sha256: str | None = None
) -> None:
    """Check that a recipe covers a model: every linear layer once, no fusion group split.

    Args:
        recipe: The recipe.
        model_layers: What ``find_layers`` found in the model.
        index_sha256: Of the model's checkpoint; None where there is none to compare with.

    Raises:
        RecipeError: The recipe is for another model, names a layer that the model
            has not, leaves one out, gives the layers of one fusion group different
            schemes, or gives a layer a scheme that its shape does not take.
    """
    _check_hash(recipe, index_sha256)
    schemes = recipe.schemes
    groups = [layer.name for group in model_layers.groups for layer in group.layers]
    known = [*groups, *(layer.name for layer in model_layers.unquantized)]
    unknown = sorted(schemes.keys() - set(known))
    if unknown:
        raise RecipeError(
            f"recipe of {recipe.model_name}: the model has no linear layer {unknown[0]!r} "
            f"({len(unknown)} unknown in all)." + nearest_name(unknown[0], known)
        )
    missing = [name for name in known if name not in schemes]
    if missing:
        raise RecipeError(
            f"recipe of {recipe.model_name}: the linear layer {missing[0]!r} is missing "
            f"({len(missing)} in all). Give it a scheme, or list it under `unquantized`."
        )
    _check_caches(recipe.kv_cache, model_layers.caches, model=recipe.model_name)
    for group in model_layers.groups:
        _check_group(recipe, group, schemes)
    for layer in (layer for group in model_layers.groups for layer in group.layers):
        reason = shape_rejection(parse_scheme(schemes[layer.name]), layer)
        if reason is not None:
            raise RecipeError(
                f"recipe of {recipe.model_name}: {reason}. Give its fusion group another scheme."
            )


def _check_caches(
    recipe_caches: Sequence[RecipeCache], caches: Sequence[CacheLayer], *, model: str
) -> None:
    """Every attention layer once with a scheme that fits it, or none."""
    if not recipe_caches:
        return
    known = {cache.name: cache for cache in caches}
    chosen = {cache.name: cache for cache in recipe_caches}
    where = f"recipe of {model}: kv_cache"
    for name in chosen:
        if name not in known:
            raise RecipeError(
                f"{where}: the model has no attention layer {name!r}." + nearest_name(name, known)
            )
    for name, cache in known.items():
        if name not in chosen:
            raise RecipeError(f"{where}: {name!r} is missing. Give it a scheme, e.g. bf16.")
        scheme = chosen[name].parsed
        reason = cache_rejection(scheme, cache)
        if reason is not None:
            raise RecipeError(f"{where}: {reason}. Give it another scheme.")
        needed, found = static_keys(scheme, cache), chosen[name].static_amax or {}
        if set(needed) != set(found):
            raise RecipeError(
                f"{where}: {name}: static_amax must name exactly {', '.join(needed) or 'nothing'} "
                f"under {scheme.name}, found {', '.join(found) or 'nothing'}."
            )


def check_weights(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Check that a recipe was made for these weights, and not for another training of them.

    Args:
        recipe: The recipe.
        checkpoint: That it is to be applied to.

    Raises:
        RecipeError: The recipe names other weights.
    """
    ours = recipe.weights_sha256
    if ours is not None and not (theirs := hash_weights(checkpoint)).startswith(ours):
        raise RecipeError(
            f"the recipe was made for {recipe.model_name} with weights_sha256 {ours}, and "
            f"{checkpoint.folder} of the same shapes has weights_sha256 {theirs}: a fine-tune or "
            f"another revision. Measure this model; or, to apply the recipe all the same, remove "
            f"weights_sha256 from it."
        )


def _check_hash(recipe: Recipe, index_sha256: str | None) -> None:
    ours = recipe.index_sha256
    if ours is not None and index_sha256 is not None and not index_sha256.startswith(ours):
        raise RecipeError(
            f"the recipe was made for {recipe.model_name} with index_sha256 {ours}, and the "
            f"model has {index_sha256}. Take the recipe of this model, or search again."
        )


def _check_group(recipe: Recipe, group: FusionGroup, schemes: Mapping[str, str]) -> None:
    chosen = {layer.name: schemes[layer.name] for layer in group.layers}
    first = group.layers[0].name
    for name, scheme in chosen.items():
        if scheme != chosen[first]:
            raise RecipeError(
                f"recipe of {recipe.model_name}: {group.name} is served as one matrix "
                f"and needs one scheme, but {first} has {chosen[first]} and {name} has {scheme}."
            )


def bits_per_number(recipe_caches: Sequence[RecipeCache], caches: Sequence[CacheLayer]) -> float:
    """True bits of a cached number, over all layers of a model."""
    chosen = {cache.name: cache.parsed for cache in recipe_caches}
    bits = sum(cache_bits(chosen[cache.name], cache) for cache in caches)
    return bits / sum(cache.numbers for cache in caches)
