"""What workers of a cluster run in tests: they import this file, which loads little."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from mofq.exceptions import SchemeError

if TYPE_CHECKING:
    from mofq.evidence.calibration.on_workers import SequencesUnit
    from mofq.evidence.measure.fill_table import Measured
    from mofq.evidence.measure.on_workers import Unit


def die_at_first(unit: Unit) -> Measured:
    """Measure, but kill the worker of one unit in the middle of the work, once."""
    from mofq.evidence.measure.on_workers import measure_unit

    assert unit.stats is not None
    mark = Path(unit.stats).parent / "killed"
    if unit.group.name.startswith("layers.1") and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return measure_unit(unit)


def die_between_layers(unit: SequencesUnit) -> int:
    """Calibrate layer by layer, but kill the worker of one unit on its way back, once."""
    from mofq.evidence.calibration import on_workers, streamed

    mark, keep = Path(unit.folder).parent / "killed", streamed.Running.keep

    def keep_and_die(running: streamed.Running, step: int, *rest: Any, **options: Any) -> None:
        keep(running, step, *rest, **options)
        if step == 2 and running.index == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(streamed.Running, "keep", keep_and_die):
        return on_workers.run_unit(unit)


def die(unit: int) -> int:
    """Kill the worker of one unit, each time."""
    if unit == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return unit


def refuse(unit: int) -> int:
    """Raise an error of mofq's for one unit."""
    if unit == 3:
        raise SchemeError("layer 3: not finite")
    return unit


def linger(unit: tuple[int, str]) -> None:
    """Stay, and write down which process this is; the first unit raises once another stays."""
    number, mark = unit
    if number:
        Path(mark).write_text(str(os.getpid()), encoding="utf-8")
        time.sleep(600)
    while not Path(mark).exists():
        time.sleep(0.1)
    raise SchemeError("another one stays")
