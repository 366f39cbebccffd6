"""Patterns in `regex` and in Oniguruma, the engine of tokenizers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from tilewright.errors import UserError
from tilewright.tokenizer.formats.oniguruma import check_pattern, from_oniguruma
from tilewright.tokenizer.text.patterns import split_text

# Each supported construct, at least once.
READ_ALIKE = [
    r"\p{Lu}?\p{L}++|\P{L}",
    r"[\p{Han}a-f]+|[^\s\p{N}]|\s+",
    r"\d{2}|\d{3,}|\S{1,2}?|\s*a|\s+",
    r"(?i:'s|'t|[dm])|(?:a|b)*?c|(d)(?=e)|(?!f)[^\n]",
    r"(?<=a)b+|(?<!a)c|(?>a+)b|\Ab",
    r"[a-]+|[-b]+|[\-\]\[\^]|\x41\u4e00|\t|\$|#a",
    r"a}|b]|[.|(){}*+?$]+|[&a]|é++",
]
LETTERS = "abcdefABCsStTdDmMkK'ſK 12²\t\n\r.-[]^$#|(){}*+?&中é\u0301}"

steady = settings(derandomize=True, deadline=None, max_examples=300)


def split_there(pattern, text):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return [piece for piece, _ in split.pre_tokenize_str(text)]


@pytest.mark.parametrize("pattern", READ_ALIKE)
def test_supported_patterns_split_alike(pattern):
    assert check_pattern(pattern) == from_oniguruma(pattern) == pattern

    @steady
    @given(text=st.text(alphabet=LETTERS, max_size=20))
    def check(text):
        assert split_there(pattern, text) == split_text(text, pattern)

    check()


@pytest.mark.parametrize(
    ("pattern", "read"),
    [
        (r" ?[^\s[0-9]]+", r" ?[^\s0-9]+"),
        (r" ?[^(\s|[.,!?…。，、।۔،])]+", r" ?[^(\s|.,!?…。，、।۔،)]+"),
        (r"[[b-]a[[.]2]]+|.", r"[b\-a.2]+|."),
    ],
)
def test_nested_sets_are_read_but_not_written(pattern, read):
    assert from_oniguruma(pattern) == read
    with pytest.raises(UserError, match=r"has '\[' at"):
        check_pattern(pattern)

    @steady
    @given(text=st.text(alphabet=LETTERS + ",!…。", max_size=20))
    def check(text):
        assert split_there(pattern, text) == split_text(text, read)

    check()


@pytest.mark.parametrize(
    ("pattern", "construct"),
    [
        (r"(?m).+", "(?m)"),
        (r"(?s).", "(?s)"),
        (r"a|(?i:ß)", "(?i:ß)"),
        (r"(?i:ss)", "(?i:ss)"),
        (r"(?i:i)", "(?i:i)"),
        (r"(?P<a>x)", "(?P<a>x)"),
        (r"\p{Word}+", r"\p{Word}"),
        (r"\p{^L}", r"\p{^L}"),
        (r"\N", r"\N"),
        (r"\N{DIGIT ONE}", r"\N{DIGIT ONE}"),
        (r"\w|\W", r"\w"),
        (r"\h+", r"\h"),
        (r"(a)\1", r"\1"),
        (r"a\Z", r"\Z"),
        (r"a{,2}", "{,2}"),
        (r"a{2}?", "{2}?"),
        (r"a{1,3}+", "{1,3}+"),
        (r"a**", "**"),
        (r"^a", "^"),
        (r"a$", "$"),
        (r"[a&&b]", "&&"),
        (r"[[:alpha:]]", "[:"),
        (r"[a[^b]]", "["),
        (r"[]a]", "]"),
        (r"\xe9", r"\x"),
    ],
)
def test_unknown_constructs_raise(pattern, construct):
    for read in (check_pattern, from_oniguruma):
        with pytest.raises(UserError) as refused:
            read(pattern)
        place = pattern.rindex(construct) if construct == "[" else pattern.index(construct)
        assert f"has {construct!r} at {place}, which may have another meaning" in str(refused.value)


def test_some_refused_constructs_do_split_differently():
    # This shows that the list above refuses with reason.
    for pattern, text in [
        (r" ?[^\s[0-9]]+", "a1]"),
        (r"(?m).+", "a\nb"),
        (r"(?i:ss)", "ß."),
        (r"(?i:i)", "aİ."),
        (r"\w+", "a²"),
        (r"a{2}+", "aaaa"),
        (r"[a&&b]", "ab"),
    ]:
        assert split_there(pattern, text) != split_text(text, pattern), pattern


EMPTY = [r"\p{L}*|\p{N}+", r"\A|\p{Zs}", r"\p{L}*?\p{Cc}*", r"[a&b]*?|\d+", r"\p{L}*?(?<!b)", r"(?=a)", r"a|"]


@pytest.mark.parametrize("pattern", EMPTY)
def test_patterns_that_match_the_empty_string_raise(pattern):
    for read in (check_pattern, from_oniguruma):
        with pytest.raises(UserError, match="can match the empty string"):
            read(pattern)


@pytest.mark.parametrize("pattern", [r"\s+(?!\S)|\s+", r"(?<=a)\p{L}+", r"(?>\d{1,3})"])
def test_patterns_with_lookaround_that_match_characters_are_accepted(pattern):
    assert check_pattern(pattern) == from_oniguruma(pattern) == pattern
