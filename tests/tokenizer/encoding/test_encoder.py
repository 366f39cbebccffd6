import random
import threading

import numpy as np
import pytest

from tilewright.tokenizer.counting.counter import PretokenCounts
from tilewright.tokenizer.encoding import encoder, pretoken_cache
from tilewright.tokenizer.encoding.decoder import token_table
from tilewright.tokenizer.encoding.encoder import CompiledEncoder, PlainEncoder, new_encoder
from tilewright.tokenizer.encoding.pretoken_cache import NO_ID, new_memory, next_memory
from tilewright.tokenizer.learning.learner import learn_merges

UINT32 = np.dtype(np.uint32)
NONE = np.empty(0, np.int64), np.empty(0, np.uint32)


def encoder_of(merges, rng=None, pattern="gpt2"):
    tokens = list(dict.fromkeys([*(bytes([byte]) for byte in range(256)), *(left + right for left, right in merges)]))
    if rng:
        rng.shuffle(tokens)
    ids = {token: id for id, token in enumerate(tokens)}
    return new_encoder(merges, ids, token_table(dict(enumerate(tokens))), pattern), ids


def plain_of(compiled, merges, ids):
    """The encoder that merges one after another, for the same merges and ids."""
    triples = np.array([(ids[left], ids[right], ids[left + right]) for left, right in merges], np.int64).reshape(-1, 3)
    return PlainEncoder(triples, np.array([ids[bytes([byte])] for byte in range(256)]), compiled._split)


def encode(encoder, data):
    return encoder.encode(np.frombuffer(data, np.uint8), *NONE, UINT32)[0].tolist()


def trained(rng, letters):
    words = {bytes(rng.choices(letters, k=rng.randint(1, rng.choice([3, 8, 60])))): rng.choice([1, 2, 3]) for _ in range(8)}
    return learn_merges(PretokenCounts.of(words), rng.randint(0, 40)).as_bytes()


def made_up(rng, letters):
    """Merges of tokens that are there, which may be none that any text ever sees."""
    tokens, merges = [bytes([letter]) for letter in letters], {}
    for _ in range(rng.randint(0, 14)):
        left, right = rng.choice(tokens), rng.choice(tokens)
        merges[left, right] = None
        tokens += [left + right] * (left + right not in tokens)
    return list(merges)


@pytest.mark.parametrize("make", [trained, made_up])
@pytest.mark.parametrize("seed", range(10))
def test_the_search_finds_what_merging_leaves(make, seed):
    rng = random.Random(seed)
    for _ in range(30):
        letters = rng.choice([b"a", b"ab", b"abc", b"abcd"])
        merges = make(rng, letters)
        compiled, ids = encoder_of(merges, rng)
        assert isinstance(compiled, CompiledEncoder) or make is made_up
        plain = plain_of(compiled, merges, ids)
        for _ in range(25):
            text = bytes(rng.choices(letters + b" ", k=rng.randint(1, rng.choice([5, 20, 64, 400]))))
            assert encode(compiled, text) == encode(plain, text)


def test_an_order_that_no_training_gives_is_merged_one_by_one():
    # The pair (ab, c) merges before there is an ab; afterwards it comes first.
    compiled, ids = encoder_of([(b"ab", b"c"), (b"a", b"b"), (b"b", b"c")])
    assert isinstance(compiled, PlainEncoder)
    assert encode(compiled, b"abcabc") == [ids[b"abc"]] * 2


def test_merges_that_never_come_to_pass_do_no_harm():
    merges = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c"), (b"a", b"bc"), (b"abc", b"abc")]
    compiled, ids = encoder_of(merges)
    assert isinstance(compiled, CompiledEncoder)
    assert encode(compiled, b"abcabcab") == [ids[b"abcabc"], ids[b"ab"]]


@pytest.mark.parametrize("letters", ["a", "ACGT", "中文沒有空格"], ids=["one letter", "dna", "cjk"])
def test_long_runs_are_merged_rightly(letters):
    text = "".join(random.Random(0).choices(letters, k=40_000)).encode()
    merges = learn_merges(PretokenCounts.of({text[:5000]: 1}), 200).as_bytes()
    compiled, ids = encoder_of(merges)
    assert encode(compiled, text) == encode(plain_of(compiled, merges, ids), text)


@pytest.fixture
def words():
    """More distinct pretokens than the memory begins with, of all lengths up to 200 bytes."""
    rng = random.Random(3)
    return [bytes(rng.choices(b"abcde", k=min(200, 1 + int(rng.expovariate(0.08))))) for _ in range(9000)]


def test_memory_grows_and_then_forgets(words, monkeypatch):
    monkeypatch.setattr(pretoken_cache, "_LARGEST", 1 << 13)
    merges = learn_merges(PretokenCounts.of(dict.fromkeys(words[:500], 1)), 300).as_bytes()
    compiled, ids = encoder_of(merges)
    text = b" ".join(words)
    expected = encode(plain_of(compiled, merges, ids), text)
    sizes = set()
    for _ in range(3):
        assert encode(compiled, text) == expected
        sizes.add(len(compiled._desks[0].memory.entries) // 4)
    assert max(sizes) == 1 << 14


def test_a_larger_memory_knows_the_same(words):
    merges = learn_merges(PretokenCounts.of(dict.fromkeys(words[:500], 1)), 300).as_bytes()
    compiled, _ = encoder_of(merges)
    encode(compiled, b" ".join(words[:1500]))
    small = compiled._desks[0].memory
    large = next_memory(small)
    assert large.used.tolist() == small.used.tolist()

    def known(memory):
        rows = memory.entries.reshape(-1, 4)
        return sorted(map(tuple, rows[rows[:, 2] > 0].tolist()))

    assert known(large) == known(small)
    assert len(known(large)) == small.used[0] > 1000
    assert len(large.entries) == 4 * len(small.entries)


def test_pretokens_made_to_collide_are_not_all_remembered():
    # Of these keys all have one hash: see `pretoken_hash`.
    mask = (1 << 64) - 1
    highs = range(1, 1500)
    lows = [(high * 0xC2B2AE3D27D4EB4F) & mask for high in highs]
    data = b"".join(low.to_bytes(8, "little") + high.to_bytes(8, "little") for low, high in zip(lows, highs, strict=True))
    merges = [(b"\x00", b"\x00"), (b"\x00\x00", b"\x00\x00")]
    compiled, ids = encoder_of(merges)
    compiled._split = lambda data, borders, ends: iter([np.arange(16, len(data) + 1, 16)])
    for _ in range(2):
        assert encode(compiled, data) == encode(plain_of(compiled, merges, ids), data)
    assert compiled._desks[0].memory.used[0] == pretoken_cache._LOOKUPS


def test_ids_beyond_20_bits_are_remembered():
    tokens = [*(bytes([byte]) for byte in range(256)), *(b"<%d>" % index for index in range(1 << 20)), b"ab", b"abc"]
    ids = {token: id for id, token in enumerate(tokens)}
    compiled = new_encoder([(b"a", b"b"), (b"ab", b"c")], ids, token_table(dict(enumerate(tokens))), "gpt2")
    last = len(tokens) - 1
    assert encode(compiled, b"abc ab abc ab") == [last, 32, last - 1, 32, last, 32, last - 1]


@pytest.mark.parametrize("block", [1, 2, 3, 50, 1 << 13])
def test_borders_part_the_text_wherever_blocks_end(monkeypatch, block):
    monkeypatch.setattr(encoder, "_BLOCK", max(block, 1))
    compiled, ids = encoder_of([(b"a", b"b"), (b" ", b"ab")])
    rng = random.Random(block)
    parts = [bytes(rng.choices(b"ab ", k=rng.randint(0, 6))) for _ in range(200)]
    data = b"".join(part + b"\xff" for part in parts)
    ends = np.cumsum([len(part) + 1 for part in parts])
    borders = np.stack((ends - 1, ends), axis=1).reshape(-1)
    border_ids = np.array([rng.choice([NO_ID, 7]) for _ in parts], np.uint32)
    found, cuts = compiled.encode(np.frombuffer(data, np.uint8), borders, border_ids, UINT32)
    expected, places = [], []
    for part, id in zip(parts, border_ids.tolist(), strict=True):
        expected += encode(compiled, part)
        places.append(len(expected))
        expected += [id] * (id != NO_ID)
    assert found.tolist() == expected
    assert cuts.tolist() == places
    plain = plain_of(compiled, [(b"a", b"b"), (b" ", b"ab")], ids)
    found, cuts = plain.encode(np.frombuffer(data, np.uint8), borders, border_ids, UINT32)
    assert (found.tolist(), cuts.tolist()) == (expected, places)


def test_threads_share_an_encoder(words):
    merges = learn_merges(PretokenCounts.of(dict.fromkeys(words[:500], 1)), 300).as_bytes()
    compiled, ids = encoder_of(merges)
    texts = [b" ".join(words[start::7]) for start in range(7)]
    plain = plain_of(compiled, merges, ids)
    expected = [encode(plain, text) for text in texts]
    found = {}

    def work(thread):
        found[thread] = [encode(compiled, texts[(thread + step) % 7]) == expected[(thread + step) % 7] for step in range(20)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(all, found.values()))
    assert len(found) == 4
    assert 1 <= len(compiled._desks) <= 4


def test_a_text_that_there_was_no_memory_for_does_no_harm(monkeypatch):
    compiled, _ = encoder_of([(b"a", b"b")])
    text = b"ab" * 200_000
    with monkeypatch.context() as patched:

        def fail(*_):
            raise MemoryError

        patched.setattr(encoder, "new_scratch", fail)
        with pytest.raises(MemoryError):
            encode(compiled, text)
    assert encode(compiled, text) == [256] * 200_000


def test_room_for_a_long_pretoken_is_given_back(monkeypatch):
    monkeypatch.setattr(encoder, "_KEPT", 1 << 18)
    compiled, _ = encoder_of([(b"a", b"b")])
    assert len(encode(compiled, b"ab" * 200_000)) == 200_000
    assert len(compiled._desks[0].out) < 200_000


def test_the_smallest_memory_is_small():
    assert sum(array.nbytes for array in new_memory()) < 1 << 19
