"""A Ray cluster on this machine: the same table, also with a worker killed in the middle."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from calibrated import calibrate_folder, plan_of, some_tokens, space_of
from cluster_units import die, die_at_first, die_between_layers, refuse
from command_line import DEMO, mofq, ok, tree
from conftest import TinyCheckpoint

from mofq import api
from mofq.api import Samples, Where
from mofq.evidence import cluster as distributed
from mofq.evidence.calibration import on_workers as calibrate_workers
from mofq.evidence.calibration.on_workers import (
    SequencesUnit,
    calibrate_remotely,
    free_of_workers,
    split_evenly,
)
from mofq.evidence.calibration.stats import UNFINISHED, Stats, open_plan
from mofq.evidence.cluster import cluster, run_units
from mofq.evidence.measure import on_workers as remote
from mofq.evidence.measure.fill_table import measure
from mofq.evidence.measure.on_workers import Unit, measure_remotely, measure_unit
from mofq.exceptions import ClusterError, SchemeError, StatsError
from mofq.files.locks import hold_file
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.checkpoint.weights_hash import hash_weights, open_shared
from mofq.model.layers import find_layers
from mofq.model.streaming import execution

SPACE = space_of("int4.g32", "nvfp4", "int8.channel+int8.token")


@pytest.fixture(scope="module")
def folder(tiny: TinyCheckpoint) -> Path:
    return tiny("mixtral")


@pytest.fixture(scope="module")
def stats(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    return calibrate_folder(folder, tmp_path_factory.mktemp("stats"), {"a": some_tokens(2, 16)})


@pytest.fixture(scope="module")
def two_workers() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Workers import cluster_units.
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_worker_niceness", "0")  # Ray gives its workers 15
        own = distributed._own_cluster()
        patch.setattr(distributed, "_own_cluster", lambda: own | {"num_cpus": 2})
        with cluster("ray"):
            yield


def fill(folder: Path, path: Path, stats: Stats | None, **options: Any) -> bytes:
    checkpoint = open_checkpoint(str(folder))
    measure(checkpoint, find_layers(checkpoint), SPACE, table_path=path, stats=stats, **options)
    return path.read_bytes()


@pytest.mark.long
def test_two_workers_give_the_table_that_one_process_gives(
    folder: Path, stats: Stats, two_workers: None, tmp_path: Path
) -> None:
    for name, some in (("with", stats), ("without", None)):
        here = fill(folder, tmp_path / f"{name}.jsonl", some)
        there = fill(folder, tmp_path / f"{name}-2.jsonl", some, remotely=measure_remotely)
        assert there == here


@pytest.mark.long
def test_a_worker_killed_in_the_middle_changes_no_byte(
    folder: Path,
    stats: Stats,
    two_workers: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "measure_unit", die_at_first)
    there = fill(folder, tmp_path / "there.jsonl", stats, remotely=measure_remotely)
    assert (stats.folder.parent / "killed").exists()
    assert there == fill(folder, tmp_path / "here.jsonl", stats)


@pytest.mark.long
def test_a_run_that_is_stopped_goes_on_on_the_cluster_or_without(
    folder: Path, stats: Stats, two_workers: None, tmp_path: Path
) -> None:
    class Stopped(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise Stopped

    expected = fill(folder, tmp_path / "whole.jsonl", stats)
    for first, second in ((measure_remotely, None), (None, measure_remotely)):
        path = tmp_path / f"{first is None}.jsonl"
        with pytest.raises(Stopped):
            fill(folder, path, stats, remotely=first, progress=stop)
        assert path.read_bytes() != expected
        assert fill(folder, path, stats, remotely=second) == expected


@pytest.mark.long
def test_workers_calibrate_to_the_files_that_one_process_writes(
    folder: Path, stats: Stats, two_workers: None, tmp_path: Path
) -> None:
    there = calibrate_remotely(
        open_checkpoint(str(folder)),
        plan=stats.plan,
        windows={"a": some_tokens(2, 16)},
        folder=tmp_path / "stats",
    )
    assert there.sha256 == stats.sha256
    for path in stats.folder.rglob("*.safetensors"):
        other = tmp_path / "stats" / path.relative_to(stats.folder)
        assert other.read_bytes() == path.read_bytes()


@pytest.mark.long
def test_workers_without_memory_for_the_model_each_stream_a_share_of_the_sequences(
    two_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []

    def run(function: Any, units: list[SequencesUnit], **options: Any) -> Iterator[int]:
        calls.extend(tuple(index for _, index, _ in unit.sequences) for unit in units)
        return run_units(function, units, **options)

    def calibrated(name: str, **options: Any) -> dict[str, bytes]:
        told: list[str] = []
        samples = Samples(sequences=5, sequence_length=32, keep=3)
        corpora = {"en": "demo-en-calibration"}
        api.calibrate(DEMO, corpora, tmp_path / name, samples=samples, tell=told.append, **options)
        assert ("layer by layer" in " ".join(told)) == (name == "streamed")
        assert ("for each worker" in " ".join(told)) == (name == "streamed")
        return tree(tmp_path / name)

    monkeypatch.setattr(calibrate_workers, "run_units", run)
    monkeypatch.setattr(distributed, "cluster", lambda *a, **k: nullcontext())  # it is connected
    here, remote = calibrated("here"), Where(cluster="ray")
    assert calibrated("resident", where=remote) == here
    assert calls == [(0,), (1,), (2,), (3,), (4,)]
    calls.clear()
    monkeypatch.setattr(execution, "_SHARE", 1e-6)
    assert calibrated("streamed", where=remote) == here
    assert calls == [(0, 1), (2, 3, 4)]


@pytest.mark.long
def test_a_machine_tells_the_memory_that_each_of_its_workers_may_take(two_workers: None) -> None:
    free = execution.free_bytes("cpu")
    assert free is not None
    assert 0.3 * free < free_of_workers("cpu") < 0.7 * free
    assert 0.7 * free < free_of_workers("cpu", cpus=2) < 1.3 * free


@pytest.mark.long
def test_a_worker_that_streams_goes_on_after_one_that_was_killed(
    two_workers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = {"a": some_tokens(3, 16), "b": some_tokens(1, 16, seed=1)}
    here = calibrate_folder(Path(DEMO), tmp_path / "here", windows, kept=2)
    monkeypatch.setattr(calibrate_workers, "run_unit", die_between_layers)
    there = calibrate_remotely(
        open_checkpoint(str(DEMO)),
        plan=here.plan,
        windows=windows,
        folder=tmp_path / "there",
        is_streamed=True,
    )
    assert (tmp_path / "killed").exists()
    assert tree(there.folder) == tree(here.folder)


def test_a_worker_that_outlived_its_run_is_waited_for(tmp_path: Path) -> None:
    windows = {"a": some_tokens(2, 16)}
    plan, folder = plan_of(Path(DEMO), windows), tmp_path / "stats"
    tokens = tuple(windows["a"][0].tolist())
    unit = SequencesUnit(str(DEMO), plan, str(folder), (("a", 0, tokens),), True, "cpu")
    (folder / UNFINISHED).mkdir(parents=True)
    with hold_file(folder / UNFINISHED / "a-00000.lock", StatsError):
        with pytest.raises(StatsError, match=r"calibrates into this folder\. Wait for it"):
            calibrate_workers.run_unit(unit)
        with (
            pytest.raises(StatsError, match=r"calibrates into this folder\. Wait for it"),
            open_plan(folder, plan),
        ):
            pass


@pytest.mark.parametrize(("count", "lengths"), [(1, [7]), (3, [2, 2, 3]), (9, [1] * 7)])
def test_shares_are_neighbours_and_as_even_as_can_be(count: int, lengths: list[int]) -> None:
    sequences = [("a", index, (index,)) for index in range(7)]
    shares = split_evenly(sequences, count)
    assert [len(share) for share in shares] == lengths
    assert [one for share in shares for one in share] == sequences
    assert split_evenly([], count) == []


@pytest.mark.long
def test_results_come_in_order_and_errors_as_they_were_raised(two_workers: None) -> None:
    assert list(run_units(refuse, range(3))) == [0, 1, 2]
    found: list[int] = []
    with pytest.raises(SchemeError, match="layer 3: not finite"):
        found.extend(run_units(refuse, range(9)))
    assert found == [0, 1, 2]


def test_a_unit_of_another_mofq_is_not_run() -> None:
    ours = distributed._this_mofq()
    assert distributed._run_on_worker(refuse, ours, 1) == 1
    for other in (ours + "1", ours.replace("mofq ", "mofq 1")):
        with pytest.raises(ClusterError, match=rf"has {ours}, .* is of {other}\. Install the same"):
            distributed._run_on_worker(refuse, other, 1)


@pytest.mark.long
def test_a_worker_with_another_mofq_or_none_is_refused(
    two_workers: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours, theirs = "with numerics 7", distributed._this_mofq()
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "NUMERICS", 7)
        with pytest.raises(ClusterError, match=rf"has {theirs}, .* of .*{ours}\. Install the same"):
            list(run_units(refuse, range(2)))
    # A module that this process alone finds, as mofq is where no worker has it.
    (tmp_path / "only_here.py").write_text("def run(function, sender, unit):\n    return unit\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(distributed, "_run_on_worker", importlib.import_module("only_here").run)
    with pytest.raises(ClusterError, match=rf"No module named 'only_here'\. Install {theirs} on"):
        list(run_units(refuse, range(2)))


@pytest.mark.long
def test_a_unit_that_kills_every_worker_ends_the_run_with_a_remedy(
    two_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "MAX_RETRIES", 0)
    with pytest.raises(ClusterError, match=r"was begun 1 times and its worker died .* memory"):
        list(run_units(die, range(4)))


@pytest.mark.long
def test_a_unit_that_fits_nowhere_is_refused_at_once(two_workers: None) -> None:
    with pytest.raises(ClusterError, match="needs 1 CPUs and 1 GPUs, and the cluster has 2 and 0"):
        list(run_units(die, range(4), device="cuda"))


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_worker_reads_the_headers_of_the_model_once(
    is_streamed: bool, folder: Path, stats: Stats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def noted(path: str, **hashes: Any) -> Checkpoint:
        opened.append(path)
        return open_shared(path, **hashes)

    calibrate_workers._open_checkpoint.cache_clear()
    monkeypatch.setattr(calibrate_workers, "open_shared", noted)
    (tmp_path / "a").mkdir()
    (tmp_path / UNFINISHED).mkdir()
    for index, token_T in enumerate(some_tokens(2, 16)):
        sequence = ("a", index, tuple(token_T.tolist()))
        unit = SequencesUnit(
            str(folder), stats.plan, str(tmp_path), (sequence,), is_streamed, "cpu"
        )
        assert calibrate_workers.run_unit(unit) == 1
    assert opened == [str(folder)]
    for path in stats.sequence_files("a"):
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes()


def test_a_worker_that_sees_another_model_or_other_stats_says_so(
    folder: Path, stats: Stats, tiny_llama: Path
) -> None:
    checkpoint = open_checkpoint(str(folder))
    unit = Unit(
        model=str(folder),
        index_sha256=checkpoint.index_sha256,
        weights_sha256=hash_weights(checkpoint),
        stats=str(stats.folder),
        stats_sha256=stats.sha256,
        group=find_layers(checkpoint).groups[0],
        schemes=("int4.g32",),
        corpora=("a",),
        elements=0,
        device="cpu",
    )
    with pytest.raises(ClusterError, match=r"another model there .* shared file system"):
        measure_unit(replace(unit, model=str(tiny_llama)))
    with pytest.raises(ClusterError, match=r"another model there .* than the one .* \(00000000\)"):
        measure_unit(replace(unit, weights_sha256="0" * 64))
    with pytest.raises(ClusterError, match=r"other stats there .* shared file system"):
        measure_unit(replace(unit, stats_sha256="0" * 64))


def test_a_cluster_that_does_not_start_in_time_is_begun_once_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def init(**where: object) -> None:
        calls.append(f"init {where['address']}")
        if len(calls) < fails:
            raise Exception("The current node timed out during startup. This could")

    ray = SimpleNamespace(init=init, shutdown=lambda: calls.append("shutdown"))
    monkeypatch.setattr(distributed, "_import_ray", lambda: ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    told: list[str] = []
    fails = 3  # the first time: init, shutdown, init
    with cluster("ray", tell=told.append):
        assert calls == ["init local", "shutdown", "init local"]
    assert len(told) == 1
    assert "did not start" in told[0]
    assert "once more" in told[0]
    calls.clear()
    fails = 99
    with (
        pytest.raises(ClusterError, match=r"timed out during startup.*twice.*less busy.*ray://"),
        cluster("ray"),
    ):
        pass
    assert calls == ["init local", "shutdown", "init local", "shutdown"]
    calls.clear()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(ClusterError, match=r"timed out during startup.*RAY_AUTH_MODE=token"),
        cluster(address := f"ray://127.0.0.1:{server.getsockname()[1]}"),
    ):
        pass
    assert calls == [f"init {address}", "shutdown"]


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("ray://127.0.0.1:9", "refused"),
        ("127.0.0.1:9", "refused"),
        ("ray://127.0.0.1:many", "'many'"),
    ],
)
def test_an_address_where_nothing_answers_is_refused_before_ray_tries_for_minutes(
    address: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "_connect", lambda *where: pytest.fail("Ray tries"))
    monkeypatch.setenv("RAY_ADDRESS", address)
    for given in (address, "ray"):
        with (
            pytest.raises(ClusterError, match=rf"{why}.*ray://HOST:PORT of one that runs"),
            cluster(given),
        ):
            pass


@pytest.mark.long
def test_a_run_that_is_stopped_cancels_nothing(two_workers: None) -> None:
    # Ray aborts the whole process where a unit ends while it is cancelled.
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "cancel", lambda *a, **k: pytest.fail("cancelled"))
        for _ in range(20):
            with pytest.raises(SchemeError):
                list(run_units(refuse, range(9)))


def test_without_ray_the_message_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    table = tmp_path / "t.jsonl"
    ran = mofq("measure", DEMO, "--space", "w8a8", "-o", table, "--cluster", "ray")
    assert ran.code == 1
    assert "--cluster needs Ray" in ran.err
    assert "Run `pip install '.[ray]'` in a checkout" in ran.err
    assert not table.exists()


@pytest.mark.long
def test_the_command_line_measures_on_a_cluster_of_its_own_without_noise(tmp_path: Path) -> None:
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    measure = ["measure", DEMO, "--space", "w8a8", "--json", "-o"]
    ok(*measure, here)
    ran = subprocess.run(
        [
            *(sys.executable, "-c", "from mofq.cli import main; main()"),
            *(*measure, there, "--cluster", "ray"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    # Where half a minute is not enough, how far it is is no noise.
    noise = [line for line in ran.stderr.splitlines() if " s since the start" not in line]
    assert (ran.returncode, noise) == (0, [])
    assert here.read_bytes() == there.read_bytes()
