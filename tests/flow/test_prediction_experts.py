"""The sensitivity in nats of a mixture of experts, with the choice of experts held as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import calibrate_folder, some_tokens
from conftest import TinyCheckpoint
from emulated import recipe_of
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from mofq.delivery.apply import emulate
from mofq.evidence.measure.fill_table import Work, measure_groups
from mofq.evidence.metrics import kl_divergence
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.loading import load_model
from mofq.numbers.schemes import parse_scheme

TOKENS = some_tokens(12, 64)
GROUPS = ("layers.0.attn.qkv", "layers.0.attn.o", "layers.0.moe.experts", "layers.1.attn.o")
#: The ratios are 0.95 to 1.05; of the errors before a router, with tokens free, they are not.
TOLERANCE = 0.15


class Held:
    """A router that sends tokens where it sent them first, weighed by their new probabilities."""

    def __init__(self, router: Any) -> None:
        self.router = router
        self.chosen: list[Tensor] = []
        self.calls = 0

    def __call__(self, hidden_TI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = functional.linear(hidden_TI, self.router.weight)
        if self.calls == len(self.chosen):
            self.chosen.append(logits_TE.topk(self.router.top_k).indices)
        index_TK = self.chosen[self.calls]
        self.calls += 1
        return logits_TE, logits_TE.gather(1, index_TK).softmax(-1), index_TK


def run(model: PreTrainedModel, held: list[Held]) -> Tensor:
    for name, one in zip(("0", "1"), held, strict=True):
        router: Any = model.get_submodule(f"model.layers.{name}.mlp.gate")
        router.forward, one.router, one.calls = one, router, 0
    with torch.inference_mode():
        return torch.cat([model(token_T[None]).logits[0] for token_T in TOKENS])


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["int4.channel", "bf16+int6.token"])
def test_rows_of_a_mixture_are_its_divergence_where_tokens_stay_with_their_experts(
    scheme: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = tiny("mixtral")
    checkpoint = open_checkpoint(str(folder))
    groups = [group for group in find_layers(checkpoint).groups if group.name in GROUPS]
    stats = calibrate_folder(folder, tmp_path, {"a": TOKENS}, draws=4)
    work = [Work(group, [parse_scheme(scheme)], ("a",)) for group in groups]
    held = [Held(None), Held(None)]
    original = run(load_model(folder), held)
    for group, found in zip(groups, measure_groups(checkpoint, work, stats=stats), strict=True):
        (row,) = (one for one in found.rows if one.unit == "kl_nats_per_token")
        model = load_model(folder)
        recipe = recipe_of(checkpoint, "bf16", **{group.name.replace(".", "_"): scheme})
        emulate.apply(model, recipe, checkpoint=checkpoint)
        measured = float(kl_divergence(original, run(model, held)).mean())
        assert row.error == pytest.approx(measured, rel=TOLERANCE), group.name
