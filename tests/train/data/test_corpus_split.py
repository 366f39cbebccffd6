import gzip
import random
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from tilewright.errors import UserError
from tilewright.train.data import corpus_split
from tilewright.train.data.corpus_split import Split, split_corpus

MARK = "<|endoftext|>"


def documents_of(path):
    pieces = path.read_bytes().split(f"{MARK}\n".encode())
    assert pieces.pop() == b""
    return pieces


def sides(folder):
    return [set(documents_of(folder / name)) for name in ("train.txt", "valid.txt")]


@pytest.fixture
def stories():
    return [f"Story {i}: " + "word " * (i % 23) + "the end.\n" for i in range(2000)]


@pytest.fixture
def text(tmp_path, stories):
    path = tmp_path / "stories.txt"
    path.write_text("".join(f"{story}{MARK}\n" for story in stories))
    return path


def test_split_partitions_documents_in_order(text, tmp_path, stories):
    split = split_corpus([text], tmp_path / "out", 0.1)
    train, valid = (documents_of(tmp_path / "out" / name) for name in ("train.txt", "valid.txt"))
    encoded = [story.encode() for story in stories]
    order = {document: place for place, document in enumerate(encoded)}
    assert sorted(train + valid) == sorted(encoded)
    for side in (train, valid):
        assert [order[document] for document in side] == sorted(order[document] for document in side)
    sizes = [(tmp_path / "out" / name).stat().st_size for name in ("train.txt", "valid.txt")]
    assert split == Split(len(train), sizes[0], len(valid), sizes[1])
    # Within five standard deviations for 2,000 documents.
    assert abs(len(valid) - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.txt", "valid.txt"]


def test_side_depends_only_on_the_document(text, tmp_path, stories):
    split_corpus([text], tmp_path / "out", 0.1)
    train, valid = sides(tmp_path / "out")
    mixed = stories[::3] * 2 + [f"New {i}\n" for i in range(500)]
    random.Random(0).shuffle(mixed)
    other = tmp_path / "other.txt"
    # The side does not depend on the white space around a document either.
    other.write_text("".join(f"\n {story} \n\n{MARK}\n" for story in mixed))
    split_corpus([other], tmp_path / "again", 0.1)
    for side, before in zip(sides(tmp_path / "again"), (train, valid), strict=True):
        stripped = {document.strip() for document in before}
        again = {document.strip() for document in side if b"Story" in document}
        assert again <= stripped
        assert len(again) > 20


def test_larger_share_keeps_validation_documents(text, tmp_path):
    split_corpus([text], tmp_path / "small", 0.05)
    split_corpus([text], tmp_path / "large", 0.2)
    assert sides(tmp_path / "small")[1] < sides(tmp_path / "large")[1]


def test_split_is_stable(tmp_path):
    text = tmp_path / "numbers.txt"
    text.write_text("".join(f"{i}\n{MARK}\n" for i in range(100)))
    split_corpus([text], tmp_path / "out", 0.1)
    assert [int(document) for document in documents_of(tmp_path / "out" / "valid.txt")] == GOLDEN


GOLDEN = [9, 39, 49, 51, 55, 65]


def test_several_texts_compressed_or_not(text, tmp_path, stories):
    half = len(stories) // 2
    (tmp_path / "in").mkdir()
    # The last document of the first file has no end mark.
    (tmp_path / "in" / "a.txt").write_text(MARK.join(stories[:half]))
    (tmp_path / "in" / "b.txt.gz").write_bytes(gzip.compress(f"{MARK}\n".join(stories[half:]).encode()))
    split_corpus([text], tmp_path / "one", 0.1)
    for name, texts in {
        "folder": [tmp_path / "in"],
        "files": [tmp_path / "in" / name for name in ("a.txt", "b.txt.gz")],
    }.items():
        split_corpus(texts, tmp_path / name, 0.1)
        for side, expected in zip(("train.txt", "valid.txt"), sides(tmp_path / "one"), strict=True):
            found = {piece.strip() for piece in (tmp_path / name / side).read_bytes().split(MARK.encode())} - {b""}
            assert found == {document.strip() for document in expected}


PIECES = st.lists(st.sampled_from([MARK, MARK[:5], MARK[5:], "\n", " ", "a", "bc", "é"]), max_size=30)


@given(PIECES, st.integers(1, 20))
def test_documents_do_not_depend_on_read_boundaries(tmp_path_factory, pieces, read_bytes):
    path, content = tmp_path_factory.mktemp("split") / "a.txt", "".join(pieces).encode()
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, tqdm(disable=True) as bar:
        patch.setattr(corpus_split, "_READ_BYTES", read_bytes)
        documents = list(corpus_split._documents(path, bar))
    mark = MARK.encode()
    joined = b"".join(documents)
    if content.endswith((mark, mark + b"\n")) or not content:
        assert joined == content
    else:
        assert joined == content.removesuffix(b"\n") + b"\n" + mark + b"\n"
    for document in documents:
        assert document.count(mark) == 1
        assert document.endswith((mark, mark + b"\n"))
    # The newline after a mark belongs to the document before it.
    assert not any(before.endswith(mark) and after.startswith(b"\n") for before, after in pairwise(documents))


def test_memory_does_not_grow_with_the_text(tmp_path):
    text = tmp_path / "large.txt"
    with text.open("w") as file:
        for i in range(20_000):
            file.write(f"{i}" + " word" * 200 + f"\n{MARK}\n")
    assert text.stat().st_size > 20_000_000
    tracemalloc.start()
    try:
        split_corpus([text], tmp_path / "out", 0.01)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000


def test_errors_leave_no_files(text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for share in (0, 1, -0.5, float("nan")):
        with pytest.raises(UserError, match=f"valid_share is {share}: it must be between 0 and 1"):
            split_corpus([text], out, share)
    with pytest.raises(UserError, match=r"no.txt does not exist"):
        split_corpus([tmp_path / "no.txt"], out, 0.1)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"rows.jsonl is a table of documents"):
        split_corpus([tmp_path / "rows.jsonl"], out, 0.1)
    (tmp_path / "one.txt").write_text("a text without end")
    with pytest.raises(UserError, match=r"valid_share is 0.5: none of 1 documents would be in (train|valid).txt"):
        split_corpus([tmp_path / "one.txt"], out, 0.5)
    monkeypatch.setattr(corpus_split, "_MAX_DOCUMENT_BYTES", 10)
    with pytest.raises(UserError, match=r"one.txt has a document of more than 1 GiB"):
        split_corpus([tmp_path / "one.txt"], out, 0.5)
    assert not out.exists() or list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["train.txt", "valid.txt"])
def test_existing_output_is_not_overwritten(text, tmp_path, name):
    (tmp_path / name).write_text("existing")
    with pytest.raises(UserError, match=rf"{name} exists already"):
        split_corpus([text], tmp_path, 0.1)
    assert (tmp_path / name).read_text() == "existing"
