"""The sampling of training data: shuffled without replacement, mixed by weights, in constant memory."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from .packing import Packing, packed_windows
from .permutation import make_keys, permute
from .shards import ShardedDataset
from .token_file import FileStamp, TokenDataset, TokenHeader

# The version of the sampling order. A run resumes only with the order that it began with.
ORDER = 1
_SHARE_BITS = 32
# Purposes of random keys.
_PERMUTATION, _OFFSET = 0, 1


class TrainingData:
    """The samples 0, 1, 2, ... of a run. Each is a window of `context_length` tokens with the next token of each as target.

    An epoch of a file samples each of its consecutive windows once, in a random order. A random offset shifts all windows of an
    epoch, so that window borders differ between epochs; fewer than two windows of tokens at the ends of the file are left out.
    Packed windows (chats, and text with best_fit) are the same in every epoch; either all files are packed or none. `weights`
    mix the files, by default in proportion to their number of windows. After any number of samples, the count of each file
    differs from its share by at most the number of files.

    A sample depends only on the files, `context_length`, `weights`, `packing`, the seed and its index. The shards of a source
    count as one file, in their order.
    """

    def __init__(
        self,
        datasets: tuple[TokenDataset, ...],
        context_length: int,
        seed: int,
        weights: tuple[float, ...] | None = None,
        packing: Packing = Packing(),  # noqa: B008 (frozen)
    ) -> None:
        """Raises a `UserError` if a dataset is shorter than a window."""
        for dataset in datasets:
            require_length(dataset, context_length)
        self.datasets, self.context_length, self.seed = datasets, context_length, seed
        packed = (packed_windows(dataset, context_length, packing) for dataset in datasets)
        self.packed = [windows for windows in packed if windows is not None]
        if self.packed and len(self.packed) < len(datasets):
            raise UserError("data.train has files of chats and of text: name files of one kind, or set data.packing best_fit")
        # For text, one window less than fits, so that the offset can be any of the first `context_length` tokens or more.
        self.num_windows = [len(windows) for windows in self.packed] or [
            max(1, len(dataset) // context_length - 1) for dataset in datasets
        ]
        shares = list(weights or self.num_windows)
        # The share of each file in the samples that the files before it leave, in units of 2^-32. `fsum`, because the rounding
        # of `sum` depends on the Python version.
        self._shares = [round(share / math.fsum(shares[i:]) * (1 << _SHARE_BITS)) for i, share in enumerate(shares)]

    def batch(self, samples: range) -> tuple[Tensor, ...]:
        """Return the inputs and targets of `samples`: (len(samples), context_length) each, int64, on the CPU.

        For packed windows, targets that are not scored are -100, and a third tensor of the same shape holds the document ids,
        int32. Raises a `UserError` if a file has changed on disk.
        """
        files, starts = self._places(samples)
        if self.packed:
            return self._packed_batch(files, starts)
        windows = np.empty((len(samples), self.context_length + 1), np.int64)
        for file in np.unique(files).tolist():
            rows = files == file
            windows[rows] = self.datasets[file].windows(starts[rows], self.context_length + 1)
        return inputs_and_targets(windows)

    def _packed_batch(self, files: np.ndarray, windows: np.ndarray) -> tuple[Tensor, ...]:
        order = np.argsort(files, kind="stable")
        parts = [self.packed[file].read(windows[files == file]) for file in np.unique(files).tolist()]
        rows = torch.from_numpy(np.argsort(order))
        return tuple(torch.cat(tensors)[rows] for tensors in zip(*parts, strict=True))

    def place(self, sample: int) -> tuple[Path, int]:
        """Return the file of a sample, and the offset of its first token in the file."""
        files, starts = self._places(range(sample, sample + 1))
        file, start = int(files[0]), int(starts[0])
        if self.packed:
            start = self.packed[file].pieces(start)[0][0]
        return self.datasets[file].path, start

    def sources(self, samples: range) -> Tensor:
        """Return the index of each sample's file, (len(samples),) int64."""
        return torch.from_numpy(self._places(samples)[0])

    def _places(self, samples: range) -> tuple[np.ndarray, np.ndarray]:
        """Return the index of each sample's file, and its first token or packed window, both (len(samples),) int64."""
        left = np.array(samples, np.uint64)
        rows = np.arange(len(left))
        files, starts = np.empty(len(left), np.int64), np.empty(len(left), np.int64)
        for file, share in enumerate(self._shares):
            # Of the first n remaining samples, this file takes floor(n * share).
            before, after = _floor_share(left, share), _floor_share(left + np.uint64(1), share)
            taken = after > before
            files[rows[taken]] = file
            starts[rows[taken]] = self._starts(file, before[taken])
            rows, left = rows[~taken], (left - before)[~taken]
        return files, starts

    def _starts(self, file: int, draws: np.ndarray) -> np.ndarray:
        """Return the first token or the packed window of each draw from a file. Draws of a file are counted from 0."""
        num_windows, length = self.num_windows[file], self.context_length
        epochs, places = np.divmod(draws, np.uint64(num_windows))
        windows = permute(places, num_windows, make_keys(self.seed, file, _PERMUTATION, epochs))
        if self.packed:
            return windows
        num_offsets = len(self.datasets[file]) - num_windows * length
        offsets = make_keys(self.seed, file, _OFFSET, epochs) % np.uint64(num_offsets)
        return windows * length + offsets.astype(np.int64)

    def record(self) -> dict[str, Any]:
        """Return the record (JSON types) against which `check_record` checks a resumed run."""
        return {"order": ORDER, "files": [_record_of(dataset) for dataset in self.datasets]}


def _record_of(dataset: TokenDataset) -> dict[str, Any]:
    if isinstance(dataset, ShardedDataset):
        return {"path": str(dataset.path), "shards": [_record_of(shard) for shard in dataset.files]}
    return {"path": str(dataset.path), "stamp": asdict(dataset.stamp), "header": asdict(dataset.header)}


def check_record(stored: dict[str, Any], data: TrainingData) -> None:
    """Raise a `UserError` if `data` differs from `stored`, the record of a run.

    Files may have moved. Their ids are hashed only if size or modification time differ from the record.
    """
    try:
        order = stored.get("order")
        sources = [
            [(TokenHeader(**file["header"]), FileStamp(**file["stamp"])) for file in item.get("shards", [item])]
            for item in stored["files"]
        ]
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"cannot read the run's record of its data: {error!r}; start a new run") from error
    if order != ORDER:
        raise UserError(
            f"the run samples its data in order {order!r}: this version supports {ORDER}; use the version that began the run"
        )
    if len(sources) != len(data.datasets):
        raise UserError(f"the run began with {len(sources)} training files, not {len(data.datasets)}; name the same files")
    for files, dataset in zip(sources, data.datasets, strict=True):
        if len(files) != len(dataset.files):
            raise UserError(f"the run began with {len(files)} shards of {dataset.path}, not {len(dataset.files)}")
        for (header, stamp), file in zip(files, dataset.files, strict=True):
            _check_file(header, stamp, file)


def _check_file(header: TokenHeader, stamp: FileStamp, file: TokenDataset) -> None:
    for name, what in {"sha256": "ids", "num_tokens": "length", "vocab_size": "vocabulary", "tokenizer": "tokenizer"}.items():
        if getattr(header, name) != getattr(file.header, name):
            raise UserError(f"{file.path} is not the file that the run began with: it has another {what}")
    if (stamp.size, stamp.mtime_ns) != (file.stamp.size, file.stamp.mtime_ns):
        file.verify()


def inputs_and_targets(windows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Split `windows` (B, T + 1) int64 into inputs and targets, (B, T) each, contiguous."""
    tokens = torch.from_numpy(windows)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def require_length(dataset: TokenDataset, context_length: int) -> None:
    """Raise a `UserError` if a dataset of text is shorter than a window. Conversations may be shorter."""
    if not dataset.header.marked and len(dataset) < context_length + 1:
        raise UserError(
            f"{dataset.path} has {len(dataset)} tokens: at least {context_length} + 1 are needed; "
            "use a longer text or a smaller --model.context-length"
        )


def _floor_share(counts: np.ndarray, share: int) -> np.ndarray:
    """Return floor(counts * share / 2^32) without overflow; counts uint64, share at most 2^32."""
    bits = np.uint64(_SHARE_BITS)
    low = counts & np.uint64((1 << _SHARE_BITS) - 1)
    return (counts >> bits) * np.uint64(share) + ((low * np.uint64(share)) >> bits)
