"""How text falls apart: at special tokens first, then into the pretokens of the GPT-2 pattern."""

import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import cache

import regex

from ..errors import UserError

END_OF_TEXT = "<|endoftext|>"

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

BLOCK_CHARS = 1 << 14

# The pattern looks at most two characters past the end of a match, to tell "'l" from "'ll".
_LOOKAHEAD = 2


@cache
def _pretoken_pattern() -> "regex.Pattern[str]":
    return regex.compile(GPT2_PATTERN)


@cache
def _special_pattern(special_tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    # An alternation takes the first branch that matches, so the longest token must come first.
    longest_first = sorted(special_tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if special_tokens else None


def check_special_tokens(special_tokens: Sequence[str]) -> tuple[str, ...]:
    """Return the special tokens as a tuple; raise a `UserError` for an empty, doubled or unencodable one."""
    if isinstance(special_tokens, str):
        raise TypeError(f"special_tokens is a sequence of strings, not the one string {special_tokens!r}")
    for index, token in enumerate(special_tokens):
        if not token:
            raise UserError(f"special token {index} is empty: it needs at least one character")
        if token in special_tokens[:index]:
            raise UserError(f"special token {token!r} is given twice")
        # U+FFFD is what undecodable bytes become: as a special token it would appear out of nothing.
        if re.search("[\ud800-\udfff\ufffd]", token):
            raise UserError(f"special token {token!r} holds a surrogate or U+FFFD: only text that UTF-8 can carry is allowed")
    return tuple(special_tokens)


def split_pretokens(
    pieces: Iterable[str], special_tokens: tuple[str, ...] = (), *, block_chars: int = BLOCK_CHARS
) -> Iterator[tuple[list[str], str | None]]:
    """Yield runs of pretokens, each with the special token that ends it, or None where the run just goes on.

    The runs are those of the joined pieces, wherever these are cut. Memory: `block_chars` characters or, where it is
    longer, a few times the longest pretoken. Where special tokens overlap, the first and then the longest one wins.
    """
    waiting: list[str] = []
    size, enough = 0, block_chars
    for piece in pieces:
        for start in range(0, len(piece), block_chars):
            block = piece[start : start + block_chars]
            waiting.append(block)
            size += len(block)
            if size >= enough:
                held = yield from _split_text("".join(waiting), special_tokens, final=False)
                # Text held back is split again with what follows it; doubling keeps the sum of that work linear.
                waiting, size, enough = [held], len(held), max(block_chars, 2 * len(held))
    yield from _split_text("".join(waiting), special_tokens, final=True)


def _split_text(
    text: str, special_tokens: tuple[str, ...], *, final: bool
) -> Generator[tuple[list[str], str | None], None, str]:
    """Split `text`; unless it is final, return the end of it that following text could still split otherwise."""
    findall = _pretoken_pattern().findall
    pattern = _special_pattern(special_tokens)
    # From here on a special token may reach into text not seen yet.
    horizon = len(text) if final else max(0, len(text) + 1 - max(map(len, special_tokens), default=1))
    start = 0
    for match in pattern.finditer(text) if pattern else ():
        if match.start() >= horizon:
            break
        yield findall(text[start : match.start()]), match.group()
        start = match.end()
    end = max(start, horizon)
    run = findall(text[start:end])
    if not final:
        # No pattern looks behind, so what is held back may start afresh at any border between pretokens.
        held = 0
        while run and held < _LOOKAHEAD:
            held += len(run.pop())
        end -= held
    yield run, None
    return text[end:]
