"""Which model a run goes on with: as it is, or rewritten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
from explore_tables import write_explore_table

from mofq.api import run_evidence
from mofq.api.options import Budget, Choices
from mofq.api.request import make_request
from mofq.api.run_effort import Offered, Timed, Twins
from mofq.api.run_evidence import (
    Evidence,
    Measured,
    Subject,
    gather_evidence,
    rewrite_where_it_pays,
)
from mofq.decision.rewriting import Rewriting, RotatedModel, SiteRewriting
from mofq.evidence.spaces import parse_search_space
from mofq.evidence.table import Row, Table, read_table
from mofq.exceptions import RewriteError

TEXT = "version: 1\nschemes: [int4.g32, int8.channel]\n"
ROUNDS_INPUTS = "int8.channel+int8.token"
SITES = {"layers.0.attn.qkv": SiteRewriting("bismooth", 0.5, 0.5)}
REWRITING = Rewriting("m", "a" * 64, "b" * 64, "c" * 64, SITES)
OTHER = Subject("m-rewritten", Path("stats-rewritten"), Path("table-rewritten.jsonl"), REWRITING)
ROTATION = RotatedModel(seed=0, hidden=64, head=16)
ROTATED = Subject(
    "m-rotated",
    Path("stats-rotated"),
    Path("table-rotated.jsonl"),
    Rewriting("m", "a" * 64, "b" * 64, "c" * 64, rotation=ROTATION),
)
BOTH = Subject(
    "m-both",
    Path("stats-both"),
    Path("table-both.jsonl"),
    Rewriting("m", "a" * 64, "b" * 64, "c" * 64, SITES, rotation=ROTATION),
)


def times(row: Row, ratio: float, scheme: str | None = None) -> Row:
    return replace(
        row,
        scheme=scheme or row.scheme,
        error=ratio * row.error,
        sample_errors=tuple(ratio * one for one in row.sample_errors or ()) or None,
    )


@pytest.fixture
def table(tmp_path: Path) -> Table:
    found = read_table(write_explore_table(tmp_path / "table.jsonl", decoder_layers=4))
    kept = [row for row in found.rows if row.scheme in ("int4.g32", "int8.channel", "bf16")]
    return replace(found, rows=tuple(kept), spaces=())


def gathered(
    table: Table,
    effort: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    rounded: float,
    fitted: float,
    rotated: float | None = None,
) -> tuple[Evidence, set[str]]:
    """What comes of a rewritten model with so many times the errors; what was fitted of which.

    One that is also rotated has half the errors of one that is rotated alone.
    """
    with_twins = set()
    offered = Offered.at(effort, parse_search_space(TEXT, name="some", where="s"))
    asked = Mock(request=make_request(Choices(), budget=Budget(max_bits=5.0)), effort=effort)
    ratios = {"m": (1.0, 0.5), OTHER.model: (rounded, fitted)}
    if rotated is not None:
        ratios |= {ROTATED.model: (rotated, fitted), BOTH.model: (rotated / 2, fitted / 2)}

    def measure(subject: Subject, twins: Twins) -> Table:
        ratio, of_twins = ratios[subject.model]
        rows = [times(row, ratio) for row in table.rows]
        if twins:
            with_twins.add(subject.model)
        rows += [
            times(row, of_twins, twin)
            for row in table.rows
            for twin in twins.get(row.group, ())
            if twin.startswith(row.scheme)
        ]
        return replace(table, rows=tuple(rows))

    asked.model = "m"

    def moved(*_: object, before: Measured, **__: object) -> Subject:
        return OTHER if before.subject.model == "m" else BOTH

    def turned(*_: object, **__: object) -> Subject | None:
        return None if rotated is None else ROTATED

    monkeypatch.setattr(run_evidence, "may_be_rewritten", lambda _: True)
    monkeypatch.setattr(run_evidence, "rewrite_where_it_pays", moved)
    monkeypatch.setattr(run_evidence, "rotate_where_possible", turned)
    evidence = gather_evidence(
        Mock(options=asked, offered=offered, layers=Mock(groups=table.header.groups)),
        Mock(stats=Path("stats"), table=Path("table.jsonl")),
        measure=measure,
        is_stored=True,
        timed=Timed(),
    )
    return evidence, with_twins


@pytest.mark.parametrize(("rounded", "taken"), [(0.5, True), (1.5, False)])
def test_with_normal_effort_codes_are_fitted_to_the_model_that_rounds_better(
    table: Table, monkeypatch: pytest.MonkeyPatch, rounded: float, taken: bool
) -> None:
    evidence, fitted = gathered(table, "normal", monkeypatch, rounded=rounded, fitted=0.1)
    assert (evidence.best.subject is OTHER) is taken
    assert fitted == {evidence.best.subject.model}
    assert [one.is_taken for one in evidence.tried] == [True, taken, True]
    assert evidence.tried[1].name == "scales moved at 1 inputs"


@pytest.mark.parametrize(("fitted", "taken"), [(0.1, True), (0.6, False)])
def test_with_best_effort_codes_are_fitted_to_both_models_and_the_better_one_goes_on(
    table: Table, monkeypatch: pytest.MonkeyPatch, fitted: float, taken: bool
) -> None:
    evidence, of = gathered(table, "best", monkeypatch, rounded=0.9, fitted=fitted)
    assert of == {"m", OTHER.model}
    assert (evidence.best.subject is OTHER) is taken
    assert [one.is_taken for one in evidence.tried] == [True, taken, False, True]
    other = "not rewritten" if taken else "scales moved at 1 inputs"
    assert [one.name for one in evidence.tried[2:]] == [f"fitted codes, {other}", "fitted codes"]
    costs = [one.kl_nats_per_token or 0.0 for one in evidence.tried]
    assert costs[3] < costs[0]
    assert costs[3] < costs[2]


@pytest.mark.parametrize(("rotated", "best"), [(1.0, BOTH), (2.0, OTHER)])
def test_with_best_effort_the_better_of_the_rewritten_models_is_compared_with_the_original(
    table: Table, monkeypatch: pytest.MonkeyPatch, rotated: float, best: Subject
) -> None:
    evidence, fitted = gathered(
        table, "best", monkeypatch, rounded=0.9, fitted=0.4, rotated=rotated
    )
    assert evidence.best.subject is best
    assert fitted == {"m", best.model}
    taken = {one.name: one.is_taken for one in evidence.tried}
    assert taken == {
        "codes rounded to nearest": True,
        "scales moved at 1 inputs": best is OTHER,
        "rotated": False,
        "rotated, and scales moved at 1 inputs": best is BOTH,
        "fitted codes, not rewritten": False,
        "fitted codes": True,
    }


def test_with_normal_effort_the_model_is_rotated_where_the_best_recipe_rounds_inputs(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence, _ = gathered(table, "normal", monkeypatch, rounded=0.9, fitted=0.4, rotated=0.1)
    assert evidence.best.subject is OTHER
    rows = [
        replace(row, scheme=ROUNDS_INPUTS) if row.scheme == "int8.channel" else row
        for row in table.rows
    ]
    monkeypatch.setattr(
        "mofq.delivery.rewriting.for_recipe.rounds_inputs",
        lambda schemes, _: ROUNDS_INPUTS in schemes.values(),
    )
    table = replace(table, rows=tuple(rows))
    evidence, _ = gathered(table, "normal", monkeypatch, rounded=0.9, fitted=0.4, rotated=0.1)
    assert evidence.best.subject is BOTH


def test_without_twins_nothing_is_fitted(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence, fitted = gathered(table, "quick", monkeypatch, rounded=1.5, fitted=0.1)
    assert evidence.best.subject.model == "m"
    assert fitted == set()
    assert len(evidence.tried) == 2


def test_scales_are_chosen_under_schemes_of_no_more_bytes_than_the_recipes(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under those of more bytes a site loses least, whatever the recipe gives it."""
    request = make_request(Choices(), budget=Budget(max_bits=6.0))
    before = Measured.of(Subject("m", Path("stats"), Path("table.jsonl")), table, request)
    assert before.decision is not None
    schemes = {group.name: group.scheme for group in before.decision.recipe.groups}
    assert set(schemes.values()) == {"int4.g32", "int8.channel"}
    choose = Mock(side_effect=RewriteError("Enough."))
    monkeypatch.setattr("mofq.delivery.rewriting.for_recipe.choose_for_recipe", choose)
    monkeypatch.setattr("mofq.evidence.calibration.stats.read_stats", Mock())
    monkeypatch.setattr(run_evidence, "_fits_disk", lambda *_, **__: True)
    run = Mock(options=Mock(effort="best"), offered=Mock(twins={"int4.g32@nats": ("int4.g32",)}))
    subject = rewrite_where_it_pays(run, Mock(), first=before.subject, before=before)
    assert subject is None
    assert choose.call_args.kwargs["fitted"] == {"int4.g32"}
    offered = choose.call_args.kwargs["offered"]
    for name, scheme in schemes.items():
        assert set(offered[name]) == {"int4.g32"} | {scheme}


@pytest.mark.parametrize(("rotated", "copies"), [(False, 1), (True, 2)])
def test_scales_move_in_a_rotated_model_only_where_two_more_have_room(
    table: Table,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    rotated: bool,
    copies: int,
) -> None:
    first = Subject("m", tmp_path / "stats", Path("table.jsonl"))
    first.stats.mkdir()
    (first.stats / "samples").write_bytes(bytes(1000))
    request = make_request(Choices(), budget=Budget(max_bits=6.0))
    before = Measured.of(ROTATED if rotated else first, table, request)
    needed: list[int] = []

    def lack(size: int, _: Path) -> str:
        needed.append(size)
        return "more than there is"

    monkeypatch.setattr(run_evidence, "lack_of_space", lack)
    run = Mock(options=Mock(effort="best"))
    run.checkpoint.tensors = {"a": Mock(nbytes=24)}
    assert rewrite_where_it_pays(run, Mock(), first=first, before=before) is None
    assert needed == [copies * 1024]
    run.options.tell.assert_called_once_with(
        "A rewritten model and its statistics would take more than there is: it is not rewritten."
    )


def test_folders_of_a_version_before_are_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rotated model that is there is not made and measured once more."""
    make = Mock()
    monkeypatch.setattr("mofq.delivery.rewriting.remake.make_base", make)
    run, files = Mock(checkpoint=Mock()), Mock(folder=tmp_path)
    run.checkpoint.name = "m"
    names = []
    for rewriting in (ROTATED.rewriting, REWRITING, replace(REWRITING, inputs="all")):
        assert rewriting is not None
        subject = run_evidence._make_subject(run, files, rewriting, Mock())
        names.append(Path(subject.model).name)
    assert names[0] == "m-rewritten-3587b4de"
    assert len(set(names)) == 3
