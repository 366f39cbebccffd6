"""Encode text to ids and decode ids to text, with a given vocabulary and its merges."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..errors import UserError
from .compiled.jit import check_array
from .encoding.decoder import StreamDecoder, decode_bytes, decode_text, leave_out, token_table
from .encoding.encoder import NO_ID, token_dtype, whole_tokens
from .encoding.lazy_encoder import LazyEncoder
from .encoding.special_tokens import Specials, SpecialTokens, frozen_choice
from .formats import TokenizerData, fingerprint, load_tokenizer, read_gpt2_files, save_tokenizer
from .text.block_borders import borders_of
from .text.borders import last_border
from .text.patterns import END_OF_TEXT, check_special_tokens, pattern_name, resolve_pattern
from .text.sources import Block
from .text.utf8 import encode_utf8, repair_utf8
from .vocabulary import ids_of_tokens, list_of_merges, sorted_vocab
from .workers import choose_workers, map_in_threads

# Bytes that `encode_iterable` collects before it encodes them.
_BLOCK_BYTES = 1 << 14
# Bytes of a batch that a thread encodes at a time.
_GROUP_BYTES = 1 << 20
# UTF-8 never contains this byte, so no special token spans it.
_SEPARATOR = b"\xff"


class TokenBatch(NamedTuple):
    """The ids of several texts, concatenated: text i has `ids[offsets[i]:offsets[i + 1]]`.

    `ids` is uint16 or uint32, `offsets` int64 of shape (texts + 1,).
    """

    ids: np.ndarray
    offsets: np.ndarray


class Tokenizer:
    """A byte-level BPE tokenizer.

    `vocab` maps ids to tokens, in any order and possibly with gaps. `merges` lists pairs of tokens in the order they apply.
    Special tokens that the vocabulary lacks get the ids after its largest one. `pattern` splits text into pretokens: "gpt2",
    "cl100k", ... (`PATTERNS` in text/patterns.py lists all) or a regular expression. With `ignore_merges`, a pretoken that is
    a token becomes that token, whatever its merges produce. Inconsistent arguments raise a `UserError`.

    Special tokens. All encoding methods recognize the `special_tokens` in text; of several at one place, the longest. CS336
    defines it so; tiktoken refuses them by default. For untrusted text, `allowed_special` names the tokens that the text may
    hold (`()` for none). Any other special token in the text raises a `UserError`, unless `disallowed_special` lists the
    refused ones and omits it: then it is encoded as ordinary text. `disallowed_special` overrides `allowed_special`. Decoding
    can skip special tokens, except `plain_tokens`, such as Qwen3's `<think>`.

    Encoding takes linear time for the named patterns; a regular expression may take any time on some texts.

    A tokenizer is thread-safe. Plain Python encodes the first megabytes; for more text, loops are compiled, which takes some
    seconds, once per machine.
    """

    def __init__(
        self,
        vocab: Mapping[int, bytes],
        merges: Iterable[tuple[bytes, bytes]],
        special_tokens: Sequence[str] | None = None,
        pattern: str = "gpt2",
        *,
        ignore_merges: bool = False,
        plain_tokens: Collection[str] = (),
    ):
        names = check_special_tokens(special_tokens or ())
        self.vocab = sorted_vocab(vocab)
        self.merges = list_of_merges(merges)
        self.pattern = pattern_name(pattern) or resolve_pattern(pattern)
        ids = ids_of_tokens(self.vocab)
        next_id = max(self.vocab) + 1
        for name in names:
            if name.encode() not in ids:
                ids[name.encode()] = next_id
                self.vocab[next_id] = name.encode()
                next_id += 1
        self.special_tokens = {name: ids[name.encode()] for name in names}
        self.plain_tokens = frozenset(plain_tokens)
        self._tokens = token_table(self.vocab)
        self.ignore_merges = ignore_merges
        self._specials = SpecialTokens(self.special_tokens)
        whole = whole_tokens(ids, set(self.special_tokens.values())) if ignore_merges else {}
        self._encoder = LazyEncoder(self.merges, ids, self._tokens, self.pattern, whole, self._specials.finder.beginnings)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        pattern: str | None = None,
        special_tokens: Mapping[str, int] | Sequence[str] = (),
        ignore_template: bool = False,
    ) -> "Tokenizer":
        """Read Tilewright's format, Hugging Face's tokenizer.json, tiktoken's ranks, or a folder with GPT-2's files.

        For the arguments see `load_tokenizer`. A missing, unsupported, truncated or modified file raises a `UserError`.
        """
        with _prefixed_errors(path):
            return cls.of(load_tokenizer(path, pattern, special_tokens, ignore_template=ignore_template))

    @classmethod
    def of(cls, data: TokenizerData) -> "Tokenizer":
        """Return the tokenizer that the data define."""
        specials = tuple(data.special_tokens)
        options: dict[str, Any] = {"ignore_merges": data.ignore_merges, "plain_tokens": data.plain_tokens}
        return cls(data.vocab, data.merges, specials, data.pattern, **options)

    @classmethod
    def from_files(
        cls, vocab_path: Path | str, merges_path: Path | str, special_tokens: Sequence[str] | None = None
    ) -> "Tokenizer":
        """Read GPT-2's vocab.json and merges.txt; missing or malformed files raise a `UserError`."""
        vocab, merges = read_gpt2_files(vocab_path, merges_path, special_tokens or ())
        with _prefixed_errors(f"{vocab_path} and {merges_path}"):
            return cls(vocab, merges, special_tokens)

    def save(self, path: Path | str) -> None:
        """Write the tokenizer to `path`, atomically; equal tokenizers give identical files."""
        save_tokenizer(path, self.data)

    @property
    def data(self) -> TokenizerData:
        """The definition of the tokenizer, as `formats` reads and writes it."""
        options: dict[str, Any] = {"ignore_merges": self.ignore_merges, "plain_tokens": self.plain_tokens}
        return TokenizerData(self.vocab, self.merges, self.special_tokens, self.pattern, **options)

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
        """The sha256, in hex, of everything that determines the ids of a text."""
        return fingerprint(self.data)

    def encode(self, text: str, *, allowed_special: Specials = "all", disallowed_special: Specials = "all") -> list[int]:
        """Return the ids of a text; for special tokens see `Tokenizer`."""
        data = encode_utf8(text)
        if allowed_special == "all" == disallowed_special and (ids := self._encoder.try_encode_to_list(data)) is not None:
            return ids
        borders = self._specials.borders_in(_as_array(data), allowed_special, disallowed_special)
        return self._encoder.encode_to_list(data, *borders)

    def encode_array(self, text: str, *, allowed_special: Specials = "all", disallowed_special: Specials = "all") -> np.ndarray:
        """Return the ids of a text as an array of shape (n,) and dtype `token_dtype(vocab_size)`: several times faster."""
        data = encode_utf8(text)
        if allowed_special == "all" == disallowed_special and (ids := self._encoder.try_encode(data)) is not None:
            return ids
        borders = self._specials.borders_in(_as_array(data), allowed_special, disallowed_special)
        return self._encoder.encode(data, *borders)

    def encode_bytes(self, data: bytes | bytearray | memoryview | np.ndarray) -> np.ndarray:
        """Return the ids of UTF-8 text, bytes or uint8 of shape (n,), as an array; invalid UTF-8 becomes U+FFFD."""
        if isinstance(data, np.ndarray):
            check_array(data, np.uint8, "a text")
        # Copy unless the data is immutable: data checked as valid must not change later.
        data = repair_utf8(_as_array(bytes(data)))
        borders = self._specials.finder.find(data)
        return self._encoder.encode(data, borders, self._specials.ids_of(data, borders))

    def encode_block(self, block: Block) -> np.ndarray:
        """Return the ids of the documents of a block, concatenated; invalid UTF-8 becomes U+FFFD."""
        data, borders = borders_of(block, self._specials.finder)
        return self._encoder.encode(data, borders, self._specials.ids_of(data, borders))

    def encode_batch(
        self,
        texts: Iterable[str],
        num_workers: int | None = None,
        *,
        allowed_special: Specials = "all",
        disallowed_special: Specials = "all",
    ) -> TokenBatch:
        """Return the ids of several texts in one array, with the offset of each: faster than one call per text.

        `num_workers` threads encode them (None: one per core, or one for little text).
        """
        if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
            raise TypeError(f"texts is {texts!r:.60}: expected an iterable of strings")
        allowed_special = frozen_choice("allowed_special", allowed_special)
        disallowed_special = frozen_choice("disallowed_special", disallowed_special)
        self._specials.choice(allowed_special, disallowed_special)
        texts = texts if isinstance(texts, list | tuple) else list(texts)
        # A wrong type may have no length; encoding it raises the error.
        size = sum(len(text) for text in texts if isinstance(text, str))
        if size >= _GROUP_BYTES:
            self.expect(size)
        encode = partial(self._encode_group, allowed=allowed_special, disallowed=disallowed_special)
        groups = _group_texts(map(encode_utf8, texts))
        batches = [batch for _, batch in map_in_threads(encode, groups, choose_workers(num_workers, size))]
        if len(batches) == 1:
            return batches[0]
        begins = np.cumsum([0, *(len(batch.ids) for batch in batches)])
        offsets = [batch.offsets[1:] + begin for batch, begin in zip(batches, begins, strict=False)]
        ids = [np.empty(0, token_dtype(self.vocab_size)), *(batch.ids for batch in batches)]
        return TokenBatch(np.concatenate(ids), np.concatenate([np.zeros(1, np.int64), *offsets]))

    def _encode_group(self, parts: list[bytes], allowed: Specials, disallowed: Specials) -> TokenBatch:
        data = _as_array(_SEPARATOR.join([*parts, b""]))
        borders, ids = self._specials.borders_in(data, allowed, disallowed)
        ends = np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)) + 1)
        order = np.argsort(np.concatenate((borders[::2], ends - 1)), kind="stable")
        borders = np.concatenate((borders.reshape(-1, 2), np.stack((ends - 1, ends), axis=1)))[order].reshape(-1)
        ids = np.concatenate((ids, np.full(len(parts), NO_ID, np.uint32)))[order]
        encoded, cuts = self._encoder.encode_with_cuts(data, borders, ids)
        return TokenBatch(encoded, np.concatenate((np.zeros(1, np.int64), cuts[ids == NO_ID])))

    def encode_with_offsets(
        self,
        text: str,
        unit: Literal["bytes", "characters"] = "bytes",
        *,
        allowed_special: Specials = "all",
        disallowed_special: Specials = "all",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a text and the start and end of each token in it, int64 of shape (n, 2).

        In characters, a token that holds part of a character covers the whole character, so adjacent tokens may overlap.
        """
        if unit not in ("bytes", "characters"):
            raise UserError(f"unit is {unit!r}: expected bytes or characters")
        ids = self.encode_array(text, allowed_special=allowed_special, disallowed_special=disallowed_special)
        ends = np.cumsum(self._tokens.sizes[ids])
        offsets = np.stack((ends - self._tokens.sizes[ids], ends), axis=1)
        if unit == "characters":
            # Entry b is the number of characters that begin before byte b.
            begun = np.concatenate((np.zeros(1, np.int64), np.cumsum(_as_array(encode_utf8(text)) & 0xC0 != 0x80)))
            offsets[:, 0] = begun[offsets[:, 0] + 1] - 1
            offsets[:, 1] = begun[offsets[:, 1]]
        return ids, offsets

    def encode_iterable(
        self, iterable: Iterable[str], *, allowed_special: Specials = "all", disallowed_special: Specials = "all"
    ) -> Iterator[int]:
        """Yield the ids of the concatenated pieces, in bounded memory.

        The boundaries of the pieces do not affect the ids, even inside a pretoken or a special token. Memory: a few times the
        longest stretch without a space or newline; for a pattern that is not in `PATTERNS`, the longest stretch without a
        special token.
        """
        allowed_special = frozen_choice("allowed_special", allowed_special)
        disallowed_special = frozen_choice("disallowed_special", disallowed_special)
        allowed, refused = self._specials.choice(allowed_special, disallowed_special)
        specials = tuple(name.encode() for name in (*allowed, *refused))
        held, enough = bytearray(), _BLOCK_BYTES
        for piece in iterable:
            for start in range(0, len(piece), _BLOCK_BYTES):
                held += encode_utf8(piece[start : start + _BLOCK_BYTES])
                if len(held) < enough:
                    continue
                if border := last_border(held, specials, self.pattern):
                    text = held[:border].decode()
                    del held[:border]
                    yield from self.encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special)
                # The rest is scanned again together with new text; doubling keeps the total work linear.
                enough = max(_BLOCK_BYTES, 2 * len(held))
        yield from self.encode(held.decode(), allowed_special=allowed_special, disallowed_special=disallowed_special)

    def expect(self, num_bytes: int) -> None:
        """Prepare for texts of `num_bytes` bytes in total: compile now what they need."""
        self._encoder.encoder_for(num_bytes)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the tokens; an unknown id raises a `UserError`."""
        return decode_bytes(self._tokens, ids)

    def decode(self, ids: Iterable[int], errors: str = "replace", *, skip_special_tokens: bool = False) -> str:
        """Return the text of the tokens, optionally without special tokens; an unknown id raises a `UserError`.

        `errors` selects the treatment of invalid UTF-8, as in `bytes.decode`; by default it becomes U+FFFD.
        """
        return decode_text(self._tokens, leave_out(ids, self._skipped(skip_special_tokens)), errors)

    def decode_batch(
        self, batch: Iterable[Iterable[int]], errors: str = "replace", *, skip_special_tokens: bool = False
    ) -> list[str]:
        """Return the text of each sequence of ids."""
        return [self.decode(ids, errors, skip_special_tokens=skip_special_tokens) for ids in batch]

    def stream_decoder(self, errors: str = "replace", *, skip_special_tokens: bool = False) -> StreamDecoder:
        """Return a decoder for ids that arrive one by one."""
        return StreamDecoder(self._tokens, errors, self._skipped(skip_special_tokens))

    def _skipped(self, skip_special_tokens: bool) -> tuple[int, ...]:
        if not skip_special_tokens:
            return ()
        return tuple(id for name, id in self.special_tokens.items() if name not in self.plain_tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes build their own caches.
        return type(self).of, (self.data,)


@contextmanager
def _prefixed_errors(path: Path | str) -> Iterator[None]:
    """Prefix a `UserError` with the path, unless its message contains it."""
    try:
        yield
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None


def _group_texts(parts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Yield the texts, in order, in groups of at least `_GROUP_BYTES` bytes."""
    group: list[bytes] = []
    size = 0
    for part in parts:
        group.append(part)
        size += len(part)
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _as_array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)
