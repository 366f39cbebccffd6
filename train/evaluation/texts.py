"""Perplexity and bits per byte of text files, by a window that slides over each document."""

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
    """Negative log-likelihood of all tokens that were scored."""
    tokens: int = 0
    bytes: int = 0
    """Of the text that these tokens stand for."""
    documents: int = 0

    def as_row(self) -> dict[str, Any]:
        """Return the sums, and what follows from them."""
        nats_per_token = self.nats / self.tokens if self.tokens else math.nan
        return {
            **dataclasses.asdict(self),
            "bytes_per_token": self.bytes / self.tokens if self.tokens else math.nan,
            "nats_per_token": nats_per_token,
            "perplexity": math.exp(nats_per_token),
            "bits_per_byte": bits_per_byte(self.nats, self.bytes),
        }


class SlidingWindow:
    """Cuts the tokens of a document, which come in pieces, into requests that score each token once.

    The first window is as long as the context, and all in it is scored; each further one adds `stride` tokens, which see the
    context's length less the stride at least. The last one adds what is left, with a context as long as any.
    """

    def __init__(self, start: Sequence[int], context_length: int, stride: int) -> None:
        """Begin with tokens that are not scored; where there are none, the first token of the document is not."""
        self._context, self._stride = context_length, stride
        self._held = np.array(start, np.int64)
        # Within what is held: the tokens that are done with, and where the next window ends.
        self._done, self._end = max(1, len(start)), context_length + 1

    def add(self, tokens: np.ndarray) -> Iterator[Request]:
        """Take the next tokens of the document; yield the windows that are full."""
        self._held = np.concatenate((self._held, tokens))
        while self._end <= len(self._held):
            yield self._window(self._end)
            self._end += self._stride
        if (dropped := self._done - self._context) > 0:
            self._held = self._held[dropped:]
            self._done, self._end = self._done - dropped, self._end - dropped

    def finish(self) -> Iterator[Request]:
        """Yield the window of what is left, if anything is."""
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
    """Return the figures of each file, by its name, and with several of all together.

    What stands between the documents of a file, and before the first, is not scored. With `join_documents` a window reaches
    from one document into the next, as it does in training; else each is scored by itself.
    """
    files = [file for file in resolve(list(paths)) if isinstance(file, Files)]
    if stride is None:
        stride = max(1, scorer.context_length // 2)
    if not 1 <= stride <= scorer.context_length:
        raise UserError(f"stride is {stride}: it must be from 1 to {scorer.context_length}, the length of the context")
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
            # No text holds what stands between documents, because special tokens are not recognised in it.
            is_text = ~np.isin(request.tokens[-request.num_scored :], _between(scorer))
            nats = scores.nats[is_text]
            figures.nats += float(nats.sum())
            figures.tokens += nats.size
    if not figures.tokens:
        raise UserError(f"{file.path} has no token to score: a longer text is needed")
    return figures


def _between(scorer: Scorer) -> list[int]:
    return [] if scorer.separator is None else [scorer.separator, *scorer.begin]


def _requests(
    scorer: Scorer, file: Files, stride: int, join_documents: bool, figures: TextFigures, bar: tqdm
) -> Iterator[Request]:
    """Yield the windows of a file, and count its documents and bytes."""

    def begun() -> SlidingWindow:
        return SlidingWindow(scorer.start, scorer.context_length, stride)

    window, is_begun = begun(), False
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
                    # Nothing stands before this document's first token, which is therefore not scored.
                    figures.bytes -= len(scorer.tokenizer.decode_bytes(ids[:1].tolist()))
                figures.documents += not is_begun
                is_begun = True
                yield from window.add(ids)
            if is_whole and is_begun:
                is_begun = False
                if join_documents:
                    yield from window.add(np.array(_between(scorer), np.int64))
                else:
                    yield from window.finish()
                    window = begun()
    yield from window.finish()


def _pieces(file: Files, scorer: Scorer) -> Iterator[tuple[list[str], list[bool]]]:
    """Yield pieces of documents that can be encoded apart, some at a time, and whether a document ends with each."""
    # In a table every row is a document. In other files END_OF_TEXT stands between documents, and is itself no text.
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
