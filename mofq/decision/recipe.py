"""Recipes: what was decided for every linear layer, and from which inputs.

``recipe.yaml`` is written by ``mofq search`` and may be edited by hand; it is
checked in full when it is read, and against the model before it is used.
``RecipeFile`` specifies the keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, Strict, TypeAdapter

from mofq.decision.rewriting import Rewriting
from mofq.decision.tuning import Tuning, beside
from mofq.evidence.spaces import shape_rejection
from mofq.exceptions import RecipeError, SchemeError, nearest_name
from mofq.files.documents import (
    parse_yaml,
    read_text,
    write_beside_and_rename,
    yaml_scalar,
)
from mofq.files.validated import (
    Count,
    Index,
    Integer,
    Name,
    NotNegative,
    Text,
    check_version,
    only_these_keys,
    published_schema,
    validate,
)
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.kv_schemes import (
    CacheScheme,
    cache_rejection,
    parse_cache_scheme,
    static_keys,
)
from mofq.model.layers import (
    CacheLayer,
    FusionGroup,
    ModelLayers,
    StatedLayers,
    vocabulary_rejection,
)
from mofq.numbers.schemes import parse_scheme

RECIPE_VERSION: Literal[1] = 1
#: The recipe in a folder that was exported by it.
RECIPE_FILE = "recipe.yaml"
#: What stands before the entries of caches.
CACHES_LINE = "kv_cache:  # how each attention layer keeps its keys and values\n"
#: A hash may be shortened by hand, but not to nothing.
_SHORTEST_HASH = 8
#: Of a text's hash, in a list of several.
_HASH_DIGITS = 16

#: Keys of made_by that have the hashes of texts.
_TEXTS = ("text_sha256", "corpora_sha256")
#: The solver of a recipe whose decisions are no longer those that were found.
EDITED = "edited"
#: Keys of made_by that say how decisions were found, and nothing of edited ones.
_OF_SOLVER = ("seed", "tie_rule", "trials", "constraints", "tried")

Scalar = str | int | float | bool | None

_Hash = Annotated[str, Strict(), Field(pattern=f"^[0-9a-f]{{{_SHORTEST_HASH},64}}$")]
_Share = Annotated[NotNegative | None, Field(description="0 to 1")]


@only_these_keys
@dataclass(frozen=True, slots=True, kw_only=True)
class MadeByKeys:
    """What may be said of how a recipe came about. Nothing of it is needed to apply it."""

    mofq: Name | None = None
    numerics: Count | None = None  #: of the errors and fitted codes, see `mofq.numbers.numerics`
    solver: Name | None = None
    seed: Integer | None = None
    objective: Text | None = None  #: what was minimised
    #: what each corpus counts in the mean: en=3,pt=1; None: all the same
    corpus_weights: Text | None = None
    unit: Text | None = None  #: of the table's rows
    corpus: Text | None = None
    tie_rule: Text | None = None
    engine: Text | None = None
    space: Text | None = None
    space_sha256: _Hash | None = None
    effort: Name | None = None  #: of `mofq run`: quick, normal or best
    tried: Text | None = None  #: by `mofq run`, with the nats per token that each predicts
    constraints: Text | None = None  #: on layers, of the search space and the request
    table_sha256: _Hash | None = None
    stats_sha256: _Hash | None = None
    #: whether the sequences of the statistics begin with it
    bos: Annotated[bool, Strict()] | None = None
    sequence_length: Count | None = None  #: tokens of each of these sequences
    text_sha256: _Hash | None = None  #: of the text that a measured objective used
    text_tokens: Count | None = None  #: of it that were compared
    #: hashes of the texts that were calibrated on, the first digits of each, by commas
    corpora_sha256: Text | None = None
    trials: Index | None = None
    note: Text | None = None


@only_these_keys
@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetKeys:
    """What the recipe was asked to keep."""

    bits_per_weight: NotNegative | None = None
    checkpoint_bytes: Index | None = None  #: of all tensors, not of the quantized layers alone
    kl_nats_per_token: NotNegative | None = None
    finer_fraction: _Share = None
    seconds: NotNegative | None = None
    device: Text | None = None
    workload: Text | None = None
    kv_bits: NotNegative | None = None
    kv_tokens: Index | None = None  #: of context, counted into the size
    active_bits: NotNegative | None = None  #: per weight that a token reads of a mixture


@only_these_keys
@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeResult:
    """What a recipe costs and is predicted to do; None: not known, or not in nats."""

    bits_per_weight: NotNegative | None = None
    bytes: Index | None = None  #: of the fusion groups' tensors
    checkpoint_bytes: Index | None = None
    error: NotNegative | None = None  #: summed, in the unit of made_by
    #: predicted, and corrected by what recipes of such a sum measure; not in recipes of before
    kl_nats_per_token: NotNegative | None = None
    kl_stderr: NotNegative | None = None  #: without an interval, of the sampled sequences alone
    kl_low: NotNegative | None = None  #: of the 95 % interval of the predicted KL
    kl_high: NotNegative | None = None
    # Read from older recipes and no longer written: the prediction with interactions of layers.
    kl_joint: NotNegative | None = None
    kl_joint_stderr: NotNegative | None = None
    kl_routing: NotNegative | None = None  #: of the prediction, by tokens that change experts
    kl_measured: NotNegative | None = None  #: where the objective was measured
    kl_measured_stderr: NotNegative | None = None
    finer_fraction: _Share = None  #: of linear layers
    finer_weight_fraction: _Share = None  #: of weights
    gap: NotNegative | None = None  #: to the bound, in the unit of the objective
    seconds: NotNegative | None = None  #: predicted time on the budget's device
    kv_bits: NotNegative | None = None  #: per cached number, dynamic scales among them
    kv_bytes_per_token: NotNegative | None = None  #: of all layers
    active_bits: NotNegative | None = None  #: per weight that a token reads of a mixture
    active_bytes_per_token: NotNegative | None = None  #: of linear layers, on average
    uniform_scheme: Text | None = None  #: the best uniform scheme of at most these bits
    uniform_bits_per_weight: NotNegative | None = None
    uniform_kl_nats_per_token: NotNegative | None = None
    #: Of the decisions that the figures are of; see `Recipe.decisions_sha256`
    decisions_sha256: _Hash | None = None

    def known(self) -> dict[str, str | float | int]:
        """The figures that are known, by name, without the hash."""
        names = (one.name for one in fields(self) if one.name != "decisions_sha256")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


@only_these_keys
@dataclass(frozen=True, slots=True)
class RecipeModel:
    """Which model a recipe is for; without hashes, any of this shape."""

    name: Name
    index_sha256: _Hash | None = None
    weights_sha256: _Hash | None = None


@only_these_keys
@dataclass(frozen=True, slots=True)
class GroupEntry:
    """The scheme of one fusion group, as the file has it under the group's name."""

    scheme: Name
    layers: Annotated[tuple[Name, ...], Field(min_length=1)]
    static_amax: Annotated[
        dict[Text, NotNegative] | None,
        Field(description="layer -> largest |input|, where activations have a static scale"),
    ] = None


@only_these_keys
@dataclass(frozen=True, slots=True)
class CacheEntry:
    """The scheme of one attention layer's cache, as the file has it under the layer's name."""

    scheme: Name
    static_amax: Annotated[
        dict[Text, NotNegative] | None,
        Field(
            description="k, v, or each head's k.0, k.1 … -> largest magnitude cached, "
            "where a scale is static"
        ),
    ] = None


@only_these_keys
@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeFile:
    """One scheme for every linear layer of a model."""

    version: Literal[1]
    model: RecipeModel
    made_by: MadeByKeys = field(default_factory=MadeByKeys)
    budget: BudgetKeys = field(default_factory=BudgetKeys)
    result: RecipeResult = field(default_factory=RecipeResult)
    groups: dict[Text, GroupEntry]
    unquantized: tuple[Name, ...] = ()
    layers: Annotated[
        StatedLayers | None, Field(description="what the user said of the model's layers")
    ] = None
    rewriting: Annotated[
        Rewriting | None,
        Field(description="of which model, and how, the one that this recipe is for was made"),
    ] = None
    tuning: Annotated[
        Tuning | None,
        Field(
            description="codes, scales and norms tuned after quantizing, in a file beside this one"
        ),
    ] = None
    kv_cache: Annotated[
        dict[Text, CacheEntry],
        Field(
            description="attention layer -> how its keys and values are kept; all of them, or none"
        ),
    ] = field(default_factory=dict)


_RECIPE_FILE = TypeAdapter(RecipeFile)
_REWRITING = TypeAdapter(Rewriting)
_TUNING = TypeAdapter(Tuning)
RECIPE_SCHEMA = published_schema(_RECIPE_FILE, "A mofq recipe (recipe.yaml)")


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
    """One scheme for every linear layer of a model.

    ``result`` is always of the decisions beside it: where its hash is of others, as in a file
    that was edited by hand, it is emptied and the solver is `EDITED`. A result without a hash,
    as in files of before there was one, is taken as it is.
    """

    model_name: str
    #: Of the checkpoint; None: written by hand for any model of this shape.
    index_sha256: str | None
    groups: tuple[RecipeGroup, ...]
    unquantized: tuple[str, ...] = ()  #: linear layers outside of the fusion groups
    made_by: Mapping[str, Scalar] = field(default_factory=dict)  #: see `MadeByKeys`
    budget: Mapping[str, Scalar] = field(default_factory=dict)  #: see `BudgetKeys`
    result: RecipeResult = field(default_factory=RecipeResult)
    version: int = RECIPE_VERSION
    #: Of samples of the checkpoint's weights; None: for any weights of this shape.
    weights_sha256: str | None = None
    kv_cache: tuple[RecipeCache, ...] = ()  #: of every attention layer; empty: as it is
    layers: StatedLayers | None = None  #: what the user said of the model's layers
    rewriting: Rewriting | None = None  #: that made the model of another; None: it is as it was
    #: Of norms, after quantizing; no part of the decisions, and ``result`` is of before it.
    tuning: Tuning | None = None
    #: The content of its file, whose hash ``tuning`` has.
    tuned: bytes = field(default=b"", compare=False, repr=False)
    #: The file that it was read from, for messages; no part of what a recipe says.
    file: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        known, ours = self.result.decisions_sha256, self.decisions_sha256
        if known is not None and not ours.startswith(known):
            made_by = {k: value for k, value in self.made_by.items() if k not in _OF_SOLVER}
            object.__setattr__(self, "made_by", made_by | {"solver": EDITED})
            object.__setattr__(self, "result", RecipeResult())
        elif known != ours and self.result.known():
            object.__setattr__(self, "result", replace(self.result, decisions_sha256=ours))

    @property
    def decisions_sha256(self) -> str:
        """Hash of what is decided: schemes and static ranges, and what is rewritten before."""
        caches = {one.name: (one.scheme, one.static_amax) for one in self.kv_cache}
        decided: list[object] = [self.static_amax, caches]
        if self.rewriting is not None:  # recipes of before there was any keep their hash
            # And recipes of before `inputs` there was theirs.
            former = {"inputs"} if self.rewriting.inputs == "kept" else None
            decided.append(
                _REWRITING.dump_python(
                    self.rewriting, mode="json", exclude_none=True, exclude=former
                )
            )
        text = f"[{_sorted_json(self.schemes)}, {json.dumps(decided, sort_keys=True)[1:]}"
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def is_edited(self) -> bool:
        """Whether decisions were changed after they were found."""
        return self.made_by.get("solver") == EDITED

    @property
    def title(self) -> str:
        """What messages call it: its file, or of which model it is."""
        return self.file or f"recipe of {self.model_name}"

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

    def use_of(self, text_sha256: str) -> str | None:
        """What a text was used for on the way to the recipe, as far as it says; None: nothing."""
        searched, corpora = (str(self.made_by.get(key) or "") for key in _TEXTS)
        tuned = "" if self.tuning is None else self.tuning.corpora_sha256
        uses = {"searched": searched, "tuned": tuned, "calibrated": corpora}
        for use, hashes in uses.items():
            if any(text_sha256.startswith(one) for one in hashes.split(", ") if one):
                return use
        return None

    @property
    def bits_per_weight(self) -> float | None:
        """As ``result`` says; None where it does not."""
        return self.result.bits_per_weight

    @property
    def kl_nats_per_token(self) -> float | None:
        """Predicted; None where the recipe does not rest on a table in nats."""
        return self.result.kl_nats_per_token


def _sorted_json(schemes: Mapping[str, str]) -> str:
    """``json.dumps(schemes, sort_keys=True)``, with the names of the last few models kept.

    Of tens of thousands of experts that is most of what a frontier's recipes take.
    """
    value = {one: json.dumps(one) for one in set(schemes.values())}
    keys = _sorted_keys(tuple(schemes))
    return "{" + ", ".join([key + value[schemes[name]] for name, key in keys]) + "}"


@lru_cache(maxsize=4)
def _sorted_keys(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Names in order, each with how JSON begins what it has."""
    return tuple((name, f"{json.dumps(name)}: ") for name in sorted(names))


def join_hashes(hashes: Iterable[str]) -> str:
    """Of texts, as a recipe notes them."""
    return ", ".join(sorted(one[:_HASH_DIGITS] for one in hashes))


def holds_recipe(path: Path) -> bool:
    """Whether a file is a recipe of mofq; llm-compressor gives its own the same name."""
    if not path.is_file():
        return False
    text = path.read_text("utf-8", errors="replace")
    return any(line.startswith("version:") for line in text.splitlines())


def find_recipe(source: Recipe | str | Path) -> Recipe | None:
    """The recipe of a file, or in a folder that `mofq export` wrote; None where there is none.

    Raises:
        RecipeError: As `load_recipe`.
    """
    if isinstance(source, Recipe):
        return source
    path = Path(source)
    if path.is_dir():
        path = path / RECIPE_FILE
        return load_recipe(path) if holds_recipe(path) else None
    return load_recipe(path)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe and check all that can be checked without the model.

    Args:
        path: A ``recipe.yaml``.

    Returns:
        The recipe, scheme names canonical.

    Raises:
        RecipeError: The file is missing or not valid, of another version, has an
            unknown key or scheme, or names a layer twice; what it was tuned to is not beside it, or
            were tuned for other decisions.
    """
    path = Path(path)
    recipe = parse_recipe(read_text(path, RecipeError, kind="recipe"), where=str(path))
    return replace(recipe, file=str(path), tuned=_read_tuned(recipe, path))


def parse_recipe(text: str, *, where: str = "recipe") -> Recipe:
    """A recipe from the text of its file; see `load_recipe`."""
    value = parse_yaml(text, where, RecipeError)
    check_version(value, RECIPE_VERSION, where, RecipeError)
    file = validate(_RECIPE_FILE, value, where, RecipeError)
    recipe = Recipe(
        file.model.name,
        file.model.index_sha256,
        groups=tuple(_group(name, group, where) for name, group in file.groups.items()),
        unquantized=file.unquantized,
        # As they stand in the file: what it leaves out, a written recipe leaves out too.
        made_by=value.get("made_by", {}),
        budget=value.get("budget", {}),
        result=file.result,
        weights_sha256=file.model.weights_sha256,
        kv_cache=tuple(_cache(name, cache, where) for name, cache in file.kv_cache.items()),
        layers=file.layers,
        rewriting=file.rewriting,
        tuning=file.tuning,
    )
    _check_layers_once(recipe, where)
    _check_tuned_for(recipe, where)
    return recipe


def _group(name: str, entry: GroupEntry, where: str) -> RecipeGroup:
    try:
        scheme = parse_scheme(entry.scheme)
    except SchemeError as problem:
        raise RecipeError(f"{where}: groups: {name}: {problem}") from problem
    static_amax, layers = entry.static_amax, entry.layers
    needs_amax = scheme.has_static_inputs
    if (static_amax is not None) != needs_amax or set(static_amax or layers) != set(layers):
        raise RecipeError(
            f"{where}: groups: {name}: static_amax must name exactly the layers of the group "
            f"where the activations have a static scale, and be absent elsewhere; "
            f"the scheme is {scheme.name}."
        )
    amax = {layer: static_amax[layer] for layer in layers} if static_amax else None
    return RecipeGroup(name, scheme.name, layers=layers, static_amax=amax)


def _cache(name: str, entry: CacheEntry, where: str) -> RecipeCache:
    try:
        scheme = parse_cache_scheme(entry.scheme)
    except SchemeError as problem:
        raise RecipeError(f"{where}: kv_cache: {name}: {problem}") from problem
    return RecipeCache(name, scheme.name, entry.static_amax)


def _check_layers_once(recipe: Recipe, where: str) -> None:
    place: dict[str, str] = {}
    listed = [(f"groups: {group.name}", group.layers) for group in recipe.groups]
    for here, layers in [*listed, ("unquantized", recipe.unquantized)]:
        for layer in layers:
            if layer in place:
                raise RecipeError(
                    f"{where}: the layer {layer!r} stands in {place[layer]} and in {here}; "
                    f"keep one."
                )
            place[layer] = here


def _check_tuned_for(recipe: Recipe, where: str) -> None:
    """Refuse what was tuned for other schemes, or for any weights."""
    tuning = recipe.tuning
    if tuning is not None and recipe.weights_sha256 is None:
        raise RecipeError(
            f"{where}: tuning: {tuning.file} was tuned for the weights of one model, which the "
            f"recipe must name (weights_sha256). Name them, or remove `tuning` from the recipe too."
        )
    if tuning is not None and tuning.decisions_sha256 != recipe.decisions_sha256:
        raise RecipeError(
            f"{where}: tuning: {tuning.file} was tuned for other schemes than the recipe has now, "
            f"so that what it gains is not known. Remove `tuning` from the recipe; then run `mofq "
            f"tune` to tune for these."
        )


def _read_tuned(recipe: Recipe, path: Path) -> bytes:
    """What a recipe was tuned to, from beside it; nothing where it was not."""
    if recipe.tuning is None:
        return b""
    file = beside(path, recipe.tuning)
    remedy = "or remove `tuning` from the recipe: it is then as before it was tuned"
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"{file}: cannot be read ({error.strerror or error}), and {path} was tuned to what is "
            f"in it. Copy it from where the recipe was, {remedy}."
        ) from error
    if hashlib.sha256(content).hexdigest() != recipe.tuning.sha256:
        raise RecipeError(
            f"{file}: was changed since {path} was written, which names another hash of it. Take "
            f"the file as it was, {remedy}."
        )
    return content


def write_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe: beside its final name, then renamed. Equal recipes give equal bytes.

    What it was tuned to is written beside it, and is there before it is.

    Raises:
        RecipeError: The recipe would not be read back as it is.
        MofqError: The file cannot be written.
    """
    text = recipe_text(recipe)
    if parse_recipe(text, where=str(path)) != recipe:
        raise RecipeError(f"{path}: the recipe holds values that its file format cannot keep.")
    if recipe.tuning is not None:
        if hashlib.sha256(recipe.tuned).hexdigest() != recipe.tuning.sha256:
            raise RecipeError(f"{path}: what the recipe was tuned to is not what it names.")
        write_beside_and_rename(beside(path, recipe.tuning), recipe.tuned)
    write_beside_and_rename(Path(path), text)


def recipe_header(recipe: Recipe) -> str:
    """What stands before the entries of a recipe's groups."""
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
    result: Mapping[str, Scalar] = recipe.result.known()
    if result:
        result = {**result, "decisions_sha256": recipe.result.decisions_sha256}
    for name, values in (
        ("made_by", recipe.made_by),
        ("budget", recipe.budget),
        ("result", result),
    ):
        if values:
            lines.append(f"{name}: {_flow(values)}")
    if recipe.layers is not None:
        lines.append(f"layers: {json.dumps(recipe.layers.to_json())}  # what names do not say")
    lines += _rewriting_lines(recipe.rewriting)
    if recipe.tuning is not None:
        lines.append("tuning:  # after quantizing; what is predicted is of before it")
        content = _TUNING.dump_python(recipe.tuning, mode="json")
        lines += [f"  {yaml_scalar(key)}: {yaml_scalar(value)}" for key, value in content.items()]
    lines.append("groups:  # one scheme per fusion group" if recipe.groups else "groups: {}")
    return "\n".join(lines) + "\n"


def recipe_text(recipe: Recipe) -> str:
    """The YAML of a recipe."""
    entries = [_entry(group, layers_line(group.layers)) for group in recipe.groups]
    caches = [CACHES_LINE, *map(_entry, recipe.kv_cache)] if recipe.kv_cache else []
    return "".join([recipe_header(recipe), *entries, unquantized_line(recipe), *caches])


def _entry(one: RecipeGroup | RecipeCache, layers: str = "") -> str:
    amax = "" if one.static_amax is None else static_amax_line(one.static_amax)
    return name_line(one.name) + scheme_line(one.scheme) + layers + amax


def name_line(name: str) -> str:
    """The first line of the entry of a fusion group, or of a cache."""
    return f"  {yaml_scalar(name)}:\n"


def scheme_line(scheme: str) -> str:
    """Its second line."""
    return f"    scheme: {yaml_scalar(scheme)}\n"


def layers_line(layers: Sequence[str]) -> str:
    """The third of a fusion group."""
    return f"    layers: {_names(layers)}\n"


def static_amax_line(static_amax: Mapping[str, float]) -> str:
    """The last, where a scheme has static ranges."""
    return f"    static_amax: {_flow(static_amax)}\n"


def unquantized_line(recipe: Recipe) -> str:
    """What stands behind the entries of the groups."""
    return f"unquantized: {_names(recipe.unquantized)}  # nothing else is left out\n"


def _rewriting_lines(rewriting: Rewriting | None) -> list[str]:
    """The YAML of the section; nothing where the model is as it was."""
    if rewriting is None:
        return []
    content = _REWRITING.dump_python(rewriting, mode="json", exclude_defaults=True)
    sites = content.pop("sites", {})
    rotation = content.pop("rotation", None)
    lines = ["rewriting:  # of the model, before anything was quantized"]
    lines += [f"  {yaml_scalar(key)}: {yaml_scalar(value)}" for key, value in content.items()]
    lines += [f"  rotation: {_flow(rotation)}"] if rotation else []
    lines.append("  sites:" if sites else "  sites: {}")
    lines += [f"    {yaml_scalar(name)}: {_flow(one)}" for name, one in sites.items()]
    return lines


def _flow(values: Mapping[str, Scalar]) -> str:
    pairs = (f"{yaml_scalar(key)}: {yaml_scalar(value)}" for key, value in values.items())
    return "{" + ", ".join(pairs) + "}"


def _names(names: Sequence[str]) -> str:
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
    known = [layer.name for layer in model_layers.linear_layers]
    unknown = sorted(schemes.keys() - set(known))
    if unknown:
        raise RecipeError(
            f"{recipe.title}: the model has no linear layer {unknown[0]!r} "
            f"({len(unknown)} unknown in all)." + nearest_name(unknown[0], known)
        )
    missing = [name for name in known if name not in schemes]
    if missing:
        raise RecipeError(
            f"{recipe.title}: the linear layer {missing[0]!r} is missing "
            f"({len(missing)} in all). Give it a scheme, or list it under `unquantized`."
        )
    _check_caches(recipe.kv_cache, model_layers.caches, where=f"{recipe.title}: kv_cache")
    for group in model_layers.groups:
        _check_group(recipe, group, schemes)
    for layer in model_layers.grouped_layers:
        scheme = parse_scheme(schemes[layer.name])
        reason = shape_rejection(scheme, layer)
        if reason is None and layer.role != "linear":
            reason = vocabulary_rejection(scheme, layer)
        if reason is not None:
            raise RecipeError(f"{recipe.title}: {reason}. Give its fusion group another scheme.")


def _check_caches(
    recipe_caches: Sequence[RecipeCache], caches: Sequence[CacheLayer], *, where: str
) -> None:
    """Every attention layer once with a scheme that fits it, or none."""
    if not recipe_caches:
        return
    known = {cache.name: cache for cache in caches}
    chosen = {cache.name: cache for cache in recipe_caches}
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
            f"{recipe.title}: was made for {recipe.model_name} with weights_sha256 {ours}, and "
            f"{checkpoint.folder} of the same shapes has weights_sha256 {theirs}: a fine-tune or "
            f"another revision. Measure this model; or, to apply the recipe all the same, remove "
            f"weights_sha256 from it."
        )


def _check_hash(recipe: Recipe, index_sha256: str | None) -> None:
    ours = recipe.index_sha256
    if ours is not None and index_sha256 is not None and not index_sha256.startswith(ours):
        raise RecipeError(
            f"{recipe.title}: was made for {recipe.model_name} with index_sha256 {ours}, and the "
            f"model has {index_sha256}: other names, shapes or dtypes of tensors, or another "
            f"config.json. Take the recipe of this model, or search again; or, to apply this one "
            f"all the same, remove index_sha256 from it."
        )


def _check_group(recipe: Recipe, group: FusionGroup, schemes: Mapping[str, str]) -> None:
    chosen = {layer.name: schemes[layer.name] for layer in group.layers}
    first = group.layers[0].name
    for name, scheme in chosen.items():
        if scheme != chosen[first]:
            raise RecipeError(
                f"{recipe.title}: {group.name} is served as one matrix "
                f"and needs one scheme, but {first} has {chosen[first]} and {name} has {scheme}. "
                f"Give both the same; or, where an earlier mofq had them in groups of their own, "
                f"measure into a new table and search again."
            )
