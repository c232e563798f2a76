"""The stats folder: resumed, refused, damaged, and used by two at once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
from calibrated import calibrate_folder, plan_of, read_sequence, some_tokens
from conftest import TinyCheckpoint
from families import copy_with_tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mofq.api import Samples
from mofq.api import calibrate as calibrate_model
from mofq.demo import demo_model_folder
from mofq.evidence.calibration import calibrate as calibration
from mofq.evidence.calibration import sequence_file as sequences
from mofq.evidence.calibration.calibrate import calibrate
from mofq.evidence.calibration.stats import (
    Stats,
    earlier_stats,
    finish_stats,
    open_plan,
    read_stats,
    verify_sequences,
)
from mofq.exceptions import CorpusError, MofqError, StatsError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.loading import load_model

CORPORA = {"a": some_tokens(3, 16), "b": some_tokens(2, 16, seed=1)}
FILES = [
    *("a/sequence-00000.safetensors", "a/sequence-00001.safetensors"),
    *("a/sequence-00002.safetensors", "b/sequence-00000.safetensors"),
    "b/sequence-00001.safetensors",
]
GAINS = [
    *("a/gains-00000.json", "a/gains-00001.json", "a/gains-00002.json"),
    *("b/gains-00000.json", "b/gains-00001.json"),
]


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every file in a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def finished(tiny: TinyCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished stats folder. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "stats"
    calibrate_folder(tiny("llama"), folder, CORPORA)
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished stats folder that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "stats"))


def test_a_finished_folder_holds_the_plan_the_hashes_and_every_sequence(finished: Path) -> None:
    files = sorted([*FILES, *GAINS])
    assert sorted(contents(finished)) == [".lock", *files, "plan.json", "stats.json"]
    plan = json.loads((finished / "plan.json").read_text())
    assert next(iter(plan)) == "version"
    stats = json.loads((finished / "stats.json").read_text())
    assert {key: stats[key] for key in plan} == plan
    assert sorted(stats["files"]) == files
    assert "unseen" not in stats
    verify_sequences(read_stats(finished))


def test_files_get_the_rights_that_the_users_umask_leaves(tiny_llama: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        calibrate_folder(tiny_llama, tmp_path / "stats", {"a": CORPORA["a"][:1]})
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "stats").rglob("*") if path.is_file()]
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: "0o640" for path in files
    }


def test_a_sequence_alone_has_the_bytes_that_it_has_among_others(
    tiny_llama: Path, finished: Path, copy: Path
) -> None:
    (copy / FILES[1]).unlink()
    (copy / FILES[3]).unlink()
    calibrate_folder(tiny_llama, copy, CORPORA)
    assert contents(copy) == contents(finished)


def test_the_order_of_corpora_changes_no_sequence(
    tiny_llama: Path, finished: Path, tmp_path: Path
) -> None:
    calibrate_folder(tiny_llama, tmp_path, dict(reversed(CORPORA.items())))
    found, expected = contents(tmp_path), contents(finished)
    assert {name: found[name] for name in FILES} == {name: expected[name] for name in FILES}


@pytest.mark.parametrize("step", range(1, 8))
def test_a_run_killed_before_any_file_gets_its_name_is_continued_to_the_same_bytes(
    step: int,
    tiny_llama: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace, done = os.replace, 0

    def killed(source: Path, target: Path) -> None:
        nonlocal done
        done += 1
        if done == step:
            raise KeyboardInterrupt
        replace(source, target)

    model = load_model(tiny_llama)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            calibrate_folder(tiny_llama, tmp_path, CORPORA, model=model)
    with pytest.raises(StatsError, match=r"not a finished stats folder.*continues where"):
        read_stats(tmp_path)
    calibrate_folder(tiny_llama, tmp_path, CORPORA, model=model)
    assert contents(tmp_path) == contents(finished)


def test_a_finished_folder_is_left_as_it_is(
    tiny_llama: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mofq.evidence.calibration.calibrate.run_sequence", None)
    before = contents(copy)
    calibrate_folder(tiny_llama, copy, CORPORA)
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "begun otherwise than this run asks for: seed 0, asked for 1"),
        ({"draws": 2}, "draws 1, asked for 2"),
        (
            {"index_sha256": "0" * 64},
            r"it is of the model llama \([0-9a-f]{8}\), and this is llama \(00000000\)",
        ),
        ({"dtype": "bfloat16"}, "dtype float32, asked for bfloat16"),
    ],
)
def test_a_folder_of_another_plan_is_refused(
    change: dict[str, Any], message: str, tiny_llama: Path, copy: Path
) -> None:
    with pytest.raises(StatsError, match=message):
        calibrate_folder(tiny_llama, copy, CORPORA, **change)


@pytest.mark.parametrize(
    ("corpora", "changes", "remedy"),
    [
        ({"other": "c"}, {}, "give corpora=a=here corpora=b=here sequences=3 to"),
        (
            {"other": "c"},
            {"sequence_length": 8},
            "corpora=b=here sequence_length=16 sequences=3 to",
        ),
        ({}, {"sequence_length": 8}, "give sequence_length=16 to go on with this one"),
        # No option of a run that would mend it.
        ({}, {"seed": 1, "sequence_length": 8}, "or delete this one"),
        ({}, {"dtype": "bfloat16"}, "or delete this one"),
    ],
)
def test_the_refusal_of_a_folder_names_the_options_that_it_was_begun_with(
    corpora: dict[str, str], changes: dict[str, Any], remedy: str, copy: Path
) -> None:
    begun = read_stats(copy).plan
    begun = replace(begun, corpora=tuple(replace(one, source="here") for one in begun.corpora))
    shutil.rmtree(copy)
    names = tuple(replace(begun.corpora[0], name=name) for name in corpora)
    plan = replace(begun, corpora=names or begun.corpora, **changes)
    with open_plan(copy, begun):
        pass
    with pytest.raises(StatsError) as refused, open_plan(copy, plan):
        pass
    assert "Name another folder (output), or" in str(refused.value)
    assert remedy in str(refused.value)


def test_inputs_of_all_sequences_are_kept_where_they_are_small_or_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ["en=demo-en-calibration"]

    def kept(name: str, **options: Any) -> list[str]:
        samples = Samples(sequences=3, keep=1, sequence_length=16, **options)
        calibrate_model(demo_model_folder(), text, tmp_path / name, samples=samples)
        return sorted(path.name for path in (tmp_path / name / "en").glob("inputs-*"))

    every = ["inputs-00000.safetensors", "inputs-00002.safetensors"]
    assert kept("small") == every
    assert kept("never", inputs="kept") == []
    monkeypatch.setattr(import_module("mofq.api.calibrate"), "_INPUTS_BYTES", 1e5)
    assert kept("large") == []
    assert kept("asked", inputs="all") == every
    assert kept("small") == every  # as it was begun
    assert kept("never") == []
    with pytest.raises(StatsError, match="inputs of all sequences not kept, asked for kept"):
        kept("never", inputs="all")
    with pytest.raises(MofqError, match=r"inputs=al: unknown\. Did you mean 'all'"):
        kept("other", inputs="al")


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_folder_begun_before_scores_were_noted_is_not_continued(
    is_finished: bool, tiny_llama: Path, copy: Path
) -> None:
    for name in ("plan.json", "stats.json"):
        content = json.loads((copy / name).read_text("utf-8"))
        assert content.pop("scores") == "signs"
        (copy / name).write_text(json.dumps(content), "utf-8")
    assert read_stats(copy).plan.scores is None  # what is finished can be measured with
    if not is_finished:
        (copy / "stats.json").unlink()
    with pytest.raises(StatsError, match="scores not noted, asked for signs"):
        calibrate_folder(tiny_llama, copy, CORPORA)


def test_a_folder_of_other_corpora_is_refused(tiny_llama: Path, copy: Path) -> None:
    with pytest.raises(StatsError, match=r"corpora a, b, asked for a.*give these first"):
        calibrate_folder(tiny_llama, copy, {"a": CORPORA["a"]})


def test_a_folder_is_continued_where_model_and_texts_have_moved(
    tiny_llama: Path, finished: Path, copy: Path
) -> None:
    (copy / "stats.json").unlink()
    plan = plan_of(tiny_llama, CORPORA)
    moved = tuple(replace(one, source=f"moved/{one.source}") for one in plan.corpora)
    with open_plan(copy, replace(plan, model_name="moved", corpora=moved)) as begun:
        finish_stats(copy, begun)
    assert contents(copy) == contents(finished)


def test_a_corpus_that_is_added_is_run_alone_and_ends_as_if_it_had_been_there(
    tiny_llama: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = calibrate_folder(tiny_llama, tmp_path, {"a": CORPORA["a"]})
    ran: list[torch.Tensor] = []
    run_sequence = calibration.run_sequence

    def note(model: PreTrainedModel, token_T: torch.Tensor, seeds: list[int]) -> None:
        ran.append(token_T)
        run_sequence(model, token_T, seeds)

    monkeypatch.setattr(calibration, "run_sequence", note)
    both = calibrate_folder(tiny_llama, tmp_path, CORPORA)
    assert torch.equal(torch.stack(ran), CORPORA["b"])
    assert contents(tmp_path) == contents(finished)
    assert earlier_stats(both) == (first,)
    assert earlier_stats(first) == ()
    with pytest.raises(StatsError, match=r"corpora a, b, asked for a.*give these first"):
        calibrate_folder(tiny_llama, tmp_path, {"a": CORPORA["a"]})
    with pytest.raises(StatsError, match=r"corpora a, b, asked for b, a.*give these first"):
        calibrate_folder(tiny_llama, tmp_path, {"b": CORPORA["b"], "a": CORPORA["a"]})


def test_a_second_run_on_the_same_folder_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    with (
        open_plan(tmp_path, plan_of(tiny_llama, CORPORA)),
        pytest.raises(
            StatsError, match=r"another process \(pid .* calibrates into this folder\. Wait"
        ),
    ):
        calibrate_folder(tiny_llama, tmp_path, CORPORA)
    calibrate_folder(tiny_llama, tmp_path, CORPORA)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "needed .* bytes, found"),
        (Path.unlink, "needed .* bytes, found no file"),
        (flip, "changed since it was written"),
    ],
)
def test_a_damaged_sequence_is_refused_and_the_remedy_given_mends_it(
    damage: Callable[[Path], None], message: str, tiny_llama: Path, finished: Path, copy: Path
) -> None:
    path = copy / FILES[1]
    damage(path)
    with pytest.raises(StatsError, match=message) as caught:
        verify_sequences(read_stats(copy))
    assert f"Delete {path} and run the same `mofq calibrate` again" in str(caught.value)
    path.unlink(missing_ok=True)
    calibrate_folder(tiny_llama, copy, CORPORA)
    assert contents(copy) == contents(finished)


def test_a_sequence_that_was_cut_short_is_made_again(
    tiny_llama: Path, finished: Path, copy: Path
) -> None:
    (copy / "stats.json").unlink()
    (copy / FILES[0]).write_bytes((copy / FILES[0]).read_bytes()[:1000])
    calibrate_folder(tiny_llama, copy, CORPORA)
    assert contents(copy) == contents(finished)


def test_a_file_that_is_no_sequence_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sequence-00000.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(StatsError, match="inputs: is not valid JSON"):
        sequences.SequenceFile(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(StatsError, match="cannot be read"):
        sequences.SequenceFile(path)


@pytest.mark.parametrize("name", ["stats.json", "plan.json"])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(version=2), "has version 2, and this mofq reads version 1"),
        (lambda c: c.update(speed=1), "unknown key 'speed'"),
        (lambda c: c.pop("draws"), "the key 'draws' is missing"),
        (lambda c: c.update(sequence_length="16"), "sequence_length: must be an integer"),
        (
            lambda c: c["corpora"][0].update(name="../../etc"),
            "name: .* match pattern",
        ),
        (lambda c: c["corpora"][0].update(name="/etc"), "name: .* match pattern .*found '/etc'"),
        (lambda c: c["corpora"][1].update(name="a"), "corpora: a name stands twice"),
        (
            lambda c: c["corpora"][0].update(sequences=0),
            "sequences: must be at least 1",
        ),
    ],
)
def test_a_plan_that_is_not_one_is_refused(
    name: str, edit: Callable[[dict[str, Any]], None], message: str, tiny_llama: Path, copy: Path
) -> None:
    content = json.loads((copy / name).read_text())
    edit(content)
    (copy / name).write_text(json.dumps(content))
    reader = read_stats if name == "stats.json" else partial(calibrate_folder, tiny_llama)
    arguments = (copy,) if name == "stats.json" else (copy, CORPORA)
    with pytest.raises(StatsError, match=message) as caught:
        reader(*arguments)
    assert str(copy / name) in str(caught.value)


def test_a_stats_file_without_an_entry_for_a_sequence_is_refused(copy: Path) -> None:
    content = json.loads((copy / "stats.json").read_text())
    content["corpora"][0]["sequences"] = 4
    (copy / "stats.json").write_text(json.dumps(content))
    with pytest.raises(StatsError, match=r"entry 'a/sequence-00003\.safetensors' is missing"):
        read_stats(copy)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(0, 10_000), value=st.binary(min_size=1, max_size=8))
def test_whatever_stands_in_the_stats_file_is_read_or_refused(
    position: int, value: bytes, finished: Path, copy: Path
) -> None:
    data = bytearray((finished / "stats.json").read_bytes())
    start = position % len(data)
    data[start : start + len(value)] = value
    (copy / "stats.json").write_bytes(data)
    with contextlib.suppress(StatsError):
        assert isinstance(read_stats(copy), Stats)


def test_a_layer_that_the_stats_do_not_know_is_refused(finished: Path) -> None:
    path = read_stats(finished).sequence_files("a")[0]
    with (
        sequences.SequenceFile(path) as file,
        pytest.raises(StatsError, match=r"has no layer 'model\.layers\.7\.mlp\.up_proj'.*another"),
    ):
        file.read("model.layers.7.mlp.up_proj")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float16_is_refused_and_bfloat16_is_not(
    dtype: str, tiny_llama: Path, tmp_path: Path
) -> None:
    if dtype == "bfloat16":
        stats = calibrate_folder(tiny_llama, tmp_path, CORPORA, dtype=dtype)
        assert all(bool(torch.isfinite(t).all()) for t in read_sequence(stats).values())
        return
    for plan in ({"dtype": "float32"}, {"dtype": "float16"}):
        model = load_model(tiny_llama, dtype=dtype)
        with pytest.raises(StatsError, match="gradients underflow in float16"):
            calibrate_folder(tiny_llama, tmp_path / "stats", CORPORA, model=model, **plan)
    assert not (tmp_path / "stats").exists()


def test_a_model_in_another_dtype_than_the_plan_or_in_training_is_refused(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model = load_model(tiny_llama, dtype="bfloat16")
    with pytest.raises(StatsError, match=r"plan's dtype is float32, and the model's bfloat16"):
        calibrate_folder(tiny_llama, tmp_path, CORPORA, model=model)
    model = load_model(tiny_llama).train()
    with pytest.raises(StatsError, match="in training mode"):
        calibrate_folder(tiny_llama, tmp_path, CORPORA, model=model)


def test_a_weight_that_is_not_finite_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = copy_with_tensors(
        tiny_llama, tmp_path / "broken", lambda tensors: tensors[name][3].fill_(torch.nan)
    )
    with pytest.raises(StatsError, match=rf"logits are not finite\. The weight {name} is not"):
        calibrate_folder(folder, tmp_path / "stats", CORPORA)


@pytest.mark.parametrize(
    ("corpora", "message"),
    [
        ({"a": CORPORA["a"] + 250}, r"corpus 'a': the tokens run from .* vocabulary has 256"),
        ({"a": some_tokens(1, 129)}, r"sequence_length=129: the model's context is 128"),
        ({"../a": CORPORA["a"]}, r"corpus '\.\./a': the name is that of a folder.*NAME="),
        ({".a": CORPORA["a"]}, r"does not begin with a dot"),
    ],
)
def test_windows_that_the_model_cannot_run_are_refused_before_anything_is_written(
    corpora: dict[str, torch.Tensor], message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(CorpusError, match=message):
        calibrate_folder(tiny_llama, tmp_path / "stats", corpora)
    assert not (tmp_path / "stats").exists()


def test_windows_that_do_not_fit_the_plan_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"needed 3 sequences of 16 tokens, found \[2, 16\]"):
        calibrate(
            load_model(tiny_llama),
            find_layers(open_checkpoint(str(tiny_llama))),
            plan=plan_of(tiny_llama, CORPORA),
            windows={**CORPORA, "a": CORPORA["a"][:2]},
            folder=tmp_path,
        )


def test_a_full_disk_is_reported_and_what_was_written_is_kept(
    tiny_llama: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(StatsError, match=r"2 more sequences need .* bytes, found 1,000 free"):
            calibrate_folder(tiny_llama, tmp_path, CORPORA)
    assert sorted(contents(tmp_path)) == [".lock", GAINS[0], FILES[0], "plan.json"]

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StatsError, match=r"No space left.*kept"):
            calibrate_folder(tiny_llama, tmp_path, CORPORA)
    assert sorted(contents(tmp_path)) == [".lock", *GAINS[:2], FILES[0], "plan.json"]
    calibrate_folder(tiny_llama, tmp_path, CORPORA)
    assert contents(tmp_path) == contents(finished)


def test_the_tensors_of_a_sequence_are_changed_one_by_one(tiny_llama: Path, tmp_path: Path) -> None:
    stats = calibrate_folder(tiny_llama, tmp_path / "stats", CORPORA)
    before: list[ref[Tensor]] = []

    def double(kind: str, layer: str, tensor: Tensor) -> Tensor:
        assert not any(one() is not None for one in before)
        assert layer.startswith("model.layers.")
        doubled = tensor.double() * (2 if kind == "grad" else 1)
        before[:] = [ref(tensor), ref(doubled)]
        return doubled

    path = stats.sequence_files("a")[0]
    sequences.copy_changed(path, tmp_path / "same.safetensors", lambda *given: given[2])
    assert (tmp_path / "same.safetensors").read_bytes() == path.read_bytes()
    sequences.copy_changed(path, tmp_path / "doubled.safetensors", double)
    found, needed = load_file(tmp_path / "doubled.safetensors"), read_sequence(stats)
    for name, tensor in needed.items():
        doubled = 2 * tensor if name.startswith("grad/") else tensor
        assert torch.equal(found.pop(name), doubled)
    assert not found
