"""A cluster that somebody else began: reached at each of its addresses, left, and lost."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import DEMO

from mofq.evidence.corpora import BUNDLED_TEXT

pytestmark = pytest.mark.slow

TEXT = f"en={BUNDLED_TEXT['demo-en-calibration']}"
TESTS = Path(__file__).parent.parent
MOFQ = ("-c", "from mofq.cli import main; main()")
LEAVE = """
import sys
from cluster_units import linger
from mofq.evidence.cluster import cluster, run_units
with cluster(sys.argv[1]):
    list(run_units(linger, [(0, sys.argv[2]), (1, sys.argv[2])]))
"""


@dataclass(frozen=True)
class Head:
    """The first machine of a cluster."""

    process: subprocess.Popen[bytes]
    addresses: tuple[str, ...]  #: of the Ray client, and of the cluster
    environment: dict[str, str]

    def run(self, *command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        """A command of Python's on a machine that knows the cluster's token."""
        return subprocess.run(
            [sys.executable, *command],
            env={**self.environment, **more},
            capture_output=True,
            text=True,
        )


@pytest.fixture
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    # As users begin one, but for its ports, its folder, and the priority of its workers.
    with begin_cluster() as begun:
        yield begun


@contextmanager
def begin_cluster() -> Iterator[Head]:
    port, client_port = free_port(), free_port()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS / "support"), str(TESTS.parent)]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    begin = f"-m ray.scripts.scripts start --head --block --num-cpus 2 --port {port}"
    more = f"--include-dashboard false --ray-client-server-port {client_port}"
    process = subprocess.Popen(
        [sys.executable, *begin.split(), *more.split()],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: answers(port) and answers(client_port), "the cluster begins")
        addresses = (f"ray://127.0.0.1:{client_port}", f"127.0.0.1:{port}")
        yield Head(process, addresses, environment)
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Stop a cluster; ``ray stop`` would stop those of others too."""
    process.terminate()
    process.wait(60)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def is_running(pid: int) -> bool:
    with suppress(OSError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return False


def wait_until(is_so: Callable[[], bool], what: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def measure(table: Path, *more: str, space: str = "w8a8") -> tuple[str | Path, ...]:
    return (*MOFQ, "measure", DEMO, "--space", space, "-o", table, "--json", *more)


def calibrate(stats: Path, *more: str) -> tuple[str | Path, ...]:
    sizes = ("--sequences", "5", "--sequence-length", "32", "--keep", "4")
    return (*MOFQ, "calibrate", DEMO, "--corpus", TEXT, *sizes, "-o", stats, "--json", *more)


def noise(said: str) -> list[str]:
    """Where half a minute is not enough, how far a command is is no noise."""
    return [line for line in said.splitlines() if " s since the start" not in line]


def test_every_address_gives_the_local_table_and_the_local_stats(
    head: Head, tmp_path: Path
) -> None:
    assert head.run(*measure(tmp_path / "here.jsonl")).returncode == 0
    assert head.run(*calibrate(tmp_path / "here")).returncode == 0
    client, address = head.addresses
    for name, given, known in (
        ("client", client, {}),
        ("address", address, {}),
        ("known", "ray", {"RAY_ADDRESS": address}),
    ):
        table, stats = tmp_path / f"{name}.jsonl", tmp_path / name
        ran = head.run(*measure(table, "--cluster", given), **known)
        assert (ran.returncode, noise(ran.stderr)) == (0, []), name
        assert table.read_bytes() == (tmp_path / "here.jsonl").read_bytes()
        how = ("--execution", "auto" if known else "streamed")
        ran = head.run(*calibrate(stats, *how, "--cluster", given), **known)
        assert (ran.returncode, noise(ran.stderr)) == (0, []), name
        files = [path.relative_to(stats) for path in stats.rglob("*") if path.is_file()]
        assert files
        for file in files:
            assert (stats / file).read_bytes() == (tmp_path / "here" / file).read_bytes()


def test_whoever_leaves_early_leaves_no_unit_running(head: Head, tmp_path: Path) -> None:
    for number, address in enumerate(head.addresses):
        mark = tmp_path / str(number)
        ran = head.run("-c", LEAVE, address, mark)
        assert "SchemeError: another one stays" in ran.stderr
        worker = int(mark.read_text(encoding="utf-8"))
        wait_until(lambda: not is_running(worker), "the worker is ended", 60)  # noqa: B023


@pytest.mark.parametrize("which", [0, 1])
def test_a_cluster_that_goes_away_ends_the_run_and_the_next_one_goes_on(
    head: Head, tmp_path: Path, which: int
) -> None:
    def slow(table: Path, *more: str) -> tuple[str | Path, ...]:
        return measure(table, *more, space="serving")  # it looks for scales

    whole, table = tmp_path / "whole.jsonl", tmp_path / "table.jsonl"
    assert head.run(*slow(whole)).returncode == 0
    running = subprocess.Popen(
        [sys.executable, *slow(table, "--cluster", head.addresses[which])],
        env=head.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: table.is_file() and b'"group"' in table.read_bytes(), "a row is there")
    end(head.process)
    _, said = running.communicate(timeout=300)
    assert running.returncode == 1
    assert "the cluster went away: " in said
    assert "What is finished is kept" in said
    assert "Traceback" not in said
    assert head.run(*slow(table)).returncode == 0
    assert table.read_bytes() == whole.read_bytes()
