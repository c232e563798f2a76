"""Corpora from the command line: tables of rows, one that is added, and what each counts."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from command_line import DEMO, Measured, mofq, ok, refused

from mofq.decision import request_problem
from mofq.decision.prediction import sample_sums
from mofq.decision.recipe import load_recipe
from mofq.evidence.corpora import load_text
from mofq.evidence.table import read_table

SHORT = ("--sequences", "4", "--sequence-length", "16")


@pytest.fixture(scope="module")
def two(measured: Measured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of two corpora, of which the second was added to the first."""
    folder = tmp_path_factory.mktemp("two")
    corpora = ("--corpus", "en=demo-en-calibration", "--corpus", "pt=demo-pt-calibration")
    calibrate = ("calibrate", DEMO, *SHORT, "-o", folder / "stats")
    measure = ("measure", DEMO, "--space", measured.folder / "space.yaml", "--json")
    measure += ("--stats", folder / "stats", "-o", folder / "table.jsonl")
    ok(*calibrate, *corpora[:2])
    first = ok(*measure).json
    before = (folder / "table.jsonl").read_bytes()
    done = ok(*calibrate, *corpora)
    assert "there already" not in done.err
    second = ok(*measure).json
    assert (folder / "table.jsonl").read_bytes().startswith(before)
    plain = first["rows"] - first["groups"] * len(first["schemes"])
    assert second["rows"] == first["rows"] + plain  # nats and output error of pt
    assert "they were there already" in ok(*calibrate, *corpora).err
    return folder / "table.jsonl"


def test_a_corpus_that_is_added_leaves_the_lines_of_the_others(two: Path) -> None:
    stats = read_table(two).header.stats
    assert stats is not None
    assert list(stats.corpora) == ["en", "pt"]


def test_weights_of_corpora_are_noted_and_decide_what_is_predicted(
    two: Path, tmp_path: Path
) -> None:
    def search(*options: str) -> float:
        ok("search", two, "--max-bits", "5", "--ties", "off", "-o", tmp_path / "r.yaml", *options)
        found = load_recipe(tmp_path / "r.yaml")
        assert found.made_by.get("corpus_weights") == (options[1] if options else None)
        return float(found.result.error or 0)

    weighted = search("--corpus-weights", "en=3,pt=1")
    recipe = load_recipe(tmp_path / "r.yaml")
    problem = request_problem(read_table(two))
    by_corpus = [
        float(np.mean(sums_N))
        for sums_N in sample_sums(problem, problem.choice_of(recipe.scheme_of_group))
    ]
    assert weighted == pytest.approx((3 * by_corpus[0] + by_corpus[1]) / 4)
    alone = search("--corpus-weights", "en=1,pt=0")
    assert alone <= by_corpus[0] or alone == pytest.approx(by_corpus[0], rel=1e-12)
    assert search("--corpus-weights", "en=2,pt=2") == search()


def test_a_recipe_for_the_worst_corpus_is_compared_with_the_worst_text_alone(
    two: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    texts = ("--text", "demo-en", "--text", "demo-pt", "--tokens", "128", "--sequence-length", "64")
    alone = "[nats/token] of the worst text alone"
    for objective, count in (("worst-corpus", 1), ("mean", 0)):
        ok("search", two, "--max-bits", "5", "--objective", objective, "-o", recipe)
        shown = " ".join(ok("validate", DEMO, recipe, *texts).out.split())
        assert shown.count(alone) == count


@pytest.mark.long
def test_the_frontier_and_the_page_know_the_weights(two: Path, tmp_path: Path) -> None:
    flags = ("--corpus-weights", "en=3,pt=1")
    plain = ok("frontier", two, "--json").json["points"]
    weighted = ok("frontier", two, *flags, "--json").json["points"]
    assert weighted[0]["bytes"] == plain[0]["bytes"]  # the smallest is the smallest
    assert weighted[0]["error"] != plain[0]["error"]
    assert "--corpus-weights en=3,pt=1" in ok("frontier", two, *flags).err
    ok("explore", two, *flags, "-o", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert '"corpus_weights": [3.0, 1.0]' in page or '"corpus_weights":[3.0,1.0]' in page
    assert "--corpus-weights en=3,pt=1" in page


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("en=3", "found none of 'pt'. Give 0"),
        ("en=3,pt=1,de=1", "there is no corpus 'de'"),
        ("en=3,pt=-1", "0 or more for 'pt', found -1.0"),
        ("en=0,pt=0", "all are 0"),
        ("en:3,pt:1", "cannot be read at 'en:3'"),
        ("en=1,en=2", "cannot be read at 'en=2'"),
    ],
)
def test_weights_that_are_not_those_of_the_corpora_are_refused(
    weights: str, message: str, two: Path, tmp_path: Path
) -> None:
    search = ("search", two, "--max-bits", "5", "-o", tmp_path / "r.yaml")
    assert message in refused(*search, "--corpus-weights", weights)


def test_weights_and_the_worst_corpus_exclude_each_other(two: Path, tmp_path: Path) -> None:
    search = ("search", two, "--max-bits", "5", "-o", tmp_path / "r.yaml")
    both = ("--corpus-weights", "en=3,pt=1", "--objective", "worst-corpus")
    assert "Leave it or --objective worst-corpus out" in refused(*search, *both)


def test_run_refuses_weights_of_other_corpora_before_anything_is_run(tmp_path: Path) -> None:
    run = ("run", DEMO, "--max-bits", "5", "-o", tmp_path / "run")
    asked = ("--corpus", "en=demo-en-calibration", "--corpus-weights", "en=1,pt=1")
    assert "there is no corpus 'pt'" in refused(*run, *asked)
    assert not (tmp_path / "run").exists()


def test_calibrate_says_what_it_left_out_and_which_corpora_are_too_short(tmp_path: Path) -> None:
    text = load_text("demo-en-calibration").text
    table, short = tmp_path / "rows.csv", tmp_path / "short.txt"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "url", "body"))
        writer.writerows((n, "http://a", one) for n, one in enumerate((text[:3000], "", text[:9])))
    short.write_text(text[:150])
    corpora = ("--corpus", f"rows={table}:body", "--corpus", f"short={short}")
    ran = mofq("calibrate", DEMO, *corpora, *SHORT[2:], "-o", tmp_path / "stats", "--json")
    counts = ran.json["corpora"]
    assert 1 < counts["short"] < 4 < counts["rows"]
    assert f"text '{table}:body': 1 row without text left out." in ran.err
    assert f"corpus short: {counts['short']} calibration sequences are too few" in ran.err
    assert "corpus rows:" not in ran.err
