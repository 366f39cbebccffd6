"""Whole conversations packed into windows of a model's context."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...tokenizer.chats import BEGINS, SCORED
from ..distributed import IGNORED_TARGET
from .token_file import TokenDataset

_SCAN_TOKENS = 1 << 20


class ChatDataset(TokenDataset):
    """The conversations of a marked token file."""

    def __init__(self, path: Path | str) -> None:
        """Open `path`; a file that is not a whole, marked token file is a `UserError`."""
        super().__init__(path)
        if not self.header.marked:
            raise UserError(f"{self.path} is a token file of text, not of chats: remove it to have it made again")

    def starts(self) -> np.ndarray:
        """Return the first token of each conversation, and the number of all tokens behind them: (conversations + 1,) int64."""
        parts = [np.flatnonzero(marks & BEGINS) + first for first, marks in self._marks()]
        return np.concatenate([*parts, [len(self)]]).astype(np.int64)

    def _marks(self) -> Iterator[tuple[int, np.ndarray]]:
        for first in range(0, len(self), _SCAN_TOKENS):
            yield first, self.records(np.array([first]), min(_SCAN_TOKENS, len(self) - first))[0]["marks"]


class PackedWindows:
    """The windows of a chat file: in its order, each has as many whole conversations as fit in `context_length` + 1 tokens.

    A conversation that does not fit in a window has one of its own, and is cropped to its first tokens. A window is one
    stretch of the file; 8 bytes of memory each.
    """

    def __init__(self, dataset: ChatDataset, context_length: int) -> None:
        self.dataset, self.length = dataset, context_length + 1
        starts = dataset.starts()
        sizes = np.diff(starts)
        self._num_conversations, self._num_cropped = len(sizes), int(np.count_nonzero(sizes > self.length))
        self._num_kept = int(np.minimum(sizes, self.length).sum())
        self.starts = np.array([*_first_of_each(starts, self.length), len(dataset)], np.int64)
        """First token of each window, and the number of all tokens behind them."""

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.starts) - 1

    def summary(self) -> str:
        """Return in a line what the windows hold."""
        share = self._num_kept / (len(self) * self.length)
        cropped = f"; {self._num_cropped:,} are longer, and cropped to that" if self._num_cropped else ""
        return (
            f"{self.dataset.path}: {self._num_conversations:,} conversations in {len(self):,} windows of {self.length:,} "
            f"tokens, {share:.1%} filled{cropped}"
        )

    def read(self, starts: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, targets (int64) and document ids (int32), (B, T) each, of the windows that begin at `starts`.

        Targets that are not scored are -100. What is left of a window behind its last conversation is a document by itself.
        """
        ends = self.starts[np.searchsorted(self.starts, starts, side="right")]
        tokens = np.zeros((len(starts), self.length), np.int64)
        marks = np.zeros((len(starts), self.length), np.uint8)
        for row, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            size = min(end - start, self.length)
            records = self.dataset.records(np.array([start]), size)[0]
            tokens[row, :size], marks[row, :size] = records["id"], records["marks"]
            marks[row, size : size + 1] = BEGINS
        targets = np.where(marks[:, 1:] & SCORED, tokens[:, 1:], IGNORED_TARGET)
        documents = np.cumsum(marks[:, :-1] & BEGINS, axis=1, dtype=np.int32)
        return torch.from_numpy(tokens[:, :-1].copy()), torch.from_numpy(targets), torch.from_numpy(documents)


def _first_of_each(starts: np.ndarray, length: int) -> Iterator[int]:
    """Yield the first token of each window, where the conversations begin at `starts[:-1]`."""
    first = None
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        if first is None or end - first > length:
            yield start
            first = start
