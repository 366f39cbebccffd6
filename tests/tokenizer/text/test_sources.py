import gzip
import json
import os
import sys
import threading

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.tokenizer import count_text, train_bpe
from tilewright.tokenizer.text import sources
from tilewright.tokenizer.text.sources import Documents, Files, iter_blocks, text_bytes
from tilewright.tokenizer.text.streams import open_stream

TEXTS = ["The first.", "Ein zweites: ü, 中文 🙂\n\n", "", "the <|end|> of it", "x" * 3000, " last\n"]


def documents(blocks):
    """Return the documents in the blocks, as (text, weight), and check the invariants of each block."""
    found = []
    for block in blocks:
        assert block.data.dtype == np.uint8
        assert block.ends.dtype == np.int64
        assert block.ends[-1] == len(block.data) > 0
        behind = block.data.ctypes.data + len(block.data)
        base = block.data.base
        assert base.ctypes.data + base.nbytes - behind >= 64 if isinstance(base, np.ndarray) else base is not None
        start = 0
        for end in block.ends.tolist():
            found.append((block.data[start:end].tobytes(), block.weight))
            start = end
    return found


def text_of(blocks):
    return b"".join(text for text, _ in documents(blocks))


@pytest.fixture
def corpus(tmp_path):
    """The same documents in every format with documents, and their text in every format of plain text."""
    lines = "".join(json.dumps({"n": i, "text": text, "other": None}) + "\n" for i, text in enumerate(TEXTS)).encode()
    plain = "".join(TEXTS).encode() * 50
    contents = {"a.txt": plain, "b.jsonl": lines, "c.ndjson": lines.rstrip().replace(b"\n", b"\r\n\r\n")}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content[:500]) + gzip.compress(content[500:]))
        frames = zstandard.ZstdCompressor().compress(content[:500]) + zstandard.ZstdCompressor().compress(content[500:])
        (tmp_path / f"{name}.zst").write_bytes(frames)
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "n": range(len(TEXTS))}), tmp_path / "d.parquet")
    return tmp_path


@pytest.mark.parametrize("block_bytes", [16, 1000, 1 << 21])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_text_is_complete(corpus, name, block_bytes):
    blocks = list(iter_blocks(corpus / name, ["<|end|>"], block_bytes=block_bytes))
    assert text_of(blocks) == (corpus / "a.txt").read_bytes()
    assert (len(blocks) == 1) == (block_bytes == 1 << 21)


@pytest.mark.parametrize("block_bytes", [1, 100, 1 << 21])
@pytest.mark.parametrize(
    "name", ["b.jsonl", "b.jsonl.gz", "b.jsonl.zst", "c.ndjson", "c.ndjson.gz", "c.ndjson.zst", "d.parquet"]
)
def test_documents_are_separate(corpus, name, block_bytes):
    expected = [(text.encode(), 1) for text in TEXTS]
    assert documents(iter_blocks(corpus / name, block_bytes=block_bytes)) in (expected, [e for e in expected if e[0]])
    assert text_bytes(corpus / name) is None


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    text=st.lists(st.sampled_from(["a b", "中 ", "<|>", "<|><|>", "\n", " ", "é", "!", "1"]), min_size=1, max_size=60).map(
        "".join
    ),
    block_bytes=st.integers(1, 50),
)
def test_blocks_tokenized_separately_equal_the_whole(specification, text_file, text, block_bytes):
    specials = ("<|>", "<|><|>", "a b")
    path = text_file(text)
    blocks = [block.data.tobytes().decode() for block in iter_blocks(path, specials, block_bytes=block_bytes)]
    assert "".join(blocks) == text
    assert [part for block in blocks for part in specification.split(block, specials)] == specification.split(text, specials)
    assert text_bytes(path) == len(text.encode())


def test_text_without_borders_is_one_block(text_file):
    assert len(list(iter_blocks(text_file("acgt" * 1000), block_bytes=10))) == 1
    assert len(list(iter_blocks(text_file("a b" * 1000), pattern=".", block_bytes=10))) == 1
    assert len(list(iter_blocks(text_file("a b<|>" * 1000), ["<|>"], pattern=".", block_bytes=10))) > 100


def test_folders_and_globs_are_read_in_order_of_names(tmp_path):
    for name, text in {"b.txt": "b", "a/z.md": "z", "a/.hidden": "no", ".git/x": "no", "empty.txt": "", "c.txt": "c"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert text_of(iter_blocks(tmp_path)) == b"zbc"
    assert text_of(iter_blocks(str(tmp_path / "*.txt"))) == b"bc"
    assert text_of(iter_blocks(str(tmp_path / "**" / "*.md"))) == b"z"
    assert text_of(iter_blocks([tmp_path / "c.txt", tmp_path / "a"])) == b"cz"
    (tmp_path / "q[1].txt").write_text("brackets")
    assert text_of(iter_blocks(tmp_path / "q[1].txt")) == b"brackets"


def test_iterables_as_sources():
    items = ["one", b"two\xff", ("three", 3), (b"four", 3), "five", "a\ud800b"]
    expected = [(b"one", 1), (b"two\xff", 1), (b"three", 3), (b"four", 3), (b"five", 1), ("a\ufffdb".encode(), 1)]
    assert documents(iter_blocks(Documents(iter(items)))) == expected
    doubled = [(text, 2 * weight) for text, weight in expected]
    assert documents(iter_blocks([Documents(items, weight=2)])) == doubled
    with pytest.raises(TypeError, match="a document is a int"):
        list(iter_blocks(Documents([1])))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="an input is a int"):
        iter_blocks([1])  # pyright: ignore[reportArgumentType]


def test_documents_and_weights_affect_the_merges(corpus):
    # There is no pair across two documents.
    assert train_bpe(Documents([("ab", 3), "c", "c"]), 257)[1] == [(b"a", b"b")]
    repeated = train_bpe([*[corpus / "d.parquet"] * 2, Documents(["zq zq", "zq"])], 300)
    weighted = train_bpe([Files(corpus / "b.jsonl.gz", weight=2), Documents(iter([("zq", 2), " zq"]))], 300)
    assert weighted == repeated
    assert b"zq" in weighted[0].values()
    assert weighted != train_bpe([corpus / "b.jsonl", Documents(["zq"])], 300)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt does not exist"),
        ("empty.txt", b"", "is empty"),
        ("none/*.txt", None, "holds no non-empty file"),
        ("x.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:-20], "x.txt.gz is cut off"),
        ("x.txt.gz", b"plain text", r"x.txt.gz is damaged, or not a .gz file"),
        ("x.txt.zst", zstandard.ZstdCompressor().compress(os.urandom(5000))[:-7], "x.txt.zst is cut off"),
        ("x.txt.zst", b"plain text", r"x.txt.zst is damaged, or not a .zst file"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": "b', "line 3 is not JSON in UTF-8, or is cut off"),
        ("x.jsonl", b'{"text": "\xff"}', "line 1 is not JSON in UTF-8"),
        ("x.jsonl", b'{"content": "a", "id": 1}', "line 1 has no column 'text': it has content, id"),
        ("x.jsonl", b'["text"]', "line 1 has no column 'text': it has a list"),
        ("x.jsonl", b'{"text": 5}', "line 1 has a int in column 'text'"),
        ("x.parquet", b"PAR1 nonsense", "x.parquet is damaged"),
        ("x.parquet.gz", b"nonsense", "x.parquet.gz is a compressed Parquet file"),
    ],
)
def test_invalid_files_raise(tmp_path, name, content, message):
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as refused:
        list(iter_blocks(str(tmp_path / name)))
    assert "\n" not in str(refused.value)


def test_missing_columns_and_columns_without_text_raise(corpus):
    with pytest.raises(UserError, match="has no column 'body': it has text, n"):
        list(iter_blocks(Files(corpus / "d.parquet", column="body")))
    table = pyarrow.table({"text": [["a"], ["b"]]})
    pyarrow.parquet.write_table(table, corpus / "lists.parquet")
    with pytest.raises(UserError, match="column 'text' is not text"):
        list(iter_blocks(corpus / "lists.parquet"))


def test_null_is_empty_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "x.parquet")
    write(tmp_path / "x.jsonl", '{"text": "a"}\n{"text": null}\n{"text": "b"}')
    for name in ("x.parquet", "x.jsonl"):
        assert documents(iter_blocks(tmp_path / name)) == [(b"a", 1), (b"", 1), (b"b", 1)]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads everything")
def test_an_unreadable_file_raises_before_any_is_read(tmp_path):
    for index in range(3):
        write(tmp_path / f"{index}.txt", "text")
    (tmp_path / "2.txt").chmod(0)
    with pytest.raises(UserError, match=r"cannot read .*2.txt: Permission denied"):
        iter_blocks(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads everything")
def test_an_unreadable_folder_raises(tmp_path):
    write(tmp_path / "a.txt", "text")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match=r"cannot read .*closed: Permission denied"):
        iter_blocks(tmp_path)


def test_impossible_paths_raise():
    with pytest.raises(UserError, match=r"cannot read .*: File name too long"):
        iter_blocks(["a document, not a path " * 100])


def test_a_file_that_cannot_be_opened_raises(tmp_path, monkeypatch):
    for index in range(3):
        write(tmp_path / f"{index}.txt", "text")
    real = sources.Path.open

    def refuse(path, *arguments):
        if path.name == "1.txt":
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments)

    monkeypatch.setattr(sources.Path, "open", refuse)
    with pytest.raises(UserError, match=r"cannot read .*1.txt: Permission denied"):
        iter_blocks(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_raises(tmp_path):
    path = write(tmp_path / "x.txt", "word " * 100_000)
    blocks = iter_blocks(path, block_bytes=1000)
    next(blocks)
    os.truncate(path, 200_000)
    with pytest.raises(UserError, match=r"x.txt shrank from 500000 to \d+ bytes while it was read"):
        list(blocks)


def test_a_growing_file_is_read_up_to_its_old_size(tmp_path):
    path = write(tmp_path / "x.txt", "word " * 1000)
    blocks = iter_blocks(path, block_bytes=1000)
    first = next(blocks).data.tobytes()
    with path.open("a") as file:
        file.write("more " * 1000)
    assert first + text_of(blocks) == b"word " * 1000


@pytest.mark.parametrize("weight", [0, -1, 1.5, "2"])
def test_weights_must_be_positive_integers(corpus, weight):
    for source in (Files(corpus / "a.txt", weight=weight), Documents(["a"], weight), Documents([("a", weight)])):
        with pytest.raises(UserError, match=r"weight is .*: expected an integer from 1 to"):
            list(iter_blocks(source))


def test_counts_beyond_64_bits_raise(corpus):
    for source in (Documents(["a"], 1 << 63), Documents([("a", 1 << 62)], 2), Documents([("a", 1 << 62)] * 3)):
        with pytest.raises(UserError, match=r"64 bits|2\^63"):
            count_text(source)
    assert dict(count_text(Documents([("a", 1 << 62)])).counts.items()) == {b"a": 1 << 62}


def test_block_bytes_must_be_positive(corpus):
    with pytest.raises(UserError, match="block_bytes is 0: expected at least 1"):
        iter_blocks(corpus / "a.txt", block_bytes=0)


def test_endings_are_case_insensitive(corpus):
    for name in ("a.txt.gz", "b.jsonl", "b.jsonl.zst", "d.parquet"):
        expected = text_of(iter_blocks(corpus / name))
        upper = (corpus / name).rename(corpus / name.upper())
        assert text_bytes(upper) is None
        assert text_of(iter_blocks(upper)) == expected


@pytest.mark.parametrize("name", ["a.zip", "a.txt.bz2", "a.XZ"])
def test_unsupported_compressions_raise(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(UserError, match=rf"{name} has an unsupported compression: expected \.gz or \.zst"):
        iter_blocks(tmp_path)


def test_zero_padding_of_compressed_files_is_ignored(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"one ") + bytes(5000) + gzip.compress(b"two") + bytes(3000))
    assert text_of(iter_blocks(tmp_path / "a.gz")) == b"one two"


def test_decompression_is_incremental(tmp_path):
    size = 200 << 20
    (tmp_path / "a.zst").write_bytes(zstandard.ZstdCompressor(level=1).compress(bytes(size)))
    (tmp_path / "a.gz").write_bytes(gzip.compress(bytes(size // 10), 9))
    for name, whole in (("a.zst", size), ("a.gz", size // 10)):
        with open_stream(tmp_path / name) as stream:
            pieces = []
            while stream.readinto(bytearray(1)):
                pieces.append(len(stream._ready) + 1)
                stream._ready = stream._ready[:0]
        assert sum(pieces) == whole
        assert max(pieces) <= 68 << 20


def test_inputs_are_resolved_once(corpus):
    expected = count_text([corpus / "a.txt", corpus / "b.jsonl"])
    found = count_text(corpus / name for name in ("a.txt", "b.jsonl"))
    assert dict(found.counts.items()) == dict(expected.counts.items())


def test_iterables_run_in_the_callers_thread():
    threads = set()

    def texts():
        for number in range(100):
            threads.add(threading.get_ident())
            yield f"text {number}"

    assert count_text(Documents(texts()), num_workers=3, block_bytes=50).text_bytes > 500
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("line", ["[" * 100_000, '{"text": "a", "n": ' + "9" * 5000 + "}"])
def test_json_that_python_cannot_parse_raises(tmp_path, line):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2 is not JSON"):
        list(iter_blocks(path))


def test_empty_inputs_raise():
    with pytest.raises(UserError, match="there is no input"):
        iter_blocks([])


def test_missing_packages_raise(corpus, monkeypatch):
    for name, file in (("zstandard", "a.txt.zst"), ("pyarrow", "d.parquet")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf"it needs {name}; pip install 'tilewright\[data\]'"):
            list(iter_blocks(corpus / file))
