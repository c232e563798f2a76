"""The whole flow on a real 135M-parameter model (``bash scripts/quality/check_real.sh``).

Calibrated on one half of a handbook's English text and validated on paragraphs of the
other; the sizes of KL are those that an independent emulation of the same schemes gave.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import pytest
import torch
from command_line import DEMO, ok
from exported import Exported, make_recipe

from mofq.decision import Budgets, Request, uniform_recipe, uniform_recipes
from mofq.decision.measured.measurement import paired
from mofq.decision.recipe import Recipe, load_recipe, write_recipe
from mofq.delivery.backends import apply_recipe
from mofq.delivery.validation import Validation, find_deviations, validate_many
from mofq.evidence.corpora import load_text
from mofq.evidence.table import read_table
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.checkpoint.tensors import read_layer_rows
from mofq.model.layers import find_layers
from mofq.model.loading import load_model
from mofq.numbers.quantize import fake_quantize_weight
from mofq.numbers.schemes import parse_scheme

pytestmark = pytest.mark.real

INT8 = "int8.channel+int8.token"
FP8 = "fp8_e4m3.channel+fp8_e4m3.token"
#: Each kind of storage that vLLM knows, side by side.
MIXED = (INT8, FP8, "int4.g32@fullrange", "int8.g64", "bf16", "int4.g64")


@dataclass(frozen=True, slots=True)
class Flow:
    """Every candidate, measured on the same windows."""

    recipes: dict[str, Recipe]
    validations: dict[str, Validation]

    def kl(self, name: str) -> float:
        """Measured [nats per token]."""
        return self.validations[name].kl_nats_per_token


@pytest.fixture(scope="module")
def smollm2() -> str:
    """The folder that scripts/make/fetch_smollm2.py makes."""
    return os.environ["MOFQ_SMOLLM2"]


@pytest.fixture(scope="module")
def flow(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Flow:
    folder = tmp_path_factory.mktemp("real")
    stats, table, recipe = folder / "stats", folder / "table.jsonl", folder / "recipe.yaml"
    text = ("--corpus", "en=demo-en-calibration", "--sequences", "4")
    ok("calibrate", smollm2, *text, "-o", stats)
    ok("measure", smollm2, "--space", "w8a8", "--stats", stats, "-o", table)
    ok("search", table, "--max-bits", "8.03", "-o", recipe)
    checkpoint = open_checkpoint(smollm2)
    layers = find_layers(checkpoint)
    measured = uniform_recipes(read_table(table), Request(Budgets()))
    recipes = {"exact": load_recipe(recipe), INT8: measured[INT8], FP8: measured[FP8]}
    for scheme in ("int8.channel", "int4.g32", "int4.g32@fullrange"):
        recipes[scheme] = uniform_recipe(checkpoint, layers, scheme)
    done = validate_many(smollm2, list(recipes.values()), load_text("demo-en"), tokens=2048)
    return Flow(recipes, dict(zip(recipes, done, strict=True)))


def test_inspect_takes_less_than_a_second(smollm2: str) -> None:
    ok("inspect", DEMO, "--json")
    start = process_time()
    content = ok("inspect", smollm2, "--json").json
    assert process_time() - start < 1
    assert len(content["groups"]) == 120
    assert content["linear_layers"] == 210
    assert content["tied_lm_head"] is True


def test_every_recipe_is_enforced_and_covers_every_layer(flow: Flow) -> None:
    for name, validation in flow.validations.items():
        assert validation.enforced is True, name
        assert len(flow.recipes[name].schemes) == 210
        assert validation.tokens == 2048


@pytest.mark.parametrize("name", [INT8, FP8])
def test_w8a8_costs_what_an_independent_emulation_found(flow: Flow, name: str) -> None:
    assert 0.01 < flow.kl(name) < 0.06
    assert flow.validations[name].bits_per_weight == pytest.approx(8.0226, abs=1e-3)


@pytest.mark.parametrize("name", ["exact", INT8, FP8])
def test_the_prediction_is_within_a_quarter_of_the_truth(flow: Flow, name: str) -> None:
    predicted = flow.validations[name].predicted_kl_nats_per_token
    assert predicted == pytest.approx(flow.kl(name), rel=0.25)


def test_int8_and_fp8_side_by_side_beat_both(flow: Flow) -> None:
    assert set(flow.recipes["exact"].schemes.values()) == {INT8, FP8}
    for uniform in (INT8, FP8):
        gain = paired(flow.validations["exact"].windows, flow.validations[uniform].windows)
        assert gain.stderr is not None
        assert gain.value > 3 * gain.stderr
        assert flow.kl("exact") < 0.9 * flow.kl(uniform)


def test_int8_weights_alone_cost_an_order_of_magnitude_less(flow: Flow) -> None:
    assert 0.001 < flow.kl("int8.channel") < flow.kl(INT8) / 5


def test_the_full_range_of_four_bits_is_worth_using(flow: Flow) -> None:
    absmax, full = flow.kl("int4.g32"), flow.kl("int4.g32@fullrange")
    assert 0.1 < full < 0.85 * absmax < 0.6
    bits = {flow.validations[n].bits_per_weight for n in ("int4.g32", "int4.g32@fullrange")}
    assert len(bits) == 1


def test_an_edited_layer_is_caught_and_named(smollm2: str, flow: Flow) -> None:
    checkpoint = open_checkpoint(smollm2)
    model = load_model(checkpoint.folder)
    apply_recipe(model, flow.recipes["exact"], checkpoint=checkpoint)
    name = "model.layers.17.mlp.down_proj"
    weight_OI = model.get_submodule(name).weight
    with torch.no_grad():
        weight_OI[100, 200] = torch.nextafter(weight_OI[100, 200], torch.tensor(torch.inf))
    found = find_deviations(model, flow.recipes["exact"], checkpoint=checkpoint)
    assert [deviation.layer for deviation in found] == [name]
    assert "1 of 884736 weights" in found[0].reason


def test_a_mixture_is_exported_and_read_back_by_its_consumers_decoder(
    smollm2: str, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(smollm2)
    recipe = make_recipe(checkpoint, lambda number, group: MIXED[number % len(MIXED)])
    write_recipe(recipe, tmp_path / "recipe.yaml")
    folder = tmp_path / "exported"
    arguments = ("--to", "compressed-tensors", "-o", folder, "--json")
    export = ok("export", smollm2, tmp_path / "recipe.yaml", *arguments).json
    exported = Exported(folder)
    tensors = exported.tensors
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == export["checkpoint_bytes"]
    seen = set()
    for group in find_layers(checkpoint).groups[:12]:
        for layer in group.layers:
            scheme = parse_scheme(recipe.schemes[layer.name])
            seen.add(scheme.name)
            if scheme.weight is None:
                continue
            weight_OI = read_layer_rows(checkpoint, layer, 0, layer.out_features)
            # The decoder multiplies in the dtype of the scales: one rounding to bfloat16.
            needed_OI = fake_quantize_weight(weight_OI, scheme.weight).to(torch.bfloat16)
            assert exported.decode(layer.name, tensors).to(torch.bfloat16).equal(needed_OI)
    assert seen == set(MIXED)
    text = ("--text", "demo-en", "--tokens", "512", "--json")
    assert ok("validate", smollm2, folder, *text).json["enforced"] is True


def test_what_was_found(flow: Flow, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{'':32} bits/weight  predicted  measured [nats/token]"]
    for name, one in flow.validations.items():
        predicted = one.predicted_kl_nats_per_token
        lines.append(
            f"{name:32} {one.bits_per_weight:11.4f}  "
            f"{'–' if predicted is None else f'{predicted:.4f}':>9}  "
            f"{one.kl_nats_per_token:.4f} ± {one.kl_stderr:.4f}"
        )
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert all(one.perplexity > one.perplexity_original * 0.9 for one in flow.validations.values())
