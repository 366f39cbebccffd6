"""Ranks that are not equivalent to merges, compared with tiktoken and tokenizers."""

import base64
import json
import random

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from tilewright.errors import UserError
from tilewright.tokenizer import Tokenizer
from tilewright.tokenizer.formats import (
    TokenizerData,
    fingerprint,
    load_tiktoken,
    load_tokenizer,
    save_gpt2_files,
    save_huggingface,
    save_tiktoken,
    save_tokenizer,
)
from tilewright.tokenizer.formats.ranks import recover_merges
from tilewright.tokenizer.text.patterns import PATTERNS

BYTES = {id: bytes([id]) for id in range(256)}
IRREGULAR = [*BYTES.values(), b"abc"]

steady = settings(derandomize=True, deadline=None, max_examples=300)


def write_ranks(path, tokens):
    path.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)))
    return path


@pytest.fixture
def irregular(tmp_path):
    return load_tiktoken(write_ranks(tmp_path / "ranks.tiktoken", IRREGULAR))


def test_pretokens_that_no_merge_produces_are_looked_up(irregular):
    assert irregular.ignore_merges
    assert irregular.merges == []
    assert Tokenizer.of(irregular).encode("abc abc") == [256, 32, 97, 98, 99]


@st.composite
def vocabularies(draw):
    """Any tokens over few letters, in any order: some that other tokens form, some that none do."""
    tokens = draw(st.lists(st.text(alphabet="ab ", min_size=2, max_size=5), unique=True, max_size=14))
    return [*BYTES.values(), *map(str.encode, tokens)]


# A token long enough for the heap, with its parts, among short ones.
LONG = [*BYTES.values(), b"a" * 64, *(b"a" * 2**power for power in range(1, 6)), b"ba", b"aab"]


@settings(steady, max_examples=500)
@given(tokens=vocabularies(), text=st.text(alphabet="ab ", max_size=40))
def test_any_ranks_give_tiktokens_ids(tmp_path_factory, tokens, text):
    data = load_tiktoken(write_ranks(tmp_path_factory.getbasetemp() / "any.tiktoken", tokens))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    peer = tiktoken.Encoding("own", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={})
    assert Tokenizer.of(data).encode(text) == peer.encode(text)


def test_long_tokens_give_tiktokens_ids(tmp_path):
    ours = Tokenizer.of(load_tiktoken(write_ranks(tmp_path / "long.tiktoken", LONG)))
    ranks = {token: rank for rank, token in enumerate(LONG)}
    peer = tiktoken.Encoding("own", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={})
    draw = random.Random(0)
    texts = ["a" * size for size in range(200)] + ["".join(draw.choices("aaaaaab ", k=150)) for _ in range(500)]
    assert [ours.encode(text) for text in texts] == peer.encode_batch(texts, num_threads=1)


@steady
@given(tokens=vocabularies(), text=st.text(alphabet="ab ", max_size=40))
def test_round_trip_here_and_in_the_other_libraries(tmp_path_factory, tokens, text):
    folder = tmp_path_factory.getbasetemp()
    data = load_tiktoken(write_ranks(folder / "any.tiktoken", tokens))
    ids = Tokenizer.of(data).encode(text)
    save_tiktoken(folder / "again.tiktoken", data)
    assert load_tiktoken(folder / "again.tiktoken") == data
    save_tokenizer(folder / "native.json", data)
    assert load_tokenizer(folder / "native.json") == data
    save_huggingface(folder / "tokenizer.json", data)
    assert tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids == ids
    assert Tokenizer.load(folder / "tokenizer.json").encode(text) == ids


@steady
@given(tokens=vocabularies(), text=st.text(alphabet="ab ", max_size=40))
def test_ignore_merges_equals_tokenizers(tmp_path_factory, tokens, text):
    # Some of the possible merges, in another order, and tokens that they do not produce.
    names = {
        "".join("Ġ" if byte == 32 else chr(byte) for byte in token): rank for rank, token in enumerate(tokens) if rank > 255
    }
    alphabet = {text: rank for rank, text in enumerate(pre_tokenizers.ByteLevel.alphabet(), 1000)}
    vocab = {**alphabet, **names}
    merges = [(name[:cut], name[cut:]) for name in names for cut in range(1, len(name))]
    merges = [pair for pair in merges if pair[0] in vocab and pair[1] in vocab][::2]
    peer = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    path = tmp_path_factory.getbasetemp() / "peer.json"
    peer.save(str(path))
    assert Tokenizer.load(path).encode(text) == peer.encode(text).ids


def test_ignore_merges_is_stored_and_fingerprinted(irregular, tmp_path):
    assert fingerprint(irregular) != fingerprint(irregular._replace(ignore_merges=False))
    tokenizer = Tokenizer.of(irregular)
    tokenizer.save(tmp_path / "native.json")
    assert Tokenizer.load(tmp_path / "native.json").encode("abc") == [256]
    document = json.loads((tmp_path / "native.json").read_text())
    assert document["ignore_merges"] is True
    document["ignore_merges"] = False
    (tmp_path / "native.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="modified after it was written"):
        load_tokenizer(tmp_path / "native.json")


def test_a_special_token_is_not_looked_up_as_a_pretoken(tmp_path):
    tokenizer = Tokenizer(BYTES | {256: b"abc", 257: b"xyz"}, [], ["abc"], ignore_merges=True)
    assert tokenizer.encode("abc xyz", allowed_special=(), disallowed_special=()) == [*b"abc xyz"]
    assert tokenizer.encode("xyzabc") == [257, 256]


def test_gpt2_files_with_ignore_merges_raise(irregular, tmp_path):
    with pytest.raises(UserError, match=r"ignore_merges is true: vocab\.json and merges\.txt cannot store it"):
        save_gpt2_files(tmp_path / "gpt2", irregular)
    assert not (tmp_path / "gpt2").exists()


def test_tokens_that_merging_produces_are_not_whole_tokens():
    # c and ab are produced before abc, although their ranks are greater.
    ranks = {token: rank for rank, token in enumerate([*BYTES.values(), b"abc", b"ab", b"xyz"])}
    assert recover_merges(ranks) == ([(b"ab", b"c"), (b"a", b"b")], {b"xyz": 3})
    with pytest.raises(UserError, match="token b'xyz', rank 258, consists of 3 others"):
        save_tiktoken("unused", TokenizerData(dict(enumerate(ranks)), [(b"ab", b"c"), (b"a", b"b")], {}))
