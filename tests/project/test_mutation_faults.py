"""The faults that ``mutation_check.py`` plants can be planted, and the tests they name exist."""

from __future__ import annotations

from pathlib import Path

from scripts.quality.mutation_fault import find_fault, find_tests, read_sources
from scripts.quality.mutation_faults import FAULTS

ROOT = Path(__file__).parents[2]


def test_the_words_of_every_fault_stand_once_in_the_source() -> None:
    sources = read_sources(ROOT)
    misplaced = [fault for fault in FAULTS if find_fault(fault, sources) is None]
    assert not misplaced
    assert all(fault.new != fault.old for fault in FAULTS)


def test_the_tests_of_every_fault_exist() -> None:
    assert all(find_tests(fault, ROOT) for fault in FAULTS)


def test_no_fault_is_there_twice() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    assert len({(fault.old, fault.new) for fault in FAULTS}) == len(FAULTS)
