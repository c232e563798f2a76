"""Which part of a checkpoint's tensors each device loads, where several share a layer.

Runs in the venv, beside an engine's sources. The engine builds the layer of each device, with
shapes alone, and its own loaders read the tensors; what is copied is seen at torch's operators.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

#: Where a part lies in a whole: from, to.
Interval = tuple[Fraction, Fraction]


def loaded_parts(layer: Any, shard: Any, tensors: dict[str, list[int]]) -> dict[str, Any]:
    """What a device loads of the tensors of one layer of a checkpoint.

    Args:
        layer: Of that device.
        shard: What the engine calls the layer among those that it concatenates.
        tensors: Name -> shape [rows, columns], as stored.

    Returns:
        Name -> interval of the outputs, interval of the inputs; None where nothing is loaded.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Copies(TorchDispatchMode):
        """Lists what is copied from where to where; follows a whole tensor that is turned."""

        def __init__(self, stored: Any) -> None:
            super().__init__()
            self.found: list[tuple[Any, Any]] = []
            self.stored, self.turned = stored, list[Any]()

        def __torch_dispatch__(self, function: Any, _: Any, args: Any, kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.copy_.default:
                self.found.append((args[0], args[1]))
            if function is torch.ops.aten.clone.default and self.is_turned_view(args[0]):
                self.turned.append(result)
            return result

        def is_turned_view(self, tensor: Any) -> bool:
            turned = self.stored.t()
            same = (tensor.shape, tensor.stride()) == (turned.shape, turned.stride())
            return same and _shares_memory(tensor, self.stored)

    parts: dict[str, Any] = {}
    for name, (rows, columns) in tensors.items():
        is_expert = shard in ("w1", "w2", "w3")
        stem = {"w1": "w13_", "w3": "w13_", "w2": "w2_"}[shard] if is_expert else ""
        parameter = getattr(layer, stem + name)
        stored = torch.empty(rows, columns, dtype=parameter.dtype, device="meta")
        if is_expert:
            arguments: list[Any] = [stem + name, shard, 0]
        else:
            arguments = [] if shard is None else [shard]
        with Copies(stored) as copies:
            parameter.weight_loader(parameter, stored, *arguments)
        found = [
            (target, source)
            for target, source in copies.found
            if not any(_shares_memory(target, turned) for turned in copies.turned)
        ]
        assert len(found) <= 1, f"{name} is copied in {len(found)} parts"
        parts[name] = None
        for target, source in found:
            is_turned = any(_shares_memory(source, turned) for turned in copies.turned)
            known = is_turned or _shares_memory(source, stored)
            if not known or target.shape != source.shape:
                raise ValueError(f"{name} is changed while it is loaded")
            if source.numel():
                # Of a rectangle the first and the last element say where it lies.
                first = source.storage_offset()
                steps = zip(source.shape, source.stride(), strict=True)
                last = first + sum((size - 1) * stride for size, stride in steps)
                corners = [divmod(place, rows if is_turned else columns) for place in (first, last)]
                (top, left), (bottom, right) = (
                    reversed(corner) if is_turned else corner for corner in corners
                )
                parts[name] = (
                    (Fraction(top, rows), Fraction(bottom + 1, rows)),
                    (Fraction(left, columns), Fraction(right + 1, columns)),
                )
    return parts


def _shares_memory(one: Any, other: Any) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def check_shares(
    case: dict[str, Any],
    build_layer: Callable[[dict[str, Any], str, int], Any],
    share_layers: Callable[[int, int], object],
) -> None:
    """Build the share of every device and load a checkpoint into it.

    Args:
        case: ``devices``, and ``stored``: of each layer that is concatenated ``shard`` and
            ``tensors`` (name -> rows, columns).
        build_layer: Of a case, a torch device and the number of the device that holds it.
        share_layers: Makes the engine believe that it is one of several devices.

    Raises:
        ValueError: A part of a tensor is on no device, or codes and scales of a device are not
            those of the same weights.
    """
    devices = case["devices"]
    layers = [build_layer(case, "meta", rank) for rank in range(devices)]
    for stored in case["stored"]:
        shard, tensors = stored["shard"], stored["tensors"]
        held: dict[str, list[Any]] = {name: [] for name in tensors}
        for rank, layer in enumerate(layers):
            share_layers(devices, rank)
            parts = loaded_parts(layer, shard, tensors)
            for name, part in parts.items():
                held[name].append(part)
            for axis, what in enumerate(("outputs", "inputs")):
                # One row or column is for all: a scale of channels, or of a tensor.
                cut = {name: part and part[axis] for name, part in parts.items()}
                cut = {name: part for name, part in cut.items() if tensors[name][axis] > 1}
                if len(set(cut.values())) > 1:
                    words = " and ".join(f"{name} {in_words(one)}" for name, one in cut.items())
                    raise ValueError(f"device {rank} of {devices} holds other {what}: {words}")
        for name, parts_of_devices in held.items():
            for axis in (0, 1):
                require_whole(name, [part[axis] for part in parts_of_devices if part])


def in_words(part: Interval | None) -> str:
    """An interval for a message."""
    return "none" if part is None else f"{part[0]} to {part[1]}"


def require_whole(name: str, parts: list[Interval]) -> None:
    """Check that parts of a tensor cover it.

    Raises:
        ValueError: They do not.
    """
    reached = Fraction(0)
    for start, end in sorted(parts):
        if start <= reached:
            reached = max(reached, end)
    if reached != 1:
        raise ValueError(f"{name} is loaded up to {reached} of it, and the rest by no device")
