"""The inferred structure, against the rules of the families that have some, and against models."""

from __future__ import annotations

import pytest
from conftest import TinyCheckpoint
from families import TINY_FAMILIES, long_but

from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers, find_loaded_weight
from mofq.model.layers.infer_layers import infer_layers


@pytest.mark.parametrize(
    "family", long_but(TINY_FAMILIES, "llama", "gemma3", "gpt2", "opt", "mixtral", "deepseek_v3")
)
@pytest.mark.parametrize("fused", [False, True], ids=["hub", "fused"])
def test_what_is_inferred_of_a_family_with_rules_is_what_the_rules_say(
    tiny: TinyCheckpoint, family: str, fused: bool
) -> None:
    checkpoint = open_checkpoint(str(tiny(family, fused=fused)))
    ruled, inferred = find_layers(checkpoint), infer_layers(checkpoint)
    assert [group.name for group in inferred.groups] == [group.name for group in ruled.groups]
    for one, other in zip(inferred.grouped_layers, ruled.grouped_layers, strict=True):
        assert one.loaded == find_loaded_weight(other, family), one.name
        assert {
            field: getattr(one, field) for field in one.__dataclass_fields__ if field != "loaded"
        } == {
            field: getattr(other, field)
            for field in other.__dataclass_fields__
            if field != "loaded"
        }
    assert inferred.tied_lm_head == ruled.tied_lm_head
    assert inferred.other_bytes == ruled.other_bytes
