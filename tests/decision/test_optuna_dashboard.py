"""A study as optuna-dashboard shows it: its own web application, called in this process."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import pytest
from optuna.storages import RDBStorage
from study_worker import BUDGETS, problem, truth

from mofq.decision import solve_exact
from mofq.decision.measured.sampler import START
from mofq.decision.measured.study import dashboard_url
from mofq.decision.measured.study_storage import open_study, quiet
from mofq.decision.measured.trials import enqueue, run_trials


def get(application: Any, path: str) -> dict[str, Any]:
    """What the dashboard's page would get."""
    environment: dict[str, Any] = {"PATH_INFO": path, "wsgi.input": BytesIO()}
    setup_testing_defaults(environment)
    status: list[str] = []
    body = b"".join(application(environment, lambda code, headers, *_: status.append(code)))
    assert status == ["200 OK"], body
    content = json.loads(body)
    assert isinstance(content, dict)
    return content


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_dashboard_shows_layers_schemes_and_the_recipe(tmp_path: Path) -> None:
    one = problem()
    start_F = solve_exact(one, BUDGETS).choice_F
    storage = str(tmp_path / "recipe.optuna.db")
    study = open_study(storage, "SmolLM2 4c5ab9dd6f30")
    enqueue(study, one, {START: start_F})
    run_trials(study, one, BUDGETS, start_F, measure=truth, trials=3)
    with quiet():
        database = RDBStorage(dashboard_url(storage))
        from optuna_dashboard import wsgi  # two seconds that only this test needs to take

        application = wsgi(database)
    studies = get(application, "/api/studies")["study_summaries"]
    assert [study["study_name"] for study in studies] == ["SmolLM2 4c5ab9dd6f30"]
    trials = get(application, f"/api/studies/{studies[0]['study_id']}")["trials"]
    assert len(trials) == 3
    shown = {p["name"]: p["param_external_value"] for p in trials[0]["params"]}
    assert shown == one.schemes_of(start_F)
    attributes = {a["key"]: a["value"] for a in trials[0]["user_attrs"]}
    assert json.loads(attributes["recipe"]) == one.schemes_of(start_F)
    assert attributes["origin"] == START
    database.engine.dispose()
