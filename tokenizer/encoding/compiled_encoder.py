"""The encoder with compiled loops: one workspace per thread, and one cache for all threads."""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from threading import Lock
from typing import Any
from weakref import WeakSet

import numpy as np

from ..compiled.jit import load
from ..text.patterns import pattern_name
from ..text.scanner import Scanner, scanner_of
from .backtracking import MergeTable, merge_table, no_merge_table
from .decoder import TokenTable
from .encode_loop import BEGIN, CACHE_IS_FULL, PLAIN, RESUME, encode_pretokens, write_list
from .encoder import NO_IDS, Encoder, PlainEncoder, Splitter, Text, split_by_regex, token_dtype
from .pretoken_cache import LOCK, PretokenCache, WholeTokens, new_cache, next_cache
from .rank_merging import RankTable, no_rank_table, rank_table, tokens_made
from .workspace import SIZE, SLACK, TEXT_BYTES, EncoderWorkspace

# Larger output buffers, for a very long pretoken, are freed after the text.
_KEPT = 1 << 20
# Offset of the text in a bytes object, from the address of the object.
_BYTES_HEADER = bytes.__basicsize__ - 1

_NO_CUTS = np.empty(0, np.int64)


def compiled_encoder(
    merges: np.ndarray,
    byte_ids: np.ndarray,
    tokens: TokenTable,
    pattern: str,
    whole: Mapping[bytes, int],
    beginnings: np.ndarray,
) -> Encoder:
    """Return the encoder of merges, as returned by `merge_ids`, and of `whole` tokens, which merges need not produce.

    `byte_ids`, int64, are the ids of the bytes. `beginnings` are the first bytes of special tokens: see `SpecialFinder`.
    """
    name = pattern_name(pattern)
    split = partial(split_by_scanner, scanner_of(name)) if name else partial(split_by_regex, pattern)
    table, ranks = merge_table(merges, byte_ids, tokens), no_rank_table()
    made = set() if table is None else set(table.ids[table.sizes > 1].tolist())
    if table is None:
        table, ranks = no_merge_table(), rank_table(merges, byte_ids)
        made = tokens_made(ranks, tokens)
    seeds = WholeTokens.of({token: id for token, id in whole.items() if id not in made})
    cache = None if seeds is None else seeds.add_to(new_cache())
    if seeds is None or cache is None:
        return PlainEncoder(merges, byte_ids, split, len(tokens.sizes), whole)
    # The encoder's loop finds GPT-2's pretokens itself.
    split = None if name == "gpt2" else split
    return CompiledEncoder((table, ranks), split, len(tokens.sizes), beginnings, seeds, cache)


class CompiledEncoder(Encoder):
    """The encoder that merges each distinct pretoken once, with the `RankTable` if it is not empty, else the `MergeTable`."""

    def __init__(
        self,
        tables: tuple[MergeTable, RankTable],
        split: Splitter | None,
        num_ids: int,
        beginnings: np.ndarray,
        whole: WholeTokens,
        cache: PretokenCache,
    ):
        self._tables, self._split, self._beginnings, self._whole = tables, split, beginnings, whole
        self._scans = split is None
        self._num_ids, self._dtype = num_ids, token_dtype(num_ids)
        self._cache = cache
        self._lock = Lock()
        self._idle: list[EncoderWorkspace] = []
        load([encode_pretokens, write_list])
        self._encode, self._write_list = encode_pretokens.entry, write_list.entry
        _ENCODERS.add(self)

    @cached_property
    def _numbers(self) -> np.ndarray:
        # Existing int objects can be put into a list faster than new ones can be created.
        return np.arange(self._num_ids).astype(object)

    def try_encode(self, data: bytes) -> np.ndarray | None:
        """See `Encoder`."""
        if not self._scans or len(data) > TEXT_BYTES:
            return None
        # The code is repeated below, because a function call takes a tenth of the time of a short text.
        try:
            workspace = self._idle.pop()
        except IndexError:
            return None
        size = self._encode(workspace.address, id(data) + _BYTES_HEADER, len(data), PLAIN)
        ids = workspace.results[:size].copy() if size >= 0 else None
        self._idle.append(workspace)
        return ids

    def try_encode_to_list(self, data: bytes) -> list[int] | None:
        """See `Encoder`."""
        if not self._scans or len(data) > TEXT_BYTES:
            return None
        try:
            workspace = self._idle.pop()
        except IndexError:
            return None
        size = self._encode(workspace.address, id(data) + _BYTES_HEADER, len(data), PLAIN)
        ids = self._list_of(workspace, size) if size >= 0 else None
        self._idle.append(workspace)
        return ids

    def encode_to_list(self, data: Text, borders: np.ndarray, border_ids: np.ndarray) -> list[int]:
        """See `Encoder`."""
        workspace = self._take_workspace()
        pieces: list[int] = []

        def take(size: int) -> None:
            pieces.extend(self._list_of(workspace, size))

        self._run(workspace, data, borders, border_ids, take)
        return pieces

    def encode_with_cuts(self, data: Text, borders: np.ndarray, border_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Encoder`."""
        workspace, pieces = self._take_workspace(), []
        cuts = self._run(
            workspace, data, borders, border_ids, lambda size: pieces.append(workspace.out[:size].astype(self._dtype))
        )
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces), cuts

    def _list_of(self, workspace: EncoderWorkspace, size: int) -> list[int]:
        ids: list[Any] = [None] * size
        self._write_list(workspace.address, id(ids), size)
        return ids

    def unlock(self) -> None:
        """Release the locks of the cache and the encoder, whichever thread holds them."""
        self._cache.used[LOCK] = 0
        self._lock = Lock()

    def _take_workspace(self) -> EncoderWorkspace:
        # list.pop and list.append are atomic.
        try:
            return self._idle.pop()
        except IndexError:
            return EncoderWorkspace(self._tables, self._cache, self._numbers, self._beginnings, self._scans)

    def _run(
        self,
        workspace: EncoderWorkspace,
        data: Text,
        borders: np.ndarray,
        border_ids: np.ndarray,
        take: Callable[[int], None],
    ) -> np.ndarray:
        cuts = _NO_CUTS
        if len(border_ids):
            cuts = np.zeros(len(border_ids), np.int64)
            workspace.set_borders(borders, border_ids, cuts)
        address = id(data) + _BYTES_HEADER if isinstance(data, bytes) else data.ctypes.data
        if self._split is None:
            size = self._encode_part(workspace, address, len(data), BEGIN, take)
        else:
            resume, size = BEGIN, 0
            padded = bytes(data) + bytes(SLACK)
            text = np.frombuffer(padded, np.uint8)[: len(data)]
            for ends in self._split(text, borders, workspace.given_ends):
                workspace.give(ends)
                size = self._encode_part(workspace, id(padded) + _BYTES_HEADER, len(data), resume, take)
                resume = RESUME
        take(size)
        if len(border_ids):
            workspace.set_borders(_NO_CUTS, NO_IDS, _NO_CUTS)
        if len(workspace.out) > _KEPT:
            workspace.resize_output(TEXT_BYTES)
        # A workspace interrupted by an error or Ctrl-C is not reused.
        self._idle.append(workspace)
        return cuts

    def _encode_part(self, workspace: EncoderWorkspace, address: int, size: int, mode: int, take: Callable[[int], None]) -> int:
        """Encode the text, or the part with the given pretokens; return the number of ids not yet passed to `take`."""
        while (found := self._encode(workspace.address, address, size, mode)) < 0:
            if found == CACHE_IS_FULL:
                self._grow_cache(workspace, size)
            else:
                take(int(workspace.frame[SIZE]))
                workspace.clear_output()
            mode = RESUME
        return found

    def _grow_cache(self, workspace: EncoderWorkspace, num_bytes: int) -> None:
        with self._lock:
            # Another thread may have grown the cache already.
            if workspace.cache is self._cache:
                cache = next_cache(self._cache, num_bytes)
                # The whole tokens fit into a smaller cache, so they fit into this one.
                self._cache = cache if cache.used[0] else self._whole.add_to(cache) or cache
            workspace.set_cache(self._cache)


# A forked child does not have the thread that held a lock at the fork, so it releases the locks.
_ENCODERS: "WeakSet[CompiledEncoder]" = WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [encoder.unlock() for encoder in _ENCODERS])


def split_by_scanner(scan: Scanner, data: np.ndarray, borders: np.ndarray, ends: np.ndarray) -> Iterator[np.ndarray]:
    """Implement `Splitter` with a compiled scanner."""
    start, passed, end = 0, 0, len(data)
    while start < end:
        # The scanner searches the borders from the first one on, so pass only the remaining ones.
        size = scan(data, start, end, ends, borders[passed:] if passed else borders)
        found = ends[:size]
        yield found
        if size < len(ends):
            return
        start = abs(int(found[-1]))
        if len(borders):
            passed += 2 * int(np.count_nonzero(found <= 0))
