"""The validation sequences of a run: a fixed set, evenly spaced over a file."""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from .packing import Packing, packed_windows
from .sampling import inputs_and_targets
from .token_file import TokenDataset


class ValidationData:
    """At most `num_sequences` distinct windows, evenly spaced over a file, packed as training data is."""

    def __init__(
        self,
        dataset: TokenDataset,
        num_sequences: int,
        context_length: int,
        packing: Packing = Packing(),  # noqa: B008 (frozen)
    ) -> None:
        self.dataset, self._length = dataset, context_length + 1
        self._packed = packed_windows(dataset, context_length, packing)
        if self._packed is None:
            last, most = len(dataset) - self._length, (len(dataset) - 1) // context_length
        else:
            last, most = len(self._packed) - 1, len(self._packed)
        # Offsets of first tokens, or indices of packed windows.
        self._places = np.linspace(0, last, min(num_sequences, most)).astype(np.int64)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield the sequences in batches of at most `batch_size`, with the tensors of `TrainingData.batch`."""
        for first in range(0, len(self._places), batch_size):
            places = self._places[first : first + batch_size]
            if self._packed is None:
                yield inputs_and_targets(self.dataset.windows(places, self._length))
            else:
                yield self._packed.read(places)
