"""The compiled scanners compared with `regex` and the published patterns."""

import itertools
import random
import re

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.tokenizer.text.patterns import PATTERNS, split_text
from tilewright.tokenizer.text.scanner import scanner_of
from tilewright.tokenizer.text.specials import SpecialFinder
from tilewright.tokenizer.text.unicode_classes import class_table

# GPT-2's pattern as published by OpenAI, the others as in tiktoken.
PUBLISHED = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "cl100k": "|".join(
        [
            r"""'(?i:[sdmt]|ll|ve|re)""",
            r"""[^\r\n\p{L}\p{N}]?+\p{L}++""",
            r"""\p{N}{1,3}+""",
            r""" ?[^\s\p{L}\p{N}]++[\r\n]*+""",
            r"""\s++$""",
            r"""\s*[\r\n]""",
            r"""\s+(?!\S)""",
            r"""\s""",
        ]
    ),
    "o200k": "|".join(
        [
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    ),
    "llama3": (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"""
        r"""|\s+(?!\S)|\s+"""
    ),
    "qwen2": (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"""
        r"""|\s+(?!\S)|\s+"""
    ),
    "tekken": (
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
        r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"""
        r"""|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
    ),
}  # fmt: skip

# Each pattern splits the pieces of the previous one.
DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)

# All kinds of characters in all widths, and those that the patterns name.
PARTS = [*"aBzSsTtdmlLvVrReEk  \n\r\t\v'''019!?./_", *"\x00\x1c\x1f\x7f\x85\xa0\u1680\u2003\u2028\u3000\ufeff"]
PARTS += [*"éÉßſKǅʰª中アÅ̈\u0301\u20dd½²٣Ⅷ€\u200d🙂𝐀𝐚𝟘𐐀𐐨\U000e0100\ufffd\U0010ffff"]
PARTS += [*"゠ー・゛\u3040\u3099龥龦〇"]
PARTS += ["'s", "'S", "'ll", "'Re", "'ſ", "  ", " \n", "\n\n", "\r\n", " '", "//", "123", "the", " The", "...\n"]

names = pytest.mark.parametrize("name", list(PATTERNS))


def ends_of(name, data, start=0, end=None, batch_size=4096, specials=None):
    """Return all ends, in batches of `batch_size`."""
    scan, array = scanner_of(name), np.frombuffer(data, np.uint8)
    place, end, found = start, len(data) if end is None else end, []
    while place < end:
        ends = np.full(batch_size + 1, 77)
        arguments = () if specials is None else (specials,)
        size = scan(array, place, end, ends[:batch_size], *arguments)
        assert ends[batch_size] == 77
        assert 0 < size <= batch_size
        found += ends[:size].tolist()
        place = abs(found[-1])
    return found


def expected(name, text, offset=0):
    pieces = [text]
    for pattern in DEEPSEEK if name == "deepseek-v3" else [PUBLISHED[name]]:
        pieces = [part for piece in pieces for part in matches_and_gaps(pattern, piece)]
    return (np.cumsum([len(piece.encode()) for piece in pieces], dtype=np.int64) + offset).tolist()


def matches_and_gaps(pattern, text):
    spans = [match.span() for match in regex.finditer(pattern, text)]
    borders = sorted({0, len(text), *(border for span in spans for border in span)})
    return [text[start:end] for start, end in itertools.pairwise(borders)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_patterns_equal_the_published_ones(name):
    assert PATTERNS[name] == PUBLISHED[name]


@pytest.fixture(scope="module")
def characters():
    """The first and last character of every run of one class, their neighbors, and many others."""
    table = class_table()
    edges = np.flatnonzero(np.diff(table))
    codes = {*edges.tolist(), *(edges + 1).tolist(), *range(0x300), *range(0, 0x110000, 997)}
    return [chr(code) for code in sorted(codes) if not 0xD800 <= code < 0xE000]


@names
@pytest.mark.parametrize(
    ("before", "behind"),
    [("", ""), (" ", "a"), ("a", "A1"), ("A", "a"), ("1", ""), ("!", "A1"), ("'", "a"), ("\n", ""), (" \n", "A1")],
)
def test_every_class_of_characters(name, characters, before, behind):
    # Many characters in one text, which is faster, separated by pretokens.
    text = "".join(f"x0{before}{character}{behind}-\nx " for character in characters)
    assert ends_of(name, text.encode()) == expected(name, text)


@names
@pytest.mark.parametrize("batch_size", [1, 63, 64, 4096])
def test_random_texts(name, batch_size):
    draw = random.Random(batch_size)
    for _ in range(4000 if batch_size == 4096 else 500):
        text = "".join(draw.choices(PARTS, k=draw.choice([1, 2, 3, 5, 8, 20, 40, 70, 200])))
        assert ends_of(name, text.encode(), batch_size=batch_size) == expected(name, text), text


@names
def test_every_distance_from_the_window_and_from_the_ends(name):
    scenes = [
        "'s",
        "'lle",
        " 's",
        "''s",
        "\u3000 x",
        " \u3000x",
        " \n x",
        "é'll",
        "中 '",
        "1½2",
        "\xa0a",
        "  ",
        "'",
        "!'ve",
        "🙂 🙂",
        "A中a",
    ]
    for scene in scenes:
        for filler in ("a", "é", " ", "1", "-", "a b"):
            for size in (*range(8), *range(26, 36), *range(56, 70)):  # near 64 bytes
                text = (filler * size)[:size] + scene
                for tail in ("", "b", " ", "bc d" * 20):
                    data = (text + tail).encode()
                    assert ends_of(name, data) == expected(name, text + tail), (scene, filler, size, tail)
    for scene in scenes:
        for size in range(56, 70):
            # The array continues after the text with bytes that must be ignored.
            text = "a" * size + scene
            for after in ("s", "'s", " ", "1", "\n", "e" * 80):
                assert ends_of(name, (text + after).encode(), end=len(text.encode())) == expected(name, text)


@names
@settings(derandomize=True, deadline=None, max_examples=150)
@given(text=st.text(max_size=150) | st.lists(st.sampled_from(PARTS), max_size=150).map("".join), offset=st.integers(0, 5))
def test_any_text(name, text, offset):
    text = text.encode(errors="replace").decode()
    assert ends_of(name, b"'" * offset + text.encode(), start=offset) == expected(name, text, offset)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(text=st.lists(st.sampled_from(PARTS), max_size=30).map("".join))
def test_deepseeks_pattern_equals_the_three_published(text):
    ends = np.cumsum([len(piece.encode()) for piece in split_text(text, PATTERNS["deepseek-v3"])], dtype=np.int64)
    assert ends.tolist() == expected("deepseek-v3", text)


@pytest.mark.parametrize("name", PUBLISHED)
def test_tiktoken_agrees(name):
    # Ids are bytes, and any two adjacent bytes merge: unmerged bytes are in different pretokens.
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choices(PARTS, k=60))
        ends = ends_of(name, text.encode())
        pretokens = [text.encode()[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        ranks = {bytes([byte]): byte for byte in range(256)}
        for pretoken in pretokens:
            ranks.setdefault(pretoken, len(ranks))
        encoding = tiktoken.Encoding("own", pat_str=PUBLISHED[name], mergeable_ranks=ranks, special_tokens={})
        assert encoding.decode_tokens_bytes(encoding.encode(text)) == pretokens


@names
def test_special_tokens_are_borders(name):
    specials = ("<|a|>", " \n", "b ", "b  ")
    split = re.compile("(" + "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) + ")")
    draw = random.Random(0)
    for batch_size in (2, 64, 4096):
        for _ in range(200):
            text = "".join(draw.choices([*PARTS, *specials], k=draw.choice([3, 30, 100])))
            found, offset = [], 0
            for piece in split.split(text):
                if piece in specials:
                    found.append(-offset - len(piece.encode()))
                elif piece:
                    found += expected(name, piece, offset)
                offset += len(piece.encode())
            places = SpecialFinder(specials).find(np.frombuffer(text.encode(), np.uint8))
            assert ends_of(name, text.encode(), specials=places, batch_size=batch_size) == found


@names
def test_real_text(name, real_text):
    assert ends_of(name, real_text.encode()) == expected(name, real_text)


def test_classes_equal_regex():
    table = class_table()
    assert not table.flags.writeable
    for bits, members in [
        (1, r"\p{L}"),
        (2, r"\p{N}"),
        (4, r"\s"),
        (8, r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"),
        (16, r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"),
    ]:
        everything = "".join(map(chr, range(0x110000)))
        members = {match.start() for match in regex.finditer(members, everything)}
        assert members == set(np.flatnonzero(table & bits).tolist())


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    tokens=st.lists(st.text(alphabet="ab<|>é", min_size=1, max_size=5), unique=True, max_size=6),
    text=st.text(alphabet="ab<|>é.", max_size=300),
)
def test_special_tokens_equal_re(tokens, text):
    longest_first = sorted((token.encode() for token in tokens), key=len, reverse=True)
    spans = [m.span() for m in re.finditer(b"|".join(map(re.escape, longest_first)), text.encode())] if tokens else []
    assert SpecialFinder(tokens).find(np.frombuffer(text.encode(), np.uint8)).reshape(-1, 2).tolist() == [
        list(s) for s in spans
    ]


def test_many_special_tokens_are_found():
    data = np.frombuffer(b"<|x|>." * 1000, np.uint8)
    assert SpecialFinder(["<|x|>"]).find(data).tolist() == [place for k in range(1000) for place in (6 * k, 6 * k + 5)]
