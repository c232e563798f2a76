"""What libraries log and a user of mofq has no use for."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from mofq.cli.show.terminal import quiet_noise


@pytest.mark.long
def test_a_command_that_loads_a_model_writes_nothing_of_libraries(
    tiny_llama: Path, tmp_path: Path
) -> None:
    # transformers imports torchao, which logs what a machine without a GPU has no use for.
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 18, encoding="utf-8")
    code = "from mofq.cli import main; main()"
    words = ["calibrate", str(tiny_llama), "--corpus", f"en={text}", "-o", str(tmp_path / "stats")]
    options = ["--sequences", "4", "--sequence-length", "16"]
    ran = subprocess.run(
        [sys.executable, "-c", code, *words, *options], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "torchao" not in ran.stderr
    assert "Enum subclass" not in ran.stderr
    known = (str(tmp_path), "Next: mofq measure ")
    assert all(line.startswith(known) for line in ran.stderr.splitlines()), ran.stderr


def test_other_lines_of_the_same_loggers_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    quiet_noise()
    for name in ("torch.utils._pytree", "torchao"):
        logging.getLogger(name).propagate = True
        with caplog.at_level(logging.WARNING, logger=name):
            logging.getLogger(name).warning("something is wrong with %s", name)
        assert f"something is wrong with {name}" in caplog.text
    with caplog.at_level(logging.WARNING, logger="torch.utils._pytree"):
        logging.getLogger("torch.utils._pytree").warning(
            "%s is an Enum", "<enum 'KernelPreference'>"
        )
    assert "KernelPreference" not in caplog.text
