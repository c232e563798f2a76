"""Who holds a lock, as messages name it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname

import pytest

from mofq.exceptions import MofqError
from mofq.files import locks
from mofq.files.locks import hold_folder, holder, try_lock

HOLD = """
import os, sys
from mofq.files.locks import try_lock
assert try_lock(os.open(sys.argv[1], os.O_RDONLY))
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """A folder that another process has a lock on; its number."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        yield other.pid


def test_the_process_that_holds_a_folder_is_named_with_its_host_alone(tmp_path: Path) -> None:
    with (
        held(tmp_path) as pid,
        pytest.raises(MofqError) as caught,
        hold_folder(tmp_path, MofqError),
    ):
        pass
    # When /proc/PID was made is when somebody looked at it first, not when the process began.
    assert str(caught.value) == f"another process (pid {pid} on {gethostname()})"
    with hold_folder(tmp_path, MofqError):  # it has ended
        pass


@pytest.mark.parametrize(
    "lines",
    [
        "",
        "1: POSIX  ADVISORY  WRITE 1 00:2a:{inode} 0 EOF\n",
        "1: -> FLOCK  ADVISORY  WRITE 1 00:2a:{inode} 0 EOF\n",
        "1: FLOCK  ADVISORY  WRITE 0 00:2a:{inode} 0 EOF\n",  # outside of the container
        "1: FLOCK  ADVISORY  WRITE {pid} 00:2a:1{inode} 0 EOF\n",
        "1: FLOCK  ADVISORY  WRITE {pid} 00:2a:{inode} 0 EOF\n"
        "2: FLOCK  ADVISORY  WRITE 1 00:2b:{inode} 0 EOF\n",
    ],
)
def test_nobody_is_named_where_the_kernel_does_not_say_who(
    lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = tmp_path / "locks"
    monkeypatch.setattr(locks, "_LISTED", listed)
    file = os.open(tmp_path, os.O_RDONLY)
    try:
        assert holder(file) == "another process"  # no such list, as on macOS
        listed.write_text(lines.format(inode=os.fstat(file).st_ino, pid=os.getpid()))
        assert try_lock(file)
        assert holder(file) == "another process"
    finally:
        os.close(file)
