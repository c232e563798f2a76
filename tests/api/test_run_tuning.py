"""Whether a run tunes what it found, and what it says where it does not."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import DEMO
from emulated import recipe_of

from mofq.api import run_delivery
from mofq.api.options import Budget, Choices, Method, Running, Samples, Vocabulary, Windows
from mofq.api.request import make_request
from mofq.api.run_delivery import tune_where_it_helps
from mofq.api.run_evidence import Subject
from mofq.api.run_folder import RunFiles
from mofq.api.run_request import CheckedRun, RunOptions, check_run
from mofq.api.tune import tune
from mofq.decision.recipe import RecipeResult
from mofq.evidence.spaces import parse_search_space
from mofq.exceptions import MofqError
from mofq.model.streaming.execution import model_bytes, pass_bytes


@pytest.fixture(scope="module")
def run() -> CheckedRun:
    space = parse_search_space("version: 1\nschemes: ['int3.channel']\n", name="one", where="one")
    return check_run(
        RunOptions(
            model=str(DEMO),
            request=make_request(Choices(), budget=Budget(max_bits=4), method=Method()),
            space=space,
            effort="normal",
            corpora=["en=demo-en-calibration"],
            text="demo-en",
            windows=Windows(tokens=64, sequence_length=32),
            samples=Samples(sequences=12),
            layers=None,
            vocabulary=Vocabulary(),
            running=Running(),
            execution="resident",
            no_stats=False,
            rivals=0,
            progress=None,
            tell=print,
        )
    )


def remarks(run: CheckedRun, folder: Path, *, kl: float = 0.25, **options: Any) -> list[str]:
    """What is told of a recipe that is not tuned."""
    told: list[str] = []
    asked = replace(run.options, tell=told.append, **options)
    plain = recipe_of(run.checkpoint, "int3.channel")
    recipe = replace(plain, result=RecipeResult(kl_nats_per_token=kl))
    subject = Subject(str(DEMO), folder / "stats", folder / "table.jsonl")
    found = tune_where_it_helps(replace(run, options=asked), RunFiles(folder), recipe, subject)
    assert found is recipe
    return told


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kl": 0.0496}, "Codes do not compensate the errors of layers before: "),
        ({"kl": 0.0496, "execution": "streamed"}, "Codes do not compensate the errors of layers"),
        ({"no_stats": True}, "the model is run layer by layer, and 32 steps would read"),
        ({"execution": "spread"}, "execution=spread spreads the model"),
    ],
)
def test_what_would_take_long_or_gain_little_is_not_tuned(
    options: dict[str, Any], reason: str, run: CheckedRun, tmp_path: Path
) -> None:
    (told,) = remarks(run, tmp_path, **options)
    assert told.startswith("The recipe is not tuned: ")
    assert reason in told


@pytest.mark.parametrize(("flags", "is_streamed"), [("fpu", False), ("fpu avx512_bf16", True)])
def test_copies_of_weights_in_bfloat16_count_where_a_model_is_tuned(
    flags: str, is_streamed: bool, run: CheckedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = pass_bytes(run.checkpoint, run.layers, run.plan.sequence_length)
    needed = model_bytes(run.checkpoint, "float32") + passes
    monkeypatch.setattr(
        "mofq.model.streaming.execution.free_bytes", lambda _: int(needed / 0.8) + 9
    )
    monkeypatch.setattr("mofq.numbers.processor.processor_flags", lambda: flags)
    asked = replace(run.options, execution="auto")
    assert run_delivery._is_streamed(replace(run, options=asked)) == is_streamed
    seen = []

    def chosen(*_: object, **given: Any) -> None:
        seen.append(given["more_bytes"] > 0)
        raise MofqError("enough")

    module = sys.modules[tune.__module__]
    monkeypatch.setattr(module, "chosen_execution", chosen)
    recipe = recipe_of(run.checkpoint, "int4.g32")
    monkeypatch.setattr(module, "open_recipe", lambda _: recipe)
    with pytest.raises(MofqError, match="enough"):
        tune(str(DEMO), "recipe.yaml", ["en=demo-en-calibration"])
    assert seen == [is_streamed]


@pytest.mark.parametrize(
    ("error", "reason"),
    [(MemoryError(), "memory ran out"), (MofqError("the disk is full"), "the disk is full")],
)
def test_a_run_whose_tuning_fails_goes_on_with_what_it_found(
    error: Exception,
    reason: str,
    run: CheckedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mofq.delivery.tuning.tune_recipe.tune_recipe", fail)
    (told,) = remarks(run, tmp_path)
    assert reason in told


@pytest.mark.parametrize(("kl", "steps"), [(None, 32), (0.05, 32), (0.049, 0)])
def test_normal_tunes_where_much_is_lost(kl: float | None, steps: int) -> None:
    assert run_delivery._steps("normal", kl) == steps
    assert run_delivery._steps("best", kl) == 128
