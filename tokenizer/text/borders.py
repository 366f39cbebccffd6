"""Where text can be cut so that its parts, tokenized apart, give what the whole gives.

These places are safe: neither a pretoken nor a special token crosses them, what comes before does not depend on what follows,
and no pattern looks behind.

    where a special token begins                                 every pattern
    before a blank or newline that follows something visible     gpt2: white space only begins pretokens or fills them
    before a blank that follows something visible                the others with a name: the same, but newlines end pretokens
    after a newline that something visible follows               these, too, as they let newlines end a run of white space;
                                                                 and LINES
"""

from .patterns import pattern_name

# Lines with the newlines that end them, for tokenizers without pretokens of whose tokens none goes on behind a newline.
LINES = r"[^\n]*\n+|[^\n]+"

_BLANKS = b" \t\n\v\f\r"
# Enough to hold any character, and so to tell what stands before and behind a place.
_CHARACTER = 4
_WINDOW = 1 << 12


def last_border(
    data: bytes | bytearray, special_tokens: tuple[bytes, ...], pattern: str = "gpt2", end: int | None = None
) -> int:
    """Return a late place where `data[:end]`, the beginning of a longer text, can be cut, or 0 where there is none.

    It lies in the second half if any such place does.
    """
    # Behind this a character or a special token may go on in what is not here yet.
    known = max(0, (len(data) if end is None else end) - max(map(len, special_tokens), default=0) - _CHARACTER)
    name = LINES if pattern == LINES else pattern_name(pattern)
    border = _last_blank(data, known, name, special_tokens) if name else 0
    if border > len(data) // 2:
        # There may be a thousand special tokens, and most of them nowhere.
        return border
    return max([border, *(_last_special(data, token, special_tokens, known) for token in special_tokens)])


def _last_blank(data: bytes | bytearray, end: int, name: str, special_tokens: tuple[bytes, ...]) -> int:
    blank, newline = data.rfind(b" ", 0, end), data.rfind(b"\n", 0, end)
    while (last := max(blank, newline)) > 0:
        before = _begin_of_blanks(data, last + 1)
        for place in (last + 1, before):
            if place and _separates(data, place, name) and not _crosses(data, place, special_tokens):
                return place
        # Each is looked for again only once it is passed, so that all searches together read the text once.
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
    # Within these bounds a token can only lie across the place: part of it on either side.
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
    # Not every character that is white space to Python is so to the patterns, but the other way round.
    if behind == " " or (behind == "\n" and name == "gpt2"):
        return bool(before) and not before.isspace()
    # o200k and tekken let slashes follow the newlines of a pretoken.
    return before == "\n" and name != "gpt2" and not behind.isspace() and behind != "/"
