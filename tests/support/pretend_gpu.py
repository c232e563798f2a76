"""A GPU that is not there: tensors that say they are on it, hold numbers of the CPU, and mind.

What CUDA does otherwise than the CPU is done here too, so that a test without a GPU fails where
one with it would: tensors of two devices do not meet, a division by a plain number is a product
with its rounded reciprocal, and a copy to the host that is not waited for holds no numbers yet.
What a host waits for is noted; of a copy to the GPU that is all but those from pinned memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

import pytest
import torch
from torch import Tensor, autograd
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mofq.evidence.measure import schedule, worker_threads
from mofq.model.streaming import weights, writer

GPU = torch.device("cuda:0")
_aten = torch.ops.aten
#: Their operands may be on two devices.
_COPIES = (_aten.copy_.default, _aten._to_copy.default)
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default)
#: Torch makes numbers for them where it holds a tensor to be.
_OF_WHAT_IS_HELD = (functional.one_hot, Tensor.quantile)
#: Divisions by a plain number, and what CUDA does in their place.
_PRODUCTS = {
    _aten.div.Tensor: _aten.mul.Tensor,
    _aten.div.Scalar: _aten.mul.Tensor,
    _aten.div_.Tensor: _aten.mul_.Tensor,
    _aten.div_.Scalar: _aten.mul_.Tensor,
}
#: Autograd's own calls of these name the device.
_LIKE = (_aten._to_copy.default, _aten.new_zeros.default)
#: What they give, or its shape, is known when the device is done.
_WAITING = (
    *(_aten._local_scalar_dense.default, _aten.equal.default, _aten.nonzero.default),
    *(_aten.masked_select.default, _aten._unique2.default, _aten.bincount.default),
)
_FREE_BYTES = 2**36


@dataclass(frozen=True, slots=True, eq=False)
class _Copy:
    """On its way to the host."""

    target: Tensor
    source: Tensor


@dataclass(slots=True)
class Gpu:
    """What was asked of the GPU that is not there."""

    #: What the host waited for the device for: operators, and copies as ``to cpu``, ``to cuda``.
    waits: list[str] = field(default_factory=list)
    to_host_bytes: int = 0
    to_device_bytes: int = 0
    free_bytes: int = _FREE_BYTES
    reserved_bytes: int = 0  #: that torch holds; none is any tensor's
    pending: list[_Copy] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)  #: of these: threads wait for them too

    def synchronize(self, device: Any = None) -> None:
        """Have all copies done."""
        self.complete(self.under_way())

    def under_way(self) -> list[_Copy]:
        """The copies that have begun and are not done."""
        with self.lock:
            return list(self.pending)

    def complete(self, copies: Iterable[_Copy]) -> None:
        """Have some copies done, if they are not."""
        with self.lock, torch._C._DisableTorchDispatch():
            for copy in copies:
                if copy in self.pending:
                    copy.target.copy_(copy.source)
                    self.pending.remove(copy)

    def to_host(self, held: Tensor, *, is_waited_for: bool) -> Tensor:
        """A copy on the host, which holds zeros until it is waited for."""
        self.to_host_bytes += held.nbytes
        if is_waited_for:
            self.waits.append("to cpu")
            return held.clone()
        found = torch.zeros_like(held)
        with self.lock:
            self.pending.append(_Copy(found, held.clone()))
        return found

    def to_device(self, held: Tensor, *, is_waited_for: bool) -> Tensor:
        """What is held of a copy on the device."""
        self.to_device_bytes += held.nbytes
        if is_waited_for:
            self.waits.append("to cuda")
        return held.detach().clone()


#: That of the context which is entered.
_here: list[Gpu] = []


class _Stream:
    """A queue of the GPU: all that is awaited is all there is."""

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def synchronize(self) -> None:
        _here[-1].synchronize()

    def wait_event(self, event: Any) -> None:
        """On the device, in order."""

    wait_stream = wait_event

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        """The one before is current again."""


class _Event:
    """A place in a queue: what began before it is awaited, and nothing else."""

    def __init__(self) -> None:
        self.copies: list[_Copy] = []

    def record(self, stream: Any = None) -> None:
        self.copies = _here[-1].under_way()

    def synchronize(self) -> None:
        _here[-1].complete(self.copies)


class OnGpu(Tensor):
    """A tensor on the GPU that is not there."""

    held: Tensor  #: its numbers

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device="cpu"
        )
        made.held = held
        return made

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cuda(self) -> bool:
        return True

    def record_stream(self, stream: Any) -> None:
        """The memory is used there too."""

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_on_gpu(func, args, kwargs or {})


def run_on_gpu(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator, on the device that its operands and its arguments say."""
    target = torch.device(kwargs.get("device") or "cpu")
    kwargs.pop("pin_memory", None)
    operands: list[Tensor] = []
    tree_map_only(Tensor, operands.append, (args, kwargs))
    is_on_gpu = [isinstance(one, OnGpu) for one in operands]
    if func not in _COPIES and any(is_on_gpu):
        # Numbers without a dimension, and places in a tensor, may be the CPU's.
        here = args[:1] if func in _INDEXING else operands
        strangers = [t for t in here if not isinstance(t, OnGpu) and t.ndim]
        if strangers or not is_on_gpu[0]:
            raise RuntimeError(f"{func}: expected all tensors to be on {GPU}, found some on cpu")
    if func in _PRODUCTS and any(is_on_gpu) and (factors := _as_product(*args)) is not None:
        func, args = _PRODUCTS[func], factors
    if any(is_on_gpu) and (func in _WAITING or _looks_for_places(func, args)):
        _here[-1].waits.append(func.name().removeprefix("aten::").partition(".")[0])
    inner = partial(tree_map_only, OnGpu, lambda one: one.held)
    own = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs
    found = func(*inner(args), **inner(own))
    if func._schema.is_mutable and operands:
        return operands[0]
    goes_there = target.type == "cuda" if kwargs.get("device") else any(is_on_gpu)
    if func in _LIKE and is_on_gpu[0]:
        # To another device a tensor goes by `_Moves`. Here autograd asks for a gradient of the
        # dtype that a tensor had, on the device that torch holds it to be on.
        goes_there = True
    return tree_map_only(Tensor, OnGpu, found) if goes_there else found


def _looks_for_places(func: Any, args: Any) -> bool:
    """Whether places are given by where something is true."""
    if func not in _INDEXING:
        return False
    return any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1])


def _as_product(x: Any, by: Any) -> tuple[Tensor, float] | None:
    """Factors, or None where a division stays one."""
    is_plain = not isinstance(by, Tensor) or (not isinstance(by, OnGpu) and by.ndim == 0)
    if not is_plain or not x.dtype.is_floating_point:
        return None
    one = torch.ones((), dtype=torch.promote_types(x.dtype, torch.float32))
    return x, float(one / float(by))


class _Devices(TorchDispatchMode):
    """Sends what names the GPU there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_on_gpu(func, args, kwargs or {})


class _Moves(TorchFunctionMode):
    """Moves tensors there, which torch without CUDA refuses before a mode sees an operator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.tolist, Tensor.numpy) and isinstance(args[0], OnGpu):
            if func is Tensor.numpy:
                raise TypeError("can't convert a tensor of the GPU to numpy")
            _here[-1].waits.append("tolist")
            return args[0].held.tolist()
        if func in _OF_WHAT_IS_HELD and isinstance(args[0], OnGpu):
            return OnGpu(func(args[0].held, *args[1:], **kwargs))
        if func is Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.is_in_pinned_memory = True
            return pinned
        if func is Tensor.cpu:
            func, args = Tensor.to, (args[0], "cpu")
        if func is not Tensor.to:
            return func(*args, **kwargs)
        x, *rest = args
        for like in [one for one in rest if isinstance(one, Tensor)]:
            rest = [like.device, like.dtype, *(one for one in rest if one is not like)]
        named = [kwargs.pop("device", None), *rest]
        devices = [d for d in named if isinstance(d, str | torch.device)]
        others = [one for one in rest if isinstance(one, torch.dtype)]
        is_waited_for = not kwargs.pop("non_blocking", False)
        if not devices:
            return func(x, *rest, **kwargs)
        is_there = torch.device(devices[0]).type == "cuda"
        if isinstance(x, OnGpu) == is_there:
            return func(x, *others, **kwargs) if others or kwargs else x
        if isinstance(x, OnGpu):  # in the dtype that it has there
            x = func(x, *others, **kwargs) if others or kwargs else x
            return _Move.apply(x, is_waited_for)
        is_pinned = getattr(x, "is_in_pinned_memory", False)
        moved = _Move.apply(x, is_waited_for or not is_pinned)
        return func(moved, *others, **kwargs) if others or kwargs else moved


class _Move(torch.autograd.Function):
    """To the other device, and its gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, is_waited_for: bool) -> Tensor:
        if isinstance(x, OnGpu):
            return _here[-1].to_host(x.held, is_waited_for=is_waited_for)
        return OnGpu(_here[-1].to_device(x, is_waited_for=is_waited_for))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Move.apply(grad, True), None


@contextmanager
def pretend_gpu() -> Iterator[Gpu]:
    """Have a GPU of compute capability 9.0 as long as the context lasts."""
    gpu = Gpu()
    with torch.device("cpu"):  # torch looks up once what makes tensors: before it is replaced here
        torch.empty(0)
    with pytest.MonkeyPatch.context() as patch, _Devices(), _Moves():
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch.cuda, "synchronize", gpu.synchronize)
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (gpu.free_bytes, _FREE_BYTES))
        patch.setattr(torch.cuda, "memory_reserved", lambda device=None: gpu.reserved_bytes)
        patch.setattr(torch.cuda, "memory_allocated", lambda device=None: 0)
        patch.setattr(torch.cuda, "Event", _Event)
        for name in ("Stream", "current_stream"):
            patch.setattr(torch.cuda, name, _Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: stream)
        for name in ("tensor", "as_tensor"):  # which set the device before any mode sees it
            patch.setattr(torch, name, partial(_made_there, getattr(torch, name)))
        for module in (schedule, worker_threads, weights, writer):
            patch.setattr(
                module, "ThreadPoolExecutor", partial(ThreadPoolExecutor, initializer=_enter)
            )
        patch.setattr(
            autograd, "_engine_run_backward", partial(_run_backward, autograd._engine_run_backward)
        )
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        _here.append(gpu)
        try:
            yield gpu
        finally:
            _here.remove(gpu)
            torch.__future__.set_overwrite_module_params_on_conversion(before)


def _enter() -> None:
    """A thread has modes of its own."""
    _Devices().__enter__()
    _Moves().__enter__()


def _run_backward(run: Any, *args: Any, **kwargs: Any) -> Any:
    """Autograd has left the mode when it comes to the hooks."""
    with _Moves():
        return run(*args, **kwargs)


def _made_there(make: Any, values: Any, *, device: Any = None, **options: Any) -> Tensor:
    made = values if isinstance(values, OnGpu) else make(values, **options)
    if "dtype" in options:
        made = made.to(options["dtype"])
    return made if device is None else made.to(device)
