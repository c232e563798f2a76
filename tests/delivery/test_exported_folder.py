"""Validating an exported folder proves the folder: each change to one of its files is named."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from command_line import Ran, mofq
from conftest import TinyCheckpoint
from emulated import validate
from exported import STORABLE, export, mixed_recipe, uniform_recipe
from families import copy_with_config, copy_with_tensors, long_but
from safetensors.torch import load_file, save_file

from mofq.decision import recipe_from_layers
from mofq.decision.recipe import Recipe, RecipeCache
from mofq.delivery.export.compressed_tensors import (
    decoding,
    encoding,
    find_folder_deviations,
    model_from_folder,
    recipe_from_folder,
)
from mofq.delivery.export.compressed_tensors.check_files import json_differences
from mofq.evidence.corpora import load_text
from mofq.exceptions import BackendError
from mofq.model.checkpoint.headers import open_checkpoint, open_stored
from mofq.model.layers import find_layers

PLAN: dict[str, Any] = {"tokens": 50, "sequence_length": 16}
Q = "model.layers.0.self_attn.q_proj"
GATE = "model.layers.0.mlp.gate_proj"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text("The quick brown fox jumps over the lazy dog, and sleeps well. " * 3)
    return path


@pytest.fixture(scope="module")
def original(tiny: TinyCheckpoint) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def folder(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six schemes in turn and a cache in FP8. Not to be changed in place."""
    recipe = with_cache(mixed_recipe(original), original)
    return export(original, recipe, tmp_path_factory.mktemp("exported") / "folder").folder


def with_cache(recipe: Recipe, model: Path) -> Recipe:
    caches = find_layers(open_checkpoint(str(model))).caches
    chosen = (
        RecipeCache(cache.name, "kv:fp8_e4m3.tensor", {"k": 3.0, "v": 5.0}) for cache in caches
    )
    return replace(recipe, kv_cache=tuple(chosen))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document that is no mapping with keys."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, inner in enumerate(value):
            yield from leaves(inner, (*path, number))
    else:
        yield path


def mutated(value: Any) -> Any:
    """Another value of the same type, where there is one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return [*value, "x"]
    return {"x": 1}  # of null, or of an empty mapping


def written_with(source: Path, target: Path, path: tuple[Any, ...], value: Any) -> None:
    """A JSON file again, with another value at a path; None takes the key away."""
    content = json.loads(source.read_text("utf-8"))
    place = content
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    target.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_every_changed_or_missing_field_of_a_file_is_named(
    name: str, original: Path, folder: Path, tmp_path: Path
) -> None:
    checkpoint, recipe = open_checkpoint(str(original)), mixed_recipe(original)
    recipe = with_cache(recipe, original)
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    content = json.loads((folder / name).read_text("utf-8"))
    paths = list(leaves(content))
    assert len(paths) >= 3
    for path in paths:
        value = content
        for key in path:
            value = value[key]
        for other in (mutated(value), None):
            written_with(folder / name, changed / name, path, other)
            found = find_folder_deviations(checkpoint, recipe, open_stored(str(changed)))
            first = next(found, None)
            assert first is not None, path
            named = ": ".join(map(str, (name, *path)))
            # Where an item of a list is gone, the list is named; of an empty mapping, what is new.
            assert named.startswith(first.layer) or first.layer == f"{named}: x"


def test_every_changed_tensor_is_named(original: Path, folder: Path, tmp_path: Path) -> None:
    checkpoint, recipe = open_checkpoint(str(original)), mixed_recipe(original)
    recipe = with_cache(recipe, original)
    stored = open_stored(str(folder))
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    for name, info in stored.tensors.items():
        with (changed / info.file.name).open("r+b") as file:
            # The lowest bit of the last element.
            place = info.start + info.nbytes - info.nbytes // max(1, _numel(info.shape))
            file.seek(place)
            before = file.read(1)
            file.seek(place)
            file.write(bytes([before[0] ^ 1]))
            file.flush()
            found = list(find_folder_deviations(checkpoint, recipe, open_stored(str(changed))))
            assert [deviation.layer for deviation in found] == [name]
            file.seek(place)
            file.write(before)


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def test_files_that_are_missing_or_new_are_named(
    original: Path, folder: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    (changed / "tokenizer_config.json").unlink()
    (changed / "chat_template.jinja").write_text("{{ messages }}")
    (changed / "notes.md").write_text("what people add is theirs")
    for stray in ("model-00002-of-00002.safetensors", "pytorch_model.bin"):
        (changed / stray).write_bytes(b"weights of another export")
    recipe = with_cache(mixed_recipe(original), original)
    found = find_folder_deviations(
        open_checkpoint(str(original)), recipe, open_stored(str(changed))
    )
    assert [one.layer for one in found] == [
        *("model-00002-of-00002.safetensors", "pytorch_model.bin"),
        *("chat_template.jinja", "tokenizer_config.json"),
    ]


#: File -> content: what engines read before or beside the config, and an export never holds.
READ_ELSEWHERE = {
    "hf_quant_config.json": "{}",
    "quantize_config.json": "{}",
    "params.json": "{}",
    "tokenizer.model.v3": "",
    "adapter_config.json": "{}",
    "modules.json": "[]",
    "additional_chat_templates/rag.jinja": "{{ messages }}",
}


@pytest.mark.parametrize("name", READ_ELSEWHERE)
def test_a_stray_config_of_another_kind_is_named(
    name: str, original: Path, folder: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    (changed / name).parent.mkdir(exist_ok=True)
    (changed / name).write_text(READ_ELSEWHERE[name])
    assert names_of_deviations(original, changed) == [name]


@pytest.mark.parametrize("is_named", [False, True])
def test_code_beside_a_config_is_compared_where_the_config_names_it(
    is_named: bool, original: Path, tmp_path: Path
) -> None:
    code = {"auto_map": {"AutoTokenizer": "tok.T"}} if is_named else {}
    model = copy_with_config(original, tmp_path / "model", lambda config: config.update(code))
    (model / "tok.py").write_text("T = 1")
    recipe = uniform_recipe(open_checkpoint(str(model)), "int4.channel")
    changed = export(model, recipe, tmp_path / "changed").folder
    (changed / "tok.py").write_text("T = 2")
    found = find_folder_deviations(open_checkpoint(str(model)), recipe, open_stored(str(changed)))
    assert [one.layer for one in found] == ["tok.py"] * is_named


@pytest.mark.parametrize("shard", ["consolidated.00.safetensors", "b.tensors", "b.bin"])
def test_shards_under_names_that_engines_do_not_read_are_named(
    shard: str, original: Path, folder: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    shard_in_two(changed, "model-00001-of-00002.safetensors", shard)
    assert names_of_deviations(original, changed) == [shard]


def test_shards_of_other_sizes_and_a_config_in_another_order_are_the_same_folder(
    original: Path, folder: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    shard_in_two(changed, "a.safetensors", "b.safetensors")
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    quantization["config_groups"] = dict(reversed(quantization["config_groups"].items()))
    (changed / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert names_of_deviations(original, changed) == []


def test_a_key_that_stands_twice_in_a_tokenizer_is_named(
    original: Path, folder: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    path = changed / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace('"model"', '"model": {}, "model"', 1), "utf-8")
    assert names_of_deviations(original, changed) == ["tokenizer.json"]


def shard_in_two(folder: Path, first: str, second: str) -> None:
    """The weights of one file in two, under these names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {first: names[::2], second: names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def names_of_deviations(original: Path, changed: Path) -> list[str]:
    recipe = with_cache(mixed_recipe(original), original)
    found = find_folder_deviations(
        open_checkpoint(str(original)), recipe, open_stored(str(changed))
    )
    return [one.layer for one in found]


def edited_config(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], Path]:
    return lambda source, target: copy_with_config(source, target, edit)


def edited_quantization(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], Path]:
    return edited_config(lambda config: edit(config["quantization_config"]))


def edited_tensors(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], Path]:
    return lambda source, target: copy_with_tensors(source, target, edit)


def swap_two_tokens(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    content = json.loads((source / "tokenizer.json").read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["z"] = vocabulary["z"], vocabulary["e"]
    (target / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return target


def run_validate(original: Path, folder: Path, text: Path) -> Ran:
    windows = ("--tokens", "50", "--sequence-length", "16")
    return mofq("validate", original, folder, "--text", text, *windows, "--json")


#: What is changed in a folder that still runs, and what is named.
RUNS: dict[str, tuple[Callable[[Path, Path], Path], tuple[str, ...]]] = {
    "activation": (
        edited_config(lambda config: config.update(hidden_act="relu")),
        ("config.json: hidden_act: needed 'silu', found 'relu'",),
    ),
    "epsilon": (
        edited_config(lambda config: config.update(rms_norm_eps=0.5)),
        ("config.json: rms_norm_eps: needed 1e-06, found 0.5",),
    ),
    "rope": (
        edited_config(lambda config: config["rope_parameters"].update(rope_theta=10.0)),
        ("config.json: rope_parameters: rope_theta: needed 10000.0, found 10.0",),
    ),
    "inputs": (
        edited_quantization(lambda c: c["config_groups"]["group_0"].update(input_activations=None)),
        (f"{Q}: the recipe's scheme is",),
    ),
    "cache": (
        edited_quantization(lambda config: config.update(kv_cache_scheme=None)),
        ("layers.0.attn.kv_cache: needed the cache in 'kv:fp8_e4m3.tensor', found bf16",),
    ),
    "norm": (
        edited_tensors(lambda tensors: tensors["model.norm.weight"][:64].mul_(4)),
        ("model.norm.weight: is not the original's",),
    ),
    "codes": (
        edited_tensors(lambda tensors: tensors[f"{Q}.weight"].neg_()),
        (f"{Q}.weight: differs from row 0 on",),
    ),
    "scale": (
        edited_tensors(lambda tensors: tensors[f"{GATE}.weight_scale"].mul_(2)),
        (f"{GATE}.weight_scale: differs from row 0 on",),
    ),
    "tokens": (swap_two_tokens, ("tokenizer.json: model: vocab: e: needed",)),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_changed_folder_is_run_as_it_is_and_not_enforced(
    name: str, original: Path, folder: Path, text_file: Path, tmp_path: Path
) -> None:
    change, named = RUNS[name]
    as_exported = run_validate(original, folder, text_file)
    changed = run_validate(original, change(folder, tmp_path / "changed"), text_file)
    assert as_exported.code == 0
    assert json.loads(as_exported.out)["enforced"] is True
    assert changed.code == 1
    found = json.loads(changed.out)
    assert found["enforced"] is False
    said = [f"{one['layer']}: {one['reason']}" for one in found["deviations"]]
    for words in named:
        assert any(each.startswith(words) for each in said), said
    # What differs on disk is not named again for the model in memory.
    layers = [
        one["layer"].removesuffix(".weight").removesuffix(".weight_scale")
        for one in found["deviations"]
    ]
    assert len(layers) == len(set(layers)), said
    # What is reported is the divergence of what lies in the folder.
    assert found["kl_nats_per_token"] != json.loads(as_exported.out)["kl_nats_per_token"]


#: What is changed in a folder that engines cannot load, or would load otherwise; what is named.
FAILS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "targets": (
        edited_quantization(lambda c: c["config_groups"]["group_0"].update(targets=None)),
        "config_groups: group_0: targets: needed a list of names and expressions, found None",
    ),
    "ignore is a text": (
        edited_quantization(lambda config: config.update(ignore="re:.*")),
        "ignore: needed a list of names and expressions, found 're:.*'",
    ),
    "everything is ignored": (
        edited_quantization(lambda config: config.update(ignore=["re:.*"])),
        f"{Q!r} has scales and no config group targets it",
    ),
    "no quantization_config": (
        edited_config(lambda config: config.pop("quantization_config")),
        "quantization_config: needed {",
    ),
    "width": (
        edited_config(lambda config: config.update(num_attention_heads=2)),
        "config.json: num_attention_heads: needed 4, found 2",
    ),
}


def test_names_that_a_list_lacks_and_has_besides_are_told() -> None:
    (one,) = json_differences(["a", "b", "c"], ["a", "d"], "config.json: targets")
    assert (
        one.reason == "lacks 2 of 3 names, such as b, and has 1 that are not known here, such as d"
    )
    (other,) = json_differences(["a", "a"], ["a"], "x")
    assert other.reason == "needed ['a', 'a'], found ['a']"


@pytest.mark.parametrize("name", FAILS)
def test_a_folder_that_cannot_be_run_is_refused_and_its_change_named(
    name: str, original: Path, folder: Path, text_file: Path, tmp_path: Path
) -> None:
    change, named = FAILS[name]
    ran = run_validate(original, change(folder, tmp_path / "changed"), text_file)
    assert ran.code == 1
    assert named in ran.err
    assert "The folder is not what its recipe says" in ran.err


def test_a_packer_that_flips_columns_is_caught_by_the_decoder(
    original: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = load_text(str(text_file))
    recipe = uniform_recipe(open_checkpoint(str(original)), "int4.channel")
    right = export(original, recipe, tmp_path / "right").folder
    good = validate(str(original), right, text, **PLAN)
    pack = encoding.pack_words
    monkeypatch.setattr(encoding, "pack_words", lambda codes, bits: pack(codes.flip(1), bits))
    wrong = export(original, recipe, tmp_path / "wrong").folder
    bad = validate(str(original), wrong, text, **PLAN)
    # The packer's own bytes are as it makes them: 14 layers are named by what is decoded.
    assert (good.enforced, bad.enforced, len(bad.deviations)) == (True, False, 14)
    assert bad.kl_nats_per_token > 2 * good.kl_nats_per_token


@pytest.mark.parametrize("module", [decoding, model_from_folder, recipe_from_folder])
def test_what_reads_a_folder_uses_nothing_of_what_writes_it(module: ModuleType) -> None:
    source = inspect.getsource(module)
    for writer in ("encoding", "storage", "plan", "quantization_config", "export"):
        assert f"from mofq.delivery.export.compressed_tensors.{writer} import" not in source


@pytest.mark.parametrize(
    "scheme",
    long_but(STORABLE, "int4.g64.asym", "fp8_e4m3.tensor+fp8_e4m3.tensor", "nvfp4+nvfp4"),
)
def test_a_folder_diverges_as_its_recipe_is_emulated(
    scheme: str, original: Path, text_file: Path, tmp_path: Path
) -> None:
    text = load_text(str(text_file))
    recipe = uniform_recipe(open_checkpoint(str(original)), scheme)
    exported = export(original, recipe, tmp_path / "out").folder
    found, emulated = (validate(str(original), one, text, **PLAN) for one in (exported, recipe))
    assert found.enforced is True, found.deviations
    assert found.bits_per_weight == emulated.bits_per_weight
    # A global scale is stored as its reciprocal, a static maximum as its scale: both are rounded
    # once more, and an input at the middle of two codes may then take the other one.
    if "nvfp4" in scheme or scheme.endswith(".tensor"):
        assert found.kl_nats_per_token == pytest.approx(emulated.kl_nats_per_token, rel=1e-2)
    else:
        assert found.windows == emulated.windows


def test_biases_are_exported_and_run(tiny: TinyCheckpoint, text_file: Path, tmp_path: Path) -> None:
    model = tiny("starcoder2")  # biases of layers and of norms
    recipe = uniform_recipe(open_checkpoint(str(model)), "int4.g64")
    folder = export(model, recipe, tmp_path / "out").folder
    given, written = (load_file(one / "model.safetensors") for one in (model, folder))
    biases = [name for name in given if name.endswith(".bias")]
    assert len(biases) == 2 * 8 + 1
    for name in biases:
        assert bool(given[name].any())
        assert torch.equal(given[name], written[name])
    text = load_text(str(text_file))
    found, emulated = (validate(str(model), one, text, **PLAN) for one in (folder, recipe))
    assert found.enforced is True, found.deviations
    assert found.windows == emulated.windows


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", long_but(["mixtral", "qwen3_moe", "deepseek_v3"], "mixtral"))
def test_experts_under_other_names_than_the_originals_are_proved(
    family: str, fused: bool, tiny: TinyCheckpoint, text_file: Path, tmp_path: Path
) -> None:
    model = tiny(family, fused=fused)
    recipe = mixed_recipe(model)
    exported = export(model, recipe, tmp_path / "out").folder
    text = load_text(str(text_file))
    found, emulated = (validate(str(model), one, text, **PLAN) for one in (exported, recipe))
    assert found.enforced is True, found.deviations
    assert found.windows == emulated.windows


def test_a_backend_is_refused_for_a_folder(original: Path, folder: Path, text_file: Path) -> None:
    with pytest.raises(BackendError, match="backend 'torchao' applies recipes"):
        validate(str(original), folder, load_text(str(text_file)), backend="torchao", **PLAN)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_folder_is_proved_whether_its_head_and_embedding_are_quantized_or_nothing_is(
    quantized: bool, original: Path, text_file: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(str(original))
    scheme = "int8.channel" if quantized else "bf16"
    layers = find_layers(checkpoint, include_lm_head=True, include_embeddings=True)
    schemes = dict.fromkeys((group.name for group in layers.groups), scheme)
    recipe = recipe_from_layers(layers, schemes, checkpoint=checkpoint)
    assert [one.layers for one in recipe.groups[-2:]] == [("lm_head",), ("model.embed_tokens",)]
    exported = export(original, recipe, tmp_path / "out").folder
    text = load_text(str(text_file))
    found, emulated = (validate(str(original), one, text, **PLAN) for one in (exported, recipe))
    assert found.enforced is True, found.deviations
    assert found.windows == emulated.windows
    assert (found.kl_nats_per_token > 0) is quantized


def test_a_cache_that_flags_ask_for_is_the_recipes(
    original: Path, text_file: Path, tmp_path: Path
) -> None:
    plain = uniform_recipe(open_checkpoint(str(original)), "int8.channel")
    text = load_text(str(text_file))
    names = [cache.name for cache in find_layers(open_checkpoint(str(original))).caches]
    for scheme in ("kv:int8.token_head", "kv:fp8_e4m3.unscaled"):
        caches = (RecipeCache(names[0], "bf16"), RecipeCache(names[1], scheme))
        recipe = replace(plain, kv_cache=caches)
        exported = export(original, recipe, tmp_path / scheme[3:7]).folder
        found, emulated = (validate(str(original), one, text, **PLAN) for one in (exported, recipe))
        assert found.enforced is True, found.deviations
        assert found.windows == emulated.windows
