"""The rules of the engine ``transformers`` against transformers itself, which runs exports."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import TinyCheckpoint
from exported import export, uniform_recipe
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from mofq.delivery.backends import apply_recipe
from mofq.engines import find_engine, format_name, legality
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.loading import load_model
from mofq.numbers.schemes import parse_scheme

#: One scheme at least for each rule and each word of it.
SCHEMES = (
    "int8.channel+int8.token",
    "int8.channel.s-f32+int8.token",
    "int8.tensor+int8.token",
    "int8.channel+int8.tensor",
    "int8.channel",
    "int8.g32",
    "int4.channel",
    "int4.g64.s-f32",
    "int4.g64.asym",
    "int8.channel.asym",
    "fp8_e4m3.channel",
    "fp8_e4m3.tensor",
    "fp8_e4m3.channel+fp8_e4m3.token",
    "fp8_e4m3.block128",
    "fp8_e4m3.block128.s-f32+fp8_e4m3.g128",
    "nvfp4",
    "mxfp4",
)


@pytest.mark.long
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_is_served_if_and_only_if_transformers_computes_what_was_measured(
    tiny: TinyCheckpoint, tmp_path: Path, scheme: str
) -> None:
    folder = tiny("llama", num_key_value_heads=4)  # every layer has whole blocks of 128
    checkpoint = open_checkpoint(str(folder))
    recipe = uniform_recipe(checkpoint, scheme)
    export(folder, recipe, tmp_path / "out")
    check = legality("transformers")
    if any(check(parse_scheme(scheme), group) for group in find_layers(checkpoint).groups):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        return
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    emulated = apply_recipe(load_model(folder), recipe)
    tokens = torch.arange(40).reshape(2, 20) * 5 % 256
    with torch.inference_mode():
        found, expected = model(tokens).logits.float(), emulated(tokens).logits
    # Inputs are rounded in bfloat16, where some fall on the other side of a code.
    assert (found - expected).norm() < 2**-3 * expected.norm()
    for layer in find_layers(checkpoint).grouped_layers:  # decompressed by the forward pass
        theirs = model.get_submodule(layer.name).weight.float()
        assert_close(theirs, emulated.get_submodule(layer.name).weight, rtol=2**-7, atol=0)


def test_every_rule_is_met_by_a_scheme_that_is_run() -> None:
    names = [format_name(parse_scheme(scheme)) for scheme in SCHEMES]
    rules = [rule for rule in find_engine("transformers").rules if rule.layers != "experts"]
    assert all(any(re.fullmatch(rule.schemes, name) for name in names) for rule in rules)
