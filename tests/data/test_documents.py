import errno
import gzip
import io
import json
import os
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from flexolmo.data import formats
from flexolmo.data.documents import Document, find_files, read_documents, write_documents
from flexolmo.data.formats import ReadSettings
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


def parquet(columns, names=None, **options):
    """Bytes of a Parquet file."""
    sink = io.BytesIO()
    table = pyarrow.table(columns, names=names) if names else pyarrow.table(columns)
    pyarrow.parquet.write_table(table, sink, **options)
    return sink.getvalue()


def zstd_frame(content, **parameters):
    compressor = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(**parameters)
    ).compressobj()
    return compressor.compress(content) + compressor.flush()


def damaged_in_the_middle(packed):
    middle = len(packed) // 2
    return packed[:middle] + bytes(255 - b for b in packed[middle : middle + 20]) + packed[middle:]


def not_utf8():
    """A column of strings whose second is not UTF-8, as other programs write it."""
    binary = pyarrow.array([b"fine", b"caf\xe9"])
    return pyarrow.Array.from_buffers(pyarrow.string(), 2, binary.buffers())


DEEP = b'{"text": "x", "y": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
NOTES = "\n".join(json.dumps({"text": f"note {i * i * i}"}) for i in range(5000)).encode()


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text":', "line 2: not JSON"),
        ("a.jsonl", b"[1]", "line 1: found a JSON list"),
        ("a.jsonl", b'{"body": "x"}', "its fields are: body"),
        ("a.jsonl", b'{"\\ud800": "x"}', "its fields are: \\ud800"),
        ("a.jsonl", b'{"text": 3}', "is int"),
        ("a.jsonl", b'{"text": "x", "id": [1]}', "line 1: field 'id' is list"),
        ("a.jsonl", b'{"text": "x", "text": "y"}', "a key appears twice"),
        ("a.jsonl", b'{"text": "x"}\n' + DEEP, "line 2: not JSON (nested too deeply)"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], "cut off"),
        ("a.txt.gz", damaged_in_the_middle(gzip.compress(NOTES, mtime=0)), "is damaged"),
        ("a.jsonl.gz", b"no gzip", "is damaged"),
        ("a.jsonl.zst", b"no zstandard", "is damaged"),
        ("a.jsonl.zst", damaged_in_the_middle(zstandard.compress(NOTES)), "is damaged"),
        ("a.jsonl.zst", zstandard.compress(LINES.encode())[:-5], "cut off"),
        ("a.jsonl.zst", zstd_frame(b"{}", window_log=28), "Give --zstd-window 28"),
        ("a.json", b'[{"text": "x"}, {"text": "y"}', "record 2, and after it: the file is cut off"),
        ("a.json", b'[{"text": "x"}] {"text": "y"}', "after the end of the JSON"),
        ("a.json", b'[{"text": "x"}, {"text": nothing}]', "record 2: not JSON"),
        ("a.json", b'[{"text": "x"}, 3]', "record 2: found a JSON int"),
        ("a.json", b"[" + DEEP + b"]", "record 1: not JSON (nested too deeply)"),
        ("a.parquet", b"no parquet", "is damaged"),
        ("a.parquet", parquet({"text": not_utf8()}), "row 2: text that is not UTF-8"),
        ("a.parquet", parquet([["x"], ["y"]], names=["text", "text"]), "2 columns are called"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.txt", b"\0\1\2\3\4 x", "not plain text"),
        ("a.txt", b"\x1b$B45<T\x1b(B\n" * 9, "looks like iso2022_jp"),
    ],
)
def test_malformed_files_are_named_with_what_was_expected(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        list(read_documents(tmp_path))
    assert said in str(refused.value) and name in str(refused.value)
    str(refused.value).encode()  # can be printed


def test_halves_of_characters_in_text_and_id_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b", "id": "n\\udfff"}\n{"text": null}')
    noted = Counter()
    assert list(read_documents(tmp_path, noted=noted)) == [Document("a?b", "a", "n?")]
    assert noted == {
        "texts with halves of characters, now question marks": 2,
        "records without text": 1,
    }


def test_files_of_every_kind_and_case_are_read_and_all_others_named(tmp_path):
    text = {"text": "x"}
    for name in ("A.TXT", "d.md", "sub/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "B.JSONL").write_text(json.dumps(text))
    (tmp_path / "c.json").write_text(json.dumps([text, text]))
    (tmp_path / "f.ndjson").write_text(json.dumps(text))
    (tmp_path / "g.txt.gz").write_bytes(gzip.compress(b"x"))
    (tmp_path / "h.md.ZST").write_bytes(zstandard.compress(b"x"))
    (tmp_path / "i.json.gz").write_bytes(gzip.compress(json.dumps(text).encode()))
    (tmp_path / "J.PARQUET").write_bytes(parquet({"text": ["x"]}))
    os.mkfifo(tmp_path / "pipe.txt")  # reading it would wait for ever
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "up").symlink_to(tmp_path)
    (tmp_path / "scan.PDF").write_text("x")
    (tmp_path / "notes").write_text("x")
    (tmp_path / "k.tar.gz").write_text("x")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "l.txt").write_text("x")
    files, others = find_files(tmp_path)
    assert len(files) == 10
    assert [d.text for d in read_documents(tmp_path)] == ["x"] * 11
    assert others == {
        "hidden": [".hidden"],
        "of kind .gz": ["k.tar.gz"],
        "of kind .pdf": ["scan.PDF"],
        "without a suffix": ["notes"],
        "no file, or a link to none": ["gone.txt", "pipe.txt", "up"],
    }


def test_what_may_not_be_read_stops_the_reading(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("x")

    def refuse(path, *rest):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:  # the tests may run as root, who may read everything
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(DataError, match="Permission denied"):
            find_files(tmp_path)
    monkeypatch.setattr("flexolmo.data.formats._MeteredFile.readinto", refuse)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read \(Permission denied\)"):
        list(read_documents(tmp_path))


POEM = "Über allen Gipfeln\nist Ruh, in allen Wipfeln\n"
RUSSIAN = "Пациент был осмотрен во вторник.\nОн ушёл домой с таблетками.\n"
HINDI = "रोगी को मंगलवार को देखा गया।\nवह घर गया।\n"


@pytest.mark.parametrize("text", ["The patient was seen.\n", POEM, RUSSIAN, HINDI])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_utf_16_and_32_are_decoded_with_and_without_a_mark(tmp_path, text, encoding, mark):
    (tmp_path / "a.txt").write_bytes((mark + text).encode(encoding))
    line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
    (tmp_path / "b.jsonl").write_bytes((mark + line).encode(encoding))
    (tmp_path / "c.json").write_bytes((mark + f"[{line}]").encode(encoding))
    noted = Counter()
    assert [d.text for d in read_documents(tmp_path, noted=noted)] == [text] * 3
    assert noted.total() == 3 and all("decoded from utf" in reason for reason in noted)


def test_utf_16_in_a_field_that_was_read_as_utf_8_is_refused(tmp_path):
    wrong = RUSSIAN.encode("utf-16-le").decode()
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": wrong}))
    with pytest.raises(DataError, match="line 1: utf_16_le"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize(
    "text", ["12\x0034\x0056\x00" * 20, "a\x0cb" * 20, "\x1b[1mbold\x1b[0m" * 9]
)
def test_text_with_some_control_characters_is_text(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}))
    assert [d.text for d in read_documents(tmp_path)] == [text] * 2


def test_another_encoding_is_read_when_it_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("café – déjà".encode("cp1252"))
    line = '{"text": "café"}\n'
    (tmp_path / "b.jsonl").write_bytes(line.encode() + line.encode("cp1252"))
    (tmp_path / "c.json").write_bytes(line.encode("cp1252") + line.encode())
    noted = Counter()
    found = read_documents(tmp_path, settings=ReadSettings(encoding="cp1252"), noted=noted)
    assert [d.text for d in found] == ["café – déjà"] + ["café"] * 4
    assert noted == {"texts decoded from cp1252": 3}
    with pytest.raises(DataError, match="--encoding"):
        list(read_documents(tmp_path))
    with pytest.raises(DataError, match="not Unicode"):
        ReadSettings(text_field="\udcff")
    for name in ("no-such", "rot13", "hex"):
        with pytest.raises(DataError, match="no text encoding"):
            ReadSettings(encoding=name)


def test_a_long_zstandard_window_is_read_when_it_is_allowed(tmp_path):
    for log in (28, 31):
        (tmp_path / "a.jsonl.zst").write_bytes(
            zstandard.compress(LINES.encode()) + zstd_frame(LINES.encode(), window_log=log)
        )
        with pytest.raises(DataError, match=f"Give --zstd-window {log}"):
            list(read_documents(tmp_path))
        assert len(list(read_documents(tmp_path, settings=ReadSettings(zstd_window=log)))) == 4
    with pytest.raises(DataError, match="10 to 31"):
        ReadSettings(zstd_window=32)


def test_what_unpacks_to_far_too_much_is_refused_before_it_does(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(b"a" * (9 << 20)))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"a" * (9 << 20)))
    (tmp_path / "d.parquet").write_bytes(parquet({"text": ["a" * (9 << 20)]}, compression="zstd"))
    for name in ("a.jsonl.zst", "b.txt.gz", "d.parquet"):
        with pytest.raises(DataError, match=f"{name}.*over 8,388,608 bytes in one record"):
            list(read_documents(tmp_path / name, settings=ReadSettings(max_record_bytes=1 << 23)))
    monkeypatch.setattr(formats, "_PARQUET_BOMB_BYTES", 1 << 20)
    with pytest.raises(DataError, match=r"d.parquet: .* row group 1, .* decompression bomb"):
        list(read_documents(tmp_path / "d.parquet"))
    monkeypatch.setattr(formats, "_BOMB_BYTES", 1 << 20)
    (tmp_path / "e.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "a"}\n' * 50_000))
    with pytest.raises(DataError, match=r"e.jsonl.zst, line \d+: .* decompression bomb"):
        list(read_documents(tmp_path / "e.jsonl.zst"))


def test_the_work_of_reading_json_grows_as_its_length(tmp_path, monkeypatch):
    """Characters that are looked at: a record is tried anew each time its text has doubled."""

    class Counting(json.JSONDecoder):
        seen = 0

        def raw_decode(self, text, idx=0):
            Counting.seen += len(text) - idx
            return super().raw_decode(text, idx)

    monkeypatch.setattr(formats, "_JSON", Counting())
    for size in (100_000, 8_000_000):
        (tmp_path / "a.json").write_text(json.dumps([{"text": "a" * size}]))
        Counting.seen = 0
        assert len(next(read_documents(tmp_path)).text) == size
        assert Counting.seen < 6 * size


FORMATS = {
    "a.jsonl": LINES.encode(),
    "a.jsonl.gz": gzip.compress(LINES.encode(), mtime=0),
    "a.jsonl.zst": zstandard.compress(LINES.encode()),
    "a.json": json.dumps(RECORDS).encode(),
    "a.json.zst": zstandard.compress(json.dumps(RECORDS).encode()),
    "a.txt": POEM.encode("utf-16-le"),
    "a.md.gz": gzip.compress(POEM.encode(), mtime=0),
    "a.parquet": parquet({"text": ["x", "zwei"], "id": [1, 2]}),
}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_any_bytes_give_documents_or_a_data_error(tmp_path_factory, name, data):
    content = bytearray(FORMATS[name])
    if data.draw(st.booleans(), "changed from a good file"):
        for place, byte in data.draw(
            st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)
        ):
            content[place] = byte
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        extra = data.draw(st.binary(max_size=8))
        content = content[:start] + extra + content[data.draw(st.sampled_from([start, end])) :]
    else:
        content = data.draw(st.binary(max_size=200))
    file = tmp_path_factory.mktemp("fuzz", numbered=True) / name
    file.write_bytes(content)
    try:
        for document in read_documents(file):
            document.text.encode(), (document.id or "").encode()
    except DataError as e:
        str(e).encode()


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
