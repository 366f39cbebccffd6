"""Which place of which file each sample of a run is: shuffled without replacement, mixed by weights, in constant memory."""

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

# A run goes on only with the order it began with: another number says that the order has changed.
ORDER = 1
_SHARE_BITS = 32
# What keys are for, besides the permutations.
_PERMUTATION, _OFFSET = 0, 1


class TrainingData:
    """The samples of a run, 0, 1, 2, ...: each a window of `context_length` tokens and their successors.

    In an epoch of a file, its windows lie side by side and each is drawn once, in an order of the epoch's own; where the first
    one begins is drawn anew each epoch, so that no border stays. An epoch leaves out fewer than two windows' tokens, at the
    ends of the file. Packed windows, of chats and of text with best_fit, are the same in every epoch; files are either all
    packed or none is. Files take turns by their `weights`, by default in proportion to their number of windows: after any
    number of samples each has had its share, give or take as many samples as there are files.

    A sample is a function of the files, `context_length`, `weights`, `packing` and (seed, its number) alone, the same for ever.
    Of several shards that make a source, only their order counts: they are one file.
    """

    def __init__(
        self,
        datasets: tuple[TokenDataset, ...],
        context_length: int,
        seed: int,
        weights: tuple[float, ...] | None = None,
        packing: Packing = Packing(),  # noqa: B008 (frozen)
    ) -> None:
        """Check that each dataset holds a window: a shorter one is a `UserError`."""
        for dataset in datasets:
            require_length(dataset, context_length)
        self.datasets, self.context_length, self.seed = datasets, context_length, seed
        packed = (packed_windows(dataset, context_length, packing) for dataset in datasets)
        self.packed = [windows for windows in packed if windows is not None]
        if self.packed and len(self.packed) < len(datasets):
            raise UserError("data.train has files of chats and files of text: name one kind, or set data.packing best_fit")
        # Of text one less than fit, so that the first can begin at any of the first `context_length` tokens, or later.
        self.num_windows = [len(windows) for windows in self.packed] or [
            max(1, len(dataset) // context_length - 1) for dataset in datasets
        ]
        shares = list(weights or self.num_windows)
        # Each file's share of what the files before it leave, in units of 2^-32. Not `sum`, which rounds by Python's version.
        self._shares = [round(share / math.fsum(shares[i:]) * (1 << _SHARE_BITS)) for i, share in enumerate(shares)]

    def batch(self, samples: range) -> tuple[Tensor, ...]:
        """Return the inputs and targets of `samples`: (len(samples), context_length) each, int64, on the CPU.

        Of packed windows targets that are not scored are -100, and document ids follow, as large, int32. A file that has
        changed on disk is a `UserError`.
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
        """Return the file of a sample, and the number of its first token there."""
        files, starts = self._places(range(sample, sample + 1))
        file, start = int(files[0]), int(starts[0])
        if self.packed:
            start = self.packed[file].pieces(start)[0][0]
        return self.datasets[file].path, start

    def sources(self, samples: range) -> Tensor:
        """Return the number of the file that each sample is from, (len(samples),) int64."""
        return torch.from_numpy(self._places(samples)[0])

    def _places(self, samples: range) -> tuple[np.ndarray, np.ndarray]:
        """Return each sample's file, and its first token or packed window: numbers, both (len(samples),) int64."""
        left = np.array(samples, np.uint64)
        rows = np.arange(len(left))
        files, starts = np.empty(len(left), np.int64), np.empty(len(left), np.int64)
        for file, share in enumerate(self._shares):
            # Of the first n samples that are left, this file takes floor(n * share): a line drawn in whole steps.
            before, after = _times(left, share), _times(left + np.uint64(1), share)
            taken = after > before
            files[rows[taken]] = file
            starts[rows[taken]] = self._starts(file, before[taken])
            rows, left = rows[~taken], (left - before)[~taken]
        return files, starts

    def _starts(self, file: int, draws: np.ndarray) -> np.ndarray:
        """Return what `_places` does for each draw from a file, which are counted from 0 for each file."""
        num_windows, length = self.num_windows[file], self.context_length
        epochs, places = np.divmod(draws, np.uint64(num_windows))
        windows = permute(places, num_windows, make_keys(self.seed, file, _PERMUTATION, epochs))
        if self.packed:
            return windows
        num_offsets = len(self.datasets[file]) - num_windows * length
        offsets = make_keys(self.seed, file, _OFFSET, epochs) % np.uint64(num_offsets)
        return windows * length + offsets.astype(np.int64)

    def record(self) -> dict[str, Any]:
        """Return what a resumed run checks its data against, for JSON."""
        return {"order": ORDER, "files": [_record_of(dataset) for dataset in self.datasets]}


def _record_of(dataset: TokenDataset) -> dict[str, Any]:
    if isinstance(dataset, ShardedDataset):
        return {"path": str(dataset.path), "shards": [_record_of(shard) for shard in dataset.files]}
    return {"path": str(dataset.path), "stamp": asdict(dataset.stamp), "header": asdict(dataset.header)}


def check_record(stored: dict[str, Any], data: TrainingData) -> None:
    """Raise a `UserError` where `data` is not what `stored`, the record of a run, speaks of.

    Files may have moved. Their ids are read and hashed only where size or time differ from what was stored.
    """
    try:
        order = stored.get("order")
        sources = [
            [(TokenHeader(**file["header"]), FileStamp(**file["stamp"])) for file in item.get("shards", [item])]
            for item in stored["files"]
        ]
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"the run's record of its data cannot be read ({error!r}): start a new run") from error
    if order != ORDER:
        raise UserError(
            f"the run draws its data in order {order!r}, this version in {ORDER}: go on with the version it began with"
        )
    if len(sources) != len(data.datasets):
        raise UserError(f"the run began with {len(sources)} training files, not {len(data.datasets)}: name the same ones")
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
    """Return the tokens of `windows` (B, T + 1) int64 and their successors, (B, T) each, contiguous."""
    tokens = torch.from_numpy(windows)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def require_length(dataset: TokenDataset, context_length: int) -> None:
    """Raise a `UserError` for a dataset without a single window; a conversation may be shorter than one."""
    if not dataset.header.marked and len(dataset) < context_length + 1:
        raise UserError(
            f"{dataset.path} has {len(dataset)} tokens, fewer than one sequence of {context_length} + 1: "
            "use a longer text or a smaller --model.context-length"
        )


def _times(counts: np.ndarray, share: int) -> np.ndarray:
    """Return floor(counts * share / 2^32) without overflow; counts uint64, share at most 2^32."""
    bits = np.uint64(_SHARE_BITS)
    low = counts & np.uint64((1 << _SHARE_BITS) - 1)
    return (counts >> bits) * np.uint64(share) + ((low * np.uint64(share)) >> bits)
