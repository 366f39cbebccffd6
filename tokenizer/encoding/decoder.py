"""From ids to bytes and text: whole arrays by a compiled loop, streams without broken characters."""

import codecs
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ...errors import UserError
from ..compiled.intrinsics import load64, store64
from ..compiled.jit import BYTES, INT64, INT64S, UINT8S, UINT32S, compiled
from ..compiled.work import Work

# Whole words are copied, so up to seven bytes behind a token are read, and as many behind the text written.
_SLACK = 8
# Ids at a time: what is made of so few on the way stays in the processor's cache.
_PART = 1 << 14


class TokenTable(NamedTuple):
    """The bytes of all tokens in one array: token i is `data[offsets[i]:offsets[i + 1]]`, empty where no token has the id.

    `data` is uint8, with eight bytes more at the end; `offsets` is int64 of shape (largest id + 2,), `sizes` its differences.
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

    `ids` are an array of any integer type, a tensor, or integers; an unknown id raises a `UserError`.
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
    # Here, where all ids are known: they decide together who decodes them.
    _DECODING.is_compiled(len(ids))
    return (_as_unsigned(ids[start : start + _PART], len(table.sizes)) for start in range(0, len(ids), _PART))


def _as_unsigned(ids: np.ndarray, known: int) -> np.ndarray:
    if ids.dtype.kind == "i" or ids.dtype.itemsize > 4:
        unknown = (ids < 0) | (ids >= known)
        if unknown.any():
            raise _unknown(ids[unknown][0], known)
    # A copy, as other threads may write to the array between the measuring and the writing.
    return np.array(ids, np.uint32)


def _size_of(table: TokenTable, ids: np.ndarray) -> int:
    if _DECODING.is_compiled(0):
        size = _measure(ids, table.sizes)
        if size < 0:
            raise _unknown(ids[-1 - size], len(table.sizes))
        return size
    known = len(table.sizes)
    sizes = table.sizes[np.minimum(ids, known - 1)]
    unknown = (ids >= known) | (sizes == 0)
    if unknown.any():
        raise _unknown(ids[unknown][0], known)
    return int(sizes.sum())


def _copy(table: TokenTable, ids: np.ndarray, out: np.ndarray, place: int) -> int:
    """Write the tokens to `out` from `place` on; return where they end."""
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

    `errors` says, as in `bytes.decode`, what becomes of bytes that are not UTF-8: U+FFFD by default, a
    `UnicodeDecodeError` for "strict".
    """
    if check_errors(errors) != "replace":
        # Whoever catches the error may look at the whole text.
        return str(decode_array(table, ids).data, "utf-8", errors)
    # In parts, most of which are ASCII in most texts: Python decodes those many times as fast as what has one other character.
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
    """Return the ids without those that are skipped."""
    if not skipped:
        return ids
    found = _as_array(ids)
    return found[~np.isin(found, list(skipped))]


def check_errors(errors: str) -> str:
    """Return `errors` if it is the name of a way to treat bytes that are not UTF-8; else raise a `UserError`."""
    try:
        codecs.lookup_error(errors)
    except LookupError:
        raise UserError(f"errors is {errors!r}: choose replace, strict, ignore or backslashreplace") from None
    return errors


class StreamDecoder:
    """Text as the ids come in: a character whose bytes are not complete is held back.

    Joined, the pieces are the text of all ids decoded at once. With `errors="strict"` the ids of a call that raises are lost,
    and the next call goes on behind them. Ids in `skipped` are passed over.
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
        """Return what is still held back, treated as `errors` says, and be ready for another text."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


@compiled(UINT32S, INT64S)
def _measure(ids, sizes):
    """Return how many bytes the tokens have, or -1 - k if the id at k is unknown."""
    total = 0
    for k in range(len(ids)):
        if ids[k] >= len(sizes) or sizes[ids[k]] == 0:
            return -1 - k
        total += sizes[ids[k]]
    return total


@compiled(UINT32S, BYTES, INT64S, UINT8S, INT64)
def _copy_tokens(ids, data, offsets, out, place):
    """Write the tokens to `out` from `place` on; return where they end."""
    for id in ids:
        start, end = offsets[id], offsets[id + 1]
        for step in range(0, end - start, 8):
            store64(out, place + step, load64(data, start + step))
        place += end - start
    return place


_DECODING = Work("decoder", [_measure, _copy_tokens], units_per_second=3e6, compile_seconds=1)


def _as_array(ids: Any) -> np.ndarray:
    if not isinstance(ids, np.ndarray):
        # A tensor may lie on a GPU, and hands out its elements as tensors.
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if isinstance(ids, str) or not isinstance(ids, Iterable):
            raise TypeError(f"ids are {ids!r:.60}: an array, a tensor or an iterable of integers is needed")
        ids = ids if isinstance(ids, list) else list(ids)
        try:
            ids = np.asarray(array("q", ids))
        except TypeError:
            raise TypeError(f"ids are {ids!r:.60}: integers are needed") from None
        except OverflowError:
            raise UserError(f"id {max(ids, key=abs)} is not in the vocabulary: no vocabulary goes that far") from None
    if ids.shape == (0,):
        # Of nothing, numpy makes floats.
        return ids.astype(np.int64)
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise TypeError(f"ids are an array of {ids.dtype} of shape {ids.shape}: one dimension of integers is needed")
    return ids


def _unknown(id: Any, known: int) -> UserError:
    if 0 <= id < known:
        return UserError(f"id {id} is not in the vocabulary: no token has it")
    return UserError(f"id {id} is not in the vocabulary: ids go from 0 to {known - 1}")
