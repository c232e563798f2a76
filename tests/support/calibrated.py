"""Small calibrations that several tests share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from mofq.evidence.calibration.calibrate import calibrate, sample_scores, score_seed
from mofq.evidence.calibration.stats import CorpusPlan, Plan, Stats
from mofq.evidence.spaces import SearchSpace, parse_search_space
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.layers import find_layers, included_groups
from mofq.model.loading import load_model


def some_tokens(sequences: int, length: int, *, seed: int = 0, vocabulary: int = 256) -> Tensor:
    """Random tokens, [sequences, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (sequences, length), generator=generator)


def plan_of(model_folder: Path, corpora: Mapping[str, Tensor], **changes: Any) -> Plan:
    """A plan that fits windows of tokens: one draw, seed 0, float32."""
    checkpoint = open_checkpoint(str(model_folder))
    values: dict[str, Any] = {
        "model_name": checkpoint.name,
        "index_sha256": checkpoint.index_sha256,
        "seed": 0,
        "sequence_length": next(iter(corpora.values())).shape[1],
        "draws": 1,
        "dtype": "float32",
        "corpora": tuple(
            CorpusPlan(name, f"{name}.txt", hashlib.sha256(name.encode()).hexdigest(), len(tokens))
            for name, tokens in corpora.items()
        ),
    }
    return Plan(**{**values, **changes})


def keeping(kept: int | None, corpus: CorpusPlan) -> CorpusPlan:
    """A corpus of which the samples of so many sequences are kept; of a shorter one, of all."""
    return replace(corpus, kept=kept if kept is not None and kept < corpus.sequences else None)


def calibrate_folder(
    model_folder: Path,
    out: Path,
    corpora: Mapping[str, Tensor],
    *,
    model: PreTrainedModel | None = None,
    kept: int | None = None,
    **changes: Any,
) -> Stats:
    """Calibrate a checkpoint on windows of tokens; ``changes`` go to the plan."""
    plan = plan_of(model_folder, corpora, **changes)
    plan = replace(plan, corpora=tuple(keeping(kept, one) for one in plan.corpora))
    return calibrate(
        model or load_model(model_folder, dtype=plan.dtype),
        find_layers(open_checkpoint(str(model_folder)), **included_groups(plan.vocabulary or ())),
        plan=plan,
        windows=corpora,
        folder=out,
    )


def read_sequence(stats: Stats, index: int = 0, corpus: str = "a") -> dict[str, Tensor]:
    """Every tensor of one sequence, read with safetensors alone."""
    with safe_open(stats.sequence_files(corpus)[index], "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def space_of(*schemes: str, **keys: Any) -> SearchSpace:
    """A search space of some schemes, and bf16."""
    lines = ["version: 1", f"schemes: [{', '.join(schemes)}]"]
    lines += [f"{key}: {str(value).lower()}" for key, value in keys.items()]
    return parse_search_space("\n".join(lines), name="test", where="test")


def scored_loss(logits_TV: Tensor, score_TV: Tensor) -> Tensor:
    """A loss whose gradient with respect to the logits is the scores."""
    return (logits_TV * score_TV).sum()


def scores_of(logits_TV: Tensor, *, sequence: int, seed: int = 0, draw: int = 0) -> Tensor:
    """The scores that calibration on corpus ``a`` samples."""
    return sample_scores(logits_TV.detach(), seed=score_seed(seed, "a", sequence, draw))
