"""Time as a budget, and why a layer has its scheme: on tables worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from test_decide import ERRORS, space, table_of

from mofq.decision import Budgets, Decision, Request, decide
from mofq.decision.advice import Situation, advise
from mofq.decision.explain import explain
from mofq.decision.model_error import row_error
from mofq.decision.recipe import RecipeGroup, load_recipe, write_recipe
from mofq.decision.recipe_difference import compare_recipes
from mofq.decision.request import TimeRequest
from mofq.decision.timing import recipe_seconds
from mofq.engines.devices import DEVICE_MODELS, DeviceModel
from mofq.engines.latency import parse_workload
from mofq.evidence.spaces import find_search_spaces
from mofq.evidence.table import TableModel
from mofq.exceptions import BudgetError, MofqError, RecipeError

#: Only bytes take time: 1 us for each.
DEVICE = DeviceModel("d", 10**9, 1e6, {"bf16": 1e15, "int8": 1e15}, (9, 0), "test")
#: Linear layers of LLaMA3-70B.
LARGE = 68 * 10**9
WORKLOAD = parse_workload("decode:batch=1,context=1")


def schemes_of(decision: Decision) -> dict[str, str]:
    """Fusion group -> scheme."""
    return {group.name: group.scheme for group in decision.recipe.groups}


def timed(max_seconds: float | None) -> Request:
    return Request(Budgets(), time=TimeRequest(DEVICE, WORKLOAD, max_seconds), ties=False)


def test_a_time_is_kept_and_reported() -> None:
    # Bytes as exported: 2 layers of 16 x 32 weights.
    table = table_of()
    free = decide(table, timed(None))
    assert set(schemes_of(free).values()) == {"bf16"}
    assert free.recipe.result.seconds == free.unquantized_seconds
    assert free.recipe.budget == {"device": "d", "workload": WORKLOAD.text}
    everything = free.unquantized_seconds
    assert everything is not None
    # INT8 saves 2 * (1024 - 512 - 32 - 16) us of each group: one group must give way,
    # and INT8 costs group a less.
    kept = decide(table, timed(everything - 1e-4))
    assert schemes_of(kept) == {"a": "int8.channel", "b": "bf16"}
    seconds = kept.recipe.result.seconds
    assert seconds == pytest.approx(everything - 928e-6)
    assert seconds == recipe_seconds(table, schemes_of(kept), TimeRequest(DEVICE, WORKLOAD))
    assert kept.recipe.budget["seconds"] == everything - 1e-4


def test_an_impossible_time_names_the_least_possible(tmp_path_factory: object) -> None:
    table = table_of()
    with pytest.raises(BudgetError, match=r"max_time: asked for 0.001 ms; the smallest") as caught:
        decide(table, timed(1e-6))
    least = float(str(caught.value).rsplit(" ", 2)[-2])
    found = decide(table, timed(least / 1e3))
    assert set(schemes_of(found).values()) == {"int4.g32"}


def test_a_recipe_with_a_time_is_read_back(tmp_path_factory: pytest.TempPathFactory) -> None:
    recipe = decide(table_of(), timed(1.0)).recipe
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    write_recipe(recipe, path)
    assert load_recipe(path) == recipe


def test_an_engine_of_another_generation_is_refused() -> None:
    request = replace(timed(1.0), engine="vllm-ampere")
    with pytest.raises(BudgetError, match="Engines for it: vllm-hopper"):
        decide(table_of(), request)
    on_cpu = replace(timed(1.0), engine="vllm-cpu")
    assert decide(table_of(), on_cpu).recipe.made_by["engine"] == "vllm-cpu"


def test_the_chosen_scheme_is_the_best_deal_at_the_shadow_price() -> None:
    # a: INT8 saves 7 for 512 bytes, b: 1 for 512; there is room for one of them.
    table = table_of()
    request = Request(Budgets(max_bytes=1000 + 576 + 1088), ties=False)
    decision = decide(table, request)
    assert schemes_of(decision) == {"a": "int8.channel", "b": "int4.g32"}
    found = explain(table, request, decision, "m.a.1")
    assert (found.group, found.chosen, found.layers) == ("a", "int8.channel", ("m.a.0", "m.a.1"))
    price = found.prices["max_bytes"]
    # Between what the last step taken and the first one left out gain for each byte.
    assert 1 / 512 <= price <= 7 / 512
    by_scheme = {one.scheme: one for one in found.alternatives}
    assert found.alternatives[0].scheme == "int8.channel"
    int4 = by_scheme["int4.g32"]
    assert int4.difference is not None
    assert int4.difference.value == 7.0
    assert int4.priced_difference == pytest.approx(7 - 512 * price)
    assert by_scheme["bf16"].priced_difference == pytest.approx(-1 + 960 * price)
    assert "best deal" in found.why


def test_a_budget_of_nats_has_its_own_price() -> None:
    # There is room for one INT8, which is 0.5 better and takes 1.5 nats more of the budget.
    errors = {name: {"int4.g32": (1.5, 100), "int8.channel": (1.0, 100)} for name in "ab"}
    table = table_of(errors, samples=2)
    stderrs = {"int4.g32": 0.0, "int8.channel": 1.0}
    rows = tuple(replace(one, stderr=stderrs[one.scheme]) for one in table.rows)
    table = replace(table, rows=rows)
    request = Request(Budgets(max_kl=4.5), ties=False)
    decision = decide(table, request)
    assert sorted(schemes_of(decision).values()) == ["int4.g32", "int8.channel"]
    for group in "ab":
        found = explain(table, request, decision, group)
        assert found.prices == {"max_kl": pytest.approx(1 / 3)}
        assert [one.priced_difference for one in found.alternatives] == pytest.approx([0, 0])


def test_differences_are_paired_and_rejections_are_told() -> None:
    table = table_of(samples=8)
    request = Request(Budgets(max_bits=4.5), engine="vllm-hopper")
    found = explain(table, request, decide(table, request), "b")
    int8 = next(one for one in found.alternatives if one.scheme == "int8.channel")
    assert int8.difference is not None
    assert int8.difference.value == pytest.approx(-1.0)
    # Samples scatter by a tenth of the error: the difference's by a tenth of the difference.
    assert int8.difference.stderr == pytest.approx(0.1 / 7**0.5)
    assert int8.stderr == pytest.approx(math.hypot(0.2 / 8**0.5, row_error().stderr(2.0)))
    assert (int8.low, int8.high) == pytest.approx((2 - 2 * int8.stderr, 2 + 2 * int8.stderr))
    with pytest.raises(MofqError, match=r"Did you mean 'm\.b\.1'"):
        explain(table, request, decide(table, request), "m.b.11")


def test_schemes_of_the_space_that_a_group_has_no_row_of_are_told() -> None:
    # `mofq run` measures fitted twins where a search chooses them: here of group a alone.
    errors = {
        "a": {**ERRORS["a"], "int4.g32~gptq": (4.0, 576)},
        "b": ERRORS["b"],
    }
    fitted = space("run", "int4.g32", "int8.channel", "bf16", "int4.g32~gptq")
    either = replace(fitted, candidates=(("int4.g32", "int4.g16"), ("int4.g32~gptq",)))
    request = Request(Budgets(max_bits=4.5), ties=False)
    for one in (fitted, either):
        table = table_of(errors, spaces=(one,))
        decision = decide(table, request)
        assert explain(table, request, decision, "a").rejected.get("int4.g32~gptq") is None
        told = explain(table, request, decision, "b").rejected
        assert "was not measured of this fusion group" in told["int4.g32~gptq"]
        assert "int4.g16" not in told  # one entry with int4.g32, which is measured


def test_a_finer_scheme_that_gains_too_little_is_marked() -> None:
    errors = {
        name: {"int8.channel": (1.0 + gain, 1088), "int8.g32": (1.0, 1120)}
        for name, gain in (("a", 100.0), ("b", 1.0), ("c", 1.0), ("d", 1.0), ("e", 1.0))
    }
    finer = space("s", "int8.channel", "int8.g32", base=("int8.channel",))
    table = table_of(errors, spaces=(replace(finer, min_gain=10.0),))
    request = Request(Budgets(max_finer=0.2))
    decision = decide(table, request)
    assert decision.finer_layers == ("m.a.0", "m.a.1")
    found = explain(table, request, decision, "b")
    offered = {one.scheme: one.is_offered for one in found.alternatives}
    assert offered == {"int8.channel": True, "int8.g32": False}
    assert found.why.startswith("int8.channel is the only scheme")


def test_a_difference_of_recipes_is_priced_group_by_group_and_together() -> None:
    table = table_of(samples=8)
    first = decide(table, Request(Budgets(max_bits=4.5), ties=False)).recipe
    second = decide(table, Request(Budgets(max_bits=8.5), ties=False)).recipe
    found = compare_recipes(first, second, table)
    assert [(one.group, one.before, one.after, one.bytes) for one in found.groups] == [
        ("a", "int4.g32", "int8.channel", 512),
        ("b", "int4.g32", "int8.channel", 512),
    ]
    assert found.total is not None
    assert found.total.value == pytest.approx(-7.0 - 1.0)
    errors = [one.error.value for one in found.groups if one.error is not None]
    assert errors == pytest.approx([-7.0, -1.0])
    plain = compare_recipes(first, second)
    assert [one.bytes for one in plain.groups] == [None, None]
    assert plain.total is None
    with_head = (*second.groups, RecipeGroup("lm_head", "int8.channel", ("lm_head",)))
    with pytest.raises(RecipeError, match="lm_head: the table has no fusion group"):
        compare_recipes(first, replace(second, groups=with_head), table)
    other = replace(table, header=replace(table.header, model=TableModel("model", "c" * 64)))
    with pytest.raises(RecipeError, match="Compare two recipes of one model"):
        compare_recipes(first, second, other)


@pytest.mark.parametrize(
    ("device", "deployment", "keys", "space_name", "budget"),
    [
        ("h100", "synchronous", {}, "w4a16", "--max-bits"),
        ("h100", "asynchronous", {}, "w8a8", "--max-bits"),
        ("a100", "asynchronous", {}, "w8a8", "--max-bits"),
        ("l40s", "asynchronous", {}, "w4a16", "--max-bits"),
        ("l40s", "asynchronous", {"recovery": 0.99}, "w8a8", "--max-bits"),
        ("a100", "synchronous", {"recovery": 0.995}, "w4w8_mixed", "--max-bits"),
        (
            "a100",
            "asynchronous",
            {"weights": 68 * 10**9, "tp": 2},
            "llama3_70b_w8a8",
            "--max-finer",
        ),
        ("h100", "asynchronous", {"weights": 68 * 10**9, "tp": 2}, "w8a8", "--max-bits"),
        ("h100", "asynchronous", {"weights": 68 * 10**9}, "w4w8_mixed", "--max-size"),
    ],
)
def test_advice_follows_the_published_findings(
    device: str, deployment: str, keys: dict[str, float], space_name: str, budget: str
) -> None:
    found = advise(Situation(deployment, DEVICE_MODELS[device], **keys))  # type: ignore[arg-type]
    assert (found.space, found.budget[0]) == (space_name, budget)
    assert found.space in find_search_spaces()
    assert found.rules
    assert all(one.source for one in found.rules)


def test_advice_names_the_finding_and_refuses_a_share_above_one() -> None:
    hopper = advise(Situation("asynchronous", DEVICE_MODELS["h100"]))
    assert hopper.engines[0] == "vllm-hopper"
    assert any("lossless" in one.says and "2411.02355" in one.source for one in hopper.rules)
    large = advise(Situation("asynchronous", DEVICE_MODELS["a100"], weights=68 * 10**9, tp=2))
    assert any("2408.15301" in one.source for one in large.rules)
    with pytest.raises(MofqError, match="at most 1"):
        advise(Situation("synchronous", DEVICE_MODELS["h100"], recovery=99.0))


def test_a_device_of_a_generation_without_rules_says_so() -> None:
    def says(device: str) -> bool:
        found = advise(Situation("synchronous", DEVICE_MODELS[device]))
        return any("No engine was asked" in one.says for one in found.rules)

    assert [name for name in DEVICE_MODELS if says(name)] == [
        "rtx5090",
        "rtx-pro-6000",
        "dgx-spark",
    ]


def test_a_device_may_have_instructions_of_unknown_rate() -> None:
    spark = Situation("asynchronous", DEVICE_MODELS["dgx-spark"], recovery=0.99)
    assert spark.has_fp8
    assert advise(spark).space == "w8a8"
    assert any("multiplies FP4" in one.says for one in advise(spark).rules)
