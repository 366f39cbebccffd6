"""Training and validation losses of each source of a data mixture."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .bits_per_byte import bits_per_byte, bytes_per_token
from .data.validation import ValidationData
from .distributed import IGNORED_TARGET, World


class Sources:
    """The sources of a mixture, in the order of the training data."""

    def __init__(
        self,
        names: Sequence[str],
        valid: Sequence[ValidationData] = (),
        token_sizes: Tensor | None = None,
        log_training_losses: bool = True,
    ) -> None:
        """Initialize the sources.

        Args:
            names: Name of each source.
            valid: Validation data of each source, or none.
            token_sizes: Bytes of each token, int64 (vocab_size); required with `valid`.
            log_training_losses: Whether to compute the training loss of each source.
        """
        self.names, self.log_training_losses = tuple(names), log_training_losses
        self.valid = dict(zip(names, valid, strict=bool(valid)))
        self._bytes = {}
        if token_sizes is not None:
            self._bytes = {name: bytes_per_token(data.batches(1), token_sizes) for name, data in self.valid.items()}

    def training_losses(self, losses: Tensor, targets: Tensor, sources: Tensor, world: World) -> dict[str, Tensor]:
        """Return the mean training loss of each source, in nats per scored token; NaN if the step has no token of the source.

        The host does not synchronize with the device.

        Args:
            losses: Loss of each sequence (B,), summed over this process's positions.
            targets: All targets of the sequences (B, T).
            sources: Index of the source of each sequence (B,), on the CPU.
            world: The processes of the run.
        """
        counts = (targets != IGNORED_TARGET).sum(dim=1).to(losses.dtype)
        numbers = torch.arange(len(self.names), device=losses.device)
        if losses.is_cuda:
            # A copy from pageable memory would synchronize.
            sources = sources.pin_memory()
        # Not index_add_, which is nondeterministic on a GPU.
        members = (sources.to(losses.device, non_blocking=True) == numbers[:, None]).to(losses.dtype)
        sums, tokens = world.sum((torch.stack([losses, counts])[:, None] * members).sum(dim=-1))
        # With context parallelism, a process has part of a sequence's loss but all of its targets.
        losses_of_all = sums / (tokens / world.times_read)
        return {f"loss/{name}": loss for name, loss in zip(self.names, losses_of_all.unbind(), strict=True)}

    def validation_row(self, name: str, loss: float) -> dict[str, float]:
        """Return the metrics of a source, given its validation loss in nats per token."""
        return {f"valid_loss/{name}": loss, f"valid_bits_per_byte/{name}": bits_per_byte(loss, self._bytes[name])}
