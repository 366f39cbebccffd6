"""Convert between the `pre_tokenizer` of Hugging Face's `tokenizer.json` and the equivalent pattern."""

import json
from typing import Any

from ...errors import UserError
from ..text.patterns import GPT2_PATTERN, PATTERNS, pattern_name
from .oniguruma import check_pattern, from_oniguruma
from .tokenizer_data import entry

# For Oniguruma, in which `{1,3}+` is not a possessive repeat and `$` matches at the end of any line.
_SPELLINGS = {
    "cl100k": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s+\z|\s*[\r\n]|\s+(?!\S)|\s""",
}
# As published by OpenAI; equivalent to ByteLevel alone.
_GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_NAMES = {_GPT2: "gpt2", GPT2_PATTERN: "gpt2"} | {spelling: name for name, spelling in _SPELLINGS.items()}

_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
# GPT-2's pattern for text that is first split at numbers, as in StarCoder: each digit alone, or each number whole.
_DIGITS = {
    individual: rf"'(?:[sdmt]|ll|ve|re)| ?\p{{L}}+|\p{{N}}{'' if individual else '+'}| ?[^\s\p{{L}}\p{{N}}]+"
    r"|\s+(?![^\s\p{N}])|\s+"
    for individual in (True, False)
}
# Sequences of steps that are equivalent to one pattern.
_SEQUENCES = {
    "deepseek-v3": (*(("Split", part) for part in _DEEPSEEK), ("ByteLevel", False)),
    **{pattern: (("Digits", individual), ("ByteLevel", True)) for individual, pattern in _DIGITS.items()},
}

_KNOWN = "ByteLevel; a Split by a regular expression or DeepSeek V3's, then ByteLevel without one; Digits, then ByteLevel"


def pre_tokenizer_of(pattern: str) -> dict[str, Any]:
    """Return the equivalent pre-tokenizer of a pattern; a pattern without a certain one raises a `UserError`."""
    steps = _SEQUENCES.get(pattern)
    if pattern == "gpt2":
        steps = (("ByteLevel", True),)
    elif steps is None:
        steps = (("Split", _SPELLINGS.get(pattern) or check_pattern(PATTERNS.get(pattern, pattern))), ("ByteLevel", False))
    written = [_to_json(kind, value) for kind, value in steps]
    return written[0] if len(written) == 1 else {"type": "Sequence", "pretokenizers": written}


def _to_json(kind: str, value: Any) -> dict[str, Any]:
    if kind == "Split":
        return {"type": "Split", "pattern": {"Regex": value}, "behavior": "Isolated", "invert": False}
    if kind == "Digits":
        return {"type": "Digits", "individual_digits": value}
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": value}


def pattern_of(pre_tokenizer: Any) -> str:
    """Return the equivalent pattern, or its name, of a pre-tokenizer; without a known one, raise a `UserError`."""
    steps = tuple(map(_read, _steps(pre_tokenizer)))
    for pattern, known in _SEQUENCES.items():
        if steps == known:
            return pattern
    kinds = [kind for kind, _ in steps]
    if steps == (("ByteLevel", True),):
        return "gpt2"
    if kinds == ["ByteLevel"]:
        raise UserError("pre_tokenizer has use_regex false: text that is not split is not supported")
    if kinds == ["Split", "ByteLevel"]:
        if steps[1][1]:
            raise UserError("pre_tokenizer has use_regex true after a Split: splitting by two patterns is not supported")
        spelling = steps[0][1]
        return _NAMES.get(spelling) or pattern_name(spelling) or from_oniguruma(spelling)
    raise UserError(f'pre_tokenizer is "{" + ".join(kinds)}": expected {_KNOWN}')


def _steps(pre_tokenizer: Any) -> list[Any]:
    if isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "Sequence":
        return [step for part in entry(pre_tokenizer, "pretokenizers", list) for step in _steps(part)]
    return [pre_tokenizer]


def _read(step: Any) -> tuple[str, Any]:
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "ByteLevel":
        if step.get("add_prefix_space"):
            raise UserError("pre_tokenizer has add_prefix_space true: a space before every text is not supported")
        return kind, step.get("use_regex", True)
    if kind == "Digits":
        return kind, step.get("individual_digits", False)
    if kind == "Split":
        for name, value, needed in (
            ("pattern", list(entry(step, "pattern", dict, "pre_tokenizer.")), ["Regex"]),
            ("behavior", step.get("behavior"), "Isolated"),
            ("invert", bool(step.get("invert")), False),
        ):
            if value != needed:
                raise UserError(f"pre_tokenizer.{name} of a Split is {value!r}: expected {needed!r}")
        return kind, entry(step["pattern"], "Regex", str, "pre_tokenizer.pattern.")
    return next((name for name in (kind, step) if isinstance(name, str)), json.dumps(step)[:60]), None
