"""The GPU that is not there minds what one minds that is."""

from __future__ import annotations

import pytest
import torch
from pretend_gpu import OnGpu, pretend_gpu
from torch.utils._device import _device_constructors


def test_tensors_of_two_devices_do_not_meet() -> None:
    with pretend_gpu(), pytest.raises(RuntimeError, match="expected all tensors to be on cuda"):
        torch.ones(2).to("cuda") + torch.ones(2)


def test_what_is_divided_in_place_by_a_tensor_is_divided() -> None:
    with pretend_gpu():
        x = torch.full((2,), 6.0).to("cuda")
        x /= torch.full((2,), 2.0).to("cuda")
        assert x.tolist() == [3.0, 3.0]


def test_a_division_by_a_plain_number_is_a_product_with_its_reciprocal() -> None:
    x = torch.arange(1.0, 100.0)
    with pretend_gpu():
        found = (x.to("cuda") / 10).cpu()
    assert torch.equal(found, x * float(torch.ones(()) / 10))
    assert not torch.equal(found, x / 10)


def test_the_gradient_of_a_cast_and_what_hooks_make_of_it_stay_where_they_are() -> None:
    seen = []
    with pretend_gpu() as gpu:
        x = torch.ones(3).to("cuda").requires_grad_(True)
        y = x.bfloat16()
        y.register_hook(lambda grad: seen.append(grad.to(device="cpu", dtype=torch.float32)))
        y.float().sum().backward()
        assert isinstance(x.grad, OnGpu)
        assert not isinstance(seen[0], OnGpu)
        assert gpu.waits == ["to cuda", "to cpu"]


def test_a_copy_to_the_host_holds_nothing_until_it_is_waited_for() -> None:
    with pretend_gpu() as gpu:
        found = torch.ones(3).to("cuda").to("cpu", non_blocking=True)
        assert found.tolist() == [0.0] * 3
        torch.cuda.current_stream().synchronize()
        assert found.tolist() == [1.0] * 3
        assert gpu.to_host_bytes == found.nbytes


def test_an_event_is_behind_what_began_before_it_alone() -> None:
    with pretend_gpu():
        before = torch.ones(3).to("cuda").to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        behind = torch.ones(3).to("cuda").to("cpu", non_blocking=True)
        event.synchronize()
        assert before.tolist() == [1.0] * 3
        assert behind.tolist() == [0.0] * 3


def test_tensors_without_numbers_are_made_behind_it_as_before() -> None:
    _device_constructors.cache_clear()
    with pretend_gpu(), torch.device("meta"):
        torch.empty(1)
    with torch.device("meta"):
        assert torch.tensor([1.0]).is_meta


def test_what_the_host_waits_for_is_noted() -> None:
    with pretend_gpu() as gpu:
        torch.ones(3).to("cuda", non_blocking=True)
        assert gpu.waits == ["to cuda"]
        gpu.waits.clear()
        x = torch.ones(3).pin_memory().to("cuda", non_blocking=True)
        assert gpu.waits == []
        float(x.sum())
        x[x > 0]
        x.nonzero()
        assert gpu.waits == ["_local_scalar_dense", "index", "nonzero"]
