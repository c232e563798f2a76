"""The kinds of lines of a table: one dataclass each declares, checks, writes and documents it.

The text of a line is canonical: its keys in the order of the dataclass, those left out that have
their default None, many numbers as base64 of float32. Equal data gives equal text.
"""

from __future__ import annotations

import json
import struct
from base64 import b64decode, b64encode
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, PlainSerializer, TypeAdapter, WithJsonSchema

from mofq import __version__
from mofq.evidence.constraints import LayerConstraint
from mofq.exceptions import TableError, nearest_name
from mofq.files.documents import parse_json
from mofq.files.validated import (
    Bytes,
    Count,
    Index,
    Integer,
    Name,
    Names,
    NotNegative,
    Number,
    Sha256,
    SomeNames,
    Text,
    UntitledSchema,
    only_these_keys,
    validate,
)
from mofq.model.layers import CacheLayer, ModelLayers, StatedLayers
from mofq.model.sizes import source_bytes
from mofq.numbers.numerics import NUMERICS

TABLE_VERSION = 1

Unit = Literal["relative_weight_error", "output_mse", "kl_nats_per_token"]
UNITS: tuple[Unit, ...] = get_args(Unit)

#: Ranges of input channels that a profile tells apart.
MOST_BINS = 256

#: Below so many samples of a corpus, error bars say little.
FEW_SAMPLES = 4

#: What identifies a row: fusion group, scheme, unit, corpus.
RowKey = tuple[str, str, str, str | None]


def _unpack(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        data = b64decode(value, validate=True)
        return struct.unpack(f"<{len(data) // 4}f", data)
    except (ValueError, struct.error) as problem:
        raise ValueError(f"not base64 of float32 numbers: {problem}") from None


def _pack(numbers: tuple[float, ...]) -> str:
    return b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


#: Many numbers in one string: little-endian IEEE binary32, one after another, in base64.
_Floats = Annotated[
    tuple[NotNegative, ...],
    Field(min_length=1),
    BeforeValidator(_unpack),
    PlainSerializer(_pack),
    WithJsonSchema({"type": "string", "contentEncoding": "base64"}),
]


#: The same of numbers with a sign.
_SignedFloats = Annotated[
    tuple[Number, ...],
    Field(min_length=1),
    BeforeValidator(_unpack),
    PlainSerializer(_pack),
    WithJsonSchema({"type": "string", "contentEncoding": "base64"}),
]


@only_these_keys
@dataclass(frozen=True, slots=True)
class TableLayer:
    """A linear layer, as far as a decision needs it."""

    name: Name
    out_features: Count
    in_features: Count
    dtype: Name  #: of the checkpoint, as its header writes it
    decoder_layer: Index | None
    module: Name  #: last words of the name, e.g. ``"q_proj"``, ``"experts.down_proj"``
    #: Of an embedding: whether it is the lm_head too (tied) or not (lookup); None: no embedding.
    role: Literal["lookup", "tied"] | None = None

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


@only_these_keys
@dataclass(frozen=True)
class TableGroup:
    """A fusion group: layers that get one scheme."""

    name: Name
    layers: Annotated[tuple[TableLayer, ...], Field(min_length=1)]
    source_bytes: Bytes  #: in the checkpoint as it is [bytes]

    @property
    def weights(self) -> int:
        """Number of weights of all layers."""
        return sum(layer.weights for layer in self.layers)

    @cached_property
    def layer_names(self) -> tuple[str, ...]:
        """Of all layers, which are hundreds where they are experts."""
        return tuple(layer.name for layer in self.layers)


@only_these_keys
@dataclass(frozen=True, slots=True)
class TableStats:
    """Which calibration the rows rest on."""

    sha256: Sha256
    seed: Integer
    corpora: dict[Text, Sha256]  #: name -> SHA-256 of its text
    samples: Count  #: of each corpus
    sequence_length: Count
    bos: Literal[True] | None = None  #: True: every sequence begins with BOS


@only_these_keys
@dataclass(frozen=True, slots=True)
class AddedCorpora:
    """The statistics from here on: those of before, with corpora behind theirs.

    Rows before this line that rest on all corpora together (codes that are fitted, static
    scales) are void, and measured again behind it.
    """

    stats: TableStats


@only_these_keys
@dataclass(frozen=True, slots=True)
class TableModel:
    """Which model the rows are of."""

    name: Name
    index_sha256: Sha256  #: of the checkpoint's names, shapes, dtypes and config
    #: Of samples of the weights; None in tables of before 0.2.
    weights_sha256: Sha256 | None = None
    model_type: Name | None = None  #: of config.json; None in tables of before it was noted
    layers: StatedLayers | None = None  #: what the user said of them


@only_these_keys
@dataclass(frozen=True, slots=True, kw_only=True)
class TableHeader:
    """What all rows of a table have in common."""

    mofq: Name  #: version that began the table
    #: See `mofq.numbers.numerics`; None in tables of before they were noted.
    numerics: Annotated[
        Count | None, Field(description="of the errors; only equal ones are compared")
    ] = None
    model: TableModel
    stats: TableStats | None  #: None: calibration-free
    groups: Annotated[tuple[TableGroup, ...], Field(min_length=1)]
    unquantized: Names  #: linear layers outside of every group
    other_bytes: Bytes  #: all tensors that are not weights of the groups [bytes]

    @property
    def model_name(self) -> str:
        """As the checkpoint calls itself."""
        return self.model.name

    @property
    def index_sha256(self) -> str:
        """Of the checkpoint's names, shapes, dtypes and config."""
        return self.model.index_sha256

    @property
    def weights_sha256(self) -> str | None:
        """Of samples of the weights."""
        return self.model.weights_sha256

    @property
    def source_bytes_of_groups(self) -> int:
        """The weights of all groups in the checkpoint as it is [bytes]."""
        return sum(group.source_bytes for group in self.groups)

    @property
    def weights(self) -> int:
        """Number of weights of all groups."""
        return sum(group.weights for group in self.groups)


@only_these_keys
@dataclass(frozen=True, slots=True)
class TableSpace:
    """What one run of ``measure`` was asked for."""

    name: Name
    sha256: Sha256
    schemes: Names
    base: Names
    min_gain: NotNegative
    engine: Text | None
    mofq: Name  #: version that measured
    #: Selectors of layers that stay as they are; None in tables of before 0.2.
    exclude: tuple[Name, ...] | None = None
    candidates: Annotated[
        tuple[SomeNames, ...] | None,
        Field(description="the schemes again; of several in one entry the first that fits counts"),
    ] = None
    constraints: tuple[LayerConstraint, ...] = ()  #: on what is chosen
    stored: Annotated[
        tuple[tuple[Name, Names], ...],
        Field(description="fusion groups of a quantized source, with what it keeps them in"),
    ] = ()

    def extends(self, other: TableSpace) -> bool:
        """Whether this is the other definition with, at most, more schemes.

        As where a space that comes with mofq has grown: what was measured goes on.
        """
        if (self.name, self.sha256) == (other.name, other.sha256):
            return True  # earlier tables noted less of it
        known = other.candidates
        return (
            (self.name, self.base, self.min_gain, self.constraints)
            == (other.name, other.base, other.min_gain, other.constraints)
            and (self.exclude or ()) == (other.exclude or ())
            and set(self.schemes) >= set(other.schemes)
            and (known is None or set(self.candidates or ()) >= set(known))
        )


@only_these_keys
@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a scheme was not offered to a fusion group."""

    group: Name
    scheme: Name
    reason: Name


@only_these_keys
@dataclass(frozen=True, slots=True)
class TableCache:
    """A `CacheLayer` whose format was asked for; rows of its name may follow."""

    name: Name
    module: Name
    kv_heads: Count
    head_size: Count
    decoder_layer: Index


@only_these_keys
@dataclass(frozen=True, slots=True)
class Row:
    """One measured choice.

    Rows of a unit and corpus rest on the same samples in the same order, so two rows are
    compared sample by sample.
    """

    group: Name
    scheme: Name
    unit: Unit
    corpus: Text | None  #: None: no corpus was used, or all of them together
    error: NotNegative  #: in ``unit``
    stderr: NotNegative | None  #: of ``error``, from the samples
    bytes: Bytes  #: of the group under the scheme, as exported
    sqnr_db: Number | None  #: of the weights [dB]; None where they are exact
    #: In float32, nats only.
    sample_errors: Annotated[
        _Floats | None,
        Field(description="nats per token of each sequence; error is their mean"),
    ] = None
    #: Layer -> largest |input|, static activations only.
    static_amax: dict[Text, NotNegative] | None = None
    #: What the change of size of the weights does, with its sign, in nats only: of each sample all
    #: sequences and draws that it stands for. The mean of their squares is a part of ``error``.
    #: None in tables of before version 3 of the numerics, and where no size changes.
    answers: Annotated[
        tuple[_SignedFloats, ...] | None,
        Field(description="roots of nats per token; those of a recipe's groups are added"),
    ] = None

    @property
    def key(self) -> RowKey:
        """What identifies the row."""
        return (self.group, self.scheme, self.unit, self.corpus)


@only_these_keys
@dataclass(frozen=True, slots=True)
class Extent:
    """How large the values are that a layer multiplies: along its inputs, and beside each other.

    The crest factor of some values is the largest magnitude over the root mean square. A format
    with even steps (INT) loses by its square, one with a step for each power of two (FP) hardly.
    Channels are taken in at most `MOST_BINS` ranges of neighbours, all equally wide but the last.
    """

    amax: Annotated[_Floats, Field(description="largest magnitude in each range of channels")]
    rms: Annotated[
        _Floats, Field(description="largest root mean square of one channel in each range")
    ]
    #: What shares a scale (``"g32"``: 32 neighbours along the inputs; ``"channel"`` or
    #: ``"token"``: all of them) -> mean crest factor; of those that are not all zero.
    crest: dict[Text, NotNegative]


@only_these_keys
@dataclass(frozen=True, slots=True)
class Profile:
    """The weights and inputs of one kind of layer of a fusion group, as they are.

    Experts of one kind are taken together. No scheme and no decision depends on a profile: it
    is there to be looked at.
    """

    group: Name
    module: Name  #: of its layers
    channels: Count  #: input channels
    weight: Extent
    inputs: dict[Text, Extent]  #: corpus -> of the calibration's tokens

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the profile."""
        return (self.group, self.module)


@only_these_keys
@dataclass(frozen=True, slots=True)
class Visits:
    """How many of the kept tokens of a corpus came to each expert's layers of a fusion group."""

    group: Name
    corpus: Text
    tokens: Count  #: of all kept sequences
    layers: Annotated[
        dict[Text, Bytes], Field(min_length=1, description="layer -> tokens that it saw")
    ]

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the visits."""
        return (self.group, self.corpus)


@only_these_keys
@dataclass(frozen=True, slots=True)
class Flips:
    """What errors cost by sending tokens of a mixture to other experts, on one corpus.

    A recipe whose groups ``g`` have the errors ``KL_g`` costs ``sqrt(sum rate_g KL_g)`` beside
    their sum. See `mofq.evidence.calibration.routing`.
    """

    corpus: Text
    rates: Annotated[
        dict[Text, NotNegative],
        Field(description="fusion group or cache -> nats per token; 0 behind the last router"),
    ]
    #: Over the sequences that were run; None in tables of before it was noted.
    stderr: Annotated[NotNegative | None, Field(description="of the root, as a share of it")] = None


@dataclass(frozen=True, slots=True)
class Table:
    """A table in memory. Lines keep the order of the file."""

    header: TableHeader  #: with the corpora that were added since
    spaces: tuple[TableSpace, ...]
    rejections: tuple[Rejection, ...]
    rows: tuple[Row, ...]
    sha256: str  #: of the complete lines of the file
    profiles: tuple[Profile, ...] = ()
    caches: tuple[CacheLayer, ...] = ()  #: whose formats were asked for
    #: Of groups of experts; none in tables of before they were noted, and without statistics.
    visits: tuple[Visits, ...] = ()
    flips: tuple[Flips, ...] = ()  #: of each corpus; none where nothing is known of routers

    @property
    def measures(self) -> tuple[tuple[Unit, str | None], ...]:
        """The (unit, corpus) pairs that have rows, in the order of their first row."""
        return tuple(dict.fromkeys((row.unit, row.corpus) for row in self.rows))

    def rows_of(self, unit: str, corpus: str | None = None) -> dict[str, tuple[Row, ...]]:
        """The rows of one unit and corpus by fusion group or cache; each of them is a key."""
        found: dict[str, list[Row]] = {group.name: [] for group in self.header.groups}
        found |= {cache.name: [] for cache in self.caches}
        for row in self.rows:
            if row.unit == unit and row.corpus == corpus:
                found[row.group].append(row)
        return {name: tuple(rows) for name, rows in found.items()}


def bin_width(channels: int) -> int:
    """Input channels in one range of a profile."""
    return -(-channels // MOST_BINS)


Line = (
    TableHeader
    | AddedCorpora
    | TableSpace
    | Rejection
    | Profile
    | Visits
    | Flips
    | TableCache
    | Row
)

_KINDS: dict[str, type[Line]] = {
    "header": TableHeader,
    "corpora": AddedCorpora,
    "space": TableSpace,
    "rejection": Rejection,
    "profile": Profile,
    "visits": Visits,
    "flips": Flips,
    "cache": TableCache,
    "row": Row,
}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {kind: TypeAdapter(line) for kind, line in _KINDS.items()}
#: Kind -> the keys that come before those of its dataclass.
_FIRST_KEYS: dict[str, dict[str, Any]] = {
    kind: {"kind": kind} | ({"version": TABLE_VERSION} if kind == "header" else {})
    for kind in _KINDS
}


def encode_line(line: Line) -> str:
    """One line of JSON with its newline; equal data gives equal text.

    Raises:
        TableError: A number is not finite or does not fit float32, or a name is not text.
    """
    kind = next(kind for kind, of in _KINDS.items() if isinstance(line, of))
    try:
        value = _FIRST_KEYS[kind] | _ADAPTERS[kind].dump_python(
            line, exclude_defaults=True, warnings=False
        )
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
    except ValueError as problem:
        raise TableError(f"{describe(line)}: cannot be written: {problem}.") from problem
    return text + "\n"


def describe(line: Line) -> str:
    """What messages call a line."""
    match line:
        case Row():
            return f"row of {line.group} under {line.scheme} in {line.unit}"
        case Profile():
            return f"profile of {line.module} in {line.group}"
        case Flips():
            return f"changes of experts on {line.corpus}"
        case Visits():
            return f"visits to {line.group}"
        case Rejection():
            return f"rejection of {line.scheme} for {line.group}"
        case TableCache():
            return f"cache {line.name}"
    return next(kind for kind, of in _KINDS.items() if isinstance(line, of))


def decode_line(text: str, where: str) -> Line:
    """The dataclass of one line.

    What earlier versions kept to predict interactions of layers, ``projections`` and
    ``tokens_per_projection``, is left out.

    Args:
        text: The line.
        where: File and line number, for messages.

    Raises:
        TableError: The line is not JSON, of an unknown kind or version, or has
            an unknown key, a missing key or a value out of its range.
    """
    value = parse_json(text, where, TableError)
    kind = value.pop("kind", None) if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _ADAPTERS:
        raise TableError(
            f"{where}: unknown kind of line {kind!r}." + nearest_name(str(kind), _ADAPTERS)
        )
    if kind == "row":
        value.pop("projections", None)
    if kind == "header":
        version = value.pop("version", None)
        if version != TABLE_VERSION or isinstance(version, bool):
            raise TableError(
                f"{where}: the table has version {version!r}, "
                f"and this mofq reads version {TABLE_VERSION}. "
                f"Use the mofq that wrote it, or measure again."
            )
        if isinstance(value.get("stats"), dict):
            value["stats"].pop("tokens_per_projection", None)
    line: Line = validate(_ADAPTERS[kind], value, where, TableError)
    return line


def _line_schema() -> dict[str, Any]:
    """Of any line, from the dataclasses and what stands before their keys."""
    _, schema = TypeAdapter.json_schemas(
        [(kind, "validation", adapter) for kind, adapter in _ADAPTERS.items()],
        schema_generator=UntitledSchema,
    )
    for kind, line in _KINDS.items():
        of_line = schema["$defs"][line.__name__]
        first = {key: {"const": value} for key, value in _FIRST_KEYS[kind].items()}
        of_line["properties"] = first | of_line["properties"]
        of_line["required"] = [*first, *of_line["required"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "One line of a mofq table (table.jsonl)",
        "oneOf": [{"$ref": f"#/$defs/{line.__name__}"} for line in _KINDS.values()],
        **schema,
    }


TABLE_LINE_SCHEMA = _line_schema()


def header_of(
    model_layers: ModelLayers,
    *,
    model_name: str,
    index_sha256: str,
    weights_sha256: str | None = None,
    stats: TableStats | None = None,
) -> TableHeader:
    """The header of a new table for a model.

    Args:
        model_layers: What ``find_layers`` found.
        model_name: As the checkpoint calls itself.
        index_sha256: Of the checkpoint.
        weights_sha256: Of its weights, from `hash_weights`.
        stats: The calibration that the rows will rest on, if any.
    """
    groups = tuple(
        TableGroup(
            name=group.name,
            layers=tuple(
                TableLayer(
                    layer.name,
                    layer.out_features,
                    layer.in_features,
                    dtype=layer.dtype,
                    decoder_layer=layer.decoder_layer,
                    module=layer.module,
                    role=None if layer.role == "linear" else layer.role,
                )
                for layer in group.layers
            ),
            source_bytes=source_bytes(group),
        )
        for group in model_layers.groups
    )
    return TableHeader(
        mofq=__version__,
        numerics=NUMERICS,
        model=TableModel(
            model_name,
            index_sha256,
            weights_sha256,
            model_layers.architecture,
            model_layers.stated,
        ),
        stats=stats,
        groups=groups,
        unquantized=tuple(layer.name for layer in model_layers.unquantized),
        other_bytes=model_layers.other_bytes,
    )
