"""What the exports that engines read can hold, as functions of a scheme and a fusion group.

`legality` asks here, so that nothing is measured that no export can say; the exporters of
``mofq.delivery`` ask here too, so that each rule stands once.
"""

from __future__ import annotations

from collections.abc import Callable

from mofq.engines.exports import compressed_tensors, modelopt, torchao
from mofq.model.layers import FUSION_RULES, AnyGroup
from mofq.numbers.schemes import Scheme

__all__ = ["EXPORT_PROBLEMS", "export_problem", "group_problem"]

#: What an engine reads -> why it cannot hold a quantized scheme of a group, or None. Words that
#: go after the export's name: "has no algorithm for layers in int8.channel; take …".
EXPORT_PROBLEMS: dict[str, Callable[[Scheme, AnyGroup], str | None]] = {
    "compressed-tensors": compressed_tensors.scheme_problem,
    "modelopt": modelopt.scheme_problem,
    "torchao": torchao.scheme_problem,
}

#: What the names of layers begin with that are stored as [in_features, out_features].
_TRANSPOSED = tuple(
    f"{family.body}{family.decoder}." for family in FUSION_RULES.values() if family.transposed
)


def group_problem(group: AnyGroup) -> str | None:
    """Why no export holds a fusion group in any quantized scheme, or None.

    Source: vLLM 0.33.0 ``models/gpt2.py`` loads a transposed ``weight`` alone; TensorRT-LLM 1.2.0
    ``_torch/models`` has no GPT-2; torchao 0.18.0 has no ``aten.addmm`` of a Conv1D's weight (run).
    """
    name = group.layers[0].name
    # A table does not say it: there the names of GPT-2 do.
    is_transposed = getattr(group.layers[0], "transposed", None)
    if getattr(group.layers[0], "expert", None) is not None:
        return None  # experts in one tensor are written one by one, as they are multiplied
    if is_transposed is None:
        is_transposed = name.startswith(_TRANSPOSED) and name.rpartition(".")[2].startswith("c_")
    if is_transposed:
        return (
            f"does not know weights that are stored transposed (the Conv1D of GPT-2), as {name} is"
        )
    return None


def export_problem(export: str, scheme: Scheme, group: AnyGroup) -> str | None:
    """Why an export cannot hold a fusion group in a scheme, or None.

    Args:
        export: What an engine reads: a key of ``EXPORT_PROBLEMS``.
        scheme: Any.
        group: Of a model or a table.

    Returns:
        Words that go after the export's name, with what to take instead.
    """
    if scheme.is_unquantized:
        return None
    return group_problem(group) or EXPORT_PROBLEMS[export](scheme, group)
