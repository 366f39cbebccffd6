"""Tokenizers that `Tokenizer` cannot represent, run by the library `tokenizers`: SentencePiece's BPE, normalizers and more."""

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from unicodedata import is_normalized

import numpy as np

from ..errors import UserError
from ..files import atomic_file, require_file
from .encoding.decoder import StreamDecoder, decode_bytes, decode_text, leave_out, token_table
from .encoding.encoder import token_dtype
from .encoding.special_tokens import Specials, SpecialTokens, frozen_choice
from .formats.cutting import cutting_pattern
from .formats.decoders import decoder_of
from .formats.huggingface import parse_huggingface
from .formats.tokenizer_data import MOST_IDS, digest, read_object, read_text
from .text.borders import LINES
from .text.patterns import END_OF_TEXT
from .text.sources import Block
from .text.utf8 import encode_utf8
from .tokenizer import TokenBatch, Tokenizer

# Context for a part of a text that follows a newline.
_LINE_BEFORE = "\n"


class HuggingFaceTokenizer:
    """A tokenizer.json run by the library `tokenizers`, with the methods of `Tokenizer`.

    Ids equal the library's `encode(text, add_special_tokens=False)`: templates are ignored. Decoded texts equal the library's
    `decode`, except for invalid UTF-8: only invalid bytes become U+FFFD here, while the library also replaces valid bytes
    next to them.

    `special_tokens` are the added tokens that the file marks as special. The library recognizes either all of them in a text
    or none. A text that holds both an allowed one and one to be encoded as text is therefore refused. Added tokens that are
    not special, such as Qwen3's `<think>`, are always recognized.

    If NFC normalization (Unicode Standard Annex 15) is the only step that `Tokenizer` lacks, as for Qwen, a `Tokenizer`
    encodes batches and blocks of NFC texts, many times as fast.

    `pattern` determines where text may be cut; see `formats/cutting.py`.
    """

    def __init__(self, path: Path | str):
        """Read a file; a missing, malformed or unsupported one raises a `UserError`."""
        path = require_file(path, "tokenizer file")
        document = read_object(path)
        self._json = read_text(path)
        self._library = _library(self._json, path)
        _check(document, path)
        added = self._library.get_added_tokens_decoder()
        tokens = {id: token for token, id in self._library.get_vocab(with_added_tokens=False).items()}
        tokens |= {id: token.content for id, token in added.items()}
        if not tokens or max(tokens) >= MOST_IDS:
            raise UserError(f"{path} has ids up to {max(tokens, default=None)}: expected ids up to {MOST_IDS - 1}")
        to_bytes, self._strips_blank = decoder_of(document, path)
        self.vocab = {id: to_bytes(tokens[id]) for id in sorted(tokens)}
        self._tokens = token_table(self.vocab)
        self.special_tokens = {token.content: id for id, token in sorted(added.items()) if token.special}
        self._specials = SpecialTokens(self.special_tokens)
        self.pattern = cutting_pattern(document)
        self._path = path

    def save(self, path: Path | str) -> None:
        """Write the tokenizer.json to `path` unchanged, atomically."""
        with atomic_file(path) as file:
            file.write(self._json.encode())

    @property
    def vocab_size(self) -> int:
        """The largest id plus one, special tokens included."""
        return len(self._tokens.sizes)

    @property
    def end_of_text_id(self) -> int | None:
        """The id of `<|endoftext|>`, or None if it is not a special token."""
        return self.special_tokens.get(END_OF_TEXT)

    @cached_property
    def fingerprint(self) -> str:
        """The sha256, in hex, of everything in the file that determines ids, independent of its formatting."""
        # Parse the file again instead of keeping a large document in memory: the property is read once.
        document = json.loads(self._json)
        model = document["model"]
        # Older versions write a merge as one string, newer ones as two.
        model["merges"] = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges") or ()]
        content = [document.get(name) for name in ("normalizer", "pre_tokenizer", "added_tokens", "model")]
        return digest({"tokenizers": json.dumps(content, sort_keys=True)})

    def encode(self, text: str, *, allowed_special: Specials = "all", disallowed_special: Specials = "all") -> list[int]:
        """Return the ids of a text; for special tokens see `Tokenizer`."""
        text = encode_utf8(text).decode()
        library = self._library_for(text, allowed_special, disallowed_special)
        return library.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str, *, allowed_special: Specials = "all", disallowed_special: Specials = "all") -> np.ndarray:
        """Return the ids of a text as an array of shape (n,) and dtype `token_dtype(vocab_size)`."""
        ids = self.encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special)
        return np.array(ids, token_dtype(self.vocab_size))

    def encode_with_offsets(
        self, text: str, unit: Literal["characters"] = "characters", **specials: Specials
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a text and the start and end of each token in characters, int64 of shape (n, 2).

        Tokens that share a character, such as the bytes of a rare one, all cover the whole character. For `specials` see
        `encode`.
        """
        if unit != "characters":
            raise UserError(f"unit is {unit!r}: expected characters, the only unit of the library tokenizers")
        text = encode_utf8(text).decode()
        library = self._library_for(text, specials.get("allowed_special", "all"), specials.get("disallowed_special", "all"))
        encoding = library.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return np.array(encoding.ids, token_dtype(self.vocab_size)), offsets

    def encode_batch(
        self,
        texts: Iterable[str],
        num_workers: int | None = None,
        *,
        allowed_special: Specials = "all",
        disallowed_special: Specials = "all",
    ) -> TokenBatch:
        """Return the ids of several texts in one array, with the offset of each: faster than one call per text.

        `num_workers` does not apply to the library, which starts its own threads, one per core.
        """
        if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
            raise TypeError(f"texts is {texts!r:.60}: expected an iterable of strings")
        texts = [encode_utf8(text).decode() for text in texts]
        allowed_special = frozen_choice("allowed_special", allowed_special)
        disallowed_special = frozen_choice("disallowed_special", disallowed_special)
        libraries = [self._library_for(text, allowed_special, disallowed_special) for text in texts]
        if all(library is self._library for library in libraries):
            return self._encode_all(texts, num_workers)
        return self._to_batch(
            library.encode(text, add_special_tokens=False).ids for library, text in zip(libraries, texts, strict=True)
        )

    def _encode_all(self, texts: list[str], num_workers: int | None = None) -> TokenBatch:
        if self._nfc_tokenizer and all(is_normalized("NFC", text) for text in texts):
            return self._nfc_tokenizer.encode_batch(texts, num_workers)
        # Use the batch method even for one text: only it releases the GIL.
        return self._to_batch(encoding.ids for encoding in self._library.encode_batch_fast(texts, add_special_tokens=False))

    def _to_batch(self, sequences: Iterable[list[int]]) -> TokenBatch:
        dtype = token_dtype(self.vocab_size)
        parts = [np.array(ids, dtype) for ids in sequences]
        return TokenBatch(np.concatenate([np.empty(0, dtype), *parts]), np.cumsum([0, *map(len, parts)], dtype=np.int64))

    def encode_block(self, block: Block) -> np.ndarray:
        """Return the ids of the documents of a block, concatenated; invalid UTF-8 becomes U+FFFD.

        The ids of the parts of a document that `pattern` cut, concatenated, are the ids of the document.
        """
        documents = np.split(block.data, block.ends[:-1])
        texts = [document.tobytes().decode(errors="replace") for document in documents]
        if in_lines := block.continues and self.pattern == LINES:
            texts[0] = _LINE_BEFORE + texts[0]
        ids = self._encode_all(texts, 1).ids
        return ids[len(self.encode(_LINE_BEFORE)) :] if in_lines else ids

    def expect(self, num_bytes: int) -> None:
        """Prepare for texts of `num_bytes` bytes in total: compile now what they need."""
        if self._nfc_tokenizer:
            self._nfc_tokenizer.expect(num_bytes)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the text of the tokens in UTF-8; an unknown id raises a `UserError`."""
        data = decode_bytes(self._tokens, ids)
        return data.removeprefix(b" ") if self._strips_blank else data

    def decode(self, ids: Iterable[int], errors: str = "replace", *, skip_special_tokens: bool = False) -> str:
        """Return the text of the tokens, optionally without special tokens; an unknown id raises a `UserError`.

        `errors` selects the treatment of invalid UTF-8, as in `bytes.decode`; by default it becomes U+FFFD.
        """
        text = decode_text(self._tokens, leave_out(ids, self._skipped(skip_special_tokens)), errors)
        return text.removeprefix(" ") if self._strips_blank else text

    def decode_batch(
        self, batch: Iterable[Iterable[int]], errors: str = "replace", *, skip_special_tokens: bool = False
    ) -> list[str]:
        """Return the text of each sequence of ids."""
        return [self.decode(ids, errors, skip_special_tokens=skip_special_tokens) for ids in batch]

    def stream_decoder(self, errors: str = "replace", *, skip_special_tokens: bool = False) -> StreamDecoder:
        """Return a decoder for ids that arrive one by one.

        The first space of a text may be an artifact. To continue a text exactly, decode its ids first and discard the result.
        """
        skipped = self._skipped(skip_special_tokens)
        return (_StrippedStream if self._strips_blank else StreamDecoder)(self._tokens, errors, skipped)

    def _skipped(self, skip_special_tokens: bool) -> tuple[int, ...]:
        return tuple(self.special_tokens.values()) if skip_special_tokens else ()

    def _library_for(self, text: str, allowed_special: Specials, disallowed_special: Specials) -> Any:
        """Return the library's tokenizer that recognizes all special tokens, or the one that recognizes none."""
        if allowed_special == "all" == disallowed_special:
            return self._library
        allowed, _ = self._specials.choice(allowed_special, disallowed_special)
        data = np.frombuffer(encode_utf8(text), np.uint8)
        # Raise for a refused token in the text.
        self._specials.borders_in(data, allowed_special, disallowed_special)
        places = self._specials.finder.find(data).reshape(-1, 2)
        found = {data[start:end].tobytes().decode() for start, end in places.tolist()}
        if found and not found.isdisjoint(allowed) and not found <= set(allowed):
            raise UserError(
                f"the text holds {min(found & set(allowed))!r}, which is allowed, and {min(found - set(allowed))!r}, which is"
                " not: the library tokenizers recognizes all special tokens of a text or none"
            )
        return self._library if found <= set(allowed) else self._literal

    @cached_property
    def _nfc_tokenizer(self) -> Tokenizer | None:
        # Built on first use: that takes seconds, in which the library encodes many prompts.
        document = json.loads(self._json)
        if document.get("normalizer") != {"type": "NFC"}:
            return None
        try:
            return Tokenizer.of(parse_huggingface({**document, "normalizer": None}, self._path, ignore_template=True))
        except UserError:
            return None

    @cached_property
    def _literal(self) -> Any:
        library = _library(self._json, self._path)
        library.encode_special_tokens = True
        return library


class _StrippedStream(StreamDecoder):
    """A stream that removes a space at the start of the text."""

    _begun = False

    def decode(self, ids: int | np.integer | Iterable[int]) -> str:
        return self._stripped(super().decode(ids))

    def finish(self) -> str:
        text = self._stripped(super().finish())
        self._begun = False
        return text

    def _stripped(self, text: str) -> str:
        if self._begun or not text:
            return text
        self._begun = True
        return text.removeprefix(" ")


def _library(text: str, path: Path | str) -> Any:
    """Return the library's tokenizer of a tokenizer.json."""
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"cannot read {path}: it needs the library tokenizers; pip install 'tilewright[hf]'") from None
    try:
        library = tokenizers.Tokenizer.from_str(text)
    except Exception as error:
        # The library raises no more specific type.
        reason = str(error).splitlines()[0]
        raise UserError(f"tokenizers {tokenizers.__version__} cannot read {path}: {reason}") from None
    library.no_truncation()
    library.no_padding()
    return library


def _check(document: dict[str, Any], path: Path | str) -> None:
    """Raise a `UserError` for features that make ids random or dependent on text outside a block."""
    if document["model"].get("dropout"):
        raise UserError(
            f"{path} has model.dropout {document['model']['dropout']}: expected none, because dropout makes ids random"
        )
    for token in document.get("added_tokens") or ():
        for flag in ("lstrip", "single_word"):
            if token.get(flag):
                raise UserError(f"{path} has added token {token['content']!r} with {flag} true: expected false")
