"""The lines of a table as frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mofq import __version__
from mofq.model.layers import CacheLayer, ModelLayers
from mofq.model.sizes import source_bytes
from mofq.numbers.numerics import NUMERICS

Unit = Literal["relative_weight_error", "output_mse", "kl_nats_per_token"]
UNITS: tuple[Unit, ...] = get_args(Unit)

#: Ranges of input channels that a profile tells apart.
MOST_BINS = 256

#: What identifies a row: fusion group, scheme, unit, corpus.
RowKey = tuple[str, str, str, str | None]


@dataclass(frozen=True, slots=True)
class TableLayer:
    """A linear layer, as far as a decision needs it."""

    name: str
    out_features: int
    in_features: int
    dtype: str  #: of the checkpoint, as its header writes it
    decoder_layer: int | None
    module: str  #: last words of the name, e.g. ``"q_proj"``, ``"experts.down_proj"``

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features


@dataclass(frozen=True, slots=True)
class TableGroup:
    """A fusion group: layers that get one scheme."""

    name: str
    layers: tuple[TableLayer, ...]
    source_bytes: int  #: in the checkpoint as it is [bytes]

    @property
    def weights(self) -> int:
        """Number of weights of all layers."""
        return sum(layer.weights for layer in self.layers)


@dataclass(frozen=True, slots=True)
class TableStats:
    """Which calibration the rows rest on."""

    sha256: str
    seed: int
    corpora: dict[str, str]  #: name -> SHA-256 of its text
    samples: int  #: of each corpus
    tokens_per_projection: int  #: labelled positions that one projection sums over
    sequence_length: int


@dataclass(frozen=True, slots=True)
class TableHeader:
    """What all rows of a table have in common."""

    mofq: str  #: version that began the table
    model_name: str
    index_sha256: str  #: of the checkpoint's names, shapes, dtypes and config
    stats: TableStats | None  #: None: calibration-free
    groups: tuple[TableGroup, ...]
    unquantized: tuple[str, ...]  #: linear layers outside of every group
    other_bytes: int  #: all tensors that are not weights of the groups [bytes]
    #: Of samples of the weights; None in tables of before 0.2.
    weights_sha256: str | None = None
    #: Of its errors, see `mofq.numbers.numerics`; None in tables of before they were noted.
    numerics: int | None = None

    @property
    def source_bytes_of_groups(self) -> int:
        """The weights of all groups in the checkpoint as it is [bytes]."""
        return sum(group.source_bytes for group in self.groups)

    @property
    def weights(self) -> int:
        """Number of weights of all groups."""
        return sum(group.weights for group in self.groups)


@dataclass(frozen=True, slots=True)
class TableSpace:
    """What one run of ``measure`` was asked for."""

    name: str
    sha256: str
    schemes: tuple[str, ...]
    base: tuple[str, ...]
    min_gain: float
    engine: str | None
    mofq: str = __version__


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a scheme was not offered to a fusion group."""

    group: str
    scheme: str
    reason: str


@dataclass(frozen=True, slots=True)
class Row:
    """One measured choice.

    Rows of a unit and corpus rest on the same samples in the same order, so
    two rows are compared sample by sample, and the projections of rows of
    different groups are added before they are squared: the joint prediction is
    ``mean((sum over groups)**2) / (2 * tokens_per_projection)`` nats per token.
    """

    group: str
    scheme: str
    unit: Unit
    corpus: str | None  #: None: no corpus was used, or all of them together
    error: float  #: in ``unit``, >= 0
    stderr: float | None  #: of ``error``, from the samples
    bytes: int  #: of the group under the scheme, as exported
    sqnr_db: float | None  #: of the weights [dB]; None where they are exact
    #: Nats per token of each sample; error is their mean. In float32, nats only.
    sample_errors: tuple[float, ...] | None = None
    #: Signed sum of gradient times perturbation over each chunk of
    #: tokens_per_projection tokens. In float32, nats only.
    projections: tuple[float, ...] | None = None
    static_amax: dict[str, float] | None = (
        None  #: layer -> largest |input|, static activations only
    )

    @property
    def key(self) -> RowKey:
        """What identifies the row."""
        return (self.group, self.scheme, self.unit, self.corpus)


@dataclass(frozen=True, slots=True)
class Extent:
    """How large the values are that a layer multiplies: along its inputs, and beside each other.

    The crest factor of some values is the largest magnitude over the root mean square. A format
    with even steps (INT) loses by its square, one with a step for each power of two (FP) hardly.
    """

    #: Largest magnitude in each of at most `MOST_BINS` ranges of neighbouring input channels,
    #: all equally wide but the last. In float32.
    amax: tuple[float, ...]
    #: Largest root mean square of one channel in each of these ranges. In float32.
    rms: tuple[float, ...]
    #: What shares a scale (``"g32"``: 32 neighbours along the inputs; ``"channel"`` or
    #: ``"token"``: all of them) -> mean crest factor; of those that are not all zero.
    crest: dict[str, float]


@dataclass(frozen=True, slots=True)
class Profile:
    """The weights and inputs of one kind of layer of a fusion group, as they are.

    Experts of one kind are taken together. No scheme and no decision depends on a profile: it
    is there to be looked at.
    """

    group: str
    module: str  #: of its layers
    channels: int  #: input channels
    weight: Extent
    inputs: dict[str, Extent]  #: corpus -> of the calibration's tokens

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the profile."""
        return (self.group, self.module)


@dataclass(frozen=True, slots=True)
class Table:
    """A table in memory. Lines keep the order of the file."""

    header: TableHeader
    spaces: tuple[TableSpace, ...]
    rejections: tuple[Rejection, ...]
    rows: tuple[Row, ...]
    sha256: str  #: of the complete lines of the file
    profiles: tuple[Profile, ...] = ()
    caches: tuple[CacheLayer, ...] = ()  #: whose formats were asked for

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
                )
                for layer in group.layers
            ),
            source_bytes=source_bytes(group),
        )
        for group in model_layers.groups
    )
    return TableHeader(
        mofq=__version__,
        model_name=model_name,
        index_sha256=index_sha256,
        stats=stats,
        groups=groups,
        unquantized=tuple(layer.name for layer in model_layers.unquantized),
        other_bytes=model_layers.other_bytes,
        weights_sha256=weights_sha256,
        numerics=NUMERICS,
    )
