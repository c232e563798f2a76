"""What is delivered: the wheel, the pins, the scripts, and the bundled model and texts."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import mofq
from mofq.demo import demo_mixture_folder, demo_model_folder
from mofq.evidence.corpora import BUNDLED_TEXT

ROOT = Path(__file__).parent.parent.parent
LANGUAGES = ["en", "pt"]
CONTEXT = 512


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run(
        [*build, "--quiet", "--wheel-dir", str(folder), str(ROOT)], check=True, capture_output=True
    )
    return zipfile.ZipFile(next(folder.glob("mofq-*.whl")))


def loaded_model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(demo_model_folder(), dtype=torch.float32).eval()


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, text: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    nats = 0.0
    for start in range(0, len(ids) - 1, CONTEXT - 1):
        window_T = ids[start : start + CONTEXT]
        logits_TV = model(input_ids=window_T[None, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(
            logits_TV.double(), window_T[1:], reduction="sum"
        ).item()
    return nats / math.log(2) / (len(text.encode()) - len(tokenizer.decode(ids[:1]).encode()))


def paragraphs(path: Path) -> list[str]:
    return path.read_text("utf-8").strip().split("\n\n")


@pytest.mark.long
def test_the_wheel_has_the_search_spaces_the_demo_and_the_type_marker(
    wheel: zipfile.ZipFile,
) -> None:
    names = set(wheel.namelist())
    spaces = {f"mofq/search_spaces/{p.name}" for p in (ROOT / "search_spaces").glob("*.yaml")}
    assert spaces
    assert spaces <= names
    sources = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "mofq").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert "mofq/py.typed" in sources
    assert "mofq/demo/model/model.safetensors" in sources
    assert "mofq/demo/mixture/model.safetensors" in sources
    assert sources <= names


def test_the_wheel_installs_nothing_outside_its_package(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"mofq", f"mofq-{mofq.__version__}.dist-info"}


def test_the_installed_version_is_the_one_the_code_tells() -> None:
    assert version("mofq") == mofq.__version__


def test_every_direct_dependency_has_a_pin_and_every_pin_is_exact() -> None:
    lines = (ROOT / "scripts" / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9a-z.]+", line)] == []
    pinned = {normalised(line.split("==")[0]) for line in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        wanted += extra
    names = {normalised(re.split(r"[\[<>=~!; ]", requirement)[0]) for requirement in wanted}
    assert names - pinned - {"mofq"} == set()


def normalised(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "scripts").glob("*.sh")))
def test_a_shell_script_parses_and_stops_at_the_first_failure(script: str) -> None:
    path = ROOT / "scripts" / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert "set -euo pipefail" in path.read_text() or script == "setup.sh"


def test_extras_are_installed_together_and_once_as_long_as_the_pins_are_the_same(
    tmp_path: Path,
) -> None:
    scripts, told = tmp_path / "scripts", tmp_path / "told"
    for folder in (scripts, tmp_path / ".venv" / "bin"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup.sh", scripts)
    shutil.copy(ROOT / "scripts" / "demo.sh", scripts)
    (scripts / "constraints.txt").write_text("torch==2.13.0\n")
    (tmp_path / "pyproject.toml").write_text("")
    for name in ("python", "mofq"):
        program = tmp_path / ".venv" / "bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >>{told}\n')
        program.chmod(0o755)

    def setup(command: str) -> list[str]:
        told.write_text("")
        subprocess.run(["bash", "-c", f"set -euo pipefail; {command}"], check=True, cwd=tmp_path)
        return [line.rpartition(" ")[2] for line in told.read_text().splitlines()]

    assert setup("source scripts/setup.sh dev docs fuzz") == [".[dev,docs,fuzz]"]
    assert setup("source scripts/setup.sh dev; source scripts/setup.sh dev fuzz") == []
    assert setup("source scripts/setup.sh dev browser") == [".[browser]"]
    # What the demo is given is no extra.
    assert setup("bash scripts/demo.sh --json") == ["--json"]
    (scripts / "constraints.txt").write_text("torch==2.14.0\n")
    assert setup("bash scripts/demo.sh -o folder") == [".", "folder"]
    assert setup("source scripts/setup.sh dev docs") == [".[dev,docs]"]


@pytest.mark.parametrize("folder", [demo_model_folder(), demo_mixture_folder()])
def test_a_bundled_model_and_its_tokenizer_are_small(folder: Path) -> None:
    files = [p for p in folder.iterdir() if p.suffix in {".safetensors", ".json"}]
    assert sum(p.stat().st_size for p in files) <= 4_000_000


def test_the_bundled_mixture_reads_text_as_the_dense_model_does() -> None:
    names = ("tokenizer.json", "tokenizer_config.json")
    dense, mixture = demo_model_folder(), demo_mixture_folder()
    assert all((dense / name).read_bytes() == (mixture / name).read_bytes() for name in names)


def test_the_bundled_mixture_uses_all_of_its_experts_as_its_card_says() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_mixture_folder(), dtype=torch.float32)
    config, parts = model.config, []
    assert config.num_experts >= 8
    assert config.num_experts_per_tok == 2
    assert [n for n in (config.hidden_size, config.moe_intermediate_size) if n % 128] == []
    tokenizer = AutoTokenizer.from_pretrained(demo_mixture_folder())
    texts = [BUNDLED_TEXT[f"demo-{one}"].read_text("utf-8") for one in LANGUAGES]
    # Some experts are of one language: each has its half.
    ids_T = torch.cat([torch.tensor(tokenizer(one)["input_ids"][:2048]) for one in texts])
    with torch.inference_mode():
        for window_T in ids_T.split(512):
            parts.append(model(window_T[None], output_router_logits=True).router_logits)
    for layer in range(config.num_hidden_layers):
        index_TK = torch.cat([one[layer] for one in parts]).topk(2).indices
        share_E = torch.bincount(index_TK.flatten(), minlength=8) / len(ids_T)
        assert share_E.min() > 0.1, layer
    card = (demo_mixture_folder() / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| \d \|((?: [\d.]+% \|)+)$", card, re.MULTILINE)
    shares = [[float(one) for one in re.findall(r"[\d.]+", row)] for row in rows]
    assert [round(sum(row)) for row in shares] == [200] * config.num_hidden_layers


def test_the_bundled_model_is_a_bfloat16_llama_with_widths_that_every_scheme_divides() -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model_folder())
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    linears = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 7 * model.config.num_hidden_layers
    assert [m.in_features for m in linears if m.in_features % 128] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_bundled_model_is_as_good_as_its_card_says(language: str) -> None:
    card = (demo_model_folder() / "README.md").read_text("utf-8")
    match = re.search(rf"^\| {language} \| ([\d.]+) \|$", card, re.MULTILINE)
    assert match is not None
    text = BUNDLED_TEXT[f"demo-{language}"].read_text("utf-8")
    assert bits_per_byte(loaded_model(), text) == pytest.approx(float(match[1]), abs=0.002)


def test_the_bundled_mixture_is_as_good_as_its_card_says() -> None:
    card = (demo_mixture_folder() / "README.md").read_text("utf-8")
    match = re.search(r"^\| en \| ([\d.]+) \| ([\d.]+) \|$", card, re.MULTILINE)
    assert match is not None
    text = BUNDLED_TEXT["demo-en"].read_text("utf-8")
    model = AutoModelForCausalLM.from_pretrained(demo_mixture_folder(), dtype=torch.float32)
    assert bits_per_byte(model.eval(), text) == pytest.approx(float(match[2]), abs=0.002)


def test_rounding_the_bundled_model_to_fewer_bits_costs_more_bits_per_byte() -> None:
    text = "\n\n".join(paragraphs(BUNDLED_TEXT["demo-en"])[:24])
    costs = [bits_per_byte(loaded_model(), text)]
    for largest_code in (7, 3, 1):
        model = loaded_model()
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                scale_O1 = module.weight.data.abs().amax(1, keepdim=True) / largest_code
                module.weight.data = (module.weight.data / scale_O1).round() * scale_O1
        costs.append(bits_per_byte(model, text))
    assert costs == sorted(costs)
    assert costs[-1] > 1.2 * costs[0]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_bundled_tokenizer_gives_a_text_back(language: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    text = BUNDLED_TEXT[f"demo-{language}"].read_text("utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(text.encode()) / len(ids) > 2.5


@pytest.mark.parametrize("language", LANGUAGES)
def test_held_out_and_calibration_text_share_no_paragraph(language: str) -> None:
    held_out = paragraphs(BUNDLED_TEXT[f"demo-{language}"])
    calibration = paragraphs(BUNDLED_TEXT[f"demo-{language}-calibration"])
    assert 28_000 <= BUNDLED_TEXT[f"demo-{language}"].stat().st_size <= 34_000
    assert BUNDLED_TEXT[f"demo-{language}-calibration"].stat().st_size >= 35_000
    assert set(held_out) & set(calibration) == set()
