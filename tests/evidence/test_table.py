from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import signal
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from mofq.evidence.constraints import LayerConstraint
from mofq.evidence.table import (
    Flips,
    Rejection,
    Row,
    TableHeader,
    TableModel,
    TableSpace,
    TableStats,
    header_of,
    open_table,
    read_table,
)
from mofq.exceptions import TableError
from mofq.model.layers import FusionGroup, LinearLayer, ModelLayers
from mofq.numbers.numerics import NUMERICS

STATS = TableStats(
    sha256="5" * 64,
    seed=0,
    corpora={"wiki": "6" * 64, "code": "7" * 64},
    samples=2,
    sequence_length=4,
)
OTHER_MODEL = TableModel("org/model", "c" * 64)
SPACE = TableSpace("w8a8", "8" * 64, ("int8.channel", "bf16"), ("int8.channel",), 10.0, None, "0.3")


def layer(name: str, out_features: int = 8, in_features: int = 16) -> LinearLayer:
    return LinearLayer(
        name=name,
        tensor=f"{name}.weight",
        out_features=out_features,
        in_features=in_features,
        dtype="BF16",
        transposed=False,
        expert=None,
        row_start=0,
        decoder_layer=0,
        module=name,
        shares_scale=name,
    )


def header(stats: TableStats | None = STATS) -> TableHeader:
    groups = (
        FusionGroup("layers.0.attn.qk", (layer("q"), layer("k", 4))),
        FusionGroup("layers.0.attn.o", (layer("o"),)),
    )
    model = ModelLayers("llama", groups, (layer("lm_head"),), False, 1000)
    return header_of(model, model_name="org/model", index_sha256="a" * 64, stats=stats)


def weight_row(group: str = "layers.0.attn.o", scheme: str = "int8.channel", **changes: Any) -> Row:
    row = Row(group, scheme, "relative_weight_error", None, 1e-4, None, 160, 40.5)
    return dataclasses.replace(row, **changes)


def nats_row(
    group: str = "layers.0.attn.o", scheme: str = "int8.channel", corpus: str = "wiki"
) -> Row:
    kl = Row(group, scheme, "kl_nats_per_token", corpus, 0.5, 0.1, 160, 40.5)
    return dataclasses.replace(kl, sample_errors=(0.25, 0.75))


def write(path: Path, *rows: Row, stats: TableStats | None = STATS) -> None:
    with open_table(path, header(stats)) as writer:
        writer.add_group(rows)


def test_a_table_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    static = weight_row(
        "layers.0.attn.qk", "int8.channel+int8.tensor", static_amax={"q": 1.5, "k": 2.0}
    )
    rejection = Rejection("layers.0.attn.qk", "int4.g128", "q: needs in_features divisible by 128")
    with open_table(path, header()) as writer:
        writer.add_space(SPACE)
        writer.add_group([weight_row(), nats_row()])
        writer.add_group([static], [rejection])
    table = read_table(path)
    assert table.header == header()
    assert table.spaces == (SPACE,)
    assert table.rejections == (rejection,)
    assert table.rows == (weight_row(), nats_row(), static)
    assert table.sha256 == sha256(path.read_bytes()).hexdigest()


def test_what_an_earlier_version_noted_of_changes_of_experts_stays(tmp_path: Path) -> None:
    rates = {"layers.0.attn.qk": 0.5, "layers.0.attn.o": 0.25}
    path, before = tmp_path / "table.jsonl", Flips("wiki", rates)
    with open_table(path, header()) as writer:
        writer.add_flips([before])
    with open_table(path, header()) as writer:
        writer.add_flips([Flips("wiki", rates, stderr=0.1)])
    assert read_table(path).flips == (before,)
    again = tmp_path / "again.jsonl"
    with open_table(again, header()) as writer:
        writer.add_flips([Flips("wiki", rates, stderr=0.1)])
    assert read_table(again).flips[0].stderr == 0.1


def test_a_space_keeps_its_exclusions_and_constraints_in_the_table(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    space = dataclasses.replace(
        SPACE,
        exclude=("first:1",),
        candidates=(("int8.channel",), ("int4.g64", "int4.g32"), ("bf16",)),
        constraints=(LayerConstraint("at_least", "attn.*", "8"),),
    )
    with open_table(path, header()) as writer:
        writer.add_space(SPACE)  # of a version that did not note them
        writer.add_space(space)
        before = path.read_bytes()
        other = dataclasses.replace(space, sha256="9" * 64, exclude=())
        with pytest.raises(
            TableError, match=r"another definition of the search space 'w8a8' \(sha"
        ):
            writer.add_space(other)
        assert path.read_bytes() == before
        writer.add_space(dataclasses.replace(other, name="more"))
        # As where a space that comes with mofq has grown.
        writer.add_space(
            dataclasses.replace(
                space,
                sha256="8" * 64,
                schemes=(*space.schemes, "int6.g64"),
                candidates=(*(space.candidates or ()), ("int6.g64",)),
            )
        )
    assert [one.name for one in read_table(path).spaces] == ["w8a8", "w8a8", "more", "w8a8"]
    assert read_table(path).spaces[1] == space


@pytest.mark.parametrize("older", [None, NUMERICS - 1])
def test_a_table_of_other_numerics_is_read_and_not_continued(
    older: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "table.jsonl"
    with open_table(path, dataclasses.replace(header(), numerics=older)) as writer:
        writer.add_group([weight_row()])
    before = path.read_bytes()
    assert (b'"numerics"' in before) == (older is not None)
    table = read_table(path)
    assert (table.header.numerics, table.rows) == (older, (weight_row(),))
    found = rf"differs in numerics: {older or 'not noted'} in the table, {NUMERICS} of this mofq"
    with pytest.raises(TableError, match=rf"{path.name}: the table {found}.* to another table"):
        open_table(path, header())
    assert path.read_bytes() == before


MORE = dataclasses.replace(STATS, sha256="9" * 64, corpora={**STATS.corpora, "pt": "e" * 64})


def test_corpora_that_are_added_void_what_rests_on_all_of_them(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    scale = weight_row(scheme="int8.channel+int8.tensor", static_amax={"o": 2.0})
    fitted = nats_row(scheme="int4.g32@nats")
    write(path, weight_row(), nats_row(), scale, fitted)
    before = path.read_bytes()
    with open_table(path, header(MORE), earlier=[STATS.sha256]) as writer:
        assert not writer.has(fitted.group, fitted.scheme, unit=fitted.unit, corpus="wiki")
        writer.add_group([nats_row(corpus="pt"), dataclasses.replace(scale, bytes=161)])
    assert path.read_bytes().startswith(before)
    table = read_table(path)
    assert table.header == header(MORE)
    assert table.rows == (
        *(weight_row(), nats_row(), nats_row(corpus="pt")),
        dataclasses.replace(scale, bytes=161),
    )
    size = path.stat().st_size
    with open_table(path, header(MORE)):
        pass
    assert path.stat().st_size == size


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"corpora": {"code": "7" * 64, "wiki": "6" * 64, "pt": "e" * 64}},
        {"corpora": {"wiki": "6" * 64, "code": "e" * 64, "pt": "e" * 64}},
    ],
)
def test_corpora_that_are_not_added_behind_the_others_are_refused(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    other = dataclasses.replace(MORE, **changes)
    path = tmp_path / "table.jsonl"
    write(path, nats_row())
    with (
        pytest.raises(TableError, match="with corpora behind theirs"),
        open_table(path, header(other), earlier=[STATS.sha256]),
    ):
        pass
    with pytest.raises(TableError, match="differs in stats"), open_table(path, header(MORE)):
        pass


def test_the_header_counts_what_the_checkpoint_holds() -> None:
    table = header()
    assert [group.source_bytes for group in table.groups] == [12 * 16 * 2, 8 * 16 * 2]
    assert table.source_bytes_of_groups == 640
    assert table.weights == 320
    assert table.unquantized == ("lm_head",)


def test_a_table_with_signed_sums_of_an_earlier_version_is_read_and_continued(
    tmp_path: Path,
) -> None:
    path, now = tmp_path / "table.jsonl", tmp_path / "now.jsonl"
    write(now, nats_row())
    first, row = map(json.loads, now.read_text().splitlines())
    first["stats"]["tokens_per_projection"] = 4
    row["projections"] = "AAAAPwAAwL8="
    before = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in (first, row))
    path.write_text(before)
    assert read_table(path).header == read_table(now).header
    assert read_table(path).rows == (nats_row(),)
    write(path, nats_row(), weight_row())
    assert path.read_text().startswith(before)
    assert read_table(path).rows == (nats_row(), weight_row())


def test_rows_are_found_by_unit_and_corpus(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    write(path, weight_row(), nats_row(), nats_row(corpus="code"))
    table = read_table(path)
    assert table.measures == (
        ("relative_weight_error", None),
        ("kl_nats_per_token", "wiki"),
        ("kl_nats_per_token", "code"),
    )
    assert table.rows_of("kl_nats_per_token", "wiki") == {
        "layers.0.attn.qk": (),
        "layers.0.attn.o": (nats_row(),),
    }


def test_samples_are_little_endian_float32_in_base64(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    write(path, nats_row())
    # 0.25 and 0.75 are 3e800000 and 3f400000.
    value = json.loads(path.read_text().splitlines()[-1])
    assert value["sample_errors"] == "AACAPgAAQD8="


def test_a_row_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    write(path, weight_row(), nats_row())
    before = path.read_bytes()
    with open_table(path, header()) as writer:
        assert writer.has("layers.0.attn.o", "int8.channel", unit="relative_weight_error")
        assert not writer.has("layers.0.attn.o", "int4.channel", unit="relative_weight_error")
        writer.add_group([weight_row(), nats_row(), nats_row()])
    assert path.read_bytes() == before


def test_a_run_that_was_cut_anywhere_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    rejection = Rejection("layers.0.attn.qk", "int4.g128", "too wide")

    def run(path: Path) -> None:
        with open_table(path, header()) as writer:
            writer.add_space(SPACE)
            writer.add_group([weight_row("layers.0.attn.qk")], [rejection])
            writer.add_group([weight_row(), nats_row()])

    run(whole)
    data = whole.read_bytes()
    for stop in range(0, len(data), 37):
        cut = tmp_path / "cut.jsonl"
        cut.write_bytes(data[:stop])
        run(cut)
        assert cut.read_bytes() == data


def test_a_half_last_line_is_dropped_when_reading(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    write(path, weight_row())
    whole = read_table(path)
    with path.open("ab") as file:
        file.write(b'{"kind":"row","gr')
    assert read_table(path) == whole


def test_a_damaged_line_in_the_middle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    write(path, weight_row(), nats_row())
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    with pytest.raises(TableError, match="line 2: is not valid JSON"):
        read_table(path)


def test_a_second_writer_is_told_to_wait(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    with open_table(path, header()) as writer:
        writer.add_group([weight_row()])
        with pytest.raises(TableError, match=r"another process \(pid .* writes to this table"):
            open_table(path, header())
        assert len(read_table(path).rows) == 1
    open_table(path, header()).__exit__(None, None, None)


def _write_until_killed(path: str) -> None:
    with open_table(path, header()) as writer:
        for number in range(10**6):
            scheme = f"int8.g{number + 1}"
            writer.add_group([weight_row(scheme=scheme), weight_row("layers.0.attn.qk", scheme)])


def test_a_killed_writer_leaves_whole_groups_and_frees_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    process = multiprocessing.get_context("spawn").Process(
        target=_write_until_killed, args=(str(path),)
    )
    process.start()
    deadline = time.monotonic() + 300
    while not (path.exists() and path.stat().st_size > 5000) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(read_table(path).rows) > 5
    with open_table(path, header()) as writer:
        writer.add_group([nats_row()])
    assert read_table(path).rows[-1] == nats_row()


def _write_under_a_limit(path: str, limit: int, message: Any) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write(Path(path), weight_row(), nats_row(), weight_row(scheme="int8.g4"))
    except TableError as problem:
        message.put(str(problem))


def test_a_disk_that_fills_keeps_what_was_measured_before(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    write(path, weight_row())
    before = path.read_bytes()
    context = multiprocessing.get_context("spawn")
    message = context.Queue()
    process = context.Process(
        target=_write_under_a_limit, args=(str(path), len(before) + 100, message)
    )
    process.start()
    assert "What was measured before is kept" in message.get(timeout=300)
    process.join()
    assert path.read_bytes() == before


def test_a_contradicting_row_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    write(path, weight_row())
    before = path.read_bytes()
    with (
        open_table(path, header()) as writer,
        pytest.raises(TableError, match="twice with different numbers"),
    ):
        writer.add_group([nats_row(), weight_row(error=2e-4)])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": OTHER_MODEL}, "differs in index_sha256: a{64} in the table, c{64} asked"),
        ({"stats": None}, "differs in stats: 5{64} in the table, None asked for"),
        ({"other_bytes": 7}, "differs in other_bytes: 1000 in the table, 7 asked for"),
        ({"groups": header().groups[:1]}, "differs in groups, by other options or by a mofq"),
    ],
)
def test_a_table_of_other_inputs_is_refused_with_both_sides(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "table.jsonl"
    write(path, weight_row())
    before = path.read_bytes()
    with pytest.raises(TableError, match=message):
        open_table(path, dataclasses.replace(header(), **change))
    assert path.read_bytes() == before


def test_the_name_of_a_model_and_the_version_may_differ(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    write(path, weight_row())
    moved = dataclasses.replace(header().model, name="moved")
    with open_table(path, dataclasses.replace(header(), model=moved, mofq="9.9")) as writer:
        assert writer.header.model_name == "org/model"


@pytest.mark.parametrize("text", ["my notes", "my notes\n", '{"kind":"space"}\n'])
def test_a_file_that_is_not_a_table_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(TableError):
        open_table(path, header())
    assert path.read_text() == text


def test_a_missing_folder_or_table_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="No such file or directory"):
        open_table(tmp_path / "no" / "table.jsonl", header())
    with pytest.raises(TableError, match="mofq measure"):
        read_table(tmp_path / "table.jsonl")


def test_an_empty_file_is_not_a_table(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    path.touch()
    with pytest.raises(TableError, match="no complete header line"):
        read_table(path)


def test_a_table_of_a_70b_model_is_read_in_half_a_second(tmp_path: Path) -> None:
    names = [f"layers.{number}.mlp.down" for number in range(320)]
    groups = tuple(FusionGroup(name, (layer(name),)) for name in names)
    model = ModelLayers("llama", groups, (), False, 0)
    stats = dataclasses.replace(STATS, samples=64)
    large = header_of(model, model_name="large", index_sha256="a" * 64, stats=stats)
    row = dataclasses.replace(nats_row(), error=0.375, sample_errors=(0.5, 0.25) * 32)
    path = tmp_path / "table.jsonl"
    with open_table(path, large) as writer:
        for size in range(1, 13):
            scheme = f"int8.g{size}"
            writer.add_group(dataclasses.replace(row, group=n, scheme=scheme) for n in names)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        assert len(read_table(path).rows) == 320 * 12
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5
