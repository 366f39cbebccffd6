"""Where to cut text for a tokenizer that Hugging Face's library runs, so that the parts give the ids of the whole.

SentencePiece's BPE has no pretokens: merges cross spaces and sentences. But in the vocabularies of Llama 2, Mistral and
Gemma, no token continues after a newline, so no merge crosses the boundary between a newline and another character. This
module checks that property for each vocabulary, and excludes everything else that could cross the boundary. If the check
passes, text is cut between lines; otherwise only before special tokens.
"""

from typing import Any

from ...errors import UserError
from ..text.borders import LINES
from .pre_tokenizers import pattern_of

_ALL_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
# Steps that insert "▁" before a text or after an added token.
_PREFIXING = ("Prepend", "Metaspace")


def cutting_pattern(document: dict[str, Any]) -> str:
    """Return a pattern whose pretokens no token crosses, as `iter_blocks` takes it, or "" if none is known."""
    if document.get("decoder", {}).get("type") != "ByteLevel":
        return LINES if _ends_at_lines(document) else ""
    try:
        # NFC does not change spaces and newlines, and text is cut next to those.
        return pattern_of(document.get("pre_tokenizer")) if _kinds(document.get("normalizer")) <= {"NFC"} else ""
    except UserError:
        return ""


def _ends_at_lines(document: dict[str, Any]) -> bool:
    """Return whether cutting between a newline and a character that is not white space preserves the ids."""
    model, added = document["model"], [token["content"] for token in document.get("added_tokens") or ()]
    steps = _kinds(document.get("normalizer")) | _kinds(document.get("pre_tokenizer"))
    if model.get("type") != "BPE" or not steps <= {*_PREFIXING, "Replace ' '", "Split ' '"}:
        return False
    if any(model.get(name) for name in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")):
        return False
    # Without byte fallback, consecutive characters without a token merge into one unknown token.
    if not model.get("byte_fallback") or not model["vocab"].keys() >= _ALL_BYTES:
        return False
    # A "▁" may be inserted after an added token; a part that begins there lacks it.
    if any("\n" in token for token in added) and not steps.isdisjoint(_PREFIXING):
        return False
    return not any("\n" in token.rstrip("\n") for token in (*model["vocab"], *added))


def _kinds(step: Any) -> set[str]:
    """Return the types of a step and of its nested steps; a Replace or Split includes its text."""
    if not isinstance(step, dict):
        return set()
    parts = step.get("normalizers") or step.get("pretokenizers")
    if parts:
        return {kind for part in parts for kind in _kinds(part)}
    pattern = step.get("pattern")
    if isinstance(pattern, dict):
        return {f"{step.get('type')} {pattern.get('String', pattern)!r}"}
    return {str(step.get("type"))}
