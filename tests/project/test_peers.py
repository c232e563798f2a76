"""The public table: what peers are given, how what they make is scored, and the page."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import DEMO, ok
from safetensors.torch import load_file

import scripts.reproduce.peers.compare as compare
from mofq.delivery.backends import apply_recipe
from mofq.evidence.corpora import load_text, spread_windows
from mofq.exceptions import MofqError
from mofq.model.checkpoint.headers import Checkpoint, open_checkpoint
from mofq.model.layers import find_layers
from mofq.model.loading import load_model, load_tokenizer
from scripts.reproduce.peers.calibration import write_windows
from scripts.reproduce.peers.entries import COLUMNS, ENTRIES, MOFQ, Entry
from scripts.reproduce.peers.environments import pins
from scripts.reproduce.peers.handover import MADE, TEXTS, WINDOWS, hand_over_weights, read_task
from scripts.reproduce.peers.judge import Judge, bits_per_weight, read_entry, read_weights
from scripts.reproduce.peers.page import table_lines, write_table
from scripts.reproduce.peers.results import (
    Result,
    Setting,
    made_name,
    read_result,
    result_name,
    write_result,
)
from scripts.shared.environment import python_with
from scripts.shared.reproduction import uniform_of

PEERS = Path(compare.__file__).parent
RESULT = Result(4.5, 0.05, 0.001, 30.0, 28.0, 0.9, 65.4, {"torch": "2.13.0"}, (0.049, 0.051))


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return open_checkpoint(DEMO)


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge(DEMO, "demo-en", windows=2, sequence_length=64) as judge:
        yield judge


@pytest.fixture
def setting(tmp_path: Path, demo: Checkpoint) -> Setting:
    texts = [tmp_path / name for name in ("calibration.txt", "heldout.txt")]
    for text in texts:
        text.write_text(text.name)
    calibration, heldout = map(str, texts)
    return Setting(DEMO, demo.index_sha256, calibration, heldout, 2, 2, 64)


@pytest.mark.parametrize(
    "scheme", ["int4.g32", "int3.g32", "int8.channel+int8.token", "fp8_e4m3.channel"]
)
def test_a_folder_decoded_by_compressed_tensors_is_scored_as_validate_scores_its_recipe(
    scheme: str, judge: Judge, tmp_path: Path
) -> None:
    ok("recipe", "uniform", DEMO, scheme, "-o", tmp_path / "recipe.yaml")
    folder = tmp_path / "made" / "model"
    ok("export", DEMO, tmp_path / "recipe.yaml", "--to", "compressed-tensors", "-o", folder)
    windows = ("--text", "demo-en", "--tokens", "128", "--sequence-length", "64", "--json")
    expected = ok("validate", DEMO, tmp_path / "recipe.yaml", *windows).json
    quantized = read_entry(judge.original, tmp_path / "made")
    found = judge.judge(quantized)
    assert found.kl_nats_per_token == pytest.approx(expected["kl_nats_per_token"], rel=1e-6)
    assert found.perplexity_original == expected["perplexity_original"]
    assert quantized.bits_per_weight == pytest.approx(expected["bits_per_weight"])


def test_weights_that_are_handed_over_are_scored_with_their_inputs_rounded(
    judge: Judge, tmp_path: Path
) -> None:
    demo = judge.original
    recipe = uniform_of(DEMO, "int8.channel+int8.token")
    expected = apply_recipe(load_model(demo.folder), recipe)
    rounded = apply_recipe(load_model(demo.folder), uniform_of(DEMO, "int8.channel"))
    names = [layer.name for layer in find_layers(demo).grouped_layers]
    weights = {f"{name}.weight": rounded.get_submodule(name).weight for name in names}
    write_windows(DEMO, "demo-en", tmp_path / "texts", windows=2, sequence_length=8)
    words = [DEMO, "--calibration", str(tmp_path / "texts"), "--settings", '{"bits": 8}']
    task = read_task([*words, "-o", str(tmp_path / "made")])
    stored = {name: {"codes": 100, "scales": 25} for name in names}
    hand_over_weights(task, weights, stored, seconds=2.0, inputs="int8.token")
    found = read_entry(demo, tmp_path / "made")
    tokens_NT = judge.windows_NT
    assert torch.equal(found.model(tokens_NT).logits, expected(tokens_NT).logits)
    assert not torch.equal(found.model(tokens_NT).logits, rounded(tokens_NT).logits)
    total = sum(layer.weights for layer in find_layers(demo).grouped_layers)
    assert found.bits_per_weight == pytest.approx(8 * 125 * len(names) / total)
    note = json.loads((tmp_path / "made" / MADE).read_text())
    assert (note["settings"], note["processor_seconds"]) == ({"bits": 8}, 2.0)


def test_a_weight_that_the_original_does_not_have_is_refused(demo: Checkpoint) -> None:
    with pytest.raises(SystemExit, match=r"no tensor 'model\.wrapped\.weight'"):
        read_weights(demo, {"model.wrapped.weight": torch.ones(1)}, stored={}, inputs=None)


def test_true_bits_count_all_that_stands_for_a_weight_and_unquantized_layers_as_they_are(
    demo: Checkpoint,
) -> None:
    first, *others = find_layers(demo).grouped_layers
    assert bits_per_weight(demo, {}) == 16
    sizes = {"weight_packed": 1000, "weight_scale": 200, "weight_zero_point": 30}
    stored = {first.name: {**sizes, "weight_shape": 16, "bias": 64}}
    total = first.weights + sum(layer.weights for layer in others)
    expected = (8 * 1230 + 16 * (total - first.weights)) / total
    assert bits_per_weight(demo, stored) == pytest.approx(expected)


def test_peers_are_given_the_same_windows_as_tokens_and_as_texts(tmp_path: Path) -> None:
    write_windows(DEMO, "demo-en", tmp_path, windows=3, sequence_length=32)
    tokenizer = load_tokenizer(Path(DEMO))
    expected = spread_windows(load_text("demo-en"), tokenizer, sequences=3, sequence_length=32)
    assert torch.equal(load_file(tmp_path / WINDOWS)["tokens"], expected)
    texts = json.loads((tmp_path / TEXTS).read_text("utf-8"))
    assert len(texts) == 3
    for text, window_T in zip(texts, expected, strict=True):
        assert tokenizer.decode(window_T[1:-1]) in text
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= 32


def test_an_entry_is_made_anew_when_anything_that_it_depends_on_is_another(
    setting: Setting,
) -> None:
    entry = next(one for one in ENTRIES if one.peer != MOFQ)
    made, result = made_name(entry, setting), result_name(entry, setting)
    for changed in (
        replace(entry, settings={**entry.settings, "more": 1}),
        replace(entry, peer="nncf" if entry.peer != "nncf" else "torchao"),
    ):
        assert made_name(changed, setting) != made
    for other in (
        replace(setting, index_sha256="0"),
        replace(setting, calibration=setting.text),
        replace(setting, calibration_windows=3),
        replace(setting, sequence_length=32),
    ):
        assert made_name(entry, other) != made
        assert result_name(entry, other) != result
    for other in (replace(setting, text=setting.calibration), replace(setting, windows=3)):
        assert made_name(entry, other) == made
        assert result_name(entry, other) != result


def test_the_table_has_the_least_kl_of_a_column_first() -> None:
    def entry(name: str, column: str) -> Entry:
        return Entry(name, "torchao", column, f"by {name}", {})

    done = {
        entry("a", "W8A8"): replace(RESULT, kl_nats_per_token=0.001, processor_seconds=None),
        entry("b", "4.5"): RESULT,
        entry("c", "4.5"): replace(RESULT, kl_nats_per_token=0.04, processor_seconds=1316.2),
    }
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table_lines(done)]
    rest = ["30.00", "90.0 %"]
    assert cells[2:] == [
        ["4.5", "by c", "4.500", "**0.04000 ± 0.00100**", *rest, "1,316 s", "`c`"],
        ["4.5", "by b", "4.500", "0.05000 ± 0.00100", *rest, "65 s", "`b`"],
        ["W8A8", "by a", "4.500", "0.00100 ± 0.00100", *rest, "–", "`a`"],
    ]


@pytest.mark.parametrize("old", ["", "old\n"])
def test_the_table_of_one_model_replaces_what_stood_there_and_names_what_has_not_run(
    old: str, setting: Setting, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    table = f"<!-- table: model -->\n{old}<!-- end of table -->"
    page.write_text(f"before\n{table}\nother <!-- table: other -->\nkept\n<!-- end of table -->\n")
    write_result(RESULT, tmp_path / result_name(ENTRIES[0], setting))
    for _ in range(2):
        write_table(page, setting, tmp_path)
        text = page.read_text("utf-8")
        assert text.startswith("before\n<!-- table: model -->\n\n| at")
        assert text.endswith("other <!-- table: other -->\nkept\n<!-- end of table -->\n")
        assert "old" not in text
        assert text.count(ENTRIES[0].title) == 1
        (left,) = re.findall(r"Not run here.*", text)
        assert re.findall(r"`([\w.-]+)`", left) == [one.name for one in ENTRIES[1:]]


@pytest.mark.parametrize("begin", ["", "<!-- table: model -->"])
def test_a_page_without_a_place_for_the_table_is_refused(
    begin: str, setting: Setting, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{begin}<!-- table: another -->\n<!-- end of table -->\n")
    with pytest.raises(MofqError, match="Write both where the table"):
        write_table(page, setting, tmp_path)


def test_a_table_is_not_emptied_for_want_of_results(setting: Setting, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- table: model -->\nold\n<!-- end of table -->\n")
    with pytest.raises(MofqError, match="has no result of this model, these texts"):
        write_table(page, setting, tmp_path)
    assert "old" in page.read_text("utf-8")


def test_a_rerun_takes_the_results_that_are_there_and_scores_a_folder_that_it_is_given(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def make(entry: Entry, _setting: Setting, _made: Path) -> None:
        made.append(entry.name)
        raise MofqError("could not be made")

    monkeypatch.setattr(compare, "make", make)
    text = setting.text
    Path(text).write_text(load_text("demo-en").text)
    recipe = tmp_path / "recipe.yaml"
    ok("recipe", "uniform", DEMO, "int4.g32", "-o", recipe)
    ok("export", DEMO, recipe, "--to", "compressed-tensors", "-o", tmp_path / "mine")
    words = [DEMO, "--calibration", setting.calibration, "--text", text, "--windows", "2"]
    words += ["--calibration-windows", "2", "--sequence-length", "64"]
    words += ["--work", str(tmp_path / "work")]
    folder = tmp_path / "work" / Path(DEMO).name
    path = folder / result_name(_entry("mofq-4.5"), setting)
    for given, seconds in (("12.5", 12.5), ("-", None)):
        compare.main([*words, "--take", "mofq-4.5", str(tmp_path / "mine"), given])
        assert made == []
        result = read_result(path)
        assert result is not None
        assert (result.bits_per_weight, result.processor_seconds) == (4.5, seconds)
    assert (tmp_path / "mine" / "config.json").exists()
    apart = [*words, "--results", str(tmp_path / "results")]
    compare.main([*apart, "--take", "mofq-4.5", str(tmp_path / "mine"), "-"])
    assert read_result(tmp_path / "results" / folder.name / path.name) == result
    monkeypatch.setattr(compare, "Judge", None)  # nothing is run any more
    write_result(RESULT, folder / result_name(_entry("torchao-int8"), setting))
    with pytest.raises(SystemExit, match=r"^not scored: torchao-int4-g64, torchao-int4-g32$"):
        compare.main([*words, "--only", "torchao-*64", "--only", "torchao-int*"])
    assert made == ["torchao-int4-g64", "torchao-int4-g32"]
    with pytest.raises(SystemExit, match="--take mofq-44: there is no such entry"):
        compare.main([*words, "--take", "mofq-44", str(tmp_path / "mine"), "-"])


def test_a_peer_that_fails_is_refused_with_the_end_of_what_it_printed(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "print('first'); print(*'abcde', sep=chr(10)); raise SystemExit(3)"
    monkeypatch.setattr(compare, "_command", lambda *_: [sys.executable, "-c", program])
    with pytest.raises(MofqError, match=r"entry\.log, which ends:\na\nb\nc\nd\ne$"):
        compare.make(_entry("torchao-int8"), setting, tmp_path / "entry")


def test_of_a_run_of_mofq_the_folder_for_the_engine_is_kept_and_its_processor_time(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import os, pathlib, sys; assert os.environ['OMP_NUM_THREADS'] == '1';"
        "sum(range(10**6)); run = pathlib.Path(sys.argv[1]) / 'run';"
        "(run / 'stats').mkdir(parents=True); (run / 'model').mkdir();"
        "(run / 'model' / 'config.json').write_text('{}')"
    )
    made = tmp_path / "entry"
    command = [sys.executable, "-c", program, str(made)]
    monkeypatch.setattr(compare, "_command", lambda *_: command)
    compare.make(_entry("mofq-5"), setting, made)
    assert {str(path.relative_to(made)) for path in made.rglob("*")} == {
        MADE,
        "model",
        "model/config.json",
    }
    assert 0 < json.loads((made / MADE).read_text())["processor_seconds"] < 60


def _entry(name: str) -> Entry:
    (found,) = (one for one in ENTRIES if one.name == name)
    return found


def test_every_entry_has_a_column_a_script_and_an_environment_of_pinned_packages() -> None:
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    assert {entry.column for entry in ENTRIES} <= set(COLUMNS)
    for peer in {entry.peer for entry in ENTRIES} - {MOFQ}:
        assert (PEERS / f"with_{peer.replace('-', '_')}.py").is_file()
        lines = pins(peer).splitlines()
        assert "torch==2.13.0" in lines
        assert [one for one in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", one)] == []


def test_an_environment_is_made_once_from_its_pins_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> None:
        commands.append(command)
        (tmp_path / "venv").mkdir(exist_ok=True)

    monkeypatch.setattr("scripts.shared.environment.subprocess.run", run)
    (tmp_path / "venv" / "bin").mkdir(parents=True)  # of a try that was stopped
    for _ in range(2):
        python = python_with("torch==2.13.0\n", tmp_path / "venv")
        assert python == tmp_path / "venv" / "bin" / "python"
        assert [command[1:3] for command in commands] == [["-m", "venv"], ["-m", "pip"]]
    assert "--no-deps" in commands[1]
    assert Path(commands[1][-1]).read_text("utf-8") == "torch==2.13.0\n"
    assert not (tmp_path / "venv" / "bin").exists()


def test_settings_are_the_same_after_they_were_given_on_a_command_line() -> None:
    for entry in ENTRIES:
        if entry.peer != MOFQ:
            given = json.loads(json.dumps(entry.settings))
            assert list(given) == list(entry.settings)
            assert given == entry.settings
