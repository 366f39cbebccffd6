"""Packing of whole conversations, or whole documents, into windows of the model's context length."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...tokenizer.chats import BEGINS, SCORED
from ..distributed import IGNORED_TARGET
from .best_fit import pack_best_fit
from .token_file import TokenDataset

_SCAN_TOKENS = 1 << 20


@dataclass(frozen=True)
class Packing:
    """The packing of windows."""

    method: Literal["none", "best_fit"] = "none"
    """none: text is split into consecutive windows, and conversations are packed in file order."""
    end_of_text: int | None = None
    """The id at the end of each document. Required for best_fit packing of text."""


class PackedWindows:
    """Windows of `context_length` + 1 tokens, packed with pieces: whole conversations, or whole documents.

    A conversation longer than a window is cropped to its first tokens. A document longer than a window is split into full
    windows and a rest, which is packed as other documents are; consecutive pieces share a token, so that every token is a
    target. Without best_fit, pieces stay in file order, and each window takes as many as fit. Needs 13 bytes of memory per
    piece and 8 per window.
    """

    def __init__(self, dataset: TokenDataset, context_length: int, packing: Packing = Packing()) -> None:
        self.dataset, self.length = dataset, context_length + 1
        self._is_chat = dataset.header.marked
        if self._is_chat:
            borders = conversation_borders(dataset)
            starts, sizes = borders[:-1], np.minimum(np.diff(borders), self.length)
            begins = np.ones(len(starts), bool)
        else:
            borders = _document_borders(dataset, packing.end_of_text)
            starts, sizes, begins = _split_documents(borders, self.length)
        self._num_whole = len(borders) - 1
        self._num_longer = int(np.count_nonzero(np.diff(borders) > self.length))
        if packing.method == "best_fit":
            order, self._bounds = pack_best_fit(sizes, self.length)
            starts, sizes, begins = starts[order], sizes[order], begins[order]
        else:
            self._bounds = np.fromiter(_bounds_in_order(sizes, self.length), np.int64)
        self._starts, self._sizes, self._begins = starts, sizes.astype(np.int32), begins

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self._bounds) - 1

    def pieces(self, window: int) -> list[tuple[int, int]]:
        """Return the offset in the file and the size, both in tokens, of each piece of a window."""
        inside = slice(*self._bounds[window : window + 2])
        return list(zip(self._starts[inside].tolist(), self._sizes[inside].tolist(), strict=True))

    def summary(self) -> str:
        """Return a one-line summary of the windows."""
        share = int(self._sizes.sum(dtype=np.int64)) / (len(self) * self.length)
        what, longer = ("conversations", "cropped") if self._is_chat else ("documents", "split")
        rest = f"; {self._num_longer:,} longer than a window, {longer}" if self._num_longer else ""
        return (
            f"{self.dataset.path}: {self._num_whole:,} {what} in {len(self):,} windows of {self.length:,} "
            f"tokens, {share:.1%} filled{rest}"
        )

    def read(self, windows: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs and targets (int64) and document ids (int32), (B, T) each, of the windows with these indices.

        Each piece is a document of its own, and so is the padding at the end of a window. Targets are -100 in the padding, at
        the first token of a piece that continues another window's document, and at tokens of chats that are not scored.
        """
        first, last = self._bounds[windows], self._bounds[windows + 1]
        pieces = np.concatenate([np.arange(*bounds) for bounds in zip(first, last, strict=True)] or [np.empty(0, np.int64)])
        records = self.dataset.spans(self._starts[pieces], self._sizes[pieces])
        tokens = np.zeros((len(windows), self.length), np.int64)
        marks = np.zeros((len(windows), self.length), np.uint8)
        done = piece = 0
        for row, count in enumerate((last - first).tolist()):
            place = 0
            for number in pieces[piece : piece + count]:
                size = int(self._sizes[number])
                here, found = slice(place, place + size), records[done : done + size]
                if self._is_chat:
                    tokens[row, here], marks[row, here] = found["id"], found["marks"]
                else:
                    tokens[row, here], marks[row, here] = found, SCORED
                    marks[row, place] = BEGINS | (SCORED if self._begins[number] else 0)
                place, done = place + size, done + size
            marks[row, place : place + 1] = BEGINS
            piece += count
        targets = np.where(marks[:, 1:] & SCORED, tokens[:, 1:], IGNORED_TARGET)
        documents = np.cumsum(marks[:, :-1] & BEGINS, axis=1, dtype=np.int32)
        return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets), torch.from_numpy(documents)


def packed_windows(dataset: TokenDataset, context_length: int, packing: Packing) -> PackedWindows | None:
    """Return packed windows for chats, and for text with best_fit; None for other text."""
    packs = dataset.header.marked or packing.method == "best_fit"
    return PackedWindows(dataset, context_length, packing) if packs else None


def conversation_borders(dataset: TokenDataset) -> np.ndarray:
    """Return the offset of each conversation, then the number of all tokens: (conversations + 1,) int64."""
    return np.append(_places(dataset, lambda records: records["marks"] & BEGINS), len(dataset))


def _document_borders(dataset: TokenDataset, end_of_text: int | None) -> np.ndarray:
    # The end-of-text token belongs to the document before it.
    ends = _places(dataset, lambda records: records == end_of_text) + 1
    if not len(ends):
        raise UserError(f"{dataset.path} has no end-of-text token: data.packing must be none")
    borders = np.concatenate([[0], ends])
    return borders if borders[-1] == len(dataset) else np.append(borders, len(dataset))


def _places(dataset: TokenDataset, found: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.concatenate([np.flatnonzero(found(records)) + first for first, records in _scan(dataset)]).astype(np.int64)


def _scan(dataset: TokenDataset) -> Iterator[tuple[int, np.ndarray]]:
    for first in range(0, len(dataset), _SCAN_TOKENS):
        yield first, dataset.records(np.array([first]), min(_SCAN_TOKENS, len(dataset) - first))[0]


def _split_documents(borders: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split documents into pieces of at most `length` tokens. Return offsets, sizes, and whether each begins a document."""
    stride, sizes = length - 1, np.diff(borders)
    counts = np.maximum(1, -(-(sizes - 1) // stride))
    document = np.repeat(np.arange(len(counts)), counts)
    skipped = (np.arange(len(document)) - (np.cumsum(counts) - counts)[document]) * stride
    return borders[document] + skipped, np.minimum(length, sizes[document] - skipped), skipped == 0


def _bounds_in_order(sizes: np.ndarray, length: int) -> Iterator[int]:
    """Pack pieces in order, as many as fit into each window. Yield the first piece of each window, then their number."""
    free = 0
    for piece, size in enumerate(sizes.tolist()):
        if size > free:
            yield piece
            free = length
        free -= size
    yield len(sizes)
