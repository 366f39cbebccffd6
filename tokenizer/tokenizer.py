"""Encode text to ids and decode ids to text, with a given vocabulary and its merges."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import UserError
from .formats import TokenizerData, fingerprint, load_tokenizer, read_gpt2_files, save_tokenizer
from .merging import merge_pretoken
from .patterns import END_OF_TEXT, check_special_tokens, split_pretokens

# Together these bound the cache to some tens of megabytes.
_CACHE_ENTRIES = 1 << 17
_CACHED_CHARS = 32


class Tokenizer:
    """A byte-level BPE with the GPT-2 pattern.

    `vocab` maps every id from 0 on to its token, in any order; `merges` lists pairs of tokens in the order they apply;
    special tokens that the vocabulary lacks are appended to it. What does not fit together raises a `UserError`.
    """

    def __init__(
        self, vocab: Mapping[int, bytes], merges: Iterable[tuple[bytes, bytes]], special_tokens: Sequence[str] | None = None
    ):
        names = check_special_tokens(special_tokens or ())
        self.vocab = _ordered(vocab)
        self.merges = [(left, right) for left, right in merges]
        ids = _ids_of_tokens(self.vocab)
        for name in names:
            if name.encode() not in ids:
                ids[name.encode()] = len(self.vocab)
                self.vocab[len(self.vocab)] = name.encode()
        self.special_tokens = {name: ids[name.encode()] for name in names}
        self._pretoken_ids = _PretokenIds(self.merges, ids)

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a file that `save` wrote; one that is missing, foreign, truncated or changed raises a `UserError`."""
        data = load_tokenizer(path)
        return cls(data.vocab, data.merges, tuple(data.special_tokens))

    @classmethod
    def from_files(
        cls, vocab_path: Path | str, merges_path: Path | str, special_tokens: Sequence[str] | None = None
    ) -> "Tokenizer":
        """Read GPT-2's vocab.json and merges.txt; files that are missing or malformed raise a `UserError`."""
        return cls(*read_gpt2_files(vocab_path, merges_path, special_tokens or ()), special_tokens)

    def save(self, path: Path | str) -> None:
        """Write the tokenizer to `path`, atomically; equal tokenizers give equal files."""
        save_tokenizer(path, self._data())

    @property
    def vocab_size(self) -> int:
        """The number of ids, special tokens included."""
        return len(self.vocab)

    @property
    def end_of_text_id(self) -> int | None:
        """The id of `<|endoftext|>`, or None where that is no special token."""
        return self.special_tokens.get(END_OF_TEXT)

    @cached_property
    def fingerprint(self) -> str:
        """The sha256, in hex, of everything that decides which ids a text gets."""
        return fingerprint(self._data())

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; special tokens are recognised, the longest where several begin at one place."""
        return list(chain.from_iterable(self._encode_runs([text])))

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the ids of each text."""
        return [self.encode(text) for text in texts]

    def encode_iterable(self, iterable: Iterable[str]) -> Iterator[int]:
        """Yield the ids of the joined pieces, in bounded memory, as if they had been encoded in one.

        Where the pieces cut the text makes no difference, not even within a pretoken or a special token.
        """
        return chain.from_iterable(self._encode_runs(iterable))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the tokens; an unknown id raises a `UserError`."""
        # The elements of an array or a tensor are no ints, and slow or wrong as keys.
        ids = ids.tolist() if hasattr(ids, "tolist") else ids  # pyright: ignore[reportAttributeAccessIssue]
        try:
            return b"".join(map(self.vocab.__getitem__, ids))
        except KeyError as error:
            raise UserError(f"id {error.args[0]} is not in the vocabulary: ids go from 0 to {self.vocab_size - 1}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the tokens; bytes that are not UTF-8 become U+FFFD, an unknown id raises a `UserError`."""
        return self.decode_bytes(ids).decode(errors="replace")

    def _data(self) -> TokenizerData:
        return TokenizerData(self.vocab, self.merges, self.special_tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes fill caches of their own.
        return Tokenizer, (self.vocab, self.merges, tuple(self.special_tokens))

    def _encode_runs(self, pieces: Iterable[str]) -> Iterator[Iterable[int]]:
        for run, special in split_pretokens(pieces, tuple(self.special_tokens)):
            yield chain.from_iterable(map(self._pretoken_ids.__getitem__, run))
            if special is not None:
                yield (self.special_tokens[special],)


class _PretokenIds(dict[str, tuple[int, ...]]):
    """The ids of pretokens; what is missing is made on the way, and forgotten with all the rest when there is too much."""

    def __init__(self, merges: Iterable[tuple[bytes, bytes]], ids: Mapping[bytes, int]):
        self._bytes = [ids[bytes([byte])] for byte in range(256)]
        self._ranks: dict[tuple[int, int], int] = {}
        self._products: list[int] = []
        for rank, (left, right) in enumerate(merges):
            for token in (left, right, left + right):
                if token not in ids:
                    raise UserError(f"merge {rank}, {left!r} {right!r}, needs {token!r}, which is not in the vocabulary")
            if (first := self._ranks.setdefault((ids[left], ids[right]), rank)) != rank:
                raise UserError(f"merge {rank}, {left!r} {right!r}, is merge {first} already: every merge needs one place")
            self._products.append(ids[left + right])

    def __missing__(self, pretoken: str) -> tuple[int, ...]:
        ids = tuple(merge_pretoken([self._bytes[byte] for byte in _utf8(pretoken)], self._ranks, self._products))
        if len(pretoken) <= _CACHED_CHARS:
            if len(self) >= _CACHE_ENTRIES:
                self.clear()
            self[pretoken] = ids
        return ids


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        # A lone surrogate is no text. U+FFFD stands for it, as in tiktoken; to the pattern the two are of one kind.
        return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text).encode()


def _ordered(vocab: Mapping[int, bytes]) -> dict[int, bytes]:
    missing = next((id for id in range(len(vocab)) if id not in vocab), None)
    if missing is not None:
        raise UserError(f"the vocabulary has {len(vocab)} tokens but none with id {missing}: ids go from 0 on without a gap")
    return {id: vocab[id] for id in range(len(vocab))}


def _ids_of_tokens(vocab: Mapping[int, bytes]) -> dict[bytes, int]:
    ids: dict[bytes, int] = {}
    for id, token in vocab.items():
        if (first := ids.setdefault(token, id)) != id:
            raise UserError(f"token {token!r} has the ids {first} and {id}: every token needs one")
    for byte in range(256):
        if bytes([byte]) not in ids:
            raise UserError(f"the vocabulary lacks the byte {bytes([byte])!r}: all 256 are needed")
    return ids
