from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import refused
from conftest import TinyCheckpoint
from families import TINY_FAMILIES
from transformers import DynamicCache

from mofq.decision.recipe import Recipe, RecipeCache
from mofq.delivery.apply.kv_cache import apply_caches
from mofq.evidence.calibration.capture import capture_layers
from mofq.evidence.measure.kv_cache import _head_amax
from mofq.exceptions import SchemeError
from mofq.model.attention import pass_cache
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.model.kv_schemes import (
    cache_bits,
    cache_rejection,
    parse_cache_scheme,
    part_amax,
    static_keys,
)
from mofq.model.layers import PARTS, CacheLayer, find_layers, find_loaded_module
from mofq.model.loading import load_model
from mofq.numbers.quantize import fake_quantize_cache
from mofq.numbers.schemes import parse_scheme

CACHE = CacheLayer("layers.0.attn.kv_cache", "model.layers.0.self_attn", 2, 32, 0)


@pytest.mark.parametrize(
    ("name", "canonical", "bits", "scales"),
    [
        ("fp8_e4m3.tensor", "kv:fp8_e4m3.tensor", 8.0, ("k", "v")),
        ("kv:fp8_e4m3.unscaled", "kv:fp8_e4m3.unscaled", 8.0, ()),
        ("int8.head", "kv:int8.head", 8.0, ("k.0", "k.1", "v.0", "v.1")),
        ("int8.token", "kv:int8.token", 8.5, ()),  # 32 bits for 64 channels
        ("int8.token_head", "kv:int8.token_head", 9.0, ()),  # 32 bits for 32 channels
        ("int4.token_head.s-bf16", "kv:int4.token_head.s-bf16", 4.5, ()),
        ("int4.token_head.asym.s-bf16", "kv:int4.token_head.asym.s-bf16", 4.625, ()),
        ("int8.head/int4.g16.s-bf16", "kv:int8.head/int4.g16.s-bf16", 6.5, ("k.0", "k.1")),
        ("bf16/int8.tensor", "kv:bf16/int8.tensor", 12.0, ("v",)),
        ("int8.head/int8.head", "kv:int8.head", 8.0, ("k.0", "k.1", "v.0", "v.1")),
        ("mxfp8", "kv:mxfp8", 8.25, ()),
        # The zero point lies in the scale of 32 bits for 32 channels.
        ("int4.token_head.asym.rht", "kv:int4.token_head.asym.rht", 5.0, ()),
        ("nvfp4", "kv:nvfp4", 4.5, ("k", "v")),
        ("nvfp4.unscaled", "kv:nvfp4.unscaled", 4.5, ()),
        ("nvfp4.unscaled@fouroversix", "kv:nvfp4.unscaled@fouroversix", 4.5, ()),
        ("bf16", "bf16", 16.0, ()),
    ],
)
def test_a_name_says_bits_and_static_scales(
    name: str, canonical: str, bits: float, scales: tuple[str, ...]
) -> None:
    scheme = parse_cache_scheme(name)
    assert scheme.name == canonical
    assert parse_cache_scheme(canonical) == scheme
    assert cache_bits(scheme, CACHE) == bits * 128
    assert static_keys(scheme, CACHE) == scales


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kv:int8.channel", "unknown granularity 'channel'"),
        ("kv:fp8.tensor", "unknown element format 'fp8'"),
        ("kv:int8.token.out6", "no outlier columns"),
        ("kv:int4.tensor.asym", "one scale for the whole tensor is symmetric"),
        ("kv:", "KV cache scheme 'kv:'"),
    ],
)
def test_a_name_that_is_none_says_why(name: str, words: str) -> None:
    with pytest.raises(SchemeError, match=words):
        parse_cache_scheme(name)


def test_a_cache_scheme_is_no_scheme_of_a_layer() -> None:
    with pytest.raises(SchemeError, match="List it under `kv_cache`"):
        parse_scheme("kv:int8.head")


def test_groups_that_do_not_divide_a_head_are_rejected() -> None:
    reason = cache_rejection(parse_cache_scheme("int4.g64"), CACHE)
    assert reason is not None
    assert "multiple of 64 channels, found 32" in reason
    assert cache_rejection(parse_cache_scheme("int4.g32"), CACHE) is None


def test_heads_that_a_kernel_cannot_pack_are_rejected() -> None:
    odd = CacheLayer("layers.0.attn.kv_cache", "model.layers.0.self_attn", 2, 33, 0)
    for name, multiple in (("int4.token_head.asym.rht", 2), ("nvfp4.unscaled", 16)):
        reason = cache_rejection(parse_cache_scheme(name), odd)
        assert f"multiple of {multiple} channels, found 33" in str(reason)
        assert cache_rejection(parse_cache_scheme(name), CACHE) is None


def test_static_scales_keep_the_order_of_many_heads() -> None:
    cache = CacheLayer("layers.0.attn.kv_cache", "model.layers.0.self_attn", 12, 8, 0)
    keys = static_keys(parse_cache_scheme("int8.head"), cache)
    amax = {key: float(place) for place, key in enumerate(keys)}
    shuffled = dict(sorted(amax.items()))  # k.0, k.1, k.10, k.11, k.2 …
    assert list(shuffled) != list(amax)
    assert part_amax("k", shuffled) == tuple(map(float, range(12)))
    assert part_amax("v", shuffled) == tuple(map(float, range(12, 24)))


def test_static_scales_are_the_largest_of_all_corpora() -> None:
    def samples(*keys: float) -> dict[str, SimpleNamespace]:
        x_MCI = torch.zeros(1, 3, 64)
        x_MCI[0, 1, [5, 40]] = torch.tensor(keys)  # of either head
        return {part: SimpleNamespace(x_MCI=x_MCI) for part in PARTS}

    found = _head_amax({"a": samples(-9.0, 1.0), "b": samples(2.0, 7.0)}, CACHE)  # type: ignore[dict-item]
    assert [amax_H.tolist() for amax_H in found.values()] == [[9.0, 7.0]] * 2


def test_scales_are_those_of_the_tensor_the_head_or_the_token() -> None:
    x_THD = torch.tensor([[[1.27, 0.004], [12.7, 0.06]], [[0.5, -0.5], [2.0, 1.0]]])

    def rounded(name: str, amax: tuple[float, ...] = ()) -> list[float]:
        part = parse_cache_scheme(name).parts["k"]
        assert part is not None
        fake = fake_quantize_cache(x_THD, part.scheme, by_head=part.by_head, static_amax=amax)
        return fake[0].flatten().tolist()

    # One step is 0.1 under the largest magnitude 12.7, and 0.01 under 1.27.
    assert rounded("int8.tensor", (12.7,)) == pytest.approx([1.3, 0.0, 12.7, 0.1])
    assert rounded("int8.head", (1.27, 12.7)) == pytest.approx([1.27, 0.0, 12.7, 0.1])
    assert rounded("int8.head", (0.635, 12.7)) == pytest.approx([0.635, 0.005, 12.7, 0.1])
    assert rounded("int8.token") == pytest.approx([1.3, 0.0, 12.7, 0.1])
    assert rounded("int8.token_head") == pytest.approx([1.27, 0.0, 12.7, 0.1])


def test_a_cache_of_latent_vectors_is_refused_before_the_model_runs(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    model = tiny("deepseek_v3")
    assert not find_layers(open_checkpoint(str(model))).caches
    words = ("--corpus", "a=demo-en-calibration", "-o", tmp_path / "stats", "--kv-cache")
    assert "'deepseek_v3' caches is latent vectors" in refused("calibrate", model, *words)
    assert not (tmp_path / "stats").exists()


@pytest.mark.parametrize("family", [name for name in TINY_FAMILIES if name != "deepseek_v3"])
def test_what_is_captured_is_what_the_model_caches_in_every_family(
    tiny: TinyCheckpoint, family: str
) -> None:
    checkpoint = open_checkpoint(str(tiny(family)))
    model, layers = load_model(checkpoint.folder), find_layers(checkpoint)
    token_1T = torch.arange(12)[None] + 3
    kept = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        plain = model(token_1T, past_key_values=kept).logits
    assert len(layers.caches) == 2
    with capture_layers(model, layers, kv_cache=True) as captured:
        logits = model(token_1T, use_cache=False).logits
        logits.float().sum().backward()
    torch.testing.assert_close(logits.detach(), plain)
    for number, cache in enumerate(layers.caches):
        own = kept.layers[number]
        for part, state_1HTD in (("k", own.keys), ("v", own.values)):
            name = cache.part(part)
            wanted_TI = state_1HTD[0].transpose(0, 1).flatten(1)
            torch.testing.assert_close(captured.x[name], wanted_TI.to(torch.bfloat16))
            assert captured.grads[name][0].shape == captured.x[name].shape
            assert len(captured.input_gains[name]) == 1


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_the_gradient_is_of_what_attention_reads(tiny: TinyCheckpoint, family: str) -> None:
    checkpoint = open_checkpoint(str(tiny(family, dtype=torch.float32)))
    model, layers = load_model(checkpoint.folder, dtype="float32"), find_layers(checkpoint)
    token_1T = torch.arange(12)[None] + 3
    generator = torch.Generator().manual_seed(0)
    weight_TV = torch.randn(12, 256, generator=generator)

    def loss() -> torch.Tensor:
        return (model(token_1T, use_cache=False).logits[0] * weight_TV).sum()

    with capture_layers(model, layers, kv_cache=True) as captured:
        loss().backward()
    cache = layers.caches[0]
    shape = captured.x[cache.part("k")].shape
    direction_TI = torch.randn(shape, generator=generator)
    attention = model.get_submodule(find_loaded_module(cache, layers.architecture))
    for part in PARTS:

        def moved_loss(step: float, moved: str = part) -> float:
            step_BHTD = step * direction_TI.unflatten(1, (-1, cache.head_size))[None].transpose(
                1, 2
            )

            def through(
                keys: torch.Tensor, values: torch.Tensor
            ) -> tuple[torch.Tensor, torch.Tensor]:
                return (keys + step_BHTD, values) if moved == "k" else (keys, values + step_BHTD)

            handle = pass_cache(attention, through)
            with torch.no_grad():
                found = float(loss())
            handle.remove()
            return found

        slope = (moved_loss(3e-3) - moved_loss(-3e-3)) / 6e-3
        grad_TI = captured.grads[cache.part(part)][0].float()
        size = float(grad_TI.norm())
        # Gradients are kept in bfloat16; a random direction has a slope of about their norm.
        assert slope == pytest.approx(float((grad_TI * direction_TI).sum()), abs=0.02 * size)
        assert size > 0


class _CountsTokens(torch.nn.Module):
    """Attention that asks how many tokens are cached, as that of Llama 4 does."""

    def forward(self, x_BHTD: torch.Tensor, *, past_key_values: Any = None) -> tuple[int, Any]:
        before = 0 if past_key_values is None else past_key_values.get_seq_length(0)
        return before, past_key_values.update(x_BHTD, x_BHTD, 0)


def test_attention_that_asks_how_long_its_cache_is_hears_the_model_s_own() -> None:
    attention, x_BHTD, seen = _CountsTokens(), torch.ones(1, 2, 3, 4), []

    def through(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(keys.shape[2])
        return keys, values

    pass_cache(attention, through)
    assert attention(x_BHTD)[0] == 0  # there is no cache
    cache = DynamicCache()
    assert [attention(x_BHTD, past_key_values=cache)[0] for _ in range(2)] == [0, 3]
    assert seen == [3, 3, 3]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3", "gpt2"])
def test_decoding_token_by_token_reads_what_a_whole_prompt_reads(
    tiny: TinyCheckpoint, family: str
) -> None:
    checkpoint = open_checkpoint(str(tiny(family, dtype=torch.float32)))
    model, layers = load_model(checkpoint.folder, dtype="float32"), find_layers(checkpoint)
    token_1T = torch.arange(10)[None] + 3
    with torch.no_grad():
        plain = model(token_1T).logits
        recipe = Recipe(
            "m",
            None,
            (),
            kv_cache=tuple(RecipeCache(c.name, "kv:int4.token_head") for c in layers.caches),
        )
        handles = apply_caches(model, recipe, layers)
        whole = model(token_1T, use_cache=False).logits
        cache = DynamicCache(config=model.config.get_text_config())
        steps = [model(token_1T[:, n : n + 1], past_key_values=cache).logits for n in range(10)]
        # Keys of one token and of ten are sums in other orders: one of thousands at a tie may
        # take the other code, which is little beside what rounding all of them does.
        difference = torch.linalg.vector_norm(torch.cat(steps, 1) - whole)
        assert difference < 0.25 * torch.linalg.vector_norm(whole - plain)
        for handle in handles:
            handle.remove()
        assert torch.equal(model(token_1T).logits, plain)
