"""Lets vLLM build the model of exported folders and load them. Runs where vLLM can be imported.

    python ask_vllm_loading.py REQUEST RESULT

The platform is faked as by `ask_vllm.py`. The model's class is vLLM's, built from the folder's
``config.json`` as its loader does it, with parameters on the CPU; its own ``load_weights`` gets
the folder's tensors.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import ask_vllm
from loading_record import load_folders

#: A stream beside the main one needs a GPU.
os.environ["VLLM_DISABLE_SHARED_EXPERTS_STREAM"] = "1"


def build_model(folder: Path) -> Any:
    """The model of a folder, as vLLM's loader builds it."""
    import torch
    from vllm.config import DeviceConfig, ModelConfig, VllmConfig
    from vllm.model_executor.model_loader.utils import initialize_model

    model = ModelConfig(
        model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True
    )
    config = VllmConfig(model_config=model, device_config=DeviceConfig(device="cpu"))
    with torch.device("cpu"):
        return initialize_model(config)


def become_one_gpu(compiled: list[str], capability: list[int]) -> None:
    """Fake the platform, and the groups of one process."""
    import torch

    ask_vllm._LIBRARIES = torch.library.Library("_C", "FRAGMENT")
    for activation in ("silu_and_mul", "gelu_new"):
        ask_vllm._LIBRARIES.define(f"{activation}(Tensor! out, Tensor input) -> ()")
    sys.meta_path.insert(0, ask_vllm.CompiledFinder(compiled))
    ask_vllm.Device.capability = (capability[0], capability[1])
    ask_vllm.fake_cuda()
    ask_vllm.start_groups()
    torch.set_default_dtype(torch.bfloat16)
    from vllm.distributed import parallel_state
    from vllm.model_executor.models import registry

    alone = parallel_state._EP
    alone.device_group = types.SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    alone.is_first_rank = alone.is_last_rank = True
    registry._run_in_subprocess = lambda function: function()  # where nothing would be faked


def main() -> None:
    """Answer the request."""
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    become_one_gpu(request["compiled"], request["platforms"][0]["capability"])
    found = load_folders(build_model, request["folders"])
    Path(f"{sys.argv[2]}.0").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
