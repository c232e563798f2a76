"""The audit of the pinned packages that needs no network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from scripts.quality.audit_advisories import is_affected, read_pins

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"

BEFORE = [{"introduced": "0"}, {"fixed": "1.5"}, {"introduced": "2.0"}, {"fixed": "2.3"}]


@pytest.mark.parametrize(
    ("events", "version", "affected"),
    [
        (BEFORE, "1.4.9", True),
        (BEFORE, "1.5", False),
        (BEFORE, "1.9", False),
        (BEFORE, "2.0", True),
        (BEFORE, "2.3rc1", True),
        (BEFORE, "2.3.post1", False),
        (BEFORE[::-1], "2.1", True),
        ([{"introduced": "0"}], "99", True),
        ([{"introduced": "1.0"}, {"last_affected": "1.2"}], "1.2", True),
        ([{"introduced": "1.0"}, {"last_affected": "1.2"}], "1.2.1", False),
        ([{"introduced": "1.0"}], "0.9", False),
    ],
)
def test_a_range_of_an_advisory_holds_the_versions_that_osv_says(
    events: list[dict[str, str]], version: str, affected: bool
) -> None:
    entry = {"ranges": [{"type": "ECOSYSTEM", "events": events}]}
    assert is_affected(entry, Version(version)) is affected
    assert is_affected({"versions": ["3.0", version], **entry}, Version(version))
    assert not is_affected({"ranges": [{"type": "GIT", "events": events}]}, Version(version))


def audit(folder: Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", SCRIPTS / "quality/audit.sh", "--advisories", folder]
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_audit_names_a_pin_that_an_advisory_means(tmp_path: Path) -> None:
    pinned = read_pins(SCRIPTS / "constraints.txt")["torch"]

    def write(name: str, last: str, **more: str) -> None:
        ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"last_affected": last}]}]
        about = {"ecosystem": "PyPI", "name": name}
        advisory = {"id": f"TEST-{last}", "modified": "2026-01-02T00:00:00Z", **more}
        advisory["affected"] = [{"package": about, "ranges": ranges}]  # type: ignore[assignment]
        (tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml").write_text(yaml.safe_dump(advisory))

    write("torch", "0.1")
    write("torch", "9999", withdrawn="2026-01-03T00:00:00Z")
    write("of-no-use-here", "9999")
    clean = audit(tmp_path)
    assert (clean.returncode, clean.stderr) == (0, "")
    assert clean.stdout.startswith("No pin is affected.\n1 advisories")
    write("Torch", str(pinned))
    write("vllm", "9999")
    found = audit(tmp_path)
    assert found.returncode == 1
    assert f"constraints.txt: torch=={pinned}: TEST-{pinned}\n" in found.stdout
    assert "serve/requirements.txt: vllm==" in found.stdout


def test_a_folder_without_advisories_is_no_clean_audit(tmp_path: Path) -> None:
    refused = audit(tmp_path)
    assert refused.returncode == 2
    assert "no advisory is in it" in refused.stderr
