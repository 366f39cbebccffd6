"""Decode ids to bytes and text: arrays by a compiled loop, streams without incomplete characters."""

import codecs
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ...errors import UserError
from ..compiled.intrinsics import load64, store64
from ..compiled.jit import BYTES, INT64, INT64S, UINT8S, UINT32S, compiled
from ..compiled.work import Work

# The loop copies whole words: it reads up to seven bytes after a token and writes as many after the text.
_SLACK = 8
# Ids per part: the intermediate arrays of a part stay in the processor's cache.
_PART = 1 << 14


class TokenTable(NamedTuple):
    """The bytes of all tokens in one array: token i is `data[offsets[i]:offsets[i + 1]]`, empty for an unused id.

    `data` is uint8, padded with eight bytes; `offsets` is int64 of shape (largest id + 2,), `sizes` its differences.
    """

    data: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


def token_table(vocab: Mapping[int, bytes]) -> TokenTable:
    """Return the table of a vocabulary, which maps ids to bytes."""
    tokens = [vocab.get(id, b"") for id in range(max(vocab) + 1)]
    sizes = np.fromiter(map(len, tokens), np.int64, len(tokens))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    return TokenTable(np.frombuffer(b"".join(tokens) + bytes(_SLACK), np.uint8), offsets, sizes)


def decode_array(table: TokenTable, ids: Iterable[int]) -> np.ndarray:
    """Return the bytes of the tokens, as uint8 of shape (n,).

    `ids` is an array of any integer type, a tensor, or an iterable of integers. An unknown id raises a `UserError`.
    """
    parts = list(_parts(table, ids))
    size = sum(_size_of(table, part) for part in parts)
    out = np.empty(size + _SLACK, np.uint8)
    place = 0
    for part in parts:
        place = _copy(table, part, out, place)
    return out[:size]


def _parts(table: TokenTable, ids: Iterable[int]) -> Iterator[np.ndarray]:
    ids = _as_array(ids)
    # Register all ids at once: their total number decides whether compiled code decodes them.
    _DECODING.is_compiled(len(ids))
    return (_as_unsigned(ids[start : start + _PART], len(table.sizes)) for start in range(0, len(ids), _PART))


def _as_unsigned(ids: np.ndarray, num_ids: int) -> np.ndarray:
    if ids.dtype.kind == "i" or ids.dtype.itemsize > 4:
        unknown = (ids < 0) | (ids >= num_ids)
        if unknown.any():
            raise _unknown(ids[unknown][0], num_ids)
    # Copy, because other threads may write to the array between measuring and copying.
    return np.array(ids, np.uint32)


def _size_of(table: TokenTable, ids: np.ndarray) -> int:
    if _DECODING.is_compiled(0):
        size = _measure(ids, table.sizes)
        if size < 0:
            raise _unknown(ids[-1 - size], len(table.sizes))
        return size
    num_ids = len(table.sizes)
    sizes = table.sizes[np.minimum(ids, num_ids - 1)]
    unknown = (ids >= num_ids) | (sizes == 0)
    if unknown.any():
        raise _unknown(ids[unknown][0], num_ids)
    return int(sizes.sum())


def _copy(table: TokenTable, ids: np.ndarray, out: np.ndarray, place: int) -> int:
    """Write the tokens to `out` from `place` on; return their end."""
    if _DECODING.is_compiled(0):
        return _copy_tokens(ids, table.data, table.offsets, out, place)
    data = table.data.data
    spans = zip(table.offsets[ids].tolist(), table.offsets[ids + np.uint32(1)].tolist(), strict=True)
    text = b"".join([data[start:end] for start, end in spans])
    out[place : place + len(text)] = np.frombuffer(text, np.uint8)
    return place + len(text)


def decode_bytes(table: TokenTable, ids: Iterable[int]) -> bytes:
    """Return the bytes of the tokens; an unknown id raises a `UserError`."""
    return decode_array(table, ids).tobytes()


def decode_text(table: TokenTable, ids: Iterable[int], errors: str = "replace") -> str:
    """Return the text of the tokens; an unknown id raises a `UserError`.

    `errors` selects the treatment of invalid UTF-8, as in `bytes.decode`: U+FFFD for "replace", a `UnicodeDecodeError` for
    "strict".
    """
    if check_errors(errors) != "replace":
        # The error holds the whole text, so decode it at once.
        return str(decode_array(table, ids).data, "utf-8", errors)
    # Decode in parts: most parts are pure ASCII, which Python decodes many times as fast as other text.
    texts: list[str] = []
    held = b""
    for part in _parts(table, ids):
        out = np.empty(len(held) + _size_of(table, part) + _SLACK, np.uint8)
        out[: len(held)] = np.frombuffer(held, np.uint8)
        end = _copy(table, part, out, len(held))
        text, used = codecs.utf_8_decode(out.data[:end], "replace", False)
        texts.append(text)
        held = out.data[used:end].tobytes()
    return "".join([*texts, held.decode(errors="replace")])


def leave_out(ids: Iterable[int], skipped: Collection[int]) -> Iterable[int]:
    """Return the ids except the skipped ones."""
    if not skipped:
        return ids
    found = _as_array(ids)
    return found[~np.isin(found, list(skipped))]


def check_errors(errors: str) -> str:
    """Return `errors` if it is a registered error handler of Python; otherwise raise a `UserError`."""
    try:
        codecs.lookup_error(errors)
    except LookupError:
        raise UserError(f"errors is {errors!r}: expected replace, strict, ignore or backslashreplace") from None
    return errors


class StreamDecoder:
    """Decodes ids incrementally; an incomplete character is held back.

    The concatenated pieces equal the text of all ids decoded at once. With `errors="strict"`, the ids of a call that raises
    are lost, and the next call continues after them. Ids in `skipped` are ignored.
    """

    def __init__(self, table: TokenTable, errors: str = "replace", skipped: Collection[int] = ()):
        self._table = table
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(check_errors(errors))

    def decode(self, ids: int | np.integer | Iterable[int]) -> str:
        """Return the text that one id, or several, complete."""
        ids = (int(ids),) if isinstance(ids, int | np.integer) else ids
        return self._decoder.decode(decode_bytes(self._table, leave_out(ids, self._skipped)))

    def finish(self) -> str:
        """Return the text held back, treated as `errors` selects, and reset the decoder."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


@compiled(UINT32S, INT64S)
def _measure(ids, sizes):
    """Return the number of bytes of the tokens, or -1 - k if the id at k is unknown."""
    total = 0
    for k in range(len(ids)):
        if ids[k] >= len(sizes) or sizes[ids[k]] == 0:
            return -1 - k
        total += sizes[ids[k]]
    return total


@compiled(UINT32S, BYTES, INT64S, UINT8S, INT64)
def _copy_tokens(ids, data, offsets, out, place):
    """Write the tokens to `out` from `place` on; return their end."""
    for id in ids:
        start, end = offsets[id], offsets[id + 1]
        for step in range(0, end - start, 8):
            store64(out, place + step, load64(data, start + step))
        place += end - start
    return place


_DECODING = Work("decoder", [_measure, _copy_tokens], units_per_second=3e6, compile_seconds=1)


def _as_array(ids: Any) -> np.ndarray:
    if not isinstance(ids, np.ndarray):
        # A tensor may be on a GPU, and iterating over it yields tensors.
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if isinstance(ids, str) or not isinstance(ids, Iterable):
            raise TypeError(f"ids are {ids!r:.60}: expected an array, a tensor or an iterable of integers")
        ids = ids if isinstance(ids, list) else list(ids)
        try:
            ids = np.asarray(array("q", ids))
        except TypeError:
            raise TypeError(f"ids are {ids!r:.60}: expected integers") from None
        except OverflowError:
            raise UserError(f"id {max(ids, key=abs)} is not in the vocabulary: ids have at most 64 bits") from None
    if ids.shape == (0,):
        # NumPy gives an empty list a float dtype.
        return ids.astype(np.int64)
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise TypeError(f"ids are an array of {ids.dtype} of shape {ids.shape}: expected integers of shape (n,)")
    return ids


def _unknown(id: Any, num_ids: int) -> UserError:
    if 0 <= id < num_ids:
        return UserError(f"id {id} is not in the vocabulary: it is unused")
    return UserError(f"id {id} is not in the vocabulary: expected an id from 0 to {num_ids - 1}")
