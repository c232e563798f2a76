r"""Lost in quantization (PROPOR 2026): what 8 bits cost in two languages, and why FP8 does.

    python scripts/reproduce/lost_in_quantization.py MODEL --first en=FILE --second pt=FILE \
        --work FOLDER

The first half of each text (by paragraphs) calibrates, the second half is measured on.

1. Spikes: how large the inputs of the linear layers are in each language.
2. The change of perplexity and the KL of INT8 with outlier columns in 16 bits, INT8, FP8 with
   scales, and naive FP8: weights and inputs cast to E4M3 as they are.
3. Naive FP8 taken apart. The same rounding to 3 bits of mantissa with no largest number
   (nothing saturates), with no smallest exponent (nothing underflows), and with neither; the
   share of each is its mean effect over both orders (Shapley). What remains is precision.
4. Mixtures of INT8 and FP8 chosen for the mean of the languages and for the worst of them.

The source, for Meta-Llama-3-8B, English and Brazilian Portuguese: "INT8 with outlier handling
preserves perplexity in both languages, while naive FP8 casting degrades English far more than
PT-BR (+18% vs. +3.9%)", "rarer, larger English spikes (>35)" (abstract).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from mofq.decision.recipe import load_recipe
from mofq.delivery.apply import emulate
from mofq.delivery.apply.loaded_model import find_loaded_layers, loaded_weight
from mofq.evidence.corpora import Corpus, load_text
from mofq.model.checkpoint.headers import open_checkpoint
from mofq.numbers.formats import FP8_E4M3, FloatFormat
from mofq.numbers.schemes import Scheme, TensorScheme, parse_scheme
from scripts.shared.command import mofq, print_markdown, with_error
from scripts.shared.reproduction import (
    Measured,
    Version,
    arguments,
    load_original,
    measure_recipes,
    measure_versions,
    reference_of,
    run_over,
    stats_of,
    uniform_of,
    windows_of,
)

UNIFORM = {
    "INT8, outlier columns in 16 bits": "int8.channel+int8.token.out6",
    "INT8": "int8.channel+int8.token",
    "FP8, scaled": "fp8_e4m3.channel+fp8_e4m3.token",
    "FP8, naive": "fp8_e4m3.unscaled+fp8_e4m3.unscaled",
    "FP8, naive weights alone": "fp8_e4m3.unscaled",
    "FP8, naive inputs alone": "bf16+fp8_e4m3.unscaled",
}
#: As the source counts spikes; and E4M3's largest number.
LARGE = (35.0, FP8_E4M3.max)
#: Half of E4M3's smallest number: what is below becomes 0.
VANISHING = 2.0**-10
#: E4M3 without an end: the format's mantissa under float32's exponents.
NOTHING_SATURATES = replace(FP8_E4M3, name="nothing saturates", max=3e38)
NOTHING_UNDERFLOWS = replace(FP8_E4M3, name="nothing underflows", exponent_bits=8, bias=127)
NEITHER = replace(NOTHING_UNDERFLOWS, name="neither", max=3e38)


@dataclass(slots=True)
class Spikes:
    """Of all inputs of all linear layers over a text."""

    largest: float = 0.0
    at: str = ""
    values: int = 0
    above: tuple[int, ...] = (0,) * len(LARGE)
    vanishing: int = 0

    def see(self, layer: str, x: Tensor) -> None:
        """Count a layer's inputs."""
        magnitude = x.abs()
        if (amax := float(magnitude.max())) > self.largest:
            self.largest, self.at = amax, layer
        self.values += x.numel()
        self.above = tuple(
            n + int((magnitude > limit).sum()) for n, limit in zip(self.above, LARGE, strict=True)
        )
        self.vanishing += int(((magnitude <= VANISHING) & (magnitude > 0)).sum())


def halves(source: str, work: Path) -> tuple[str, Path, Path]:
    """``NAME=FILE`` to the name and the files of its first and second half, by paragraphs."""
    name, _, path = source.partition("=")
    paragraphs = load_text(path).text.split("\n\n")
    middle = len(paragraphs) // 2
    files = []
    for part, some in (("first", paragraphs[:middle]), ("second", paragraphs[middle:])):
        files.append(work / f"{name}-{part}.txt")
        files[-1].write_text("\n\n".join(some), encoding="utf-8")
    return name, files[0], files[1]


def find_spikes(model: str, text: Corpus, tokens: int) -> Spikes:
    """Run the original over a text and look at what enters its linear layers."""
    checkpoint = open_checkpoint(model)
    original = load_original(checkpoint)
    spikes = Spikes()
    for name, module in original.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("lm_head"):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: spikes.see(name, inputs[0])
            )
    run_over(original, windows_of(checkpoint, text, tokens=tokens))
    return spikes


def print_spikes(found: Mapping[str, Spikes]) -> None:
    """The first table."""
    rows = []
    for language, one in found.items():
        shares = [f"{1e6 * n / one.values:.2g}" for n in one.above]
        vanishing = f"{100 * one.vanishing / one.values:.2f} %"
        rows.append([language, f"{one.largest:.1f} ({one.at})", *shares, vanishing])
    above = [f"above {limit:g} [per million]" for limit in LARGE]
    print_markdown(["inputs of linear layers", "largest", *above, "rounded to 0 by E4M3"], rows)


def endless(element: FloatFormat) -> Version:
    """A model whose weights and inputs are cast to a format without scales."""
    template = parse_scheme("fp8_e4m3.unscaled+fp8_e4m3.unscaled")
    assert template.weight is not None
    assert template.activation is not None
    scheme = Scheme(
        element.name,
        weight=_with(template.weight, element),
        activation=_with(template.activation, element),
    )

    def apply(model: PreTrainedModel) -> PreTrainedModel:
        recipe = uniform_of(str(model.config.name_or_path), "fp8_e4m3.unscaled")
        for group in find_loaded_layers(model, recipe).groups:
            weights = {layer.name: loaded_weight(model, layer) for layer in group.layers}
            emulate.apply_group(model, group, scheme, sources=weights, recipe=recipe)
        return model

    return Version(f"naive cast, {element}", 8.0, apply)


def _with(scheme: TensorScheme, element: FloatFormat) -> TensorScheme:
    return replace(scheme, element=element)


def print_costs(done: Mapping[str, Mapping[str, Measured]]) -> None:
    """The second table: language -> label -> measurement."""
    columns = ["", *(f"{name}: {what}" for name in done for what in ("perplexity", "KL"))]
    rows = []
    for label in next(iter(done.values())):
        row = [label]
        for of in done.values():
            one = of[label]
            change = 100 * (one.perplexity / one.perplexity_original - 1)
            row += [f"{change:+.2f} %", with_error(one.kl, one.kl_stderr)]
        rows.append(row)
    print_markdown(columns, rows)


def print_parts(naive: Mapping[str, Measured], parts: Mapping[str, Mapping[str, Measured]]) -> None:
    """The third table."""
    rows = []
    for language, of in parts.items():
        all_, no_max, no_min, neither = (
            naive[language].kl,
            of[NOTHING_SATURATES.name].kl,
            of[NOTHING_UNDERFLOWS.name].kl,
            of[NEITHER.name].kl,
        )
        saturation = ((all_ - no_max) + (no_min - neither)) / 2
        underflow = ((all_ - no_min) + (no_max - neither)) / 2
        shares = [saturation, underflow, neither]
        rows.append(
            [language, f"{all_:.4f}", *(f"{x:.4f} ({100 * x / all_:.0f} %)" for x in shares)]
        )
    print_markdown(["naive FP8, KL", "all", "saturation", "underflow", "precision"], rows)


def searched(model: str, languages: Mapping[str, Path], work: Path) -> dict[str, Path]:
    """Mixtures of INT8 and FP8 for the mean and for the worst language."""
    named = {name: str(path) for name, path in languages.items()}
    stats = stats_of(model, named, work / "stats", sequences=4)
    table = work / "w8a8.jsonl"
    mofq("measure", model, "--space", "w8a8", "--stats", stats, "-o", table)
    found = {}
    for objective in ("mean", "worst-corpus"):
        found[f"mixture for the {objective}"] = work / f"{objective}.yaml"
        mofq(
            *("search", table, "--objective", objective, "--max-bits", "8.2"),
            *("-o", work / f"{objective}.yaml"),
        )
    return found


def main(given: Sequence[str] | None = None) -> None:
    """Four tables."""
    options = arguments(
        __doc__, given, ("--first", "NAME=FILE"), ("--second", "NAME=FILE of the other language")
    )
    texts = [halves(source, options.work) for source in (options.first, options.second)]
    held_out = {name: load_text(str(second), name=name) for name, _, second in texts}
    print_spikes(
        {name: find_spikes(options.model, text, options.tokens) for name, text in held_out.items()}
    )
    recipes = {label: uniform_of(options.model, scheme) for label, scheme in UNIFORM.items()}
    mixtures = searched(options.model, {name: first for name, first, _ in texts}, options.work)
    recipes |= {label: load_recipe(path) for label, path in mixtures.items()}
    variants = {e.name: endless(e) for e in (NOTHING_SATURATES, NOTHING_UNDERFLOWS, NEITHER)}
    done, parts = {}, {}
    for name, text in held_out.items():
        reference = reference_of(options, text=text)
        done[name] = measure_recipes(reference, recipes)
        parts[name] = measure_versions(reference, variants)
    print_costs(done)
    print_parts({name: of["FP8, naive"] for name, of in done.items()}, parts)


if __name__ == "__main__":
    main()
