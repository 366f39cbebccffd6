"""The vocabulary and the merges that a tokenizer is given, checked."""

from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np

from ..errors import UserError
from .formats import MOST_IDS


def sorted_vocab(vocab: Mapping[int, bytes]) -> dict[int, bytes]:
    """Return the tokens by ascending id; ids that are no integers, or tokens that are no bytes, raise a `TypeError`."""
    if not isinstance(vocab, Mapping):
        raise TypeError(f"vocab is {vocab!r:.60}: a mapping of ids to tokens is needed")
    for id, token in vocab.items():
        if not isinstance(id, int | np.integer) or not isinstance(token, bytes):
            raise TypeError(f"vocab gives {id!r:.60} the token {token!r:.60}: an integer and bytes are needed")
    # NumPy's integers wrap around, and JSON has none.
    return {int(id): vocab[id] for id in sorted(vocab)}


def list_of_merges(merges: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the merges as a list; what is no pair of tokens raises a `TypeError`."""
    if isinstance(merges, str | bytes) or not isinstance(merges, Iterable):
        raise TypeError(f"merges is {merges!r:.60}: a list or another iterable of pairs of tokens is needed")
    if isinstance(merges, Set):
        raise TypeError(f"merges is a set of {len(merges)}, which has no order: a list is needed")
    return [_pair(merge, index) for index, merge in enumerate(merges)]


def _pair(merge: Any, index: int) -> tuple[bytes, bytes]:
    if isinstance(merge, tuple | list) and len(merge) == 2:
        left, right = merge
        if isinstance(left, bytes) and isinstance(right, bytes):
            return left, right
    raise TypeError(f"merges has {merge!r:.60} at {index}: a pair of tokens, both bytes, is needed")


def ids_of_tokens(vocab: Mapping[int, bytes]) -> dict[bytes, int]:
    """Return the id of each token; ids out of range, doubled tokens and missing bytes raise a `UserError`."""
    ids: dict[bytes, int] = {}
    for id, token in vocab.items():
        if not 0 <= id < MOST_IDS:
            raise UserError(f"token {token!r} has the id {id}: ids go from 0 to {MOST_IDS - 1}")
        if (first := ids.setdefault(token, id)) != id:
            raise UserError(f"token {token!r} has the ids {first} and {id}: every token needs one")
    for byte in range(256):
        if bytes([byte]) not in ids:
            raise UserError(f"the vocabulary lacks the byte {bytes([byte])!r}: all 256 are needed")
    return ids
