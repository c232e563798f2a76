"""Takes the input and the output gradient of every linear layer while a model runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mofq.evidence.calibration.routers import Routers, watch_routers
from mofq.exceptions import StatsError, option
from mofq.model.attention import pass_cache
from mofq.model.layers import (
    PARTS,
    CacheLayer,
    LinearLayer,
    ModelLayers,
    find_loaded_module,
    find_loaded_weight,
)
from mofq.model.modules import (
    ExpertsKind,
    experts_problem,
    find_bias,
    find_kind,
    is_conv1d,
    is_plain_linear,
    multiply,
    replace_forward,
    run_experts,
)

#: By how much an embedding's output may differ from a multiple of its rows.
_SCALED = 0.01

#: (expert, parameter) -> the layers whose rows the parameter holds, and the first row of each.
ExpertLayers = Mapping[tuple[int, str], Sequence[tuple[LinearLayer, int]]]


@dataclass(frozen=True, slots=True)
class LookedUp:
    """The rows of an embedding that one sequence looked up."""

    row_T: Tensor  #: of each token, int64
    #: Gradients of the tokens' rows, a draw each: [tokens, in_features], bfloat16.
    grads: list[Tensor] = field(default_factory=list)
    #: Products of these with the rows, summed, a draw each, float64: see `calibration.gains`.
    scaling: list[Tensor] = field(default_factory=list)

    def set_aside(self) -> Callable[[], list[Tensor]]:
        """Forget what was kept, until the result puts it back and gives what came in between."""
        grads, scaling = list(self.grads), list(self.scaling)
        self.grads.clear()
        self.scaling.clear()

        def restore() -> list[Tensor]:
            between = list(self.grads)
            self.grads[:], self.scaling[:] = grads, scaling
            return between

        return restore


@dataclass(slots=True)
class Captured:
    """What one sequence left behind; filled by hooks, emptied by `clear`.

    Everything is kept as bfloat16, at one place. Sums stay where they are made until all are
    there: the host does not wait for a GPU at every layer.
    """

    #: Of the model; large products are made there.
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    #: The device where all of a sequence fits, else the CPU: see `calibration.captured_place`.
    place: torch.device = field(default_factory=lambda: torch.device("cpu"))
    x: dict[str, Tensor] = field(default_factory=dict)  #: layer -> [tokens, in_features]
    y: dict[str, Tensor] = field(default_factory=dict)  #: layer -> [tokens, out], without bias
    source: dict[str, str] = field(default_factory=dict)  #: layer -> layer whose x it shares
    grads: dict[str, list[Tensor]] = field(default_factory=dict)  #: layer -> [tokens, out] a draw
    tokens: dict[str, Tensor] = field(default_factory=dict)  #: expert -> its tokens' positions
    looked_up: dict[str, LookedUp] = field(default_factory=dict)  #: embedding -> its rows
    #: Layer with inputs of its own -> a number a draw, float64; see `calibration.gains`.
    input_gains: dict[str, list[Tensor]] = field(default_factory=dict)
    length: int = 0  #: tokens of the sequence
    routers: Routers | None = None  #: None: they are not watched

    def clear(self) -> None:
        """Forget the sequence."""
        for part in (self.x, self.y, self.source, self.grads, self.tokens, self.input_gains):
            part.clear()
        self.looked_up.clear()
        if self.routers is not None:
            self.routers.clear()

    def keep_input(self, layer: str, x: Tensor, y: Tensor) -> None:
        """Keep a layer's input, its gain, and the gradient of its output.

        Raises:
            StatsError: The layer sees something else than one vector for each token.
        """
        x_TI = x.detach().reshape(-1, x.shape[-1])
        if len(x_TI) != self.length:
            raise StatsError(
                f"{layer}: sees {len(x_TI)} vectors of a sequence of {self.length} tokens, and "
                "errors are predicted of layers that see one for each token. Leave the model's "
                f"type out, or measure without {option('stats')}."
            )
        self.x[layer] = self._copy(x_TI)
        self.keep_input_gain(layer, x)
        self.keep_gradient(layer, layer, y)

    def keep_input_gain(self, layer: str, x: Tensor) -> None:
        """Keep the input gain of a layer, when the gradient of its input comes."""
        amax_T = x.detach().abs().amax(-1).float()
        x.register_hook(partial(self._on_input_gradient, layer, amax_T))

    def keep_output(self, layer: str, y: Tensor, bias: Tensor | None) -> None:
        """Keep a layer's output without its bias: the part that follows the size of the weights."""
        y_TO = y.detach().reshape(-1, y.shape[-1])
        y_TO = y_TO if bias is None else y_TO.float() - bias.float()
        self.y[layer] = self._copy(y_TO)

    def _copy(self, value: Tensor) -> Tensor:
        """A copy also where nothing is to be converted: a model may change its own in place."""
        return value.to(device=self.place, dtype=torch.bfloat16, copy=True)

    def keep_gradient(self, layer: str, source: str, y_TO: Tensor) -> None:
        """Keep the gradient of a layer's output, when it comes; its input is that of ``source``."""
        self.source[layer] = source
        y_TO.register_hook(partial(self._on_output_gradient, layer))

    def keep_lookup(self, layer: str, row: Tensor, scale: float, y: Tensor) -> None:
        """Keep which rows of an embedding are looked up, and the gradients of these.

        Args:
            layer: The embedding.
            row: Of each token.
            scale: What the module multiplies them by.
            y: Its output.
        """
        looked_up = LookedUp(row.detach().reshape(-1).to(device=self.place, dtype=torch.int64))
        self.looked_up[layer] = looked_up
        y.register_hook(partial(self._on_lookup_gradient, looked_up, scale, y.detach()))

    def _on_lookup_gradient(
        self, looked_up: LookedUp, scale: float, y: Tensor, grad: Tensor
    ) -> None:
        looked_up.scaling.append((grad.float() * y).sum(dtype=torch.float64))
        grad_TI = grad.reshape(-1, grad.shape[-1]).float() * scale
        looked_up.grads.append(grad_TI.to(device=self.place, dtype=torch.bfloat16))

    def _on_input_gradient(self, layer: str, amax_T: Tensor, grad: Tensor) -> None:
        square_T = grad.float().square().sum(-1, dtype=torch.float64)
        gain = (square_T * amax_T.square()).sum()
        self.input_gains.setdefault(layer, []).append(gain)

    def _on_output_gradient(self, layer: str, grad: Tensor) -> None:
        grad_TO = grad.reshape(-1, grad.shape[-1]).to(device=self.place, dtype=torch.bfloat16)
        self.grads.setdefault(layer, []).append(grad_TO)


@contextmanager
def capture_layers(
    model: nn.Module,
    layers: ModelLayers,
    *,
    kv_cache: bool = False,
    routing: bool = False,
    place: torch.device | None = None,
    lookups: bool = True,
) -> Iterator[Captured]:
    """Watch every linear layer of the fusion groups for as long as the context lasts.

    Args:
        model: Frozen (no parameter requires a gradient), in eval mode.
        layers: Of its checkpoint.
        kv_cache: Watch what is cached of keys and values too.
        routing: Watch what routers score, see `mofq.evidence.calibration.routing`.
        place: Where what is seen is kept; by default the CPU.
        lookups: Watch which rows of an embedding are looked up, too; see `watch_lookups`.

    Yields:
        What the last sequence left; call `Captured.clear` before each sequence.

    Raises:
        StatsError: The model has no module for one of the layers.
    """
    captured = Captured(
        model.get_input_embeddings().weight.device,  # type: ignore[operator]
        place or torch.device("cpu"),
    )
    check_weights_apart(model, layers)
    last_input: list[tuple[Tensor, str]] = []
    embedding = next((one for one in layers.grouped_layers if one.role != "linear"), None)
    handles = [_start_gradient_at_embeddings(model, captured, embedding if lookups else None)]
    restore: list[Callable[[], None]] = []
    experts: dict[str, dict[tuple[int, str], list[tuple[LinearLayer, int]]]] = {}
    for layer in layers.grouped_layers:
        if layer.role == "lookup":
            continue
        loaded = find_loaded_weight(layer, layers.architecture)
        path, _, parameter = loaded.name.rpartition(".")
        tied = layer.role == "tied"
        module = _head_of(model, layer) if tied else _module(model, path, layer)
        if loaded.expert is None:
            _check_module(module, layer)
            hook = partial(_on_forward, captured, last_input, layer.name)
            handles.append(module.register_forward_hook(hook))
        else:
            parts = experts.setdefault(path, {})
            rows = parts.setdefault((loaded.expert, parameter), [])
            rows.append((layer, loaded.row_start))
    for cache in layers.caches if kv_cache else ():
        path = find_loaded_module(cache, layers.architecture)
        see = partial(_see_cache, captured, cache)
        handles.append(pass_cache(_module(model, path, cache), see))
    if routing:
        captured.routers = Routers()
        gates = (find_loaded_weight(one, layers.architecture) for one in layers.unquantized)
        modules = {gate.name.rpartition(".")[0] for gate in gates}
        seen = map(model.get_submodule, sorted(modules))
        restore += watch_routers(seen, captured.routers)
    for path, parts in experts.items():
        restore.append(_watch_experts(model.get_submodule(path), path, parts, captured))
    try:
        yield captured
    finally:
        for undo in reversed(restore):
            undo()
        for handle in handles:
            handle.remove()


@contextmanager
def watch_lookups(model: nn.Module, captured: Captured, embedding: LinearLayer) -> Iterator[None]:
    """Watch which rows of an embedding are looked up, for as long as the context lasts.

    Args:
        model: As `capture_layers` has it.
        captured: Is added to.
        embedding: A layer of the role of one.

    Raises:
        StatsError: The model has no such embedding.
    """
    handle = _start_gradient_at_embeddings(model, captured, embedding)
    try:
        yield
    finally:
        handle.remove()


def _module(model: nn.Module, path: str, layer: LinearLayer | CacheLayer) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise StatsError(
            f"{layer.name}: the loaded model has no module {path!r}. "
            f"The checkpoint's names and the model's class disagree."
        ) from None


def _head_of(model: nn.Module, layer: LinearLayer) -> nn.Module:
    """The module that multiplies by a tied embedding."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    if head is None or head.weight is not embedding.weight:
        raise StatsError(
            f"{layer.name}: the loaded model's lm_head is not tied to it, as the config says. "
            f"Leave {option('embeddings')} and {option('lm_head')} out."
        )
    return head


def check_weights_apart(model: nn.Module, layers: ModelLayers) -> None:
    """Refuse a model of which several modules have the weight of one of the layers.

    Args:
        model: Before weights of its modules come and go.
        layers: Of its checkpoint.

    Raises:
        StatsError: They do, or there is no module for one of the layers.
    """
    holders = Counter(
        id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) or is_conv1d(m)
    )
    for layer in layers.grouped_layers:
        loaded = find_loaded_weight(layer, layers.architecture)
        module = _module(model, loaded.name.rpartition(".")[0], layer)
        if loaded.expert is None and holders[id(module.weight)] > 1:
            raise StatsError(
                f"{layer.name}: several modules of the loaded model have this weight, so that its "
                "error counts more than once, which is not predicted. Measure without "
                f"{option('stats')}."
            )


def _check_module(module: nn.Module, layer: LinearLayer) -> None:
    """Refuse a module that is no plain linear layer."""
    if not is_plain_linear(module):
        raise StatsError(
            f"{layer.name}: the loaded model's module is a {type(module).__name__}, and no plain "
            f"linear layer. Measure without {option('stats')}."
        )


def _on_forward(
    captured: Captured,
    last_input: list[tuple[Tensor, str]],
    name: str,
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    if not output.requires_grad:
        return
    if name in captured.source:
        raise StatsError(
            f"{name}: runs more than once for a token, so that its error counts more than once, "
            f"which is not predicted. Measure without {option('stats')}."
        )
    captured.keep_output(name, output, getattr(module, "bias", None))
    x = inputs[0]
    if last_input and last_input[0][0] is x and last_input[0][1] in captured.x:
        captured.keep_gradient(name, last_input[0][1], output)
        return
    last_input[:] = [(x, name)]
    captured.keep_input(name, x, output)


def _see_cache(captured: Captured, cache: CacheLayer, *states: Tensor) -> tuple[Tensor, Tensor]:
    """Keep what is cached and its gradient, as a layer's whose output is its input."""
    seen = []
    for part, state_BHTD in zip(PARTS, states, strict=True):
        state_BTI = state_BHTD.transpose(1, 2).flatten(2)
        name = cache.part(part)
        if state_BTI.requires_grad and name not in captured.source:
            captured.keep_input(name, state_BTI, state_BTI)
        seen.append(state_BTI.unflatten(2, (-1, cache.head_size)).transpose(1, 2))
    return seen[0], seen[1]


def _start_gradient_at_embeddings(
    model: nn.Module, captured: Captured, layer: LinearLayer | None
) -> RemovableHandle:
    """Have gradients start at the embeddings, and keep them where these are a layer."""
    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]

    def start(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        captured.length = output[..., 0].numel()
        output = output.requires_grad_(True)
        if layer is not None:
            if layer.name in captured.looked_up:
                raise StatsError(
                    f"{layer.name}: runs more than once for a token, so that its error counts more "
                    f"than once, which is not predicted. Leave {option('embeddings')} out."
                )
            scale = _scale_of(module, inputs[0], output)
            captured.keep_lookup(layer.name, inputs[0], scale, output)
            if layer.role == "lookup":
                captured.source[layer.name] = layer.name
        return output.clone()

    # A copy, which a model may scale in place.
    if layer is not None and embeddings.weight.shape != (layer.out_features, layer.in_features):
        raise StatsError(
            f"{layer.name}: the loaded model looks tokens up in a matrix of another shape. Leave "
            f"{option('embeddings')} and {option('lm_head')} out."
        )
    return embeddings.register_forward_hook(start)


def _scale_of(module: nn.Module, row: Tensor, output: Tensor) -> float:
    """What an embedding multiplies its rows by: Gemma's by the root of their length.

    Raises:
        StatsError: It does something else with them.
    """
    rows = module.weight.detach()[row].double()  # type: ignore[operator]
    found = output.detach().double()
    scale = float((rows * found).sum() / rows.square().sum().clamp(min=1e-300))
    if float((found - scale * rows).norm()) > _SCALED * float(found.norm()):
        raise StatsError(
            f"{type(module).__name__}: its output is no multiple of the rows that it looks up, so "
            f"that what their errors do is not predicted. Leave {option('embeddings')} and "
            f"{option('lm_head')} out."
        )
    return scale


def _watch_experts(
    experts: nn.Module, path: str, layers: ExpertLayers, captured: Captured
) -> Callable[[], None]:
    """Replace the forward of an experts module by one that shows each expert's layers.

    Args:
        experts: With two parameters of three dimensions.
        path: Of the module.
        layers: The linear layers that they hold.
        captured: Where inputs and gradients go.

    Returns:
        A function that puts the module's own forward back.

    Raises:
        StatsError: The experts are of another kind than transformers' plain one.
    """
    if problem := experts_problem(experts):
        name = next(iter(layers.values()))[0][0].name.rpartition(".experts.")[0]
        raise StatsError(
            f"{name}: {problem}: what its layers receive cannot be shown. "
            f"Measure without {option('stats')}."
        )
    shown = partial(_run_experts, experts, path, find_kind(experts), layers, captured)
    return replace_forward(experts, shown)


def _run_experts(
    module: Any,
    path: str,
    kind: ExpertsKind,
    layers: ExpertLayers,
    captured: Captured,
    *given: Tensor,
) -> Tensor:
    """The forward of transformers' experts, which shows the layers of each."""

    def linear(parameter: str, expert: int, x_TI: Tensor, token_T: Tensor) -> Tensor:
        y_TO = multiply(module, kind, parameter, expert, x_TI)
        bias_O = find_bias(module, parameter, expert)
        _see(captured, layers[expert, parameter], x_TI, y_TO, token_T, bias_O)
        return y_TO

    output_TI = run_experts(kind, *given, linear=linear)
    if captured.routers is not None:
        captured.routers.see_experts(module, kind, given, output_TI, path=path)
    return output_TI


def _see(
    captured: Captured,
    layers: Sequence[tuple[LinearLayer, int]],
    x: Tensor,
    y: Tensor,
    token: Tensor,
    bias_O: Tensor | None,
) -> None:
    """Note one expert; its tokens come by rank and are kept in their order in the text."""
    source = layers[0][0].name
    if source in captured.source or not y.requires_grad:
        return
    order = token.argsort()
    captured.x[source] = x.detach()[order].to(device=captured.place, dtype=torch.bfloat16)
    captured.keep_input_gain(source, x)
    for layer, start in layers:
        captured.tokens[layer.name] = token[order].to(captured.place)
        captured.source[layer.name] = source
        rows = slice(start, start + layer.out_features)
        bias = None if bias_O is None else bias_O[rows]
        captured.keep_output(layer.name, y.detach()[order, rows], bias)
        y.register_hook(partial(_keep, captured, layer.name, rows, order))


def _keep(captured: Captured, layer: str, rows: slice, order: Tensor, grad: Tensor) -> None:
    part_TO = grad[order, rows].to(device=captured.place, dtype=torch.bfloat16)
    captured.grads.setdefault(layer, []).append(part_TO)
