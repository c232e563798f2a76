"""The study against a real PostgreSQL server, begun for the test: ``pytest -m postgres``."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import study_worker
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mofq.decision.measured.study_storage import open_study
from mofq.decision.measured.trials import search_result
from mofq.exceptions import MofqError

pytestmark = pytest.mark.postgres


def programs() -> Path:
    """Where Debian or a PATH has ``initdb`` and ``pg_ctl``."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    found = shutil.which("pg_ctl")
    assert debian or found, "no PostgreSQL server is installed: apt-get install postgresql"
    return debian[-1] if debian else Path(str(found)).parent


def as_server(*command: str) -> None:
    """Run one of the server's programs; it refuses to run as root."""
    prefix = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    subprocess.run([*prefix, *command], check=True, capture_output=True, cwd="/", timeout=120)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """URL of an empty database."""
    # A socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="mofq-postgres-", dir="/tmp"))
    if os.getuid() == 0:
        shutil.chown(folder, "postgres")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    data, options = str(folder / "data"), f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    ctl = str(programs() / "pg_ctl")
    as_server(str(programs() / "initdb"), "-D", data, "-A", "trust", "-U", "mofq", "--no-sync")
    as_server(ctl, "-D", data, "-o", options, "-l", str(folder / "log"), "-w", "start")
    try:
        yield f"postgresql+psycopg://mofq@127.0.0.1:{port}/postgres"
    finally:
        as_server(ctl, "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


def test_two_processes_and_a_kill_on_a_server(server: str) -> None:
    command = [sys.executable, study_worker.__file__, server, "10", "0.02"]
    study = open_study(server, "test")
    killed, other = (subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2))
    while killed.poll() is None and len(_finished(study)) < 2:
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    _, errors = other.communicate(timeout=120)
    assert other.returncode == 0, errors.decode()
    assert 10 <= len(_finished(study)) <= 11
    found = search_result(study, study_worker.problem())
    assert found.best.kl.value <= found.start.kl.value


def _finished(study: Study) -> list[FrozenTrial]:
    return study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))


def test_a_server_that_does_not_answer_is_an_error_that_says_so() -> None:
    with pytest.raises(MofqError, match="cannot be opened"):
        open_study("postgresql+psycopg://nobody@127.0.0.1:1/none", "test")
