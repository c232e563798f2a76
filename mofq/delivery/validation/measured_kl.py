"""Measures the KL of one recipe after another in one loaded model, window by window."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Self

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from mofq.decision.recipe import Recipe
from mofq.delivery.apply import emulate
from mofq.delivery.apply.fake_quant_experts import FakeQuantExperts
from mofq.delivery.apply.kv_cache import apply_caches
from mofq.delivery.apply.loaded_model import (
    Sources,
    find_loaded_layers,
    loaded_weight,
    module_paths,
    replace_module,
    round_kept,
    scheme_source,
)
from mofq.delivery.recipe_fits import open_fits
from mofq.delivery.recipe_layers import checked_layers, group_schemes, static_amax
from mofq.delivery.validation.divergence import (
    OriginalLogits,
    compare_windows,
    run_original,
)
from mofq.delivery.validation.windows import cut_windows
from mofq.evidence.corpora import Bos, Corpus
from mofq.evidence.fits import Fits
from mofq.exceptions import MofqError
from mofq.files.progress import Progress
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.checkpoint.tensors import read_kept_layer
from mofq.model.layers import FusionGroup, LinearLayer, ModelLayers
from mofq.model.loading import load_model
from mofq.numbers.schemes import Scheme, parse_scheme

#: Quantized weights that are kept for when a scheme comes back [bytes].
CACHE_BYTES = 2**30

#: A fusion group's scheme and its static scales.
_Choice = tuple[str, tuple[tuple[str, float], ...]]


class Objective(ABC):
    """The KL of one recipe after another on windows of a text, window by window."""

    windows_NT: Tensor
    leading: tuple[int, ...]  #: token ids that each window begins with

    def __init__(self, model_source: str, text: Corpus, stats: str | Path | None) -> None:
        """Open the model; whoever derives from this cuts the text and runs the original.

        Args:
            model_source: A folder, or a hub id.
            text: To predict.
            stats: The folder that recipes with fitted schemes rest on.
        """
        self.checkpoint: Checkpoint = open_checkpoint(model_source)
        self.text = text
        self._stats = stats
        self._fits: Fits | None = None  # opened for the first recipe that needs it
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what is kept of the original, and close the statistics."""
        self._stack.close()

    @property
    def windows(self) -> int:
        """How many values an evaluation yields."""
        return len(self.windows_NT)

    @property
    def tokens(self) -> int:
        """Positions that are compared."""
        return self.windows_NT.numel()

    def expect(self, recipes: Iterable[Recipe]) -> None:
        """Say which recipes are probably evaluated next; what they measure is the same.

        Args:
            recipes: The next first. Are looked at while one is evaluated, if at all.
        """
        del recipes  # a model in memory gains nothing by it

    @abstractmethod
    def evaluate(self, recipe: Recipe) -> Iterator[float]:
        """Run a recipe over the windows.

        Args:
            recipe: Of this model.

        Yields:
            The KL of each window, in order [nats per token]. A caller that has seen enough
            stops asking; asking on after another recipe was begun is an error.

        Raises:
            RecipeError: The recipe does not fit the model; before anything is changed.
            SchemeError: A weight is not finite.
            StatsError: A scheme is fitted to statistics, and there are none, or others.
            MofqError: The logits are not finite, or another recipe was begun.
        """

    def _cut(
        self, model: PreTrainedModel, *, tokens: int, step: int, sequence_length: int, bos: Bos
    ) -> None:
        """Cut the text into windows, of which every so many-th is run, from the first on."""
        windows = cut_windows(
            self.checkpoint,
            model,
            self.text,
            tokens=tokens,
            sequence_length=sequence_length,
            bos=bos,
        )
        self.windows_NT, self.leading = windows.tokens_NT[::step], windows.leading

    def _open_fits(self, recipe: Recipe) -> Fits | None:
        """What a recipe's schemes are fitted to; all recipes of a search rest on the same."""
        if self._fits is None:
            fits = open_fits(recipe, self._stats, index_sha256=self.checkpoint.index_sha256)
            self._fits = self._stack.enter_context(fits)
        return self._fits


class MeasuredKl(Objective):
    """One model in memory whose fusion groups change their schemes from recipe to recipe.

    Only the groups that differ from the recipe before are touched. Their
    weights are quantized from the checkpoint, as ``validate`` does, so that a
    recipe has the same numbers here as there, whatever was measured before it.
    Holds the model with its original weights, its quantized ones, and a cache.
    """

    def __init__(
        self,
        model_source: str,
        text: Corpus,
        *,
        tokens: int,
        step: int = 1,
        sequence_length: int = 512,
        bos: Bos = "auto",
        dtype: str = "float32",
        device: str = "cpu",
        stats: str | Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        progress: Progress | None = None,
    ) -> None:
        """Load the model and run the original over the text.

        Args:
            model_source: A folder, or a hub id.
            text: To predict; neither what was calibrated on nor what will validate.
            tokens: How many to use, at most, in windows spread over it.
            step: Of these windows every so many-th is run, from the first on.
            sequence_length: Tokens of a window.
            bos: Whether windows begin with BOS, as in ``leading_tokens``.
            dtype: Of the arithmetic.
            device: Where it runs.
            stats: The folder that recipes with fitted schemes rest on.
            cache_bytes: Of quantized weights that are kept for when a scheme comes back.
            progress: Called with ``"original"``, windows done, and all of them.

        Raises:
            MofqError: Any input is not valid.
        """
        super().__init__(model_source, text, stats)
        self._model = load_model(self.checkpoint.folder, dtype=dtype, device=device)
        self._cut(self._model, tokens=tokens, step=step, sequence_length=sequence_length, bos=bos)
        self._cache: OrderedDict[tuple[str, _Choice], dict[str, nn.Module]] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._originals: dict[str, nn.Module] = {}
        self._applied: dict[str, _Choice] = {}
        self._caches: list[RemovableHandle] = []  # what rounds keys and values now
        self._stored: ModelLayers | None = None  # as the checkpoint has them
        self._loaded: tuple[FusionGroup, ...] = ()  # as the model has them
        self._evaluation, self._logits = 0, self._stack.enter_context(OriginalLogits())
        try:
            run_original(self._model, self.windows_NT, into=self._logits, progress=progress)
        except BaseException:
            self.close()
            raise

    def evaluate(self, recipe: Recipe) -> Iterator[float]:
        """As `Objective` says."""
        self._open_fits(recipe)
        self._apply(recipe)
        self._evaluation += 1
        return self._run(self._evaluation)

    def _run(self, evaluation: int) -> Iterator[float]:
        length = self.windows_NT.shape[1]
        scores = compare_windows(self._model, self.windows_NT, original=self._logits)
        while True:
            if evaluation != self._evaluation:
                raise MofqError(
                    "the objective holds one model, and another recipe was begun before the "
                    "windows of this one were done. Evaluate one recipe after the other."
                )
            score = next(scores, None)
            if score is None:
                return
            yield score.kl_nats / length

    def _apply(self, recipe: Recipe) -> None:
        layers = checked_layers(self.checkpoint, recipe, experts_apart=True)
        stored = {layer.name: layer for layer in layers.grouped_layers}
        if layers != self._stored:  # the first recipe, or one that divides the layers otherwise
            for group in self._loaded:
                self._restore(group, stored)
            self._applied.clear()
            self._stored = layers
            loaded = find_loaded_layers(self._model, recipe)
            round_kept(self._model, loaded, checkpoint=self.checkpoint, on_disk=layers)
            self._loaded = tuple(emulate.with_global_scales(one, stored) for one in loaded.groups)
        schemes = group_schemes(layers, recipe)
        choices = {g.name: _choice(g, schemes[g.name], recipe) for g in self._loaded}
        for group in self._loaded:
            choice = choices[group.name]
            if self._applied.get(group.name, _UNQUANTIZED) != choice:
                # Unknown while it changes: a failure in between is repaired by the next recipe.
                self._applied[group.name] = _UNKNOWN
                self._restore(group, stored)
                if choice != _UNQUANTIZED:
                    self._quantize(group, choice, recipe=recipe, stored=stored)
                self._applied[group.name] = choice
        for handle in self._caches:
            handle.remove()
        self._caches = apply_caches(self._model, recipe, layers)

    def _restore(self, group: FusionGroup, stored: Mapping[str, LinearLayer]) -> None:
        """Put the original's modules and weights back."""
        for layer, path in self._paths(group):
            module = self._model.get_submodule(path)
            if layer.expert is not None:  # others of its module may keep their schemes
                if isinstance(module, FakeQuantExperts):
                    module.drop_scheme(layer.tensor.rpartition(".")[2], layer.expert)
            elif path in self._originals:
                replace_module(self._model, path, self._originals[path])
            else:
                self._originals[path] = module
        for layer in group.layers:
            if layer.expert is not None and layer.name in stored:  # rounded in place
                source = stored[layer.name]
                weight_OI = read_kept_layer(self.checkpoint, source, 0, source.out_features)
                loaded_weight(self._model, layer).copy_(weight_OI)

    def _paths(self, group: FusionGroup) -> list[tuple[LinearLayer, str]]:
        """The modules of a group's layers; an embedding may have two."""
        return [
            (layer, path) for layer in group.layers for path in module_paths(self._model, layer)
        ]

    def _quantize(
        self,
        group: FusionGroup,
        choice: _Choice,
        *,
        recipe: Recipe,
        stored: Mapping[str, LinearLayer],
    ) -> None:
        key = (group.name, choice)
        if key in self._cache:
            self._cache.move_to_end(key)
            for path, module in self._cache[key].items():
                replace_module(self._model, path, module)
            return
        scheme = parse_scheme(choice[0])
        sources = Sources(
            {
                layer.name: partial(scheme_source, self.checkpoint, stored[layer.name], scheme)
                for layer in group.layers
            }
        )
        emulate.apply_group(
            self._model, group, scheme, sources=sources, recipe=recipe, fits=self._fits
        )
        if all(layer.expert is None for layer in group.layers):
            paths = [path for _, path in self._paths(group)]
            self._cache[key] = {path: self._model.get_submodule(path) for path in paths}
            while sum(map(_bytes, self._cache.values())) > self._cache_bytes:
                self._cache.popitem(last=False)


_UNQUANTIZED: _Choice = ("bf16", ())
_UNKNOWN: _Choice = ("", ())


def _choice(group: FusionGroup, scheme: Scheme, recipe: Recipe) -> _Choice:
    if scheme.is_unquantized:
        return _UNQUANTIZED
    amax = static_amax(group, scheme, recipe)
    return scheme.name, tuple(sorted(amax.items()))


def _bytes(modules: Mapping[str, nn.Module]) -> int:
    parameters = (p for module in modules.values() for p in module.parameters())
    return sum({id(one): one.nbytes for one in parameters}.values())  # tied ones once
