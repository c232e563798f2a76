"""Applies a recipe to one unit of a streamed model after the other, and takes it off again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import nn

from mofq.delivery.apply.emulate import Prepared, apply_prepared, check_modules
from mofq.delivery.apply.kv_cache import apply_caches
from mofq.delivery.apply.loaded_model import module_path, replace_module, round_kept
from mofq.delivery.recipe_layers import static_amax
from mofq.delivery.tuning.tensors import replaced
from mofq.model.layers import FusionGroup, ModelLayers, layers_of
from mofq.model.layers.module_layers import layers_within

#: A fusion group, its scheme, its static scales, the statistics that the scheme is fitted to and
#: the file of what was learned of its codes: what makes the same of the same weights.
Choice = tuple[str, str, tuple[tuple[str, float], ...], str, str]
#: Of all fusion groups that have their weights in the same modules: experts may have several.
Choices = tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Applied:
    """A recipe that is applied to units, with what applies it to a fusion group."""

    prepared: Prepared
    apply_one: Callable[..., None]
    head: str  #: path of the unit that computes logits

    def layers_within(self, unit: str) -> ModelLayers:
        """The layers of the model in memory inside a unit; a tied embedding is in two."""
        return layers_within(self.prepared.layers, unit, head=self.head)

    def groups_within(self, unit: str) -> tuple[FusionGroup, ...]:
        """The quantized fusion groups inside a unit."""
        inside = {group.name: group for group in self.layers_within(unit).groups}
        return tuple(
            self._tied(inside[group.name]) if group.layers[0].role == "tied" else group
            for group in self.prepared.quantized
            if group.name in inside
        )

    def _tied(self, group: FusionGroup) -> FusionGroup:
        """An embedding's group in one of the two units that it is in."""
        (layer,) = group.layers
        at = layer.loaded
        if layer.role == "lookup" or at is None:
            return group
        return FusionGroup(group.name, (replace(layer, tensor=at.name),))

    def together_within(self, unit: str) -> tuple[tuple[FusionGroup, ...], ...]:
        """The same, those together that have their weights in the same modules."""
        found: dict[frozenset[str], list[FusionGroup]] = {}
        for group in self.groups_within(unit):
            paths = frozenset(module_path(layer) for layer in group.layers)
            found.setdefault(paths, []).append(group)
        return tuple(tuple(groups) for groups in found.values())

    def choices(self, groups: Sequence[FusionGroup]) -> Choices:
        """What groups get that are together."""
        return tuple(map(self.choice, groups))

    def choice(self, group: FusionGroup) -> Choice:
        """What a group gets."""
        scheme = self.prepared.schemes[group.name]
        recipe = self.prepared.recipe
        amax = static_amax(group, scheme, recipe)
        fitted_to = str(recipe.made_by.get("stats_sha256")) if scheme.is_fitted else ""
        is_learned = any(layer.name in self.prepared.changes for layer in group.layers)
        learned = recipe.tuning.sha256 if recipe.tuning is not None and is_learned else ""
        return group.name, scheme.name, tuple(sorted(amax.items())), fitted_to, learned


@dataclass(slots=True)
class UnitModules:
    """The modules that recipes make of one unit's; equal ones are made once."""

    model: nn.Module
    unit: str
    _left: Counter[Choices]  #: how often each will be asked for yet
    _made: dict[Choices, dict[str, nn.Module]] = field(default_factory=dict)

    @contextmanager
    def applied(self, one: Applied) -> Iterator[None]:
        """Have a recipe applied to the unit, and to what is in none, while the context lasts."""
        prepared, groups = one.prepared, one.groups_within(self.unit)
        inside = one.layers_within(self.unit)
        paths = [module_path(layer) for layer in layers_of(groups)]
        before = {path: self.model.get_submodule(path) for path in dict.fromkeys(paths)}
        tables = {m: dict(m._parameters) for m in before.values() if isinstance(m, nn.Embedding)}
        rounded: Mapping[nn.Module, dict[str, nn.Parameter | None]] = {}
        if prepared.checkpoint is not None and prepared.checkpoint.source_format is not None:
            rounded = _copy_parameters(self.model.get_submodule(self.unit))
            round_kept(self.model, inside, checkpoint=prepared.checkpoint, on_disk=prepared.on_disk)
        try:
            for together in one.together_within(self.unit):
                self._put(one, together)
            handles = apply_caches(self.model, prepared.recipe, inside)
            try:
                # Between units a model has norms of its own, which run before or behind them.
                with replaced(prepared.tuned_targets(self.model)):
                    yield
            finally:
                for handle in handles:
                    handle.remove()
        finally:
            for path, module in before.items():
                replace_module(self.model, path, module)
            for module, parameters in (*tables.items(), *rounded.items()):
                module._parameters.update(parameters)

    def _put(self, one: Applied, groups: Sequence[FusionGroup]) -> None:
        choices, layers = one.choices(groups), tuple(layers_of(groups))
        self._left[choices] -= 1
        paths = list(dict.fromkeys(module_path(layer) for layer in layers))
        if choices in self._made:
            for path, module in self._made[choices].items():
                self._replace(path, module)
        else:
            before = {path: self.model.get_submodule(path) for path in paths}
            for group in groups:
                check_modules(self.model, group)
            originals: dict[nn.Module, dict[str, nn.Parameter | None]] = {}
            if any(layer.expert is not None for layer in layers):
                for path in paths:  # experts are rounded in place
                    originals |= _copy_parameters(self.model.get_submodule(path))
            for group in groups:
                apply_prepared(self.model, one.prepared, group, one.apply_one)
            for module, parameters in originals.items():
                module._parameters.update(parameters)
            self._made[choices] = {path: self.model.get_submodule(path) for path in paths}
            for path, module in self._made[choices].items():
                replace_module(self.model, path, before[path])
                self._replace(path, module)
        if self._left[choices] <= 0:
            del self._made[choices]

    def _replace(self, path: str, module: nn.Module) -> None:
        """Put what was made in the place of a module; of an embedding, which is a unit, weights."""
        before = self.model.get_submodule(path)
        if isinstance(before, nn.Embedding):
            before._parameters.update(module._parameters)
        else:
            replace_module(self.model, path, module)


def unit_modules(
    model: nn.Module, unit: str, recipes: Sequence[Applied], *, times: int = 1
) -> UnitModules:
    """For a unit whose weights are there, and the recipes that will be applied to it in turn.

    Args:
        model: That has the unit.
        unit: Its path.
        recipes: Each is applied so many times.
        times: How often; what was made is kept until the last.
    """
    asked = Counter(one.choices(of) for one in recipes for of in one.together_within(unit))
    return UnitModules(model, unit, Counter({key: times * n for key, n in asked.items()}))


def _copy_parameters(module: nn.Module) -> dict[nn.Module, dict[str, nn.Parameter | None]]:
    """Give a module copies of its parameters; those that it had are returned."""
    before: dict[nn.Module, dict[str, nn.Parameter | None]] = {}
    for inner in module.modules():
        before[inner] = dict(inner._parameters)
        for name, parameter in before[inner].items():
            if parameter is not None:
                inner._parameters[name] = nn.Parameter(
                    parameter.detach().clone(), requires_grad=False
                )
    return before
