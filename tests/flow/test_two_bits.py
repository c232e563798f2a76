"""A budget of KL that is predicted is kept where formats of two bits are offered."""

from __future__ import annotations

from pathlib import Path

import pytest

from mofq.api import calibrate, measure, search, validate
from mofq.api.options import Budget
from mofq.demo import demo_model_folder

#: Rounding to two bits makes weights a tenth smaller, in all layers in one direction.
SCHEMES = ("int2.g32@mse", "int3.g32@mse", "int4.g32@mse", "int8.channel")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("two-bits"), demo_model_folder()
    space = folder / "space.yaml"
    space.write_text(
        f"version: 1\ndescription: two bits\nschemes: [{', '.join(SCHEMES)}]\n", "utf-8"
    )
    calibrate(model, {"en": "demo-en-calibration"}, folder / "stats")
    return measure(model, space, folder / "table.jsonl", stats=folder / "stats").output


@pytest.mark.long
@pytest.mark.parametrize("most", [0.1, 0.25])
def test_a_predicted_budget_is_kept_on_the_text_of_the_calibration(
    most: float, table: Path
) -> None:
    recipe = search(table, budget=Budget(max_kl=most)).decision.recipe
    assert "int2.g32@mse" in recipe.schemes.values()
    high = recipe.result.kl_high
    assert high is not None
    assert 0.9 * most < high <= most  # as small a recipe as may be
    found = validate(demo_model_folder(), recipe, "demo-en-calibration").worst
    assert found.enforced
    assert 0.5 * most < found.kl_nats_per_token <= most
