from __future__ import annotations

from dataclasses import replace

import pytest

from mofq.decision import Budgets, Request, request_problem, solve_exact
from mofq.evidence.table import (
    Row,
    Table,
    TableGroup,
    TableHeader,
    TableLayer,
    TableModel,
    TableSpace,
    TableStats,
)
from mofq.exceptions import TableError

SCHEMES = ("int8.channel", "int4.g32")
STATS = TableStats("5" * 64, 0, {"en": "6" * 64, "pt": "7" * 64}, 2, 512)


def group(name: str, layers: int = 1) -> TableGroup:
    members = tuple(TableLayer(f"{name}.{i}", 8, 16, "BF16", 0, "o") for i in range(layers))
    return TableGroup(name, members, source_bytes=256 * layers)


def row(group_name: str, scheme: str, error: float, size: int, **changes: object) -> Row:
    one = Row(group_name, scheme, "relative_weight_error", None, error, None, size, None)
    return replace(one, **changes)  # type: ignore[arg-type]


def in_nats(group_name: str, scheme: str, error: float, size: int, corpus: str) -> Row:
    return row(
        group_name,
        scheme,
        error,
        size,
        unit="kl_nats_per_token",
        corpus=corpus,
        stderr=0.5 * error,
        sample_errors=(0.5 * error, 1.5 * error),
    )


def table_of(
    *rows: Row, spaces: tuple[TableSpace, ...] = (), stats: TableStats | None = None
) -> Table:
    names = dict.fromkeys(one.group for one in rows)
    header = TableHeader(
        mofq="0.1.0",
        model=TableModel("m", "a" * 64),
        stats=stats,
        groups=tuple(map(group, names)),
        unquantized=(),
        other_bytes=1000,
    )
    return Table(header, spaces, (), rows, "b" * 64)


def space(
    name: str, schemes: tuple[str, ...], base: tuple[str, ...] = (), gain: float = 10.0
) -> TableSpace:
    return TableSpace(name, "8" * 64, schemes, base, gain, None, "0.1.0")


WEIGHT_ROWS = [
    *(row(name, "int4.g32", 4.0, 72) for name in ("a", "b")),
    *(row(name, "int8.channel", 1.0, 136) for name in ("a", "b")),
    *(row(name, "bf16", 0.0, 256) for name in ("a", "b")),
]


def test_a_table_becomes_a_problem_that_can_be_solved() -> None:
    spaces = (space("w", ("int8.channel", "int4.g32"), base=("int8.channel",), gain=3.0),)
    problem = request_problem(table_of(*WEIGHT_ROWS, spaces=spaces))
    assert (problem.unit, problem.corpora) == ("relative_weight_error", (None,))
    assert problem.other_bytes == 1000
    assert problem.min_gain == 3.0
    assert problem.schemes == ("bf16", "int8.channel", "int4.g32") * 2
    assert problem.is_base_P.tolist() == [False, True, False] * 2
    assert problem.weights == 2 * 8 * 16
    found = solve_exact(problem, Budgets(max_bytes=1000 + 136 + 72))
    assert sorted(problem.schemes_of(found.choice_F).values()) == ["int4.g32", "int8.channel"]


def test_nats_are_preferred_once_every_group_has_them() -> None:
    nats = [
        in_nats(name, scheme, 1.0, 72, corpus)
        for name in ("a", "b")
        for scheme in SCHEMES
        for corpus in ("en", "pt")
    ]
    assert request_problem(table_of(*WEIGHT_ROWS, *nats, stats=STATS)).unit == ("kl_nats_per_token")
    half = [one for one in nats if one.group == "a"]
    assert request_problem(table_of(*WEIGHT_ROWS, *half, stats=STATS)).unit == (
        "relative_weight_error"
    )


def test_the_tensor_error_of_mofq_is_the_noise_of_the_weights() -> None:
    # 20 dB and 10 dB: a hundredth and a tenth of the weights' energy, whatever the other unit says.
    rows = [
        *(row(name, "int4.g32", 1.0, 72, sqnr_db=10.0) for name in ("a", "b")),
        *(row(name, "int8.channel", 4.0, 136, sqnr_db=20.0) for name in ("a", "b")),
        *(row(name, "bf16", 0.0, 256, sqnr_db=None) for name in ("a", "b")),
    ]
    problem = request_problem(table_of(*rows), Request(unit="tensor_mse"))
    assert problem.unit == "tensor_mse"
    assert problem.error_PC[:, 0].tolist() == pytest.approx([0.0, 0.01, 0.1] * 2)


def test_samples_of_every_corpus_come_along() -> None:
    rows = [
        *(in_nats("a", "int8.channel", error, 136, corpus) for error, corpus in CORPORA),
        *(in_nats("a", "int4.g32", 2 * error, 72, corpus) for error, corpus in CORPORA),
        *(row("a", "bf16", 0.0, 256, unit="kl_nats_per_token", corpus=c) for _, c in CORPORA),
    ]
    problem = request_problem(table_of(*rows, stats=STATS))
    assert problem.corpora == ("en", "pt")
    assert problem.sample_errors is not None
    assert problem.sample_errors[1].tolist() == [[0.0, 0.0], [1.5, 4.5], [3.0, 9.0]]
    assert problem.error_PC.tolist() == [[0.0, 0.0], [1.0, 3.0], [2.0, 6.0]]


CORPORA = [(1.0, "en"), (3.0, "pt")]


def test_weights_are_of_all_corpora_in_whatever_order() -> None:
    rows = [in_nats("a", "int8.channel", error, 136, corpus) for error, corpus in CORPORA]
    table = table_of(*rows, stats=STATS)
    problem = request_problem(table, Request(corpus_weights={"pt": 1.0, "en": 3.0}))
    assert problem.corpus_weights == (3.0, 1.0)
    assert problem.cost_PK.tolist() == [[1.5]]
    with pytest.raises(TableError, match=r"each corpus \(en, pt\), found none of 'pt'\. Give 0"):
        request_problem(table, Request(corpus_weights={"en": 1.0}))
    with pytest.raises(TableError, match="no corpus 'de'"):
        request_problem(table, Request(corpus_weights={"en": 1.0, "pt": 1.0, "de": 1.0}))
    with pytest.raises(TableError, match="relative_weight_error, which rests on no corpus"):
        request_problem(table_of(*WEIGHT_ROWS), Request(corpus_weights={"en": 1.0}))


def test_a_space_by_name_leaves_the_schemes_of_the_others_out() -> None:
    spaces = (
        space("w8", ("int8.channel",), base=("int8.channel",)),
        space("w4", ("int4.g32",), base=("int4.g32",), gain=2.0),
    )
    table = table_of(*WEIGHT_ROWS, spaces=spaces)
    four = request_problem(table, Request(space="w4"))
    assert four.schemes == ("bf16", "int4.g32") * 2
    assert four.min_gain == 2.0
    both = request_problem(table)
    assert set(both.schemes) == {"bf16", *SCHEMES}
    assert both.min_gain == 10.0
    with pytest.raises(TableError, match=r"'w5' was not measured. Did you mean 'w"):
        request_problem(table, Request(space="w5"))


def test_a_space_that_grew_counts_as_it_was_measured_last() -> None:
    before = space("serving", ("int8.channel",))
    assert request_problem(
        table_of(*WEIGHT_ROWS, spaces=(before,)), Request(space="serving")
    ).schemes == (("bf16", "int8.channel") * 2)
    grown = space("serving", ("int8.channel", "int4.g32"))
    table = table_of(*WEIGHT_ROWS, spaces=(before, grown))
    assert set(request_problem(table, Request(space="serving")).schemes) == {"bf16", *SCHEMES}


def test_what_is_not_legal_is_not_offered_and_a_group_without_an_offer_does_not_count() -> None:
    table = table_of(*WEIGHT_ROWS)

    def is_legal(group: TableGroup, scheme: str) -> bool:
        return group.name == "a" or scheme == "bf16"

    problem = request_problem(table, is_legal=is_legal)
    assert [len(problem.options_of(g)) for g in (0, 1)] == [3, 1]
    assert [one.counted for one in problem.groups] == [True, False]
    with pytest.raises(TableError, match=r"a: none of its measured schemes .*int4.g32"):
        request_problem(table, is_legal=lambda group, scheme: False)


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        (WEIGHT_ROWS, {"unit": "kl"}, "no errors are in 'kl'"),
        (WEIGHT_ROWS, {"unit": "output_mse"}, "a: has no row in output_mse"),
        (
            [
                in_nats("a", "int8.channel", 1.0, 136, "en"),
                in_nats("a", "int4.g32", 1.0, 136, "en"),
                in_nats("a", "int4.g32", 1.0, 136, "pt"),
            ],
            {},
            "a: int8.channel has no row of the corpus 'pt'",
        ),
    ],
)
def test_what_the_table_does_not_have_is_named(
    rows: list[Row], keys: dict[str, object], message: str
) -> None:
    table = table_of(*rows, stats=STATS)
    with pytest.raises(TableError, match=message):
        request_problem(table, Request(**keys))  # type: ignore[arg-type]


def test_a_table_that_is_not_finished_says_which_group_is_missing() -> None:
    table = table_of(*WEIGHT_ROWS)
    unfinished = replace(table, rows=tuple(one for one in table.rows if one.group == "a"))
    with pytest.raises(TableError, match=r"no row of b \(1 of 2 fusion groups are measured\)"):
        request_problem(unfinished)
