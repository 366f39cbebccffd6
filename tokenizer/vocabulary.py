"""Validate the vocabulary and the merges of a tokenizer."""

from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np

from ..errors import UserError
from .formats import MOST_IDS


def sorted_vocab(vocab: Mapping[int, bytes]) -> dict[int, bytes]:
    """Return the vocabulary by ascending id; an id that is not an integer or a token that is not bytes is a `TypeError`."""
    if not isinstance(vocab, Mapping):
        raise TypeError(f"vocab is {vocab!r:.60}: expected a mapping of ids to tokens")
    for id, token in vocab.items():
        if not isinstance(id, int | np.integer) or not isinstance(token, bytes):
            raise TypeError(f"vocab maps {id!r:.60} to {token!r:.60}: expected an integer and bytes")
    # NumPy integers overflow silently, and JSON cannot serialize them.
    return {int(id): vocab[id] for id in sorted(vocab)}


def list_of_merges(merges: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the merges as a list; an item that is not a pair of tokens raises a `TypeError`."""
    if isinstance(merges, str | bytes) or not isinstance(merges, Iterable):
        raise TypeError(f"merges is {merges!r:.60}: expected an iterable of pairs of tokens")
    if isinstance(merges, Set):
        raise TypeError(f"merges is a set of {len(merges)}, which has no order: expected a list")
    return [_pair(merge, index) for index, merge in enumerate(merges)]


def _pair(merge: Any, index: int) -> tuple[bytes, bytes]:
    if isinstance(merge, tuple | list) and len(merge) == 2:
        left, right = merge
        if isinstance(left, bytes) and isinstance(right, bytes):
            return left, right
    raise TypeError(f"merges has {merge!r:.60} at {index}: expected a pair of tokens, both bytes")


def ids_of_tokens(vocab: Mapping[int, bytes]) -> dict[bytes, int]:
    """Return the id of each token; out-of-range ids, duplicate tokens and missing bytes raise a `UserError`."""
    ids: dict[bytes, int] = {}
    for id, token in vocab.items():
        if not 0 <= id < MOST_IDS:
            raise UserError(f"token {token!r} has the id {id}: expected an id from 0 to {MOST_IDS - 1}")
        if (first := ids.setdefault(token, id)) != id:
            raise UserError(f"token {token!r} has the ids {first} and {id}: expected one id per token")
    for byte in range(256):
        if bytes([byte]) not in ids:
            raise UserError(f"the vocabulary lacks the byte {bytes([byte])!r}: expected all 256 bytes")
    return ids
