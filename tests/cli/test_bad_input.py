"""Files from strangers, damaged in every way that we thought of: one message, exit code 1.

Each kind of damage, and the tests that make it. All but those of a module alone run the
command line, whose ``refused`` allows one line on stderr, no traceback, and exit code 1.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import DEMO, Measured, mofq, ok, refused, tree
from families import copy_with_tensors
from safetensors.torch import load_file

from mofq.model.checkpoint.headers import read_header

TESTS = Path(__file__).parent.parent

#: Kind of damage -> where it is tested: ``file::test``, this file where none is named.
DAMAGE = {
    "missing weight": "test_loading.py::test_a_weight_that_the_model_lacks_is_refused",
    "truncated header": "test_damaged_weights_are_refused",
    "truncated data": "test_cli_errors.py::test_a_truncated_file_is_named",
    "bit flips in the header": "test_a_flipped_bit_is_refused_or_harmless",
    "bit flips in the data": "test_a_flipped_bit_is_refused_or_harmless",
    "a header of terabytes": "test_damaged_weights_are_refused",
    "an index that leads out of its folder": "test_an_index_that_leads_elsewhere_is_refused",
    "duplicate keys": "test_a_repeated_key_is_refused_wherever_it_stands",
    "wrong dtypes": "test_a_weight_of_another_dtype_is_refused",
    "NaN and infinity": "test_weights_that_are_not_finite_are_refused_by_every_reader",
    "rows of zeros": "test_rows_of_zeros_are_measured_exported_and_stay_zeros",
    "a tensor of zero rows": "test_a_tensor_without_elements_is_refused",
    "a tensor of zero elements": "test_a_tensor_without_elements_is_refused",
    "an unknown architecture": "test_a_config_of_another_model_is_refused",
    "a config that disagrees": "test_a_config_of_another_model_is_refused",
    "a split fusion group": "test_cli_errors.py::test_an_edited_recipe_is_checked_in_full",
    "missing layers": "test_a_recipe_of_other_layers_is_refused",
    "extra layers": "test_a_recipe_of_other_layers_is_refused",
    "foreign hashes": "test_cli_errors.py::test_a_recipe_of_another_model_is_refused",
    "foreign weights": "test_weights_hash.py::test_a_fine_tune_does_not_pass_as_its_base",
    "foreign statistics": "test_cli_errors.py::test_stats_of_another_model_are_refused",
    "YAML bombs": "test_yaml_that_is_more_than_values_is_refused",
    "YAML tags": "test_yaml_that_is_more_than_values_is_refused",
    "a half last line of a table": "test_half_a_last_line_is_left_out_and_no_other_half",
    "tokens outside the vocabulary": "test_a_tokenizer_of_a_larger_vocabulary_is_refused",
    "empty text": "test_cli_errors.py::test_a_text_that_is_none_is_refused",
    "text shorter than a sequence": "test_cli_errors.py::test_a_text_that_is_none_is_refused",
    "a damaged tokenizer": "test_a_damaged_tokenizer_is_refused",
    "names that a terminal obeys": "test_security.py::test_names_that_a_terminal_obeys_are_refused",
    "an adapter in the folder": "test_security.py::test_a_folder_that_names_other_code_is_refused",
}

TEXT = ("--text", "demo-en", "--tokens", "128", "--sequence-length", "64")
SHORT = ("--corpus", "en=demo-en-calibration", "--sequences", "4", "--sequence-length", "64")


def test_every_kind_of_damage_has_its_test() -> None:
    for damage, place in DAMAGE.items():
        file, _, name = place.rpartition("::")
        text = (next(TESTS.rglob(file or Path(__file__).name))).read_text("utf-8")
        assert f"\ndef {name}(" in text, damage


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model, to be damaged."""
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def readers(model: Path, out: Path) -> list[tuple[str | Path, ...]]:
    """Commands that look at headers, at weights, and at everything."""
    out.mkdir(exist_ok=True)
    recipe = out.with_name("recipe.yaml")
    if not recipe.exists():
        ok("recipe", "uniform", DEMO, "int4.g32", "-o", recipe)
    return [
        ("inspect", model),
        ("measure", model, "--space", "w8a8", "-o", out / "table.jsonl"),
        ("export", model, recipe, "--to", "compressed-tensors", "-o", out / "exported"),
        ("calibrate", model, *SHORT, "-o", out / "stats"),
        ("validate", model, recipe, *TEXT, "-o", out / "validation.json"),
    ]


def refused_by_all(model: Path, out: Path, *words: str) -> None:
    for arguments in readers(model, out):
        message = refused(*arguments)
        for word in words:
            assert word in message, (arguments[0], message)
    assert tree(out) == {}


def header_length(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:5], ("the first 8 bytes claim", "Fetch the file again")),
        (lambda data: data[:1000], ("the first 8 bytes claim a header", "truncated")),
        (lambda data: (10**12).to_bytes(8, "little") + data[8:], ("1,000,000,000,000 bytes",)),
        (lambda data: b"\xff" * 8 + data[8:], ("18,446,744,073,709,551,615 bytes",)),
        (lambda data: b"", ("truncated or no safetensors file",)),
        (lambda data: b"\x80\x04" + data[2:], ("is not valid JSON", "Fetch the file again")),
        (lambda data: data + b"more", ("bytes that no tensor claims",)),
    ],
)
def test_damaged_weights_are_refused(
    damage: Callable[[bytes], bytes], words: tuple[str, ...], model: Path, tmp_path: Path
) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    refused_by_all(model, tmp_path / "out", str(weights), *words)


@pytest.mark.long
def test_a_flipped_bit_is_refused_or_harmless(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    good = weights.read_bytes()
    length = header_length(weights)
    generator = random.Random(0)
    places = [generator.randrange(8 * length) for _ in range(40)]
    refusals = 0
    for number, place in enumerate(places):
        damaged = bytearray(good)
        damaged[place // 8] ^= 1 << place % 8
        weights.write_bytes(damaged)
        ran = mofq("measure", model, "--space", "w8a8", "-o", tmp_path / f"{number}.jsonl")
        assert ran.code in (0, 1)
        assert "Traceback" not in ran.err
        refusals += ran.code
        if ran.code:
            assert str(model) in ran.err
    assert refusals > 30  # a digit of a name that nothing needs may change
    # A weight's bits carry no redundancy: what a flip in them can be is another weight, which
    # weights_sha256 samples, or no number.
    weights.write_bytes(good)
    info = read_header(weights)["model.layers.4.self_attn.o_proj.weight"]
    damaged = bytearray(good)
    damaged[info.start + 101] |= 0x7F  # with the bit below, the exponent of infinities
    damaged[info.start + 100] |= 0x80
    weights.write_bytes(damaged)
    message = refused("measure", model, "--space", "w8a8", "-o", tmp_path / "data.jsonl")
    assert "model.layers.4.self_attn.o_proj: needed finite weights" in message
    assert "at [0, 50]" in message


@pytest.mark.parametrize("target", ["../../etc/passwd", "/etc/passwd", "..", "a/b", "a\\b"])
def test_an_index_that_leads_elsewhere_is_refused(target: str, model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    weight_map["model.norm.weight"] = target
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    where = f"{index}: tensor 'model.norm.weight' is said to be in {target!r}"
    refused_by_all(model, tmp_path / "out", where, "Do not trust this checkpoint")


def test_a_repeated_key_is_refused_wherever_it_stands(
    model: Path, measured: Measured, tmp_path: Path
) -> None:
    weights, config = model / "model.safetensors", model / "config.json"
    data, text = weights.read_bytes(), config.read_text()
    length = header_length(weights)
    header = data[8:length].rstrip().replace(b"{", b'{"__metadata__":{},', 1)
    weights.write_bytes(len(header).to_bytes(8, "little") + header + data[length:])
    assert "the header: the key '__metadata__' stands twice" in refused("inspect", model)
    weights.write_bytes(data)
    config.write_text(text.replace("{", '{"model_type": "opt",', 1))
    message = refused("inspect", model)
    assert f"{config}: the key 'model_type' stands twice" in message
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(measured.recipe.read_text() + "version: 1\n")
    export = ("--to", "compressed-tensors", "-o", tmp_path / "exported")
    message = refused("export", DEMO, recipe, *export)
    assert "the key 'version' stands twice; keep one" in message
    table = tmp_path / "table.jsonl"
    table.write_text(measured.table.read_text().replace("{", '{"kind":"row",', 1))
    message = refused("search", table, "--max-bits", "5", "-o", tmp_path / "r.yaml")
    assert f"{table}, line 1: the key 'kind' stands twice" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.int16, torch.int32])
def test_a_weight_of_another_dtype_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"

    def convert(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name].to(dtype)

    folder = copy_with_tensors(Path(DEMO), tmp_path / "model", convert)
    for arguments in readers(folder, tmp_path / "out")[:3]:
        message = refused(*arguments)
        assert str(folder) in message
        assert name in message
        assert "needs dtype BF16, F16, F32, found" in message


@pytest.mark.long
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_every_reader(
    value: float, tmp_path: Path
) -> None:
    name = "model.layers.3.mlp.up_proj.weight"

    def spoil(tensors: dict[str, Any]) -> None:
        tensors[name][7, 9] = value

    folder = copy_with_tensors(Path(DEMO), tmp_path / "model", spoil)
    out = tmp_path / "out"
    _, *commands = readers(folder, out)
    for arguments in commands:
        if "recipe.yaml" in str(arguments[2]):
            recipe = tmp_path / "own.yaml"
            ok("recipe", "uniform", folder, "int4.g32", "-o", recipe)
            arguments = (*arguments[:2], recipe, *arguments[3:])
        message = refused(*arguments)
        if arguments[0] != "validate":  # which runs the original first: its logits say so
            assert "layers.3.mlp.up_proj" in message, message
    assert not (out / "exported").exists()
    assert not (out / "validation.json").exists()


@pytest.mark.long
def test_rows_of_zeros_are_measured_exported_and_stay_zeros(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"

    def clear(tensors: dict[str, Any]) -> None:
        tensors[name][:] = 0
        tensors["model.layers.0.mlp.down_proj.weight"][3] = 0

    folder = copy_with_tensors(Path(DEMO), tmp_path / "model", clear)
    space, table, recipe = (tmp_path / n for n in ("space.yaml", "t.jsonl", "recipe.yaml"))
    space.write_text("version: 1\nschemes: [int4.g32, int4.g32.asym, fp8_e4m3.channel, nvfp4]\n")
    ok("measure", folder, "--space", space, "-o", table)
    for scheme in ("int4.g32", "int8.channel+int8.token", "nvfp4"):
        ok("recipe", "uniform", folder, scheme, "-o", recipe)
        exported = tmp_path / scheme
        ok("export", folder, recipe, "--to", "compressed-tensors", "-o", exported)
        assert ok("validate", folder, exported, *TEXT, "--json").json["enforced"] is True


@pytest.mark.parametrize("shape", [(0, 128), (128, 0), (0,)])
def test_a_tensor_without_elements_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"

    def empty(tensors: dict[str, Any]) -> None:
        tensors[name] = torch.zeros(shape, dtype=torch.bfloat16)

    folder = copy_with_tensors(Path(DEMO), tmp_path / "model", empty)
    for arguments in readers(folder, tmp_path / "out"):
        message = refused(*arguments)
        assert name in message
        assert f"found {list(shape)}" in message


@pytest.mark.long
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"model_type": "mamba"}, ("'backbone.layers' of a 'mamba'", "different models")),
        ({"model_type": None}, ("needed a 'model_type'", "found None")),
        ({"num_hidden_layers": 7}, ("needed 7 decoder layers", "found 6")),
        ({"hidden_size": 256}, ("of shape [128, 256] by config.json, found [128, 128]",)),
        ({"intermediate_size": -1}, ("'intermediate_size' needs a positive integer",)),
        ({"max_position_embeddings": "many"}, ("needs a positive integer", "found 'many'")),
        ({"max_position_embeddings": -5}, ("'max_position_embeddings' needs", "found -5")),
        ({"architectures": ["LlamaForSequenceClassification"]}, ("no causal language model",)),
    ],
)
def test_a_config_of_another_model_is_refused(
    edit: dict[str, Any], words: tuple[str, ...], model: Path, tmp_path: Path
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **edit}))
    refused_by_all(model, tmp_path / "out", str(model), *words)
    run = ("run", model, "--space", "w8a8", "--max-bits", "8", "-o", tmp_path / "run")
    message = refused(*run)
    assert all(word in message for word in words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("    layers: [model.layers.0.self_attn.o_proj]\n", None, ("o_proj' is missing",)),
        (
            "layers: [model.layers.0.self_attn.o_proj]",
            "layers: [model.layers.0.self_attn.o_proj, model.layers.0.self_attn.extra]",
            ("no linear layer 'model.layers.0.self_attn.extra'", "Did you mean"),
        ),
        (
            "layers: [model.layers.0.self_attn.o_proj]",
            "layers: [model.layers.0.self_attn.o_proj, model.layers.1.self_attn.o_proj]",
            ("stands in groups", "keep one"),
        ),
    ],
)
def test_a_recipe_of_other_layers_is_refused(
    old: str, new: str | None, words: tuple[str, ...], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    ok("recipe", "uniform", DEMO, "int4.g32", "-o", recipe)
    text = recipe.read_text()
    if new is None:
        start = text.index("  layers.0.attn.o:")
        changed = text[:start] + text[text.index(old) + len(old) :]
    else:
        changed = text.replace(old, new, 1)
    assert changed != text
    recipe.write_text(changed)
    out = tmp_path / "out"
    out.mkdir()
    for arguments in readers(Path(DEMO), out):
        if arguments[0] in ("export", "validate"):
            message = refused(*arguments)
            assert all(word in message for word in words), message
    assert tree(out) == {}


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "anchors and aliases are not accepted"),
        ("version: !!python/object/apply:os.system ['touch pwned']\n", "is not accepted"),
        ("version: !!int '1'\n", "is not accepted"),
        ("<<: {version: 1}\n", "unknown key '<<'"),
        ("version: 1\n---\nversion: 1\n", "more than one YAML document"),
        ("version: [" + "[" * 500 + "]" * 501, "nests deeper than"),
        ("version: 1\x00", "not valid YAML"),
        ("", "is empty"),
        ("version: 99\n", "version 99"),
        ("- 1\n", "must be "),
    ],
)
def test_yaml_that_is_more_than_values_is_refused(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, out = tmp_path / "file.yaml", tmp_path / "out"
    file.write_text(text)
    for arguments in (
        ("export", DEMO, file, "--to", "compressed-tensors", "-o", out),
        ("measure", DEMO, "--space", file, "-o", out),
    ):
        message = refused(*arguments)
        assert words in message, message
        assert str(file) in message
    assert [path.name for path in tmp_path.iterdir()] == ["file.yaml"]


def test_half_a_last_line_is_left_out_and_no_other_half(measured: Measured, tmp_path: Path) -> None:
    table, recipe = tmp_path / "table.jsonl", tmp_path / "recipe.yaml"
    data = measured.table.read_bytes()
    table.write_bytes(data + b'{"kind":"row","group":"layers.0.at')
    ok("search", table, "--max-bits", "5", "-o", recipe)
    assert recipe.read_bytes() == measured.recipe.read_bytes()
    lines = data.split(b"\n")
    lines[3] = lines[3][:50]
    table.write_bytes(b"\n".join(lines))
    message = refused("search", table, "--max-bits", "5", "-o", recipe)
    assert f"{table}, line 4: is not valid JSON" in message


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(Path(DEMO) / name, folder / name)
    recipe = tmp_path / "recipe.yaml"
    ok("recipe", "uniform", folder, "int4.g32", "-o", recipe)
    for arguments in (
        ("calibrate", folder, *SHORT, "-o", tmp_path / "stats"),
        ("validate", folder, recipe, *TEXT),
    ):
        message = refused(*arguments)
        assert "vocabulary has 256" in message
        assert "Use the model's own tokenizer" in message


@pytest.mark.parametrize("text", ["{}", "{", '{"model": {"type": "none"}}', "\x00"])
def test_a_damaged_tokenizer_is_refused(text: str, model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_text(text)
    message = refused("calibrate", model, *SHORT, "-o", tmp_path / "stats")
    assert f"{model}: the tokenizer cannot be loaded" in message
    assert not (tmp_path / "stats").exists()
