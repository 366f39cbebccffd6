"""Token files on disk, and the batches that a step reads from them.

A token file is one JSON line padded with spaces to 4,096 bytes, then the ids as little-endian uint16, or uint32 where the
vocabulary is larger than 65,536. The line says format, dtype, number of tokens, vocabulary size, the fingerprint of the
tokenizer and the size of the text that it was made from.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files import atomic_file, require_file
from ..tokenizer import Tokenizer, iter_encoded, token_dtype

FORMAT = "tilewright-tokens-1"
HEADER_BYTES = 4096
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True)
class TokenHeader:
    """What a token file says of itself."""

    format: str
    dtype: str
    num_tokens: int
    vocab_size: int
    tokenizer: str
    text_bytes: int


def write_tokens(path: Path, arrays: Iterable[np.ndarray], vocab_size: int, tokenizer: str, text_bytes: int) -> TokenHeader:
    """Write the ids of `arrays`, in order, to a token file; `path` appears only when it is whole.

    `tokenizer` is the fingerprint of the tokenizer that made them, from a text of `text_bytes` bytes.
    """
    dtype = token_dtype(vocab_size).name
    num_tokens = 0
    with atomic_file(path) as file:
        file.seek(HEADER_BYTES)
        for array in arrays:
            file.write(np.ascontiguousarray(array, DTYPES[dtype]).tobytes())
            num_tokens += len(array)
        header = TokenHeader(FORMAT, dtype, num_tokens, vocab_size, tokenizer, text_bytes)
        file.seek(0)
        file.write(json.dumps(asdict(header)).encode().ljust(HEADER_BYTES - 1) + b"\n")
    return header


class TokenDataset:
    """The ids of a token file, mapped into memory."""

    def __init__(self, path: Path | str) -> None:
        """Open `path`; a file that is not a whole token file is a `UserError`."""
        self.path = require_file(path, "token file")
        with self.path.open("rb") as file:
            line = file.read(HEADER_BYTES)
        try:
            self.header = TokenHeader(**json.loads(line))
            dtype = DTYPES[self.header.dtype]
            if self.header.format != FORMAT:
                raise ValueError(f"format {self.header.format!r}")
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.path} is not a token file: make one with `tilewright tokenizer encode`") from error
        expected = HEADER_BYTES + self.header.num_tokens * dtype.itemsize
        if self.path.stat().st_size != expected:
            raise UserError(f"{self.path} has {self.path.stat().st_size} bytes, its header says {expected}: make it again")
        self._dtype = dtype

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self.header.num_tokens

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return the `length` ids from each of `starts`, as int64 (len(starts), length)."""
        # Mapped anew each time: pages read through one long-lived map would count towards this process for ever.
        ids = np.memmap(self.path, self._dtype, mode="r", offset=HEADER_BYTES, shape=(len(self),))
        windows = np.stack([ids[start : start + length] for start in starts]).astype(np.int64)
        if windows.max(initial=0) >= self.header.vocab_size:
            raise UserError(
                f"{self.path} holds token {windows.max()}, outside its vocabulary of {self.header.vocab_size}: make it again"
            )
        return windows


def encode_text(text: Path, tokenizer: Tokenizer, out: Path, num_workers: int | None = None) -> TokenHeader:
    """Encode a text file to the token file `out`, in parallel, with a progress bar."""
    arrays = iter_encoded(text, tokenizer, num_workers)
    return write_tokens(out, arrays, tokenizer.vocab_size, tokenizer.fingerprint, text.stat().st_size)


def open_dataset(path: Path, tokenizer: Tokenizer) -> TokenDataset:
    """Open a token file, or the token file beside a text, which is encoded first where it is missing.

    A token file made by another tokenizer or from a text of another size is a `UserError`: it is never overwritten.
    """
    tokens = path if path.suffix == ".tokens" else path.with_suffix(".tokens")
    if not tokens.exists():
        require_file(path, "text file", "make a corpus with `tilewright corpus`")
        encode_text(path, tokenizer, tokens)
    dataset = TokenDataset(tokens)
    if dataset.header.tokenizer != tokenizer.fingerprint:
        raise UserError(f"{tokens} was made by another tokenizer: remove it to have it made again, or name its tokenizer")
    if path != tokens and path.is_file() and path.stat().st_size != dataset.header.text_bytes:
        raise UserError(f"{tokens} was made from another {path.name}: remove it to have it made again")
    return dataset


def decode_text(dataset: TokenDataset, tokenizer: Tokenizer, piece_tokens: int = 2**16) -> Iterator[bytes]:
    """Yield the text of a token file piece by piece, as bytes, because a piece may end inside a character."""
    for start in range(0, len(dataset), piece_tokens):
        length = min(piece_tokens, len(dataset) - start)
        yield tokenizer.decode_bytes(dataset.windows(np.array([start]), length)[0].tolist())


def check_fits(dataset: TokenDataset, vocab_size: int, context_length: int) -> None:
    """Raise a `UserError` where a model of this vocabulary and context cannot read `dataset`."""
    header = dataset.header
    if header.vocab_size > vocab_size:
        raise UserError(
            f"{dataset.path} has a vocabulary of {header.vocab_size} tokens, the model one of {vocab_size}: "
            f"set --model.vocab-size {header.vocab_size}"
        )
    if len(dataset) < context_length + 1:
        raise UserError(
            f"{dataset.path} has {len(dataset)} tokens, fewer than one sequence of {context_length} + 1: "
            "use a longer text or a smaller --model.context-length"
        )


def training_batch(dataset: TokenDataset, seed: int, step: int, batch_size: int, context_length: int) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets (batch_size, context_length) of one step: windows at random places.

    They depend on (seed, step) alone, so that a resumed run reads exactly what it would have read.
    """
    # The raw stream of a counter-based generator is the same in every version of NumPy; its distributions are not.
    raw = np.random.Philox(key=[seed, step]).random_raw(batch_size)
    starts = raw % np.uint64(len(dataset) - context_length)
    return _split(dataset.windows(starts.astype(np.int64), context_length + 1))


def validation_batches(
    dataset: TokenDataset, num_sequences: int, batch_size: int, context_length: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `num_sequences` sequences that cover the file evenly, each place at most once: the same ones every time."""
    num_sequences = min(num_sequences, (len(dataset) - 1) // context_length)
    starts = np.linspace(0, len(dataset) - context_length - 1, num_sequences).astype(np.int64)
    for first in range(0, num_sequences, batch_size):
        yield _split(dataset.windows(starts[first : first + batch_size], context_length + 1))


def _split(windows: np.ndarray) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(windows)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
