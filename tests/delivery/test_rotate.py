"""Rotations: the model computes what it did, and its statistics are those of a calibration."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import calibrate_folder, read_sequence, some_tokens
from conftest import TinyCheckpoint
from exported import uniform_recipe
from families import TINY_FAMILIES, copy_with_config, copy_with_tensors, long_but
from fp8_sources import write_fp8
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mofq.decision.recipe import Recipe, load_recipe, write_recipe
from mofq.decision.rewriting import Rewriting, RotatedModel
from mofq.delivery.export.compressed_tensors import export_compressed_tensors
from mofq.delivery.rewriting import rotate as rotate_module
from mofq.delivery.rewriting.choose_scales import Choice
from mofq.delivery.rewriting.for_recipe import choose_for_recipe
from mofq.delivery.rewriting.moved_stats import write_rotated_stats
from mofq.delivery.rewriting.orthogonal import random_rotation
from mofq.delivery.rewriting.remake import Base, base_of, make_base, rewriting_of
from mofq.delivery.rewriting.residual_stream import Place, find_stream
from mofq.delivery.rewriting.rotate import (
    Turning,
    check_rotated,
    plan_rotation,
    rotated_model,
    write_rotated,
)
from mofq.evidence.calibration.stats import Stats, read_stats
from mofq.exceptions import RecipeError, RewriteError, StatsError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.layers import find_layers
from mofq.model.loading import load_model

INT8, FITTED = "int8.channel+int8.token", "int8.channel@nats~gptq+int8.token"
SEED = 3
TOKENS = some_tokens(1, 24, seed=5)
REFUSED = {
    "gemma": "engines take its lm_head from its embedding",
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), "norms what attention and MLP give"),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4", "glm4"), "norms what attention and MLP give"),
    **dict.fromkeys(("cohere2", "starcoder2", "opt", "gpt2"), "subtract the mean"),
}
ROTATED = tuple(name for name in TINY_FAMILIES if name not in REFUSED)


def rotate(model: Path, folder: Path, seed: int = SEED) -> Turning:
    """Write the rotated model into a folder."""
    turning = plan_rotation(open_checkpoint(str(model)), seed)
    write_rotated(turning, folder, seed=seed)
    return turning


def logits(folder: Path) -> Tensor:
    with torch.inference_mode():
        return load_model(folder)(TOKENS).logits.double()


def assert_same_function(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    before, after = logits(one), logits(other)
    assert float((after - before).abs().max()) < tolerance * float(before.abs().max())


@pytest.mark.parametrize("width", [1, 2, 12, 20, 28, 36, 64, 104, 576, 640, 896, 1536])
def test_a_width_with_a_hadamard_matrix_takes_one(width: int) -> None:
    rotation = random_rotation(width, SEED)
    q_II = rotation.turn(torch.eye(width))
    torch.testing.assert_close((q_II * width**0.5).abs(), torch.ones_like(q_II))
    torch.testing.assert_close(q_II @ q_II.T, torch.eye(width, dtype=torch.float64))
    assert width < 12 or not torch.equal(
        q_II, random_rotation(width, SEED + 1).turn(torch.eye(width))
    )


@pytest.mark.parametrize("width", [3, 18, 52, 100])
def test_another_width_takes_a_random_orthogonal_matrix(width: int) -> None:
    q_II = random_rotation(width, SEED).turn(torch.eye(width))
    torch.testing.assert_close(q_II @ q_II.T, torch.eye(width, dtype=torch.float64))
    assert float(q_II.abs().std()) > 0.1 / width**0.5


def test_neighbours_are_rotated_by_themselves_and_back() -> None:
    rotation = random_rotation(12, SEED)
    x_TI = torch.randn(3, 24, dtype=torch.float64)
    found = rotation.turn(x_TI)
    torch.testing.assert_close(found[:, 12:], x_TI[:, 12:] @ rotation.turn(torch.eye(12)))
    torch.testing.assert_close(rotation.turn_back(found), x_TI)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "family", long_but(ROTATED, "llama", "qwen2", "phi3", "mixtral", "deepseek_v3")
)
def test_a_rotated_model_computes_what_it_did(
    tiny: TinyCheckpoint, tmp_path: Path, family: str, tied: bool
) -> None:
    model = tiny(family, dtype=torch.float32, tie_word_embeddings=tied)
    turning = rotate(model, tmp_path / "out")
    assert_same_function(model, tmp_path / "out")
    before, after = (load_file(one / "model.safetensors") for one in (model, tmp_path / "out"))
    same = [name for name in before if torch.equal(before[name], after[name])]
    inside = ("q_norm", "k_norm", "q_a_layernorm", "kv_a_layernorm", "correction_bias", "q_b_proj")
    reads_bias = (".q_proj.bias", ".k_proj.bias", ".gate_proj.bias", ".up_proj.bias")
    assert all(any(word in name for word in (*inside, *reads_bias)) for name in same), same
    assert all(bool((after[name] == 1).all()) for name in turning.stream.norms)
    found = open_checkpoint(str(tmp_path / "out"))
    assert not find_layers(found).tied_lm_head
    head_bytes = before["model.embed_tokens.weight"].nbytes
    assert turning.untied_bytes == (head_bytes if tied else 0)
    assert turning.untied_bytes == sum(t.nbytes for t in after.values()) - sum(
        t.nbytes for t in before.values()
    )


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("seed_oss", {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}),
        ("deepseek_v3", {"attention_bias": True}),
        ("deepseek_v3", {"q_lora_rank": None}),
        ("mixtral", {"fused": True}),
        ("qwen2_moe", {"fused": True}),
        ("llama", {"hidden_size": 120, "head_dim": 18}),
    ],
)
def test_biases_fused_experts_and_odd_widths_are_rotated_too(
    tiny: TinyCheckpoint, tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    model = tiny(family, dtype=torch.float32, **options)
    rotate(model, tmp_path / "out")
    assert_same_function(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("deepseek_v3", {}),
        ("mixtral", {"fused": True}),
    ],
)
def test_few_rows_or_columns_are_multiplied_at_once_with_the_same_bytes(
    tiny: TinyCheckpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    options: dict[str, Any],
) -> None:
    model, sizes = tiny(family, **options), list[tuple[int, ...]]()
    rotate(model, tmp_path / "whole")
    turn = Turning.turn

    def watched(self: Turning, values: Tensor, place: Place) -> Tensor:
        sizes.append(tuple(values.shape))
        return turn(self, values, place)

    monkeypatch.setattr(Turning, "turn", watched)
    monkeypatch.setattr(rotate_module, "_BLOCK_ELEMENTS", 2048)
    turning = rotate(model, tmp_path / "parts")
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name
    one = {  # rows that are mixed, or an expert, at least
        shape for shape in sizes if len(shape) == 2 and math.prod(shape) > 2048
    }
    both_mixed = {
        turning.checkpoint.tensors[name].shape
        for name, place in turning.stream.places.items()
        if place.reads and place.values
    }
    heads = {shape for shape in one if shape[1] == turning.stream.head}
    assert one - heads <= both_mixed


def test_a_rotated_model_in_bfloat16_differs_by_its_rounding(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    model = tiny("llama", shard_size="200KB")
    for folder in ("out", "again"):
        rotate(model, tmp_path / folder)
    found = open_checkpoint(str(tmp_path / "out"))
    assert {one.dtype for one in found.tensors.values()} == {"BF16"}
    assert_same_function(model, tmp_path / "out", tolerance=0.05)
    assert hash_weights(found) == hash_weights(open_checkpoint(str(tmp_path / "again")))
    rotate(model, tmp_path / "other", seed=SEED + 1)
    assert hash_weights(found) != hash_weights(open_checkpoint(str(tmp_path / "other")))
    noted = json.loads((tmp_path / "out" / "rewrite.json").read_text("utf-8"))
    assert noted["method"] == "rotate"
    assert noted["rotation"] == {"seed": SEED, "hidden": 128, "head": 32}


def test_a_quantized_source_is_rotated_in_bfloat16(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    model = write_fp8(tiny("llama"), tmp_path / "model", "fp8 blocks")
    rotate(model, tmp_path / "out")
    found = open_checkpoint(str(tmp_path / "out"))
    assert {one.dtype for one in found.tensors.values()} == {"BF16"}
    assert_same_function(model, tmp_path / "out", tolerance=0.05)


def test_what_stands_out_in_channels_is_spread(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    def stand_out(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("input_layernorm.weight"):
                tensor[3] *= 100

    model = copy_with_tensors(tiny("llama", dtype=torch.float32), tmp_path / "m", stand_out)
    rotate(model, tmp_path / "out")
    assert_same_function(model, tmp_path / "out")
    stats = [
        calibrate_folder(one, tmp_path / f"stats-{n}", {"a": some_tokens(2, 24)})
        for n, one in enumerate((model, tmp_path / "out"))
    ]
    peaks = []
    for one in stats:
        x_TI = read_sequence(one)["x/model.layers.1.self_attn.q_proj"].float()
        peaks.append(float((x_TI.abs().amax(1) / x_TI.square().mean(1).sqrt()).mean()))
    assert peaks[1] < peaks[0] / 2


@pytest.mark.parametrize(("family", "words"), REFUSED.items())
def test_a_family_whose_function_would_change_is_refused(
    tiny: TinyCheckpoint, family: str, words: str
) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    with pytest.raises(RewriteError, match=f"'{family}' is not rotated: .*{words}"):
        find_stream(checkpoint, find_layers(checkpoint))


def test_every_family_is_rotated_or_refused_with_a_reason(tiny: TinyCheckpoint) -> None:
    for family in TINY_FAMILIES:
        checkpoint = open_checkpoint(str(tiny(family)))
        if family not in REFUSED:
            assert find_stream(checkpoint, find_layers(checkpoint)).hidden == 128


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "'clip_qkv' clips each channel of the values"),
        ("qwen3", {"architectures": ["Qwen3Model"]}, "engines serve its hidden states"),
        ("llama", {"mofq_layers": {"version": 1}}, "says which layers it has"),
    ],
)
def test_a_config_that_a_rotation_does_not_fit_is_refused(
    tiny: TinyCheckpoint, tmp_path: Path, family: str, changes: dict[str, Any], words: str
) -> None:
    tied = tiny(family, tie_word_embeddings=True)
    model = copy_with_config(tied, tmp_path / "model", lambda config: config.update(changes))
    with pytest.raises(RewriteError, match=words):
        rotate(model, tmp_path / "out")


def test_a_model_of_sentence_transformers_is_refused(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    model = copy_with_config(tiny("qwen3"), tmp_path / "model", lambda _: None)
    (model / "modules.json").write_text("[]", encoding="utf-8")
    with pytest.raises(RewriteError, match=r"modules\.json: is of an embedding model"):
        rotate(model, tmp_path / "out")


def test_numbers_below_the_normal_ones_of_a_dtype_are_rounded_more_coarsely(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.v_proj.bias"].fill_(3e-7)

    small = copy_with_tensors(tiny("qwen2", dtype=torch.float16), tmp_path / "model", shrink)
    rotate(small, tmp_path / "out")
    assert_same_function(small, tmp_path / "out", tolerance=0.05)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.per_layer_input_gate.weight",
        "model.layers.1.self_attn.v_norm.weight",
        "model.layers.0.mlp.altup.scale",
        "model.per_layer_projection_norm.weight",
        "vision.projector.norm",
    ],
)
def test_a_tensor_of_which_nothing_is_known_is_refused(
    tiny: TinyCheckpoint, tmp_path: Path, name: str
) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.ones(32)

    model = copy_with_tensors(tiny("llama"), tmp_path / "model", add)
    with pytest.raises(RewriteError, match=f"'{name}' may read or write the residual stream"):
        rotate(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_that_predict_further_tokens_are_refused(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        for name in [one for one in tensors if one.startswith("model.layers.1.")]:
            tensors[name.replace(".1.", ".2.", 1)] = tensors[name].clone()

    ahead = copy_with_tensors(tiny("deepseek_v3"), tmp_path / "a", add)
    model = copy_with_config(
        ahead, tmp_path / "model", lambda config: config.update(num_nextn_predict_layers=1)
    )
    with pytest.raises(RewriteError, match=r"layers\.2\..* may read or write"):
        rotate(model, tmp_path / "out")


def test_a_type_that_has_no_row_is_refused(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    model = copy_with_config(
        tiny("llama"), tmp_path / "model", lambda config: config.update(model_type="arcee")
    )
    checkpoint = open_checkpoint(str(model))
    with pytest.raises(RewriteError, match="residual stream of a 'arcee' goes is not known"):
        find_stream(
            checkpoint,
            replace(find_layers(open_checkpoint(str(tiny("llama")))), architecture="arcee"),
        )


def test_a_tensor_that_is_not_the_rotated_one_is_found(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    turning = rotate(tiny("llama"), tmp_path / "out")

    def swap(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"].neg_()

    def scale(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][0] = 2

    for number, change in enumerate((swap, scale)):
        copy = copy_with_tensors(tmp_path / "out", tmp_path / str(number), change)
        with pytest.raises(RewriteError, match="rewrite again"):
            check_rotated(turning, open_checkpoint(str(copy)))
    check_rotated(turning, open_checkpoint(str(tmp_path / "out")))


def made(model: Path, folder: Path) -> Stats:
    windows = {"a": some_tokens(4, 24)}
    return calibrate_folder(model, folder, windows, kept=2, inputs=True)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_rotated_statistics_are_those_of_a_calibration_of_the_rotated_model(
    tiny: TinyCheckpoint, tmp_path: Path, family: str
) -> None:
    model, out = tiny(family, dtype=torch.float32), tmp_path / "out"
    stats = made(model, tmp_path / "stats")
    turning = rotate(model, out)
    folder = write_rotated_stats(stats, open_checkpoint(str(out)), turning, tmp_path / "turned")
    turned, again = read_stats(folder), made(out, tmp_path / "again")
    rotated = hash_weights(open_checkpoint(str(out)))
    assert turned.plan == replace(again.plan, weights_sha256=rotated)
    assert turned.plan.inputs
    for index in (0, 1):
        needed, found = read_sequence(again, index), read_sequence(turned, index)
        assert_close(found, needed)
        with (
            safe_open(again.inputs_files("a")[index], "pt") as one,
            safe_open(turned.inputs_files("a")[index], "pt") as other,
        ):
            assert_close(*({k: f.get_tensor(k) for k in f.keys()} for f in (other, one)))  # noqa: SIM118
    changed = [
        n for n, t in read_sequence(stats).items() if not torch.equal(t, read_sequence(turned)[n])
    ]
    assert {name.partition("/")[0] for name in changed} == {"x", "grad"}


def assert_close(found: dict[str, Tensor], needed: dict[str, Tensor]) -> None:
    assert found.keys() == needed.keys()
    for name, tensor in needed.items():
        scale = float(tensor.abs().float().max())
        assert float((found[name].float() - tensor.float()).abs().max()) < 0.02 * scale, name


def test_statistics_in_which_a_channel_is_lost_are_not_rotated(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    def lose(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.input_layernorm.weight"][0] = 0

    model = copy_with_tensors(tiny("llama", dtype=torch.float32), tmp_path / "model", lose)
    stats, out = made(model, tmp_path / "stats"), tmp_path / "out"
    turning = rotate(model, out)
    assert_same_function(model, out)
    with pytest.raises(RewriteError, match=r"input_layernorm.weight' multiplies a channel by 0"):
        write_rotated_stats(stats, open_checkpoint(str(out)), turning, tmp_path / "turned")
    original, folders = open_checkpoint(str(model)), (tmp_path / "base", tmp_path / "base.s")
    rewriting = rewriting_of(original, stats, (), rotation=rotated_model(turning, SEED))
    with pytest.raises(RewriteError, match="multiplies a channel by 0"):
        make_base(rewriting, original, stats, folders=folders)
    assert not (tmp_path / "base").exists()


def recipe_of(rewriting: Rewriting, base: Base, scheme: str = FITTED) -> Recipe:
    """A uniform recipe of a rewritten model."""
    return replace(
        uniform_recipe(base.checkpoint, scheme),
        weights_sha256=hash_weights(base.checkpoint),
        rewriting=rewriting,
    )


@pytest.mark.parametrize("moves", [False, True])
def test_an_exported_folder_is_made_again_from_the_recipe_bit_for_bit(
    tiny: TinyCheckpoint, tmp_path: Path, moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    original, stats = open_checkpoint(str(model)), made(model, tmp_path / "stats")
    rotation = rotated_model(plan_rotation(original, SEED), SEED)
    rewriting = rewriting_of(original, stats, (), rotation=rotation)
    base = make_base(rewriting, original, stats, folders=(tmp_path / "base", tmp_path / "base.s"))
    if moves:
        choices = scales_that_move(base)
        rewriting = rewriting_of(original, stats, choices, rotation=rotation)
        assert rewriting.sites
        folders = (tmp_path / "moved", tmp_path / "moved.s")
        with monkeypatch.context() as patch:  # only there is known to be room
            patch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
            base = make_base(rewriting, original, stats, folders=folders)
        assert not list(tmp_path.glob("mofq-rotated-*"))
    recipe = recipe_of(rewriting, base)
    write_recipe(recipe, tmp_path / "recipe.yaml")
    loaded = load_recipe(tmp_path / "recipe.yaml")
    assert loaded == recipe
    export_compressed_tensors(base.checkpoint, recipe, tmp_path / "first" / "m", stats=base.stats)
    with base_of(loaded, original, stats.folder) as again:
        assert hash_weights(again.checkpoint) == recipe.weights_sha256
        export_compressed_tensors(again.checkpoint, loaded, tmp_path / "b" / "m", stats=again.stats)
    files = [path for path in (tmp_path / "first" / "m").iterdir() if path.name != "README.md"]
    assert len(files) > 3
    for path in files:
        assert path.read_bytes() == (tmp_path / "b" / "m" / path.name).read_bytes(), path.name
    with base_of(loaded, base.checkpoint, base.stats) as same:  # the rewritten model itself
        assert same.checkpoint is base.checkpoint


def scales_that_move(base: Base) -> tuple[Choice, ...]:
    layers = find_layers(base.checkpoint)
    names = [group.name for group in layers.groups]
    assert base.stats is not None
    return choose_for_recipe(
        base.checkpoint,
        layers,
        stats=read_stats(base.stats),
        schemes=dict.fromkeys(names, INT8),
        offered=dict.fromkeys(names, (INT8, "bf16")),
    )


def test_a_recipe_that_rotates_alone_needs_no_statistics(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    model = tiny("llama")
    original = open_checkpoint(str(model))
    rotation = rotated_model(plan_rotation(original, SEED), SEED)
    rewriting = Rewriting(
        original.name, original.index_sha256, hash_weights(original), rotation=rotation
    )
    base = make_base(rewriting, original, None, folders=(tmp_path / "base", tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    recipe = recipe_of(rewriting, base, INT8)
    with base_of(recipe, original, None) as again:
        assert again.stats is None
        assert hash_weights(again.checkpoint) == recipe.weights_sha256
    with (
        pytest.raises(StatsError, match="not found"),
        base_of(recipe, original, tmp_path / "nowhere"),
    ):
        pass


def test_a_recipe_that_rotates_otherwise_is_refused(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    original = open_checkpoint(str(tiny("llama")))
    rotation = rotated_model(plan_rotation(original, SEED), SEED)
    rewriting = Rewriting(
        original.name, original.index_sha256, hash_weights(original), rotation=rotation
    )
    base = make_base(rewriting, original, None, folders=(tmp_path / "base", tmp_path / "none"))
    recipe = recipe_of(rewriting, base, INT8)

    def with_rotation(changed: RotatedModel) -> Recipe:
        return replace(recipe, rewriting=replace(rewriting, rotation=changed))

    with (
        pytest.raises(RewriteError, match=r"has 128 channels and 32 in a head, .* says 64 and 32"),
        base_of(with_rotation(replace(rotation, hidden=64)), original, None),
    ):
        pass
    with (
        pytest.raises(RecipeError, match="gives other weights here"),
        base_of(with_rotation(replace(rotation, seed=SEED + 1)), original, None),
    ):
        pass
