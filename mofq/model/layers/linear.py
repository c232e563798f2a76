"""What a linear layer is to every later stage, and where a loaded model holds it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from mofq.model.layers.families import FUSION_RULES
from mofq.model.layers.kv_cache import CacheLayer
from mofq.model.layers.names_in_memory import find_stored_name
from mofq.model.layers.stated_layers import StatedLayers
from mofq.numbers.formats import FP4_E2M1, FP8_E4M3

if TYPE_CHECKING:
    from torch import Tensor

_Layer_co = TypeVar("_Layer_co", covariant=True)
_Layer = TypeVar("_Layer")
_Number = TypeVar("_Number", float, "Tensor")

#: Of the largest powers of two in both formats.
_FP4_EXPONENT, _E4M3_EXPONENT = (math.floor(math.log2(one.max)) for one in (FP4_E2M1, FP8_E4M3))

#: What a model does with a matrix: multiply by it, look its rows up, or both (a tied embedding).
Role = Literal["linear", "lookup", "tied"]


@dataclass(frozen=True, slots=True)
class LoadedWeight:
    """Where the model that transformers builds in memory holds the weight of a layer.

    The parameter ``name`` is [out, in], [in, out] where ``transposed``, or with one
    more dimension in front that ``expert`` indexes; the layer's rows start at ``row_start``.
    """

    name: str
    expert: int | None = None
    row_start: int = 0
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """One linear layer: a matrix [out_features, in_features] somewhere in a checkpoint.

    ``name`` is what a checkpoint with one tensor per layer calls the module, which
    is what vLLM reads before it fuses; it is the same however this checkpoint is
    stored. Mixtral's experts are therefore ``….block_sparse_moe.experts.3.w1``.
    """

    name: str
    tensor: str  #: key in the checkpoint
    out_features: int
    in_features: int
    dtype: str  #: as safetensors calls it
    module: str  #: last words of the name: "q_proj", "experts.gate_proj"
    shares_scale: str  #: layers of a fusion group with the same word share a global scale
    decoder_layer: int | None = None
    transposed: bool = False  #: stored as [in_features, out_features]
    expert: int | None = None  #: index into a tensor [experts, out, in]
    row_start: int = 0  #: first row in the stored matrix; not 0 where layers are stored fused
    scale_bytes: int = 0  #: of the scales that an FP8 source has for this layer [bytes]
    global_scale: float | None = None  #: that an NVFP4 source has for it, a multiplier
    loaded: LoadedWeight | None = None  #: in the loaded model, where no family's rule says it
    role: Role = "linear"

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    @property
    def shares_input(self) -> str:
        """What other experts of the fusion group with the same word read at a token.

        Empty elsewhere, where the statistics know which layers read the very same inputs.
        """
        kind, _, half = self.shares_scale.partition(".")
        return "experts.gate_up" if kind == "experts" and half.endswith("gate_up") else ""


@dataclass(frozen=True, slots=True)
class FusionGroup:
    """Layers that an engine joins, and that therefore take one scheme."""

    name: str  #: "layers.0.attn.qkv"
    layers: tuple[LinearLayer, ...]


def share_amax(group: FusionGroup, amax: Mapping[str, _Number]) -> dict[str, _Number]:
    """The largest magnitude that each layer's global scale is made from.

    Args:
        group: Whose layers engines concatenate.
        amax: Layer name -> its own largest magnitude.

    Returns:
        Layer name -> the largest among the layers it is concatenated with.
    """
    largest: dict[str, _Number] = {}
    for layer in group.layers:
        known = largest.get(layer.shares_scale, amax[layer.name])
        largest[layer.shares_scale] = max(known, amax[layer.name])
    return {layer.name: largest[layer.shares_scale] for layer in group.layers}


def stored_amax(group: FusionGroup, amax: Mapping[str, float]) -> dict[str, float]:
    """As `share_amax`, the magnitude that would give each layer the global scale that it has.

    Of an NVFP4 source, to a unit in the last place of float32. MXFP4 has none: there it is a power
    of two, so that the scales of all blocks are powers of two, as theirs, and that of the largest
    one is at most the largest in E4M3.

    Args:
        group: Whose layers engines concatenate.
        amax: Layer name -> its own largest magnitude.
    """

    def of(layer: LinearLayer) -> float:
        largest = amax[layer.name]
        of_largest = math.floor(math.log2(largest)) - _FP4_EXPONENT if largest else 0
        power = math.ldexp(1.0, of_largest - _E4M3_EXPONENT)
        scale = power if layer.global_scale is None else layer.global_scale
        return scale * FP8_E4M3.max * FP4_E2M1.max

    return share_amax(group, {layer.name: of(layer) for layer in group.layers})


@dataclass(frozen=True, slots=True)
class ModelLayers:
    """Every linear layer of a language model, each exactly once."""

    architecture: str  #: model_type; a key of FUSION_RULES, or of a type that was inferred
    groups: tuple[FusionGroup, ...]
    unquantized: tuple[LinearLayer, ...]  #: lm_head, routers, projections outside the decoder
    tied_lm_head: bool  #: the lm_head is the embedding and no layer of its own
    other_bytes: int  #: of all tensors but the weights in groups [bytes]
    caches: tuple[CacheLayer, ...] = ()  #: of each attention layer, in order
    body: str = ""  #: prefix of the language model's tensors on disk
    #: Tensor -> why it is in no fusion group, of every one of two or more dimensions.
    left_out: Mapping[str, str] = field(default_factory=dict)
    stated: StatedLayers | None = None  #: what the user said of them
    has_stored_names: bool = False  #: of an inferred type: tensors have the names of the hub

    @property
    def grouped_layers(self) -> tuple[LinearLayer, ...]:
        """The layers of all fusion groups."""
        return tuple(layers_of(self.groups))

    @property
    def linear_layers(self) -> tuple[LinearLayer, ...]:
        """Every linear layer: those of the fusion groups, then those that stay unquantized."""
        return (*self.grouped_layers, *self.unquantized)


class AnyLayer(Protocol):
    """A linear layer of a model or of a table: names and shapes, and no weights."""

    @property
    def name(self) -> str:
        """Module name."""
        ...

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        ...

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        ...

    @property
    def dtype(self) -> str:
        """Of the checkpoint, as safetensors writes it."""
        ...

    @property
    def decoder_layer(self) -> int | None:
        """Its number; None outside of the decoder."""
        ...

    @property
    def module(self) -> str:
        """Last words of the name, e.g. ``"q_proj"``, ``"experts.down_proj"``."""
        ...

    @property
    def role(self) -> str | None:
        """``"lookup"`` or ``"tied"`` of an embedding; anything else of other layers."""
        ...

    @property
    def weights(self) -> int:
        """Number of weights."""
        ...


class AnyGroup(Protocol):
    """A fusion group of a model (`FusionGroup`) or of a table (`TableGroup`)."""

    @property
    def name(self) -> str:
        """E.g. ``"layers.0.attn.qkv"``."""
        ...

    @property
    def layers(self) -> Sequence[AnyLayer]:
        """At least one, in the order in which an engine concatenates them."""
        ...


class _Group(Protocol[_Layer_co]):
    @property
    def layers(self) -> Sequence[_Layer_co]: ...


def layers_of(groups: Iterable[_Group[_Layer]]) -> Iterator[_Layer]:
    """The layers of some fusion groups, of a model, a table or a recipe, in order."""
    return (layer for group in groups for layer in group.layers)


def find_loaded_weight(layer: LinearLayer, architecture: str) -> LoadedWeight:
    """Map a layer of the checkpoint to a parameter of the loaded model.

    transformers 5 fuses experts into one three-dimensional parameter, whatever the
    checkpoint looks like, and moves the prefix of some families.

    Args:
        layer: From ``find_layers``.
        architecture: ``ModelLayers.architecture``.

    Returns:
        The parameter, by its name in the model of ``AutoModelForCausalLM``.
    """
    if layer.loaded is not None:
        return layer.loaded
    family = FUSION_RULES[architecture]
    if layer.name in family.lm_heads:
        return LoadedWeight("lm_head.weight")
    name = family.loaded_body + layer.name.removeprefix(family.body)
    if family.experts is None:
        return LoadedWeight(f"{name}.weight", transposed=layer.transposed)
    name = name.replace(f".{family.experts.module}.", f".{family.experts.fused_module}.")
    head, is_expert, tail = name.partition(".experts.")
    if not is_expert:
        return LoadedWeight(f"{name}.weight", transposed=layer.transposed)
    expert, word = tail.split(".")
    fused = "down_proj" if word == family.experts.down else "gate_up_proj"
    row_start = layer.out_features if word == family.experts.up else 0
    return LoadedWeight(f"{head}.experts.{fused}", int(expert), row_start)


def find_exported_name(name: str, layers: ModelLayers) -> str:
    """What engines' loaders call a tensor of the checkpoint, whatever layout it is stored in.

    transformers 5 stores what it holds in memory where it is asked to: other prefixes, and a
    Mixtral's router beside fused experts as ``mlp.gate``. Classes without a head leave the
    prefix out.

    Args:
        name: Of a tensor of the checkpoint.
        layers: Of the checkpoint.

    Returns:
        The name in the layout of the hub's checkpoints, as `LinearLayer.name` is.

    Source: vLLM 0.33 ``models/mixtral.py`` (``block_sparse_moe``; ``w1, w2, w3``) and
    ``qwen2_moe.py``, ``qwen3_moe.py``, ``olmoe.py``, ``glm4_moe.py``, ``deepseek_v2.py``
    (``mlp``; ``gate_proj, down_proj, up_proj``); SGLang 0.5.23, the same files.
    """
    family = FUSION_RULES.get(layers.architecture)
    if family is None:
        return name if layers.has_stored_names else find_stored_name(name, layers.architecture)
    if name.removesuffix(".weight") in family.lm_heads or not name.startswith(layers.body):
        return name
    if not name.startswith(family.body):
        name = family.body + name.removeprefix(layers.body)
    experts = family.experts
    if experts is not None and name.startswith(f"{family.body}{family.decoder}."):
        name = name.replace(f".{experts.fused_module}.", f".{experts.module}.")
    return name


def find_loaded_names(name: str, architecture: str) -> tuple[str, ...]:
    """Under which names the loaded model may hold a tensor of the checkpoint.

    Args:
        name: Of a tensor that is no linear layer's weight.
        architecture: ``ModelLayers.architecture``, a key of ``FUSION_RULES``.

    Returns:
        The first of them that the model has is the one; it may have none, of
        another tower or of a buffer that its class computes.
    """
    family = FUSION_RULES[architecture]
    bodies = (body for body in family.bodies if name.startswith(body))
    moved = (family.loaded_body + name.removeprefix(body) for body in bodies)
    return (name, *moved)
