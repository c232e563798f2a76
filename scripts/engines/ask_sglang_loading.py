"""Lets SGLang build the model of exported folders and load them. Runs where SGLang can be imported.

    python ask_sglang_loading.py REQUEST RESULT

The platform is faked as by `ask_sglang.py`. The class is the one that SGLang's registry has for
the architecture, built as its loader does it (``model_loader/loader.py``, ``_initialize_model``;
the ``quantization_config`` with the class's ``packed_modules_mapping``, as ``get_quant_config``
does it), with parameters on the CPU; its own ``load_weights`` gets the folder's tensors.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import ask_sglang
from loading_record import load_folders, read_config

#: Architecture -> module of SGLang. Importing the whole registry would import every model.
MODULES = {
    "DeepseekV3ForCausalLM": "deepseek_v2",
    "GPT2LMHeadModel": "gpt2",
    "Glm4MoeForCausalLM": "glm4_moe",
    "MixtralForCausalLM": "mixtral",
    "OlmoeForCausalLM": "olmoe",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}


class AtOnce(concurrent.futures.Executor):
    """Runs in the calling thread, where what is loaded is followed."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(function(*args, **kwargs))
        return future


class Stream:
    """Stands for a stream of a GPU."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


def become_one_gpu(capability: list[int]) -> None:
    """Fake the platform, and the parallel context of one process."""
    import torch
    import transformers  # noqa: F401  # looks for torchvision, so before it seems to be there

    sys.meta_path.insert(0, ask_sglang.AbsentFinder())
    ask_sglang.Device.capability = (capability[0], capability[1])
    ask_sglang.fake_cuda()
    torch.set_default_dtype(torch.bfloat16)
    torch.cuda.Stream, torch.cuda.set_device = Stream, lambda _: None
    ask_sglang.start_context()
    concurrent.futures.ThreadPoolExecutor = AtOnce  # type: ignore[assignment,misc]


def build_model(folder: Path) -> Any:
    """The model of a folder, as SGLang's loader builds it."""
    import torch
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )
    from transformers import AutoConfig

    stored = read_config(folder)
    name = stored["architectures"][0]
    model_class = getattr(importlib.import_module(f"sglang.srt.models.{MODULES[name]}"), name)
    quantization = stored.get("quantization_config")
    if quantization is not None:
        packed = getattr(model_class, "packed_modules_mapping", {})
        quantization = CompressedTensorsConfig.from_config(
            {**quantization, "packed_modules_mapping": packed}
        )
    with torch.device("cpu"):
        model = model_class(config=AutoConfig.from_pretrained(folder), quant_config=quantization)
    if hasattr(model, "post_load_weights"):
        model.post_load_weights = lambda *_, **__: None  # runs kernels on what was read
    return model


def main() -> None:
    """Answer the request."""
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    become_one_gpu(request["platforms"][0]["capability"])
    found = load_folders(build_model, request["folders"])
    Path(f"{sys.argv[2]}.0").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
