import random
import threading
from functools import partial

import numpy as np
import pytest

from tilewright.tokenizer.counting.pretoken_counts import PretokenCounts
from tilewright.tokenizer.encoding import compiled_encoder as compiled_encoder_module
from tilewright.tokenizer.encoding import pretoken_cache, workspace
from tilewright.tokenizer.encoding.compiled_encoder import CompiledEncoder, compiled_encoder, split_by_scanner
from tilewright.tokenizer.encoding.decoder import token_table
from tilewright.tokenizer.encoding.encoder import NO_ID, PlainEncoder, merge_ids
from tilewright.tokenizer.encoding.pretoken_cache import LONGEST, new_cache, next_cache
from tilewright.tokenizer.learning.learner import learn_merges
from tilewright.tokenizer.text.scanner import scanner_of
from tilewright.tokenizer.text.specials import SpecialFinder

NONE = np.empty(0, np.int64), np.empty(0, np.uint32)


def new_encoder(merges, ids, pattern="gpt2", whole=None, beginnings=NONE[0]):
    byte_ids = np.array([ids[bytes([byte])] for byte in range(256)], np.int64)
    tokens = token_table({id: token for token, id in ids.items()})
    return compiled_encoder(merge_ids(merges, ids), byte_ids, tokens, pattern, whole or {}, beginnings)


def encoder_of(merges, rng=None, pattern="gpt2"):
    tokens = list(dict.fromkeys([*(bytes([byte]) for byte in range(256)), *(left + right for left, right in merges)]))
    if rng:
        rng.shuffle(tokens)
    ids = {token: id for id, token in enumerate(tokens)}
    return new_encoder(merges, ids, pattern), ids


def plain_of(compiled, merges, ids, whole=None):
    """Return the plain encoder of the same merges and ids."""
    split = compiled._split or partial(split_by_scanner, scanner_of("gpt2"))
    byte_ids = np.array([ids[bytes([byte])] for byte in range(256)])
    return PlainEncoder(merge_ids(merges, ids), byte_ids, split, len(ids), whole)


def encode(encoder, data):
    ids = encoder.encode(np.frombuffer(data, np.uint8), *NONE).tolist()
    assert encoder.encode(data, *NONE).tolist() == encoder.encode_to_list(data, *NONE) == ids
    assert encoder.try_encode_to_list(data) in (None, ids)
    short = encoder.try_encode(data)
    assert short is None or short.tolist() == ids
    return ids


def merges_by_rank(compiled):
    assert isinstance(compiled, CompiledEncoder)
    return len(compiled._tables[1].pairs) > 0


def trained(rng, letters):
    words = {bytes(rng.choices(letters, k=rng.randint(1, rng.choice([3, 8, 60])))): rng.choice([1, 2, 3]) for _ in range(8)}
    return learn_merges(PretokenCounts.of(words), rng.randint(0, 40)).as_bytes()


def random_merges(rng, letters):
    """Return merges of existing tokens; some never apply to any text."""
    tokens, merges = [bytes([letter]) for letter in letters], {}
    for _ in range(rng.randint(0, 14)):
        left, right = rng.choice(tokens), rng.choice(tokens)
        merges[left, right] = None
        tokens += [left + right] * (left + right not in tokens)
    return list(merges)


@pytest.mark.parametrize("make", [trained, random_merges])
@pytest.mark.parametrize("seed", range(10))
def test_backtracking_equals_merging(make, seed):
    rng = random.Random(seed)
    for _ in range(30):
        letters = rng.choice([b"a", b"ab", b"abc", b"abcd"])
        merges = make(rng, letters)
        compiled, ids = encoder_of(merges, rng)
        assert not merges_by_rank(compiled) or make is random_merges
        plain = plain_of(compiled, merges, ids)
        for _ in range(25):
            text = bytes(rng.choices(letters + b" ", k=rng.randint(1, rng.choice([5, 20, 64, 400]))))
            assert encode(compiled, text) == encode(plain, text)


def test_untrained_orders_use_rank_merging():
    # The merge of (ab, c) comes before the merge that produces ab; afterwards it has priority.
    compiled, ids = encoder_of([(b"ab", b"c"), (b"a", b"b"), (b"b", b"c")])
    assert merges_by_rank(compiled)
    assert encode(compiled, b"abcabc") == [ids[b"abc"]] * 2
    plain = plain_of(compiled, [(b"ab", b"c"), (b"a", b"b"), (b"b", b"c")], ids)
    rng = random.Random(1)
    for size in [*range(1, 140, 9), 127, 128, 129, 200, 5000]:
        text = bytes(rng.choices(b"abc", k=size)) + b" ab" + bytes(rng.choices(b"abc", k=size)) + b" "
        assert encode(compiled, text) == encode(plain, text)


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k"])
def test_rank_merging_of_long_pretokens_preserves_borders(pattern):
    merges = [(b"ab", b"c"), (b"a", b"b"), (b"b", b"c")]
    compiled, ids = encoder_of(merges, pattern=pattern)
    plain = plain_of(compiled, merges, ids)
    parts = [b"abc" * 100, b"", b"abcb" * 50 + b" ab", b"a", b"c" * 129]
    data = b"".join(part + b"\xff" for part in parts)
    ends = np.cumsum([len(part) + 1 for part in parts])
    borders = np.stack((ends - 1, ends), axis=1).reshape(-1)
    border_ids = np.array([7, NO_ID, 8, 9, NO_ID], np.uint32)
    found, cuts = compiled.encode_with_cuts(data, borders, border_ids)
    expected, places = plain.encode_with_cuts(data, borders, border_ids)
    assert (found.tolist(), cuts.tolist()) == (expected.tolist(), places.tolist())


WHOLE = [b"abc", b"ab", b"zz", b" q", b" abcabcabcabcabcabcabcabc", b"c" * 100, b"ba"]


@pytest.mark.parametrize("longest", [100, 300], ids=["in the cache", "too long for the cache"])
@pytest.mark.parametrize("merges", [[(b"a", b"b"), (b"b", b"a")], [(b"ab", b"c"), (b"a", b"b")]], ids=["in order", "by rank"])
def test_whole_tokens_take_precedence_over_merges(words, monkeypatch, merges, longest):
    # The small cache is discarded several times, and must contain the tokens again.
    monkeypatch.setattr(pretoken_cache, "_LARGEST", 1 << 12)
    made = [left + right for left, right in merges]
    tokens = dict.fromkeys([*(bytes([byte]) for byte in range(256)), *made, *WHOLE, b"d" * longest])
    ids = {token: id for id, token in enumerate(tokens)}
    whole = {token: id for token, id in ids.items() if len(token) > 1}
    compiled = new_encoder(merges, ids, whole=whole)
    assert isinstance(compiled, CompiledEncoder if longest == 100 else PlainEncoder)
    plain = plain_of(compiled, merges, ids, whole)
    rng = random.Random(2)
    pieces = [*WHOLE, b"d" * longest, b" ", b"abab", b"x", b" ba", *words[:3000]]
    for _ in range(4):
        text = b" ".join(rng.choices(pieces, k=6000))
        assert encode(compiled, text) == encode(plain, text)
    assert encode(compiled, b"abc ab zz") == [ids[b"abc"], *encode(plain, b" ab"), *encode(plain, b" zz")]


def test_merges_that_never_apply():
    merges = [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c"), (b"a", b"bc"), (b"abc", b"abc")]
    compiled, ids = encoder_of(merges)
    assert isinstance(compiled, CompiledEncoder)
    assert encode(compiled, b"abcabcab") == [ids[b"abcabc"], ids[b"ab"]]


@pytest.mark.parametrize("letters", ["a", "ACGT", "中文沒有空格"], ids=["one letter", "dna", "cjk"])
def test_long_runs_are_merged_correctly(letters):
    text = "".join(random.Random(0).choices(letters, k=40_000)).encode()
    merges = learn_merges(PretokenCounts.of({text[:5000]: 1}), 200).as_bytes()
    compiled, ids = encoder_of(merges)
    assert encode(compiled, text) == encode(plain_of(compiled, merges, ids), text)


@pytest.fixture
def words():
    """Return more distinct pretokens than the initial cache holds, of all lengths up to 200 bytes."""
    rng = random.Random(3)
    return [bytes(rng.choices(b"abcde", k=min(200, 1 + int(rng.expovariate(0.08))))) for _ in range(9000)]


def test_the_cache_grows_and_is_then_emptied(words, monkeypatch):
    monkeypatch.setattr(pretoken_cache, "_LARGEST", 1 << 13)
    merges = learn_merges(PretokenCounts.of(dict.fromkeys(words[:500], 1)), 300).as_bytes()
    compiled, ids = encoder_of(merges)
    text = b" ".join(words)
    expected = encode(plain_of(compiled, merges, ids), text)
    sizes = set()
    for _ in range(3):
        assert encode(compiled, text) == expected
        sizes.add(len(compiled._cache.entries) // 4)
    assert max(sizes) == 1 << 13


def test_a_grown_cache_keeps_its_entries(words):
    merges = learn_merges(PretokenCounts.of(dict.fromkeys(words[:500], 1)), 300).as_bytes()
    compiled, _ = encoder_of(merges)
    encode(compiled, b" ".join(words[:1500]))
    small = compiled._cache
    large = next_cache(small, 0)
    assert large.used.tolist() == small.used.tolist()

    def known(cache):
        rows = cache.entries.reshape(-1, 4)
        return sorted(map(tuple, rows[rows[:, 3] > 0].tolist()))

    assert known(large) == known(small)
    assert len(known(large)) == small.used[0] > 1000
    assert len(large.entries) == 4 * len(small.entries)


def test_a_long_text_gets_a_large_cache_at_once():
    cache = new_cache()
    assert len(next_cache(cache, 1 << 10).entries) == 4 * len(cache.entries)
    assert len(next_cache(cache, 1 << 22).entries) == 16 * len(cache.entries)


def test_a_locked_cache_is_read_but_not_modified(words):
    merges = learn_merges(PretokenCounts.of(dict.fromkeys(words[:500], 1)), 300).as_bytes()
    compiled, ids = encoder_of(merges)
    text = b" ".join(words[:600])
    expected = encode(plain_of(compiled, merges, ids), text)
    assert encode(compiled, text) == expected
    known = compiled._cache.used[0]
    compiled._cache.used[3] = 1
    other = b" ".join(words[300:900])
    assert encode(compiled, other) == encode(plain_of(compiled, merges, ids), other)
    assert compiled._cache.used[0] == known
    compiled._cache.used[3] = 0
    encode(compiled, other)
    assert compiled._cache.used[0] > known


def test_colliding_pretokens_are_not_all_cached():
    # All these keys have equal hashes: see `pretoken_hash`.
    mask = (1 << 64) - 1
    highs = range(1, 1500)
    lows = [(high * 0xC2B2AE3D27D4EB4F) & mask for high in highs]
    data = b"".join(low.to_bytes(8, "little") + high.to_bytes(8, "little") for low, high in zip(lows, highs, strict=True))
    merges = [(b"\x00", b"\x00"), (b"\x00\x00", b"\x00\x00")]
    compiled, ids = encoder_of(merges, pattern="cl100k")
    compiled._split = lambda data, borders, ends: iter([np.arange(16, len(data) + 1, 16)])
    for _ in range(2):
        assert encode(compiled, data) == encode(plain_of(compiled, merges, ids), data)
    assert compiled._cache.used[0] == pretoken_cache.LOOKUPS


def test_ids_of_more_than_20_bits_are_cached():
    tokens = [*(bytes([byte]) for byte in range(256)), *(b"<%d>" % index for index in range(1 << 20)), b"ab", b"abc"]
    ids = {token: id for id, token in enumerate(tokens)}
    compiled = new_encoder([(b"a", b"b"), (b"ab", b"c")], ids)
    last = len(tokens) - 1
    assert encode(compiled, b"abc ab abc ab") == [last, 32, last - 1, 32, last, 32, last - 1]


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k"])
@pytest.mark.parametrize("block", [1, 2, 3, 50, 1 << 13])
def test_borders_are_independent_of_block_ends(monkeypatch, block, pattern):
    monkeypatch.setattr(workspace, "BLOCK", block)
    monkeypatch.setattr(workspace, "TEXT_BYTES", block)
    compiled, ids = encoder_of([(b"a", b"b"), (b" ", b"ab")], pattern=pattern)
    rng = random.Random(block)
    parts = [bytes(rng.choices(b"ab ", k=rng.randint(0, 6))) for _ in range(200)]
    data = b"".join(part + b"\xff" for part in parts)
    ends = np.cumsum([len(part) + 1 for part in parts])
    borders = np.stack((ends - 1, ends), axis=1).reshape(-1)
    border_ids = np.array([rng.choice([NO_ID, 7]) for _ in parts], np.uint32)
    found, cuts = compiled.encode_with_cuts(data, borders, border_ids)
    expected, places = [], []
    for part, id in zip(parts, border_ids.tolist(), strict=True):
        expected += encode(compiled, part)
        places.append(len(expected))
        expected += [id] * (id != NO_ID)
    assert found.tolist() == expected
    assert cuts.tolist() == places
    plain = plain_of(compiled, [(b"a", b"b"), (b" ", b"ab")], ids)
    found, cuts = plain.encode_with_cuts(data, borders, border_ids)
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
    assert 1 <= len(compiled._idle) <= 4


def test_encoding_works_after_a_memory_error(monkeypatch):
    compiled, _ = encoder_of([(b"a", b"b")])
    text = b"ab" * 200_000
    with monkeypatch.context() as patched:

        def fail(*_):
            raise MemoryError

        patched.setattr(workspace, "new_scratch", fail)
        with pytest.raises(MemoryError):
            encode(compiled, text)
    assert encode(compiled, text) == [256] * 200_000


def test_buffers_for_a_long_pretoken_are_freed(monkeypatch):
    monkeypatch.setattr(compiled_encoder_module, "_KEPT", 1 << 18)
    compiled, _ = encoder_of([(b"a", b"b")])
    assert len(encode(compiled, b"ab" * 200_000)) == 200_000
    assert len(compiled._idle[0].out) < 200_000


def test_the_smallest_cache_is_small():
    assert sum(array.nbytes for array in new_cache()) < 1 << 19


def test_every_length_of_a_text_and_every_place_of_its_end():
    """The end of a text is read from a copy: put the last pretoken at each place of its 64 bytes."""
    rng = random.Random(5)
    compiled, ids = encoder_of([(b"a", b"b"), (b" ", b"ab"), (b"'", b"s")])
    plain = plain_of(compiled, [(b"a", b"b"), (b" ", b"ab"), (b"'", b"s")], ids)
    pieces = ["ab", " ab", "'s", "  ", "\n", "é", "中", "🙂", "12", "!?", "\u3000"]
    for size in [*range(1, 200), 255, 256, 257]:
        text = b""
        while len(text) < size:
            text += rng.choice(pieces).encode()
        assert encode(compiled, text) == encode(plain, text)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 66, 130, 300])
def test_the_fast_path_detects_special_tokens(size):
    finder = SpecialFinder(["<|end|>", "~"])
    ids = {bytes([byte]): byte for byte in range(256)}
    compiled = new_encoder([], ids, beginnings=finder.beginnings)
    compiled.encode(b"x", *NONE)
    plain = b"<a " * (size // 3)
    assert compiled.try_encode(plain).tolist() == list(plain)
    for place in range(0, size + 1, 7):
        for token in (b"<|end|>", b"~"):
            assert compiled.try_encode(plain[:place] + token + plain[place:]) is None
            assert compiled.try_encode_to_list(plain[:place] + token + plain[place:]) is None


@pytest.mark.parametrize("merges", [[(b"a", b"b")], [(b"ab", b"c"), (b"a", b"b")]], ids=["in order", "by rank"])
def test_the_longest_pretokens_stay_within_their_buffers(merges, monkeypatch):
    text_bytes = 1 << 10
    monkeypatch.setattr(workspace, "TEXT_BYTES", text_bytes)
    compiled, ids = encoder_of(merges)
    plain = plain_of(compiled, merges, ids)
    encode(compiled, b"x")
    (idle,) = compiled._idle
    guarded = {}
    for name in (*workspace.Scratch._fields, *(f"rank_{name}" for name in workspace.RankScratch._fields)):
        size = len(idle._arrays[name])
        whole = np.zeros(size + 512, idle._arrays[name].dtype)
        guarded[name] = whole[size:]
        idle.set(name, whole[:size])
    for size in [*range(text_bytes + 60, text_bytes + 2 * LONGEST - 2, 7), text_bytes + 2 * LONGEST - 2]:
        text = (b"abc" * size)[:size]
        assert encode(compiled, text) == encode(plain, text)
    assert compiled._idle == [idle]
    assert not any(guard.any() for guard in guarded.values())


def test_colliding_whole_tokens_use_the_plain_encoder():
    # All these keys have equal hashes: see `pretoken_hash`.
    mask = (1 << 64) - 1
    keys = [((high * 0xC2B2AE3D27D4EB4F) & mask, high) for high in range(1, 300)]
    tokens = [low.to_bytes(8, "little") + high.to_bytes(8, "little") for low, high in keys]
    ids = {token: id for id, token in enumerate([*(bytes([byte]) for byte in range(256)), *tokens])}
    whole = {token: ids[token] for token in tokens}
    assert isinstance(new_encoder([], ids, "cl100k", whole), PlainEncoder)
