import random
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from tilewright.errors import UserError
from tilewright.tokenizer import Tokenizer, iter_encoded, token_dtype
from tilewright.tokenizer.text.sources import Documents

BYTES = {id: bytes([id]) for id in range(256)}


@pytest.mark.parametrize(("num_workers", "chunk_bytes"), [(1, 1 << 20), (1, 100), (2, 5000), (3, 40_000), (None, 1 << 21)])
def test_joined_arrays_equal_encode(tokenizer, text_file, real_text, num_workers, chunk_bytes):
    arrays = list(iter_encoded(text_file(real_text), tokenizer, num_workers, chunk_bytes=chunk_bytes))
    assert {array.dtype for array in arrays} == {np.dtype(np.uint16)}
    assert np.concatenate(arrays).tolist() == tokenizer.encode(real_text)


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k", r"\w+|\W"])
@pytest.mark.parametrize("specials", [[], ["<|endoftext|>"], ["<|endoftext|>", "<a>", "a<"]])
def test_documents_in_blocks_equal_single_documents(tokenizer, pattern, specials):
    draw = random.Random(1)
    parts = [b"<|endoftext|>", b"<|endof", b"text|>", b"<a>", b"a<", b" the", "é".encode(), b"\xc3", b"\xa9", b"\n"]
    encoder = Tokenizer(tokenizer.vocab, tokenizer.merges, specials, pattern)
    for _ in range(40):
        texts = [b"".join(draw.choices(parts, k=draw.randint(0, 8))) for _ in range(draw.randint(1, 30))]
        expected = [id for text in texts for id in encoder.encode_bytes(text).tolist()]
        for chunk_bytes in (1, 20, 1000):
            arrays = iter_encoded(Documents(texts), encoder, 1, chunk_bytes=chunk_bytes)
            assert [id for array in arrays for id in array.tolist()] == expected


def test_without_special_tokens_too(tokenizer, text_file, real_text):
    plain = Tokenizer(tokenizer.vocab, tokenizer.merges)
    ids = np.concatenate(list(iter_encoded(text_file(real_text), plain, 2, chunk_bytes=30_000)))
    assert ids.tolist() == plain.encode(real_text)


@pytest.mark.parametrize(
    ("pattern", "num_workers"), [("cl100k", 1), ("cl100k", 2), ("o200k", 5), (r"\p{L}+|\P{L}", 1), (r"\p{L}+|\P{L}", 2)]
)
def test_every_pattern_and_number_of_workers(tokenizer, text_file, real_text, pattern, num_workers):
    other = Tokenizer(tokenizer.vocab, tokenizer.merges, ["<|endoftext|>"], pattern)
    ids = np.concatenate(list(iter_encoded(text_file(real_text), other, num_workers, chunk_bytes=20_000)))
    assert ids.tolist() == other.encode(real_text)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_bytes_that_are_not_utf8_are_replaced(tokenizer, text_file, real_text, num_workers):
    rng = random.Random(0)
    data = bytearray(real_text.encode())
    for place in rng.sample(range(len(data)), 500):
        data[place] = rng.randrange(128, 256)
    ids = np.concatenate(list(iter_encoded(text_file(bytes(data)), tokenizer, num_workers, chunk_bytes=2000)))
    assert ids.tolist() == tokenizer.encode(data.decode(errors="replace"))


def test_tokens_do_not_cross_documents(tokenizer):
    texts = ["a", "", "b<|endof", "text|>", "é"]
    ids = np.concatenate(list(iter_encoded(Documents(texts), tokenizer)))
    assert ids.tolist() == [id for text in texts for id in tokenizer.encode(text)]


def test_memory_does_not_grow_with_the_file(tokenizer, text_file, real_text):
    path = text_file(real_text * 40)
    list(iter_encoded(path, tokenizer, 2, chunk_bytes=1 << 16))
    tracemalloc.start()
    try:
        count = sum(len(ids) for ids in iter_encoded(path, tokenizer, 2, chunk_bytes=1 << 16))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count > 1_000_000
    assert peak < 3_000_000


def test_ids_need_two_bytes_up_to_65536_tokens():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


def test_large_vocabularies_give_uint32(text_file):
    tokens = [bytes([left, right]) for left in range(256) for right in range(256)]
    tokenizer = Tokenizer(BYTES | dict(enumerate(tokens, 256)), [(b"a", b"b")], ["<|endoftext|>"])
    (array,) = iter_encoded(text_file("ab<|endoftext|>"), tokenizer)
    assert array.dtype == np.uint32
    assert array.tolist() == [256 + tokens.index(b"ab"), 256 + 65_536]


def test_iteration_can_stop_early(tokenizer, text_file, real_text):
    arrays = iter_encoded(text_file(real_text), tokenizer, 2, chunk_bytes=1000)
    assert (
        next(arrays).tolist()
        == tokenizer.encode(real_text)[: len(next(iter_encoded(text_file(real_text), tokenizer, chunk_bytes=1000)))]
    )
    arrays.close()


@pytest.mark.parametrize(("content", "message"), [(None, "does not exist"), ("", "is empty")])
def test_invalid_files_raise_at_once(tokenizer, text_file, tmp_path, content, message):
    path = tmp_path / "missing.txt" if content is None else text_file(content)
    with pytest.raises(UserError, match=message):
        iter_encoded(path, tokenizer)


def test_workers_import_neither_the_callers_script_nor_torch(text_file, real_text, tmp_path):
    (tmp_path / "probe.py").write_text("import sys\ndef is_imported(shared, name):\n    return name in sys.modules\n")
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
print(list(ordered_map(probe.is_imported, None, ["torch", "probe"], 2)))
"""
