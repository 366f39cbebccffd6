"""How text falls apart: at special tokens first, then into pretokens as a pattern says.

Published patterns are known by name, and have compiled scanners; any other goes through `regex`. Here is the
specification of both.
"""

import re
from collections.abc import Generator, Iterable, Iterator, Sequence, Set
from functools import cache

import regex

from ...errors import UserError

END_OF_TEXT = "<|endoftext|>"

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

# As they were published; GPT-2's splits as tiktoken's own, quicker form of it does. DeepSeek V3's, which R1 shares, was three,
# each of which splits the pieces of those before it: numbers; Han and kana; words. Here is one that does the same, to which a
# number ends a text, and so does each change between Han or kana and other characters; last come those that were left over.
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

# GPT-2's pattern looks at most two characters past the end of a match, to tell "'l" from "'ll".
_LOOKAHEAD = 2


def resolve_pattern(pattern: str) -> str:
    """Return the regular expression of a pattern given by name, or as one; one that does not compile raises a `UserError`."""
    if not isinstance(pattern, str) or (pattern not in PATTERNS and re.fullmatch(r"[\w-]*", pattern)):
        raise UserError(
            f"pattern {pattern!r} is neither one of {', '.join(PATTERNS)} nor a regular expression that splits text"
        )
    expression = PATTERNS.get(pattern, pattern)
    _compile(expression)
    return expression


def pattern_name(pattern: str) -> str | None:
    """Return the name of a pattern, given by name or as a regular expression, or None where it is none of `PATTERNS`."""
    return next((name for name, expression in PATTERNS.items() if pattern in (name, expression)), None)


def split_text(text: str, pattern: str = GPT2_PATTERN) -> list[str]:
    """Return the pretokens of a text without special tokens, by `regex`.

    What the pattern does not match is a pretoken too, so that joined they are the text again.
    """
    compiled = _compile(pattern)
    # Of a pattern with groups, findall returns those and not the match.
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
        raise UserError(f"pattern {expression!r} is neither one of {names} nor a regular expression: {error}") from None


@cache
def _special_pattern(special_tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    # An alternation takes the first branch that matches, so the longest token must come first.
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if special_tokens else None


def check_special_tokens(special_tokens: Sequence[str]) -> tuple[str, ...]:
    """Return the special tokens as a tuple; raise a `UserError` for an empty, doubled or unencodable one."""
    if isinstance(special_tokens, str):
        raise TypeError(f"special_tokens is a sequence of strings, not the one string {special_tokens!r}")
    if isinstance(special_tokens, Set):
        raise TypeError(f"special_tokens is the set {special_tokens!r}, which has no order: a list or a tuple is needed")
    seen: set[str] = set()
    for index, token in enumerate(special_tokens):
        if not isinstance(token, str):
            raise TypeError(f"special_tokens has {token!r} at {index}: a str is needed")
        if not token:
            raise UserError(f"special token {index} is empty: it needs at least one character")
        if token in seen:
            raise UserError(f"special token {token!r} is given twice")
        seen.add(token)
        # U+FFFD is what undecodable bytes become: as a special token it would appear out of nothing.
        if re.search("[\ud800-\udfff\ufffd]", token):
            raise UserError(f"special token {token!r} holds a surrogate or U+FFFD: only text that UTF-8 can carry is allowed")
    return tuple(special_tokens)


def split_pretokens(
    pieces: Iterable[str],
    special_tokens: tuple[str, ...] = (),
    *,
    pattern: str = GPT2_PATTERN,
    block_chars: int = BLOCK_CHARS,
) -> Iterator[tuple[list[str], str | None]]:
    """Yield runs of pretokens, each with the special token that ends it, or None where the run just goes on.

    The runs are those of the joined pieces, wherever these are cut. Where special tokens overlap, the first and then the
    longest one wins. Memory: `block_chars` characters or, where it is longer, a few times the longest pretoken (GPT-2), the
    longest piece without a blank (the others with a name), or the longest piece without a special token (any other).
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
                # Text held back is split again with what follows it; doubling keeps the sum of that work linear.
                waiting, size, enough = [held], len(held), max(block_chars, 2 * len(held))
    yield from _split_pieces("".join(waiting), special_tokens, pattern, final=True)


def _split_pieces(
    text: str, special_tokens: tuple[str, ...], pattern: str, *, final: bool
) -> Generator[tuple[list[str], str | None], None, str]:
    """Split `text`; unless it is final, return the end of it that following text could still split otherwise."""
    specials = _special_pattern(special_tokens)
    # From here on a special token may reach into text not seen yet.
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
    """Return the pretokens of `text[start:end]` that no following text can change, and where they end."""
    name = pattern_name(pattern)
    if name == "gpt2":
        run = split_text(text[start:end], pattern)
        # The pattern does not look behind, so what is held back may start afresh at any border between pretokens.
        held = 0
        while run and held < _LOOKAHEAD:
            held += len(run.pop())
        return run, end - held
    # Before a blank that follows something else, the others begin a pretoken whatever comes next: see `borders.py`.
    while name is not None and (end := text.rfind(" ", start + 1, end)) > 0:
        if not text[end - 1].isspace():
            return split_text(text[start:end], pattern), end
    return [], start
