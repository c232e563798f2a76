"""The one direction of the code: who may import whom, and who never imports torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "mofq"

# The rooms, from the ground up: a room uses those before it, and its own files each other.
ROOMS = (
    "exceptions",
    "files",
    "demo",
    "numbers",
    "model",
    "engines",
    "evidence",
    "decision",
    "delivery",
    "explore",
    "api",
    "cli",
)

#: The name of a module below the package, alone in a text.
MODULE = re.compile(r"mofq(\.[a-z_0-9]+)+")

# What decides, reads headers or starts up does so without loading torch.
WITHOUT_TORCH = (
    "mofq",
    "mofq.exceptions",
    "mofq.files.*",
    "mofq.demo",
    "mofq.numbers",
    "mofq.numbers.formats",
    "mofq.numbers.numerics",
    "mofq.numbers.schemes",
    "mofq.model",
    "mofq.model.checkpoint",
    "mofq.model.checkpoint.headers",
    "mofq.model.kv_schemes",
    "mofq.model.layers",
    "mofq.model.sizes",
    "mofq.engines.*",
    "mofq.evidence",
    "mofq.evidence.fitted_space",
    "mofq.evidence.refusals",
    "mofq.evidence.spaces",
    "mofq.evidence.standard_error",
    "mofq.evidence.table.*",
    "mofq.decision.*",
    "mofq.explore.*",
    "mofq.api",
    "mofq.cli.*",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def component(module: str) -> str:
    """The room a module belongs to: ``mofq.decision.measured.study`` is in ``decision``."""
    return module.split(".")[1] if "." in module else ""


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports, also in functions and for types only."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from mofq import layers` imports mofq.model.layers.
            names = [f"mofq.{alias.name}" for alias in node.names] if module == "mofq" else [module]
            yield from ((node.lineno, name) for name in names)
        # A module's name in quotes is there to be imported: by import_module, from a registry …
        elif isinstance(node, ast.Constant) and MODULE.fullmatch(str(node.value)):
            yield node.lineno, node.value


def forbidden_imports(path: Path) -> Iterator[str]:
    own = component(module_name(path))
    for line, name in imported_modules(path):
        if name.split(".")[0] != "mofq" or name == "mofq.__version__":
            continue
        other = component(name)
        where = f"{path.relative_to(PACKAGE.parent)}:{line} imports {name}"
        if name == "mofq":
            yield f"{where}, which has names of every room"
        elif other not in ROOMS:
            yield f"{where}, which is no room"
        elif ROOMS.index(other) > ROOMS.index(own):
            yield f"{where}: {own} stands before {other}, and uses only what stands before itself"


def modules_without_torch() -> list[str]:
    existing = sorted(module_name(path) for path in PACKAGE.rglob("*.py"))
    wanted = []
    for name in WITHOUT_TORCH:
        if name.endswith(".*"):
            wanted += [m for m in existing if f"{m}.".startswith(name[:-1])]
        else:
            wanted += [m for m in existing if m == name]
    return wanted


def first_loading(modules: list[str], heavy: tuple[str, ...]) -> str:
    """Import the modules in order in a new process; what the first to load a heavy one was."""
    program = (
        "import importlib, sys\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        f"    loaded = [h for h in {heavy!r} if h in sys.modules]\n"
        "    if loaded:\n"
        "        sys.exit(f'{module} loads {loaded}')\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return run.stderr.strip() if run.returncode else ""


def test_the_rooms_are_those_of_the_package() -> None:
    found = {component(module_name(path)) for path in PACKAGE.rglob("*.py")} - {""}
    assert found == set(ROOMS)


def test_a_room_uses_only_those_before_it() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert [message for path in sorted(files) for message in forbidden_imports(path)] == []


def test_a_forbidden_import_is_seen_wherever_it_hides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mofq"
    (package / "decision" / "solvers").mkdir(parents=True)
    path = package / "decision" / "solvers" / "exact.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from ...delivery.validation import kl\n"
        "def f():\n"
        "    from mofq import delivery, model, __version__\n"
        "    import mofq.explore.page_data\n"
        "    importlib.import_module('mofq.cli.main')\n"
        "    import mofq\n"
        "STAGES = {'run': 'mofq.api.run'}\n"
        "from .greedy import solve\n"
        "from mofq.nowhere import x\n"
    )
    monkeypatch.setitem(globals(), "PACKAGE", package)
    found = sorted(
        message.split(" imports ")[1].split(",")[0] for message in forbidden_imports(path)
    )
    assert [message.split(":")[0] for message in found] == [
        "mofq",
        "mofq.api.run",
        "mofq.cli.main",
        "mofq.delivery.validation",
        "mofq.delivery",
        "mofq.explore.page_data",
        "mofq.nowhere",
    ]


def test_the_decision_layer_never_imports_torch() -> None:
    modules = modules_without_torch()
    assert "mofq.numbers.schemes" in modules
    assert first_loading(modules, ("torch", "transformers", "datasets")) == ""


def test_the_command_line_starts_without_numerical_libraries() -> None:
    modules = [m for m in modules_without_torch() if component(m) == "cli"]
    assert first_loading(modules, ("torch", "scipy", "optuna", "matplotlib", "pandas")) == ""
