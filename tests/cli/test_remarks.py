"""Remarks name options as their reader writes them: flags on the command line."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

from command_line import DEMO, Measured, ok
from families import write_family

from mofq import Budget, search
from mofq.api import Samples, Timing, calibrate
from mofq.cli.flags import with_flags
from mofq.exceptions import Remark, option
from mofq.model.loading import load_tokenizer


def test_a_remark_reads_as_python_and_is_spelled_anew_for_the_shell() -> None:
    text = f"Give {option('corpora')}, or {option('max_bits', 5)}."
    remark = Remark(text)
    assert remark == "Give corpora, or max_bits=5."
    for one in (remark, copy.deepcopy(remark), pickle.loads(pickle.dumps(remark))):
        assert with_flags(one) == "Give --corpus, or --max-bits 5."
    assert with_flags({"notes": [remark, "corpora", 5]}) == {
        "notes": ["Give --corpus, or --max-bits 5.", "corpora", 5]
    }


def test_a_note_of_a_search_is_spelled_for_its_reader(measured: Measured, tmp_path: Path) -> None:
    timing = Timing(max_time="1s", device_model="h100", workload="decode:batch=8,context=1024")
    notes = search(measured.table, budget=Budget(max_bits=5), timing=timing).decision.notes
    assert any(note.startswith("max_time does not bind: ") for note in notes)
    timed = ("--max-time", "1s", "--device-model", "h100", "--workload", timing.workload or "")
    ran = ok(
        "search", measured.table, "--max-bits", "5", *timed, "-o", tmp_path / "r.yaml", "--json"
    )
    assert any(note.startswith("--max-time does not bind: ") for note in ran.json["notes"])


def test_too_few_sequences_are_told_with_the_options_of_the_reader(tmp_path: Path) -> None:
    told: list[str] = []
    samples = Samples(sequences=1, sequence_length=16)
    corpora = {"en": "demo-en-calibration"}
    calibrate(DEMO, corpora, tmp_path / "stats", samples=samples, tell=told.append)
    assert "or larger sequences and keep, or a smaller sequence_length." in told[0]
    shell = ("--sequences", "1", "--sequence-length", "16", "-o", tmp_path / "other")
    ran = ok("calibrate", DEMO, "--corpus", "en=demo-en-calibration", *shell)
    assert "or larger --sequences and --keep, or a smaller --sequence-length." in ran.err


def test_a_text_that_the_tokenizer_has_no_words_for_is_told(tmp_path: Path) -> None:
    folder = write_family("llama", tmp_path / "model", vocab_size=260)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    tokenizer.save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("the <unk> of <unk> " * 40)
    told: list[str] = []
    samples, stats = Samples(sequences=8, sequence_length=16), tmp_path / "stats"
    calibrate(folder, {"en": str(text)}, stats, samples=samples, tell=told.append)
    assert any(
        "of its tokens are '<unk>', which models are hardly trained on" in one for one in told
    )
