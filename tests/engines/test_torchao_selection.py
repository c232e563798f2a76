"""The rules of TorchAO on GPUs against what its ``quantize_`` makes, with a faked capability.

``quantize_`` gets the config that mofq exports, and a layer on the CPU. It checks capability and
shape and makes a tensor; the products, which other checks precede, are not run (``NOT_SHOWN``).
What TorchAO computes on CPUs is run by the tests of its backend.
"""

from __future__ import annotations

import pytest
import torch
from test_engines_parallel import group
from torch import nn
from torchao.quantization import quantize_

from mofq.delivery.export.torchao_config import layer_config
from mofq.engines import ENGINES, find_engine, legality, matching_rule
from mofq.numbers.schemes import parse_scheme

SCHEMES = (
    "int8.channel+int8.token",
    "int8.channel",
    "int8.g32",
    "int4.g32",
    "int4.g64.asym",
    "int3.channel",
    "fp8_e4m3.channel+fp8_e4m3.token",
    "fp8_e4m3.channel",
    "nvfp4",
    "mxfp4+mxfp4",
    "mxfp8+mxfp8",
)
#: [outputs, inputs]: the second is divisible by 4 alone.
SHAPES = ((128, 128), (132, 128))
#: Refusals of the products, which quantizing a weight does not meet -> words of the reason.
NOT_SHOWN = {
    "int8.channel+int8.token": "torch._int_mm",
    "mxfp4+mxfp4": "need compute capability 10.0",
    "mxfp8+mxfp8": "need compute capability 10.0",
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "engine",
    [name for name, engine in ENGINES.items() if engine.reads == "torchao" and engine.capability],
)
def test_a_served_scheme_becomes_the_class_that_its_rule_names(
    monkeypatch: pytest.MonkeyPatch, engine: str, scheme: str, shape: tuple[int, int]
) -> None:
    capability = find_engine(engine).capability
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    layers = group("layers.0.mlp.down", down_proj=shape)
    reason = legality(engine)(parse_scheme(scheme), layers)
    rule = matching_rule(find_engine(engine), parse_scheme(scheme), layers)
    assert rule is not None
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16))
    config = layer_config(parse_scheme(scheme))
    try:
        quantize_(model, config)
    except (AssertionError, RuntimeError) as stopped:
        made = str(stopped)
    else:
        made = type(model[0].weight.data).__name__
    if reason is None:
        assert made == rule.kernel.partition(", ")[0]
    elif scheme in NOT_SHOWN and NOT_SHOWN[scheme] in reason:
        assert made.endswith("Tensor")
    else:
        assert not made.endswith("Tensor") or made == "Tensor", reason
