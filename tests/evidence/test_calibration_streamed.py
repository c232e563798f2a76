"""Statistics of a model that is run layer by layer have the very bytes of a resident run's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from calibrated import calibrate_folder, keeping, plan_of, some_tokens
from conftest import TinyCheckpoint
from families import TINY_FAMILIES, long_but
from safetensors.torch import load_file
from tiny_types import write_type

from mofq.api import Samples, calibrate
from mofq.demo import demo_model_folder
from mofq.evidence.calibration import streamed as streamed_calibration
from mofq.evidence.calibration.routing import read_routing
from mofq.evidence.calibration.stats import UNFINISHED
from mofq.evidence.calibration.streamed import calibrate_streamed, run_backward
from mofq.exceptions import MofqError, StatsError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers, included_groups, vocabulary_names
from mofq.model.streaming.records import write_tensors
from mofq.model.streaming.streamed import open_streamed

WINDOWS = {"a": some_tokens(3, 16, vocabulary=200), "b": some_tokens(1, 16, seed=1)}
#: Types that share keys, feed embeddings to every layer, mask by what they compute, or mix kinds.
ODD_TYPES = ("gemma3n_text", "gemma4_text", "doge", "zamba2", "roc_bert", "qwen3_next")


def streamed(folder: Path, out: Path, *, kept: int | None = None, **changes: Any) -> None:
    plan = plan_of(folder, WINDOWS, **changes)
    vocabulary = included_groups(plan.vocabulary or ())
    corpora = tuple(keeping(kept, one) for one in plan.corpora)
    with open_streamed(folder, dtype=plan.dtype) as model:
        calibrate_streamed(
            model,
            find_layers(open_checkpoint(str(folder)), **vocabulary),
            plan=replace(plan, corpora=corpora),
            windows=WINDOWS,
            folder=out,
        )


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def assert_same_bytes(folder: Path, work: Path, **changes: Any) -> None:
    calibrate_folder(folder, work / "resident", WINDOWS, **changes)
    streamed(folder, work / "streamed", **changes)
    assert content(work / "streamed") == content(work / "resident")


@pytest.mark.parametrize("family", long_but(TINY_FAMILIES, "gpt2", "gemma3_text", "qwen3_moe"))
def test_a_family_has_the_same_statistics_streamed(
    family: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    assert_same_bytes(tiny(family), tmp_path, draws=2)


@pytest.mark.parametrize("family", long_but(["mixtral", "qwen3_moe", "deepseek_v3"], "mixtral"))
@pytest.mark.parametrize("changes", [{"draws": 2}, {"dtype": "bfloat16"}])
def test_what_changes_of_experts_cost_is_the_same_streamed(
    family: str, changes: dict[str, Any], tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    assert_same_bytes(tiny(family), tmp_path, routing=True, **changes)
    routing = read_routing(tmp_path / "streamed" / "a" / "routing-00000.json")
    assert routing.cost > 0
    assert any(routing.gains.values())


@pytest.mark.parametrize("name", long_but(ODD_TYPES, "gemma4_text", "doge"))
def test_a_type_without_rules_has_the_same_statistics_streamed(name: str, tmp_path: Path) -> None:
    assert_same_bytes(write_type(name, tmp_path / "model"), tmp_path)


@pytest.mark.parametrize("changes", [{"kv_cache": True}, {"dtype": "bfloat16", "draws": 3}])
def test_caches_draws_and_bfloat16_are_the_same_streamed(
    changes: dict[str, Any], tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    assert_same_bytes(tiny("llama"), tmp_path, **changes)


@pytest.mark.parametrize(
    ("family", "options", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}, {"draws": 2, "kept": 1, "inputs": True}),
        ("llama", {"tie_word_embeddings": False}, {"draws": 2}),
        # Scales its rows and caps its logits.
        pytest.param("gemma2", {}, {"dtype": "bfloat16"}, marks=pytest.mark.long),
        ("qwen3_moe", {"tie_word_embeddings": True}, {"routing": True}),
        pytest.param(
            "qwen3_moe", {"tie_word_embeddings": False}, {"routing": True}, marks=pytest.mark.long
        ),
    ],
)
def test_lm_head_and_embedding_have_the_same_statistics_streamed(
    family: str,
    options: dict[str, Any],
    changes: dict[str, Any],
    tiny: TinyCheckpoint,
    tmp_path: Path,
) -> None:
    folder = tiny(family, **options)
    layers = find_layers(
        open_checkpoint(str(folder)), include_lm_head=True, include_embeddings=True
    )
    names = vocabulary_names(layers.groups)
    assert_same_bytes(folder, tmp_path, vocabulary=names, **changes)
    samples = load_file(next((tmp_path / "streamed" / "a").glob("sequence-*.safetensors")))
    embedding = layers.grouped_layers[-1].name
    assert {f"rows/{embedding}", f"lookup/{embedding}"} <= samples.keys()
    if "routing" in changes:
        routing = read_routing(tmp_path / "streamed" / "a" / "routing-00000.json")
        assert routing.gains[embedding] > 0


def test_of_sequences_that_are_not_kept_gains_and_inputs_are_the_same(tmp_path: Path) -> None:
    text, samples = ["en=demo-en-calibration"], Samples(sequences=4, keep=2, sequence_length=24)
    folders = {}
    for execution in ("resident", "streamed"):
        folders[execution] = tmp_path / execution
        calibrate(
            demo_model_folder(),
            text,
            folders[execution],
            samples=samples,
            execution=execution,  # type: ignore[arg-type]
        )
    assert content(folders["streamed"]) == content(folders["resident"])
    assert "en/inputs-00001.safetensors" in content(folders["streamed"])


def test_a_run_that_is_stopped_computes_no_layer_of_a_sequence_twice(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder, out = tiny("llama"), tmp_path / "streamed"
    plan, layers = plan_of(folder, WINDOWS), find_layers(open_checkpoint(str(folder)))
    seen: list[tuple[str, int, str]] = []

    def stopping(*arguments: Any, **named: Any) -> Any:
        for one in run_backward(*arguments, **named):
            seen.append((one.running.corpus.name, one.running.index, one.unit))
            if len(seen) == 6:
                raise KeyboardInterrupt
            yield one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mofq.evidence.calibration.streamed.run_backward", stopping)
        for _ in range(2):
            with open_streamed(folder) as model:
                try:
                    calibrate_streamed(model, layers, plan=plan, windows=WINDOWS, folder=out)
                except KeyboardInterrupt:
                    assert (out / UNFINISHED).is_dir()
    # Four sequences through two layers; the one that was stopped in, twice.
    assert len(seen) == 9
    assert len(set(seen)) == 8
    assert seen[5] == seen[6]
    calibrate_folder(folder, tmp_path / "resident", WINDOWS)
    assert content(out) == content(tmp_path / "resident")


def test_nothing_of_a_sequence_is_in_memory_when_the_next_one_runs(
    tiny: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[ref[torch.Tensor]] = []
    steps = []

    def write_noted(path: Path, given: Any, tensors: Sequence[torch.Tensor]) -> None:
        kept.extend(map(ref, tensors))
        write_tensors(path, given, tensors)

    def step_noted(*arguments: Any, **named: Any) -> Any:
        assert [one for one in kept if one() is not None] == []
        steps.append(len(kept))
        found = step_back(*arguments, **named)
        kept.extend(ref(one) for tensors in found[0].values() for one in tensors)
        return found

    step_back = streamed_calibration._step_back
    monkeypatch.setattr(streamed_calibration, "_step_back", step_noted)
    monkeypatch.setattr("mofq.model.streaming.writer.write_tensors", write_noted)
    streamed(tiny("llama"), tmp_path / "streamed", draws=2)
    assert len(steps) == 8
    assert steps == sorted(set(steps))


def test_a_model_that_does_not_fit_is_streamed_and_that_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mofq.model.streaming.execution.free_bytes", lambda _: 10**6)
        calibrate(
            demo_model_folder(),
            ["en=demo-en-calibration"],
            tmp_path / "stats",
            samples=Samples(sequences=2, sequence_length=16),
            tell=told.append,
        )
    (remark,) = [one for one in told if "layer by layer" in one]
    assert "0.0 GB are free on cpu" in remark


def test_a_disk_that_is_too_small_is_said_before_anything_runs(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "mofq.evidence.calibration.streamed.shutil.disk_usage",
            lambda _: type("Usage", (), {"free": 1000}),
        )
        with pytest.raises(MofqError, match=r"needs about [\d,]+ bytes, found 1,000 free"):
            streamed(tiny("llama"), tmp_path / "out")


def test_the_disk_is_looked_at_before_a_vocabulary_of_gigabytes_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mofq.evidence.calibration.streamed.shutil.disk_usage",
        lambda _: type("Usage", (), {"free": 1000}),
    )
    monkeypatch.setattr(
        "mofq.model.checkpoint.tensors.check_finite", lambda *_: pytest.fail("reads")
    )
    corpora, out = ["en=demo-en-calibration"], tmp_path / "stats"
    with pytest.raises(StatsError, match=r"needs about [\d,]+ bytes, found 1,000 free"):
        calibrate(demo_model_folder(), corpora, out, execution="streamed")
    assert not out.exists()


def test_a_layer_that_runs_twice_is_refused_again_when_the_command_is_given_again(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    plain = torch.nn.ModuleList.__getitem__

    def twice(modules: Any, index: Any) -> Any:
        return [*modules] * 2 if isinstance(index, slice) else plain(modules, index)

    folder = tiny("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.ModuleList, "__getitem__", twice)
        for _ in range(2):
            with pytest.raises(StatsError, match="runs more than once"):
                streamed(folder, tmp_path / "stats")
