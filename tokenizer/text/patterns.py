"""Split text: first at special tokens, then into pretokens by a pattern.

The published patterns have names and compiled scanners. Any other pattern runs in `regex`. This file is the specification of
both.
"""

import re
from collections.abc import Generator, Iterable, Iterator, Sequence, Set
from functools import cache

import regex

from ...errors import UserError

END_OF_TEXT = "<|endoftext|>"
"""Special token after each document: `<|endoftext|>`."""

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

_BY_CASE = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+CONTRACTIONS"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*CONTRACTIONS"""
    r"""|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_LETTERS = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBERS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"""
    r"""|\s+(?!\S)|\s+"""
)

# The patterns as published. GPT-2's is an equivalent of tiktoken's faster form. DeepSeek V3's (also R1's) was published as
# three patterns, each applied to the pieces of the one before: numbers; Han and kana; words. The single pattern here is
# equivalent: a number ends a text, and so does each change between Han or kana and other characters; the last branches match
# the remaining characters.
PATTERNS = {
    "gpt2": GPT2_PATTERN,
    "cl100k": (
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"""
        r"""|\s+(?!\S)|\s"""
    ),
    "o200k": _BY_CASE.replace("CONTRACTIONS", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("NUMBERS", r"\p{N}{1,3}"),
    "llama3": _LETTERS.replace("NUMBERS", r"\p{N}{1,3}"),
    "qwen2": _LETTERS.replace("NUMBERS", r"\p{N}"),
    "tekken": _BY_CASE.replace("CONTRACTIONS", "").replace("NUMBERS", r"\p{N}"),
    "deepseek-v3": (
        r"""\p{N}{1,3}|[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
        r"""|[^\r\n\p{L}\p{P}\p{S}\p{N}HAN_KANA]?(?:(?![HAN_KANA])[\p{L}\p{M}])+| ?(?:(?![HAN_KANA])[\p{P}\p{S}])+[\r\n]*"""
        r"""|\s*[\r\n]+|\s+(?![^\s\p{N}HAN_KANA])|\s+"""
        r"""|(?:(?=[HAN_KANA])[^\p{L}\p{P}\p{S}])?(?:(?=[HAN_KANA])[\p{L}\p{M}])+|(?:(?=[HAN_KANA])[\p{P}\p{S}])+"""
        r"""|(?:(?=[HAN_KANA])[^\p{L}\p{M}\p{P}\p{S}](?!(?=[HAN_KANA])[\p{L}\p{M}]))+"""
        r"""|(?:[^\s\p{L}\p{M}\p{N}\p{P}\p{S}HAN_KANA](?!(?![HAN_KANA])[\p{L}\p{M}]))+"""
    ).replace("HAN_KANA", "一-龥\u3040-\u309f\u30a0-\u30ff"),
}

BLOCK_CHARS = 1 << 14

# GPT-2's pattern looks at most two characters past the end of a match, to distinguish "'l" from "'ll".
_LOOKAHEAD = 2


def resolve_pattern(pattern: str) -> str:
    """Return the regular expression of a pattern, given by name or as an expression; an invalid one raises a `UserError`."""
    if not isinstance(pattern, str) or (pattern not in PATTERNS and re.fullmatch(r"[\w-]*", pattern)):
        raise UserError(
            f"pattern is {pattern!r}: expected one of {', '.join(PATTERNS)}, or a regular expression that splits text"
        )
    expression = PATTERNS.get(pattern, pattern)
    _compile(expression)
    return expression


def pattern_name(pattern: str) -> str | None:
    """Return the name of a pattern, given by name or as an expression, or None if it is not in `PATTERNS`."""
    return next((name for name, expression in PATTERNS.items() if pattern in (name, expression)), None)


def split_text(text: str, pattern: str = GPT2_PATTERN) -> list[str]:
    """Return the pretokens of a text without special tokens, by `regex`.

    Text that the pattern does not match becomes pretokens too, so the concatenated pretokens are the text.
    """
    compiled = _compile(pattern)
    # For a pattern with groups, findall returns the groups, not the match.
    found = [] if compiled.groups else compiled.findall(text)
    if sum(map(len, found)) == len(text) and all(found):
        return found
    found, end = [], 0
    for match in compiled.finditer(text):
        found += [text[end : match.start()], match.group()]
        end = match.end()
    return [pretoken for pretoken in (*found, text[end:]) if pretoken]


@cache
def _compile(expression: str) -> "regex.Pattern[str]":
    try:
        return regex.compile(expression)
    except (regex.error, OverflowError) as error:
        names = ", ".join(PATTERNS)
        raise UserError(f"pattern is {expression!r}: expected one of {names}, or a regular expression: {error}") from None


@cache
def _special_pattern(special_tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    # An alternation takes the first branch that matches, so the longest token must be first.
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if special_tokens else None


def check_special_tokens(special_tokens: Sequence[str]) -> tuple[str, ...]:
    """Return the special tokens as a tuple; an empty, duplicate or unencodable one raises a `UserError`."""
    if isinstance(special_tokens, str):
        raise TypeError(f"special_tokens is the string {special_tokens!r}: expected a sequence of strings")
    if isinstance(special_tokens, Set):
        raise TypeError(f"special_tokens is the set {special_tokens!r}, which has no order: expected a list or a tuple")
    seen: set[str] = set()
    for index, token in enumerate(special_tokens):
        if not isinstance(token, str):
            raise TypeError(f"special_tokens has {token!r} at {index}: expected a str")
        if not token:
            raise UserError(f"special token {index} is empty: expected at least one character")
        if token in seen:
            raise UserError(f"special token {token!r} is given twice")
        seen.add(token)
        # Undecodable bytes become U+FFFD, so as a special token it would match text that never contained it.
        if re.search("[\ud800-\udfff\ufffd]", token):
            raise UserError(f"special token {token!r} holds a surrogate or U+FFFD: expected text that UTF-8 can encode")
    return tuple(special_tokens)


def split_pretokens(
    pieces: Iterable[str],
    special_tokens: tuple[str, ...] = (),
    *,
    pattern: str = GPT2_PATTERN,
    block_chars: int = BLOCK_CHARS,
) -> Iterator[tuple[list[str], str | None]]:
    """Yield runs of pretokens, each with the special token that ends it, or None if the run continues.

    The runs are independent of the boundaries of the pieces. Of overlapping special tokens,
    the first and then the longest one matches. Memory: `block_chars` characters or, if it is longer, a few times the longest
    pretoken (GPT-2), the longest text without a space (other named patterns) or without a special token (all others).
    """
    waiting: list[str] = []
    size, enough = 0, block_chars
    for piece in pieces:
        for start in range(0, len(piece), block_chars):
            block = piece[start : start + block_chars]
            waiting.append(block)
            size += len(block)
            if size >= enough:
                held = yield from _split_pieces("".join(waiting), special_tokens, pattern, final=False)
                # The rest is split again together with new text; doubling keeps the total work linear.
                waiting, size, enough = [held], len(held), max(block_chars, 2 * len(held))
    yield from _split_pieces("".join(waiting), special_tokens, pattern, final=True)


def _split_pieces(
    text: str, special_tokens: tuple[str, ...], pattern: str, *, final: bool
) -> Generator[tuple[list[str], str | None], None, str]:
    """Split `text`; unless it is final, return its end, whose split depends on the text that follows."""
    specials = _special_pattern(special_tokens)
    # After this place, a special token may continue in text that is not available yet.
    horizon = len(text) if final else max(0, len(text) + 1 - max(map(len, special_tokens), default=1))
    start = 0
    for match in specials.finditer(text) if specials else ():
        if match.start() >= horizon:
            break
        yield split_text(text[start : match.start()], pattern), match.group()
        start = match.end()
    end = max(start, horizon)
    if final:
        yield split_text(text[start:end], pattern), None
    else:
        run, end = _split_settled(text, start, end, pattern)
        yield run, None
    return text[end:]


def _split_settled(text: str, start: int, end: int, pattern: str) -> tuple[list[str], int]:
    """Return the pretokens of `text[start:end]` that following text cannot change, and their end."""
    name = pattern_name(pattern)
    if name == "gpt2":
        run = split_text(text[start:end], pattern)
        # The pattern does not look behind, so splitting can restart at any border between pretokens.
        held = 0
        while run and held < _LOOKAHEAD:
            held += len(run.pop())
        return run, end - held
    # The other named patterns always start a pretoken at a space after a visible character: see `borders.py`.
    while name is not None and (end := text.rfind(" ", start + 1, end)) > 0:
        if not text[end - 1].isspace():
            return split_text(text[start:end], pattern), end
    return [], start
