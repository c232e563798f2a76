"""Rewrites: the model computes what it did, and what is predicted is what is measured."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from calibrated import calibrate_folder, some_tokens, space_of
from conftest import TinyCheckpoint
from families import copy_with_tensors, long_but
from safetensors.torch import load_file
from torch import Tensor

from mofq.delivery.rewriting import choose_scales as choosing
from mofq.delivery.rewriting.choose_scales import Choice, choose_best, choose_scales
from mofq.delivery.rewriting.rewrite import rewrite
from mofq.delivery.rewriting.scales import METHODS, InputRanges, propose_scales
from mofq.delivery.rewriting.sites import NORMS, Site, find_sites
from mofq.delivery.rewriting.write import LINEAGE_FILE, check_rewritten
from mofq.evidence.calibration.sequence_file import SequenceFile
from mofq.evidence.calibration.stats import Stats
from mofq.evidence.measure.fill_table import measure
from mofq.evidence.table import read_table
from mofq.exceptions import RewriteError, SchemeError, StatsError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.checkpoint.tensors import read_tensor
from mofq.model.checkpoint.weights_hash import hash_weights
from mofq.model.layers import find_layers
from mofq.model.loading import load_model
from mofq.numbers.quantize import factorise_hessian, fake_quantize_weight
from mofq.numbers.quantize.gptq import DAMPING
from mofq.numbers.schemes import parse_scheme

INT8 = "int8.channel+int8.token"
TOKENS = some_tokens(1, 24, seed=5)


def outlier_model(
    tiny: TinyCheckpoint, folder: Path, family: str = "llama", **options: object
) -> Path:
    """A tiny model whose inputs have channels that stand out, as large models have."""

    def stand_out(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("layernorm.weight"):
                tensor[3::31] *= 40
            if name.endswith("up_proj.weight") and tensor.ndim == 2:
                tensor[5::67] *= 20

    return copy_with_tensors(tiny(family, dtype=torch.float32, **options), folder, stand_out)


def logits(folder: Path) -> Tensor:
    with torch.inference_mode():
        return load_model(folder)(TOKENS).logits.double()


def rewritten(
    model: Path, folder: Path, method: str, **options: object
) -> tuple[Path, Stats, tuple[Choice, ...]]:
    stats = calibrate_folder(model, folder / "stats", {"a": some_tokens(3, 24)})
    out = folder / "out"
    choices = rewrite(
        open_checkpoint(str(model)),
        stats,
        out,
        method=method,
        **options,  # type: ignore[arg-type]
    )
    return out, stats, choices


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(*family.values, "smoothquant", marks=family.marks)
        for family in long_but(NORMS, "llama", "phi3", "olmo2")
    ]
    + [(family, method) for family in ("llama", "phi3", "mixtral") for method in METHODS[1:]],
)
def test_a_rewritten_model_computes_what_it_did(
    tiny: TinyCheckpoint, tmp_path: Path, family: str, method: str
) -> None:
    model = outlier_model(tiny, tmp_path / "model", family)
    out, _, choices = rewritten(model, tmp_path, method, scheme="int4.g[32,16]+int8.token")
    assert any(choice.strength is not None for choice in choices)
    before, after = logits(model), logits(out)
    assert float((after - before).abs().max()) < 2e-4 * float(before.abs().max())
    if not NORMS[family]:
        assert all(choice.site.producer is not None for choice in choices)


@pytest.mark.parametrize(
    ("family", "options", "biases"),
    [
        ("starcoder2", {}, {"input_layernorm", "post_attention_layernorm", "self_attn.v_proj"}),
        (
            "llama",
            {"attention_bias": True, "mlp_bias": True},
            {"self_attn.v_proj", "mlp.up_proj"},
        ),
    ],
)
def test_a_bias_is_divided_with_the_weight_beside_it(
    tiny: TinyCheckpoint, tmp_path: Path, family: str, options: dict[str, bool], biases: set[str]
) -> None:
    model = outlier_model(tiny, tmp_path / "model", family, **options)
    original = load_file(model / "model.safetensors")
    assert all(bool(t.any()) for name, t in original.items() if name.endswith(".bias"))
    out, _, choices = rewritten(model, tmp_path, "smoothquant")
    assert all(choice.strength is not None for choice in choices)
    found = load_file(out / "model.safetensors")
    changed = {name for name, tensor in original.items() if not torch.equal(tensor, found[name])}
    assert {name for name in changed if name.endswith(".bias")} == {
        f"model.layers.{n}.{module}.bias" for n in (0, 1) for module in biases
    }
    before, after = logits(model), logits(out)
    assert float((after - before).abs().max()) < 2e-4 * float(before.abs().max())


def test_powers_of_two_change_no_bit(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    model = outlier_model(tiny, tmp_path / "model")
    out, _, choices = rewritten(model, tmp_path, "smoothquant", powers_of_two=True)
    moved = [choice for choice in choices if choice.strength is not None]
    assert moved
    for choice in moved:
        log2_P = torch.log2(choice.scale_P)
        assert torch.equal(log2_P, log2_P.round())
    assert torch.equal(logits(model), logits(out))


def test_scales_are_searched_for_the_most_promising_proposals_alone(
    tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = outlier_model(tiny, tmp_path / "model")
    stats = calibrate_folder(model, tmp_path / "stats", {"a": some_tokens(3, 24)})
    checkpoint = open_checkpoint(str(model))
    plain, searched = "int4.g16+int8.token", "int4.g16@mse+int8.token"
    predicted: list[tuple[str, int]] = []

    def predict(*args: Any, scales: list[Tensor], **options: Any) -> list[float]:
        predicted.append((args[2].name, len(scales)))
        return _predict(*args, scales=scales, **options)

    _predict = choosing._predict
    monkeypatch.setattr(choosing, "_predict", predict)

    def choose(site: Site, *schemes: str) -> Choice:
        methods = ("smoothquant", "bismooth")
        parsed = [parse_scheme(one) for one in schemes]
        return choose_best(checkpoint, site, parsed, stats=stats, methods=methods)

    sites = find_sites(checkpoint, find_layers(checkpoint))
    choices = [choose(site, searched) for site in sites]
    assert predicted == len(sites) * [(plain, 34), (searched, 5)]
    predicted.clear()
    assert all(one.strength for one in choices)
    for site, choice in zip(sites, choices, strict=True):
        of_both = choose(site, searched, plain)
        assert of_both.nats_after <= choice.nats_after
    assert predicted == len(sites) * [(plain, 34), (searched, 5)]
    monkeypatch.setattr(choosing, "_SEARCHED", 33)
    for site, choice in zip(sites, choices, strict=True):
        best = choose(site, searched)
        assert best.nats_before == choice.nats_before
        assert best.nats_after <= choice.nats_after < best.nats_before
    monkeypatch.setattr(choosing, "_SEARCHED", 0)
    assert not any(choose(site, searched).strength for site in sites)


def test_where_codes_are_fitted_a_column_costs_what_later_ones_cannot_make_up_for(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    """By hand: ``sum_o rho_o sum_i D_i d_oi^2``, D by the library that rounds by it."""
    model = outlier_model(tiny, tmp_path / "model")
    stats = calibrate_folder(model, tmp_path / "stats", {"a": some_tokens(3, 24)}, kept=3)
    checkpoint = open_checkpoint(str(model))
    sites = {site.group: site for site in find_sites(checkpoint, find_layers(checkpoint))}
    plain, searched = parse_scheme("int4.g16"), parse_scheme("int4.g16@mse")
    for name in ("layers.0.mlp.down", "layers.1.attn.qkv"):
        site = sites[name]
        samples = []
        for path in stats.sequence_files("a"):
            with SequenceFile(path) as file:
                samples.append({one.name: file.read(one.name) for one in site.consumers})
        draws = stats.plan.draws
        share = 1 / (len(samples) * draws * 2 * stats.plan.sequence_length)
        hessian_II, total = torch.tensor(0.0, dtype=torch.float64), 0.0
        rows = {one.name: torch.zeros(one.out_features).double() for one in site.consumers}
        for by_layer in samples:
            for draw in range(draws):
                size_T = torch.tensor(0.0).double()
                for layer, one in by_layer.items():
                    assert one is not None
                    squared_TO = one.grad_DTO[draw].double().square()
                    size_T = size_T + squared_TO.sum(1)
                    rows[layer] += squared_TO.sum(0)
                    x_TI = one.x_TI.double()
                hessian_II = hessian_II + share * (x_TI.T * size_T) @ x_TI
                total += float(size_T.sum())
        damped = hessian_II.diagonal() + DAMPING * hessian_II.diagonal().mean()
        relative_I = factorise_hessian(hessian_II).cost_I.double()
        cost_I = relative_I * float(damped[-1] / relative_I[-1])
        expected = 0.0
        for consumer in site.consumers:
            weight_OI = read_tensor(checkpoint.tensors[consumer.tensor]).float()
            delta_OI = fake_quantize_weight(weight_OI, plain.quantized_weight) - weight_OI
            row_O = (delta_OI.double().square() * cost_I).sum(1)
            expected += float((row_O * rows[consumer.name]).sum()) / total
        choice = choose_best(
            checkpoint,
            site,
            [searched],
            stats=stats,
            methods=("awq",),
            fitted={searched.name},
        )
        assert choice.nats_before == pytest.approx(expected, rel=1e-4)
        assert choice.nats_after <= choice.nats_before
        assert choice.scheme == searched.name


@pytest.mark.parametrize("is_fitted", [False, True])
def test_a_site_whose_inputs_are_all_zero_is_left_alone(
    tiny: TinyCheckpoint, tmp_path: Path, is_fitted: bool
) -> None:
    def silence(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("up_proj.weight"):
                tensor.zero_()

    model = copy_with_tensors(tiny("llama", dtype=torch.float32), tmp_path / "model", silence)
    stats = calibrate_folder(model, tmp_path / "stats", {"a": some_tokens(3, 24)})
    checkpoint = open_checkpoint(str(model))
    sites = {site.group: site for site in find_sites(checkpoint, find_layers(checkpoint))}
    choice = choose_best(
        checkpoint,
        sites["layers.0.mlp.down"],
        [parse_scheme("int4.g16@mse+int8.token")],
        stats=stats,
        methods=("smoothquant", "bismooth"),
        fitted={"int4.g16@mse+int8.token"} if is_fitted else (),
    )
    assert (choice.strength, choice.nats_before, choice.nats_after) == (None, 0.0, 0.0)


def test_shared_heads_share_their_scales(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    """The tiny Llama has twice as many query heads as key-value heads."""
    checkpoint = open_checkpoint(str(tiny("llama")))
    sites = {s.group: s for s in find_sites(checkpoint, find_layers(checkpoint))}
    site = sites["layers.0.attn.o"]
    assert site.producer is not None
    heads = int(checkpoint.config["num_attention_heads"])
    width = site.consumers[0].in_features // heads
    shared = heads // int(checkpoint.config["num_key_value_heads"])
    assert shared > 1
    assert site.scales == site.producer.out_features
    for i, scale in enumerate(site.scale_of_I):
        assert scale == (i // width // shared) * width + i % width


def test_outliers_that_move_are_predicted_and_measured_to_cost_less(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    model = outlier_model(tiny, tmp_path / "model")
    out, stats, choices = rewritten(model, tmp_path, "smoothquant")
    again = calibrate_folder(out, tmp_path / "again", {"a": some_tokens(3, 24)})
    for folder, of, predicted in (
        (model, stats, [c.nats_before for c in choices]),
        (out, again, [c.nats_after for c in choices]),
    ):
        checkpoint = open_checkpoint(str(folder))
        path = tmp_path / f"{folder.name}.jsonl"
        space = space_of(INT8)
        measure(checkpoint, find_layers(checkpoint), space, table_path=path, stats=of)
        rows = read_table(path).rows_of("kl_nats_per_token", "a")
        found = [next(r.error for r in rows[c.site.group] if r.scheme == INT8) for c in choices]
        assert sum(predicted) == pytest.approx(sum(found), rel=0.1)
    assert sum(c.nats_after for c in choices) < 0.5 * sum(c.nats_before for c in choices)


@pytest.mark.parametrize("method", METHODS)
def test_no_site_is_predicted_worse_than_it_was(
    tiny: TinyCheckpoint, tmp_path: Path, method: str
) -> None:
    model = tiny("llama")
    stats = calibrate_folder(model, tmp_path / "stats", {"a": some_tokens(2, 16)})
    checkpoint = open_checkpoint(str(model))
    moved = set()
    for site in find_sites(checkpoint, find_layers(checkpoint))[:4]:
        for scheme in (INT8, "fp8_e4m3.tensor+fp8_e4m3.tensor", "int4.g32", "bf16"):
            choice = choose_scales(
                checkpoint, site, parse_scheme(scheme), stats=stats, method=method
            )
            if choice.strength is None:
                assert choice.nats_after == choice.nats_before
                assert torch.equal(choice.scale_P, torch.ones_like(choice.scale_P))
            else:
                assert choice.nats_after < choice.nats_before
                moved.add(scheme)
    assert INT8 in moved
    assert "bf16" not in moved  # nothing is rounded, and leaving a site alone wins a tie


def test_gradients_of_one_layer_are_in_memory_at_a_time(
    tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, before = tiny("llama"), list[ref[Tensor]]()
    stats = calibrate_folder(model, tmp_path / "stats", {"a": some_tokens(2, 16)}, draws=2)
    checkpoint = open_checkpoint(str(model))
    site = find_sites(checkpoint, find_layers(checkpoint))[0]
    module = import_module("mofq.delivery.rewriting.choose_scales")
    read, asked = module._gradients, list[str]()

    def watched(sequences: list[Any], layer: str) -> list[Tensor]:
        assert not any(one() is not None for one in before)
        asked.append(layer)
        found = read(sequences, layer)
        before[:] = [ref(one) for one in found]
        return found

    monkeypatch.setattr(module, "_gradients", watched)
    choose_scales(checkpoint, site, parse_scheme(INT8), stats=stats, method="smoothquant")
    assert asked == [layer.name for layer in site.consumers]
    assert len(before) == 2 * 2


def test_smoothquant_at_one_half_makes_both_ranges_equal() -> None:
    ranges = InputRanges(
        amax_P=torch.tensor([1.0, 16.0, 0.25, 0.0]).double(),
        mean_P=torch.tensor([1.0, 4.0, 0.125, 0.0]).double(),
        weight_P=torch.tensor([1.0, 1.0, 4.0, 2.0]).double(),
    )
    proposals = {s.alpha: p for s, p in propose_scales("smoothquant", ranges, powers_of_two=False)}
    scale_P = proposals[0.5]
    ratio_P = (ranges.amax_P / scale_P) / (ranges.weight_P * scale_P)
    assert torch.allclose(ratio_P[:3], ratio_P[0].expand(3))
    assert scale_P[3] == 1
    awq = {s.alpha: p for s, p in propose_scales("awq", ranges, powers_of_two=False)}
    root = 0.125**0.5
    middle = (2 * root) ** 0.5
    assert awq[0.5][:3].tolist() == pytest.approx([1 / middle, 2 / middle, root / middle])


def test_where_it_comes_from_is_beside_the_weights(tiny_llama: Path, tmp_path: Path) -> None:
    out, stats, choices = rewritten(tiny_llama, tmp_path, "bismooth")
    found = json.loads((out / LINEAGE_FILE).read_text())
    original = open_checkpoint(str(tiny_llama))
    assert found["model"]["index_sha256"] == original.index_sha256
    assert found["model"]["weights_sha256"] == hash_weights(original)
    assert found["model"]["weights_sha256"] != hash_weights(open_checkpoint(str(out)))
    assert (found["stats_sha256"], found["method"]) == (stats.sha256, "bismooth")
    assert list(found["sites"]) == [choice.site.group for choice in choices]
    with pytest.raises(RewriteError, match="found files in it"):
        rewrite(open_checkpoint(str(tiny_llama)), stats, out, method="bismooth")


def test_a_rewritten_folder_that_is_not_one_is_found(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    model = outlier_model(tiny, tmp_path / "model")
    out, _, choices = rewritten(model, tmp_path, "smoothquant")
    name = choices[0].site.divided[0]
    wrong = read_tensor(open_checkpoint(str(out)).tensors[name])
    wrong[3] *= 1.01
    damaged = copy_with_tensors(
        out, tmp_path / "damaged", lambda tensors: tensors.update({name: wrong})
    )
    with pytest.raises(RewriteError, match="is not the original times its scales"):
        check_rewritten(open_checkpoint(str(model)), open_checkpoint(str(damaged)), choices)


def test_what_cannot_be_rewritten_is_refused(
    tiny: TinyCheckpoint, tiny_llama: Path, tmp_path: Path
) -> None:
    stats = calibrate_folder(tiny_llama, tmp_path / "stats", {"a": some_tokens(2, 16)})
    checkpoint = open_checkpoint(str(tiny_llama))
    out = tmp_path / "out"
    with pytest.raises(RewriteError, match="fitted to a model after it was rewritten"):
        rewrite(checkpoint, stats, out, method="awq", scheme="int4.g32~gptq")
    with pytest.raises(StatsError, match="but the model is qwen3"):
        rewrite(open_checkpoint(str(tiny("qwen3"))), stats, out, method="awq")
    again = copy_with_tensors(
        tiny_llama,
        tmp_path / "again",
        lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"] * 2}),
    )
    of_weights = calibrate_folder(
        tiny_llama,
        tmp_path / "of-weights",
        {"a": some_tokens(2, 16)},
        weights_sha256=hash_weights(checkpoint),
    )
    with pytest.raises(StatsError, match="other weights of the same shapes"):
        rewrite(open_checkpoint(str(again)), of_weights, out, method="awq")
    gpt2 = open_checkpoint(str(tiny("gpt2")))
    with pytest.raises(RewriteError, match="where a scale can move in a 'gpt2' is not known"):
        find_sites(gpt2, find_layers(gpt2))
    assert not out.exists()


@pytest.mark.parametrize("is_fitted", [False, True])
def test_inputs_keep_their_rule_where_scales_of_weights_are_not_searched(
    tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_fitted: bool
) -> None:
    model = tiny("llama")
    stats = calibrate_folder(model, tmp_path / "stats", {"a": some_tokens(2, 16)})
    checkpoint = open_checkpoint(str(model))
    predicted: list[str] = []

    def predict(*args: Any, scales: list[Tensor], **_: Any) -> list[float]:
        predicted.append(args[2].name)
        return [1.0] * len(scales)

    monkeypatch.setattr(choosing, "_predict", predict)
    name = "nvfp4@fouroversix+nvfp4@fouroversix"
    choose_best(
        checkpoint,
        find_sites(checkpoint, find_layers(checkpoint))[0],
        [parse_scheme(name)],
        stats=stats,
        methods=("smoothquant",),
        fitted={name} if is_fitted else (),
    )
    assert predicted == ["nvfp4+nvfp4@fouroversix", name][: 1 if is_fitted else 2]


def test_leaving_a_site_alone_wins_a_tie_under_whichever_scheme(
    tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    stats = calibrate_folder(model, tmp_path / "stats", {"a": some_tokens(2, 16)})
    checkpoint = open_checkpoint(str(model))

    def predict(*args: Any, scales: list[Tensor], **_: Any) -> list[float]:
        is_coarse = args[2].name == "int4.g32"
        return [9.0 if is_coarse else 3.0, *[3.0 for _ in scales[1:]]]

    monkeypatch.setattr(choosing, "_predict", predict)
    choice = choose_best(
        checkpoint,
        find_sites(checkpoint, find_layers(checkpoint))[0],
        [parse_scheme("int4.g32"), parse_scheme("int8.channel")],
        stats=stats,
        methods=("awq",),
    )
    assert (choice.strength, choice.scheme) == (None, "int8.channel")
    assert choice.nats_before == choice.nats_after == 3.0


def one_sequence(x_TI: Tensor) -> choosing._Sequence:
    return choosing._Sequence(Path("none"), 0, x_TI, 0.5)


def pivots(x_TI: Tensor, *scales: Tensor, group: str = "site") -> Tensor:
    """Of a Hessian in which each token counts 1."""
    size_T = torch.full((len(x_TI),), 2.0, dtype=torch.float64)
    every = scales or (torch.ones(x_TI.shape[1], dtype=torch.float64),)
    return choosing._pivots([one_sequence(x_TI)], [size_T], every, group)


def test_columns_of_a_wide_hessian_are_damped_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the mean of the whole diagonal, as where codes are fitted."""
    large_I = torch.tensor([1.0, 2.0, 0.0, 0.0, 16.0, 32.0])
    expected_I = large_I.double().square()
    expected_I = expected_I + DAMPING * float(expected_I.mean())
    mixed_TI = large_I.diag() + torch.ones(6, 6)
    whole_PI = pivots(mixed_TI)
    for columns in (6, 4, 2, 1):
        monkeypatch.setattr(choosing, "_FACTORISED", columns)
        assert torch.allclose(pivots(large_I.diag())[0], expected_I, rtol=1e-12)
        # What later squares could make up for is left out, and nothing else.
        assert bool((pivots(mixed_TI) >= whole_PI * (1 - 1e-12)).all())


def test_damping_follows_an_input_whose_scale_moves() -> None:
    """One that stands out raises the damping of all columns no longer."""
    x_TI = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    scale_I = torch.ones(8, dtype=torch.float64)
    scale_I[3] = 100
    found_PI = pivots(x_TI * scale_I.float(), torch.ones_like(scale_I), scale_I)
    moved_I = pivots((x_TI * scale_I.float()).double() / scale_I)[0]
    assert torch.allclose(found_PI[1] / scale_I.square(), moved_I, rtol=1e-9)
    assert bool((found_PI[0, :3] > 2 * found_PI[1, :3]).all())


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_proposals_are_ranked_as_fitted_codes_rank_them(
    tiny: TinyCheckpoint, tmp_path: Path, family: str
) -> None:
    """By codes that are fitted to each proposal, and what these cost by the Hessian itself."""
    model = outlier_model(tiny, tmp_path / "model", family)
    stats = calibrate_folder(model, tmp_path / "stats", {"a": some_tokens(4, 48)}, kept=4)
    checkpoint = open_checkpoint(str(model))
    plain, fitted = parse_scheme("int4.g16"), parse_scheme("int4.g16~gptq")
    for site in find_sites(checkpoint, find_layers(checkpoint)):
        if site.producer is not None:  # what differs there is less than how rounding falls
            continue
        sequences = list(choosing._read_sequences(stats, site))
        proposals = choosing._propose(
            checkpoint, site, stats, ("smoothquant", "awq"), powers_of_two=False
        )
        scales = [one.scale_P[list(site.scale_of_I)] for one in proposals]
        columns = choosing._columns(sequences, site, scales)
        found = choosing._predict(
            checkpoint, site, plain, sequences=sequences, scales=scales, columns=columns
        )
        needed = [0.0] * len(scales)
        for layer in site.consumers:
            weight_OI = read_tensor(checkpoint.tensors[layer.tensor]).double()
            hessian_II = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64)
            for one, grad_TO in zip(
                sequences, choosing._gradients(sequences, layer.name), strict=True
            ):
                x_TI, size_T = one.x_TI.double(), grad_TO.double().square().sum(1)
                hessian_II += one.share * (x_TI.T * size_T) @ x_TI
            for at, scale_I in enumerate(scales):
                moved_OI = (weight_OI * scale_I).float()
                feedback = factorise_hessian(hessian_II / scale_I / scale_I[:, None])
                rounded_OI = fake_quantize_weight(
                    moved_OI, fitted.quantized_weight, feedback=feedback
                )
                delta_OI = (rounded_OI.double() - moved_OI) / scale_I
                row_O = ((delta_OI @ hessian_II) * delta_OI).sum(1)
                needed[at] += float((row_O * columns.share_R[layer.name]).sum())
        ranks_2P = torch.tensor([found, needed]).argsort(1).argsort(1).double()
        assert float(torch.corrcoef(ranks_2P)[0, 1]) > 0.9, site.group


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_by_inputs_that_are_not_finite_no_scale_is_chosen(value: float) -> None:
    x_TI = torch.ones(4, 3)
    x_TI[1, 2] = value
    with pytest.raises(SchemeError, match=r"layers\.0\.mlp\.up: an input .* not finite"):
        pivots(x_TI, group="layers.0.mlp.up")
