"""What is said to be kept is about what is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mofq.api import Samples, calibrate, measure
from mofq.api.measure import fits_beside
from mofq.demo import demo_mixture_folder, demo_model_folder
from mofq.evidence.calibration.disk_needs import experts_per_token, fits_bytes, kept_bytes
from mofq.evidence.calibration.stats import read_stats
from mofq.evidence.kept_fits import KeptFits
from mofq.exceptions import StatsError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers

CORPORA = {"en": "demo-en-calibration"}
SAMPLES = Samples(sequences=4, keep=2, sequence_length=128, inputs="all")
NEAR = 0.1
MODELS = pytest.mark.parametrize(
    "model",
    [
        pytest.param(demo_model_folder(), id="dense"),
        pytest.param(demo_mixture_folder(), id="mixture"),
    ],
)


def written(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


@MODELS
def test_samples_with_caches_take_what_is_expected(model: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    calibrate(model, CORPORA, stats, samples=SAMPLES, kv_cache=True)
    plan, checkpoint = read_stats(stats).plan, open_checkpoint(str(model))
    layers, experts = find_layers(checkpoint), experts_per_token(checkpoint.config)
    needed = kept_bytes(layers, plan, kept=2, others=2, experts_per_token=experts)
    assert needed == pytest.approx(written(stats, "en/*.safetensors"), rel=NEAR)
    without = replace(plan, kv_cache=None)
    assert kept_bytes(layers, without, kept=2, others=2, experts_per_token=experts) < needed


@MODELS
@pytest.mark.long
def test_what_fitted_schemes_keep_takes_what_is_expected(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(str(model))
    layers, experts = find_layers(checkpoint), experts_per_token(checkpoint.config)
    space = tmp_path / "some.yaml"
    space.write_text("version: 1\ndescription: some\nschemes: [int4.g32@nats~gptq]\n", "utf-8")
    table = tmp_path / "table.jsonl"
    monkeypatch.setattr(
        "mofq.evidence.calibration.streamed.shutil.disk_usage",
        lambda _: type("Usage", (), {"free": 10}),
    )
    with pytest.raises(StatsError, match=r"needs about [\d,]+ bytes, found 10 free") as refused:
        measure(model, space, table, corpora=CORPORA, samples=SAMPLES)
    monkeypatch.undo()
    measure(model, space, table, corpora=CORPORA, samples=SAMPLES)
    fits = fits_beside(table)
    needed = fits_bytes(layers, KeptFits(fits).stats.plan, experts_per_token=experts)
    assert needed == pytest.approx(written(fits, "unit-*"), rel=NEAR)
    said = int(str(refused.value).split("needs about ")[1].split(" bytes")[0].replace(",", ""))
    assert said > needed
