"""Opening checkpoints: safetensors headers, indexes and configs, sound and not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import TinyCheckpoint
from huggingface_hub.utils import filter_repo_objects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from transformers import AutoModelForCausalLM

from mofq.exceptions import CheckpointError
from mofq.model.checkpoint.headers import DTYPE_BITS, open_checkpoint, read_header
from mofq.model.checkpoint.weights_hash import hash_weights

GOOD_ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def file_of(header: object, data_bytes: int = 24, *, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(data_bytes)


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**GOOD_ENTRY, **changes}}


def copy_of(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_headers_agree_with_the_safetensors_library(tiny: TinyCheckpoint) -> None:
    path = tiny("qwen3_moe", fused=True) / "model.safetensors"
    with safe_open(path, "pt") as file:
        expected = {
            name: (file.get_slice(name).get_dtype(), tuple(file.get_slice(name).get_shape()))
            for name in file.keys()  # noqa: SIM118, it is not a dictionary
        }
    header = read_header(path)
    assert {name: (info.dtype, info.shape) for name, info in header.items()} == expected
    assert max(info.stop for info in header.values()) == path.stat().st_size


def test_byte_ranges_hold_the_data(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    save_file({"other": torch.zeros(5, dtype=torch.float64), "values": values}, tmp_path / "f")
    info = read_header(tmp_path / "f")["values"]
    raw = (tmp_path / "f").read_bytes()[info.start : info.stop]
    assert raw == values.numpy().tobytes()
    assert info.nbytes == 12


def test_scalars_and_empty_tensors_are_sound(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(1.0), "empty": torch.empty(0, 5)}, tmp_path / "f")
    header = read_header(tmp_path / "f")
    assert (header["scalar"].shape, header["scalar"].nbytes) == ((), 4)
    assert (header["empty"].shape, header["empty"].nbytes) == ((0, 5), 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"claim a header of 0 bytes; the file has 0"),
        (b"\x10\x00\x00", r"claim a header of 16 bytes; the file has 3.*truncated"),
        (file_of({"a": GOOD_ENTRY}, length=1000), r"claim a header of 1,000 bytes; the file has"),
        (file_of({"a": GOOD_ENTRY}, length=10**13), r"header of 10,000,000,000,000 bytes"),
        (file_of({"a": GOOD_ENTRY}, length=2**64 - 1), r"header of 18,446,744,073,709,551,615"),
        (file_of({"a": GOOD_ENTRY}, data_bytes=23), r"truncated.* needs 24 bytes .*found 23"),
        (file_of({"a": GOOD_ENTRY}, data_bytes=25), r"no tensor claims.* needs 24 .*found 25"),
        (file_of(b'{"a": '), r"the header: is not valid JSON"),
        (file_of(b"[" * 100_000), r"the header: is not valid JSON"),
        (file_of(b'{"\xff": 1}'), r"the header: is not valid JSON"),
        (file_of(b'{"\\ud800": 1}'), r"the header: is not valid JSON"),
        (file_of(b'{"a": 1' + b"0" * 5000 + b"}"), r"the header: is not valid JSON"),
        (file_of([1, 2]), r"the header: needed a JSON object, found \[1, 2\]"),
        (file_of(b'{"a": 1, "a": 2}'), r"the header: the key 'a' stands twice"),
        (file_of(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), r"key 'dtype' stands twice"),
        (file_of({"__metadata__": {"b": 1}, "a": GOOD_ENTRY}), r"'__metadata__' needs texts"),
        (file_of({"a": 7}), r"tensor 'a': needed dtype, shape and data_offsets, found 7"),
        (file_of({"a": {"dtype": "F32"}}), r"tensor 'a': needed dtype, shape and data_offsets"),
        (file_of(entry(dtype="BF17")), r"unknown dtype 'BF17'. Did you mean 'BF16'"),
        (file_of(entry(dtype=["F32"])), r"tensor 'a': unknown dtype \['F32'\]"),
        (file_of(entry(shape=[2, -3])), r"integers >= 0, found \[2, -3\]"),
        (file_of(entry(shape=[True, 6])), r"integers >= 0, found \[True, 6\]"),
        (file_of(entry(shape="23")), r"integers >= 0, found '23'"),
        (file_of(entry(data_offsets=[24, 0])), r"0 <= begin <= end, found \[24, 0\]"),
        (file_of(entry(data_offsets=[0, 24, 48])), r"0 <= begin <= end"),
        (file_of(entry(data_offsets=[0.0, 24.0])), r"0 <= begin <= end"),
        (file_of(entry(shape=[2, 4])), r"F32 of shape \[2, 4\] needs 32 bytes, .*give it 24"),
        (file_of(entry(dtype="F16")), r"F16 of shape \[2, 3\] needs 12 bytes, .*give it 24"),
        (file_of(entry(dtype="F4", shape=[47])), r"F4 of shape \[47\] needs 23 bytes and 4 bits"),
        (file_of(entry(shape=[10**12, 3])), r"needs 12,000,000,000,000 bytes"),
        (file_of(entry(shape=[2**62] * 64)), r"F32 of shape .* needs [0-9,]+ bytes"),
        (file_of(entry(shape=[2**62] * 65)), r"at most 64 integers >= 0, found"),
        (file_of(entry(shape=[2**63])), r"at most 64 integers >= 0, found"),
        (
            file_of({"a": GOOD_ENTRY, "b": {**GOOD_ENTRY, "data_offsets": [20, 44]}}, 44),
            r"tensor 'b' overlaps 'a': needed it to begin at byte 24 .*found 20",
        ),
        (
            file_of({"a": GOOD_ENTRY, "b": {**GOOD_ENTRY, "data_offsets": [32, 56]}}, 56),
            r"tensor 'b' leaves a hole after 'a': .*byte 24 .*found 32",
        ),
        (file_of(entry(data_offsets=[8, 32]), 32), r"'a' leaves a hole after the header"),
    ],
)
def test_a_damaged_header_is_refused_with_file_and_tensor(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path))
    with pytest.raises(SafetensorError):
        safe_open(path, "pt").__enter__()


@settings(max_examples=300, derandomize=True, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), stop=st.integers(0, 10_000))
@pytest.mark.long
def test_what_is_accepted_after_a_changed_byte_the_safetensors_library_accepts_too(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, stop: int
) -> None:
    good = save({"weight": torch.ones(3, 4), "bias": torch.ones(3, dtype=torch.bfloat16)})
    damaged = bytearray(good)
    # Almost all of it is header; one in ten files is cut short.
    damaged[position % len(good)] = value
    raw = bytes(damaged[: stop % len(good)] if stop % 10 == 0 else damaged)
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except CheckpointError as error:
        assert str(path) in str(error)  # noqa: PT017, an accepted file is as good
        return
    with safe_open(path, "pt") as file:
        assert {name: list(info.shape) for name, info in header.items()} == {
            name: file.get_slice(name).get_shape()
            for name in file.keys()  # noqa: SIM118, it is not a dictionary
        }


@settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    entries=st.dictionaries(
        st.text(max_size=3),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from([*DTYPE_BITS, "F31"]),
                "shape": st.lists(st.integers(-1, 4), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2),
            }
        ),
        max_size=3,
    ),
    data_bytes=st.integers(0, 40),
)
def test_any_header_is_read_or_refused_and_what_is_read_tiles_the_data(
    tmp_path: Path, entries: dict[str, Any], data_bytes: int
) -> None:
    path = tmp_path / "any.safetensors"
    path.write_bytes(file_of(entries, data_bytes))
    try:
        header = read_header(path)
    except CheckpointError:
        return
    assert sum(info.nbytes for info in header.values()) == data_bytes


def test_a_checkpoint_opens_from_one_file_and_from_shards(tiny: TinyCheckpoint) -> None:
    one, shards = tiny("llama"), tiny("llama", shard_size="100KB")
    left, right = open_checkpoint(str(one)), open_checkpoint(str(shards))
    assert left.name == "llama"
    assert left.config["model_type"] == "llama"
    assert left.tensors.keys() == right.tensors.keys()
    assert len({info.file for info in right.tensors.values()}) > 2
    assert left.index_sha256 == right.index_sha256


def test_the_index_hash_changes_with_a_shape_a_dtype_or_the_config(tiny: TinyCheckpoint) -> None:
    variants = [
        tiny("llama"),
        tiny("llama", dtype=torch.float16),
        tiny("llama", intermediate_size=384),
        tiny("llama", rms_norm_eps=1e-4),
    ]
    assert len({open_checkpoint(str(folder)).index_sha256 for folder in variants}) == 4


def test_the_index_hash_changes_with_the_dtype_of_the_tensors_alone(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = copy_of(tiny("llama", dtype=torch.float16), tmp_path / "model")
    shutil.copy(tiny("llama") / "config.json", folder)
    left, right = open_checkpoint(str(folder)), open_checkpoint(str(tiny("llama")))
    assert left.config == right.config
    assert left.index_sha256 != right.index_sha256


def test_the_index_hash_does_not_change_with_the_weights(tiny: TinyCheckpoint) -> None:
    left, right = tiny("llama"), tiny("llama", seed=1)
    assert open_checkpoint(str(left)).index_sha256 == open_checkpoint(str(right)).index_sha256


def test_a_wrong_path_suggests_the_nearest_folder_beside_it(tiny_llama: Path) -> None:
    wrong = tiny_llama.parent / "lama"
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(wrong))
    assert str(caught.value) == f"{wrong}: no such folder. Did you mean {str(tiny_llama)!r}?"


def test_a_wrong_folder_high_up_in_the_path_is_the_one_corrected(tiny_llama: Path) -> None:
    near = tiny_llama.parent
    wrong = near.parent / f"{near.name}x" / "llama"
    with pytest.raises(CheckpointError, match="Did you mean") as caught:
        open_checkpoint(str(wrong))
    assert str(caught.value).endswith(f"Did you mean {str(near)!r}?")


@pytest.mark.parametrize("model", ["/" + "x" * 5000, "nul\x00byte", "./nothing/like/it"])
def test_a_path_that_cannot_exist_is_an_error_like_any_other(model: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(model)


def test_a_hub_id_that_is_not_at_hand_offline_says_so() -> None:
    with pytest.raises(CheckpointError, match=r"Nobody/nothing: no such folder, and as a hub id"):
        open_checkpoint("Nobody/nothing")


def test_a_hub_id_is_fetched_without_pickles_and_gives_the_model_its_name(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(model: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert model == "org/Some-Model-1.7B"
        names = ["model.safetensors", "pytorch_model.bin", "original/model.safetensors"]
        kept = list(
            filter_repo_objects(
                names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        assert kept == ["model.safetensors"]
        return str(tiny_llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    checkpoint = open_checkpoint("org/Some-Model-1.7B")
    assert (checkpoint.name, checkpoint.folder) == ("org/Some-Model-1.7B", tiny_llama)


def test_a_file_in_place_of_a_folder_names_the_folder(tiny_llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found a file. Give") as caught:
        open_checkpoint(str(tiny_llama / "model.safetensors"))
    assert repr(str(tiny_llama)) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("model-Q4_K_M.gguf", "GGUF", "Give the Hugging Face folder that it was converted from"),
        (
            "adapter_config.json",
            '{"peft_type": "LORA", "base_model_name_or_path": "org/Base"}',
            "adapter of 'org/Base': merge the two",
        ),
        ("adapter_config.json", "{}", "adapter of its base model: merge the two"),
        ("params.json", "{}", "Give the version for transformers"),
        ("notes.txt", "", "Give the folder that holds config.json"),
    ],
)
def test_a_folder_of_another_kind_says_what_it_is(
    name: str, content: str, remedy: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=remedy):
        open_checkpoint(str(tmp_path))


def test_a_gguf_file_is_no_hint_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("GGUF")
    with pytest.raises(CheckpointError, match=r"a file. GGUF is what llama.cpp runs"):
        open_checkpoint(str(tmp_path / "model.gguf"))


def test_a_folder_above_the_model_names_the_model(tiny_llama: Path) -> None:
    with pytest.raises(CheckpointError, match=r"needed config.json, found none") as caught:
        open_checkpoint(str(tiny_llama.parent))
    assert f"Did you mean {str(tiny_llama)!r}?" in str(caught.value)


def remove_shard(folder: Path) -> None:
    sorted(folder.glob("model-*"))[1].unlink()


def truncate_shard(folder: Path) -> None:
    shard = sorted(folder.glob("model-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])


def edit_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return edit


def point_at(file: object) -> Callable[[Path], None]:
    return edit_index(lambda index: index["weight_map"].update({"model.norm.weight": file}))


def only_a_pickle(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def stand_twice(*, change: float) -> Callable[[Path], object]:
    """A tensor of the first shard stands in the last one too."""

    def edit(folder: Path) -> None:
        first, *_, last = sorted(folder.glob("model-*"))
        tensors = load_file(first)
        name = min(tensors)
        save_file({**load_file(last), name: tensors[name] + change}, last)

    return edit


def shards_without_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def one_file_of_another_name(folder: Path) -> None:
    into_one_file(folder)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "model.safetensors.index.json").unlink()


def into_one_file(folder: Path) -> None:
    """All weights in one file, and an index that says so."""
    tensors = {}
    for shard in sorted(folder.glob("model-*")):
        tensors |= load_file(shard)
        shard.unlink()
    save_file(tensors, folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def list_a_buffer(index: dict[str, Any]) -> None:
    shards = index["weight_map"].values()
    index["weight_map"]["model.layers.0.self_attn.rotary_emb.inv_freq"] = min(shards)


@pytest.mark.parametrize(
    "change",
    [
        into_one_file,
        stand_twice(change=0.0),
        edit_index(lambda index: index["weight_map"].pop("model.norm.weight")),
        edit_index(list_a_buffer),
    ],
)
def test_what_transformers_and_engines_load_whole_is_read(
    tiny: TinyCheckpoint, tmp_path: Path, change: Callable[[Path], object]
) -> None:
    source = tiny("llama", shard_size="100KB")
    folder = copy_of(source, tmp_path / "model")
    change(folder)
    before, after = (open_checkpoint(str(one)) for one in (source, folder))
    assert after.index_sha256 == before.index_sha256
    assert hash_weights(after) == hash_weights(before)
    _, loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loaded.values())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_shard, r"model-00002-of-.*: model.safetensors.index.json needs this shard"),
        (truncate_shard, r"model-00002-of-.*: the file is truncated: its header needs"),
        (point_at("../../etc/passwd"), r"'model.norm.weight' is said to be in '../../etc/passwd'"),
        (point_at("/etc/passwd"), r"said to be in '/etc/passwd'; needed the plain name"),
        (point_at("..\\weights"), r"needed the plain name"),
        (point_at(".."), r"said to be in '..'; needed the plain name"),
        (point_at(""), r"said to be in ''; needed the plain name"),
        (point_at(7), r"said to be in 7; needed the plain name"),
        (point_at("config.json"), r"config.json: the first 8 bytes claim a header"),
        (point_at("model-00001-of-00001.safetensors"), r"needs this shard, and it is missing"),
        (edit_index(lambda index: index.pop("weight_map")), r"needed a 'weight_map'"),
        (edit_index(lambda index: index.update(weight_map=[])), r"needed a 'weight_map'"),
        (stand_twice(change=1.0), r"holds tensor '.*', and model-00001-of-.* another one of this"),
        (
            lambda folder: shutil.move(sorted(folder.glob("model-*"))[0], folder / "x.safetensors"),
            r"model-00001-of-.*: model.safetensors.index.json needs this shard",
        ),
        (shards_without_index, r"found neither. 'model-00001-of-.*' is one of \d+ shards; fetch"),
        (one_file_of_another_name, r"If 'weights.safetensors' holds all weights, name it model.s"),
        (
            edit_index(
                lambda index: index["weight_map"].update(
                    extra=index["weight_map"]["model.norm.weight"]
                )
            ),
            r"tensor 'extra' is needed in 'model-.*', and is not there",
        ),
        (
            lambda folder: shutil.copy(
                sorted(folder.glob("model-*"))[0], folder / "model.safetensors"
            ),
            r"found both model.safetensors and model.safetensors.index.json",
        ),
        (only_a_pickle, r"needed model.safetensors or .*pytorch_model.bin is a pickle"),
        (lambda folder: (folder / "config.json").unlink(), r"needed config.json, found none"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            r"config.json: is not valid JSON",
        ),
        (lambda folder: (folder / "config.json").write_text("[]"), r"needed a JSON object"),
        (
            lambda folder: (folder / "config.json").write_text('{"a": 1, "a": 2}'),
            r"key 'a' stands twice",
        ),
    ],
)
def test_a_damaged_folder_is_one_clear_message(
    tiny: TinyCheckpoint, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = copy_of(tiny("llama", shard_size="100KB"), tmp_path / "model")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(folder))
    assert str(caught.value).startswith(str(folder))


def test_nothing_outside_the_folder_is_opened_for_an_index_that_points_there(
    tiny: TinyCheckpoint, tmp_path: Path
) -> None:
    folder = copy_of(tiny("llama", shard_size="100KB"), tmp_path / "model")
    outside = tmp_path / "outside.safetensors"
    save_file({"model.norm.weight": torch.ones(128)}, outside)
    point_at("../outside.safetensors")(folder)
    with pytest.raises(CheckpointError, match="Do not trust this checkpoint"):
        open_checkpoint(str(folder))
