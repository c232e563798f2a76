from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from families import write_byte_tokenizer
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from mofq import demo
from mofq.evidence import corpora
from mofq.evidence.corpora import (
    Corpus,
    leading_tokens,
    load_text,
    spread_windows,
    tokenize,
    unknown_words,
    windows_between,
)
from mofq.exceptions import CorpusError
from mofq.model.loading import load_tokenizer


class CharacterTokenizer:
    """One token a character, and a record of what it was asked."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
        assert options == {"add_special_tokens": False, "verbose": False}
        self.lengths.append(len(text))
        return {"input_ids": [ord(character) for character in text]}


def corpus_of(text: str) -> Corpus:
    return Corpus("c", "c.txt", text, "0")


def test_plain_text_is_read_to_the_byte(tmp_path: Path) -> None:
    text = "\n\na\r\nb \t\n é 漢 🙂\n\n"
    path = tmp_path / "notes.txt"
    path.write_bytes(text.encode())
    corpus = load_text(str(path))
    assert corpus == Corpus("notes", str(path), text, hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_corpus_can_be_given_a_name(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("a")
    assert load_text(str(path), name="pt").name == "pt"


def test_rows_of_json_lines_follow_one_another_each_on_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"text": t, "body": "x"}) + "\n" for t in ("a\nb", "c\n", "é"))
    )
    assert load_text(str(path)).text == "a\nb\nc\né\n"
    assert load_text(f"{path}:body").text == "x\nx\nx\n"


def test_a_parquet_column_is_named_behind_a_colon(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"content": ["x", "y"], "n": [1, 2]}), path)
    assert load_text(f"{path}:content").text == "x\ny\n"


#: As Gemma's and Llama 3's do, it writes BOS itself.
TEMPLATE = (
    "{{ bos_token }}{% for one in messages %}{{ one.role[0] }}: {{ one.content }}\n{% endfor %}"
)


def chats_in(folder: Path, *conversations: Any) -> Corpus:
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in conversations))
    return load_text(str(path))


def said(*contents: str) -> list[dict[str, str]]:
    roles = itertools.cycle(("user", "assistant"))
    return [
        {"role": role, "content": content} for role, content in zip(roles, contents, strict=False)
    ]


def byte_tokenizer(folder: Path, **options: Any) -> PreTrainedTokenizerBase:
    write_byte_tokenizer(folder / "tokenizer", **options)
    return load_tokenizer(folder / "tokenizer")


@pytest.mark.parametrize("column", ["", ":messages"])
def test_conversations_are_what_the_chat_template_writes_and_get_no_second_bos(
    column: str, tmp_path: Path
) -> None:
    corpus = chats_in(tmp_path, said("hi", "hello"), said("é\u2028?", "yes"))
    corpus = load_text(corpus.source + column)
    tokenizer = byte_tokenizer(tmp_path, bos=True, chat_template=TEMPLATE)
    leading = leading_tokens(tokenizer, "auto")
    text = "<bos>u: hi\na: hello\n<bos>u: é\u2028?\na: yes\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    windows_NT = spread_windows(
        corpus, tokenizer, sequences=1, sequence_length=len(ids), leading=leading
    )
    assert windows_NT.tolist() == [ids]
    assert ids[:2] == [256, *tokenizer("u", add_special_tokens=False)["input_ids"]]
    second_NT = spread_windows(
        corpus, tokenizer, sequences=2, sequence_length=len(ids) // 2, leading=leading
    )
    assert second_NT[:, 0].tolist() == [256, 256]
    assert second_NT[0].tolist() == ids[: len(ids) // 2]


def test_conversations_have_the_hash_of_their_messages_whatever_the_template(
    tmp_path: Path,
) -> None:
    corpus = chats_in(tmp_path, said("hi", "hello"))
    line = '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]\n'
    assert corpus.is_conversations
    assert (corpus.text, corpus.sha256) == (line, hashlib.sha256(line.encode()).hexdigest())


def test_rows_that_have_text_beside_messages_are_text(tmp_path: Path) -> None:
    path = tmp_path / "both.jsonl"
    path.write_text(json.dumps({"text": "plain", "messages": said("hi")}) + "\n")
    assert load_text(str(path)).text == "plain\n"
    assert load_text(f"{path}:messages").is_conversations


def test_conversations_for_a_tokenizer_without_a_template_are_refused(tmp_path: Path) -> None:
    corpus = chats_in(tmp_path, said("hi"))
    with pytest.raises(CorpusError, match=r"no chat template.*Give plain text.*chat_template"):
        spread_windows(corpus, byte_tokenizer(tmp_path), sequences=1, sequence_length=2)


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    template = "{% if messages|length > 1 %}{{ raise_exception('one at most') }}{% endif %}"
    tokenizer = byte_tokenizer(tmp_path, chat_template=template)
    corpus = chats_in(tmp_path, said("hi"), said("hi", "hello"))
    with pytest.raises(CorpusError, match=r"refuses conversation 2: one at most\. Change it"):
        spread_windows(corpus, tokenizer, sequences=1, sequence_length=2)


@pytest.mark.parametrize(
    "conversation",
    [
        [],
        [{"from": "human", "value": "hi"}],
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}],
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        ["hi"],
    ],
)
def test_what_is_no_list_of_messages_is_refused(conversation: object, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"row 1 of column 'messages' is no conversation.*role"):
        chats_in(tmp_path, conversation)


def test_windows_begin_with_bos_where_the_tokenizer_puts_it_before_a_text(tmp_path: Path) -> None:
    with_bos = byte_tokenizer(tmp_path / "a", bos=True)
    without = byte_tokenizer(tmp_path / "b")
    assert [leading_tokens(with_bos, bos) for bos in ("auto", "always", "never")] == [
        *((256,), (256,), ())
    ]
    assert [leading_tokens(without, bos) for bos in ("auto", "never")] == [(), ()]
    with pytest.raises(CorpusError, match=r"bos=always: the tokenizer has no BOS.*bos=auto"):
        leading_tokens(without, "always")
    without.bos_token = "!"
    assert leading_tokens(without, "auto") == ()
    assert leading_tokens(without, "always") == (without.bos_token_id,)


def test_a_window_is_bos_and_one_token_of_text_less(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path, bos=True)
    text = "abcdefghijkl"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for count in (12, 12 * 64):  # tokenized whole, and by excerpts
        options: dict[str, Any] = {"tokens": 8, "sequence_length": 4, "leading": (256,)}
        windows_NT = tokenize(corpus_of(text * (count // 12)), tokenizer, **options)
        assert windows_NT[0].tolist() == [256, *ids[:3]]
        assert windows_NT[:, 0].tolist() == [256, 256]
        assert windows_NT.shape == (2, 4)
    assert tokenizer(text[:3])["input_ids"] == windows_NT[0].tolist()  # as an engine has it
    with pytest.raises(CorpusError, match="holds no text"):
        spread_windows(corpus_of(text), tokenizer, sequences=1, sequence_length=2, leading=(256, 0))


def test_a_missing_column_is_an_error_that_lists_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"content": "a"}\n')
    with pytest.raises(CorpusError, match=r"no column 'text'.*content"):
        load_text(str(path))
    with pytest.raises(CorpusError, match=r"no column 'contents'; it has 'content'"):
        load_text(f"{path}:contents")


#: A byte-order mark, and a cell with the delimiter, a quote and a line break in it.
CSV = '\ufeffid,url,body\r\n1,http://a,one\r\n2,http://b,"two, ""2""\nlines"\r\n3,http://c,\r\n'


def test_a_column_of_a_csv_is_the_text_and_a_row_without_it_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(CSV, newline="")
    corpus = load_text(f"{path}:body")
    assert corpus.text == 'one\ntwo, "2"\nlines\n'
    assert corpus.skipped == 1
    assert corpus.remarks() == [f"text '{path}:body': 1 row without text left out."]
    with pytest.raises(CorpusError, match=r"no column 'text'; it has 'id', 'url', 'body'\. Name"):
        load_text(str(path))


def test_a_tsv_is_divided_by_tabs_and_text_is_the_column_where_none_is_named(
    tmp_path: Path,
) -> None:
    path = tmp_path / "data.tsv"
    path.write_text("id\ttext\n1\tNA, null\n2\t" + "long " * 50_000 + "\n3\n")
    corpus = load_text(str(path))
    assert corpus.text == "NA, null\n" + "long " * 50_000 + "\n"
    assert corpus.skipped == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n1,a, b\n", "cannot be read after row 0: more cells than the header has"),
        ('id,text\n1,a\n2,"b\n3,c\n', "cannot be read after row 1: unexpected end of data"),
        ('id,text\n1,"a" b\n', "cannot be read after row 0: .* expected after"),
        ("id,text\n", "is empty"),
        ("id,text\n1,\n", "is empty"),
    ],
)
def test_a_broken_csv_is_an_error_that_says_where(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "data.csv"
    path.write_text(content)
    with pytest.raises(CorpusError, match=message):
        load_text(str(path))


def test_rows_of_a_data_set_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["x", None, "", "y", None]}), path)
    corpus = load_text(str(path))
    assert (corpus.text, corpus.skipped) == ("x\n\ny\n", 2)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst", "a.zip"])
def test_a_compressed_file_is_refused_with_what_to_do(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(CorpusError, match=r"is compressed\. Unpack it"):
        load_text(str(tmp_path / name))


def test_a_pattern_of_names_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(CorpusError, match=r"a pattern of names is not expanded\. Join the files"):
        load_text(str(tmp_path / "*.txt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": 5}\n', r"row 2 of column 'text' holds int"),
        (b'{"text": null}\n', "is empty"),
        (b'{"text": "a"}\n{"text": \n', "cannot be read"),
        (b'{"text": "a\xff"}\n', "cannot be read"),
        (b"", "is empty"),
        (b'{"text": "a\\ud800b"}\n', "cannot be read|half of a surrogate pair"),
    ],
)
def test_broken_json_lines_are_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        load_text(str(path))


def test_a_broken_parquet_file_is_an_error_and_prints_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"junk")
    with pytest.raises(CorpusError, match="cannot be read"):
        load_text(str(path))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_empty_text_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.txt"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"empty\.txt' is empty"):
        load_text(str(path))


def test_bytes_that_are_not_utf8_are_an_error_that_says_where(tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"caf\xe9 com leite")
    with pytest.raises(CorpusError, match=r"latin1\.txt: byte 3 is not UTF-8"):
        load_text(str(path))


def test_a_missing_file_a_folder_and_a_column_of_plain_text_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(CorpusError, match="there is no such file"):
        load_text(str(tmp_path / "b.txt"))
    with pytest.raises(CorpusError, match="folder"):
        load_text(str(tmp_path))
    with pytest.raises(CorpusError, match="plain text has no column 'body'"):
        load_text(f"{tmp_path / 'a.txt'}:body")


@pytest.mark.parametrize(
    ("source", "dataset", "options", "text"),
    [
        ("org/set", "org/set", {"name": None, "split": "train"}, "a\nb\n"),
        ("org/set/en:test", "org/set", {"name": "en", "split": "test"}, "a\nb\n"),
        ("org/set:test:body", "org/set", {"name": None, "split": "test"}, "x\ny\n"),
    ],
)
def test_a_hub_source_names_configuration_split_and_column(
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    dataset: str,
    options: dict[str, object],
    text: str,
) -> None:
    calls = []

    def load_dataset(path: str, **given: object) -> list[dict[str, str]]:
        calls.append((path, given))
        return [{"text": "a", "body": "x"}, {"text": "b", "body": "y"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_text(source).text == text
    assert load_text(source).name == "set"
    assert calls[0] == (dataset, {"streaming": True, **options})


def test_a_hub_data_set_is_read_only_as_far_as_is_documented(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: iter([{"text": "ab"}] * 9))
    monkeypatch.setattr(corpora, "HUB_CHARACTERS", 7)
    assert load_text("org/set").text == "ab\n" * 3


def test_an_unreachable_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        CorpusError, match=r"'org/set' cannot be read.*Couldn't reach the Hub.*network"
    ):
        load_text("org/set")


def test_a_local_file_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "set").write_text("local")
    monkeypatch.chdir(tmp_path)
    assert load_text("org/set").text == "local"


def test_a_misspelt_path_never_reaches_for_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("a request"))
    for source in ("texts/none.txt", "pt/none.jsonl:body", "pt/none.csv", "pt/none.gz"):
        with pytest.raises(CorpusError, match="there is no such file"):
            load_text(source)


def test_the_bundled_texts_are_the_files_of_the_demo() -> None:
    folder = Path(demo.__file__).parent / "texts"
    assert sorted(corpora.BUNDLED_TEXT.values()) == sorted(folder.glob("*.txt"))
    assert all(load_text(name).text for name in corpora.BUNDLED_TEXT)


def test_windows_are_spread_over_the_whole_text_in_order_and_do_not_overlap() -> None:
    text = "".join(map(chr, range(100)))
    windows_NT = tokenize(corpus_of(text), CharacterTokenizer(), tokens=17, sequence_length=4)
    assert windows_NT.tolist() == [
        [0, 1, 2, 3],
        [32, 33, 34, 35],
        [64, 65, 66, 67],
        [96, 97, 98, 99],
    ]
    windows_NT = tokenize(corpus_of(text[:12]), CharacterTokenizer(), tokens=12, sequence_length=4)
    assert windows_NT.flatten().tolist() == list(range(12))


@pytest.mark.parametrize("length", [4 * 8 * 2 + 20, 300, 4000])
def test_windows_between_are_others_of_the_same_text(length: int) -> None:
    text = "".join(chr(0x4E00 + place) for place in range(length))
    asked: Any = {"sequences": 8, "sequence_length": 4}
    tokenizer = CharacterTokenizer()
    windows_NT = spread_windows(corpus_of(text), tokenizer, **asked)
    between_NT = windows_between(corpus_of(text), tokenizer, **asked, every=4)
    assert between_NT is not None
    assert between_NT.shape == (2, 4)
    assert between_NT[0, 0] < windows_NT[4, 0] < between_NT[1, 0]
    every = torch.cat([windows_NT, between_NT]).flatten()
    assert len(every.unique()) == len(every)
    begun_NT = windows_between(corpus_of(text), tokenizer, **asked, every=4, leading=(7,))
    assert begun_NT is not None
    assert torch.equal(begun_NT[:, 1:], between_NT[:, :-1])
    assert begun_NT[:, 0].tolist() == [7, 7]


def test_a_text_without_room_between_its_windows_has_no_others() -> None:
    corpus, tokenizer = corpus_of("x" * 60), CharacterTokenizer()
    assert windows_between(corpus, tokenizer, sequences=8, sequence_length=4, every=4) is None


def test_a_short_text_gives_the_whole_windows_it_has() -> None:
    windows_NT = tokenize(
        corpus_of("abcdefghij"), CharacterTokenizer(), tokens=99, sequence_length=3
    )
    assert windows_NT.shape == (3, 3)


def test_a_short_text_gives_as_many_spread_windows_as_it_holds_where_that_is_allowed() -> None:
    def spread(text: str, *, or_fewer: bool) -> torch.Tensor:
        return spread_windows(
            corpus_of(text), CharacterTokenizer(), sequences=4, sequence_length=3, or_fewer=or_fewer
        )

    whole_NT = tokenize(corpus_of("abcdefghij"), CharacterTokenizer(), tokens=10, sequence_length=5)
    ids = whole_NT.flatten().tolist()
    fewer_NT = spread("abcdefghij", or_fewer=True)
    assert fewer_NT.shape == (3, 3)
    assert fewer_NT[0].tolist() == ids[:3]
    assert fewer_NT[-1].tolist() == ids[-3:]
    assert spread("abcdefghijkl", or_fewer=True).shape == (4, 3)
    with pytest.raises(CorpusError, match="has 10 tokens, and 4 × 3 are needed"):
        spread("abcdefghij", or_fewer=False)
    with pytest.raises(CorpusError, match="has 2 tokens"):
        spread("ab", or_fewer=True)


def test_less_than_one_window_is_an_error_that_says_found_and_needed() -> None:
    with pytest.raises(CorpusError, match=r"has 3 tokens, and 1 × 4 are needed"):
        tokenize(corpus_of("abc"), CharacterTokenizer(), tokens=8, sequence_length=4)
    with pytest.raises(CorpusError, match=r"tokens=3: does not fill one window of 4"):
        tokenize(corpus_of("abcdefgh"), CharacterTokenizer(), tokens=3, sequence_length=4)
    with pytest.raises(CorpusError, match="sequence_length=1: predicts nothing"):
        tokenize(corpus_of("abcdefgh"), CharacterTokenizer(), tokens=3, sequence_length=1)


def test_a_token_outside_the_vocabulary_is_an_error() -> None:
    options = {"tokens": 4, "sequence_length": 4}
    tokenize(corpus_of("abcd"), CharacterTokenizer(), **options, vocabulary_size=101)
    with pytest.raises(CorpusError, match=r"token 100, but the model's vocabulary has 100"):
        tokenize(corpus_of("abcd"), CharacterTokenizer(), **options, vocabulary_size=100)


def test_of_a_long_text_only_the_excerpts_are_tokenized() -> None:
    tokenizer = CharacterTokenizer()
    windows_NT = tokenize(corpus_of("abcd" * 1000), tokenizer, tokens=8, sequence_length=4)
    assert tokenizer.lengths == [4 * 64, 4 * 64]
    assert windows_NT.tolist() == [[97, 98, 99, 100]] * 2


def test_excerpts_of_a_long_text_are_spread_over_all_of_it() -> None:
    text = "".join(chr(0x4E00 + place) for place in range(4000))  # every place has its own
    windows_NT = tokenize(corpus_of(text), CharacterTokenizer(), tokens=16, sequence_length=4)
    assert [token - 0x4E00 for token in windows_NT[:, 0].tolist()] == [0, 1000, 2000, 3000]
    assert [token - 0x4E00 for token in windows_NT[3].tolist()] == [3000, 3001, 3002, 3003]


def test_a_text_of_long_tokens_is_tokenized_whole() -> None:
    class LineTokenizer(CharacterTokenizer):
        def __call__(self, text: str, **options: bool) -> dict[str, list[int]]:
            super().__call__(text, **options)
            return {"input_ids": list(range(text.count("\n")))}

    tokenizer = LineTokenizer()
    windows_NT = tokenize(
        corpus_of(("x" * 99 + "\n") * 40), tokenizer, tokens=20, sequence_length=10
    )
    assert windows_NT.tolist() == [list(range(10)), list(range(30, 40))]
    assert tokenizer.lengths == [10 * 64, 10 * 64, 4000]


def test_a_text_is_told_by_the_share_that_the_tokenizer_has_no_words_for(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path, bos=True)
    windows = {name: torch.full((1, 128), 5) for name in ("few", "many")}
    assert unknown_words(tokenizer, windows) == []
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    windows["few"][0, :1] = windows["many"][0, :32] = tokenizer.unk_token_id
    (told,) = unknown_words(tokenizer, windows)
    assert told.startswith("many: 25.0% of its tokens are '<unk>'")
    tokenizer.unk_token = "<bos>"  # as tokenizers do that have no such word
    windows["many"][0, :32] = tokenizer.unk_token_id
    assert unknown_words(tokenizer, windows) == []
