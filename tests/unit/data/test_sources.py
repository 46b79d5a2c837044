"""Reading sources: what each kind yields, and the one message for each way a file can be wrong."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fullweight.core.config import Config
from fullweight.core.errors import ConfigError, DataError
from fullweight.data.render import EncodingOptions, render
from fullweight.data.sources import (
    Columns,
    FileSource,
    SourceConfig,
    SynthSource,
    content_digest,
    question_digest,
    read,
)
from fullweight.data.synth import SynthConfig

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"
CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


def samples_of(path, **options):
    return list(read(FileSource(kind="file", path=str(path), **options)))


def write(path, *lines):
    path.write_bytes(b"".join(x if isinstance(x, bytes) else json.dumps(x).encode() + b"\n" for x in lines))
    return path


def test_messages_come_back_with_their_place_and_id(tmp_path):
    """A record is the file's sample, the line it stands on, and its id; without one, a stable one."""
    path = write(tmp_path / "a.jsonl", {"messages": CHAT, "id": 7, "answer": "2", "other": 1}, {"messages": CHAT})
    first, second = samples_of(path)
    assert first.sample == {"messages": CHAT, "id": "7", "answer": "2"}
    assert (first.where, second.where) == (f"{path}:1", f"{path}:2")
    assert first.digest == second.digest == second.sample["id"]


def test_text_blocks_say_what_a_string_says(tmp_path):
    """OpenAI-style blocks become text, so that the same question in both forms is one question."""
    blocks = [{"type": "text", "text": "1+1?"}]
    path = write(
        tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": [{"role": "user", "content": blocks}, CHAT[1]]}
    )
    one, two = samples_of(path)
    assert two.sample["messages"] == CHAT
    assert one.digest == two.digest
    assert question_digest(one.sample) == question_digest(two.sample)


def test_an_image_is_refused_by_file_and_line(tmp_path):
    """The message says which block of which message of which line, and what it is."""
    blocks = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": "x"}}]
    path = write(
        tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": [{"role": "user", "content": blocks}, CHAT[1]]}
    )
    with pytest.raises(DataError, match=r"a\.jsonl:2: messages\[0\]: content block 2 is of type 'image_url'"):
        samples_of(path)


def test_bom_crlf_and_a_missing_last_newline_are_read(tmp_path):
    """What Windows editors write is a good file; U+2028 inside a string ends no line."""
    line = json.dumps({"text": "ä\u2028b"}, ensure_ascii=False).encode()
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + line + b"\r\n" + line)
    texts = [r.sample["text"] for r in samples_of(path, columns=Columns(text="text"))]
    assert texts == ["ä\u2028b"] * 2


def test_prompt_and_answer_columns_make_a_conversation(tmp_path):
    """A leading <think> block becomes the reasoning, to the letter; other answers stay as they are."""
    rows = [
        {"q": "why", "a": "<think>\nso\n</think>\n\nyes"},
        {"q": "why", "a": "no <think>x</think>"},
        {"q": "why", "a": "<think>never closed"},
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    found = samples_of(path, columns=Columns(prompt="q", answer="a"), system="Be brief.")
    assert found[0].sample["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "why"},
        {"role": "assistant", "reasoning_content": "\nso\n", "content": "\n\nyes"},
    ]
    assert found[1].sample["messages"][-1] == {"role": "assistant", "content": "no <think>x</think>"}
    assert found[2].sample["messages"][-1] == {"role": "assistant", "content": "<think>never closed"}


def test_parquet_equals_json_lines(tmp_path):
    """The same rows give the same content either way, though Parquet fills absent keys with nulls."""
    rows = [
        {"messages": [*CHAT, {"role": "user", "content": "?", "name": "x"}], "tools": '[{"name": "f"}]'},
        {"messages": CHAT, "tools": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    from_parquet = samples_of(tmp_path / "a.parquet")
    from_lines = samples_of(write(tmp_path / "a.jsonl", *rows))
    assert [r.sample for r in from_parquet] == [r.sample for r in from_lines]
    assert from_parquet[0].sample["tools"] == [{"name": "f"}]
    assert from_parquet[1].where.endswith("a.parquet row 2")


def test_csv_and_json_equal_json_lines(tmp_path):
    """The same rows in every kind of file: quotes, commas and line breaks in cells, and numbers stay texts."""
    rows = [{"q": 'a, "b"\n\nc', "a": "007", "id": "é"}, {"q": " x ", "a": "<think>t</think>1.50", "id": "2"}]
    columns = Columns(prompt="q", answer="a")
    wanted = samples_of(write(tmp_path / "a.jsonl", *rows), columns=columns)
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with (tmp_path / f"a{suffix}").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["q", "a", "id"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        found = samples_of(tmp_path / f"a{suffix}", columns=columns)
        assert [r.sample for r in found] == [r.sample for r in wanted]
        assert [r.where.rpartition(":")[2] for r in found] == ["2", "5"]  # where each row begins
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "lines.json").write_bytes((tmp_path / "a.jsonl").read_bytes())
    for name in ("a.json", "lines.json"):
        assert [r.sample for r in samples_of(tmp_path / name, columns=columns)] == [r.sample for r in wanted]


def test_messages_and_tools_of_a_csv_are_json_text(tmp_path):
    """A cell is text: what it holds is parsed, and an empty optional cell is an absent one."""
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["messages", "id", "tools"], [json.dumps(CHAT), "", '[{"name": "f"}]'], [json.dumps(CHAT), "7", ""]]
        )
    first, second = samples_of(tmp_path / "a.csv")
    assert first.sample == {"messages": CHAT, "id": first.digest, "tools": [{"name": "f"}]}
    assert second.sample == {"messages": CHAT, "id": "7"}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"", "its first line is empty"),
        ("a.csv", b"q,a\n", "is empty; expected at least one sample"),
        ("a.csv", b"q,q\nx,y\n", ":1: two columns have the same name"),
        ("a.csv", b"x,y\n1,2\n", "no column 'q'; columns found: x, y"),
        ("a.csv", b"q,a\nx,y\nz\n", ":3: 1 cells, expected 2"),
        ("a.csv", b'q,a\nx,"y\nz\n', ":3: not CSV: unexpected end of data"),
        ("a.csv", b'q,a\nx,"y"z\n', ":2: not CSV"),
        ("a.csv", b"q,a\nx,\xff\n", "not UTF-8"),
        ("a.csv", b"q,a\n,y\n", ":2: column 'q' must be a non-empty string"),
        ("a.json", b"[", "not JSON: Expecting value at column 2"),
        ("a.json", b"[\n{},\n{]", "not JSON: .* at line 3"),
        ("a.json", b"[3]", "row 1: expected a JSON object, found int"),
        ("a.json", b"[]", "is empty; expected at least one sample"),
        ("a.json", b"", "is empty; expected at least one sample"),
        ("a.json", b'{"data": []}', ":1: no column 'q'; columns found: data"),
    ],
)
def test_a_bad_csv_or_json_file_is_told_by_place(tmp_path, name, data, message):
    """Each malformed file is one DataError that says where and what."""
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        samples_of(tmp_path / name, columns=Columns(prompt="q", answer="a"))
    assert str(tmp_path / name) in str(caught.value)


def test_what_only_columnar_files_hold_is_refused_or_ignored(tmp_path):
    """A date in a key that the encoding ignores changes nothing; bytes where text belongs are told by row."""
    stamped = [{**m, "timestamp": datetime.datetime(2026, 1, 2)} for m in CHAT]
    pq.write_table(pa.Table.from_pylist([{"messages": stamped}]), tmp_path / "a.parquet")
    [record] = samples_of(tmp_path / "a.parquet")
    assert render(record.sample, EncodingOptions()) == render({"messages": CHAT}, EncodingOptions())
    for bad in ({"messages": [{"role": "user", "content": b"x"}, CHAT[1]]}, {"messages": CHAT, "tools": b"x"}):
        pq.write_table(pa.Table.from_pylist([bad]), tmp_path / "b.parquet")
        [record] = samples_of(tmp_path / "b.parquet")
        with pytest.raises(DataError, match=r"found bytes b'x'"):
            render(record.sample, EncodingOptions())


@pytest.mark.shared_data
def test_a_published_parquet_file_opens():
    """The NL4OPT test set: each row read, with the columns that the file names itself."""
    path = SHARED / "nl4opt_test.parquet"
    names = pq.read_schema(path).names
    with pytest.raises(DataError, match=f"no column 'messages'; columns found: {', '.join(names)}"):
        samples_of(path)
    text = next(n for n in names if pa.types.is_string(pq.read_schema(path).field(n).type))
    assert len(samples_of(path, columns=Columns(text=text))) == pq.read_metadata(path).num_rows


def test_a_folder_opens_through_datasets(tmp_path, monkeypatch):
    """A folder of data files and a saved dataset give the samples of the file they were made from."""
    import datasets

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", {"messages": CHAT})
    assert [r.sample["messages"] for r in samples_of(folder)] == [CHAT]
    packed = folder / "more.jsonl.gz"
    packed.write_bytes(gzip.compress((folder / "train.jsonl").read_bytes()))
    assert [r.sample["messages"] for r in samples_of(packed)] == [CHAT]
    (tmp_path / "a.txt").write_text("one line\n")
    assert [r.sample["text"] for r in samples_of(tmp_path / "a.txt", columns=Columns(text="text"))] == ["one line"]
    datasets.Dataset.from_list([{"messages": CHAT}]).save_to_disk(tmp_path / "saved")
    assert [r.sample["messages"] for r in samples_of(tmp_path / "saved")] == [CHAT]
    with pytest.raises(DataError, match="nearest: 'messages'"):
        samples_of(folder, columns=Columns(messages="mesages"))
    with pytest.raises(DataError, match="`datasets` cannot open it"):
        samples_of(tmp_path / "empty-folder-that-is-not-there")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty; expected at least one sample"),
        ([{"messages": CHAT}, b"\n", {"messages": CHAT}], ":2: empty line"),
        ([{"messages": CHAT}, b"  \r\n"], ":2: empty line"),
        ([{"messages": CHAT}, b'{"messages": [\n'], ":2: not JSON: .* at column"),
        ([b'{"text": "\xff"}\n'], ":1: not UTF-8 .byte 10.; save the file as UTF-8"),
        ([b"[1]\n"], ":1: expected a JSON object, found list"),
        ([b"[" * 200_000 + b"\n"], ":1: JSON nested too deeply"),
        (
            [{"messages": CHAT}, {"message": CHAT}],
            r":2: no column 'messages'.*found: message .nearest: 'message'",
        ),
        ([{}], ":1: no column 'messages'; the row has no columns"),
        ([{"messages": "hello"}], ":1: column 'messages' must be a list .* found str"),
        ([{"messages": []}], ":1: column 'messages' .* found an empty list"),
        ([{"messages": [{"content": "x"}]}], r":1: messages\[0\] has no role; found keys \['content'\]"),
        ([{"messages": None}], ":1: column 'messages' .* found NoneType"),
        ([{"messages": CHAT, "tools": "[{"}], ":1: column 'tools': not JSON"),
        ([b'{"messages": [{"role": "user", "content": "\\ud83d"}]}\n'], ":1: text with half of a surrogate"),
        ([{"messages": CHAT, "id": "\ud83d"}], ":1: text with half of a surrogate"),
        ([{"messages": CHAT, "tools": "[" * 200_000}], ":1: column 'tools': JSON nested too deeply"),
        ([b'{"messages": ' + b"9" * 5000 + b"}\n"], ":1: .*too many digits"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, lines, message):
    """Each malformed file is one DataError that says where and what."""
    path = write(tmp_path / "bad.jsonl", *lines)
    with pytest.raises(DataError, match=message) as caught:
        samples_of(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", ["", None, 3])
def test_a_text_column_must_hold_text(tmp_path, value):
    """An empty or non-string prompt, answer or text is an error, never the string 'None'."""
    path = write(tmp_path / "a.jsonl", {"q": "x", "a": value})
    for columns in (Columns(prompt="q", answer="a"), Columns(prompt="a", answer="q"), Columns(text="a")):
        with pytest.raises(DataError, match=":1: column 'a' must be a non-empty string, found"):
            samples_of(path, columns=columns)


def test_absent_and_unknown_files_are_refused(tmp_path):
    """A wrong path or kind of file says so, without a search on any network."""
    with pytest.raises(DataError, match="no data file at"):
        samples_of(tmp_path / "none.jsonl")
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(DataError, match=r"unknown kind of data file '.xlsx'; expected .jsonl, .json, .csv"):
        samples_of(tmp_path / "a.xlsx")
    for name in ("x" * 5000, "x" * 5000 + ".jsonl", "a\0b.jsonl"):
        with pytest.raises(DataError, match="no data file at"):
            samples_of(name)
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        samples_of(tmp_path / "a.parquet")


def test_contradictory_columns_are_refused():
    """Two layouts at once, half a layout, or a system text with nowhere to go fail in the config."""

    class Holder(Config):
        source: SourceConfig

    for values, message in (
        ({"columns": {"prompt": "q"}}, "go together"),
        ({"columns": {"messages": "m", "text": "t"}}, "found messages and text"),
        ({"system": "s"}, "system goes with prompt"),
        ({"weight": 0.0}, "greater than 0"),
        ({"colums": {}}, "did you mean 'columns'"),
    ):
        with pytest.raises(ConfigError, match=message):
            Holder.resolve({"source": {"kind": "file", "path": "x.jsonl", **values}})


def test_synth_source_is_read_like_a_file():
    """Generated samples arrive in order with their own ids and answers, the same on every reading."""
    source = SynthSource(kind="synth", synth=SynthConfig(seed=3, num_samples=5))
    first, again = list(read(source)), list(read(source))
    assert first == again
    assert len({r.sample["id"] for r in first}) == 5
    assert all(r.sample["answer"] is not None for r in first)


def test_digests_see_content_and_nothing_else():
    """Key order, id and answer do not matter; the question is what comes before the first answer."""
    swapped = [dict(reversed(m.items())) for m in CHAT]
    assert content_digest({"messages": CHAT, "id": "a", "answer": "2"}) == content_digest({"messages": swapped})
    other_answer = [CHAT[0], {"role": "assistant", "content": "two"}]
    with_system = [{"role": "system", "content": "s"}, *CHAT]
    longer = [*CHAT, {"role": "user", "content": "and 2+2?"}]
    for messages in (other_answer, with_system, longer):
        assert content_digest({"messages": messages}) != content_digest({"messages": CHAT})
        assert question_digest({"messages": messages}) == question_digest({"messages": CHAT})
    asked = [{"role": "user", "content": "1+2?"}, CHAT[1]]
    assert question_digest({"messages": asked}) != question_digest({"messages": CHAT})
    assert question_digest({"text": "a"}) != question_digest({"text": "b"})
