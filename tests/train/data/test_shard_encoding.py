import json
import os
import threading

import numpy as np
import pytest

from tilewright.errors import UserError
from tilewright.tokenizer import Tokenizer
from tilewright.train.data import shard_encoding
from tilewright.train.data.encoded_file import open_encoded
from tilewright.train.data.encoding import encode_text
from tilewright.train.data.shard_encoding import default_folder, encode_shards
from tilewright.train.data.shards import INDEX_FILE, find_shards
from tilewright.train.data.token_file import TokenDataset


@pytest.fixture
def tokenizer(corpus):
    return Tokenizer.load(corpus / "tokenizer.json")


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    for number, name in enumerate(("a.txt", "b/a.txt", "c.txt", "d.jsonl")):
        text = "the cat sat on a mat. " * (5 * number + 1)
        (folder / name).write_text(json.dumps({"text": text}) if name.endswith("jsonl") else text)
    return folder


NAMES = ["a.txt.tokens", "b-a.txt.tokens", "c.txt.tokens", "d.jsonl.tokens"]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_end_of_text_follows_documents_of_tables(tmp_path, tokenizer, ending):
    path, documents = tmp_path / f"table{ending}", ["the cat", "sat on a mat", ""]
    if ending == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": documents}), path)
    encode_text(path, tokenizer, tmp_path / "a.tokens")
    dataset = TokenDataset(tmp_path / "a.tokens")
    text = "".join(f"{document}<|endoftext|>" for document in documents)
    assert dataset.records(np.array([0]), len(dataset))[0].tolist() == tokenizer.encode(text)
    # A touched file is hashed again and accepted.
    os.utime(path, ns=(0, 0))
    assert open_encoded(path, dataset.path, tokenizer).header == dataset.header


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("num_workers", [1, 3, 9])
def test_shards_do_not_depend_on_the_number_of_workers(texts, tokenizer, tmp_path, num_workers):
    shards = encode_shards([texts], tmp_path / "out", tokenizer, num_workers=num_workers)
    assert [shard.path for shard in shards] == [tmp_path / "out" / name for name in NAMES] == find_shards(tmp_path / "out")
    for name, text in (("c.txt.tokens", "c.txt"), ("d.jsonl.tokens", "d.jsonl")):
        encode_text(texts / text, tokenizer, tmp_path / "one.tokens", 1)
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "one.tokens").read_bytes()
        (tmp_path / "one.tokens").unlink()
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert (index["tokenizer"], index["vocab_size"]) == (tokenizer.fingerprint, 300)
    assert index["num_tokens"] == sum(len(TokenDataset(shard.path)) for shard in shards)
    assert [entry["text_file"]["name"] for entry in index["shards"]] == ["a.txt", "a.txt", "c.txt", "d.jsonl"]


def test_failed_encoding_resumes(texts, tokenizer, tmp_path, monkeypatch):
    whole = encode_shards([texts], tmp_path / "whole", tokenizer)
    real, encoded = shard_encoding.open_encoded, []

    def broken(text, *arguments):
        if text.name == "c.txt" and not (tmp_path / "fixed").exists():
            raise UserError("c.txt cannot be read")
        encoded.append(text.name)
        return real(text, *arguments)

    monkeypatch.setattr(shard_encoding, "open_encoded", broken)
    with pytest.raises(UserError, match=r"c.txt cannot be read"):
        encode_shards([texts], tmp_path / "out", tokenizer, num_workers=1)
    # The incomplete folder cannot be opened.
    with pytest.raises(UserError, match=r"out/index.json, .*.tokens does not exist: encode its text again"):
        find_shards(tmp_path / "out")
    (tmp_path / "fixed").touch()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tokens")}
    assert kept
    encode_shards([texts], tmp_path / "out", tokenizer, num_workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert len(whole) == 4


def test_error_stops_the_other_encodings(texts, tokenizer, tmp_path, monkeypatch):
    begun, ended = threading.Event(), []

    def encode(text, tokens, tokenizer, template, num_workers, advance):
        if text.name == "a.txt":
            begun.wait(60)
            raise UserError("a.txt is damaged")
        begun.set()
        try:
            while True:
                advance(0)
        except BaseException as error:
            ended.append(type(error).__name__)
            raise

    monkeypatch.setattr(shard_encoding, "open_encoded", encode)
    with pytest.raises(UserError, match=r"a.txt is damaged"):
        encode_shards([texts / "a.txt", texts / "c.txt"], tmp_path / "out", tokenizer, num_workers=2)
    assert ended == ["_Stopped"]


def test_more_texts_extend_existing_shards(texts, tokenizer, tmp_path):
    out = tmp_path / "out"
    encode_shards([texts / "c.txt"], out, tokenizer)
    before = (out / "c.txt.tokens").stat().st_mtime_ns
    encode_shards([texts / "c.txt", texts / "a.txt"], out, tokenizer)
    assert find_shards(out) == [out / "c.txt.tokens", out / "a.txt.tokens"]
    assert (out / "c.txt.tokens").stat().st_mtime_ns == before


def test_another_text_or_tokenizer_is_rejected(texts, tokenizer, tmp_path):
    encode_shards([texts], tmp_path / "out", tokenizer)
    with pytest.raises(UserError, match=r"tokens was encoded with another tokenizer"):
        encode_shards([texts], tmp_path / "out", Tokenizer(tokenizer.vocab, tokenizer.merges[:0], ["<|endoftext|>"]))
    (texts / "c.txt").write_text("the bat")
    with pytest.raises(UserError, match=r"c.txt.tokens was encoded from another c.txt; remove it"):
        encode_shards([texts], tmp_path / "out", tokenizer)


@pytest.mark.parametrize("name", ["tokenizer.json", "b/a.tokens", "b/a.tokens.part"])
def test_other_files_in_a_folder_of_texts_are_rejected(texts, tokenizer, tmp_path, name):
    (texts / name).write_text("x")
    with pytest.raises(
        UserError, match=rf"texts has .*{name}, which is not a text; name a folder, or a quoted glob, of texts only"
    ):
        encode_shards([texts], tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_complete_shards_are_not_rewritten(texts, tokenizer, tmp_path):
    encode_shards([texts], tmp_path / "out", tokenizer)
    before = {path: path.stat() for path in (tmp_path / "out").iterdir()}
    encode_shards([texts], tmp_path / "out", tokenizer)
    assert {path: path.stat() for path in (tmp_path / "out").iterdir()} == before


def test_two_texts_with_the_same_name_are_rejected(texts, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"b/a.txt and .*texts/a.txt would both be encoded to a.txt.tokens; rename one of them"):
        encode_shards([texts / "a.txt", texts / "b" / "a.txt"], tmp_path / "out", tokenizer)


def test_default_folder(tmp_path):
    (tmp_path / "texts").mkdir()
    for path in ("texts", "texts/*.txt", "texts/[ab]*/*.txt"):
        assert default_folder(tmp_path / path) == tmp_path / "texts.tokens"
