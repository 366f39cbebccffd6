"""Where text may be cut for a tokenizer that Hugging Face's library runs, so that the parts give what the whole gives.

SentencePiece's BPE has no pretokens: merges go over blanks and whole sentences. But in the vocabularies of Llama 2, Mistral and
Gemma no token goes on behind a newline, so that no merge crosses the place between a newline and what is none. That is read off
the vocabulary, and whatever else could reach over that place is excluded; then text is cut between lines. Where it cannot be
shown, text is cut before special tokens only.
"""

from typing import Any

from ...errors import UserError
from ..text.borders import LINES
from .pre_tokenizers import pattern_of

_ALL_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
# Steps that put "▁" before a text, or before what follows an added token.
_PREFIXING = ("Prepend", "Metaspace")


def cutting_pattern(document: dict[str, Any]) -> str:
    """Return the pattern whose pretokens no token crosses, as `iter_blocks` takes it; "" where none is known."""
    if document.get("decoder", {}).get("type") != "ByteLevel":
        return LINES if _ends_at_lines(document) else ""
    try:
        # NFC makes nothing of a blank or a newline, in front of which and behind which text is cut.
        return pattern_of(document.get("pre_tokenizer")) if _kinds(document.get("normalizer")) <= {"NFC"} else ""
    except UserError:
        return ""


def _ends_at_lines(document: dict[str, Any]) -> bool:
    """Return whether text cut between a newline and a character that is not white space gives the ids of the whole."""
    model, added = document["model"], [token["content"] for token in document.get("added_tokens") or ()]
    steps = _kinds(document.get("normalizer")) | _kinds(document.get("pre_tokenizer"))
    if model.get("type") != "BPE" or not steps <= {*_PREFIXING, "Replace ' '", "Split ' '"}:
        return False
    if any(model.get(name) for name in ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")):
        return False
    # Characters without a token, where they do not become bytes, become one unknown together.
    if not model.get("byte_fallback") or not model["vocab"].keys() >= _ALL_BYTES:
        return False
    # Behind an added token a "▁" may be put, which a part that begins there lacks.
    if any("\n" in token for token in added) and not steps.isdisjoint(_PREFIXING):
        return False
    return not any("\n" in token.rstrip("\n") for token in (*model["vocab"], *added))


def _kinds(step: Any) -> set[str]:
    """Return the types of a step and of those in it, with the text that is replaced or split at."""
    if not isinstance(step, dict):
        return set()
    parts = step.get("normalizers") or step.get("pretokenizers")
    if parts:
        return {kind for part in parts for kind in _kinds(part)}
    pattern = step.get("pattern")
    if isinstance(pattern, dict):
        return {f"{step.get('type')} {pattern.get('String', pattern)!r}"}
    return {str(step.get("type"))}
