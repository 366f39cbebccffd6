import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.errors import UserError
from tilewright.tokenizer import Tokenizer, iter_encoded, token_dtype
from tilewright.tokenizer.chunks import iter_chunks, read_chunk

BYTES = {id: bytes([id]) for id in range(256)}

# Special tokens that hold white space, overlap, and begin within one another.
SPECIALS = ("<|>", "<|><|>", "a<|>", " \n", "a b", "中 ")
PARTS = [*(token.encode() for token in SPECIALS), b" ", b"\n", b"  ", b"a", b"'s", "中".encode(), b"\xff", b"\xe4\xb8", b"\x80"]
PARTS += [character.encode() for character in "\u3000\u00a0\x1c\x85\u2028🙂"]

steady = settings(derandomize=True, deadline=None, max_examples=400)


@steady
@given(
    data=st.lists(st.sampled_from(PARTS), min_size=1, max_size=40).map(b"".join) | st.binary(min_size=1),
    chunk_bytes=st.integers(1, 12),
    special_tokens=st.sampled_from([(), SPECIALS, SPECIALS[:2]]),
)
def test_chunks_split_as_the_whole_does(specification, text_file, data, chunk_bytes, special_tokens):
    path = text_file(data)
    chunks = list(iter_chunks(path, special_tokens, chunk_bytes))
    assert [start for start, _ in chunks] == [0, *(end for _, end in chunks[:-1])]
    assert chunks[-1][1] == len(data)
    texts = [read_chunk(path, *chunk) for chunk in chunks]
    assert "".join(texts) == data.decode(errors="replace")
    parts = [part for text in texts for part in specification.split(text, special_tokens)]
    assert parts == specification.split("".join(texts), special_tokens)


@pytest.mark.parametrize(
    ("text", "special_tokens"),
    [("word " * 100, ()), ("中文。\n" * 100, ()), ("中文<|>" * 100, ("<|>",)), ("<|>" * 100, ("<|>", "<|><|>x"))],
)
def test_chunks_are_as_short_as_they_can_be(text_file, text, special_tokens):
    sizes = [end - start for start, end in iter_chunks(text_file(text), special_tokens, 50)]
    assert max(sizes) < 70


def test_a_file_without_borders_is_one_chunk(text_file):
    assert list(iter_chunks(text_file("acgt" * 100), ("<|>",), 10)) == [(0, 400)]


@pytest.mark.parametrize(("num_workers", "chunk_bytes"), [(1, 1 << 20), (1, 100), (2, 5000), (3, 40_000), (None, 1 << 21)])
def test_arrays_join_to_the_ids_of_the_whole(tokenizer, text_file, real_text, num_workers, chunk_bytes):
    arrays = list(iter_encoded(text_file(real_text), tokenizer, num_workers, chunk_bytes=chunk_bytes))
    assert {array.dtype for array in arrays} == {np.dtype(np.uint16)}
    assert np.concatenate(arrays).tolist() == tokenizer.encode(real_text)


def test_without_special_tokens_too(tokenizer, text_file, real_text):
    plain = Tokenizer(tokenizer.vocab, tokenizer.merges)
    ids = np.concatenate(list(iter_encoded(text_file(real_text), plain, 2, chunk_bytes=30_000)))
    assert ids.tolist() == plain.encode(real_text)


def test_ids_need_two_bytes_up_to_65536_tokens():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_large_vocabularies_give_uint32(text_file):
    tokens = [bytes([left, right]) for left in range(256) for right in range(256)]
    tokenizer = Tokenizer(BYTES | dict(enumerate(tokens, 256)), [(b"a", b"b")], ["<|endoftext|>"])
    (array,) = iter_encoded(text_file("ab<|endoftext|>"), tokenizer)
    assert array.dtype == np.uint32
    assert array.tolist() == [256 + tokens.index(b"ab"), 256 + 65_536]


def test_a_reader_may_stop_early(tokenizer, text_file, real_text):
    arrays = iter_encoded(text_file(real_text), tokenizer, 2, chunk_bytes=1000)
    assert (
        next(arrays).tolist()
        == tokenizer.encode(real_text)[: len(next(iter_encoded(text_file(real_text), tokenizer, chunk_bytes=1000)))]
    )
    arrays.close()


@pytest.mark.parametrize(("content", "message"), [(None, "does not exist"), ("", "is empty")])
def test_bad_files_are_named_at_once(tokenizer, text_file, tmp_path, content, message):
    path = tmp_path / "missing.txt" if content is None else text_file(content)
    with pytest.raises(UserError, match=message):
        iter_encoded(path, tokenizer)


def test_workers_import_neither_the_callers_script_nor_torch(text_file, real_text, tmp_path):
    (tmp_path / "probe.py").write_text("import sys\ndef knows(shared, name):\n    return name in sys.modules\n")
    (tmp_path / "script.py").write_text(SCRIPT_WITHOUT_GUARD)
    arguments = [sys.executable, tmp_path / "script.py", text_file(real_text)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["the script runs", "[('torch', False), ('probe', True)]"]


SCRIPT_WITHOUT_GUARD = """
import sys

import probe
import torch

from tilewright.tokenizer import train_bpe
from tilewright.tokenizer.workers import ordered_map

print("the script runs")
train_bpe(sys.argv[1], 300, num_workers=2)
print(list(ordered_map(probe.knows, None, ["torch", "probe"], 2)))
"""
