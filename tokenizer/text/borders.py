"""Where to cut text so that its parts, tokenized separately, give the tokens of the whole.

A place is safe if no pretoken or special token crosses it, and if the text after it does not affect the tokens before it. No
pattern looks behind. The safe places are:

    where a special token begins                                 every pattern
    before a space or newline after a visible character          gpt2: white space only starts or fills a pretoken
    before a space after a visible character                     the other named patterns, in which newlines can end a pretoken
    between a newline and a visible character                    the same patterns, because a newline ends a run of white
                                                                 space; and LINES
"""

from .patterns import pattern_name

# Lines with the newlines that end them, for tokenizers without pretokens in which no token continues after a newline.
LINES = r"[^\n]*\n+|[^\n]+"

_BLANKS = b" \t\n\v\f\r"
# Bytes that are enough to decode one character on either side of a place.
_CHARACTER = 4
_WINDOW = 1 << 12


def last_border(
    data: bytes | bytearray, special_tokens: tuple[bytes, ...], pattern: str = "gpt2", end: int | None = None
) -> int:
    """Return a late place where `data[:end]`, the start of a longer text, can be cut, or 0 if there is none.

    The place is in the second half if any such place is.
    """
    # After this place, a character or a special token may continue in text that is not available yet.
    known = max(0, (len(data) if end is None else end) - max(map(len, special_tokens), default=0) - _CHARACTER)
    name = LINES if pattern == LINES else pattern_name(pattern)
    border = _last_blank(data, known, name, special_tokens) if name else 0
    if border > len(data) // 2:
        # Skip the search for special tokens, of which there may be a thousand.
        return border
    return max([border, *(_last_special(data, token, special_tokens, known) for token in special_tokens)])


def _last_blank(data: bytes | bytearray, end: int, name: str, special_tokens: tuple[bytes, ...]) -> int:
    blank, newline = data.rfind(b" ", 0, end), data.rfind(b"\n", 0, end)
    while (last := max(blank, newline)) > 0:
        before = _begin_of_blanks(data, last + 1)
        for place in (last + 1, before):
            if place and _separates(data, place, name) and not _crosses(data, place, special_tokens):
                return place
        # Search again only for the passed one, so that all searches together scan the text once.
        if blank >= before:
            blank = data.rfind(b" ", 0, before)
        if newline >= before:
            newline = data.rfind(b"\n", 0, before)
    return 0


def _last_special(data: bytes | bytearray, token: bytes, special_tokens: tuple[bytes, ...], known: int) -> int:
    end = known + len(token)
    while (place := data.rfind(token, 0, end)) > 0:
        if not _crosses(data, place, special_tokens):
            return place
        end = place + len(token) - 1
    return 0


def _crosses(data: bytes | bytearray, place: int, special_tokens: tuple[bytes, ...]) -> bool:
    # Within these bounds, a match must span the place.
    return any(data.find(token, max(0, place - len(token) + 1), place + len(token) - 1) >= 0 for token in special_tokens)


def _begin_of_blanks(data: bytes | bytearray, end: int) -> int:
    while end > 0:
        window = data[max(0, end - _WINDOW) : end]
        kept = len(window.rstrip(_BLANKS))
        end -= len(window) - kept
        if kept:
            break
    return end


def _separates(data: bytes | bytearray, place: int, name: str) -> bool:
    before = data[max(0, place - _CHARACTER) : place].decode(errors="replace")[-1:]
    behind = data[place : place + _CHARACTER].decode(errors="replace")[:1]
    if name == LINES:
        return before == "\n" and not behind.isspace()
    # Every white-space character of the patterns is one to Python, but not conversely.
    if behind == " " or (behind == "\n" and name == "gpt2"):
        return bool(before) and not before.isspace()
    # In o200k and tekken, slashes may follow the newlines of a pretoken.
    return before == "\n" and name != "gpt2" and not behind.isspace() and behind != "/"
