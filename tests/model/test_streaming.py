"""A model that is run unit by unit computes what it computes in memory, bit for bit."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from threading import Thread

import pytest
import torch
from calibrated import some_tokens
from conftest import TinyCheckpoint
from families import TINY_FAMILIES, copy_with_tensors, long_but
from tiny_types import write_type
from torch import nn

from mofq.demo import demo_model_folder
from mofq.exceptions import CheckpointError, StreamingError
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.loading import load_model
from mofq.model.streaming.execution import choose_execution, free_bytes, model_bytes
from mofq.model.streaming.replay import StreamedSequence
from mofq.model.streaming.streamed import open_streamed
from mofq.model.streaming.weights import (
    give_back_freed_memory,
    has_values,
    open_unit_weights,
)

TOKENS = some_tokens(2, 24, vocabulary=200)
#: Types that share keys, feed embeddings to every layer, mix kinds of layers, or run one twice.
ODD_TYPES = ("gemma3n_text", "gemma4_text", "zamba2", "ctrl", "roc_bert", "mamba2", "qwen3_next")


def streamed_logits(folder: Path, work: Path, dtype: str = "float32") -> list[torch.Tensor]:
    sequences = [StreamedSequence(token_T, work / str(n)) for n, token_T in enumerate(TOKENS)]
    for sequence in sequences:
        sequence.folder.mkdir(parents=True)
    with open_streamed(folder, dtype=dtype) as streamed:
        head = streamed.forward(sequences)
        with streamed.weights.loaded(streamed.head):
            return [streamed.logits(sequence, head) for sequence in sequences]


def assert_same_logits(folder: Path, work: Path, dtype: str = "float32") -> None:
    model = load_model(folder, dtype=dtype)
    with torch.no_grad():
        resident = [model(token_T[None]).logits[0] for token_T in TOKENS]
    for ours, theirs in zip(streamed_logits(folder, work, dtype), resident, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", long_but(TINY_FAMILIES, "llama", "gemma3", "qwen3_moe"))
def test_a_family_has_the_same_logits_streamed(
    family: str, tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    assert_same_logits(tiny(family), tmp_path)


@pytest.mark.parametrize("name", long_but(ODD_TYPES, "gemma4_text", "zamba2"))
def test_a_type_without_rules_has_the_same_logits_streamed(name: str, tmp_path: Path) -> None:
    assert_same_logits(write_type(name, tmp_path / "model"), tmp_path / "work")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bundled_model_has_the_same_logits_streamed(dtype: str, tmp_path: Path) -> None:
    assert_same_logits(demo_model_folder(), tmp_path, dtype)


def with_head(folder: Path, out: Path, *, plus: float) -> Path:
    """A tied model whose checkpoint has the head too, the embedding plus something."""

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + plus

    return copy_with_tensors(folder, out, add)


def test_a_copy_of_a_tied_head_is_the_embedding_streamed_too(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    tied = tiny("llama", tie_word_embeddings=True)
    assert_same_logits(with_head(tied, tmp_path / "model", plus=0), tmp_path / "work")


def test_another_tied_head_is_refused_streamed_too(tiny: TinyCheckpoint, tmp_path: Path) -> None:
    tied = tiny("llama", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="engines differ in which they use"):
        streamed_logits(with_head(tied, tmp_path / "model", plus=1), tmp_path / "work")


def test_weights_are_in_memory_for_one_unit_at_a_time(tiny_llama: Path) -> None:
    with open_streamed(tiny_llama) as streamed:
        whole = load_model(tiny_llama).state_dict()
        for unit in streamed.weights.units:
            with streamed.weights.loaded(unit):
                state = streamed.model.state_dict()
                assert {n for n in state if has_values(state[n])} == {
                    name for name in state if name.startswith((f"{unit}.", "model.norm."))
                }
                for name, value in state.items():
                    assert not has_values(value) or torch.equal(value, whole[name])


def test_nothing_is_read_beside_a_vocabulary_that_is_larger_than_layers(tiny_llama: Path) -> None:
    with open_unit_weights(tiny_llama) as weights:
        embedding, first, second = list(weights.units)[:3]
        for factor, read in ((1, True), (2, False)):
            layer = weights.bytes[first]
            weights.bytes = {**weights.bytes, embedding: factor * layer, weights.head: layer}
            with weights.loaded(embedding, ahead=first):
                assert (first in weights._ahead) == read
            with weights.loaded(second, ahead=embedding):
                assert (embedding in weights._ahead) == read
            with weights.loaded(first, ahead=second):
                assert second in weights._ahead


def test_a_model_that_fits_is_run_whole_and_a_larger_one_layer_by_layer(tiny_llama: Path) -> None:
    checkpoint = open_checkpoint(str(tiny_llama))
    needed = model_bytes(checkpoint, "float32")
    assert needed == 4 * sum(one.numel() for one in load_model(tiny_llama).parameters())
    free = free_bytes("cpu")
    assert free is not None
    assert free > needed
    for more, is_streamed in ((0, False), (free, True)):
        chosen = choose_execution(
            "auto", checkpoint, dtype="float32", device="cpu", more_bytes=more
        )
        assert chosen.is_streamed is is_streamed
        assert (chosen.remark is not None) is is_streamed


def test_a_layer_that_returns_an_object_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    def forward(self: nn.Module, hidden: torch.Tensor, **_: object) -> object:
        return object()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward", forward)
        with pytest.raises(StreamingError, match=r"layers.0 returns an object of class object"):
            streamed_logits(tiny_llama, tmp_path)


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="a C library that has no heaps to trim"
)
def test_what_other_threads_freed_is_given_back() -> None:
    """As transformers' loader reads experts: tensors of 8 MB, each before one that stays."""
    kept: list[torch.Tensor] = []

    def read() -> None:
        experts = []
        for _ in range(12):
            experts.append(torch.ones(2**21))
            kept.append(torch.ones(8))

    torch.ones(2**22).sum()  # is freed: from here on glibc has such tensors in its heaps
    threads = [Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    freed = _anonymous_megabytes()
    give_back_freed_memory()
    assert freed - _anonymous_megabytes() > 200
    assert len(kept) == 36


def _anonymous_megabytes() -> float:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1e3
