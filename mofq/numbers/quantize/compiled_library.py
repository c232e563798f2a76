"""Calls a program of AOTInductor without Python's lock.

What torch loads such a program with keeps the lock while it runs (2.13.0: a second thread's call
waits for the first), so threads that round blocks would take turns. The library itself has a C
interface, `torch/csrc/inductor/aoti_runtime/interface.h`, and ctypes gives the lock away.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from zipfile import ZipFile

import torch
from torch import Tensor

_handle_of = ctypes.pythonapi.PyCapsule_GetPointer
_handle_of.restype, _handle_of.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_capsule_of = ctypes.pythonapi.PyCapsule_New
_capsule_of.restype = ctypes.py_object
_capsule_of.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def unpack_library(package: Path, library: Path) -> None:
    """Write the shared library of a package that ``aoti_compile_and_package`` made, to the disk.

    Loading what a crash of the machine left of one may end the process.

    Raises:
        ValueError: It has none, or several.
    """
    with ZipFile(package) as files:
        names = [name for name in files.namelist() if name.endswith(".so")]
        if len(names) != 1:
            raise ValueError(f"{package} has {len(names)} libraries, not 1.")
        with library.open("wb") as file:
            file.write(files.read(names[0]))
            file.flush()
            os.fsync(file.fileno())


class CompiledLibrary:
    """A program of tensors on the CPU; any number of threads may call it at once."""

    def __init__(self, path: Path) -> None:
        """Load it.

        Raises:
            OSError: It cannot be loaded.
            AttributeError: It, or torch, has not the interface.
        """
        library = ctypes.CDLL(str(path))
        self._path = path
        self._create = library.AOTInductorModelContainerCreateWithDevice
        self._run = library.AOTInductorModelContainerRun
        self._to_handles = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors
        self._to_tensors = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs
        self._free: list[ctypes.c_void_p] = []  # a second caller of the same one would wait

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Its only result.

        Args:
            inputs: Of the dtypes and shapes that it was compiled for, contiguous.

        Raises:
            RuntimeError: It failed; why stands on stderr.
        """
        try:
            container = self._free.pop()
        except IndexError:
            container = ctypes.c_void_p()
            self._check(self._create(ctypes.byref(container), ctypes.c_size_t(1), b"cpu", None))
        handles = [_handle_of(one, None) for one in self._to_handles(list(inputs))]
        given, found = (ctypes.c_void_p * len(handles))(*handles), (ctypes.c_void_p * 1)()
        sizes = ctypes.c_size_t(len(handles)), ctypes.c_size_t(1)
        # It takes the handles of the inputs, and gives those of the result.
        self._check(self._run(container, given, sizes[0], found, sizes[1], None, None))
        self._free.append(container)
        result: Tensor = self._to_tensors([_capsule_of(found[0], None, None)])[0]
        return result

    def _check(self, status: int) -> None:
        if status != 0:
            raise RuntimeError(f"{self._path} failed with status {status}.")


@lru_cache(maxsize=256)
def load_library(path: Path) -> CompiledLibrary:
    """The program of a file, loaded once."""
    return CompiledLibrary(path)
