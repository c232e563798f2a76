"""Engines and their rules: the types, and how schemes, fusion groups and caches meet them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Literal

from mofq.engines.exports import export_problem
from mofq.engines.groups import embedding_role, experts_apart, is_experts, transposed_layer
from mofq.engines.scheme_names import format_name
from mofq.engines.tensor_parallel import cut_problems, device_parts
from mofq.model.layers import AnyGroup, CacheLayer
from mofq.numbers.schemes import Scheme

Capability = tuple[int, int]
#: End of a fusion group's name: DeepSeek's kv_b_proj, which is a dense layer as well.
_LATENT = ".attn.kv"
#: The same of the layers that read the input, q_a_proj and kv_a_proj_with_mqa where both are there.
_JOINED_LATENT = ".attn.latent"
#: The same of the first layers of experts that every token goes through.
_SHARED = ".mlp.shared_gate_up"
#: The name of a fusion group inside of its decoder layer.
_IN_LAYER = re.compile(r"layers\.\d+\.(.+)")
#: In the same, of what runs beside attention or in its place; which types have it, rules say.
_STATE_SPACE = re.compile(r"\.(mamba|mixer)\.")
#: Of these, "any" and "dense" are no embeddings: what looks rows up multiplies nothing.
Layers = Literal[
    "any",
    "dense",
    "experts",
    "latent",
    "joined latent",
    "shared",
    "state space",
    "lm_head",
    "embeddings",
]


@dataclass(frozen=True, slots=True)
class Rule:
    """One claim about an engine: these schemes are served by that kernel, or by none.

    How the scales of weights were chosen and their codes rounded (``@mse``, ``~gptq``, the
    ceiling rule of E8M0) changes no format, so ``schemes`` is matched against the name
    without them. What is done to activations is done by the engine, so their rules count.
    """

    schemes: str  #: regular expression, full match on ``format_name``
    _: KW_ONLY
    kernel: str = ""  #: what runs it; empty where nothing does
    source: str  #: project, version, file and line; "run" where it was run
    refused: str = ""  #: why it is not served as measured, and what to take instead
    layers: Layers = "any"  #: the kinds of `Layers`
    min_capability: Capability | None = None  #: CUDA compute capability, inclusive
    max_capability: Capability | None = None  #: inclusive
    in_features_multiple: int = 1  #: of each layer
    least_features: int = 1  #: inputs, and outputs of what the engine concatenates, at least
    hidden_multiple: int = 1  #: of the hidden size, which experts read and write
    out_features_multiple: int = 1  #: of what the engine concatenates; of each layer for experts
    shard_rows_multiple: int = 1  #: out_features of each concatenated layer but the last
    settings: tuple[str, ...] = ()  #: environment variables and flags that make it exact
    versions: tuple[str, ...] = ()  #: of the engine; empty: all that its rules are for
    model_types: tuple[str, ...] = ()  #: of config.json; empty: any
    groups: str = ""  #: regular expression of fusion groups inside a decoder layer; empty: any
    note: str = ""

    def holds_on(self, capability: Capability | None) -> bool:
        """Whether the rule is one for this hardware."""
        return _is_between(self.min_capability, capability, self.max_capability)

    def is_for(self, group: str) -> bool:
        """Whether the rule is one for a fusion group of that name."""
        inside = _IN_LAYER.fullmatch(group)
        return not self.groups or bool(inside and re.fullmatch(self.groups, inside[1]))


@dataclass(frozen=True, slots=True)
class ModelRule:
    """One claim: the engine does not load these models, whatever their layers are quantized to."""

    model_types: tuple[str, ...]  #: of config.json
    _: KW_ONLY
    groups: str  #: regular expression: that have a fusion group of such a name
    refused: str
    source: str


@dataclass(frozen=True, slots=True)
class TransposedRule:
    """One claim: of these models the engine loads layers that are stored as [in, out], no others.

    Their classes swap the two dimensions of what is called ``weight`` and of nothing else: codes
    under that name are stored as [in, out], packed codes and scales as those of any layer.
    """

    model_types: tuple[str, ...] = ()  #: of config.json
    _: KW_ONLY
    words: tuple[str, ...] = ()  #: last words of those layers
    refused: str  #: why it loads no others
    source: str

    def loads(self, layer: str, model_type: str | None) -> bool:
        """Whether a layer is loaded so; of a model of unknown type, whether it may be."""
        is_of_type = (
            bool(self.model_types) if model_type is None else model_type in self.model_types
        )
        return is_of_type and layer.rpartition(".")[2] in self.words


@dataclass(frozen=True, slots=True)
class CacheRule:
    """One claim: these formats of the KV cache are held so, or not at all."""

    schemes: str  #: regular expression, full match on the name
    _: KW_ONLY
    source: str
    refused: str = ""  #: why it is not held as measured, and what to take instead
    min_capability: Capability | None = None  #: CUDA compute capability, inclusive
    max_capability: Capability | None = None  #: inclusive
    min_head_size: int = 1  #: channels of a head, at least
    max_head_size: int | None = None  #: channels of a head, at most; None: any
    head_sizes: tuple[int, ...] = ()  #: channels of a head, one of these; empty: any
    flag: str = ""  #: what asks for it where the checkpoint cannot say it
    note: str = ""

    @property
    def how(self) -> str:
        """In one line: how the cache comes to be held so, or why it is not."""
        if self.refused:
            return f"refused: {self.refused}"
        held = f"KV cache, asked for by {self.flag}" if self.flag else "KV cache"
        parts = [held, self.note, f"heads of {self._heads} channels" if self._heads else ""]
        return "; ".join(part for part in parts if part)

    @property
    def _heads(self) -> str:
        """Which sizes of a head it is for, in words; empty where any."""
        if self.head_sizes:
            *first, last = map(str, self.head_sizes)
            return f"{', '.join(first)} or {last}"
        if self.max_head_size is not None:
            return f"at most {self.max_head_size}"
        return f"{self.min_head_size} or more" if self.min_head_size > 1 else ""

    def head_problem(self, cache: CacheLayer) -> str | None:
        """Why the heads of a layer do not fit, or None."""
        size = cache.head_size
        fits = self.min_head_size <= size <= (self.max_head_size or size)
        if fits and (not self.head_sizes or size in self.head_sizes):
            return None
        return f"it needs heads of {self._heads} channels, and these have {size}"

    def holds_on(self, capability: Capability | None) -> bool:
        """Whether the rule is one for this hardware."""
        return _is_between(self.min_capability, capability, self.max_capability)


def _is_between(
    least: Capability | None, capability: Capability | None, most: Capability | None
) -> bool:
    if capability is None:
        return least is None and most is None
    return (least is None or least <= capability) and (most is None or capability <= most)


@dataclass(frozen=True, slots=True)
class Engine:
    """One serving engine of one version on one kind of hardware."""

    name: str
    version: str
    capability: Capability | None = None  #: CUDA compute capability; None: not a CUDA engine
    _: KW_ONLY
    versions: tuple[str, ...] = ()  #: that its rules are for, oldest first; empty: that one alone
    reads: str  #: the backend whose output it loads
    rules: tuple[Rule, ...]  #: of which the first that fits counts
    caches: tuple[CacheRule, ...] = ()  #: of the KV cache, likewise; empty: it takes no format
    models: tuple[ModelRule, ...] = ()  #: that it does not load
    transposed: TransposedRule  #: of weights that are stored as [in, out]
    can_cut: bool = True  #: whether devices can share a layer (tensor parallelism)
    devices: int = 1  #: that share every layer
    serve: str = ""  #: command before an exported folder; empty: it is no server of one
    load: str = ""  #: of an engine that is no server: the Python function that loads the folder
    devices_flag: str = ""  #: of that command, before the number of devices
    paths: str = ""  #: what short paths in the rules' sources stand for, and what was run

    @property
    def title(self) -> str:
        """For messages: name, version, and the devices where there are several."""
        base = f"{re.split('[@:]', self.name)[0]} {self.version}"
        return base if self.devices == 1 else f"{base} on {self.devices} devices"

    @property
    def applicable_rules(self) -> tuple[Rule, ...]:
        """The rules that hold on this hardware and in this version, in order."""
        return tuple(
            rule
            for rule in self.rules
            if rule.holds_on(self.capability)
            and (not rule.versions or self.version in rule.versions)
        )

    @property
    def applicable_caches(self) -> tuple[CacheRule, ...]:
        """The rules for formats of the KV cache that hold on this hardware, in order."""
        return tuple(rule for rule in self.caches if rule.holds_on(self.capability))


def readable(rule: Rule | CacheRule) -> str:
    """What a rule is for, as people write it: ``N`` is a number, ``…`` anything."""
    words = {r"\d+": "N", r"\d": "N", ".*": "…", "[^+]*": "…", "[a-z0-9]+": "…", "\\": ""}
    text, groups = rule.schemes, rule.groups if isinstance(rule, Rule) else ""
    for regular, plain in words.items():
        text, groups = text.replace(regular, plain), groups.replace(regular, plain)
    if isinstance(rule, Rule):
        words_after = (rule.layers, ", ".join(rule.model_types), groups, *rule.versions)
        text += "".join(f" ({word})" for word in words_after if word not in ("", "any"))
    return text


def matching_rule(
    engine: Engine, scheme: Scheme, group: AnyGroup, model_type: str | None = None
) -> Rule | None:
    """The first rule of the engine for that scheme and that kind of layer, shapes aside.

    Args:
        engine: Any.
        scheme: Any.
        group: Of a model or a table.
        model_type: Of the model's config; None: not known, and rules for some models do not hold.
    """
    if scheme.is_unquantized:
        return None
    name = format_name(scheme)
    kinds = _kinds(group)
    for rule in engine.applicable_rules:
        if rule.model_types and model_type not in rule.model_types:
            continue
        if not rule.is_for(group.name):
            continue
        if rule.layers in kinds and re.fullmatch(rule.schemes, name):
            return rule
    return None


def _kinds(group: AnyGroup) -> set[Layers]:
    """The kinds of layers that a fusion group is of."""
    role = embedding_role(group)
    if role is not None:
        return {"embeddings"} if role == "lookup" else set()
    kinds: set[Layers] = {"any", "experts" if is_experts(group) else "dense"}
    if group.name.endswith(_LATENT):
        kinds.add("latent")
    if group.name.endswith(_JOINED_LATENT) and len(group.layers) > 1:
        kinds.add("joined latent")
    if group.name.endswith(_SHARED):
        kinds.add("shared")
    if _STATE_SPACE.search(group.name):
        kinds.add("state space")
    if group.layers[0].module == "lm_head":
        kinds.add("lm_head")
    return kinds


def storage_problem(engine: Engine, group: AnyGroup, model_type: str | None = None) -> str | None:
    """Why no scheme of a fusion group can be written down for an engine, or None.

    Args:
        engine: Any.
        group: Of a model or a table.
        model_type: Of the model's config; None: not known.
    """
    layer, rule = transposed_layer(group), engine.transposed
    if layer is None or rule.loads(layer, model_type):
        return None
    return (
        f"{engine.title}: {layer} is stored transposed (the Conv1D of GPT-2), and {rule.refused} "
        f"({rule.source})"
    )


def model_problem(engine: Engine, model_type: str | None, groups: Iterable[AnyGroup]) -> str | None:
    """Why an engine does not load a model at all, or None.

    Args:
        engine: Any.
        model_type: Of the model's config; None: not known.
        groups: All fusion groups of the model.
    """
    groups = tuple(groups)
    if experts_apart(groups):
        return (
            f"{engine.title}: gives all experts of a decoder layer one scheme, and they are "
            "decided apart here"
        )
    names = [group.name for group in groups]
    for rule in engine.models:
        if model_type in rule.model_types and any(re.fullmatch(rule.groups, n) for n in names):
            return f"{engine.title}: {rule.refused} ({rule.source})"
    return None


def refusal(
    engine: Engine, scheme: Scheme, group: AnyGroup, model_type: str | None = None
) -> str | None:
    """Why the engine cannot be given a fusion group in a scheme as it was measured, or None.

    It has no kernel, or what it reads has no words for it.
    """
    if scheme.is_unquantized:
        return None
    if reason := storage_problem(engine, group, model_type):
        return reason
    reason = rule_refusal(engine, scheme, group, model_type)
    # Of a tied embedding no engine has rules, since no export holds it.
    if reason is None or embedding_role(group) == "tied":
        problem = export_problem(engine.reads, scheme, group)
        return f"{engine.title} reads {engine.reads}, which {problem}" if problem else reason
    return reason


def rule_refusal(
    engine: Engine, scheme: Scheme, group: AnyGroup, model_type: str | None = None
) -> str | None:
    """Why the engine has no kernel for a fusion group in a scheme, whatever it is exported to."""
    if scheme.is_unquantized:
        return None
    rule = matching_rule(engine, scheme, group, model_type)
    where = engine.title
    if rule is None:
        return f"{where} has no kernel for {_plural(group)} in {format_name(scheme)}"
    if rule.refused:
        return f"{where}: {rule.refused} ({rule.source})"
    for problem in cut_problems(scheme, group, engine.devices):
        return f"{where}: {problem}"
    for problem in _shape_problems(rule, group, engine.devices):
        return f"{where}: {rule.kernel} needs {problem} ({rule.source})"
    return None


def _plural(group: AnyGroup) -> str:
    role = embedding_role(group)
    if role is not None:
        return "embeddings" if role == "lookup" else "embeddings that the lm_head is tied to"
    return "experts" if is_experts(group) else "linear layers"


def cache_refusal(engine: Engine, scheme: str, cache: CacheLayer) -> str | None:
    """Why an engine cannot hold a layer's cache in a format as it was measured, or None."""
    if scheme == "bf16":
        return None
    where = engine.title
    if not engine.caches:
        return f"{where}: mofq knows no way to hand it a format of the KV cache; leave it bf16"
    for rule in engine.applicable_caches:
        if re.fullmatch(rule.schemes, scheme):
            problem = rule.refused or rule.head_problem(cache)
            return f"{where}: {problem} ({rule.source})" if problem else None
    return f"{where} holds no cache in {scheme}"


def _shape_problems(rule: Rule, group: AnyGroup, devices: int) -> Iterator[str]:
    """What a kernel needs of the part of one device, and what that has."""
    parts = device_parts(group, devices)
    experts = is_experts(group)
    share = "" if devices == 1 else f" on one of {devices} devices"
    for part in parts:
        if part.columns % rule.in_features_multiple:
            yield (
                f"in_features % {rule.in_features_multiple} == 0; "
                f"{part.layer.name} has {part.columns}{share}"
            )
        if part.columns < rule.least_features:
            yield (
                f"at least {rule.least_features} inputs; "
                f"{part.layer.name} has {part.columns}{share}"
            )
    hidden = group.layers[0].in_features  # of the gate
    if experts and hidden % rule.hidden_multiple:
        yield f"a hidden size % {rule.hidden_multiple} == 0; it is {hidden}"
    rows = [part.rows for part in parts] if experts else [sum(part.rows for part in parts)]
    for count in rows:
        if count < rule.least_features:
            yield f"at least {rule.least_features} outputs; {group.name} has {count}{share}"
        if count % rule.out_features_multiple:
            yield (
                f"out_features % {rule.out_features_multiple} == 0; {group.name} has {count}{share}"
            )
    for part in parts if experts else parts[:-1]:
        if part.rows % rule.shard_rows_multiple:
            yield (
                f"out_features % {rule.shard_rows_multiple} == 0 of every layer that it "
                f"concatenates; {part.layer.name} has {part.rows}{share}"
            )
