"""The interface of encoders, and the plain Python encoder. The fast one is in `compiled_encoder.py`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np

from ...errors import UserError
from ..reference import merge_pretoken
from ..text.patterns import split_text

# The id of a border that is not a token.
NO_ID = (1 << 32) - 1
NO_IDS = np.empty(0, np.uint32)

# Pretokens per block of ends.
BLOCK = 1 << 14
# `PlainEncoder` caches this many pretokens of at most this many bytes.
_CACHE_ENTRIES, _SHORT = 1 << 16, 32

Text = bytes | np.ndarray

# A splitter yields arrays with the ends of pretokens. It takes the text, its borders, and an array to write to.
Splitter = Callable[[np.ndarray, np.ndarray, np.ndarray], Iterator[np.ndarray]]


def token_dtype(vocab_size: int) -> np.dtype:
    """Return uint16 if it can represent every id of the vocabulary, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class Encoder(ABC):
    """Encodes text to ids; thread-safe.

    A text is bytes, or uint8 of shape (n,), and valid UTF-8 outside of its borders. Borders are [start, end, start, end,
    ...], int64. Nothing merges across a border. Each border becomes its id in `border_ids`, uint32, or nothing for `NO_ID`.
    """

    @abstractmethod
    def encode_with_cuts(self, data: Text, borders: np.ndarray, border_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of a text, an array of `token_dtype`, and the number of ids before each border, int64."""

    def encode(self, data: Text, borders: np.ndarray, border_ids: np.ndarray) -> np.ndarray:
        """Return the ids of a text, an array of `token_dtype`."""
        return self.encode_with_cuts(data, borders, border_ids)[0]

    def encode_to_list(self, data: Text, borders: np.ndarray, border_ids: np.ndarray) -> list[int]:
        """Return the ids of a text as a list."""
        return self.encode(data, borders, border_ids).tolist()

    def try_encode(self, data: bytes) -> np.ndarray | None:
        """Return the ids of a short text by a fast path, or None if the path does not apply."""
        return None

    def try_encode_to_list(self, data: bytes) -> list[int] | None:
        """Return the ids of a short text as a list by a fast path, or None if the path does not apply."""
        return None


def merge_ids(merges: Sequence[tuple[bytes, bytes]], ids: Mapping[bytes, int]) -> np.ndarray:
    """Return the ids of the left, right and merged token of each merge: int64 of shape (n, 3).

    A merge of unknown tokens or a duplicate merge raises a `UserError`.
    """
    known: dict[tuple[bytes, bytes], int] = {}
    for rank, (left, right) in enumerate(merges):
        for token in (left, right, left + right):
            if token not in ids:
                raise UserError(f"merge {rank}, {left!r} {right!r}, needs {token!r}, which is not in the vocabulary")
        if (first := known.setdefault((left, right), rank)) != rank:
            raise UserError(f"merge {rank}, {left!r} {right!r}, is a duplicate of merge {first}")
    rows = [(ids[left], ids[right], ids[left + right]) for left, right in merges]
    return np.array(rows, np.int64).reshape(-1, 3)


def whole_tokens(ids: Mapping[bytes, int], excluded: Collection[int]) -> dict[bytes, int]:
    """Return the tokens of more than one byte, with their ids, except for the ids in `excluded`."""
    return {token: id for token, id in ids.items() if len(token) > 1 and id not in excluded}


class PlainEncoder(Encoder):
    """The encoder of merges in any order, as specified in `reference.py`, and of tokens that no merges produce.

    `whole` gives the ids of pretokens that are not merged.
    """

    def __init__(
        self, merges: np.ndarray, byte_ids: np.ndarray, split: Splitter, num_ids: int, whole: Mapping[bytes, int] | None = None
    ):
        self._ranks = {(left, right): rank for rank, (left, right, _) in enumerate(merges.tolist())}
        self._products = merges[:, 2].tolist()
        self._byte_ids = byte_ids.tolist()
        self._split = split
        self._whole = whole or {}
        self._dtype = token_dtype(num_ids)
        self._merge_cached = lru_cache(_CACHE_ENTRIES)(self.merge)

    def encode_with_cuts(self, data: Text, borders: np.ndarray, border_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder`."""
        ids: list[int] = []
        cuts: list[int] = []
        start = 0
        text = data if isinstance(data, bytes) else data.tobytes()
        for ends in self._split(np.frombuffer(text, np.uint8), borders, np.empty(BLOCK, np.int64)):
            for end in ends.tolist():
                if end > 0:
                    pretoken = text[start:end]
                    ids += self._merge_cached(pretoken) if len(pretoken) <= _SHORT else self.merge(pretoken)
                else:
                    id = int(border_ids[len(cuts)])
                    cuts.append(len(ids))
                    ids += [id] * (id != NO_ID)
                start = abs(end)
        return np.array(ids, self._dtype), np.array(cuts, np.int64)

    def merge(self, pretoken: bytes) -> list[int]:
        """Return the ids of a pretoken."""
        if (id := self._whole.get(pretoken)) is not None:
            return [id]
        return merge_pretoken([self._byte_ids[byte] for byte in pretoken], self._ranks, self._products)


def split_by_regex(pattern: str, data: np.ndarray, borders: np.ndarray, ends: np.ndarray) -> Iterator[np.ndarray]:
    """Implement `Splitter` for a regular expression."""
    start = 0
    for border_start, border_end in [*borders.reshape(-1, 2).tolist(), (len(data), None)]:
        text = data[start:border_start].tobytes().decode()
        pretokens = split_text(text, pattern)
        sizes = map(len, pretokens if text.isascii() else map(str.encode, pretokens))
        found = start + np.cumsum(np.fromiter(sizes, np.int64, len(pretokens)))
        yield from (found[k : k + len(ends)] for k in range(0, len(found), len(ends)))
        if border_end is not None:
            yield np.array([-border_end])
            start = border_end
