"""Runs a checkpoint in vLLM and records what it computes. Started by check.py in its venv.

    python scripts/serve/run_vllm.py REQUEST.json RECORDS.safetensors RESULT.json

Nothing of mofq is imported here. The request has `folder`, `dtype`, `windows`
(lists of token ids), `top` (log-probabilities a position), `rows` (of inputs
and outputs recorded a layer), `new_tokens`, `layers` (by their names in the
checkpoint); to measure speeds too, `repeats`; layers whose cache stays as it is,
`skip_layers`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from typing import Any

# The engine in this process, so that its layers can be watched.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def main(request_path: str, records_path: str, result_path: str) -> None:
    """Load, watch one prefill, score the windows, generate."""
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    import torch
    from safetensors.torch import save_file

    # On a processor with AMX tiles vLLM takes kernels that refuse float32. Those of every other
    # processor compute the same schemes, and are the ones that the limits were derived for.
    torch.cpu._is_amx_tile_supported = lambda: False
    from vllm import LLM

    start, cpu_start = time.monotonic(), time.process_time()
    llm = LLM(
        model=request["folder"],
        dtype=request["dtype"],
        max_model_len=max(map(len, request["windows"])) + request["new_tokens"] + 1,
        max_logprobs=request["top"],
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=False,
        disable_log_stats=True,
        language_model_only=True,  # a model with towers is asked for text
        **(
            {"kv_cache_dtype_skip_layers": request["skip_layers"]}
            if request.get("skip_layers")
            else {}
        ),
    )
    result: dict[str, Any] = {
        "load_seconds": time.monotonic() - start,
        "load_cpu_seconds": time.process_time() - cpu_start,
    }
    records: dict[str, Any] = {}
    (result["names"],) = llm.apply_model(
        lambda model: names_in_vllm(model, request.get("layers", ()))
    )
    (result["packed_modules"],) = llm.apply_model(
        lambda model: watch(model, records, request["rows"])
    )
    score(llm, request, result)
    generate(llm, request, result)
    if request.get("repeats"):
        measure_speed(llm, request, result)
    save_file(records, records_path)
    with open(result_path, "w", encoding="utf-8") as file:
        json.dump(result, file)


def names_in_vllm(model: Any, layers: Iterable[str]) -> dict[str, str]:
    """Name of a layer in the checkpoint -> in vLLM, before it is fused with others."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return {}
    renaming = mapper.get_rename_mapper()
    found = {name: renaming.map_name(f"{name}.weight") for name in layers}
    return {name: new.removesuffix(".weight") for name, new in found.items() if new}


def watch(model: Any, records: dict[str, Any], rows: int) -> dict[str, list[str]]:
    """Record the first input and output of every linear layer; say what each was fused from."""
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    def recorder(name: str) -> Any:
        def record(module: Any, inputs: Any, output: Any) -> None:
            if f"{name}.x" not in records:
                x, y = inputs[0], output[0] if isinstance(output, tuple) else output
                # vLLM's Transformers backend has a batch of one in front.
                for key, tensor in ((f"{name}.x", x), (f"{name}.y", y)):
                    records[key] = tensor.flatten(0, -2)[:rows].detach().clone().contiguous()

        return record

    def watch_head(name: str, head: Any) -> None:
        # An lm_head is no module that is called: its method is, by what makes logits.
        apply, record = head.quant_method.apply, recorder(name)

        def recorded(layer: Any, x: Any, *more: Any, **named: Any) -> Any:
            y = apply(layer, x, *more, **named)
            record(layer, (x,), y[..., : head.org_vocab_size])  # rows behind are padding
            return y

        head.quant_method.apply = recorded

    packed = getattr(model, "packed_modules_mapping", None) or {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            module.register_forward_hook(recorder(name))
        elif isinstance(module, ParallelLMHead):
            watch_head(name, module)
    return {key: list(names) for key, names in packed.items()}


def score(llm: Any, request: dict[str, Any], result: dict[str, Any]) -> None:
    """Log-probabilities of the prompts' own tokens, and of the likeliest ones."""
    from vllm import SamplingParams

    start = time.monotonic()
    outputs = llm.generate(
        [{"prompt_token_ids": window} for window in request["windows"]],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=request["top"]),
        use_tqdm=False,
    )
    seconds = time.monotonic() - start
    result["prefill_tokens_per_second"] = sum(map(len, request["windows"])) / seconds
    result["logprobs"] = [
        [
            None if position is None else {str(key): each.logprob for key, each in position.items()}
            for position in output.prompt_logprobs
        ]
        for output in outputs
    ]


def generate(llm: Any, request: dict[str, Any], result: dict[str, Any]) -> None:
    """Continue the first window, greedily."""
    from vllm import SamplingParams

    start = time.monotonic()
    (output,) = llm.generate(
        [{"prompt_token_ids": request["windows"][0]}],
        SamplingParams(max_tokens=request["new_tokens"], temperature=0, ignore_eos=True),
        use_tqdm=False,
    )
    seconds = time.monotonic() - start
    # vLLM's own text ends before bytes that are no whole character, and some random model has
    # no others.
    tokens = output.outputs[0].token_ids
    result["text"] = llm.get_tokenizer().decode(tokens, skip_special_tokens=True)
    result["decode_tokens_per_second"] = len(output.outputs[0].token_ids) / seconds


def measure_speed(llm: Any, request: dict[str, Any], result: dict[str, Any]) -> None:
    """Tokens a second of processor time, of a prompt and of a continuation: the best of some.

    Time of the processor, not of the clock: on a machine that is not idle it is the same, and
    with one thread in one process it is what the clock shows on an idle one.
    """
    from vllm import SamplingParams

    window, new_tokens = request["windows"][0], request["new_tokens"]
    for key, prompt, count in (("prefill", window, 1), ("decode", window[:2], new_tokens)):
        seconds = []
        for _ in range(request["repeats"]):
            start = time.process_time()
            llm.generate(
                [{"prompt_token_ids": prompt}],
                SamplingParams(max_tokens=count, temperature=0, ignore_eos=True),
                use_tqdm=False,
            )
            seconds.append(time.process_time() - start)
        result[f"{key}_tokens_per_second"] = (len(prompt) + count - 1) / min(seconds)


if __name__ == "__main__":
    main(*sys.argv[1:4])
