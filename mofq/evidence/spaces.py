"""Search spaces: which schemes may be chosen, and which of them fit a fusion group.

A search space is a YAML file. ``schemes`` lists scheme names in order; a
bracket such as ``int4.g[128,64,32]`` is one candidate whose group size is the
first listed that fits every layer of the fusion group. ``SearchSpaceFile``
specifies the keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Strict, TypeAdapter, WithJsonSchema

from mofq.evidence.constraints import (
    STORED,
    ConstraintKind,
    LayerConstraint,
    Selection,
    barred_schemes,
    check_selector,
    constraints_by_group,
    excluded_groups,
    is_quantized,
    kept_schemes,
    parse_constraint,
    select,
)
from mofq.evidence.stored_schemes import stored_schemes
from mofq.exceptions import Remark, SchemeError, SearchSpaceError, nearest_name
from mofq.files.documents import parse_yaml, read_text
from mofq.files.validated import (
    Name,
    NotNegative,
    SomeNames,
    Text,
    check_version,
    only_these_keys,
    published_schema,
    validate,
)
from mofq.model.checkpoint.headers import Checkpoint
from mofq.model.kv_schemes import CacheScheme, cache_rejection, parse_cache_scheme
from mofq.model.layers import (
    CacheLayer,
    FusionGroup,
    LinearLayer,
    ModelLayers,
    lm_heads_of,
    vocabulary_rejection,
)
from mofq.model.sizes import counted_bytes, source_bytes
from mofq.numbers.schemes import Scheme, parse_scheme

SEARCH_SPACE_VERSION: Literal[1] = 1
MAX_FILE_BYTES = 100_000

#: Why a group cannot have a scheme, or None: what an engine adds to the rules of shapes.
Legality = Callable[[Scheme, FusionGroup], str | None]

#: The same of the name of a cache's scheme.
CacheLegality = Callable[[str, CacheLayer], str | None]

_BRACKET = re.compile(r"\[([^\[\]]*)\]")


def _as_list(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _as_text(value: object) -> object:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


#: Of a constraint: one scheme, or several of which one is chosen.
_Schemes = Annotated[
    SomeNames,
    BeforeValidator(_as_list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
#: Of a constraint: bits per weight, or a granularity.
_Limit = Annotated[
    Name,
    BeforeValidator(_as_text),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}]}),
]


@only_these_keys
@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpaceFile:
    """What may be chosen for each layer."""

    version: Literal[1] = SEARCH_SPACE_VERSION
    description: Annotated[Text, Field(description="what the space is for, in a sentence")] = ""
    schemes: Annotated[
        SomeNames,
        Field(
            description="scheme names; g[128,64,32] stands for the first size that fits, stored "
            "for what a quantized source keeps each layer in"
        ),
    ]
    base: Annotated[
        SomeNames,
        Field(description="entries of schemes that count as plain; others are finer"),
    ] = ()
    min_gain: Annotated[
        NotNegative,
        Field(
            description="a finer scheme is offered where it removes this many times "
            "the error that it removes in the median layer"
        ),
    ] = 10.0
    exclude: Annotated[
        tuple[Name, ...], Field(description="selectors of layers that stay as they are")
    ] = ()
    fixed: Annotated[
        dict[Name, _Schemes],
        Field(
            description="selector of layers -> the scheme that they get, or several to choose of"
        ),
    ] = field(default_factory=dict)
    at_least: Annotated[
        dict[Name, _Limit],
        Field(description="selector of layers -> fewest bits per weight, or coarsest granularity"),
    ] = field(default_factory=dict)
    at_most: Annotated[
        dict[Name, _Limit],
        Field(description="selector of layers -> most bits per weight, or finest granularity"),
    ] = field(default_factory=dict)
    kv_cache: Annotated[
        SomeNames,
        Field(
            description="schemes of the KV cache, one for each attention layer, e.g. "
            "kv:fp8_e4m3.tensor; it may always stay as it is",
        ),
    ] = ()
    offer_unquantized: Annotated[
        bool, Strict(), Field(description="whether a layer may be left as it is")
    ] = True
    lm_head: Annotated[bool, Strict(), Field(description="whether the lm_head is decided too")] = (
        False
    )
    embeddings: Annotated[
        bool,
        Strict(),
        Field(description="whether the embedding is; tied to the lm_head, either key asks for it"),
    ] = False


_SPACE_FILE = TypeAdapter(SearchSpaceFile)
SEARCH_SPACE_SCHEMA = published_schema(_SPACE_FILE, "A mofq search space (search_spaces/*.yaml)")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One entry of ``schemes``: the first of its schemes that fits is offered."""

    text: str  #: as the file writes it
    schemes: tuple[Scheme, ...]  #: more than one where it has a bracket
    groups: frozenset[str] | None = None  #: that it is offered to; None: all


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """What may be chosen, before any layer is known."""

    name: str
    description: str
    candidates: tuple[Candidate, ...]
    base: tuple[str, ...]  #: canonical scheme names, in file order
    min_gain: float
    exclude: tuple[str, ...]  #: selectors of layers
    sha256: str  #: of all that changes a number (not of comments and description)
    kv_cache: tuple[CacheScheme, ...] = ()  #: of the KV cache; it may stay as it is too
    constraints: tuple[LayerConstraint, ...] = ()  #: on what is chosen; all is measured
    offers_stored: bool = False  #: what a source keeps layers in; `with_stored` says what that is
    #: Fusion group of a quantized source -> the schemes that it is kept in, from `with_stored`.
    kept: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lm_head: bool = False  #: whether the lm_head is decided too
    embeddings: bool = False  #: whether the embedding is

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme that some group may get, in file order."""
        return tuple(dict.fromkeys(scheme for one in self.candidates for scheme in one.schemes))


@dataclass(frozen=True, slots=True)
class CacheOffer:
    """What the cache of one attention layer may be kept in."""

    cache: CacheLayer
    schemes: tuple[CacheScheme, ...]
    rejected: dict[str, str]  #: scheme name -> why not


@dataclass(frozen=True, slots=True)
class Offer:
    """What one fusion group may get."""

    group: FusionGroup
    schemes: tuple[Scheme, ...]
    rejected: dict[str, str]  #: scheme name -> why not
    #: Of ``schemes``, which are measured, those that no recipe may have: name -> why not.
    barred: Mapping[str, Remark] = field(default_factory=dict)

    @property
    def choices(self) -> tuple[Scheme, ...]:
        """What a recipe may have."""
        return tuple(scheme for scheme in self.schemes if scheme.name not in self.barred)


def find_search_spaces() -> dict[str, Path]:
    """The search spaces that come with mofq: name -> file."""
    package = Path(__file__).resolve().parent.parent
    # In the wheel they lie inside the package, in a source tree beside it.
    for folder in (package / "search_spaces", package.parent / "search_spaces"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def load_search_space(name_or_path: str | Path) -> SearchSpace:
    """Read and check a search space.

    Args:
        name_or_path: A name that `find_search_spaces` lists, or the path of a YAML file.

    Returns:
        The search space.

    Raises:
        SearchSpaceError: There is no such space, or the file is not valid; the
            message names file and key and suggests the nearest known name.
    """
    shipped = find_search_spaces()
    path = shipped.get(str(name_or_path), Path(name_or_path))
    if not path.exists():
        raise SearchSpaceError(
            f"{name_or_path}: no such search space or file."
            + nearest_name(str(name_or_path), shipped)
        )
    text = read_text(path, SearchSpaceError, MAX_FILE_BYTES, kind="search space")
    return parse_search_space(text, name=path.stem, where=str(path))


def parse_search_space(text: str, *, name: str, where: str) -> SearchSpace:
    """A search space from the text of its file; see `load_search_space`."""
    value = parse_yaml(text, where, SearchSpaceError)
    check_version(value, SEARCH_SPACE_VERSION, where, SearchSpaceError)
    file = validate(_SPACE_FILE, value, where, SearchSpaceError)
    written = [entry for entry in file.schemes if entry != STORED]
    candidates = [_candidate(entry, f"{where}: schemes") for entry in written]
    if file.offer_unquantized:
        candidates.append(_candidate("bf16", where))
    elif any(scheme.is_unquantized for one in candidates for scheme in one.schemes):
        raise SearchSpaceError(
            f"{where}: offer_unquantized is false, and yet schemes lists bf16. Drop one."
        )
    candidates = _without_repeats(candidates)
    base = _base(file.base, candidates, f"{where}: base")
    kv_cache = _cache_schemes(file.kv_cache, f"{where}: kv_cache")
    space = SearchSpace(
        name,
        file.description,
        candidates=tuple(candidates),
        base=base,
        min_gain=file.min_gain,
        exclude=file.exclude,
        sha256="",
        kv_cache=kv_cache,
        constraints=_constraints(file, candidates, where),
        offers_stored=STORED in file.schemes,
        lm_head=file.lm_head,
        embeddings=file.embeddings,
    )
    return replace(space, sha256=space_digest(space))


def with_stored(
    space: SearchSpace, checkpoint: Checkpoint, groups: Sequence[FusionGroup]
) -> SearchSpace:
    """A space whose entry ``stored`` is what the source of a model keeps each layer in.

    Args:
        space: The search space; it is returned as it is where it has no such entry, or where the
            source is not quantized.
        checkpoint: The source.
        groups: Of the model.
    """
    if not space.offers_stored:
        return space
    kept: dict[Scheme, set[str]] = {}
    names_of: dict[str, tuple[str, ...]] = {}
    for group in groups:
        schemes = stored_schemes(checkpoint, group)
        names_of[group.name] = tuple(scheme.name for scheme in schemes)
        for scheme in schemes:
            kept.setdefault(scheme, set()).add(group.name)
    found = [Candidate(STORED, (scheme,), frozenset(names)) for scheme, names in kept.items()]
    quantized = [group for group in groups if is_quantized(group, source_bytes(group))]
    if quantized:
        space = replace(space, kept={group.name: names_of[group.name] for group in quantized})
    if not found:
        return space
    base = (*(one.schemes[0].name for one in found), *space.base) if space.base else ()
    space = replace(
        space,
        candidates=(*found, *space.candidates),
        base=tuple(dict.fromkeys(base)),
        constraints=tuple(
            found for one in space.constraints for found in _of_stored(one, groups, names_of)
        ),
        offers_stored=False,  # it says now what that is
    )
    return replace(space, sha256=space_digest(space))


def _of_stored(
    constraint: LayerConstraint,
    groups: Sequence[FusionGroup],
    names_of: Mapping[str, tuple[str, ...]],
) -> Iterator[LayerConstraint]:
    """A constraint, or what it says of each fusion group that it fixes to what is stored."""
    values = constraint.value.split(",")
    named = select(constraint.layers, groups)
    kept = {names_of[name] for name in named}
    if constraint.kind != "fixed" or STORED not in values or () in kept:
        yield constraint
        return
    one_of = (
        [(constraint.layers, kept.pop())] if len(kept) == 1 else [(n, names_of[n]) for n in named]
    )
    for selector, names in one_of:
        every = [name for value in values for name in (names if value == STORED else [value])]
        yield LayerConstraint("fixed", selector, ",".join(dict.fromkeys(every)))


def _constraints(
    file: SearchSpaceFile, candidates: Sequence[Candidate], where: str
) -> tuple[LayerConstraint, ...]:
    written: dict[ConstraintKind, Mapping[str, str]] = {
        "fixed": {selector: ",".join(names) for selector, names in file.fixed.items()},
        "at_least": file.at_least,
        "at_most": file.at_most,
    }
    found = [
        parse_constraint(kind, selector, value, where=f"{where}: {kind}: {selector}")
        for kind, values in written.items()
        for selector, value in values.items()
    ]
    offered = {scheme.name for one in candidates for scheme in one.schemes}
    offered |= {STORED} & set(file.schemes)
    for one in found:
        names = one.value.split(",") if one.kind == "fixed" else []
        missing = next((name for name in names if name not in offered), None)
        if missing is not None:
            raise SearchSpaceError(
                f"{where}: fixed: {one.layers}: {missing!r} is not among the schemes."
                + nearest_name(missing, offered)
            )
    return tuple(found)


def _cache_schemes(entries: Sequence[str], where: str) -> tuple[CacheScheme, ...]:
    try:
        schemes = {parse_cache_scheme(entry).name: None for entry in entries}
    except SchemeError as problem:
        raise SearchSpaceError(f"{where}: {problem}") from problem
    if not schemes:
        return ()
    return tuple(parse_cache_scheme(name) for name in dict.fromkeys([*schemes, "bf16"]))


def _without_repeats(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Drop candidates that add no scheme (two spellings of one name)."""
    first: dict[tuple[Scheme, ...], Candidate] = {}
    for one in candidates:
        first.setdefault(one.schemes, one)
    return list(first.values())


def _candidate(entry: str, where: str) -> Candidate:
    brackets = _BRACKET.findall(entry)
    if len(brackets) > 1 or ("[" in _BRACKET.sub("", entry)):
        raise SearchSpaceError(
            f"{where}: {entry!r} has more than one bracket; list the combinations one by one."
        )
    sizes = [size.strip() for size in brackets[0].split(",")] if brackets else [""]
    if brackets and not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise SearchSpaceError(
            f"{where}: {entry!r}: a bracket holds group sizes. Write e.g. g[128,64,32]."
        )
    try:
        schemes = tuple(parse_scheme(_BRACKET.sub(size, entry)) for size in sizes)
    except SchemeError as problem:
        raise SearchSpaceError(f"{where}: {problem}") from problem
    if len(set(schemes)) < len(schemes):
        raise SearchSpaceError(f"{where}: {entry!r} lists a group size twice.")
    return Candidate(entry, schemes)


def _base(entries: Sequence[str], candidates: Sequence[Candidate], where: str) -> tuple[str, ...]:
    offered = {scheme for one in candidates for scheme in one.schemes}
    base = [scheme for entry in entries for scheme in _candidate(entry, where).schemes]
    for scheme in base:
        if scheme not in offered:
            names = [one.name for one in offered]
            raise SearchSpaceError(
                f"{where}: {scheme.name!r} is not among the schemes."
                + nearest_name(scheme.name, names)
            )
    return tuple(dict.fromkeys(scheme.name for scheme in base))


def space_digest(space: SearchSpace) -> str:
    """Hash of all of a search space that changes a number."""
    content: dict[str, Any] = {
        "candidates": [[scheme.name for scheme in one.schemes] for one in space.candidates],
        "base": space.base,
        "min_gain": space.min_gain,
        "exclude": space.exclude,
    }
    if space.kv_cache:  # spaces of before there was such a key keep their hash
        content["kv_cache"] = [scheme.name for scheme in space.kv_cache]
    if space.constraints:
        content["constraints"] = list(map(str, space.constraints))
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def shape_rejection(scheme: Scheme, layer: LinearLayer) -> str | None:
    """Why the shape of a layer does not take a scheme; None where it does."""
    for what, operand in (("weights", scheme.weight), ("activations", scheme.activation)):
        if operand is None or operand.granularity.kind not in ("group", "peg", "block"):
            continue
        rows, columns = operand.granularity.rows, operand.columns_multiple
        if layer.in_features % columns:
            return (
                f"{layer.name}: {operand.granularity.name} of the {what} needs in_features "
                f"divisible by {columns}, got {layer.in_features}"
            )
        if layer.out_features % rows:
            return (
                f"{layer.name}: {operand.granularity.name} of the {what} needs out_features "
                f"divisible by {rows}, got {layer.out_features}"
            )
    return None


def statistics_rejection(scheme: Scheme) -> str | None:
    """Why a scheme cannot be had without calibration statistics; None where it can."""
    weight = scheme.weight
    remedy = "needs calibration statistics: run `mofq calibrate`, then `mofq measure --stats`"
    if scheme.has_static_inputs:
        return f"a static scale of the activations {remedy}"
    if weight is not None and weight.scale_rule == "nats":
        return f"the scale rule nats {remedy}"
    if weight is not None and weight.rounds_by_hessian:
        return f"{weight.rounding} {remedy}"
    return None


def selected_layers(space: SearchSpace, layers: ModelLayers) -> tuple[Selection, ...]:
    """How many layers each selector of a search space names: of ``exclude``, then constraints.

    An lm_head may be excluded although no recipe quantizes it, also where it is tied.

    Args:
        space: The search space.
        layers: Of the model.

    Raises:
        SearchSpaceError: A selector names no layer; the message suggests the nearest names.
    """
    heads = lm_heads_of(layers.architecture)
    alone = dict.fromkeys([*(one.name for one in layers.unquantized), *heads])
    where = f"search space {space.name}"
    excluded = [
        check_selector(one, layers.groups, what=f"{where}: exclude {one}", unquantized=alone)
        for one in space.exclude
    ]
    constrained = [
        check_selector(one.layers, layers.groups, what=f"{where}: {one}")
        for one in space.constraints
    ]
    return (*excluded, *constrained)


def offer_schemes(
    space: SearchSpace,
    groups: Sequence[FusionGroup],
    *,
    legality: Legality | None = None,
    has_stats: bool = False,
    constraints: Sequence[LayerConstraint] = (),
) -> tuple[Offer, ...]:
    """What each fusion group may get, and why it may not get the rest.

    Args:
        space: The search space.
        groups: Of the model.
        legality: What a serving engine refuses, if one was named.
        has_stats: Whether calibration statistics are at hand.
        constraints: Beside those of the space.

    Returns:
        One offer for each group, in their order; schemes in the order of the file.

    Raises:
        SearchSpaceError: Nothing fits some group, or constraints leave it nothing; the message
            names it and the reasons.
    """
    excluded = excluded_groups(space.exclude, groups)
    constrained = constraints_by_group(
        (*space.constraints, *constraints), groups, asked=constraints
    )
    offers = []
    for group in groups:
        why = excluded.get(group.name)
        offer = _offer(space, group, legality, has_stats, why)
        some = constrained.get(group.name, ())
        sizes = {scheme.name: counted_bytes(group, scheme) for scheme in offer.schemes}
        kept = kept_schemes(group, space.kept, source_bytes(group))
        barred = barred_schemes(some, group, sizes, asked=constraints, because=why, kept=kept)
        offers.append(replace(offer, barred=barred))
    return tuple(offers)


def offer_caches(
    space: SearchSpace,
    caches: Sequence[CacheLayer],
    *,
    legality: CacheLegality | None = None,
) -> tuple[CacheOffer, ...]:
    """What the cache of each attention layer may be kept in; nothing where the space has none.

    Args:
        space: The search space.
        caches: Of the model.
        legality: What a serving engine refuses, if one was named.
    """
    if not space.kv_cache:
        return ()
    offers = []
    for cache in caches:
        reasons = {
            scheme.name: cache_rejection(scheme, cache)
            or (legality(scheme.name, cache) if legality is not None else None)
            for scheme in space.kv_cache
        }
        rejected = {name: why for name, why in reasons.items() if why is not None}
        offered = tuple(one for one in space.kv_cache if one.name not in rejected)
        offers.append(CacheOffer(cache, offered, rejected))
    return tuple(offers)


def _offer(
    space: SearchSpace,
    group: FusionGroup,
    legality: Legality | None,
    has_stats: bool,
    excluded: str | None,
) -> Offer:
    unquantized = parse_scheme("bf16")
    if excluded is not None:
        rejected = {scheme.name: excluded for scheme in space.schemes if scheme != unquantized}
        return Offer(group, (unquantized,), rejected)
    offered: dict[Scheme, None] = {}
    rejected = {}
    # Experts are hundreds, of two shapes; the first of each is named.
    shapes: dict[object, LinearLayer] = {}
    for layer in group.layers:
        shapes.setdefault((layer.out_features, layer.in_features, layer.role), layer)
    for candidate in space.candidates:
        if candidate.groups is not None and group.name not in candidate.groups:
            continue
        for scheme in candidate.schemes:
            reason = _shapes_rejection(scheme, shapes.values())
            if reason is None:
                reason = _rejection(scheme, group, legality, has_stats)
            if reason is None:
                offered[scheme] = None
                break
            rejected[scheme.name] = reason
    if not offered:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
        raise SearchSpaceError(
            f"search space {space.name}: no scheme fits {group.name} ({reasons}). "
            f"Add one that does, list its layers under `exclude`, or offer bf16."
        )
    return Offer(group, tuple(offered), rejected)


def _shapes_rejection(scheme: Scheme, layers: Iterable[LinearLayer]) -> str | None:
    reasons = (
        vocabulary_rejection(scheme, layer) or shape_rejection(scheme, layer) for layer in layers
    )
    return next((reason for reason in reasons if reason is not None), None)


def _rejection(
    scheme: Scheme, group: FusionGroup, legality: Legality | None, has_stats: bool
) -> str | None:
    reason = None if has_stats else statistics_rejection(scheme)
    if reason is None and legality is not None:
        reason = legality(scheme, group)
    return reason
