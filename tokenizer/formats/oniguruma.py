"""Regular expressions that Oniguruma, the engine of Hugging Face's tokenizers, reads as `regex` does.

Everything that is not known to mean the same in both is refused. Two engines know two versions of Unicode: what one of them
does not know yet, characters of the last years, may still be split otherwise.
"""

import re
from re import _parser  # pyright: ignore[reportAttributeAccessIssue]

from ...errors import UserError

_CATEGORIES = "L Lu Ll Lt Lm Lo M Mn Mc Me N Nd Nl No P Pc Pd Ps Pe Pi Pf Po S Sm Sc Sk So Z Zs Zl Zp Cc Cf Co"
_SCRIPTS = "Arabic Cyrillic Devanagari Greek Han Hangul Hebrew Hiragana Katakana Latin Thai"
_PROPERTIES = "|".join(f"{_CATEGORIES} {_SCRIPTS}".split())
_SETS = rf"\\[pP]\{{(?:{_PROPERTIES})\}}|\\[sSd]"
_CHARACTERS = r"\\[tnrfva]|\\x[0-7][0-9a-fA-F]|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{4}|\\[!-/:-@\[-`{-~ ]"
_REPEATED = r"(?:[*+?][+?]?|\{\d+\}|\{\d+,\d*\}\??)(?![*+?{])"
# Where case does not count, an i is dotless or not, and two letters may be one: ss, ff, fi, fl, st.
_ANY_CASE = r"\(\?i:(?!(?i:[^)]*(?:ss|ff|fi|fl|st)))(?:[A-HJ-Za-hj-z'|]|\[[A-HJ-Za-hj-z]+\])*\)"
_PART = re.compile(
    rf"{_SETS}|{_CHARACTERS}|\\A|{_ANY_CASE}|\((?:\?(?:[:=!>]|<[=!])|(?!\?))|[)|.]|[^\\^$|?*+()\[{{.]+?|(?<=.){_REPEATED}",
    re.DOTALL,
)
_ONE = rf"{_CHARACTERS}|[^\\\]\[&-]"
_MEMBER = re.compile(rf"(?:{_SETS})(?!-[^\]])|(?:{_ONE})-(?:{_ONE})|(?:{_ONE})(?!-[^\]])|&(?!&)|(?<=[\[^])-|-(?=\])", re.DOTALL)
# Enough of what is not known to find it in the pattern.
_SHOWN = re.compile(r"\\[pPN]\{[^}]*\}|\\.|\(\?[^)]{0,20}\)?|\{[^}]*\}[+?]?|&&|[*+?]{2,}|\[:|.", re.DOTALL)


def check_pattern(pattern: str) -> str:
    """Return a pattern that both engines read alike; one that they may not raises a `UserError` that names the construct."""
    return _translated(pattern, nested=False)


def from_oniguruma(pattern: str) -> str:
    """Return how `regex` writes a pattern of Oniguruma; one that it may not know raises a `UserError`.

    Sets within a set, which `regex` reads as characters, become members of the one around them.
    """
    return _translated(pattern, nested=True)


def _translated(pattern: str, nested: bool) -> str:
    parts: list[str] = []
    # The same with a letter for each set, as Python's own engine knows it.
    shape: list[str] = []
    place = 0
    while place < len(pattern):
        if pattern[place] == "[":
            members, place = _members(pattern, place, nested)
            parts.append(f"[{members}]")
            shape.append("x")
            continue
        found = _PART.match(pattern, place)
        if found is None:
            raise _unknown(pattern, place)
        parts.append(found.group())
        shape.append(re.sub(_SETS, "x", found.group()))
        place = found.end()
    if _may_match_nothing("".join(shape)):
        raise UserError(f"pattern {pattern!r} can match nothing, and then Hugging Face's engine goes on at another place")
    return "".join(parts)


def _may_match_nothing(pattern: str) -> bool:
    try:
        return _parser.parse(pattern).getwidth()[0] == 0
    except re.error:
        return True


def _members(pattern: str, start: int, nested: bool, depth: int = 0) -> tuple[str, int]:
    """Return the members of the set that begins at `start`, and where it ends; there may be sets in it if they are `nested`."""
    members: list[str] = []
    place = start + 1
    if pattern.startswith("^", place):
        # What a set within a set excludes is no member of the other.
        if depth:
            raise _unknown(pattern, start)
        members.append("^")
        place += 1
    first = place
    while not pattern.startswith("]", place) or place == first:
        if nested and pattern.startswith("[", place) and not pattern.startswith("[:", place):
            inner, place = _members(pattern, place, nested, depth + 1)
            members.append(inner)
            continue
        found = _MEMBER.match(pattern, place)
        if found is None:
            raise _unknown(pattern, place)
        member = found.group()
        # Where it comes to stand, a hyphen could begin a range.
        members.append("\\-" if depth and member == "-" else member)
        place = found.end()
    return "".join(members), place + 1


def _unknown(pattern: str, place: int) -> UserError:
    found = _SHOWN.match(pattern, place)
    construct = found.group() if found else pattern[place:]
    return UserError(
        f"pattern {pattern!r} holds {construct!r} at {place}, which may mean something else in Hugging Face's engine"
    )
