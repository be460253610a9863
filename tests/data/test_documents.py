import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from flexolmo.data.documents import (
    Document,
    ReadSettings,
    find_files,
    read_documents,
    write_documents,
)
from flexolmo.errors import DataError

RECORDS = [{"text": "one\nline"}, {"text": "zwei ü 日本", "id": 7, "source": "web"}]
LINES = "\n".join(json.dumps(record) for record in RECORDS) + "\n\n"


@pytest.mark.parametrize(
    "name, write",
    [
        ("a.jsonl", lambda p: p.write_text(LINES)),
        ("a.jsonl.gz", lambda p: p.write_bytes(gzip.compress(LINES.encode()))),
        ("a.jsonl.zst", lambda p: p.write_bytes(zstandard.compress(LINES.encode()))),
        (
            "a.parquet",
            lambda p: pyarrow.parquet.write_table(
                pyarrow.table(
                    {"text": [r["text"] for r in RECORDS], "id": [None, 7], "source": [None, "web"]}
                ),
                p,
            ),
        ),
    ],
)
def test_every_format_gives_the_same_documents(tmp_path, name, write):
    write(tmp_path / name)
    assert list(read_documents(tmp_path)) == [
        Document("one\nline", "a"),
        Document("zwei ü 日本", "web", "7"),
    ]


def test_all_frames_of_a_zstandard_file_are_read(tmp_path):
    frames = [zstandard.compress(f'{{"text": "{i}"}}\n'.encode() * 9000) for i in range(3)]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    texts = [document.text for document in read_documents(tmp_path)]
    assert texts == ["0"] * 9000 + ["1"] * 9000 + ["2"] * 9000


def test_a_text_file_is_one_document_and_other_files_are_passed_over(tmp_path):
    (tmp_path / "b.txt").write_text("\ufeffhello\nworld")
    (tmp_path / "a.pdf").write_text("{}")
    (tmp_path / ".hidden.txt").write_text("no")
    assert list(read_documents(tmp_path)) == [Document("hello\nworld", "b", "b.txt")]


@given(
    st.lists(
        st.tuples(st.text(st.characters(exclude_categories=["Cs"])), st.none() | st.text("abc"))
    )
)
def test_written_documents_are_read_back(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("w") / "d.jsonl.zst"
    documents = [Document(text, "s", identity) for text, identity in content]
    assert write_documents(file, documents) == len(documents)
    assert list(read_documents(file)) == documents


def test_halves_of_characters_are_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}')
    assert next(read_documents(tmp_path)).text == "a?b"


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text":', "line 2: not JSON"),
        ("a.jsonl", b"[1]", "line 1: found a JSON list"),
        ("a.jsonl", b'{"body": "x"}', "its fields are: body"),
        ("a.jsonl", b'{"text": 3}', "is int"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], "cut off"),
        ("a.jsonl.gz", b"no gzip", "is damaged"),
        ("a.jsonl.zst", b"no zstandard", "is damaged"),
        ("a.jsonl.zst", zstandard.compress(LINES.encode())[:-5], "cut off"),
        ("a.parquet", b"no parquet", "is damaged"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
    ],
)
def test_malformed_files_are_named_with_what_was_expected(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        list(read_documents(tmp_path))
    assert said in str(refused.value) and name in str(refused.value)


def test_a_parquet_file_without_the_column_lists_its_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="its fields are: body"):
        list(read_documents(tmp_path))
    assert next(read_documents(tmp_path, settings=ReadSettings(text_field="body"))).text == "x"


def test_nothing_to_read_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError):
            find_files(path)
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(DataError, match="not a kind of file"):
        find_files(tmp_path / "a.doc")


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def documents():
        yield Document("a", "s")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_documents(tmp_path / "d.jsonl.zst", documents())
    assert list(tmp_path.iterdir()) == []
