"""Loads the model and tokenizer of a checkpoint with transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from mofq.exceptions import CheckpointError, MofqError, how_to_install, option
from mofq.model.checkpoint.headers import CONFIG_FILE, open_checkpoint, read_json
from mofq.model.checkpoint.tensors import read_tensor
from mofq.model.dtypes import check_dtype
from mofq.model.layers.model_class import check_next_tokens

_GENERATION_FILE = "generation_config.json"
_ADAPTER_FILE = "adapter_config.json"


def load_model(
    folder: Path,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    device_map: str | None = None,
    tensors: Mapping[str, Callable[[], torch.Tensor]] | None = None,
    lazy: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a causal language model for inference: eval mode, no gradients, no key-value cache.

    The class that the config names, where it also takes images or sounds: these are not given.

    Args:
        folder: A Hugging Face model folder.
        dtype: Of the arithmetic: ``float32``, ``bfloat16`` or ``float16``.
        device: Where it runs.
        device_map: How accelerate spreads it over devices, for example ``auto``; replaces
            ``device``.
        tensors: Name -> what reads it, of every tensor of the model, in place of the weights
            that lie in the folder; the config is still the folder's, whatever it says of a
            quantization.
        lazy: The same, as objects that give what transformers takes when it slices them: of a
            model whose weights come later, tensors without values.

    Returns:
        The model; of an FP8 checkpoint, with the decoded weights. Mixtures of experts run
        their experts one by one, as ``F.linear`` calls.

    Raises:
        CheckpointError: The folder is of an embedding model, transformers cannot load it, a
            weight of the model is not there, or the package that spreads it is not installed.
    """
    check_dtype(dtype)
    options: dict[str, Any] = {}
    if device_map is not None:
        _require_accelerate(device_map)
        options["device_map"] = device_map
    logging.disable_progress_bar()
    _refuse_foreign_code(folder)
    if tensors is None and lazy is None:
        checkpoint = open_checkpoint(str(folder))
        if checkpoint.source_format is not None or checkpoint.left_over is not None:
            tensors = {n: partial(read_tensor, info) for n, info in checkpoint.tensors.items()}
    if tensors is not None:
        lazy = {name: Lazy(read) for name, read in tensors.items()}
    config = read_json(folder / CONFIG_FILE)
    check_next_tokens(config, where=str(folder / CONFIG_FILE))
    options |= {"dtype": getattr(torch, dtype), "experts_implementation": "eager"}
    model, missing = _load_quietly(folder, lazy, options)
    if missing == ["lm_head.weight"]:
        raise CheckpointError(
            f"{folder}: holds no lm_head, and {CONFIG_FILE} does not tie it to the embedding, so"
            " that it predicts no tokens, which is what mofq measures: an embedding model. `mofq"
            f" measure` without {option('stats')}, `mofq recipe uniform` and `mofq export` do"
            " without. If it is a language model, a shard is missing, or 'tie_word_embeddings' is"
            " not true."
        )
    if missing:
        raise CheckpointError(
            f"{folder}: needed {missing[0]!r} for a model of class {type(model).__name__}, found"
            f" none ({len(missing)} missing in all), and would run with what it was initialised"
            " to. A shard is missing, or config and weights are of different models."
        )
    _refuse_two_heads(model, folder)
    if (device_map is None and lazy is None) or tensors is not None:
        model = model.to(device)
    elif device_map is None:
        _move_present(model, torch.device(device))
    model.eval()
    model.requires_grad_(False)
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False
    return model


def _load_quietly(
    folder: Path,
    lazy: Mapping[str, Any] | None,
    options: Mapping[str, Any],
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of its weights that the checkpoint does not have."""
    options = {**options, "output_loading_info": True}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of what is missing is an error of ours
    try:
        if lazy is None:
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            model, loaded = auto_class(config).from_pretrained(
                folder,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                **options,
            )
        else:
            model, loaded = _load_decoded(folder, lazy, options)
    except MofqError:
        raise
    except Exception as error:  # transformers raises many kinds for invalid configs
        raise CheckpointError(
            f"{folder}: transformers cannot load the model: {_load_problem(error)}"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    return model, sorted(loaded["missing_keys"])


def _load_problem(error: Exception) -> str:
    """Why transformers cannot load a model; what transformers says asks for what is not done."""
    reason = _on_one_line(error)
    if "trust_remote_code" in reason:
        reason = "it needs code that comes with it, which is never run here."
    elif "Unrecognized configuration class" in reason:  # and 150 that it knows
        reason = (
            "it knows no class of this 'model_type' that predicts next tokens. If it is the "
            f"language model of a larger type, {CONFIG_FILE} has to name its class as "
            "'architectures', as ['Emu3ForCausalLM'] of an 'emu3_text_model'."
        )
    elif "ignore_mismatched_sizes" in reason:
        reason = (
            f"its tensors have other shapes than {CONFIG_FILE} says, as those of pruned layers."
        )
    else:
        return reason
    return (
        f"{reason} `mofq measure` without {option('stats')}, `mofq recipe uniform` and"
        " `mofq export` do without loading it."
    )


def auto_class(config: Any) -> Any:
    """What of transformers loads the class that a config names, or else the language model."""
    causal, multimodal = (
        auto._model_mapping for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM)
    )
    if type(config) not in multimodal:
        # The language models of some multimodal ones have a class, and are in neither table.
        own = getattr(transformers, (config.architectures or [""])[0], None)
        if type(config) not in causal and getattr(own, "config_class", None) is type(config):
            return own
        return AutoModelForCausalLM  # which says which types there are
    named = multimodal[type(config)].__name__ in (config.architectures or ())
    return AutoModelForMultimodalLM if named or type(config) not in causal else AutoModelForCausalLM


def build_model(config: Any) -> PreTrainedModel:
    """The model of a config, with the weights that its class draws."""
    kind = auto_class(config)
    if hasattr(kind, "from_config"):
        built: PreTrainedModel = kind.from_config(config, trust_remote_code=False)
    else:
        built = kind._from_config(config)
    return built


@dataclass(frozen=True, slots=True)
class Lazy:
    """A tensor that is read when transformers takes it, as it takes safetensors' own slices."""

    read: Callable[[], torch.Tensor]

    def __getitem__(self, key: object) -> torch.Tensor:
        return self.read()


def _load_decoded(
    folder: Path,
    lazy: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """The model with the weights that are given, and transformers' report.

    transformers could dequantize some formats of FP8 sources, each in its own way and most to
    bf16, and would quantize what a left-over config names. It gets the decoded tensors here,
    and a config that says nothing of a quantization.
    """
    config = plain_config(folder)
    with torch.device("meta"):
        kind = type(build_model(config))
    model: PreTrainedModel
    model, loaded = kind.from_pretrained(
        None, config=config, state_dict=lazy, trust_remote_code=False, **options
    )
    model.config.name_or_path = str(folder)
    if (folder / _GENERATION_FILE).is_file():
        generation = read_json(folder / _GENERATION_FILE)
        model.generation_config = GenerationConfig.from_dict(generation)
    return model, loaded


def plain_config(folder: Path) -> PreTrainedConfig:
    """The config of a folder, which says nothing of a quantization."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder.

    Raises:
        CheckpointError: There is none, or it cannot be read.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a damaged tokenizer.json is a bare one
        reason = _on_one_line(error).rstrip(".")
        if "trust_remote_code" in reason:
            reason = "it needs code that comes with it, which is never run here"
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be loaded: {reason}. "
            f"Copy tokenizer.json and tokenizer_config.json into the folder."
        ) from None
    return tokenizer


def _require_accelerate(device_map: str) -> None:
    if find_spec("accelerate") is None:
        raise CheckpointError(
            f"a device map ({device_map!r}) needs the package accelerate, which is not installed."
            f" {how_to_install('accelerate')} Or name one device instead."
        )


def _refuse_foreign_code(folder: Path) -> None:
    """Refuse what would make transformers load weights or code from elsewhere.

    An ``adapter_config.json`` names a base model, which would be loaded in place of the
    folder's own weights; an attention "implementation" with a slash is a hub repository of
    kernels, which would be fetched and run.
    """
    if (folder / _ADAPTER_FILE).exists():
        raise CheckpointError(
            f"{folder}: holds {_ADAPTER_FILE}, so that another model's weights would be loaded. "
            f"Merge the adapter into its model first, or remove the file."
        )
    config = read_json(folder / CONFIG_FILE)
    for key, value in _items_within(config):
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise CheckpointError(
                f"{folder / CONFIG_FILE}: {key!r} names code of the hub, {value!r}, which is never "
                f"run here. Remove the key."
            )


def _refuse_two_heads(model: PreTrainedModel, folder: Path) -> None:
    """Refuse a tied lm_head that the checkpoint also has of its own, and different.

    transformers would use the checkpoint's, engines tie it as the config says: what is
    measured here would not be what they serve.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    key, stated = "tie_word_embeddings", read_json(folder / CONFIG_FILE)
    decides = model.config if key in stated else model.config.get_text_config()
    is_tied = getattr(decides, key, False)
    if is_tied and head is not None and head.weight is not embedding.weight:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: 'tie_word_embeddings' is true, and the weights hold a head"
            f" that differs from the embedding; engines differ in which they use. Set it to false,"
            f" or remove the lm_head's tensor."
        )


def _move_present(model: PreTrainedModel, device: torch.device) -> None:
    """Move what has values already."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not tensor.is_meta:
                    moved = tensor.detach().to(device)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = (
                        torch.nn.Parameter(moved, requires_grad=False) if is_parameter else moved
                    )


def _items_within(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from value.items()
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _items_within(inner)


def _on_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
