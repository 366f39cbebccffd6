import errno
import functools
import gzip
import itertools
import json
import multiprocessing
import os
import resource
import signal
import time

import numpy as np
import pytest

from huggingface_tokenizers import STYLES, make
from tilewright.errors import UserError
from tilewright.tokenizer import Tokenizer, read_tokenizer
from tilewright.tokenizer.text.sources import iter_blocks
from tilewright.train.data import encoding
from tilewright.train.data.encoding import decode_text, encode_text, text_sha256
from tilewright.train.data.token_file import HEADER_BYTES, FileStamp, TokenDataset, TokenWriter, read_header

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def tokenizer(corpus):
    return Tokenizer.load(corpus / "tokenizer.json")


@pytest.fixture
def text(corpus, tmp_path):
    path = tmp_path / "train.txt"
    path.write_bytes((corpus / "train.txt").read_bytes())
    return path


@pytest.fixture
def small_blocks(monkeypatch):
    """Split a text of a few kilobytes into many blocks."""
    monkeypatch.setattr(encoding, "iter_blocks", functools.partial(iter_blocks, block_bytes=500))


@pytest.fixture
def whole(text, tokenizer, tmp_path):
    """The bytes of the token file of an uninterrupted encoding."""
    encode_text(text, tokenizer, tmp_path / "whole.tokens")
    return (tmp_path / "whole.tokens").read_bytes()


def header_of(path):
    with path.open("rb") as file:
        return read_header(file, path)


def test_round_trip_through_a_token_file(text, tokenizer, tmp_path):
    header = encode_text(text, tokenizer, tmp_path / "out" / "train.tokens")
    assert header.num_tokens == len(tokenizer.encode(text.read_text()))
    assert header.text_bytes == text.stat().st_size
    assert header.text_file == FileStamp.of(text)
    assert header.text_sha256 == text_sha256(text)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.tokens"]
    dataset = TokenDataset(tmp_path / "out" / "train.tokens")
    dataset.verify()
    assert b"".join(decode_text(dataset, tokenizer, piece_tokens=100)) == text.read_bytes()


@pytest.mark.parametrize("style", STYLES)
def test_tokenizer_of_another_library_resumes(tmp_path, monkeypatch, small_blocks, style):
    pytest.importorskip("tokenizers")
    tokenizer, text = read_tokenizer(make(style, tmp_path / "tokenizer.json")), tmp_path / "text.txt"
    text.write_text("The cat sat on the mat.\n\n中文, the bird </s> saw é.\n" * 100)
    out, real = tmp_path / "a.tokens", encoding.encode_blocks

    def broken(*arguments):
        for number, item in enumerate(real(*arguments)):
            if number == 3:
                raise RuntimeError("power cut")
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_blocks", broken)
        with pytest.raises(RuntimeError, match="power cut"):
            encode_text(text, tokenizer, out, save_every=1)
    assert out.with_name("a.tokens.part").exists()
    encode_text(text, tokenizer, out, 2)
    dataset = TokenDataset(out)
    assert dataset.windows(np.array([0]), len(dataset))[0].tolist() == tokenizer.encode(text.read_text())
    assert b"".join(decode_text(dataset, tokenizer, piece_tokens=7)).decode() == tokenizer.decode(
        tokenizer.encode(text.read_text())
    )


@pytest.mark.parametrize("num_workers", [1, 3])
def test_blocks_give_the_same_file(text, tokenizer, whole, tmp_path, small_blocks, num_workers):
    encode_text(text, tokenizer, tmp_path / "a.tokens", num_workers, save_every=1)
    assert (tmp_path / "a.tokens").read_bytes() == whole


def test_hash_of_compressed_text_is_that_of_the_text(text, tokenizer, tmp_path):
    packed = tmp_path / "train.txt.gz"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    header = encode_text(packed, tokenizer, tmp_path / "a.tokens")
    assert (header.text_bytes, header.text_sha256) == (text.stat().st_size, text_sha256(text))
    assert header.text_file == FileStamp.of(packed)


@pytest.mark.parametrize("kind", ["plain", "compressed", "lines"])
@pytest.mark.parametrize("pieces", [0, 1, 2, 10, 20])
def test_resume_after_an_error_encodes_only_the_rest(tmp_path, text, tokenizer, monkeypatch, small_blocks, kind, pieces):
    if kind == "compressed":
        packed = tmp_path / "train.txt.gz"
        packed.write_bytes(gzip.compress(text.read_bytes()))
        text = packed
    elif kind == "lines":
        documents = text.read_text().split("<|endoftext|>")
        text = tmp_path / "train.jsonl"
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    encode_text(text, tokenizer, tmp_path / "whole.tokens", 1)
    out, part = tmp_path / "a.tokens", tmp_path / "a.tokens.part"
    real, encoded = encoding.encode_blocks, []

    def broken(*arguments):
        for number, item in enumerate(real(*arguments)):
            if number == pieces:
                raise RuntimeError("power cut")
            encoded.append(item)
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "encode_blocks", broken)
        with pytest.raises(RuntimeError, match="power cut"):
            encode_text(text, tokenizer, out, 1, save_every=1)
    assert not out.exists()
    assert part.exists() == (pieces > 0)
    if pieces:
        assert header_of(part).text_bytes == sum(len(block.data) for block, _ in encoded)
    pieces = 10**9
    monkeypatch.setattr(encoding, "encode_blocks", broken)
    encode_text(text, tokenizer, out, 1, save_every=1)
    assert out.read_bytes() == (tmp_path / "whole.tokens").read_bytes()
    # No block was encoded twice.
    assert sum(len(ids) for _, ids in encoded) == header_of(out).num_tokens
    assert not part.exists()


def killed_at(call, text, tokenizer, out):
    """Encode in a subprocess that kills itself before its `call`-th write or sync. Return its exit code."""

    def body():
        calls = itertools.count()

        def counted(real, *arguments):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*arguments)

        sync, append = os.fsync, TokenWriter.append
        os.fsync = lambda descriptor: counted(sync, descriptor)
        TokenWriter.append = lambda writer, ids: counted(append, writer, ids)
        encode_text(text, tokenizer, out, 1, save_every=700)

    process = FORK.Process(target=body)
    process.start()
    process.join()
    return process.exitcode


def test_resume_after_a_kill_at_every_write(text, tokenizer, whole, tmp_path, small_blocks):
    reached = 0
    for call in itertools.count():
        out = tmp_path / f"{call}.tokens"
        part = out.with_name(f"{out.name}.part")
        code = killed_at(call, text, tokenizer, out)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert not out.exists()
        if call > 6:
            assert header_of(part).text_bytes >= reached
            reached = header_of(part).text_bytes
        encode_text(text, tokenizer, out, 1)
        assert out.read_bytes() == whole
        assert not part.exists()
    assert call > 50
    assert reached > 0.9 * text.stat().st_size


def test_repeated_kills_still_make_progress(text, tokenizer, whole, tmp_path, small_blocks):
    out = tmp_path / "a.tokens"
    codes = []
    while not out.exists():
        codes.append(killed_at(10, text, tokenizer, out))
    assert len(codes) > 5
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert codes[-1] == 0
    assert out.read_bytes() == whole


@pytest.fixture
def part(text, tokenizer, tmp_path, small_blocks, monkeypatch):
    """The part file of an interrupted encoding of a.tokens."""
    assert killed_at(30, text, tokenizer, tmp_path / "a.tokens") == -signal.SIGKILL
    part = tmp_path / "a.tokens.part"
    assert header_of(part).text_bytes > 1000
    return part


def damage_header(part, text):
    with part.open("r+b") as file:
        file.write(b"\0" * 10)


def damage_ids(part, text):
    with part.open("r+b") as file:
        file.seek(HEADER_BYTES + 5)
        file.write(b"\xff")


def cut_off(part, text):
    os.truncate(part, HEADER_BYTES + 10)


def edit_text(part, text):
    content = bytearray(text.read_bytes())
    content[content.index(b"cat")] ^= 1
    stat = text.stat()
    text.write_bytes(content)
    # Same size and times: only the contents differ.
    os.utime(text, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def lengthen_text(part, text):
    with text.open("ab") as file:
        file.write(b" the cat")


def shorten_text(part, text):
    os.truncate(text, 100)


@pytest.mark.parametrize("harm", [damage_header, damage_ids, cut_off, edit_text, lengthen_text, shorten_text])
def test_invalid_part_file_is_discarded(part, text, tokenizer, tmp_path, harm):
    harm(part, text)
    encode_text(text, tokenizer, tmp_path / "a.tokens")
    encode_text(text, tokenizer, tmp_path / "expected.tokens")
    assert (tmp_path / "a.tokens").read_bytes() == (tmp_path / "expected.tokens").read_bytes()
    assert not part.exists()


def test_part_file_of_another_tokenizer_is_discarded(part, text, tokenizer, tmp_path):
    other = Tokenizer(tokenizer.vocab, tokenizer.merges[:5], ["<|endoftext|>"])
    encode_text(text, other, tmp_path / "a.tokens")
    assert b"".join(decode_text(TokenDataset(tmp_path / "a.tokens"), other)) == text.read_bytes()


def test_existing_output_is_not_overwritten(text, tokenizer, tmp_path):
    (tmp_path / "a.tokens").write_text("existing")
    with pytest.raises(UserError, match=r"a.tokens exists already"):
        encode_text(text, tokenizer, tmp_path / "a.tokens")
    assert (tmp_path / "a.tokens").read_text() == "existing"
    assert not (tmp_path / "a.tokens.part").exists()


def test_text_that_changes_during_encoding_is_rejected(text, tokenizer, tmp_path, monkeypatch):
    real = encoding.encode_blocks

    def slow(*arguments):
        yield from real(*arguments)
        lengthen_text(None, text)

    monkeypatch.setattr(encoding, "encode_blocks", slow)
    with pytest.raises(UserError, match=r"cannot encode .*train.txt: the file changed in the meantime"):
        encode_text(text, tokenizer, tmp_path / "a.tokens")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.txt"]


def test_resume_after_a_full_disk(text, tokenizer, whole, tmp_path, small_blocks):
    def body():
        # Writes beyond this size fail, as on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (HEADER_BYTES + 4000, HEADER_BYTES + 4000))
        with pytest.raises(OSError, match="File too large"):
            encode_text(text, tokenizer, tmp_path / "a.tokens", 1, save_every=700)

    process = FORK.Process(target=body)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert not (tmp_path / "a.tokens").exists()
    assert header_of(tmp_path / "a.tokens.part").num_tokens > 1000
    encode_text(text, tokenizer, tmp_path / "a.tokens")
    assert (tmp_path / "a.tokens").read_bytes() == whole


def test_read_error_keeps_the_part_file(part, text, tokenizer, whole, tmp_path, monkeypatch):
    saved = header_of(part)

    def unreadable(*arguments, **options):
        raise UserError("train.txt cannot be read: Input/output error")
        yield

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "iter_blocks", unreadable)
        with pytest.raises(UserError, match="Input/output error"):
            encode_text(text, tokenizer, tmp_path / "a.tokens")
    assert header_of(part) == saved
    encode_text(text, tokenizer, tmp_path / "a.tokens")
    assert (tmp_path / "a.tokens").read_bytes() == whole


def test_error_names_a_disk_without_locks(text, tokenizer, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match=r"cannot lock .*a.tokens.part: No locks available; encode .*train.txt on"):
        encode_text(text, tokenizer, tmp_path / "a.tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["train.txt"]


def test_missing_and_empty_texts_are_rejected(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"no.txt does not exist: make a corpus"):
        encode_text(tmp_path / "no.txt", tokenizer, tmp_path / "a.tokens")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(UserError, match=r"empty.txt is empty"):
        encode_text(tmp_path / "empty.txt", tokenizer, tmp_path / "a.tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_one_of_several_processes_encodes(text, tokenizer, whole, tmp_path, small_blocks, monkeypatch, capfd):
    out, log = tmp_path / "a.tokens", tmp_path / "log"
    real = encoding._encode

    def logged(*arguments):
        with log.open("a") as file:
            file.write("encoded\n")
        time.sleep(0.3)
        return real(*arguments)

    monkeypatch.setattr(encoding, "_encode", logged)
    processes = [FORK.Process(target=encode_text, args=(text, tokenizer, out, 1)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    # A process that starts late fails because the file exists. The others wait for the file.
    assert {process.exitcode for process in processes} <= {0, 1}
    assert log.read_text() == "encoded\n"
    assert out.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tokens", "log", "train.txt", "whole.tokens"]


def test_waiting_process_takes_over_from_a_killed_one(text, tokenizer, whole, tmp_path, small_blocks, monkeypatch):
    out, started = tmp_path / "a.tokens", FORK.Event()
    real = encoding._encode

    def hanging(*arguments):
        started.set()
        time.sleep(600)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "_encode", hanging)
        first = FORK.Process(target=encode_text, args=(text, tokenizer, out, 1))
        first.start()
    assert started.wait(60)
    assert encoding._encode is real
    second = FORK.Process(target=encode_text, args=(text, tokenizer, out, 1))
    second.start()
    time.sleep(0.2)
    assert second.is_alive()
    first.kill()
    first.join()
    second.join()
    assert second.exitcode == 0
    assert out.read_bytes() == whole


def test_ids_equal_those_of_the_tokenizer(text, tokenizer, tmp_path, small_blocks):
    encode_text(text, tokenizer, tmp_path / "a.tokens", 2)
    dataset = TokenDataset(tmp_path / "a.tokens")
    assert dataset.windows(np.array([0]), len(dataset))[0].tolist() == tokenizer.encode(text.read_text())
