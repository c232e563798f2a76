"""Compiles the passes of ``rounding_errors``: C++ on the CPU, Triton on a GPU.

On the CPU the program is made ahead of time, once for a set of schemes and for all shapes,
and kept in a folder: the next process loads it in milliseconds, without the compiler's own
modules, and it runs without Python's lock (`compiled_library`), so that blocks are worked on side
by side. Many schemes are several programs, which take turns over a block that stays in the cache.
On a GPU ``torch.compile`` makes it when it is first called.

Nothing is compiled that would change a bit: no contraction into fused multiply-adds, no
approximate division, no flushing of subnormal numbers.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from shutil import which
from typing import Any, Literal

import torch
from torch import Tensor

from mofq.exceptions import first_line
from mofq.files.progress import Tell, silent
from mofq.numbers.processor import processor_flags
from mofq.numbers.quantize.compiled_library import (
    CompiledLibrary,
    load_library,
    unpack_library,
)
from mofq.numbers.quantize.rounding_errors import (
    Pass,
    band_rows,
    deltas_pass,
    errors_pass,
    strip_columns,
)
from mofq.numbers.schemes import TensorScheme

Kind = Literal["errors", "deltas"]

#: Work that makes the compiler worth its while, on one thread without it [s].
_WORTH_SECONDS = 90.0
#: Without a compiler, one scheme over one element, and one of the search's candidates [s].
_ELEMENT_SECONDS = 10e-9
#: The same on a GPU: some twenty operations that each pass over float32 numbers in its memory.
_GPU_ELEMENT_SECONDS = 0.1e-9
_SEARCH_FACTOR = 40

#: Bands and about how many columns of the block that a program for a GPU is tuned on. Where one
#: of its sizes is that of something else, torch.export may take it for fixed.
_GPU_EXAMPLE_BANDS, _GPU_EXAMPLE_COLUMNS = 59, 4096

#: Schemes of a program: what takes a compiler its time grows faster than they do.
_PROGRAM_SCHEMES = 8

_MAKERS: dict[Kind, Callable[[Sequence[TensorScheme]], Pass]] = {
    "errors": errors_pass,
    "deltas": deltas_pass,
}
_CPU_OPTIONS = {
    "cpp.threads": 1,
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.enable_unsafe_math_opt_flag": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
}
#: A release of torch without one of them would give other bits, and compiles nothing.
_GPU_OPTIONS = {
    "emulate_precision_casts": True,  # no fused multiply-adds
    "eager_numerics.division_rounding": True,
    "eager_numerics.disable_ftz": True,
}


def eager_pass(kind: Kind, schemes: Sequence[TensorScheme]) -> Pass:
    """The pass as it is written, for blocks of any floating dtype."""
    return _MAKERS[kind](schemes)


#: Kind, schemes, dtype of the blocks, elements of all weights that it will see -> the pass.
PassMaker = Callable[[Kind, Sequence[TensorScheme], torch.dtype, int], Pass]


def pass_maker(*, device: str = "cpu", tell: Tell = silent) -> PassMaker:
    """What makes passes over blocks, compiled where that is possible and worth its while.

    Whether one is changes no bit of what it gives. ``MOFQ_COMPILE=0`` in the environment
    leaves all uncompiled, ``MOFQ_COMPILE=1`` compiles however little work there is.

    Args:
        device: Where the blocks are.
        tell: Gets a line about a compilation, which takes its time, or cannot be.

    Returns:
        A function of what the pass gives (see ``rounding_errors``), schemes that are all
        candidates, the dtype of the blocks (bfloat16 or float32) and the elements of all
        weights. On the CPU its passes may be called by several threads at once.
    """
    failed: list[str] = []  # tried once
    is_cpu = _is_cpu(device)

    def make(
        kind: Kind, schemes: Sequence[TensorScheme], dtype: torch.dtype, elements: int
    ) -> Pass:
        wish = os.environ.get("MOFQ_COMPILE")
        if not schemes or failed or wish == "0":
            return eager_pass(kind, schemes)
        seconds = eager_seconds(schemes, elements, is_cpu=is_cpu)
        programs = _programs(kind, schemes, dtype)
        paths = [program.path for program in programs]
        is_there = is_cpu and all(path.is_file() for path in paths)
        if not is_there and wish != "1" and seconds <= _WORTH_SECONDS:
            return eager_pass(kind, schemes)
        try:
            if not is_cpu:
                tell(f"Compiling one pass for {len(schemes)} schemes.")
                return partial(_run, [_triton(program, device) for program in programs], dtype)
            if not is_there:
                tell(
                    f"Compiling one pass for {len(schemes)} schemes; it is kept in "
                    f"{_kernel_folder()}."
                )
                for program in programs:
                    _build(program)
            return partial(_run, [partial(_call, load_library(path)) for path in paths], dtype)
        except Exception as error:  # the same numbers can be had without a compiler
            failed.append(first_line(error))
            tell(f"It cannot be compiled, and takes longer: {failed[0]}.")
            return eager_pass(kind, schemes)

    return make


def _is_cpu(device: str) -> bool:
    return torch.device(device).type == "cpu"


def eager_seconds(schemes: Sequence[TensorScheme], elements: int, *, is_cpu: bool = True) -> float:
    """About how long one thread, or a GPU, takes without a compiler [s]."""
    searched = sum(s.has_searched_scale for s in schemes)
    each = _ELEMENT_SECONDS if is_cpu else _GPU_ELEMENT_SECONDS
    return (len(schemes) + _SEARCH_FACTOR * searched) * elements * each


@dataclass(frozen=True, slots=True)
class _Program:
    """A compiled part of a pass: some of its schemes, laid out as all are."""

    path: Path
    of: Pass
    rows: int  #: of a band
    columns: int  #: of a strip
    dtype: torch.dtype


def _programs(
    kind: Kind, schemes: Sequence[TensorScheme], dtype: torch.dtype
) -> tuple[_Program, ...]:
    rows, columns = band_rows(schemes), strip_columns(schemes)
    programs = []
    for start in range(0, len(schemes), _PROGRAM_SCHEMES):
        stop = start + _PROGRAM_SCHEMES
        some = schemes[start:stop]
        is_last = stop >= len(schemes)
        of = deltas_pass(some) if kind == "deltas" else errors_pass(some, with_weights=is_last)
        key = _key(kind, *map(repr, some), rows, columns, dtype, is_last)
        programs.append(_Program(_kernel_folder() / f"{key}.so", of, rows, columns, dtype))
    return tuple(programs)


def _run(
    programs: Sequence[Callable[[Tensor, Tensor], Tensor]],
    dtype: torch.dtype,
    x_ARJK: Tensor,
    tensor_amax: Tensor,
) -> Tensor:
    if x_ARJK.dtype != dtype or not x_ARJK.is_contiguous():
        raise ValueError(f"compiled for contiguous {dtype}, got {x_ARJK.dtype}")
    found = [program(x_ARJK, tensor_amax) for program in programs]
    return found[0] if len(found) == 1 else torch.cat(found)


def _call(library: CompiledLibrary, x_ARJK: Tensor, tensor_amax: Tensor) -> Tensor:
    return library([x_ARJK, tensor_amax])


def _build(program: _Program) -> None:
    """Compile into the file, which appears when it is complete."""
    compiler = os.environ.get("CXX", "g++")
    if which(compiler) is None:
        raise FileNotFoundError(f"found no C++ compiler {compiler!r}; install one, or set CXX.")
    program.path.parent.mkdir(parents=True, exist_ok=True)
    with program.path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of a machine make it once
        if not program.path.is_file():
            _export(program)


def _export(program: _Program) -> None:
    package, unfinished = (program.path.with_suffix(f".partial.{s}") for s in ("pt2", "so"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(
                _exported(program, "cpu"),
                package_path=str(package),
                inductor_configs=_known(_CPU_OPTIONS),
            )
        unpack_library(package, unfinished)
        os.replace(unfinished, program.path)
    finally:
        package.unlink(missing_ok=True)
        unfinished.unlink(missing_ok=True)


def _exported(
    program: _Program, device: str, *, bands: int = 3, strips: int = 5
) -> torch.export.ExportedProgram:
    """The program as a graph, for any number of bands and strips; those given are an example."""
    shape = (bands, program.rows, strips, program.columns)
    x_ARJK = torch.zeros(shape, dtype=program.dtype, device=device)
    free = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    return torch.export.export(
        _Module(program.of),
        (x_ARJK, torch.ones((), device=device)),
        dynamic_shapes=(free, None),
    )


def _triton(program: _Program, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The program for a GPU.

    Not by ``torch.compile``, which makes the numbers of a scheme (its bits) unknown as well,
    and compiles anew for each kind of shape.
    """
    missing = [name for name in _GPU_OPTIONS if name not in _known(_GPU_OPTIONS)]
    if missing:
        raise RuntimeError(f"torch {torch.__version__} has no option {missing[0]!r}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Kernels are tuned on the example: about as many rows and columns as a block will have.
        strips = max(5, _GPU_EXAMPLE_COLUMNS // program.columns - 3)
        exported = _exported(program, device, bands=_GPU_EXAMPLE_BANDS, strips=strips)
        x_seen = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"][-2]
        if isinstance(x_seen.shape[0], int) or isinstance(x_seen.shape[2], int):
            raise RuntimeError(f"torch.export took {list(x_seen.shape)} for the only shape.")
        lifted = exported.graph_signature.inputs_to_lifted_tensor_constants.values()
        constants = [exported.constants[name] for name in lifted]
        x_ARJK, amax = exported.example_inputs[0]
        compiled = torch._inductor.standalone_compile(
            exported.graph_module,
            [*constants, x_ARJK, amax],
            options={"config_patches": dict(_GPU_OPTIONS)},
        )

    def run(x_ARJK: Tensor, tensor_amax: Tensor) -> Tensor:
        found: Sequence[Tensor] = compiled(*constants, x_ARJK, tensor_amax)
        return found[0]

    return run


class _Module(torch.nn.Module):
    def __init__(self, of: Pass) -> None:
        super().__init__()
        self._of = of

    def forward(self, x_ARJK: Tensor, amax: Tensor) -> Tensor:
        return self._of(x_ARJK, amax)


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Those that this release of torch has."""
    from torch._inductor import config

    known = config.get_config_copy()
    return {name: value for name, value in options.items() if name in known}


def _kernel_folder() -> Path:
    # Not $TORCHINDUCTOR_CACHE_DIR: torch sets it by itself, to a temporary folder, on its way.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "mofq" / "kernels"


def _key(kind: Kind, *of: object) -> str:
    """Of all that the program follows from: code, schemes and layout, torch, processor."""
    digest = hashlib.sha256(_source())
    for part in (kind, *of, torch.__version__, _CPU_OPTIONS, _processor()):
        digest.update(f"{part}\n".encode())
    return f"{kind}-{digest.hexdigest()[:24]}"


@lru_cache(maxsize=1)
def _source() -> bytes:
    import mofq.numbers.formats
    import mofq.numbers.schemes

    files = sorted(Path(__file__).parent.glob("*.py"))
    return b"".join(
        file.read_bytes()
        for file in (
            *files,
            Path(mofq.numbers.formats.__file__),
            Path(mofq.numbers.schemes.__file__),
        )
    )


@lru_cache(maxsize=1)
def _processor() -> str:
    """What the compiler may use of it; a folder of kernels may be shared by machines."""
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {processor_flags()}"
