"""Perplexity and bits per byte of text files, with a sliding window over each document."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...errors import UserError
from ...tokenizer import END_OF_TEXT
from ...tokenizer.text.sources import Files, iter_blocks, resolve, text_bytes
from ..bits_per_byte import bits_per_byte
from .scoring import Request, Scorer

_MARK = END_OF_TEXT.encode()


@dataclass
class TextFigures:
    """Sums over texts."""

    nats: float = 0.0
    """Negative log-likelihood of all scored tokens."""
    tokens: int = 0
    """Number of scored tokens."""
    bytes: int = 0
    """Bytes of text in the scored tokens."""
    documents: int = 0

    def as_row(self) -> dict[str, Any]:
        """Return the sums and the ratios computed from them."""
        nats_per_token = self.nats / self.tokens if self.tokens else math.nan
        return {
            **dataclasses.asdict(self),
            "bytes_per_token": self.bytes / self.tokens if self.tokens else math.nan,
            "nats_per_token": nats_per_token,
            "perplexity": math.exp(nats_per_token),
            "bits_per_byte": bits_per_byte(self.nats, self.bytes),
        }


class SlidingWindow:
    """Splits the tokens of a document, added in pieces, into requests that score each token once.

    The first window has the length of the context, and all its tokens are scored. Each further window scores `stride` new
    tokens, each with at least `context_length - stride` tokens of context. The last window scores the remaining tokens.
    """

    def __init__(self, start: Sequence[int], context_length: int, stride: int) -> None:
        """Begin with the tokens `start`, which are not scored; if it is empty, the first token is not scored."""
        self._context, self._stride = context_length, stride
        self._held = np.array(start, np.int64)
        # Positions in the held tokens: the end of the tokens already scored, and the end of the next window.
        self._done, self._end = max(1, len(start)), context_length + 1

    def add(self, tokens: np.ndarray) -> Iterator[Request]:
        """Add the next tokens of the document; yield the windows that are full."""
        self._held = np.concatenate((self._held, tokens))
        while self._end <= len(self._held):
            yield self._window(self._end)
            self._end += self._stride
        if (dropped := self._done - self._context) > 0:
            self._held = self._held[dropped:]
            self._done, self._end = self._done - dropped, self._end - dropped

    def finish(self) -> Iterator[Request]:
        """Yield the window of the remaining tokens, if there are any."""
        if self._done < len(self._held):
            yield self._window(len(self._held))

    def _window(self, end: int) -> Request:
        begin = max(0, end - self._context - 1)
        request = Request(self._held[begin:end], end - self._done)
        self._done = end
        return request


def score_texts(
    scorer: Scorer, paths: Sequence[Path], stride: int | None = None, join_documents: bool = False
) -> dict[str, dict[str, Any]]:
    """Return the results of each file, by its name, and of all together under "all" if there are several.

    Separator tokens between documents, and tokens before the first document, are not scored. With `join_documents`, windows
    span documents, as in training; otherwise each document is scored separately.
    """
    files = [file for file in resolve(list(paths)) if isinstance(file, Files)]
    if stride is None:
        stride = max(1, scorer.context_length // 2)
    if not 1 <= stride <= scorer.context_length:
        raise UserError(f"stride is {stride}: expected 1 to {scorer.context_length}, the context length")
    if join_documents and scorer.separator is None:
        raise UserError("join_documents is set, but the tokenizer has no token that ends a document")
    rows, total = {}, TextFigures()
    for file in files:
        figures = _score_file(scorer, file, stride, join_documents)
        rows[str(file.path)] = figures.as_row()
        for name, value in dataclasses.asdict(figures).items():
            setattr(total, name, getattr(total, name) + value)
    if len(rows) > 1:
        rows["all"] = total.as_row()
    return rows


def _score_file(scorer: Scorer, file: Files, stride: int, join_documents: bool) -> TextFigures:
    figures = TextFigures()
    with tqdm(total=text_bytes(file), desc=Path(file.path).name, unit="B", unit_scale=True, disable=None) as bar:
        requests = _requests(scorer, file, stride, join_documents, figures, bar)
        for request, scores in scorer.score(requests):
            # Separators are special tokens, which never come from the text, so they can be removed by id.
            is_text = ~np.isin(request.tokens[-request.num_scored :], _separator_tokens(scorer))
            nats = scores.nats[is_text]
            figures.nats += float(nats.sum())
            figures.tokens += nats.size
    if not figures.tokens:
        raise UserError(f"{file.path} has no token to score: expected a longer text")
    return figures


def _separator_tokens(scorer: Scorer) -> list[int]:
    return [] if scorer.separator is None else [scorer.separator, *scorer.begin]


def _requests(
    scorer: Scorer, file: Files, stride: int, join_documents: bool, figures: TextFigures, bar: tqdm
) -> Iterator[Request]:
    """Yield the windows of a file; add its documents and bytes to `figures`."""

    def new_window() -> SlidingWindow:
        return SlidingWindow(scorer.start, scorer.context_length, stride)

    window, is_begun = new_window(), False
    for texts, are_whole in _pieces(file, scorer):
        encoded = scorer.tokenizer.encode_batch(texts, allowed_special=(), disallowed_special=())
        bounds = encoded.offsets.tolist()
        for text, first, end, is_whole in zip(texts, bounds, bounds[1:], are_whole, strict=False):
            ids = encoded.ids[first:end].astype(np.int64)
            if ids.size:
                size = len(text.encode())
                bar.update(size)
                figures.bytes += size
                if not is_begun and not scorer.start:
                    # Without a start token, the first token of the document is not scored.
                    figures.bytes -= len(scorer.tokenizer.decode_bytes(ids[:1].tolist()))
                figures.documents += not is_begun
                is_begun = True
                yield from window.add(ids)
            if is_whole and is_begun:
                is_begun = False
                if join_documents:
                    yield from window.add(np.array(_separator_tokens(scorer), np.int64))
                else:
                    yield from window.finish()
                    window = new_window()
    yield from window.finish()


def _pieces(file: Files, scorer: Scorer) -> Iterator[tuple[list[str], list[bool]]]:
    """Yield batches of pieces that can be encoded independently, and for each piece whether it ends a document."""
    # In JSON lines and Parquet files, every row is a document. In other files, END_OF_TEXT separates documents.
    is_table = {".jsonl", ".ndjson", ".parquet"} & {suffix.lower() for suffix in Path(file.path).suffixes[-2:]}
    for block in iter_blocks(file, (END_OF_TEXT,), pattern=scorer.tokenizer.pattern):
        data = block.data.tobytes()
        if is_table:
            bounds = [0, *block.ends.tolist()]
            parts = [data[begin:end] for begin, end in pairwise(bounds)]
            ends = [True] * len(parts)
        else:
            parts = data.split(_MARK)
            ends = [True] * (len(parts) - 1) + [False]
        yield [part.decode(errors="replace") for part in parts], ends
