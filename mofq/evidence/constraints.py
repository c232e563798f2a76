"""Constraints: what some layers must have, whatever the errors say; and which layers are meant.

A selector names layers: a shell pattern of their names (``*.down_proj``), of the names of their
fusion groups with or without the decoder layer (``layers.0.attn.qkv``, ``attn.*``), or the decoder
layers at one end (``first:2``, ``last:1``). A fusion group gets one scheme, so that it is meant as
a whole where one of its layers is named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import combinations
from typing import Literal, TypeVar

from mofq.exceptions import Remark, SchemeError, SearchSpaceError, option
from mofq.files.validated import Name, only_these_keys
from mofq.model.layers import AnyGroup, AnyLayer, layers_of
from mofq.numbers.schemes import Scheme, parse_granularity, parse_scheme

ConstraintKind = Literal["fixed", "at_least", "at_most"]

#: In place of a scheme: what the source keeps a fusion group in.
STORED = "stored"
UNQUANTIZED = "bf16"
_UNQUANTIZED_BITS = 16
#: How the reason goes on that an exclusion is.
EXCLUDED = ": excluded by "

_POSITION = re.compile(r"(first|last):(\d+)")
#: Names that a message suggests for a selector that matches nothing.
_SUGGESTED = 3


_Group = TypeVar("_Group", bound=AnyGroup)


@only_these_keys
@dataclass(frozen=True, slots=True)
class LayerConstraint:
    """What the layers that a selector names must have; from `parse_constraint`."""

    kind: ConstraintKind
    layers: Name  #: a selector
    #: Of ``fixed`` scheme names (or ``stored``) joined by commas; of the others true bits per
    #: weight, or a granularity.
    value: Name

    def __str__(self) -> str:
        return f"{self.kind} {self.layers}={self.value}"

    @property
    def as_option(self) -> str:
        """As messages name it where an option asked for it, and no search space."""
        return f"{option(self.kind)} {self.layers}={self.value}"


@dataclass(frozen=True, slots=True)
class Selection:
    """How much of a model a selector names."""

    what: Remark  #: the selector, and what it is for
    layers: int
    groups: int  #: fusion groups that these layers are of

    @property
    def remark(self) -> Remark:
        """It in a sentence."""
        layers, groups = _counted(self.layers, "layer"), _counted(self.groups, "fusion group")
        return Remark(f"{self.what.template}: {layers} in {groups}.")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def parse_constraint(
    kind: ConstraintKind, selector: str, value: str, *, where: str
) -> LayerConstraint:
    """A constraint in its canonical form.

    Args:
        kind: What is asked of the layers.
        selector: Which layers; whether it matches any is for `constraints_by_group` to say.
        value: As `LayerConstraint` has it.
        where: For messages.

    Raises:
        SearchSpaceError: The value is neither a scheme, nor a number of bits or a granularity.
    """
    if not selector or not value.strip():
        raise SearchSpaceError(
            f"{where}: write LAYERS=VALUE, e.g. '*.down_proj={'bf16' if kind == 'fixed' else '8'}'."
        )
    try:
        if kind == "fixed":
            written = (name.strip() for name in value.split(","))
            names = (name if name == STORED else parse_scheme(name).name for name in written)
            return LayerConstraint(kind, selector, ",".join(dict.fromkeys(names)))
        return LayerConstraint(kind, selector, _parse_limit(value.strip()))
    except SchemeError as problem:
        raise SearchSpaceError(f"{where}: {problem}") from problem


def _parse_limit(value: str) -> str:
    bits = _bits(value)
    if bits is None:
        granularity = parse_granularity(value, where="bits per weight, or a granularity")
        if granularity.kind not in ("tensor", "channel", "group", "block"):
            raise SchemeError(f"no weights have the granularity {value!r}. Write e.g. g64.")
        return granularity.name
    if not (math.isfinite(bits) and bits >= 0):
        raise SchemeError(f"must be a number of bits per weight, found {value}.")
    return repr(bits).removesuffix(".0")


def _bits(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def kind_of_group(group: AnyGroup) -> str:
    """The name of a fusion group without its decoder layer: ``"attn.qkv"``."""
    return group.name.partition(f".{group.layers[0].decoder_layer}.")[2] or group.name


def select(selector: str, groups: Iterable[_Group]) -> dict[str, tuple[str, ...]]:
    """Fusion group -> those of its layers that a selector names; only groups that have any."""
    groups = tuple(groups)
    position = _POSITION.fullmatch(selector)
    wanted = None if position is None else _at_the_end(position[1], int(position[2]), groups)
    found = {}
    for group in groups:
        if wanted is not None:
            names = [one.name for one in group.layers if one.decoder_layer in wanted]
        elif any(fnmatchcase(name, selector) for name in (group.name, kind_of_group(group))):
            names = [one.name for one in group.layers]
        else:
            names = [one.name for one in group.layers if fnmatchcase(one.name, selector)]
        if names:
            found[group.name] = tuple(names)
    return found


def excluded_groups(selectors: Iterable[str], groups: Sequence[AnyGroup]) -> dict[str, str]:
    """Fusion group that selectors exclude -> why, as a table notes it, with `EXCLUDED` in it."""
    found: dict[str, str] = {}
    for selector in selectors:
        for name, layers in select(selector, groups).items():
            found.setdefault(name, f"{layers[0]}{EXCLUDED}{selector!r}")
    return found


def _at_the_end(end: str, count: int, groups: Sequence[AnyGroup]) -> set[int]:
    """The first or last so many decoder layers; none where there are fewer."""
    numbers = _decoder_layers(groups)
    if not 0 < count <= len(numbers):
        return set()
    return set(numbers[:count] if end == "first" else numbers[-count:])


def _decoder_layers(groups: Iterable[AnyGroup]) -> list[int]:
    numbers = {layer.decoder_layer for layer in layers_of(groups)}
    return sorted(number for number in numbers if number is not None)


def check_selector(
    selector: str,
    groups: Sequence[AnyGroup],
    *,
    what: str,
    unquantized: Iterable[str] = (),
) -> Selection:
    """How much of a model a selector names.

    Args:
        selector: See the top of this module.
        groups: Of the model.
        what: The selector, and what it is for, in messages, with options by `option`.
        unquantized: Names of layers that no recipe quantizes, where these may be named too.

    Raises:
        SearchSpaceError: It names nothing; the message suggests the nearest names.
    """
    found = select(selector, groups)
    alone = sum(fnmatchcase(name, selector) for name in unquantized)
    if not found and not alone:
        raise SearchSpaceError(f"{what} matches no layer.{_nearest_selector(selector, groups)}")
    return Selection(Remark(what), sum(map(len, found.values())) + alone, len(found))


def selections_of(
    constraints: Iterable[LayerConstraint], groups: Sequence[AnyGroup]
) -> tuple[Selection, ...]:
    """How many layers each constraint names that options give.

    Raises:
        SearchSpaceError: One names no layer.
    """
    return tuple(check_selector(one.layers, groups, what=one.as_option) for one in constraints)


def _nearest_selector(selector: str, groups: Sequence[AnyGroup]) -> str:
    if _POSITION.fullmatch(selector):
        return f" The model has {len(_decoder_layers(groups))} decoder layers."
    if selector in ("first", "last"):
        return f" Write {selector}:1 for the {selector} decoder layer, {selector}:2 for two."
    rule = (
        " A pattern has to match a whole name; * stands for any characters, and regular "
        "expressions are not known."
    )
    names = [layer.name for layer in layers_of(groups)]
    if any(name.startswith(f"{selector}.") for name in names):
        return f"{rule} Did you mean '{selector}.*'?"
    words = selector.removeprefix("re:").strip("*.^$")
    known = [*names, *dict.fromkeys(kind_of_group(group) for group in groups)]
    near = get_close_matches(words, known, n=_SUGGESTED, cutoff=0.0)
    return f"{rule} The nearest names are {', '.join(map(repr, near))}."


def constraints_by_group(
    constraints: Iterable[LayerConstraint],
    groups: Sequence[AnyGroup],
    *,
    asked: Collection[LayerConstraint] = (),
) -> dict[str, tuple[LayerConstraint, ...]]:
    """Fusion group -> the constraints on it; only groups that have any.

    Args:
        constraints: Of search spaces and options.
        groups: Of a model or a table.
        asked: Those that options give; messages name them so.

    Raises:
        SearchSpaceError: A constraint names no layer.
    """
    found: dict[str, list[LayerConstraint]] = {}
    for one in constraints:
        check_selector(one.layers, groups, what=named(one, asked))
        for name in select(one.layers, groups):
            found.setdefault(name, []).append(one)
    return {name: tuple(some) for name, some in found.items()}


def named(constraint: LayerConstraint, asked: Collection[LayerConstraint]) -> str:
    """A constraint as messages name it: as the option that gives it, where one does."""
    return constraint.as_option if constraint in asked else str(constraint)


def is_quantized(group: AnyGroup, source_bytes: int) -> bool:
    """Whether a source of so many bytes keeps a fusion group in fewer than 16 bits a weight."""
    return _bits_of(group, source_bytes) < _UNQUANTIZED_BITS


def kept_schemes(
    group: AnyGroup, kept: Mapping[str, Sequence[str]], source_bytes: int
) -> Sequence[str] | None:
    """The schemes that ``stored`` stands for in a fusion group; None where that is not known.

    Args:
        group: Of a model or a table.
        kept: Of fusion groups of a quantized source, by their names.
        source_bytes: What the source keeps the group in [bytes].
    """
    return kept.get(group.name) if is_quantized(group, source_bytes) else (UNQUANTIZED,)


def barred_schemes(
    constraints: Sequence[LayerConstraint],
    group: AnyGroup,
    sizes: Mapping[str, int],
    *,
    asked: Collection[LayerConstraint] = (),
    because: str | None = None,
    kept: Collection[str] | None = (UNQUANTIZED,),
) -> dict[str, Remark]:
    """The schemes that constraints take from a fusion group.

    Args:
        constraints: On the group.
        group: Of a model or a table.
        sizes: Scheme that it could have -> its bytes [bytes]; at least one.
        asked: The constraints that options give; messages name them so.
        because: Why it could have no other, where there is a reason to tell.
        kept: The schemes that ``stored`` stands for; None where that is not known.

    Returns:
        Scheme -> the constraint that it breaks; never all of them.

    Raises:
        SearchSpaceError: No scheme keeps all constraints; the message names the fewest that
            leave none, and what there is.
    """
    broken = {
        name: [one for one in constraints if not _keeps(one, group, name, size, kept or ())]
        for name, size in sizes.items()
    }
    if all(broken.values()):
        raise _contradiction(constraints, group, sizes, broken, asked, because, kept)
    return {name: Remark(named(some[0], asked)) for name, some in broken.items() if some}


def _contradiction(
    constraints: Sequence[LayerConstraint],
    group: AnyGroup,
    sizes: Mapping[str, int],
    broken: Mapping[str, Sequence[LayerConstraint]],
    asked: Collection[LayerConstraint],
    because: str | None,
    kept: Collection[str] | None,
) -> SearchSpaceError:
    fewest = next(
        some
        for count in range(1, len(constraints) + 1)
        for some in combinations(constraints, count)
        if all(set(some) & set(of_scheme) for of_scheme in broken.values())
    )
    names = " and ".join(f"`{named(one, asked)}`" for one in fewest)
    leave = "leaves" if len(fewest) == 1 else "contradict each other: together they leave"
    could = ", ".join(f"{name} ({_bits_of(group, size):.6g} bits)" for name, size in sizes.items())
    reason = f" ({because})" if because else ""
    change = "it" if len(fewest) == 1 else "one of them"
    remedy = f"Change {change}, or measure a scheme that fits."
    if any(STORED in one.value.split(",") for one in fewest):
        remedy = f"{_about_stored(kept)} Else change {change}."
    return SearchSpaceError(
        f"{names} {leave} no scheme to {group.name}, which could have {could}{reason}. {remedy}"
    )


def _about_stored(kept: Collection[str] | None) -> str:
    """What to do where a fusion group cannot stay as it is stored."""
    if kept is None:
        return (
            "What its quantized source keeps it in was not measured: `mofq measure` a search "
            f"space whose schemes list `{STORED}`."
        )
    if not kept:
        return "Its source keeps it in a way that no scheme has."
    return f"Its source keeps it in {' or '.join(kept)}: measure that, where the engine serves it."


def _keeps(
    constraint: LayerConstraint,
    group: AnyGroup,
    name: str,
    size: int,
    kept: Collection[str],
) -> bool:
    """Whether a scheme, under which a fusion group has so many bytes, keeps a constraint."""
    if constraint.kind == "fixed":
        values = constraint.value.split(",")
        return name in values or (STORED in values and name in kept)
    limit = _bits(constraint.value)
    if limit is not None:
        bits = _bits_of(group, size)
        return bits >= limit if constraint.kind == "at_least" else bits <= limit
    scheme = parse_scheme(name)
    named = parse_granularity(constraint.value, where=str(constraint))
    for layer in group.layers:
        shared = _weights_per_scale(scheme, layer)
        limit = (named.rows or layer.out_features) * (named.columns or layer.in_features)
        if shared > limit if constraint.kind == "at_least" else shared < limit:
            return False
    return True


def _bits_of(group: AnyGroup, size: int) -> float:
    """True bits per weight of a fusion group of so many bytes."""
    return 8 * size / sum(layer.out_features * layer.in_features for layer in group.layers)


def _weights_per_scale(scheme: Scheme, layer: AnyLayer) -> int:
    """How many weights share a scale; an unquantized weight stands alone."""
    if scheme.weight is None:
        return 1
    tile = scheme.weight.granularity
    return (tile.rows or layer.out_features) * (tile.columns or layer.in_features)
