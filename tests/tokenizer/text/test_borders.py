import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.tokenizer.text.borders import last_border
from tilewright.tokenizer.text.patterns import PATTERNS, split_pretokens

# Special tokens that contain white space, overlap, and start inside one another.
SPECIALS = ("<|>", "<|><|>", "a<|>", " \n", "a b", "中 ")
PARTS = [
    *SPECIALS,
    *" \n\t\raB12'.!/中²\u3000\u00a0\x1c\x85\u2028\u0301🙂",
    "  ",
    "\r\n",
    "\n\n",
    "'s",
    "'LL",
    ". ",
    "!\n",
    "/\n",
]

texts = st.lists(st.sampled_from(PARTS), max_size=25).map("".join)


def split(text, special_tokens, pattern):
    parts = []
    for run, special in split_pretokens([text], special_tokens, pattern=PATTERNS.get(pattern, pattern)):
        parts += run if special is None else [*run, special]
    return parts


@settings(derandomize=True, deadline=None, max_examples=750)
@given(
    text=texts, following=texts, special_tokens=st.sampled_from([(), SPECIALS, SPECIALS[:2]]),
    pattern=st.sampled_from([*PATTERNS, r"(?s).+?\.|(?s).+"]),
)  # fmt: skip
def test_parts_are_split_like_the_whole(text, following, special_tokens, pattern):
    data = text.encode()
    border = last_border(data, tuple(map(str.encode, special_tokens)), pattern)
    assert 0 <= border <= len(data)
    first, rest = data[:border].decode(), data[border:].decode() + following
    assert split(first, special_tokens, pattern) + split(rest, special_tokens, pattern) == split(
        text + following, special_tokens, pattern
    )


@pytest.mark.parametrize(
    ("text", "special_tokens", "pattern"),
    [
        ("word " * 100, (), "gpt2"),
        ("word " * 100, (), "o200k"),
        ("中文。\n" * 100, (), "gpt2"),
        ("中文。\n" * 100, (), "cl100k"),
        ("中文。\n" * 100, (), "o200k"),
        ("中文<|>" * 100, ("<|>",), "gpt2"),
        ("<|>" * 100, ("<|>", "<|><|>x"), "gpt2"),
        ("中文<|>" * 100, ("<|>",), r"\w+"),
        ("word  \n\n" * 100, (), "gpt2"),
        ("word  \n\n" * 100, (), "cl100k"),
    ],
)
def test_borders_are_found_near_the_end(text, special_tokens, pattern):
    data = text.encode()
    assert last_border(data, tuple(map(str.encode, special_tokens)), pattern) > len(data) - 40


@pytest.mark.parametrize("text", ["acgt" * 100, " " * 400, "", " ", "ab", "中" * 100, "\u3000 " * 50])
def test_some_text_has_no_border(text):
    assert last_border(text.encode(), (b"<|>",)) == 0


@pytest.mark.parametrize("blank", [b" ", b"\n", b"\t", b" \n", b"\xe3\x80\x80 "])
def test_long_white_space_takes_linear_time(blank):
    assert last_border(b"a b" + blank * 200_000, ()) in (1, 3)


def test_a_border_is_as_late_as_the_special_tokens_allow():
    data = ("a b" + "中" * 100 + "<|>" + "中" * 100).encode()
    assert last_border(data, (b"<|>",)) == data.index(b"<|>")
    assert last_border(data, ()) == 1


def test_invalid_utf8_counts_as_visible():
    assert last_border(b"ab\xff \xe4 \xe4\xb8\xff" + b"x" * 10, ()) == 5
