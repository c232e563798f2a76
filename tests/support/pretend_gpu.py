"""A GPU that is not there: tensors that say they are on it, hold numbers of the CPU, and mind.

What CUDA does otherwise than the CPU is done here too, so that a test without a GPU fails where
one with it would: tensors of two devices do not meet, and a division by a plain number is a
product with its rounded reciprocal.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mofq.evidence.measure import schedule, workers

GPU = torch.device("cuda:0")
_aten = torch.ops.aten
#: Their operands may be on two devices.
_COPIES = (_aten.copy_.default, _aten._to_copy.default)
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default)


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

    def __repr__(self, **_: Any) -> str:
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_on_gpu(func, args, kwargs or {})


def run_on_gpu(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator, on the device that its operands and its arguments say."""
    target = torch.device(kwargs.get("device") or "cpu")
    operands: list[Tensor] = []
    tree_map_only(Tensor, operands.append, (args, kwargs))
    is_on_gpu = [isinstance(one, OnGpu) for one in operands]
    if func not in _COPIES and any(is_on_gpu):
        # Numbers without a dimension, and places in a tensor, may be the CPU's.
        here = args[:1] if func in _INDEXING else operands
        strangers = [t for t in here if not isinstance(t, OnGpu) and t.ndim]
        if strangers or not is_on_gpu[0]:
            raise RuntimeError(f"{func}: expected all tensors to be on {GPU}, found some on cpu")
    if func in (_aten.div.Tensor, _aten.div.Scalar, _aten.div_.Tensor) and any(is_on_gpu):
        args = _as_product(*args)
        func = _aten.mul_.Tensor if func is _aten.div_.Tensor else _aten.mul.Tensor
        if args[1] is None:
            func, args = _aten.div.Tensor, args[:1] + args[2:]
    inner = partial(tree_map_only, OnGpu, lambda one: one.held)
    own = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs
    found = func(*inner(args), **inner(own))
    if func._schema.is_mutable and operands:
        return operands[0]
    goes_there = target.type == "cuda" if kwargs.get("device") else any(is_on_gpu)
    return tree_map_only(Tensor, OnGpu, found) if goes_there else found


def _as_product(x: Any, by: Any) -> tuple[Any, ...]:
    """Factors, or (x, None, by) where the division stays one."""
    is_plain = not isinstance(by, Tensor) or (not isinstance(by, OnGpu) and by.ndim == 0)
    if not is_plain or not x.dtype.is_floating_point:
        return x, None, by
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
            return args[0].held.tolist()
        if func is Tensor.cpu:
            func, args = Tensor.to, (args[0], "cpu")
        if func is not Tensor.to:
            return func(*args, **kwargs)
        x, *rest = args
        named = [kwargs.pop("device", None), *rest]
        devices = [d for d in named if isinstance(d, str | torch.device)]
        others = [one for one in rest if isinstance(one, torch.dtype)]
        kwargs.pop("non_blocking", None)
        if not devices:
            return func(x, *rest, **kwargs)
        is_there = torch.device(devices[0]).type == "cuda"
        if isinstance(x, OnGpu) == is_there:
            return func(x, *others, **kwargs) if others or kwargs else x
        moved = _Move.apply(x)
        return func(moved, *others, **kwargs) if others or kwargs else moved


class _Move(torch.autograd.Function):
    """To the other device, and its gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.held.clone() if isinstance(x, OnGpu) else OnGpu(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Move.apply(grad)


@contextmanager
def pretend_gpu() -> Iterator[None]:
    """Have a GPU of compute capability 9.0 as long as the context lasts."""
    with pytest.MonkeyPatch.context() as patch, _Devices(), _Moves():
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        for name in ("tensor", "as_tensor"):  # which set the device before any mode sees it
            patch.setattr(torch, name, partial(_made_there, getattr(torch, name)))
        for module in (schedule, workers):
            patch.setattr(
                module, "ThreadPoolExecutor", partial(ThreadPoolExecutor, initializer=_enter)
            )
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)


def _enter() -> None:
    """A thread has modes of its own."""
    _Devices().__enter__()
    _Moves().__enter__()


def _made_there(make: Any, values: Any, *, device: Any = None, **options: Any) -> Tensor:
    made = values if isinstance(values, OnGpu) else make(values, **options)
    if "dtype" in options:
        made = made.to(options["dtype"])
    return made if device is None else made.to(device)
