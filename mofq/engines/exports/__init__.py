"""What the exports that engines read can hold, as functions of a scheme and a fusion group.

`legality` asks here, so that nothing is measured that no export can say; the exporters of
``mofq.delivery`` ask here too, so that each rule stands once.
"""

from __future__ import annotations

from collections.abc import Callable

from mofq.engines.exports import compressed_tensors, modelopt, torchao
from mofq.model.layers import AnyGroup
from mofq.numbers.schemes import Scheme

__all__ = ["EXPORT_PROBLEMS", "export_problem"]

#: What an engine reads -> why it cannot hold a quantized scheme of a group, or None. Words that
#: go after the export's name: "has no algorithm for layers in int8.channel; take …".
EXPORT_PROBLEMS: dict[str, Callable[[Scheme, AnyGroup], str | None]] = {
    "compressed-tensors": compressed_tensors.scheme_problem,
    "modelopt": modelopt.scheme_problem,
    "torchao": torchao.scheme_problem,
}


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
    return EXPORT_PROBLEMS[export](scheme, group)
