"""Codes that make up for what the layers before them change."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calibrated import calibrate_folder, plan_of, some_tokens
from conftest import TinyCheckpoint
from emulated import recipe_of
from stopped import stopped_at
from torch import Tensor

from mofq.decision.recipe import Recipe, load_recipe, write_recipe
from mofq.delivery.apply.emulate import apply
from mofq.delivery.rewriting.remake import Base
from mofq.delivery.tuning import compensate as compensate_module
from mofq.delivery.tuning.codes import learned_layers
from mofq.delivery.tuning.compensate import FittedLayer, SeenTokens, compensate
from mofq.delivery.tuning.residual import AddsTo, find_added
from mofq.delivery.tuning.tune_recipe import TunedRecipe, tune_recipe
from mofq.delivery.validation import find_deviations
from mofq.evidence.calibration.stats import read_stats
from mofq.evidence.code_changes import CodeChanges, from_tensors, to_tensors, unknown_names
from mofq.evidence.fits import Fits, SeenSequence
from mofq.evidence.layer_codes import fit_rows
from mofq.exceptions import RecipeError, StreamingError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import LinearLayer, find_layers, find_loaded_weight, is_expert
from mofq.model.loading import load_model
from mofq.model.streaming.replay import StreamedSequence
from mofq.model.streaming.streamed import open_streamed
from mofq.numbers.quantize import FakeQuantLinear
from mofq.numbers.schemes import parse_scheme

#: Tokens enough for four times the inputs of the widest layer.
WINDOWS = {"a": some_tokens(24, 64)}
LLAMA = {"o_proj": ("", "post_attention_layernorm"), "down_proj": ("", None)}
AFTER_NORMS = {
    "o_proj": ("post_attention_layernorm", "pre_feedforward_layernorm"),
    "down_proj": ("post_feedforward_layernorm", None),
}


def added_in(folder: Path, tmp_path: Path, dtype: str = "float32") -> dict[str, AddsTo]:
    """What adds to the residual stream in the last decoder layer."""
    layers = find_layers(open_checkpoint(str(folder)))
    paths = [
        find_loaded_weight(layer, layers.architecture).name.rpartition(".")[0]
        for layer in layers.grouped_layers
        if layer.role == "linear" and not is_expert(layer)
    ]
    found: dict[str, AddsTo] = {}
    with open_streamed(folder, dtype=dtype) as streamed, torch.no_grad():
        sequence = StreamedSequence(WINDOWS["a"][0], tmp_path)
        for step in count():
            unit = streamed.unit_at(sequence, step)
            if unit == streamed.head:
                return found
            inside = [path for path in paths if path.startswith(f"{unit}.")]
            with streamed.weights.loaded(unit):
                if inside:
                    call, _ = streamed.replayer.reach(sequence, step)
                    found = find_added(call, streamed.model, inside)
                streamed.run_step(sequence, step, unit)
                streamed.writer.wait()
    raise AssertionError


def ends_of(found: dict[str, AddsTo]) -> dict[str, tuple[str, str | None]]:
    """The same by the last parts of paths."""
    return {
        path.rpartition(".")[2]: (
            "" if one.through == path else one.through.rpartition(".")[2],
            one.behind and one.behind.rpartition(".")[2],
        )
        for path, one in found.items()
    }


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", LLAMA),
        ("gemma3_text", AFTER_NORMS),
        # Attention and MLP read the same, and are added together.
        ("cohere2", {"o_proj": ("", None), "down_proj": ("", None)}),
        ("mixtral", {"o_proj": LLAMA["o_proj"]}),  # what experts give is a sum
        ("opt", {}),
    ],
)
def test_what_adds_to_the_residual_stream_is_seen(
    family: str,
    expected: dict[str, tuple[str, str | None]],
    tiny: TinyCheckpoint,
    tmp_path: Path,
) -> None:
    assert ends_of(added_in(tiny(family), tmp_path)) == expected


@pytest.mark.parametrize(("family", "expected"), [("llama", LLAMA), ("gemma3_text", AFTER_NORMS)])
def test_sums_are_seen_that_bfloat16_rounds(
    family: str,
    expected: dict[str, tuple[str, str | None]],
    tiny: TinyCheckpoint,
    tmp_path: Path,
) -> None:
    assert ends_of(added_in(tiny(family), tmp_path, "bfloat16")) == expected


@pytest.fixture(scope="module")
def stats(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compensate") / "stats"
    calibrate_folder(tiny("llama"), folder, WINDOWS, kept=6, inputs=True)
    return folder


def changes_of(
    folder: Path,
    recipe: Recipe,
    stats: Path,
    indices: Any = range(24),
    tell: Callable[[str], None] | None = None,
) -> dict[str, CodeChanges]:
    checkpoint = open_checkpoint(str(folder))
    with Fits(read_stats(stats)) as seen:
        return compensate(
            checkpoint,
            recipe,
            [SeenTokens("a", index, WINDOWS["a"][index]) for index in indices],
            layers=find_layers(checkpoint),
            fits=seen,
            seen=seen,
            dtype="float32",
            device="cpu",
            tell=tell,
        )


def hidden_states(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model.model(WINDOWS["a"]).last_hidden_state
    return found


def shape_of(folder: Path, name: str) -> tuple[int, int]:
    """Of a layer."""
    every = find_layers(open_checkpoint(str(folder))).grouped_layers
    layer = next(one for one in every if one.name == name)
    return layer.out_features, layer.in_features


def lost(
    folder: Path, recipe: Recipe, changes: dict[str, CodeChanges], stats: Path | None = None
) -> float:
    """How far the last hidden states are from the original's, squared."""
    checkpoint = open_checkpoint(str(folder))
    with ExitStack() as stack:
        fits = None if stats is None else stack.enter_context(Fits(read_stats(stats)))
        model = apply(load_model(folder), recipe, checkpoint=checkpoint, fits=fits)
        layers = find_layers(checkpoint)
        for one in learned_layers(model, recipe, layers, checkpoint, fits=fits, start=changes):
            one.put()
    return float((hidden_states(model) - hidden_states(load_model(folder))).square().sum())


@pytest.mark.parametrize("scheme", ["int4.g32", "nvfp4", "int4.channel+int8.token"])
def test_what_layers_before_lost_is_given_back(
    scheme: str, tiny: TinyCheckpoint, stats: Path
) -> None:
    folder = tiny("llama")
    recipe = recipe_of(open_checkpoint(str(folder)), scheme)
    changes = changes_of(folder, recipe, stats)
    assert len(changes) == 14  # all layers of both decoder layers
    assert any(len(one.at_N) for one in changes.values())
    plain, compensated = (lost(folder, recipe, one) for one in ({}, changes))
    assert compensated < 0.85 * plain


@pytest.mark.parametrize(
    "scheme", ["int4.g32@nats~descent", "nvfp4@nats~gptq", "mxfp4~descent", "int4.g32.asym~descent"]
)
def test_codes_are_fitted_anew_where_descent_changes_much(
    scheme: str, tiny: TinyCheckpoint, stats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("llama")
    recipe = recipe_of(open_checkpoint(str(folder)), scheme)
    fitted: list[str] = []

    def fit(layer: LinearLayer, *given: Any, **named: Any) -> Any:
        fitted.append(layer.name)
        return fit_rows(layer, *given, **named)

    monkeypatch.setattr(compensate_module, "fit_rows", fit)
    anew = changes_of(folder, recipe, stats)
    assert bool(fitted) == ("asym" not in scheme)  # its zero points would change too
    assert len(set(fitted)) == len(fitted)
    assert len(fitted) < 14 or "gptq" in scheme  # which descent changes everywhere
    for name, one in anew.items():
        weight = parse_scheme(scheme).weight
        assert weight is not None
        assert one.fault(weight, shape_of(folder, name)) is None
    monkeypatch.setattr(compensate_module, "_FAR", 0.0)
    descended = changes_of(folder, recipe, stats)
    if fitted:
        errors = [lost(folder, recipe, one, stats) for one in (anew, descended)]
        assert errors[0] < 0.99 * errors[1]
    else:
        assert all(torch.equal(anew[n].codes_N, descended[n].codes_N) for n in anew)


@pytest.mark.parametrize("is_borne_out", [True, False])
def test_what_other_text_bears_out_is_given_back(is_borne_out: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    weight_OI, moved_OI = draw(24, 32), 0.1 * draw(24, 32)
    layer = LinearLayer("x", "x.weight", 24, 32, "BF16", "x", "x")
    scheme = parse_scheme("int4.g32")
    module = FakeQuantLinear(weight_OI, None, scheme=scheme)
    assert scheme.weight is not None
    one = FittedLayer(layer, scheme.weight, "x", module, None, AddsTo("x", "x", None))
    one.begin()
    for half in (0, 1):
        x_TI = draw(400, 32)
        lost_TO = x_TI @ moved_OI.T if is_borne_out else draw(400, 24)
        seen = SeenSequence(x_TI, torch.ones(400, dtype=torch.float64), 0.5, ("a", half, "x"))
        assert one.see(x_TI, seen, lost_TO, half=half)
    given_OI = one.target(weight_OI) - weight_OI
    if is_borne_out:
        assert (given_OI - moved_OI).norm() < 0.15 * moved_OI.norm()
    else:  # least squares alone give sqrt(32 / 800) of the size of the weight back
        assert given_OI.norm() < 0.1 * (32 / 800) ** 0.5 * 24**0.5 * 32**0.5


def test_layers_with_too_few_tokens_keep_their_codes(tiny: TinyCheckpoint, stats: Path) -> None:
    recipe = recipe_of(open_checkpoint(str(tiny("llama"))), "int4.g32")
    found = changes_of(tiny("llama"), recipe, stats, range(10))  # 640 tokens, of 128 and 256 inputs
    assert found
    assert not any("down_proj" in name for name in found)
    assert not changes_of(tiny("llama"), recipe, stats, range(4))


def test_both_halves_have_as_many_of_the_sequences_that_count(
    tiny: TinyCheckpoint, stats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves: list[int] = []

    def see(*_: object, half: int) -> bool:
        halves.append(half)
        return True

    monkeypatch.setattr(FittedLayer, "see", see)
    recipe = recipe_of(open_checkpoint(str(tiny("llama"))), "int4.g32")
    changes_of(tiny("llama"), recipe, stats, [n for n in range(24) if n % 4 != 3])
    assert halves.count(0) == halves.count(1) > 0


def test_layers_that_read_the_same_need_room_together(
    tiny: TinyCheckpoint, stats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mofq.delivery.tuning.compensate.free_bytes", lambda _: 11 * 8 * 128**2)
    recipe = recipe_of(open_checkpoint(str(tiny("llama"))), "int4.g32")
    told: list[str] = []
    found = changes_of(tiny("llama"), recipe, stats, tell=told.append)
    assert {name.rpartition(".")[2] for name in found} == {"o_proj"}  # alone, of 128 inputs
    (remark,) = told
    assert "12 layers keep their codes, such as model.layers.0.self_attn.q_proj: " in remark


def tune(folder: Path, stats: Path | None, *, steps: int, **options: Any) -> TunedRecipe:
    checkpoint = open_checkpoint(str(folder))
    return tune_recipe(
        checkpoint,
        options.pop("recipe", None) or recipe_of(checkpoint, "int4.g32"),
        WINDOWS,
        base=Base(checkpoint, stats),
        plan=options.pop("plan", None) or plan_of(folder, WINDOWS),
        steps=steps,
        **options,
    )


def test_compensation_alone_is_a_tuning_without_steps(
    tiny: TinyCheckpoint, stats: Path, tmp_path: Path
) -> None:
    folder = tiny("llama")
    recipe = recipe_of(open_checkpoint(str(folder)), "int3.channel")
    found = tune(folder, stats, steps=0, recipe=recipe)
    assert found.helps
    tuning = found.tuning
    assert (tuning.steps, tuning.tensors, tuning.layers, tuning.compensated) == (0, 0, 14, 14)
    assert tuning.what == "codes of 14 layers compensate errors of those before"
    assert tuning.kl_after < 0.95 * tuning.kl_before
    write_recipe(found.recipe, tmp_path / "recipe.yaml")
    read = load_recipe(tmp_path / "recipe.yaml")
    checkpoint = open_checkpoint(str(folder))
    model = apply(load_model(folder), read, checkpoint=checkpoint)
    assert not find_deviations(model, read, checkpoint=checkpoint)
    assert find_deviations(
        apply(load_model(folder), replace(read, tuning=None), checkpoint=checkpoint),
        read,
        checkpoint=checkpoint,
    )


@pytest.mark.long
def test_steps_go_on_from_codes_that_compensate(tiny: TinyCheckpoint, stats: Path) -> None:
    folder = tiny("llama")
    recipe = recipe_of(open_checkpoint(str(folder)), "int3.channel")
    alone, steps, both = (
        tune(folder, one, steps=n, recipe=recipe).tuning
        for one, n in ((stats, 0), (None, 40), (stats, 40))
    )
    assert (both.steps, both.compensated) == (40, 14)
    assert both.kl_before == alone.kl_before == steps.kl_before
    assert both.kl_after < min(alone.kl_after, steps.kl_after)
    assert "compensate" in both.what
    assert "learned" in both.what


def test_statistics_of_other_sequences_do_not_compensate(tiny: TinyCheckpoint, stats: Path) -> None:
    folder = tiny("llama")
    told: list[str] = []
    other = {"a": some_tokens(24, 64)[:, :32]}
    plan = plan_of(folder, other)
    with pytest.raises(RecipeError, match="is not of these sequences: corpora, sequences"):
        tune(folder, stats, steps=0, plan=plan)
    with pytest.raises(RecipeError, match="there are no statistics"):
        tune(folder, None, steps=0)
    found = tune(folder, stats, steps=1, plan=plan, tell=told.append)
    assert found.tuning.compensated == 0
    assert "Codes do not compensate the errors of layers before" in told[0]


def test_statistics_of_another_model_do_not_compensate(tiny: TinyCheckpoint, stats: Path) -> None:
    folder = tiny("mistral")
    with pytest.raises(RecipeError, match="calibrated on llama"):
        tune(folder, stats, steps=0)


def test_without_steps_codes_must_be_free_to_compensate(tiny: TinyCheckpoint, stats: Path) -> None:
    folder = tiny("llama")
    with pytest.raises(RecipeError, match="leaves them as they are"):
        tune(folder, stats, steps=0, codes=False)


@pytest.mark.parametrize(
    ("scheme", "steps"), [("int4.g32", 0), ("mxfp4+mxfp4", 0), ("int3.channel", 8)]
)
def test_a_model_in_memory_and_one_layer_by_layer_compensate_the_same(
    scheme: str, steps: int, tiny: TinyCheckpoint, stats: Path
) -> None:
    folder = tiny("llama")
    recipe = recipe_of(open_checkpoint(str(folder)), scheme)
    resident, streamed = (
        tune(folder, stats, steps=steps, recipe=recipe, is_streamed=one) for one in (False, True)
    )
    assert streamed.recipe.tuned == resident.recipe.tuned
    assert streamed == resident
    assert (streamed.tuning.compensated, streamed.tuning.steps) == (14, steps)


@pytest.mark.parametrize("scheme", ["int4.g32", pytest.param("nvfp4", marks=pytest.mark.long)])
def test_a_compensation_that_was_stopped_goes_on_and_ends_with_the_same_bytes(
    scheme: str,
    tiny: TinyCheckpoint,
    stats: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tiny("llama")
    recipe = recipe_of(open_checkpoint(str(folder)), scheme)
    whole = tune(folder, stats, steps=1, recipe=recipe)
    streamed = partial(
        tune, folder, stats, steps=1, recipe=recipe, is_streamed=True, work=tmp_path / "work"
    )
    calls: list[str] = []
    choose = compensate_module._Compensation._choose

    def counted(self: Any, one: FittedLayer) -> None:
        calls.append(one.layer.name)
        choose(self, one)

    monkeypatch.setattr(compensate_module._Compensation, "_choose", counted)
    for place in (
        *("original/00003/step-00001", "quantized/00002/step-00001", "codes-00001"),
        *("quantized/00000/step-00002", "codes-done", "compensated/00002/step-00001"),
        *("rounded-model.layers.1", "learned-model.layers.0", "after/00001/step-00002"),
    ):
        with stopped_at(place, monkeypatch):
            streamed()
    # Layers of a unit are fitted again until its file is there, and not after.
    assert sorted(calls.count(name) for name in set(calls)) == [2] * 7 + [3] * 7
    assert not list((tmp_path / "work").glob("*/quantized"))
    again = streamed()
    assert again == whole
    assert again.recipe.tuned == whole.recipe.tuned


def test_a_compensation_that_ended_with_an_error_begins_anew(
    tiny: TinyCheckpoint, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, work = tiny("llama"), tmp_path / "work"
    streamed = partial(tune, folder, stats, steps=0, is_streamed=True, work=work)
    with stopped_at("quantized/00000/step-00002", monkeypatch):
        streamed()
    assert list(work.glob("*/codes-*"))
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
        with pytest.raises(RecipeError, match="needs about"):
            streamed()
    assert not [path for path in work.rglob("*") if path.is_file()]
    assert streamed() == tune(folder, stats, steps=0)


def test_where_the_disk_is_too_small_codes_do_not_compensate(
    tiny: TinyCheckpoint, stats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 24 sequences of 64 tokens of 128 numbers of 4 bytes, six times, in both passes
    needed = 24 * 64 * 128 * 4 * 6 * 2
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    judging = {"a": some_tokens(3, 64, seed=1)}
    with pytest.raises(RecipeError, match=f"needs about {needed:,} bytes"):
        tune(tiny("llama"), stats, steps=0, judging=judging)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=needed))
    assert tune(tiny("llama"), stats, steps=0, judging=judging).tuning.compensated == 14


def test_residual_streams_lie_on_the_disk_within_what_is_checked(
    tiny: TinyCheckpoint, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("llama")
    written: list[int] = []
    run_unit = compensate_module._Compensation._run_unit

    def measured(self: Any, unit: str, step: int) -> None:
        run_unit(self, unit, step)
        assert all(isinstance(one, Path) for one in self._streams.values())
        written.append(sum(one.stat().st_size for one in tmp_path.rglob("*") if one.is_file()))

    monkeypatch.setattr(compensate_module._Compensation, "_run_unit", measured)
    plan = plan_of(folder, WINDOWS, dtype="bfloat16")
    tune(folder, stats, steps=0, plan=plan, is_streamed=True, work=tmp_path / "work")
    # 18 sequences of 64 tokens of 128 numbers of 2 bytes, six times, in both passes
    assert max(written) < 18 * 64 * 128 * 2 * 6 * 2


def test_steps_that_began_without_compensation_go_on_without_it(
    tiny: TinyCheckpoint, stats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny("llama")
    told: list[str] = []
    streamed = partial(
        tune, folder, stats, steps=1, is_streamed=True, work=tmp_path / "work", tell=told.append
    )

    def fail(*_: object) -> None:
        raise StreamingError("the disk is too small")

    with monkeypatch.context() as patch:
        patch.setattr(compensate_module, "_check_room", fail)
        with stopped_at("learned-model.layers.1", monkeypatch):
            streamed()
    assert "the disk is too small" in told[0]
    told.clear()
    found = streamed()
    assert "steps that were made without it go on" in told[0]
    assert found == tune(folder, None, steps=1)


@pytest.mark.parametrize(
    "places", [[], [0], [254, 255, 256], [255, 2000], [3, 4, 1000, 1001, 9999]]
)
def test_places_are_a_byte_each_in_a_file(places: list[int]) -> None:
    at_N = torch.tensor(places, dtype=torch.int64)
    codes_N = torch.arange(len(places)).to(torch.int8)
    tensors = to_tensors({"x": CodeChanges(at_N, codes_N, None)})
    assert not unknown_names(tensors)
    assert len(tensors["codes/x/gaps"]) <= len(places) + (max(places, default=0) + 1) // 255
    found = from_tensors(tensors)["x"]
    assert torch.equal(found.at_N, at_N)
    assert torch.equal(found.codes_N, codes_N)
    before = {"codes/x/at": at_N, "codes/x/codes": codes_N}  # of versions before
    assert torch.equal(from_tensors(before)["x"].at_N, at_N)


def test_changes_to_changes_are_changes() -> None:
    scale = torch.ones(2, 1)
    one = CodeChanges(torch.tensor([1, 5]), torch.tensor([1, 2], dtype=torch.int8), scale)
    two = CodeChanges(torch.tensor([3, 5]), torch.tensor([7, 8], dtype=torch.int8), None)
    both = one.then(two)
    assert both.at_N.tolist() == [1, 3, 5]
    assert both.codes_N.tolist() == [1, 7, 8]
    assert both.scale is scale
