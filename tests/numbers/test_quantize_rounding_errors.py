"""One pass over a block gives, for every candidate, what the reference gives: bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from families import long_but
from fenced_memory import fenced
from number_cases import (
    WEIGHT_SCHEMES,
    adversarial_weight,
    trained_like_weight,
    weight_scheme,
)
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from mofq.numbers.formats import ELEMENT_FORMATS, CodebookFormat, FloatFormat
from mofq.numbers.quantize import (
    compiled,
    fake_quantize_weight,
    round_to_format,
    scale_rules,
)
from mofq.numbers.quantize.compiled import Kind, pass_maker
from mofq.numbers.quantize.compiled_library import unpack_library
from mofq.numbers.quantize.rounding import codebook_values, divide, nearest_code
from mofq.numbers.quantize.rounding_errors import (
    band_rows,
    deltas_pass,
    errors_pass,
    is_candidate,
    strip_columns,
    sum_squares,
    to_bands,
)
from mofq.numbers.schemes import TensorScheme

#: What a compiler could get wrong: rounding, a division, a zero point, two levels of scales.
COMPILED = ("int8.channel", "fp4_e2m1.g32", "int4.g32.asym", "nvfp4")
#: Elements that are rounded in a shorter way where they are compiled.
SCALED_ELEMENTS = [
    *("int2", "int4", "int8"),
    *(name for name, e in ELEMENT_FORMATS.items() if isinstance(e, FloatFormat)),
]
#: What a compiler sees to be one number.
CONSTANTS = [
    getattr(torch.ops.aten, name).default
    for name in ("full", "full_like", "scalar_tensor", "ones_like", "lift_fresh_copy")
]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def blocks() -> Iterator[Tensor]:
    """Ordinary and adversarial ones, of other shapes, whole bands and not, bf16 and float32."""
    yield trained_like_weight(128, 256)
    yield trained_like_weight(32, 64, seed=4)
    yield trained_like_weight(96, 128, seed=5).bfloat16()
    adversarial = adversarial_weight(64, 128)
    yield adversarial
    yield -adversarial
    yield adversarial.flip(0).bfloat16().nan_to_num(posinf=1e38, neginf=-1e38)


def expected_deltas(block_RI: Tensor, schemes: Sequence[TensorScheme]) -> Tensor:
    weight_RI = block_RI.float()
    amax = float(weight_RI.abs().max())
    return torch.stack(
        [fake_quantize_weight(weight_RI, s, tensor_amax=amax) - weight_RI for s in schemes]
    )


def bits(values: Tensor) -> Tensor:
    return values.cpu().contiguous().view(torch.int32)


def check(kind: Kind, schemes: Sequence[TensorScheme], block_RI: Tensor, found: Tensor) -> None:
    delta_WRI = expected_deltas(block_RI, schemes)
    rows, columns = block_RI.shape
    if kind == "deltas":
        found_WRI = found.reshape(len(schemes), -1, columns)[:, :rows]
        # A zero may have another sign: codes of integers have none.
        same_W = (found_WRI.cpu() == delta_WRI).flatten(1).all(1)
        assert [s for s, same in zip(schemes, same_W.tolist(), strict=True) if not same] == []
        return
    weight_RI = block_RI.float()
    sums_WRI = found.reshape(len(found), -1, columns)
    assert torch.equal(bits(sums_WRI[:-2]), bits(sum_squares(delta_WRI))[:, : sums_WRI.shape[1]])
    assert torch.equal(bits(sums_WRI[-2:-1]), bits(sum_squares(weight_RI[None])))
    assert torch.equal(sums_WRI[-1].amax(0).cpu(), weight_RI.abs().amax(0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [n for n in WEIGHT_SCHEMES if is_candidate(weight_scheme(n))])
def test_the_pass_gives_the_references_rounding_errors(name: str, device: str) -> None:
    schemes = [weight_scheme(name)]
    for block_RI in blocks():
        x_ARJK = to_bands(block_RI, schemes).to(device)
        amax = block_RI.abs().max().float().to(device)
        check("deltas", schemes, block_RI, deltas_pass(schemes)(x_ARJK, amax))
        if device == "cpu":  # sums in another order
            check("errors", schemes, block_RI, errors_pass(schemes)(x_ARJK, amax))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MOFQ_COMPILE", "1")
    return tmp_path / "mofq" / "kernels"


def check_compiled(
    kind: Kind, schemes: Sequence[TensorScheme], cache: Path, *dtypes: torch.dtype
) -> None:
    told: list[str] = []
    for dtype in dtypes:
        some = [b for b in blocks() if b.dtype == dtype]
        compiled_pass = pass_maker(tell=told.append)(kind, schemes, dtype, 0)
        for block_RI in some:
            amax = block_RI.abs().max().float()
            for x_ARJK in fenced(to_bands(block_RI, schemes)):
                check(kind, schemes, block_RI, compiled_pass(x_ARJK, amax))
    assert all(line.startswith("Compiling one pass for ") for line in told)
    assert len(list(cache.glob("*.so"))) == len(told) * -(-len(schemes) // 8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["errors", "deltas"])
def test_every_scheme_compiled_is_the_reference_in_every_bit(kind: Kind, own_cache: Path) -> None:
    schemes = [s for name in WEIGHT_SCHEMES if is_candidate(s := weight_scheme(name))]
    both = (torch.float32, torch.bfloat16)
    check_compiled(kind, list(dict.fromkeys(schemes)), own_cache, *both)


@pytest.mark.long
def test_some_schemes_compiled_are_the_reference_in_every_bit(own_cache: Path) -> None:
    check_compiled("errors", [weight_scheme(n) for n in COMPILED], own_cache, torch.float32)


@pytest.mark.long
def test_schemes_compiled_for_bfloat16_are_the_reference_in_every_bit(own_cache: Path) -> None:
    schemes = [weight_scheme(name) for name in ("nvfp4", "int4.g32.asym")]
    check_compiled("errors", schemes, own_cache, torch.bfloat16)


@pytest.mark.long
def test_the_fence_kills_who_reads_past_an_end() -> None:
    read = "import ctypes, torch; from fenced_memory import fenced; "
    for number, past in ((0, 8), (1, -1)):
        code = f"x = list(fenced(torch.ones(8)))[{number}]; ctypes.c_float.from_address("
        code += f"x.data_ptr() + {past} * 4).value"
        ran = subprocess.run(
            [sys.executable, "-c", read + code],
            cwd=Path(__file__).parents[1] / "support",
            capture_output=True,
        )
        assert ran.returncode == -signal.SIGSEGV


@pytest.mark.long
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
def test_no_compiled_pass_reads_past_an_odd_block(dtype: torch.dtype, own_cache: Path) -> None:
    """Channels alone leave the columns any number, which no vector divides."""
    schemes = [weight_scheme("int8.channel"), weight_scheme("fp8_e4m3.channel")]
    compiled_pass = pass_maker()("errors", schemes, dtype, 0)
    for rows, columns in ((64, 1), (1, 17), (65, 31), (130, 577), (64, 4099)):
        block_RI = trained_like_weight(rows, columns).to(dtype)
        for x_ARJK in fenced(to_bands(block_RI, schemes)):
            check("errors", schemes, block_RI, compiled_pass(x_ARJK, torch.ones(())))


@pytest.mark.slow
def test_every_quotient_of_a_bfloat16_and_its_scale_has_the_references_error(
    own_cache: Path,
) -> None:
    """All mantissas of both, the weight up to 2**24 times smaller; and at the ends of the range."""
    schemes = [weight_scheme(f"{element}.channel") for element in SCALED_ELEMENTS]
    schemes += [weight_scheme(name) for name in ("mxfp8", "mxint8", "mx6")]
    mantissa = 1 + torch.arange(128) / 128
    below = torch.exp2(-torch.arange(25.0))
    smaller_I = (below[:, None] * mantissa).flatten()
    weight_OI = torch.cat([mantissa[:, None], smaller_I.expand(128, -1)], 1)[:, :3200]
    weight_OI = weight_OI.minimum(mantissa[:, None])  # the first of its row is the largest
    compiled_pass = pass_maker()("errors", schemes, torch.bfloat16, 0)
    for exponent in (0, -100, -126, 127):
        block_OI = (weight_OI * 2.0**exponent).bfloat16()
        assert bool(block_OI.isfinite().all())
        found = compiled_pass(to_bands(block_OI, schemes), torch.ones(()))
        check("errors", schemes, block_OI, found)


@pytest.mark.long
def test_a_program_is_made_once_and_loaded_by_the_next_process(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schemes = [weight_scheme("int8.channel")]
    block_RI = trained_like_weight(32, 64)
    told: list[str] = []
    first = pass_maker(tell=told.append)("errors", schemes, torch.float32, 0)
    monkeypatch.setattr(compiled, "_build", None)  # no second time
    monkeypatch.delenv("MOFQ_COMPILE")  # and it is used however small the work
    second = pass_maker(tell=told.append)("errors", schemes, torch.float32, 0)
    assert len(told) == 1
    for one in (first, second):
        check("errors", schemes, block_RI, one(to_bands(block_RI, schemes), torch.ones(())))
    with pytest.raises(ValueError, match="compiled for contiguous"):
        second(to_bands(block_RI.bfloat16(), schemes), torch.ones(()))


@pytest.mark.long
def test_a_compiled_pass_leaves_pythons_lock_to_others(own_cache: Path) -> None:
    schemes = [weight_scheme("int8.channel")]
    compiled_pass = pass_maker()("errors", schemes, torch.float32, 0)
    x_ARJK, amax = to_bands(trained_like_weight(512, 2048), schemes), torch.ones(())
    calls, done = 100, []

    def work() -> None:
        for _ in range(calls):
            done.append(compiled_pass(x_ARJK, amax))

    thread, interval = threading.Thread(target=work), sys.getswitchinterval()
    sys.setswitchinterval(1000)  # who has the lock is never asked for it
    try:
        thread.start()
        seen = len(done)  # by who got the lock
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert len(done) == calls
    assert seen < calls
    assert all(torch.equal(bits(one), bits(done[0])) for one in done)


def test_a_library_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a crash of the machine leaves of one ends the process that loads it (SIGBUS)."""
    package, library = tmp_path / "package.pt2", tmp_path / "library.so"
    with ZipFile(package, "w") as files:
        files.writestr("data/model.so", b"library")
        files.writestr("data/model.cpp", b"source")
    flushed: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda _: flushed.append(library.read_bytes()))
    unpack_library(package, library)
    assert flushed == [b"library"] == [library.read_bytes()]
    with ZipFile(package, "a") as files:
        files.writestr("data/other.so", b"another")
    with pytest.raises(ValueError, match="has 2 libraries, not 1"):
        unpack_library(package, library)


def test_without_a_compiler_the_same_code_runs_as_it_is_and_says_so_once(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    told: list[str] = []
    make = pass_maker(tell=told.append)
    block_RI = trained_like_weight(32, 64)
    for name in ("int8.channel", "int4.g32"):
        schemes = [weight_scheme(name)]
        found = make("deltas", schemes, torch.float32, 0)(
            to_bands(block_RI, schemes), torch.ones(())
        )
        check("deltas", schemes, block_RI, found)
    assert [line.split(";")[0] for line in told] == [
        "Compiling one pass for 1 schemes",
        "It cannot be compiled, and takes longer: found no C++ compiler 'no-such-compiler'",
    ]
    assert not list(own_cache.glob("*.so"))


def test_what_takes_seconds_is_not_compiled(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOFQ_COMPILE")
    schemes = [weight_scheme("int8.channel")]
    told: list[str] = []
    pass_maker(tell=told.append)("errors", schemes, torch.float32, 10**9)
    assert told == []
    built: list[Path] = []
    monkeypatch.setattr(compiled, "_build", lambda path, *_: built.append(path))
    monkeypatch.setattr(compiled, "load_library", lambda path: None)
    pass_maker(tell=told.append)("errors", schemes, torch.float32, 10**11)
    assert len(built) == len(told) == 1
    monkeypatch.setenv("MOFQ_COMPILE", "0")
    pass_maker(tell=told.append)("errors", schemes, torch.float32, 10**11)
    assert len(built) == 1


def test_bands_hold_whole_tiles_and_end_in_zeros() -> None:
    schemes = [weight_scheme(name) for name in ("int4.g32", "int4.block24x48", "nf4.g64")]
    assert (band_rows(schemes), strip_columns(schemes)) == (192, 192)
    x_ARJK = to_bands(torch.ones(216, 384), schemes)
    assert x_ARJK.shape == (2, 192, 2, 192)
    assert x_ARJK[1, 24:].count_nonzero() == 0
    assert x_ARJK.count_nonzero() == 216 * 384


@pytest.mark.parametrize(
    "name", [n for n, e in ELEMENT_FORMATS.items() if isinstance(e, CodebookFormat)]
)
def test_a_codebooks_values_are_those_of_its_codes(name: str) -> None:
    element = ELEMENT_FORMATS[name]
    assert isinstance(element, CodebookFormat)
    x = torch.cat([torch.linspace(-1.2, 1.2, 4001), torch.tensor(element.values)])
    assert torch.equal(
        round_to_format(x, element), codebook_values(nearest_code(x, element), element)
    )


@pytest.mark.parametrize(
    "name",
    long_but(
        (n for n in WEIGHT_SCHEMES if is_candidate(weight_scheme(n))),
        *("int8.channel", "int4.g32.asym", "int4.g32@mse", "fp8_e4m3.block32", "nvfp4", "mx6"),
    ),
)
def test_no_division_is_one_that_a_gpu_makes_a_product(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA multiplies by the reciprocal of a plain number, the compiler by that of a constant."""
    monkeypatch.setattr(scale_rules, "_CLIPS", (0.5,))  # a trace repeats all for each candidate
    monkeypatch.setattr(scale_rules, "_STRETCHES", (0.5,))
    scheme = weight_scheme(name)
    x_ARJK = to_bands(trained_like_weight(), [scheme])
    graph = make_fx(deltas_pass([scheme]))(x_ARJK, torch.ones(())).graph
    divisions = [node for node in graph.nodes if node.target is torch.ops.aten.div.Tensor]
    assert divisions or not scheme.has_scale
    for node in divisions:
        divisor = node.args[1]
        assert isinstance(divisor, Node)
        assert divisor.target not in CONSTANTS
    assert not [node for node in graph.nodes if node.target is torch.ops.aten.div.Scalar]


@pytest.mark.long
def test_the_program_for_a_gpu_is_the_reference_in_every_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Made for the CPU, with the search's candidates among its schemes."""
    monkeypatch.setattr(compiled, "_is_cpu", lambda device: False)
    monkeypatch.setenv("MOFQ_COMPILE", "1")
    told: list[str] = []
    schemes = [weight_scheme(name) for name in ("int8.channel.s-f32", "nvfp4@fouroversix")]
    gpu_pass = pass_maker(tell=told.append)("deltas", schemes, torch.float32, 0)
    for block_RI in blocks():
        if block_RI.dtype == torch.float32:  # one band and one strip are no case of their own
            amax = block_RI.abs().max()
            found = gpu_pass(to_bands(block_RI, schemes), amax)
            check("deltas", schemes, block_RI, found)
    assert told == ["Compiling one pass for 2 schemes."]
    with pytest.raises(ValueError, match="compiled for contiguous"):
        gpu_pass(to_bands(block_RI.bfloat16(), schemes), amax)


def test_a_release_of_torch_that_would_give_other_bits_compiles_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "_is_cpu", lambda device: False)
    monkeypatch.setattr(compiled, "_GPU_OPTIONS", {"eager_numerics.not_there": True})
    monkeypatch.setenv("MOFQ_COMPILE", "1")
    told: list[str] = []
    schemes = [weight_scheme("int4.g32")]
    block_RI = trained_like_weight(32, 64)
    found = pass_maker(tell=told.append)("deltas", schemes, torch.float32, 0)
    check("deltas", schemes, block_RI, found(to_bands(block_RI, schemes), torch.ones(())))
    assert told[1].endswith("has no option 'eager_numerics.not_there'.")


def test_a_division_is_not_a_product_with_the_reciprocal() -> None:
    x = torch.arange(1, 10_000, dtype=torch.float32)
    assert torch.equal(divide(x, 7.0).double(), (x.double() / 7).float().double())
    assert not torch.equal(divide(x, 7.0), x * torch.tensor(1 / 7.0))
