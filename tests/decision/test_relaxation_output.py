"""HiGHS is kept silent, and the standard output is afterwards what it was."""

from __future__ import annotations

import os
import sys
from threading import Event, Thread

import pytest

from mofq.decision.relaxation import silent


def test_two_threads_that_solve_leave_the_standard_output_as_it_was() -> None:
    before = os.fstat(1)
    entered, leave = Event(), Event()

    def first() -> None:
        with silent():
            entered.set()
            leave.wait(10)

    def second() -> None:
        entered.wait(10)
        with silent():
            assert leave.is_set()

    threads = [Thread(target=first), Thread(target=second)]
    for thread in threads:
        thread.start()
    entered.wait(10)
    threads[1].join(0.2)  # time to begin before the first one ends, were it let
    leave.set()
    for thread in threads:
        thread.join()
    assert os.path.samestat(before, os.fstat(1))


def test_a_program_without_a_standard_output_solves_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with silent():
        pass
