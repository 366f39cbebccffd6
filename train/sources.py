"""The losses of each source of a mixture: on its sequences of a training step, and on a validation text of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .bits_per_byte import bits_per_byte, bytes_per_token
from .data.validation import ValidationData
from .distributed import IGNORED_TARGET, World


class Sources:
    """The sources by name, in the order of the training data."""

    def __init__(
        self,
        names: Sequence[str],
        valid: Sequence[ValidationData] = (),
        token_sizes: Tensor | None = None,
        trains_apart: bool = True,
    ) -> None:
        """Take no validation texts, or one for each name, with the bytes of each token, int64 (vocab_size).

        `trains_apart` says whether the training loss of each source is wanted.
        """
        self.names, self.trains_apart = tuple(names), trains_apart
        self.valid = dict(zip(names, valid, strict=bool(valid)))
        self._bytes = {}
        if token_sizes is not None:
            self._bytes = {name: bytes_per_token(data.batches(1), token_sizes) for name, data in self.valid.items()}

    def training_losses(self, losses: Tensor, targets: Tensor, sources: Tensor, world: World) -> dict[str, Tensor]:
        """Return the mean loss of each source in nats per scored token, NaN where a step has none of it; no host waits.

        `losses` (B,) are the sums of this process's positions in its sequences, with all `targets` (B, T) of these and the
        numbers of their `sources` (B,), on the CPU.
        """
        counts = (targets != IGNORED_TARGET).sum(dim=1).to(losses.dtype)
        numbers = torch.arange(len(self.names), device=losses.device)
        # Not index_add_, whose order of additions differs from run to run on a GPU.
        if losses.is_cuda:
            # The host would wait for a copy from memory that is not pinned.
            sources = sources.pin_memory()
        members = (sources.to(losses.device, non_blocking=True) == numbers[:, None]).to(losses.dtype)
        sums, tokens = world.sum((torch.stack([losses, counts])[:, None] * members).sum(dim=-1))
        # Processes that share a sequence have a part of its loss each, but all of its targets.
        losses_of_all = sums / (tokens / world.times_read)
        return {f"loss/{name}": loss for name, loss in zip(self.names, losses_of_all.unbind(), strict=True)}

    def validation_row(self, name: str, loss: float) -> dict[str, float]:
        """Return what is logged of a source's validation loss in nats per token."""
        return {f"valid_loss/{name}": loss, f"valid_bits_per_byte/{name}": bits_per_byte(loss, self._bytes[name])}
