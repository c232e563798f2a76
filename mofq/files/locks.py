"""One process at a time at a file or a folder, and folders that appear when they are complete.

The locks are the kernel's (``fcntl.flock``): a killed process leaves none behind, and what it left
half-done is begun anew by the next one, under the same name. The library ``filelock`` locks a file
beside the one that is meant, which would stay in users' folders, and cannot lock a folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import gethostname

from mofq.exceptions import MofqError

#: What the kernel locks; of Linux alone.
_LISTED = Path("/proc/locks")
#: Where a folder that exists is filled, inside of it.
_INSIDE = ".mofq.partial"
#: In a folder that is being filled: what it is filled for, and what is noted of how far that is.
NOTES = ".notes"
_JOB = f"{NOTES}/job"
#: What an empty folder may hold: the above of a killed process, and what ext4 puts into a mount.
_IN_EMPTY = (_INSIDE, "lost+found")


#: Makes an error of what `holder` says.
Busy = Callable[[str], MofqError]


@contextmanager
def hold_folder(folder: Path, busy: Busy) -> Iterator[None]:
    """Keep other processes out of a folder until the block ends.

    Args:
        folder: Exists.
        busy: Makes what is raised where another process holds it, or has just moved it away,
            of who that is.
    """
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not try_lock(file):
            raise busy(holder(file))
        if not is_at(file, folder):
            raise busy("another process")
        yield
    finally:
        os.close(file)  # releases the lock too


@contextmanager
def hold_file(path: Path, busy: Busy) -> Iterator[None]:
    """Keep other processes out of what an empty file stands for, until the block ends.

    On file systems of several machines a file can be locked, and a folder may not.

    Args:
        path: Of the file, which is made where it is not there, and stays.
        busy: Makes what is raised where another process holds it, of who that is.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if not try_lock(file):
            raise busy(holder(file))
        yield
    finally:
        os.close(file)  # releases the lock too


@contextmanager
def hold_new_folder(folder: Path, busy: Busy, *, job: str | None = None) -> Iterator[None]:
    """Make an empty folder and hold it; what a killed process left in it is removed.

    The block moves it to its final name. After an exception nothing is left of it.

    Args:
        folder: A name that nothing else uses.
        busy: Makes what is raised where another process holds it.
        job: All that decides what the folder is filled with. What a killed process left that had
            the same is kept, and the block goes on with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with hold_folder(folder, busy):
        noted = folder / _JOB
        try:
            if job is None or not noted.is_file() or noted.read_text("utf-8") != job:
                noted.unlink(missing_ok=True)  # first: what is kept of a job is all of it
                for path in folder.iterdir():
                    _remove(path)
                if job is not None:
                    noted.parent.mkdir()
                    noted.write_text(job, encoding="utf-8")
            yield
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def new_folder(
    target: Path, error: type[MofqError], *, last: str, job: str | None = None
) -> Iterator[Path]:
    """Fill a folder that shows its content when the block ends well; else nothing is left of it.

    A folder that does not exist is filled beside its name and renamed. One that exists, and is
    empty, stays the same folder, which may be a mount point or where a shell is: it is filled in
    a folder inside it, whose files move up at the end.

    Args:
        target: See `check_new_folder`.
        error: What is raised.
        last: The file that moves up after the others: that by which readers know the content.
        job: See `hold_new_folder`.

    Yields:
        The folder to fill, empty but for what is kept of the same job. It has a folder `NOTES`
        then, which is removed at the end.

    Raises:
        error: The target holds something, another process fills it, or it cannot be written.
    """
    check_new_folder(target, error)
    place = target.resolve()  # "." has no name of its own
    is_in_place = place.is_dir()
    partial = place / _INSIDE if is_in_place else place.with_name(f".{place.name}.partial")

    def busy(who: str) -> MofqError:
        return error(f"{target}: {who} writes to this folder. Wait for it, or give another folder.")

    try:
        with hold_new_folder(partial, busy, job=job):
            check_new_folder(target, error)  # again: the other process may have finished
            yield partial
            if job is not None:
                (partial / _JOB).unlink()
                shutil.rmtree(partial / NOTES)
            if is_in_place:
                _move_up(partial, last=last)
            else:
                partial.rename(place)
    except OSError as problem:
        raise error(
            # Of a copy the second is what was written.
            f"{target}: cannot be written ({problem.filename2 or problem.filename}: "
            f"{problem.strerror}). Nothing is left of it; make room or give another folder, and "
            f"run again."
        ) from problem


def _move_up(partial: Path, *, last: str) -> None:
    """Move everything in a folder to the folder that it lies in, which has nothing else."""
    paths = sorted(partial.iterdir(), key=lambda path: (path.name == last, path.name))
    try:
        for path in paths:
            path.rename(partial.parent / path.name)
        partial.rmdir()
    except BaseException:
        for path in paths:
            _remove(partial.parent / path.name)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_new_folder(target: Path, error: type[MofqError]) -> None:
    """Refuse a place that has something already: it must not exist, or be an empty folder.

    A link to an empty folder stands for that folder, which is filled where it is.

    Raises:
        error: As said.
    """
    if not target.is_dir() and (target.exists() or target.is_symlink()):
        found = f"a link to {target.readlink()}" if target.is_symlink() else "a file"
        raise error(f"{target}: needed a new folder, found {found}. Give another.")
    if target.is_dir() and any(path.name not in _IN_EMPTY for path in target.iterdir()):
        raise error(
            f"{target}: needed a new or an empty folder, found files in it. Give another folder, "
            f"or remove it."
        )


def open_new_file(path: Path) -> int:
    """Open an empty file, alone: waits for another process that writes it.

    Args:
        path: A name that nothing else uses. What a killed process left there is
            written over; a link is refused.

    Returns:
        The open file, to be closed by the caller, for writing.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            # The other process renamed it: this is its finished file by now.
            if is_at(file, path):
                os.ftruncate(file, 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def check_replaceable(path: Path, where: str | None = None) -> None:
    """Refuse to put a file in the place of what is none: a folder, a device, a pipe.

    Args:
        path: Of the file to be.
        where: What messages call it; None: by its path.

    Raises:
        MofqError: As said.
    """
    if path.exists() and not path.is_file():
        found = "a folder" if path.is_dir() else "a device or a pipe"
        raise MofqError(
            f"{where or path}: needed the name of a file, found {found}. Name another file."
        )


def try_lock(file: int) -> bool:
    """Lock an open file or folder for this process alone; False where another has a lock on it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holder(file: int) -> str:
    """Who has a lock on an open file or folder, as the subject of a message.

    The kernel of Linux lists the locks of this machine. Those of processes on others (NFS) or
    outside of this container are not in the list, or as process 0.

    Args:
        file: Open, and locked by another process, which may have ended since.

    Returns:
        The process with its host; else "another process".
    """
    inode = os.fstat(file).st_ino
    found = {int(line[4]) for line in _kernel_locks() if int(line[5].rpartition(":")[2]) == inode}
    # The same number on another device is another file: two are not told apart. 0 is outside.
    if len(found) != 1 or 0 in found:
        return "another process"
    return f"another process (pid {found.pop()} on {gethostname()})"


def _kernel_locks() -> Iterator[list[str]]:
    """Fields of each lock by ``flock``; see proc_locks(5)."""
    if _LISTED.is_file():
        for line in _LISTED.read_text("ascii").splitlines():
            fields = line.split()
            if fields[1] == "FLOCK":  # a process that waits has "->" there
                yield fields


def is_at(file: int, path: Path) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
