"""Counting the pretokens of texts: independent of workers, blocks and memory; and errors."""

import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.tokenizer.counting import count_text as count_text_module
from tilewright.tokenizer.counting.count_text import count_text
from tilewright.tokenizer.text.patterns import PATTERNS, resolve_pattern, split_pretokens, split_text
from tilewright.tokenizer.text.sources import Documents, Files
from tilewright.tokenizer.text.utf8 import repair_utf8

SPECIALS = ("<|>", "<|><|>", "a<|>", " \n", "a b")
PARTS = [*SPECIALS, *"a b\n'sé中\u3000\u00a0\x1c\x85🙂1!/\r", "'ll", "  ", "A\u0301"]
OWN = r"\w+|[^\w\s]+|\s+"

steady = settings(derandomize=True, deadline=None, max_examples=100)


def expected(texts, specials=(), pattern="gpt2", weight=1):
    """Return the counts of the texts, each of which is a document."""
    longest_first = sorted(specials, key=len, reverse=True)
    counts = Counter()
    for text in texts:
        for piece in regex.split("|".join(map(regex.escape, longest_first)), text) if specials else [text]:
            found = regex.finditer(resolve_pattern(pattern), piece)
            counts.update({match: weight * count for match, count in Counter(m.group().encode() for m in found).items()})
    return counts


def counted(*arguments, **options):
    return dict(count_text(*arguments, **options).counts.items())


@pytest.mark.parametrize("pattern", [*PATTERNS, OWN])
@pytest.mark.parametrize("specials", [(), ("<|endoftext|>",), ("# =", "<|endoftext|>")])
def test_counts_are_independent_of_workers_and_blocks(text_file, real_text, pattern, specials):
    path = text_file(real_text)
    first = count_text(path, specials, pattern=pattern, num_workers=1)
    assert dict(first.counts.items()) == expected([real_text], specials, pattern)
    assert first.text_bytes == len(real_text.encode())
    ways = [(1, 1 << 12), (2, 3000), (5, 20_000)] if pattern in PATTERNS else [(2, 30_000)]
    for num_workers, block_bytes in ways:
        other = count_text(path, specials, pattern=pattern, num_workers=num_workers, block_bytes=block_bytes)
        for name in ("data", "ends", "counts"):
            assert np.array_equal(getattr(first.counts, name), getattr(other.counts, name))


@pytest.mark.parametrize("pattern", PATTERNS)
@steady
@given(text=st.lists(st.sampled_from(PARTS), min_size=1, max_size=60).map("".join), block_bytes=st.integers(1, 40))
def test_blocks_are_cut_anywhere(text_file, pattern, text, block_bytes):
    for specials in ((), SPECIALS):
        found = counted(text_file(text), specials, pattern=pattern, block_bytes=block_bytes, num_workers=1)
        assert found == expected([text], specials, pattern)


@pytest.mark.parametrize("pattern", [*PATTERNS, OWN])
@steady
@given(
    texts=st.lists(st.lists(st.sampled_from(PARTS), max_size=9).map("".join), min_size=1, max_size=30).filter(any),
    block_bytes=st.integers(1, 60),
)
def test_pretokens_do_not_cross_documents(pattern, texts, block_bytes):
    found = counted(Documents(texts), SPECIALS, pattern=pattern, num_workers=1, block_bytes=block_bytes)
    assert found == expected(texts, SPECIALS, pattern)


def test_special_tokens_do_not_cross_documents():
    assert counted(Documents(["a<|", ">b", "<|>", "c", "<", "|>"]), ("<|>",)) == {
        b"a": 1, b"<|": 1, b">": 1, b"b": 1, b"c": 1, b"<": 1, b"|>": 1
    }  # fmt: skip


def test_weights_multiply():
    found = counted(Documents([("a b", 3), "a", ("c", 1 << 40)], weight=2), num_workers=2)
    assert found == {b"a": 8, b" b": 6, b"c": 2 << 40}


@pytest.mark.parametrize("pattern", ["gpt2", OWN])
def test_weighted_files_add_up(text_file, pattern):
    inputs = [Files(text_file("a b a"), weight=5), text_file("a ")]
    total = expected(["a b a"], (), pattern, weight=5) + expected(["a "], (), pattern)
    assert counted(inputs, pattern=pattern) == total


@steady
@given(
    data=st.binary(min_size=1, max_size=200)
    | st.lists(st.sampled_from([b"a ", b"\xe4\xb8", b"\xad", b"\xff", b" "]), min_size=1).map(b"".join)
)
def test_bytes_that_are_not_utf8_count_as_replacement_characters(text_file, data):
    text = data.decode(errors="replace")
    for num_workers, block_bytes in ((1, 1 << 20), (2, 10)):
        assert counted(text_file(data), num_workers=num_workers, block_bytes=block_bytes) == expected([text])
    assert counted(text_file(data), pattern=OWN, num_workers=1) == expected([text], (), OWN)


def test_characters_do_not_cross_documents():
    assert counted(Documents([b"\xe4\xb8", b"\xad"])) == {"\ufffd".encode(): 2}


def test_repair_utf8_equals_decode_with_replacement():
    draw = random.Random(0)
    edges = bytes([0, 0x20, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE])
    edges += bytes([0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF])
    for _ in range(6000):
        data = b"a" * draw.randrange(70) * draw.randrange(2) + bytes(draw.choices(edges, k=draw.choice([1, 2, 3, 4, 5, 70])))
        array = np.frombuffer(data + b"a" * draw.randrange(70) * draw.randrange(2), np.uint8)
        repaired = repair_utf8(array)
        assert repaired.tobytes() == array.tobytes().decode(errors="replace").encode()
        assert (repaired is array) == (repaired.tobytes() == array.tobytes())


@pytest.mark.parametrize("pattern", ["gpt2", OWN])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_counts_are_independent_of_memory(monkeypatch, text_file, tmp_path, real_text, pattern, num_workers):
    monkeypatch.setattr(count_text_module, "LEAST_MEMORY", 1)
    path = text_file(real_text)
    # With a custom pattern, text can only be cut at special tokens.
    options = {"special_tokens": ("<|endoftext|>",), "pattern": pattern, "num_workers": num_workers, "block_bytes": 20_000}
    free = count_text(path, **options).counts
    runs = []
    add = count_text_module.Spill.add
    monkeypatch.setattr(count_text_module.Spill, "add", lambda self, counts: runs.append(len(counts)) or add(self, counts))
    bounded = count_text(path, **options, memory=1 << 18, scratch=tmp_path).counts
    assert len(runs) > 2
    for name in ("data", "ends", "counts"):
        assert np.array_equal(getattr(free, name), getattr(bounded, name))
    assert list(tmp_path.iterdir()) == []


def test_long_pretokens_are_spilled_before_they_overflow_the_table(monkeypatch, text_file):
    monkeypatch.setattr(count_text_module, "_MOST_BYTES", 1000)
    text = " ".join(f"{number}".rjust(40, "a") for number in range(500))
    assert counted(text_file(text), num_workers=1, block_bytes=500) == expected([text])


@pytest.mark.parametrize("pattern", ["gpt2", OWN])
def test_too_long_text_without_a_border_raises(monkeypatch, text_file, pattern):
    monkeypatch.setattr(count_text_module, "_MOST_BYTES", 1000)
    with pytest.raises(UserError, match="1001 bytes of text have no place to cut them"):
        counted(text_file("a" * 1001), pattern=pattern, num_workers=1)


def test_too_little_memory_raises(text_file):
    with pytest.raises(UserError, match="memory is 1000 bytes: expected at least"):
        count_text(text_file("text"), memory=1000)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_full_disk_raises_and_leaves_no_files(monkeypatch, text_file, tmp_path, real_text, num_workers):
    monkeypatch.setattr(count_text_module, "LEAST_MEMORY", 1)
    path = text_file(real_text)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write counts to .*; free disk space"):
            count_text(path, num_workers=num_workers, memory=1 << 18, scratch=tmp_path, block_bytes=20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("pattern", ["gpt2", OWN])
def test_a_file_truncated_while_it_is_read_raises(monkeypatch, text_file, num_workers, pattern):
    path = text_file("word<|>" * 10_000)
    blocks = count_text_module.iter_blocks

    def cutting(*arguments, **options):
        for number, block in enumerate(blocks(*arguments, **options)):
            if number == 1:
                os.truncate(path, 20_000)
            yield block

    monkeypatch.setattr(count_text_module, "iter_blocks", cutting)
    with pytest.raises(UserError, match=r"shrank .* while it was read"):
        count_text(path, ("<|>",), pattern=pattern, num_workers=num_workers, block_bytes=1000)


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_an_error_in_the_input_stops_all_workers(num_workers):
    def texts():
        for number in itertools.count():
            if number == 1000:
                raise OSError("gone")
            yield "text"

    with pytest.raises(OSError, match="gone"):
        count_text(Documents(texts()), num_workers=num_workers, block_bytes=100)


def test_a_killed_worker_raises(text_file, tmp_path, real_text):
    (tmp_path / "script.py").write_text(SCRIPT_THAT_KILLS)
    path = text_file(real_text * 20)
    done = subprocess.run([sys.executable, tmp_path / "script.py", path], capture_output=True, text=True, check=False)
    assert done.stdout == "a worker process was killed\n", done.stderr


SCRIPT_THAT_KILLS = """
import multiprocessing, os, signal, sys, threading, time

from tilewright.errors import UserError
from tilewright.tokenizer.compiled.work import Work
from tilewright.tokenizer.counting.count_text import count_text

Work.is_compiled = lambda work, units: True

def kill():
    while not (workers := multiprocessing.active_children()):
        time.sleep(0.01)
    os.kill(workers[0].pid, signal.SIGKILL)

if __name__ == "__main__":
    threading.Thread(target=kill).start()
    try:
        count_text(sys.argv[1], pattern=r"\\w+|\\s+|.", num_workers=2, block_bytes=1000)
    except UserError as error:
        print(str(error).split(",")[0])
"""


def test_an_interrupt_stops_the_threads():
    def texts():
        for number in itertools.count():
            if number == 2000:  # both threads run by then
                os.kill(os.getpid(), signal.SIGINT)
            yield "text " * 1000

    # A process that a script started in the background ignores SIGINT, and so would this test.
    threads, before = threading.enumerate(), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            count_text(Documents(texts()), num_workers=2, block_bytes=1000)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not [thread for thread in threading.enumerate() if thread not in threads]


@pytest.mark.parametrize("pattern", [r"(a)(b)?|c", r"a*", r"b+(?=c)", "", r"(?<=a)b"])
@steady
@given(text=st.text(alphabet="abc", max_size=30))
def test_no_text_is_lost_with_any_pattern(pattern, text):
    found = split_text(text, pattern)
    assert "".join(found) == text
    assert all(found)
    matches = [match.group() for match in regex.finditer(pattern, text) if match.group()]
    assert not Counter(matches) - Counter(found)


def test_invalid_patterns_raise(text_file):
    with pytest.raises(UserError, match=r"'\(': expected one of gpt2, cl100k, o200k, .*, or a regular expression"):
        count_text(text_file("text"), pattern="(")


@pytest.mark.parametrize("pattern", [*PATTERNS, OWN])
@steady
@given(
    pieces=st.lists(st.lists(st.sampled_from(PARTS), max_size=9).map("".join), max_size=12),
    block_chars=st.integers(1, 30),
    specials=st.sampled_from([(), SPECIALS]),
)
def test_pieces_are_split_like_the_whole(pattern, pieces, block_chars, specials):
    runs = split_pretokens(pieces, specials, pattern=resolve_pattern(pattern), block_chars=block_chars)
    found = Counter(pretoken.encode() for run, _ in runs for pretoken in run)
    assert found == expected(["".join(pieces)], specials, pattern)
