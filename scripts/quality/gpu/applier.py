"""A mixed recipe with TorchAO's kernels: enforced, as divergent as its emulation, and how fast."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mofq.decision import recipe_from_layers
from mofq.decision.recipe import Recipe
from mofq.delivery.apply.loaded_model import module_path
from mofq.delivery.backends import apply_recipe
from mofq.delivery.validation import find_deviations
from mofq.demo import demo_model_folder
from mofq.evidence.corpora import load_text
from mofq.evidence.metrics import kl_divergence
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.loading import load_model, load_tokenizer
from scripts.make.synthetic_checkpoint import CONFIGS, write_checkpoint
from scripts.quality.gpu.report import Report, best_seconds

MIXED = (
    *("int8.channel+int8.token", "fp8_e4m3.channel+fp8_e4m3.token"),
    *("int4.g32", "int4.g128", "bf16"),
)
#: Operators that must run where a scheme multiplies quantized inputs.
OPERATORS = ("aten::_int_mm", "aten::_scaled_mm")
#: A kernel adds in another order and rounds the sum to bfloat16 once more or less: of the
#: divergence from the original, so much may lie between kernels and emulation.
SHARE_OF_KL = 0.1


class Recorder(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def mixed_recipe(checkpoint: Checkpoint, schemes: tuple[str, ...]) -> Recipe:
    """Some schemes in turn."""
    layers = find_layers(checkpoint)
    chosen = {group.name: schemes[n % len(schemes)] for n, group in enumerate(layers.groups)}
    return recipe_from_layers(layers, chosen, checkpoint=checkpoint)


def demo_windows(*, windows: int, tokens: int) -> Tensor:
    """Of the bundled text that the bundled model was not trained on, [windows, tokens]."""
    folder = demo_model_folder()
    ids = load_tokenizer(folder)(load_text("demo-en").text)["input_ids"]
    return torch.tensor(ids[: windows * tokens]).reshape(windows, tokens)


def logits_of(model: nn.Module, windows_NT: Tensor, device: str) -> Tensor:
    """[N * T, V], float32."""
    with torch.no_grad():  # and not inference mode, in which no mode sees operators
        return model(windows_NT.to(device)).logits.flatten(0, 1).float()


def check_recipe(report: Report) -> None:
    """Enforcement, divergence, kernels, and a planted deviation, on the bundled model."""
    checkpoint = open_checkpoint(str(demo_model_folder()))
    recipe = mixed_recipe(checkpoint, MIXED)
    device = report.device
    windows_NT = demo_windows(windows=2 if report.small else 16, tokens=256)

    def load() -> Any:
        return load_model(checkpoint.folder, dtype="bfloat16", device=device)

    original = logits_of(load(), windows_NT, device)
    emulated = logits_of(apply_recipe(load(), recipe, checkpoint=checkpoint), windows_NT, device)
    model = apply_recipe(load(), recipe, "torchao", checkpoint=checkpoint)
    with Recorder() as recorder:
        applied = logits_of(model, windows_NT, device)
    lacking = [name for name in OPERATORS if name not in recorder.names]
    report.check("kernels of quantized products ran", not lacking, ", ".join(lacking))
    cost = float(kl_divergence(original, emulated).mean())
    apart = float(kl_divergence(emulated, applied).mean())
    report.figure("KL of the recipe, emulated", cost, "nats per token")
    report.figure("KL between emulation and kernels", apart, "nats per token")
    detail = f"{apart:.3g} of {cost:.3g} nats"
    report.check("kernels compute what is emulated", apart <= SHARE_OF_KL * cost, detail)
    for tokens in (1, 16, 17):
        few = windows_NT[:1, :tokens]
        same = logits_of(model, few, device)
        whole = logits_of(model, windows_NT[:1], device)[:tokens]
        apart = float(kl_divergence(whole, same).mean())
        report.check(
            f"{tokens} tokens alone as in a longer text",
            apart <= SHARE_OF_KL * cost,
            f"{apart:.3g} nats",
        )
    found = find_deviations(model, recipe, checkpoint=checkpoint)
    detail = "; ".join(f"{one.layer}: {one.reason}" for one in found[:3])
    report.check("every layer is what the recipe says", not found, detail)
    _check_planted(report, model, recipe, checkpoint)


def _check_planted(
    report: Report, model: nn.Module, recipe: Recipe, checkpoint: Checkpoint
) -> None:
    """One code of a layer of each class is changed by its last bit."""
    layers = {layer.name: layer for layer in find_layers(checkpoint).grouped_layers}
    first: dict[str, str] = {}
    for group in recipe.groups:
        first.setdefault(group.scheme, group.layers[0])
    for name in first.values():
        weight: Any = model.get_submodule(module_path(layers[name])).weight.data
        codes = weight.qdata if hasattr(weight, "qdata") else weight
        codes.view(torch.uint8)[-1, -1] ^= 1
    found = {one.layer for one in find_deviations(model, recipe, checkpoint=checkpoint)}
    missed = sorted(set(first.values()) - found)
    detail = f"missed {missed}, also named {sorted(found - set(first.values()))}"
    report.check(
        f"{len(first)} planted deviations are caught", found == set(first.values()), detail
    )


def measure_layers(report: Report) -> None:
    """Time of the linear layers of one decoder layer of Llama-3-8B's shapes, against bfloat16."""
    config = CONFIGS["llama3-8b"] | {"num_hidden_layers": 1, "vocab_size": 1024}
    if report.small:
        config |= {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 2}
        config |= {"num_key_value_heads": 2}
    config |= {"hidden_act": "silu", "max_position_embeddings": 8192, "rms_norm_eps": 1e-5}
    config |= {"tie_word_embeddings": False, "dtype": "bfloat16"}
    device = report.device
    with TemporaryDirectory() as folder:
        write_checkpoint(config, Path(folder) / "model", shard_bytes=2**33, seed=0)
        checkpoint = open_checkpoint(str(Path(folder) / "model"))
        paths = [module_path(layer) for layer in find_layers(checkpoint).grouped_layers]
        plain: dict[int, float] = {}
        for scheme in ("bf16", *MIXED[:-1]):
            model: Any = load_model(checkpoint.folder, dtype="bfloat16", device=device)
            if scheme != "bf16":
                recipe = mixed_recipe(checkpoint, (scheme,))
                model = apply_recipe(model, recipe, "torchao", checkpoint=checkpoint)
            modules = [model.get_submodule(path) for path in paths]
            for tokens in (16, 64) if report.small else (16, 2048):
                inputs = [
                    torch.randn(tokens, one.in_features, device=device, dtype=torch.bfloat16)
                    for one in modules
                ]

                def forward(modules: Any = modules, inputs: Any = inputs) -> None:
                    with torch.inference_mode():
                        for module, x_TI in zip(modules, inputs, strict=True):
                            module(x_TI)

                seconds = best_seconds(forward, device, repeats=3 if report.small else 20)
                plain.setdefault(tokens, seconds)
                report.figure(f"linear layers, {tokens} tokens, {scheme}", seconds * 1e3, "ms")
                report.figure(
                    f"linear layers, {tokens} tokens, {scheme} to bf16",
                    seconds / plain[tokens],
                    "times",
                )


def run(report: Report) -> None:
    """Numbers first, then times."""
    check_recipe(report)
    measure_layers(report)
