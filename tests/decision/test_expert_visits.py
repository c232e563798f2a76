"""Bits per weight that a token reads of a mixture: as a figure and as a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from mofq.decision import Budgets, Request, decide, request_problem
from mofq.decision.expert_visits import FEW_VISITS, active_weights, rare_experts
from mofq.decision.measured.measurement import decide_again
from mofq.evidence.table import (
    Row,
    Table,
    TableGroup,
    TableHeader,
    TableLayer,
    TableModel,
    TableStats,
    Visits,
)
from mofq.exceptions import BudgetError

#: Group -> the share of tokens that come to it; a weight each of 100 weights.
SHARES = {"layers.0.attn.o": 1.0, "layers.0.moe.experts.0": 0.5, "layers.0.moe.experts.1": 0.125}
TOKENS = 800
#: Scheme -> bytes of a group and its error.
SCHEMES = {"int4.g32": (50, 4.0), "int8.channel": (100, 1.0), "bf16": (200, 0.0)}


def table_of(shares: Mapping[str, float] = SHARES) -> Table:
    groups = []
    for name in SHARES:
        module = "experts.down_proj" if "experts" in name else "o_proj"
        layer = TableLayer(f"model.{name}.{module}", 10, 10, "BF16", 0, module)
        groups.append(TableGroup(name, (layer,), source_bytes=200))
    header = TableHeader(
        mofq="0.2",
        model=TableModel("m", "a" * 64),
        stats=TableStats("b" * 64, 0, {"en": "c" * 64}, samples=4, sequence_length=200),
        groups=tuple(groups),
        unquantized=(),
        other_bytes=0,
    )
    rows = tuple(
        Row(group.name, scheme, "kl_nats_per_token", "en", error, 0.0, size, None, (error,) * 4)
        for group in groups
        for scheme, (size, error) in SCHEMES.items()
    )
    visits = tuple(
        Visits(group.name, "en", TOKENS, {group.layers[0].name: int(shares[group.name] * TOKENS)})
        for group in groups
        if "experts" in group.name and group.name in shares
    )
    return Table(header, (), (), rows, sha256="d" * 64, visits=visits)


def schemes_of(table: Table, **budgets: float) -> dict[str, str]:
    recipe = decide(table, Request(Budgets(**budgets), ties=False)).recipe  # type: ignore[arg-type]
    return {group.name: group.scheme for group in recipe.groups}


def test_bits_per_active_weight_count_each_expert_by_its_share_of_tokens() -> None:
    table = table_of()
    problem = request_problem(table)
    active = active_weights(table, problem)
    assert active is not None
    schemes = dict(zip(SHARES, ("bf16", "int8.channel", "int4.g32"), strict=True))
    choice_F = problem.choice_of(schemes)
    # Without the 16 bytes in which a packed layer notes its shape.
    needed = 200 + 0.5 * (100 - 16) + 0.125 * (50 - 16)
    assert active.bytes(problem, choice_F) == needed
    assert active.bits(problem, choice_F) == 8 * needed / (100 * 1.625)


def test_a_budget_of_active_bits_takes_bits_from_what_every_token_reads() -> None:
    """The rare expert costs the budget least and the error most: it keeps its bits."""
    found = schemes_of(table_of(), max_active_bits=9.0)
    assert found["layers.0.moe.experts.1"] == "bf16"
    assert found["layers.0.attn.o"] == "int8.channel"
    even = schemes_of(table_of(dict.fromkeys(SHARES, 1.0)), max_active_bits=9.0)
    assert even["layers.0.moe.experts.1"] == "int8.channel"


def test_a_recipe_says_what_a_token_reads_and_keeps_the_budget() -> None:
    recipe = decide(table_of(), Request(Budgets(max_active_bits=9.0))).recipe
    assert recipe.budget["active_bits"] == 9.0
    assert recipe.result.active_bits is not None
    assert recipe.result.active_bits <= 9.0
    bytes_per_token = recipe.result.active_bytes_per_token
    assert bytes_per_token == pytest.approx(recipe.result.active_bits * 162.5 / 8)


def test_a_recipe_that_measuring_changed_says_what_a_token_reads_too() -> None:
    table, request = table_of(), Request(Budgets(max_active_bits=9.0))
    decision = decide(table, request)
    other_F = decision.problem.choice_of(dict.fromkeys(SHARES, "int4.g32"))
    active = active_weights(table, decision.problem)
    assert active is not None
    again = decide_again(table, request, decision, other_F).recipe.result
    assert again.active_bits == active.bits(decision.problem, other_F)
    assert again.active_bytes_per_token == active.bytes(decision.problem, other_F)


def test_a_budget_of_active_bits_needs_visits_to_every_group_of_experts() -> None:
    table = table_of()
    for visits in ((), table.visits[:1]):
        with pytest.raises(BudgetError, match=r"max_active_bits.*measure"):
            schemes_of(replace(table, visits=visits), max_active_bits=9.0)


def test_experts_that_few_tokens_came_to_are_named_to_whoever_decides() -> None:
    assert rare_experts(table_of()) == []
    rare = table_of({**SHARES, "layers.0.moe.experts.1": (FEW_VISITS - 1) / TOKENS})
    (line,) = rare_experts(rare)
    assert "1 layers of experts, e.g. model.layers.0.moe.experts.1.experts.down_proj" in line
    assert line in decide(rare, Request(Budgets(max_bits=9.0))).notes
