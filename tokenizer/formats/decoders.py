"""The `decoder` of Hugging Face's `tokenizer.json`: the bytes of text for each token.

Two kinds are supported. Byte-level: tokens are written in GPT-2's alphabet. SentencePiece: "▁" encodes a space and `<0x0A>` a
byte; decoding removes the space that encoding inserts before every text.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UserError
from .tokenizer_data import entry, from_printable

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLANK_REPLACED = ("Replace", "▁", " ")
_STRIPPED = ("Strip", " ", 1, 0)
_SENTENCEPIECE = (_BLANK_REPLACED, ("ByteFallback",), ("Fuse",))


class TokenDecoder(NamedTuple):
    """The conversion of a token to bytes, and whether decoding strips a leading space from a text."""

    to_bytes: Callable[[str], bytes]
    strips_blank: bool = False


def decoder_of(document: dict[str, Any], path: Path | str) -> TokenDecoder:
    """Return the decoder of a `tokenizer.json`; an unsupported kind raises a `UserError`."""
    decoder = document.get("decoder")
    steps = tuple(_read(step) for step in _steps(decoder))
    if steps == (("ByteLevel",),):
        return TokenDecoder(_from_alphabet)
    if steps in (_SENTENCEPIECE, (*_SENTENCEPIECE, _STRIPPED)):
        return TokenDecoder(_from_sentencepiece, strips_blank=steps[-1] == _STRIPPED)
    shown = json.dumps(decoder, ensure_ascii=False)[:100]
    raise UserError(
        f"{path} has decoder {shown}: expected ByteLevel, or SentencePiece's Replace of '▁' by ' ', ByteFallback, Fuse and"
        " optional Strip of one leading space"
    )


def _steps(decoder: Any) -> list[Any]:
    if isinstance(decoder, dict) and decoder.get("type") == "Sequence":
        return [step for part in entry(decoder, "decoders", list, "decoder.") for step in _steps(part)]
    return [decoder]


def _read(step: Any) -> tuple[Any, ...]:
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "Replace":
        return kind, (entry(step, "pattern", dict, "decoder.")).get("String"), step.get("content")
    if kind == "Strip":
        return kind, step.get("content"), step.get("start"), step.get("stop")
    return (kind,)


def _from_alphabet(token: str) -> bytes:
    try:
        return from_printable(token)
    except UserError:
        # Added tokens are stored as plain text.
        return token.encode()


def _from_sentencepiece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
