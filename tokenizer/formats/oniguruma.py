"""Regular expressions that Oniguruma, the engine of Hugging Face's tokenizers, reads as `regex` does.

Any construct without a known equal meaning in both engines is refused. The engines may still classify characters that were
added to Unicode in recent years differently, because their versions of Unicode differ.
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
# Ignoring case, Oniguruma treats i with and without dot alike, and some pairs of letters as one: ss, ff, fi, fl, st.
_ANY_CASE = r"\(\?i:(?!(?i:[^)]*(?:ss|ff|fi|fl|st)))(?:[A-HJ-Za-hj-z'|]|\[[A-HJ-Za-hj-z]+\])*\)"
_PART = re.compile(
    rf"{_SETS}|{_CHARACTERS}|\\A|{_ANY_CASE}|\((?:\?(?:[:=!>]|<[=!])|(?!\?))|[)|.]|[^\\^$|?*+()\[{{.]+?|(?<=.){_REPEATED}",
    re.DOTALL,
)
_ONE = rf"{_CHARACTERS}|[^\\\]\[&-]"
_MEMBER = re.compile(rf"(?:{_SETS})(?!-[^\]])|(?:{_ONE})-(?:{_ONE})|(?:{_ONE})(?!-[^\]])|&(?!&)|(?<=[\[^])-|-(?=\])", re.DOTALL)
# The extent of an unknown construct, for the error message.
_SHOWN = re.compile(r"\\[pPN]\{[^}]*\}|\\.|\(\?[^)]{0,20}\)?|\{[^}]*\}[+?]?|&&|[*+?]{2,}|\[:|.", re.DOTALL)


def check_pattern(pattern: str) -> str:
    """Return a pattern that both engines read alike; an unknown construct raises a `UserError` that names it."""
    return _translate(pattern, nested=False)


def from_oniguruma(pattern: str) -> str:
    """Translate a pattern of Oniguruma to `regex`; an unknown construct raises a `UserError`.

    Nested sets, which `regex` reads as characters, are flattened into the enclosing set.
    """
    return _translate(pattern, nested=True)


def _translate(pattern: str, nested: bool) -> str:
    parts: list[str] = []
    # The pattern with a letter for each set, so that Python's `re` can parse it.
    shape: list[str] = []
    place = 0
    while place < len(pattern):
        if pattern[place] == "[":
            members, place = _translate_set(pattern, place, nested)
            parts.append(f"[{members}]")
            shape.append("x")
            continue
        found = _PART.match(pattern, place)
        if found is None:
            raise _unknown(pattern, place)
        parts.append(found.group())
        shape.append(re.sub(_SETS, "x", found.group()))
        place = found.end()
    if _may_match_empty("".join(shape)):
        raise UserError(f"pattern {pattern!r} can match the empty string: Hugging Face's engine then continues elsewhere")
    return "".join(parts)


def _may_match_empty(pattern: str) -> bool:
    try:
        return _parser.parse(pattern).getwidth()[0] == 0
    except re.error:
        return True


def _translate_set(pattern: str, start: int, nested: bool, depth: int = 0) -> tuple[str, int]:
    """Return the members of the set at `start` and the place after it; nested sets are allowed if `nested`."""
    members: list[str] = []
    place = start + 1
    if pattern.startswith("^", place):
        # A negated nested set cannot be flattened.
        if depth:
            raise _unknown(pattern, start)
        members.append("^")
        place += 1
    first = place
    while not pattern.startswith("]", place) or place == first:
        if nested and pattern.startswith("[", place) and not pattern.startswith("[:", place):
            inner, place = _translate_set(pattern, place, nested, depth + 1)
            members.append(inner)
            continue
        found = _MEMBER.match(pattern, place)
        if found is None:
            raise _unknown(pattern, place)
        member = found.group()
        # In the enclosing set, a hyphen could form a range.
        members.append("\\-" if depth and member == "-" else member)
        place = found.end()
    return "".join(members), place + 1


def _unknown(pattern: str, place: int) -> UserError:
    found = _SHOWN.match(pattern, place)
    construct = found.group() if found else pattern[place:]
    return UserError(
        f"pattern {pattern!r} has {construct!r} at {place}, which may have another meaning in Hugging Face's engine"
    )
