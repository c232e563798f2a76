"""A validation that runs the model layer by layer finds what one with the whole model finds."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from calibrated import calibrate_folder, some_tokens
from conftest import TinyCheckpoint
from emulated import recipe_of
from families import TINY_FAMILIES, copy_with_tensors, long_but
from fp8_sources import write_fp8
from safetensors.torch import save
from tiny_types import write_type

from mofq.api.options import Windows
from mofq.api.validate import validate
from mofq.decision.recipe import Recipe, RecipeCache, RecipeGroup, write_recipe
from mofq.decision.tuning import Tuning, tuned_file
from mofq.delivery.apply.emulate import Prepared
from mofq.delivery.export.compressed_tensors import export_compressed_tensors
from mofq.delivery.rewriting.choose_scales import Choice, choose_scales
from mofq.delivery.rewriting.remake import base_of, make_base, rewriting_of
from mofq.delivery.rewriting.rotate import plan_rotation, rotated_model
from mofq.delivery.rewriting.sites import find_sites
from mofq.delivery.tuning.norms import find_norms
from mofq.delivery.validation import Validation, streamed_kl, validate_many
from mofq.delivery.validation import streamed as streamed_validation
from mofq.delivery.validation.measured_kl import MeasuredKl
from mofq.delivery.validation.streamed_kl import StreamedKl
from mofq.evidence.calibration.stats import Stats, read_stats
from mofq.evidence.corpora import load_text
from mofq.exceptions import MofqError, StreamingError
from mofq.files.locks import hold_folder
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.checkpoint.tensors import read_tensor
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.layers import find_layers, split_experts
from mofq.model.loading import load_model
from mofq.model.streaming.replay import Replayer
from mofq.model.streaming.streamed import StreamedModel
from mofq.model.streaming.weights import UnitWeights
from mofq.numbers.schemes import parse_scheme

SCHEMES = ("int4.g32", "int8.channel+int8.token", "int4.g32+int8.token")
PLAN: dict[str, Any] = {"tokens": 64, "sequence_length": 32}


def both(folder: Path, candidates: Sequence[Any], **options: Any) -> list[list[Validation]]:
    """Without times: resident, then streamed."""
    return [
        [
            replace(one, seconds=0, seconds_original=0)
            for one in validate_many(
                str(folder),
                candidates,
                load_text("demo-en"),
                execution=execution,  # type: ignore[arg-type]
                **PLAN,
                **options,
            )
        ]
        for execution in ("resident", "streamed")
    ]


def recipes(folder: Path) -> list[Recipe]:
    return [recipe_of(open_checkpoint(str(folder)), scheme) for scheme in SCHEMES]


@pytest.mark.parametrize("family", long_but(TINY_FAMILIES, "gemma3_text", "qwen3_moe", "gpt2"))
def test_recipes_of_a_family_have_the_same_validations_streamed(
    family: str, tiny: TinyCheckpoint
) -> None:
    resident, streamed = both(tiny(family), recipes(tiny(family)))
    assert streamed == resident
    assert all(one.enforced for one in streamed)
    assert len({one.kl_nats_per_token for one in streamed}) == len(SCHEMES)


@pytest.mark.parametrize("name", long_but(("bert", "gemma3n_text", "zamba2"), "bert"))
def test_a_recipe_and_its_folder_have_the_same_validation_streamed(
    name: str, tmp_path: Path
) -> None:
    folder = write_type(name, tmp_path / "model")
    recipe = recipes(folder)[1]
    export_compressed_tensors(open_checkpoint(str(folder)), recipe, tmp_path / "exported")
    resident, streamed = both(folder, [recipe, str(tmp_path / "exported"), str(folder)])
    assert streamed == resident
    assert streamed[0].kl_nats_per_token == streamed[1].kl_nats_per_token > 0
    assert streamed[2].kl_nats_per_token == 0


def test_what_deviates_in_a_folder_is_found_streamed_as_resident(
    tiny_llama: Path, tmp_path: Path
) -> None:
    recipe = recipes(tiny_llama)[1]
    exported = tmp_path / "exported"
    export_compressed_tensors(open_checkpoint(str(tiny_llama)), recipe, exported)

    def change(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
        tensors["model.layers.0.input_layernorm.weight"][0] += 1
        tensors["model.norm.weight"][0] += 1

    changed = copy_with_tensors(exported, tmp_path / "changed", change)
    resident, streamed = both(tiny_llama, [str(changed)])
    assert streamed == resident
    assert streamed[0].enforced is False
    assert len(streamed[0].deviations) == 3


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_an_fp8_source_whose_layers_are_partly_kept_is_the_same_streamed(
    family: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = write_fp8(tiny(family), tmp_path / "fp8", "fp8 blocks")
    recipe = recipe_of(
        open_checkpoint(str(folder)), "bf16", **{"layers_1_mlp_down": "int4.g32+int8.token"}
    )
    resident, streamed = both(folder, [recipe, recipes(folder)[0]])
    assert streamed == resident
    assert streamed[0].enforced
    assert 0 < streamed[0].kl_nats_per_token < streamed[1].kl_nats_per_token


def test_a_head_with_a_scheme_and_rounded_caches_are_the_same_streamed(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    plain = recipe_of(checkpoint, "int4.g32")
    layers = find_layers(checkpoint, include_lm_head=True)
    head = RecipeGroup(layers.groups[-1].name, "int8.channel+int8.token", ("lm_head",))
    with_head = replace(plain, groups=(*plain.groups, head), unquantized=())
    names = [cache.name for cache in layers.caches]
    caches = (RecipeCache(names[0], "bf16"), RecipeCache(names[1], "kv:int4.token_head"))
    cached = replace(plain, kv_cache=caches)
    resident, streamed = both(tiny_llama, [plain, with_head, cached])
    assert streamed == resident
    assert all(one.enforced for one in streamed)
    assert len({one.kl_nats_per_token for one in streamed}) == 3


@pytest.mark.parametrize(
    "name", long_but(("gemma3_text", "llama", "gpt2", "starcoder2"), "gemma3_text", "llama")
)
def test_an_embedding_with_a_scheme_is_the_same_streamed(name: str, tmp_path: Path) -> None:
    folder = write_type(name, tmp_path / "model")
    checkpoint = open_checkpoint(str(folder))
    layers = find_layers(checkpoint, include_lm_head=True, include_embeddings=True)
    plain = recipe_of(checkpoint, "int4.g32")
    vocabulary = [group for group in layers.groups if group.layers[0].decoder_layer is None]
    mixed = []
    for schemes in (("int8.channel", "int4.g32"), ("bf16", "int8.channel")):
        entries = (
            RecipeGroup(group.name, scheme, tuple(layer.name for layer in group.layers))
            for group, scheme in zip(vocabulary, schemes, strict=False)
        )
        mixed.append(replace(plain, groups=(*plain.groups, *entries), unquantized=()))
    resident, streamed = both(folder, [mixed[0], plain, mixed[1], mixed[0]])
    assert streamed == resident
    assert all(one.enforced for one in streamed)
    assert streamed[0].kl_nats_per_token != streamed[1].kl_nats_per_token
    assert streamed[0].kl_nats_per_token == streamed[3].kl_nats_per_token


def test_experts_with_schemes_of_their_own_are_the_same_streamed(tiny: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(str(tiny("qwen3_moe")))
    layers = find_layers(checkpoint)
    mixed: list[Recipe] = []
    for by, others in (("expert", "int4.g32+int8.token"), ("projection", "bf16"), ("layer", "")):
        entries = [
            RecipeGroup(
                group.name,
                others if number % 2 and "moe.experts." in group.name else "int8.channel",
                tuple(layer.name for layer in group.layers),
            )
            for number, group in enumerate(split_experts(layers, by).groups)  # type: ignore[arg-type]
        ]
        mixed.append(replace(recipe_of(checkpoint, "int8.channel"), groups=tuple(entries)))
    resident, streamed = both(checkpoint.folder, [*mixed, mixed[0]])
    assert streamed == resident
    assert all(one.enforced for one in streamed)
    assert len({one.kl_nats_per_token for one in streamed}) == len(mixed)


def rewritten(folder: Path, work: Path, scheme: str) -> tuple[list[Recipe], Stats]:
    """A uniform recipe of the model rotated, and one of it with scales moved after that."""
    original = open_checkpoint(str(folder))
    stats = calibrate_folder(folder, work / "stats", {"a": some_tokens(4, 24)}, inputs=True)
    rotation = rotated_model(plan_rotation(original, 3), 3)
    choices: tuple[Choice, ...] = ()
    made = []
    for name in ("rotated", "moved"):
        rewriting = rewriting_of(original, stats, choices, rotation=rotation)
        folders = (work / name, work / f"{name}.stats")
        base = make_base(rewriting, original, stats, folders=folders)
        plain = recipe_of(base.checkpoint, scheme)
        weights = hash_weights(base.checkpoint)
        made.append(replace(plain, weights_sha256=weights, rewriting=rewriting))
        choices = tuple(
            choose_scales(
                base.checkpoint,
                site,
                parse_scheme(SCHEMES[1]),
                stats=read_stats(folders[1]),
                method="smoothquant",
            )
            for site in find_sites(base.checkpoint, find_layers(base.checkpoint))
        )
    assert rewriting.sites
    return made, stats


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_recipes_that_rewrite_the_model_are_the_same_streamed(
    family: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny(family)
    made, stats = rewritten(folder, tmp_path, SCHEMES[1])
    plain = recipes(folder)[1]
    with base_of(made[1], open_checkpoint(str(folder)), stats.folder) as base:
        exported = tmp_path / "exported"
        export_compressed_tensors(base.checkpoint, made[1], exported, stats=base.stats)
    candidates = [made[0], plain, made[1], str(exported)]
    resident, streamed = both(folder, candidates, stats=stats.folder)
    assert streamed == resident
    assert all(one.enforced for one in streamed)
    assert streamed[2].kl_nats_per_token == streamed[3].kl_nats_per_token
    assert len({one.kl_nats_per_token for one in streamed}) == 3


def tuned(recipe: Recipe, checkpoint: Checkpoint) -> Recipe:
    """The recipe with every norm of the model a little off."""
    model = load_model(checkpoint.folder)
    norms = find_norms(model, checkpoint, find_layers(checkpoint).architecture)
    tensors = {
        name: (read_tensor(checkpoint.tensors[name]).float() * 1.02 + 0.01 * (n + 1)).to(norm.dtype)
        for n, norm in enumerate(norms)
        for name in norm.names
    }
    assert any("layers" not in name for name in tensors)  # outside of the decoder layers
    content = save(tensors)
    sha256 = hashlib.sha256(content).hexdigest()
    tuning = Tuning(
        file=tuned_file(sha256),
        sha256=sha256,
        decisions_sha256=recipe.decisions_sha256,
        mofq="0",
        tensors=len(tensors),
        steps=1,
        sequences=1,
        sequence_length=1,
        bos=False,
        corpora_sha256="0",
        held_out=1,
        kl_before=1.0,
        kl_after=0.5,
        kl_saved_stderr=0.1,
    )
    return replace(recipe, tuning=tuning, tuned=content)


@pytest.mark.parametrize("family", long_but(TINY_FAMILIES, "gemma3_text", "qwen3_moe", "gpt2"))
def test_tuned_norms_are_the_same_streamed(family: str, tiny: TinyCheckpoint) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    plain, other, _ = recipes(checkpoint.folder)
    resident, streamed = both(checkpoint.folder, [plain, tuned(plain, checkpoint), plain, other])
    assert streamed == resident
    assert all(one.enforced for one in streamed)
    assert [one.is_tuned for one in streamed] == [False, True, False, False]
    assert len({one.kl_nats_per_token for one in streamed}) == 3


def test_norms_that_were_tuned_after_a_rewriting_are_the_same_streamed(
    tiny_llama: Path, tmp_path: Path
) -> None:
    (_, moved), stats = rewritten(tiny_llama, tmp_path, SCHEMES[0])
    with base_of(moved, open_checkpoint(str(tiny_llama)), stats.folder) as base:
        recipe = tuned(moved, base.checkpoint)
    resident, streamed = both(tiny_llama, [recipe], stats=stats.folder)
    assert streamed == resident
    assert streamed[0].enforced


def test_norms_that_are_not_those_of_the_recipe_are_found_streamed(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    recipe = tuned(recipes(tiny_llama)[0], checkpoint)
    monkeypatch.setattr(Prepared, "tuned_targets", lambda *_: [])
    resident, streamed = both(tiny_llama, [recipe])
    assert streamed == resident
    assert recipe.tuning is not None
    assert len(streamed[0].deviations) == recipe.tuning.tensors


def test_a_layer_is_read_once_for_all_recipes(tiny_llama: Path) -> None:
    read: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        own = StreamedModel.unit_at
        patch.setattr(
            StreamedModel,
            "unit_at",
            lambda model, *rest: read.append(own(model, *rest)) or read[-1],
        )
        both(tiny_llama, recipes(tiny_llama))
    assert read == ["model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head"]


def test_a_backend_that_changes_a_whole_model_is_not_streamed(tiny_llama: Path) -> None:
    with pytest.raises(StreamingError, match="torchao"):
        validate_many(
            str(tiny_llama),
            recipes(tiny_llama),
            load_text("demo-en"),
            execution="streamed",
            backend="torchao",
            **PLAN,
        )


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_search_measures_the_same_recipes_streamed(family: str, tiny: TinyCheckpoint) -> None:
    folder, text = str(tiny(family)), load_text("demo-en")
    found = []
    for kind in (MeasuredKl, StreamedKl):
        with kind(folder, text, **PLAN) as objective:
            first, second, _ = recipes(tiny(family))
            # One that is left unfinished, and the same again.
            next(objective.evaluate(second))
            found.append([list(objective.evaluate(one)) for one in (first, second)])
    assert found[0] == found[1]
    assert len(found[0][0]) == PLAN["tokens"] // PLAN["sequence_length"]


def test_recipes_that_a_search_expects_run_together(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, units = UnitWeights.loaded, list[str]()

    def noted(self: UnitWeights, unit: str, **more: Any) -> Any:
        units.append(unit)
        return loaded(self, unit, **more)

    monkeypatch.setattr(UnitWeights, "loaded", noted)
    monkeypatch.setattr(streamed_kl, "_TOGETHER", 2)
    made = recipes(tiny_llama)
    once = ["model.embed_tokens", "model.layers.0", "model.layers.1", "lm_head"]
    with StreamedKl(str(tiny_llama), load_text("demo-en"), **PLAN) as objective:
        alone = [list(objective.evaluate(one)) for one in made]
        units.clear()
        objective.expect(made)
        assert [list(objective.evaluate(one)) for one in made[:2]] == alone[:2]
        assert units == once
        assert list(objective.evaluate(made[2])) == alone[2]
        assert units == 2 * once


def test_what_a_stopped_streamed_run_kept_goes_when_a_resident_one_ends(
    tiny_llama: Path, tmp_path: Path
) -> None:
    work = tmp_path / ".validation.json.streamed"

    def stop(stage: str, done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt(stage)

    arguments: Any = (str(tiny_llama), recipes(tiny_llama)[:1], load_text("demo-en"))
    with pytest.raises(KeyboardInterrupt):
        validate_many(*arguments, execution="streamed", work=work, progress=stop, **PLAN)
    assert any(work.rglob("*"))
    recipe = tmp_path / "recipe.yaml"
    write_recipe(arguments[1][0], recipe)
    windows = Windows(tokens=64, sequence_length=32)
    validate(tiny_llama, recipe, "demo-en", windows=windows, output=tmp_path / "validation.json")
    assert not work.exists()


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_what_the_disk_has_to_hold_is_said_and_no_more_is_kept(
    name: str, tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget, work, sizes, needed = Replayer.forget, tmp_path / "work", list[int](), list[int]()
    check = streamed_validation.check_room

    def noted(*given: Any, **more: Any) -> int:
        needed.append(check(*given, **more))
        return needed[0]

    def watched(self: Replayer, *rest: Any) -> None:
        sizes.append(sum(path.stat().st_size for path in work.rglob("step-*")))
        forget(self, *rest)

    monkeypatch.setattr(Replayer, "forget", watched)
    monkeypatch.setattr(streamed_validation, "check_room", noted)
    said: list[str] = []
    made = recipes(tiny(name))
    options: Any = {"work": work, "execution": "streamed", "tell": said.append, **PLAN}
    validate_many(str(tiny(name)), made, load_text("demo-en"), **options)
    assert needed[0] / 4 < max(sizes) <= needed[0]
    assert f"Between layers, about {needed[0] / 1e9:.2f} GB are kept in {work}." in said


@pytest.mark.parametrize("kind", ["validation", "search"])
def test_what_the_disk_cannot_hold_is_refused_before_a_layer_is_read(
    kind: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    monkeypatch.setattr(UnitWeights, "loaded", None)
    folder, text = str(tiny_llama), load_text("demo-en")
    begin: Any = partial(StreamedKl, folder, text, **PLAN)
    if kind == "validation":
        made = recipes(tiny_llama)
        begin = partial(validate_many, folder, made, text, execution="streamed", **PLAN)
    with pytest.raises(MofqError, match=r"between layers needs about [0-9,]+ bytes, found 1,000"):
        begin()


def test_two_runs_do_not_write_into_the_same_folder(tiny_llama: Path, tmp_path: Path) -> None:
    work = tmp_path / ".validation.json.streamed"
    (work / "of-another").mkdir(parents=True)
    arguments: Any = (str(tiny_llama), recipes(tiny_llama)[:1], load_text("demo-en"))
    with hold_folder(work, MofqError):
        with pytest.raises(MofqError, match="runs a model layer by layer there"):
            validate_many(*arguments, execution="streamed", work=work, **PLAN)
        validate_many(*arguments, execution="resident", work=work, **PLAN)
        assert (work / "of-another").exists()
    validate_many(*arguments, execution="streamed", work=work, **PLAN)
    assert not (work / "of-another").exists()
