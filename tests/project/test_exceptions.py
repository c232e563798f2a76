"""The suggestions at the end of messages."""

from __future__ import annotations

import pytest

from mofq.exceptions import nearest_name

MANY = [f"layers.{index}.down_proj" for index in range(60)]


@pytest.mark.parametrize(
    ("name", "known", "end"),
    [
        ("vllm-hoper", ["vllm-hopper", "vllm-cpu"], " Did you mean 'vllm-hopper'?"),
        ("vllm", ["vllm-hopper", "vllm-cpu"], " Did you mean one of 'vllm-cpu', 'vllm-hopper'?"),
        ("h10", ["a100", "h100", "h200"], " Did you mean 'h100'?"),
        ("zz", ["a", "b"], " Known: a, b."),
    ],
)
def test_a_message_suggests_the_name_that_was_meant(name: str, known: list[str], end: str) -> None:
    assert nearest_name(name, known) == end


def test_a_message_does_not_list_thousands_of_layers() -> None:
    assert nearest_name("down_proj", MANY).endswith("'layers.13.down_proj' and 54 more?")
    assert nearest_name("@", MANY).endswith(" and 20 more.")
