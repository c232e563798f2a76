"""Whatever is offered can be exported: engines, search spaces, exports and families crossed.

From headers alone: what an exporter refuses, it refuses before it reads a weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import groupby

import pytest
from conftest import TinyCheckpoint
from exported import make_recipe, uniform_recipe
from families import TINY_FAMILIES, long_but

from mofq.decision.recipe import Recipe, RecipeCache
from mofq.delivery.backends import EXPORTERS, RECIPE_EXPORTERS
from mofq.delivery.export.auto_round import auto_round_config
from mofq.delivery.export.compressed_tensors.export import serve_command
from mofq.delivery.export.compressed_tensors.plan import plan_export
from mofq.delivery.export.compressed_tensors.quantization_config import quantization_config
from mofq.delivery.export.llama_cpp import llama_cpp_arguments
from mofq.delivery.export.llm_compressor import llm_compressor_recipe
from mofq.delivery.export.modelopt import modelopt_config
from mofq.delivery.export.torchao_config import torchao_config
from mofq.engines import ENGINES, cache_legality, find_engine, legality
from mofq.engines.exports import EXPORT_PROBLEMS, export_problem
from mofq.evidence.spaces import find_search_spaces, load_search_space, shape_rejection
from mofq.exceptions import BackendError
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.kv_schemes import CacheScheme, cache_rejection, static_keys
from mofq.model.layers import FusionGroup, ModelLayers, find_layers
from mofq.numbers.schemes import Scheme


def plan_folder(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """All of an export to compressed-tensors but the tensors."""
    plan = plan_export(checkpoint, recipe)
    serve_command(plan, checkpoint.folder)
    return json.dumps(quantization_config(plan))


#: What an engine reads -> its exporter, as far as it can refuse.
EXPORT: dict[str, Callable[[Checkpoint, Recipe], str]] = {
    "compressed-tensors": plan_folder,
    "modelopt": modelopt_config,
    "torchao": torchao_config,
}
#: Exporters for tools that are no engines: what is searched for cannot be known to be for them.
OTHERS: dict[str, Callable[[Checkpoint, Recipe], str]] = {
    "auto-round": auto_round_config,
    "llama.cpp": llama_cpp_arguments,
    "llm-compressor": llm_compressor_recipe,
}


@cache
def engine_names() -> tuple[str, ...]:
    """Every engine, in each of its versions, and on two devices where it can cut layers."""
    versions = [f"{name}@{one}" for name, engine in ENGINES.items() for one in engine.versions]
    cut = [f"{name}:tp=2" for name, engine in ENGINES.items() if engine.can_cut]
    return (*ENGINES, *versions, *cut)


@cache
def schemes() -> tuple[Scheme, ...]:
    """What some search space that comes with mofq offers, quantized."""
    spaces = (load_search_space(name) for name in find_search_spaces())
    every = dict.fromkeys(scheme for space in spaces for scheme in space.schemes)
    return tuple(scheme for scheme in every if not scheme.is_unquantized)


@cache
def cache_schemes() -> tuple[CacheScheme, ...]:
    """The formats of the KV cache that some search space offers."""
    spaces = (load_search_space(name) for name in find_search_spaces())
    return tuple({scheme.name: scheme for space in spaces for scheme in space.kv_cache}.values())


def kind(group: FusionGroup) -> str:
    """Of fusion groups that differ in the number of their decoder layer alone: one text."""
    body, _, rest = re.sub(r"\.\d+\.", ".N.", group.layers[0].name, count=1).partition(".N.")
    shapes = [(one.module, one.out_features, one.in_features) for one in group.layers]
    return repr((body, rest, group.name.split(".")[2:], shapes))


def kinds(layers: ModelLayers) -> Iterator[list[FusionGroup]]:
    """The fusion groups of each kind."""
    for _, groups in groupby(sorted(layers.groups, key=kind), key=kind):
        yield list(groups)


def fitting(group: FusionGroup) -> list[Scheme]:
    """Those that the shapes of a fusion group take, which every offer asks first."""
    return [
        scheme
        for scheme in schemes()
        if not any(shape_rejection(scheme, layer) for layer in group.layers)
    ]


#: What `offered_for` answered, which families have in common.
_ANSWERS: dict[tuple[str, str], list[Scheme]] = {}


def offered_for(group: FusionGroup, export: str) -> list[Scheme]:
    """The schemes that some engine which reads an export is offered for a fusion group."""
    key = (export, kind(group))
    if key not in _ANSWERS:
        engines = {name: find_engine(name) for name in engine_names()}
        checks = [(one.title, legality(n)) for n, one in engines.items() if one.reads == export]
        legal = []
        for scheme in fitting(group):
            reasons = [(title, check(scheme, group)) for title, check in checks]
            assert all(reason is None or reason.startswith(title) for title, reason in reasons)
            if any(reason is None for _, reason in reasons):
                legal.append(scheme)
        _ANSWERS[key] = legal
    return _ANSWERS[key]


def offered(layers: ModelLayers, export: str) -> dict[str, list[Scheme]]:
    """Fusion group -> the schemes that some engine which reads an export is offered for it."""
    return {
        group.name: offered_for(groups[0], export) for groups in kinds(layers) for group in groups
    }


def recipes(checkpoint: Checkpoint, options: dict[str, list[Scheme]]) -> Iterator[Recipe]:
    """Mixtures in which each fusion group has each of its schemes once, and bf16."""
    names = {group: ["bf16", *(one.name for one in some)] for group, some in options.items()}
    for turn in range(max(map(len, names.values()))):

        def choose(number: int, group: FusionGroup, turn: int = turn) -> str:
            some = names[group.name]
            return some[(turn + number) % len(some)]

        yield make_recipe(checkpoint, choose)


def only(layer: str, scheme: str) -> Callable[[int, FusionGroup], str]:
    """For `make_recipe`: a scheme for the fusion group of one layer, and bf16 for the others."""
    return lambda _, group: scheme if group.layers[0].name == layer else "bf16"


def test_every_engine_and_every_exporter_is_crossed() -> None:
    assert EXPORT.keys() == EXPORT_PROBLEMS.keys() == {one.reads for one in ENGINES.values()}
    assert EXPORT.keys() | OTHERS.keys() == EXPORTERS.keys() | RECIPE_EXPORTERS.keys()
    assert len(schemes()) > 50


@pytest.mark.parametrize("family", long_but(TINY_FAMILIES, "gpt2", "mixtral"))
def test_what_is_offered_for_an_engine_is_exported(family: str, tiny: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    layers = find_layers(checkpoint)
    for export, write in EXPORT.items():
        options = offered(layers, export)
        assert any(options.values()) == (family != "gpt2" or export == "compressed-tensors"), export
        for recipe in recipes(checkpoint, options):
            is_quantized = any(group.scheme != "bf16" for group in recipe.groups)
            assert json.loads(write(checkpoint, recipe)) or not is_quantized


@pytest.mark.parametrize("family", long_but(TINY_FAMILIES, "mixtral"))
def test_what_no_export_holds_is_refused_by_the_exporter_too(
    family: str, tiny: TinyCheckpoint
) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    groups = [groups[0] for groups in kinds(find_layers(checkpoint))]
    for export, write in EXPORT.items():
        refused = {
            (scheme.name, problem): group.layers[0].name
            for group in groups
            for scheme in fitting(group)
            if (problem := export_problem(export, scheme, group))
        }
        assert refused
        for (scheme, problem), layer in refused.items():
            recipe = make_recipe(checkpoint, only(layer, scheme))
            with pytest.raises(BackendError) as raised:
                write(checkpoint, recipe)
            assert str(raised.value).startswith(f"{layer}: "), problem


@pytest.mark.parametrize("family", long_but(TINY_FAMILIES, "llama"))
def test_what_is_offered_of_the_cache_is_exported(family: str, tiny: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    caches = find_layers(checkpoint).caches
    plain = uniform_recipe(checkpoint, "bf16")
    asked: set[str] = set()
    for name in engine_names():
        check = cache_legality(name)
        for scheme in cache_schemes():
            legal = [
                RecipeCache(one.name, scheme.name, dict.fromkeys(static_keys(scheme, one), 3.0))
                for one in caches
                if cache_rejection(scheme, one) is None and check(scheme.name, one) is None
            ]
            if legal:
                # A search for an engine takes one format, and leaves single layers as they are.
                first = RecipeCache(legal[0].name, "bf16")
                for chosen in (legal, [first, *legal[1:]]):
                    recipe = replace(plain, kv_cache=tuple(chosen))
                    asked.add(EXPORT[find_engine(name).reads](checkpoint, recipe))
    assert len(asked) > 3 or not caches


@pytest.mark.parametrize("family", long_but(TINY_FAMILIES, "llama"))
def test_other_tools_are_given_a_file_or_a_reason(family: str, tiny: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    layers = find_layers(checkpoint).grouped_layers
    names = [layer.name for layer in layers]
    for write in OTHERS.values():
        for scheme in schemes():
            if any(shape_rejection(scheme, layer) for layer in layers):
                continue
            recipe, reason = uniform_recipe(checkpoint, scheme.name), ""
            try:
                text = write(checkpoint, recipe)
            except BackendError as refused:
                text, reason = "", str(refused)
            assert text or reason.partition(": ")[0] in names
